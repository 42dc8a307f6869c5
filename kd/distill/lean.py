"""The student's forward written out: what PEFT and transformers compute for a LoRA-tuned Llama, in fewer kernels.

A step over one question is bound by launches and by reading the weights, so layers that read the same input are joined
into one product (the modules' own weights become views of it), and so are the adapters on them. The adapters' products
run in the model's dtype, where PEFT runs them in float32; their weights and momenta stay float32. What that rounds away
is far below what a bfloat16 model rounds anyway (docs/performance.md has both against float32).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812


def runs_lean(student: Any) -> bool:
    """Whether this PEFT student is one whose forward is written out here: a Llama without biases."""
    model = student.get_base_model()
    biased = any(getattr(model.config, name, False) for name in ("attention_bias", "mlp_bias", "attention_dropout"))
    return type(model).__name__ == "LlamaForCausalLM" and not biased


class Adapters(NamedTuple):
    """LoRA on layers with one input: the names of A and of B (a zero tensor stands for a layer without an adapter),
    `owners` [sum of outs, adapters, 1], 1 where an output is an adapter's and else 0, and scaling and dropout, common
    to all as one LoRA configuration has them."""

    downs: list[str]
    ups: list[str | torch.Tensor]
    owners: torch.Tensor
    scaling: float
    dropout: float


class Joined(NamedTuple):
    """Linear layers with one input, their weights end to end [sum of outs, in], and their adapters."""

    weight: torch.Tensor
    adapters: Adapters | None

    def __call__(self, x: torch.Tensor, tuned: dict[str, torch.Tensor]) -> torch.Tensor:
        """[tokens, in] -> [tokens, sum of outs] with the `tuned` weights; each adapter has a dropout of its own."""
        out: torch.Tensor = F.linear(x, self.weight)
        if self.adapters is None:
            return out
        if tuned[self.adapters.downs[0]].dim() == 3:
            return self._cohort(x, out, tuned, self.adapters)
        count = len(self.adapters.downs)
        down = torch.cat([tuned[name] for name in self.adapters.downs])
        up = torch.cat([tuned[up] if isinstance(up, str) else up for up in self.adapters.ups])
        # Every A sees every adapter's x, which costs less than small products apart; the diagonal is what belongs.
        seen = F.dropout(x.expand(count, -1, -1), self.adapters.dropout)
        low = F.linear(seen, down).unflatten(-1, (count, -1)).diagonal(dim1=0, dim2=2).transpose(1, 2).flatten(1)
        wide = (up[:, None] * self.adapters.owners).flatten(1)
        return out.addmm_(low, wide.T, alpha=self.adapters.scaling)

    def _cohort(
        self, x: torch.Tensor, out: torch.Tensor, tuned: dict[str, torch.Tensor], adapters: Adapters
    ) -> torch.Tensor:
        """The same for a cohort: the `tuned` tensors have a student before their own dimensions, and x has equally many
        tokens of each student, one student after the other."""
        down = torch.stack([tuned[name] for name in adapters.downs], dim=1)  # [students, adapters, rank, in]
        students, count, rank, _ = down.shape
        ups = [tuned[up] if isinstance(up, str) else up.expand(students, -1, -1) for up in adapters.ups]
        up = torch.cat(ups, dim=1)  # [students, sum of outs, rank]
        each = x.view(students, 1, -1, x.shape[-1]).expand(-1, count, -1, -1)
        seen = F.dropout(each, adapters.dropout).flatten(0, 1)
        low = torch.bmm(seen, down.flatten(0, 1).transpose(1, 2))  # [students * adapters, tokens, rank]
        low = low.view(students, count, -1, rank).transpose(1, 2).flatten(2)
        wide = (up[:, :, None] * adapters.owners).flatten(2)  # [students, sum of outs, adapters * rank]
        added = torch.baddbmm(out.view(students, -1, out.shape[-1]), low, wide.transpose(1, 2), alpha=adapters.scaling)
        return added.flatten(0, 1)


class Layer(NamedTuple):
    """One decoder layer's weights."""

    input_norm: torch.Tensor
    qkv: Joined
    o: Joined
    post_norm: torch.Tensor
    gate_up: Joined
    down: Joined


