"""A LoRA-tuned Llama's forward and backward written out, as few kernels as go: products and what `kd.distill.kernels`
has for all that lies between them.

The base is frozen, so nothing is kept for its weights' gradients, and the first layer's input needs none. What the
adapters' gradients are made of is kept of all layers in one tensor each, and they are made together at the end: four
kernels for the whole model. Dropout is four bits for each token and column, drawn once a step.
"""

from __future__ import annotations

import sys
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch

from kd.distill.lean import Adapters, joined_layers, runs_lean
from kd.distill.plain import Down, Heads, Turn, Up
from kd.kernels import lacking

HIGHEST_RANK = 16  # above it the kernels' blocks outgrow the registers


@cache
def triton_kernels() -> ModuleType | None:
    """`kd.distill.kernels` where they run; on a GPU where they do not, None, and one line says why."""
    if not torch.cuda.is_available():
        return None
    if missing := lacking():
        print(f"kd train: goes on without Triton's kernels, slower: they need {missing}", file=sys.stderr)
        return None
    from kd.distill import kernels

    return kernels


def kernels_name(settings: Any) -> str:
    """The kernels that shape the bits of a result with these settings; empty where none do."""
    if settings.step == "eager" or triton_kernels() is None:
        return ""
    from importlib.metadata import version

    return f"Triton {version('triton')} kernels"


def runs_fused(student: Any) -> bool:
    """Whether this PEFT student is one whose step is written out here: as `runs_lean` has it, in bfloat16 or float32,
    with adapters of a low rank on queries, keys, values and attention's output, and nowhere else."""
    if not runs_lean(student) or student.dtype not in (torch.bfloat16, torch.float32):
        return False
    (lora,) = student.peft_config.values()
    wanted = {"q_proj", "k_proj", "v_proj", "o_proj"}
    even = student.get_base_model().model.layers[0].self_attn.head_dim % 2 == 0
    return set(lora.target_modules) == wanted and lora.r <= HIGHEST_RANK and even


class Kept(NamedTuple):
    """What the backward needs of one layer."""

    x: torch.Tensor  # the residual stream before attention, and before the feed-forward part
    middle: torch.Tensor
    factors: tuple[torch.Tensor, torch.Tensor]  # of the norms of both
    qkv: torch.Tensor  # behind the adapters, queries and keys turned
    attention: Any
    gate_up: torch.Tensor


class Trace(NamedTuple):
    """What the backward needs of a forward; the tensors are all layers', [layers, tokens, ...]."""

    examples: int
    adapters: torch.Tensor  # [layers, what one layer's adapters hold], float32
    turn: Turn
    keep: torch.Tensor | None
    normed: torch.Tensor  # what queries', keys' and values' adapters read
    mixed: torch.Tensor  # what the output's adapter reads
    low: torch.Tensor  # the low-rank rows of the former
    low_out: torch.Tensor  # and of the latter
    layers: list[Kept]
    last: tuple[torch.Tensor, torch.Tensor]  # the residual stream behind the last layer, and its norm's factor


