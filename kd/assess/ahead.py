"""Greedy decoding by a Llama written out in few kernels, several steps ahead of what the host has seen.

A step chooses its rows' next tokens and sees which of them end, all on the device (`kd/assess/kernels.py`, or
`kd/assess/plain.py` beside it): it needs nothing of the host, which launches a round of steps and then reads what the
round before left. A row that has ended reads and writes nothing more; what only the host can see (a string that stops a
row) it sees at most two rounds late, and cuts. Which round sees what does not depend on time, so the same rows give the
same tokens twice.

Layers that read the same input are one product: their weights lie end to end in one tensor, of which the modules' own
become views.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F  # noqa: N812

from kd.assess.plain import Slots
from kd.assess.row import Row, halved, join, lower
from kd.kernels import lacking

LOOK = 8  # steps between two looks of the host
PREFILL_TOKENS = 8192  # of prompts read in one forward


def kernels_for(model: Any) -> ModuleType | None:
    """The kernels, where this machine has what they need and `model` is one that they are written for; a GPU that goes
    without says why."""
    if model.device.type != "cuda":
        return None
    if missing := lacking() or (None if is_written_out(model) else "a Llama of usual heads without biases"):
        print(f"decoding by the model's own modules, which is slower: the kernels need {missing}", file=sys.stderr)
        return None
    from kd.assess import kernels

    return kernels


def is_written_out(model: Any) -> bool:
    """Whether the step below is this model's: a Llama without biases, of usual heads, whose rotation is fixed."""
    if type(model).__name__ != "LlamaForCausalLM":
        return False
    config = model.config
    odd = config.attention_bias or config.mlp_bias or config.pretraining_tp > 1 or config.hidden_act != "silu"
    fixed = getattr(model.model.rotary_emb, "rope_type", "default") != "dynamic"
    return not odd and fixed and config.hidden_size // config.num_attention_heads in (32, 64, 128)


class Layer(NamedTuple):
    """One decoder layer's weights."""

    input_norm: torch.Tensor
    qkv: torch.Tensor
    o: torch.Tensor
    post_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


class Round(NamedTuple):
    """What was launched together: what it leaves for the host, when, and whose the slots were."""

    left: torch.Tensor  # [slots, ring + 1] int32: the tokens, and the position of the newest
    done: torch.cuda.Event | None
    rows: dict[int, Row]


@torch.inference_mode()
def decode_ahead(
    decoder: AheadDecoder, waiting: deque[Row], active: dict[int, Row], ended: Callable[[Row], bool]
) -> Iterator[list[Row]]:
    """Decode all of `waiting`; after each round, yield the rows that `ended` or failed in it."""
    while waiting or active:
        if joined := join(waiting, active, decoder.slots):
            decoder.prefill(joined)
        elif not waiting:
            decoder.move_down(active)
        decoder.launch(active)
        slots = {row.index: slot for slot, row in active.items()}
        left = []
        for row, tokens in decoder.report(active):
            if row.index in slots and _continue(row, tokens, ended):
                decoder.stop(slots[row.index], active.pop(slots[row.index]))
                left.append(row)
        yield left


def _since(position: int, left: list[int]) -> list[int]:
    """The tokens behind `position` that a slot has `left`."""
    *ring, newest = left
    return [ring[i % len(ring)] for i in range(position + 1, newest + 1)]


def _continue(row: Row, tokens: list[int], ended: Callable[[Row], bool]) -> bool:
    """Add tokens to a row up to one with which it fails or has `ended`; returns whether it does."""
    for token in tokens:
        row.add(token)
        if row.failure or ended(row):
            return True
    return False