class LeanLlama:
    """A PEFT student's final hidden states in training mode, by its own weights. See `runs_lean`."""

    def __init__(self, student: Any) -> None:
        model = student.get_base_model().model
        self._config = model.config
        self._embed, self._rotary, self._norm = model.embed_tokens, model.rotary_emb, model.norm.weight
        self._layers = joined_layers(student)

    def __call__(self, input_ids: torch.Tensor, tuned: dict[str, torch.Tensor]) -> torch.Tensor:
        """Final hidden states behind the norm, [examples, tokens, hidden], of right-padded token ids, with the
        adapters' `tuned` weights. Attention is causal: no token sees the padding behind it, so no mask is needed."""
        examples, tokens = input_ids.shape
        x: torch.Tensor = self._embed(input_ids).flatten(0, 1)
        cos, sin = self._rotary(x, torch.arange(tokens, device=x.device)[None])
        # Rotating takes (-second half, first half); the sign goes into the sine.
        sin = torch.cat((-sin[..., : sin.shape[-1] // 2], sin[..., sin.shape[-1] // 2 :]), dim=-1)
        for layer in self._layers:
            x = x + self._attention(layer, self._normed(x, layer.input_norm), tuned, examples, cos, sin)
            gate, up = layer.gate_up(self._normed(x, layer.post_norm), tuned).chunk(2, dim=-1)
            x = x + layer.down(F.silu(gate) * up, tuned)
        return self._normed(x, self._norm).view(examples, tokens, -1)

    def _normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, self._config.rms_norm_eps)

    def _attention(
        self,
        layer: Layer,
        x: torch.Tensor,
        tuned: dict[str, torch.Tensor],
        examples: int,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:
        heads, kv_heads = self._config.num_attention_heads, self._config.num_key_value_heads
        every = layer.qkv(x, tuned).unflatten(1, (heads + 2 * kv_heads, -1)).unflatten(0, (examples, -1))
        qk, v = every.transpose(1, 2).split((heads + kv_heads, kv_heads), dim=1)
        first, second = qk.chunk(2, dim=-1)
        qk = torch.addcmul(qk * cos, torch.cat((second, first), dim=-1), sin)
        q, k = qk.split((heads, kv_heads), dim=1)
        k, v = (part.repeat_interleave(heads // kv_heads, dim=1) for part in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return layer.o(mixed.transpose(1, 2).flatten(0, 1).flatten(1), tuned)


def joined_layers(student: Any) -> list[Layer]:
    """A student's decoder layers, what reads the same input joined: its own weights are views of these afterwards."""
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    return [_layer(layer, names) for layer in student.get_base_model().model.layers]


def _layer(layer: Any, names: dict[int, str]) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return Layer(
        layer.input_layernorm.weight,
        _joined(names, attention.q_proj, attention.k_proj, attention.v_proj),
        _joined(names, attention.o_proj),
        layer.post_attention_layernorm.weight,
        _joined(names, mlp.gate_proj, mlp.up_proj),
        _joined(names, mlp.down_proj),
    )


def _joined(names: dict[int, str], *linears: Any) -> Joined:
    plain = [getattr(linear, "base_layer", linear) for linear in linears]
    widths = [linear.out_features for linear in plain]
    weight = torch.cat([linear.weight.detach() for linear in plain]) if len(plain) > 1 else plain[0].weight
    for linear, view in zip(plain, weight.split(widths), strict=True):
        linear.weight.data = view
    adapted = [linear for linear in linears if hasattr(linear, "lora_A")]
    if not adapted:
        return Joined(weight, None)
    (name,) = adapted[0].active_adapters
    rank = adapted[0].r[name]
    owners = [
        torch.tensor([float(linear is other) for other in adapted]).expand(width, -1)
        for linear, width in zip(linears, widths, strict=True)
    ]
    adapters = Adapters(
        [names[id(linear.lora_A[name].weight)] for linear in adapted],
        [
            names[id(linear.lora_B[name].weight)] if linear in adapted else weight.new_zeros(width, rank)
            for linear, width in zip(linears, widths, strict=True)
        ],
        torch.cat(owners)[..., None].to(weight),
        adapted[0].scaling[name],
        getattr(adapted[0].lora_dropout[name], "p", 0.0),  # PEFT puts an Identity for no dropout
    )
    return Joined(weight, adapters)