class FusedLlama:
    """A PEFT student's final hidden states in training mode, and the gradient of its adapters. See `runs_fused`.

    `operations` is `kd.distill.kernels` or `kd.distill.plain`.
    """

    def __init__(self, student: Any, operations: ModuleType | Any) -> None:
        model = student.get_base_model().model
        config = model.config
        self._do = operations
        self._embed, self._rotary, self._norm = model.embed_tokens, model.rotary_emb, model.norm.weight
        self._eps = config.rms_norm_eps
        self._layers = joined_layers(student)
        self._turns: dict[int, Turn] = {}
        self._heads = Heads(config.num_attention_heads, config.num_key_value_heads, model.layers[0].self_attn.head_dim)
        qkv, out = self._layers[0].qkv.adapters, self._layers[0].o.adapters
        assert qkv
        assert out
        self._scaling, self._dropout = qkv.scaling, qkv.dropout
        (lora,) = student.peft_config.values()
        self._rank = lora.r
        hidden, mixed = config.hidden_size, self._heads.widths[0]
        self._sizes = [(3 * self._rank, hidden), (sum(self._heads.widths), self._rank), (self._rank, mixed)]
        self._sizes.append((hidden, self._rank))
        self.order = [name for layer in self._layers for part in (layer.qkv, layer.o) for name in _names(part.adapters)]

    def __call__(self, input_ids: torch.Tensor, tuned: torch.Tensor) -> torch.Tensor:
        """Final hidden states behind the norm, [examples, tokens, hidden], of right-padded token ids. `tuned` are the
        adapters' weights, float32, end to end in `order`, and have a gradient."""
        hidden: torch.Tensor = _Fused.apply(tuned, input_ids, self)  # type: ignore[no-untyped-call]
        return hidden

    def forward(self, input_ids: torch.Tensor, tuned: torch.Tensor) -> tuple[torch.Tensor, Trace]:
        """The states, and what `backward` takes."""
        do, heads, rank = self._do, self._heads, self._rank
        examples, positions = input_ids.shape
        count, tokens = len(self._layers), input_ids.numel()
        x = self._embed(input_ids).flatten(0, 1)
        low = torch.empty(count, tokens, 3 * rank, dtype=torch.float32, device=x.device)
        low_out = torch.empty(count, tokens, rank, dtype=torch.float32, device=x.device)
        normed, mixed = x.new_empty(count, *x.shape), x.new_empty(count, tokens, heads.widths[0])
        keep = self._keep(count, tokens, max(x.shape[1], mixed.shape[2]), x.device)
        adapters, turn = tuned.view(count, -1), self._turn(positions, x.device)
        layers = []
        delta = None
        for i, layer in enumerate(self._layers):
            down, up, down_out, up_out = self._adapters(adapters[i], None if keep is None else keep[i])
            x, factor = do.add_norm(x, delta, layer.input_norm, self._eps, normed[i], down=(down, low[i]))
            qkv = normed[i] @ layer.qkv.weight.T
            do.rotate(qkv, low[i], up, turn, heads)
            attention = do.attention(qkv, heads, examples, mixed[i])
            do.project_down(mixed[i], down_out, low_out[i])
            delta, seen = mixed[i] @ layer.o.weight.T, torch.empty_like(x)
            middle, second = do.add_norm(x, delta, layer.post_norm, self._eps, seen, up=(low_out[i], up_out))
            gate_up = seen @ layer.gate_up.weight.T
            delta = do.swiglu(gate_up) @ layer.down.weight.T
            layers.append(Kept(x, middle, (factor, second), qkv, attention, gate_up))
            x = middle
        out = torch.empty_like(x)
        last = do.add_norm(x, delta, self._norm, self._eps, out)
        trace = Trace(examples, adapters, turn, keep, normed, mixed, low, low_out, layers, last)
        return out.view(examples, positions, -1), trace

    def backward(self, trace: Trace, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of the adapters' weights, in `order`, from that of the states. What a trace holds is spent."""
        do, heads = self._do, self._heads
        gradient = gradient.reshape(trace.last[0].shape)
        into_low, into_low_out = torch.empty_like(trace.low), torch.empty_like(trace.low_out)
        into_qkv = trace.normed.new_empty(*trace.low.shape[:2], sum(heads.widths))
        into_middle = torch.empty_like(trace.normed)
        into_x = torch.empty_like(gradient)
        do.add_norm_backward(gradient, None, *trace.last, self._norm, into_x)
        for i in reversed(range(len(self._layers))):
            layer, kept = self._layers[i], trace.layers.pop()
            down, up, down_out, up_out = self._adapters(
                trace.adapters[i], None if trace.keep is None else trace.keep[i]
            )
            do.swiglu_backward(into_x @ layer.down.weight, kept.gate_up)
            into_normed = kept.gate_up @ layer.gate_up.weight
            do.add_norm_backward(
                into_normed,
                into_x,
                kept.middle,
                kept.factors[1],
                layer.post_norm,
                into_middle[i],
                up=(up_out, into_low_out[i]),
            )
            into_mixed = into_middle[i] @ layer.o.weight
            do.project_down_backward(into_mixed, into_low_out[i], down_out)
            parts = do.attention_backward(into_mixed, kept.qkv, trace.mixed[i], kept.attention, heads, trace.examples)
            do.rotate_backward(parts, up, trace.turn, heads, into_qkv[i], into_low[i])
            if i == 0:  # the embedding is frozen
                break
            into_normed = into_qkv[i] @ layer.qkv.weight
            do.add_norm_backward(
                into_normed,
                into_middle[i],
                kept.x,
                kept.factors[0],
                layer.input_norm,
                into_x,
                down=(into_low[i], down),
            )
        found = torch.empty_like(trace.adapters)
        a, b, a_out, b_out = self._split(found)
        down, _, down_out, _ = self._adapters(trace.adapters[0], trace.keep)
        do.down_gradient(trace.normed, into_low, down, a)
        do.up_gradient(into_qkv, trace.low, self._scaling, heads.widths, b)
        do.down_gradient(trace.mixed, into_low_out, down_out, a_out)
        do.up_gradient(into_middle, trace.low_out, self._scaling, (into_middle.shape[2],), b_out)
        return found.flatten()

    def _keep(self, layers: int, tokens: int, width: int, device: torch.device) -> torch.Tensor | None:
        """This step's dropout, from torch's generator of the device."""
        if self._dropout == 0:
            return None
        seed = torch.empty((), dtype=torch.int64, device=device).random_()
        keep = torch.empty(layers, tokens, width, dtype=torch.uint8, device=device)
        self._do.dropout_bits(seed, self._dropout, keep)
        return keep

    def _adapters(self, flat: torch.Tensor, keep: torch.Tensor | None) -> tuple[Down, Up, Down, Up]:
        """Of one layer: A and B of queries, keys and values, A and B of attention's output."""
        a, b, a_out, b_out = self._split(flat)
        scale = 1 / (1 - self._dropout)
        down, down_out = (Down(part, self._rank, keep, first, scale) for part, first in ((a, 0), (a_out, 3)))
        return down, Up(b, self._scaling), down_out, Up(b_out, self._scaling)

    def _split(self, flat: torch.Tensor) -> list[torch.Tensor]:
        parts = flat.split([rows * columns for rows, columns in self._sizes], dim=-1)
        return [part.unflatten(-1, size) for part, size in zip(parts, self._sizes, strict=True)]

    def _turn(self, positions: int, device: torch.device) -> Turn:
        """Made once for a length, not in a graph: a step is recorded after it was done once."""
        if positions not in self._turns:
            half = self._heads.dim // 2
            dummy = torch.empty((), dtype=torch.float32, device=device)
            cos, sin = self._rotary(dummy, torch.arange(positions, device=device)[None])
            self._turns[positions] = Turn(cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous())
        return self._turns[positions]


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tuned: torch.Tensor, input_ids: torch.Tensor, llama: FusedLlama) -> torch.Tensor:
        hidden, ctx.trace = llama.forward(input_ids, tuned)
        ctx.llama = llama
        return hidden

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        trace, ctx.trace = ctx.trace, None
        return ctx.llama.backward(trace, upstream[0]), None, None


def _names(adapters: Adapters | None) -> list[str]:
    assert adapters
    return [*adapters.downs, *(name for name in adapters.ups if isinstance(name, str))]