class AheadDecoder:
    """A Llama with a static cache of `slots` rows by `length` positions, which continues its rows by itself.

    A row ends with one of `ends`, at its limit, or when it is stopped. `operations` are `kd.assess.kernels` or
    `kd.assess.plain`.
    """

    def __init__(
        self,
        model: Any,
        slots: int,
        length: int,
        ends: frozenset[int],
        operations: ModuleType,
    ) -> None:
        config, self.device = model.config, model.device
        self.on_gpu = self.device.type == "cuda"
        self.model, self.slots, self.length = model, slots, length
        self.ends = ends
        self.operations: Any = operations
        self.layers = [_layer(layer) for layer in model.model.layers]
        self.head_dim = config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, slots, config.num_key_value_heads, length, self.head_dim)
        self.keys = torch.empty(shape, dtype=model.dtype, device=self.device)
        self.values = torch.empty_like(self.keys)
        cosines, sines = model.model.rotary_emb(self.keys, torch.arange(length, device=self.device)[None])
        self.rotary = cosines[0].contiguous(), sines[0].contiguous()  # [length, head_dim]
        self.numbers = torch.arange(slots, dtype=torch.int32, device=self.device)
        self.state = Slots(
            tokens=torch.zeros(slots, dtype=torch.long, device=self.device),
            positions=torch.zeros(slots, dtype=torch.int32, device=self.device),
            lasts=torch.zeros(slots, dtype=torch.int32, device=self.device),
            ring=torch.zeros(slots, LOOK + 1, dtype=torch.int32, device=self.device),  # a prompt's first token too
            ends=torch.tensor(sorted(ends), dtype=torch.int32, device=self.device),
        )
        self.rounds: deque[Round] = deque()
        self.owed: dict[int, int] = {}  # by row: tokens up to its limit that no step was launched for
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def prefill(self, rows: Mapping[int, Row]) -> None:
        """Read whole prompts, given by slot and longest first, and choose each one's first new token."""
        self.owed.update((row.index, row.limit - 1) for row in rows.values())
        slots = list(rows)
        while slots:
            count = max(1, PREFILL_TOKENS // len(rows[slots[0]].prompt))
            group, slots = slots[:count], slots[count:]
            self._read(group, [rows[slot] for slot in group])

    def launch(self, active: Mapping[int, Row]) -> None:
        """Launch a round, of as many steps as a row of `active` still has up to its limit, at most LOOK; none if
        all is under way."""
        steps = min(LOOK, max(self.owed[row.index] for row in active.values()))
        if steps <= 0 and self.rounds:
            return
        rows = halved(self.slots, max(active) + 1)
        for _ in range(steps):
            self._replay(rows)
        for row in active.values():
            self.owed[row.index] -= steps
        left = torch.cat((self.state.ring, self.state.positions[:, None]), dim=1)
        done = None
        if self.on_gpu:
            left = torch.empty_like(left, device="cpu", pin_memory=True).copy_(left, non_blocking=True)
            done = torch.cuda.current_stream().record_event()
        self.rounds.append(Round(left, done, dict(active)))

    def report(self, active: Mapping[int, Row]) -> list[tuple[Row, list[int]]]:
        """What the oldest round chose for its rows, with what they have not seen of rounds before; nothing while it is
        the only one and a row of `active` has more to launch."""
        if len(self.rounds) < 2 and any(self.owed[row.index] > 0 for row in active.values()):
            return []
        left, done, rows = self.rounds.popleft()
        if done is not None:
            done.synchronize()
        table = left.tolist()
        return [(row, _since(row.position, table[slot])) for slot, row in rows.items()]

    def stop(self, slot: int, row: Row) -> None:
        """Let go of a row that is done, though the device may not know it."""
        if row.failure is None and row.new[-1] not in self.ends and len(row.new) < row.limit:
            self.state.lasts[slot] = 0

    def move_down(self, active: dict[int, Row]) -> None:
        """Move the rows of the highest slots into free lower ones, where steps on fewer rows come of it."""
        rows = halved(self.slots, len(active))
        if rows == halved(self.slots, max(active) + 1):
            return
        moves = lower(active, rows)
        old, new = self._there(list(moves)), self._there(list(moves.values()))
        state = self.state
        for held in (*self.keys, *self.values, state.tokens, state.positions, state.lasts, state.ring):
            held[new] = held[old]
        state.lasts[old] = 0

    def _there(self, numbers: list[Any]) -> torch.Tensor:
        """Numbers on the device, for which the host does not wait."""
        held = torch.tensor(numbers)
        return held.pin_memory().to(self.device, non_blocking=True) if self.on_gpu else held

    def _read(self, slots: list[int], rows: list[Row]) -> None:
        """The model's own forward over whole prompts; what is padded behind them lies where no row looks."""
        from transformers import DynamicCache

        lengths = [len(row.prompt) for row in rows]
        longest = max(lengths)
        padded = [row.prompt + [0] * (longest - len(row.prompt)) for row in rows]
        where = self._there(slots)
        last = self._there([length - 1 for length in lengths])
        limits = self._there([length + row.limit - 1 for length, row in zip(lengths, rows, strict=True)])
        read = self.model.model(self._there(padded), past_key_values=DynamicCache(), use_cache=True)
        for layer in range(len(self.keys)):
            self.keys[layer, where, :, :longest] = read.past_key_values.key_cache[layer]
            self.values[layer, where, :, :longest] = read.past_key_values.value_cache[layer]
        final = read.last_hidden_state[torch.arange(len(rows), device=self.device), last]
        logits = self.model.lm_head(final)
        self.state.positions[where] = last.int()
        self.state.lasts[where] = limits.int()
        self.operations.choose(logits, where.int(), self.state)

    def _replay(self, rows: int) -> None:
        """`_step`, on a GPU as a CUDA graph, captured when first asked for."""
        if not self.on_gpu:
            self._step(rows)
            return
        if rows not in self.graphs:
            lasts = self.state.lasts.clone()
            self.state.lasts.zero_()  # no row is live: the step changes nothing
            self._step(rows)  # kernels are compiled and libraries set themselves up, which must not be captured
            graph = torch.cuda.CUDAGraph()
            pool = next((known.pool() for known in self.graphs.values()), None)
            with torch.cuda.graph(graph, pool=pool):
                self._step(rows)
            self.state.lasts.copy_(lasts)
            self.graphs[rows] = graph
        self.graphs[rows].replay()

    def _step(self, rows: int) -> None:
        """One more token for each live one of the first `rows` slots."""
        do, llama, state = self.operations, self.model.model, self.state
        hidden = F.embedding(state.tokens[:rows], llama.embed_tokens.weight)
        added = None
        for layer, keys, values in zip(self.layers, self.keys, self.values, strict=True):
            normed = do.add_norm(hidden, added, layer.input_norm, llama.norm.variance_epsilon)
            qkv = do.product(normed, layer.qkv).unflatten(-1, (-1, self.head_dim))
            read = do.attend(qkv, keys, values, self.rotary, state)
            normed = do.add_norm(hidden, do.product(read, layer.o), layer.post_norm, llama.norm.variance_epsilon)
            added = do.product(do.gated(normed, layer.gate_up), layer.down)
        normed = do.add_norm(hidden, added, llama.norm.weight, llama.norm.variance_epsilon)
        logits = do.product(normed, self.model.lm_head.weight)
        do.choose(logits[0], self.numbers[:rows], state)


def _layer(layer: Any) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return Layer(
        layer.input_layernorm.weight.detach(),
        _joined(attention.q_proj, attention.k_proj, attention.v_proj),
        attention.o_proj.weight.detach(),
        layer.post_attention_layernorm.weight.detach(),
        _joined(mlp.gate_proj, mlp.up_proj),
        mlp.down_proj.weight.detach(),
    )


def _joined(*linears: Any) -> torch.Tensor:
    """The layers' weights end to end [sum of outs, in], which their own become views of."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    for linear, view in zip(linears, weight.split([linear.out_features for linear in linears]), strict=True):
        linear.weight.data = view
    if weight.is_cuda:
        torch.cuda.empty_cache()  # what they were lies in pieces too small for the next layer's
    return weight
