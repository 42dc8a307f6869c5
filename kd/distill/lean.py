"""The student's forward written out: what PEFT and transformers compute for a LoRA-tuned Llama, in fewer kernels.

A step over one question is bound by launches and by reading the weights, so weights that read the same input are joined
into one product (the modules' own weights become views of it), rotary embedding turns queries and keys at once, and an
adapter's product is added in one call. The arithmetic is PEFT's: adapters in float32, the rest in the model's dtype.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812


class Joined(NamedTuple):
    """Linear layers with one input: weights end to end [sum of outs, in], and the adapters on them, end to end too.

    `downs` are the adapters' A [rank, in]; `ups` their B [out, rank], one for each layer, with no columns where a layer
    has no adapter. Scaling and dropout are common to all, as one LoRA configuration has them.
    """

    weight: torch.Tensor
    downs: list[torch.Tensor]
    ups: list[torch.Tensor]
    scaling: float
    dropout: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, in] -> [tokens, sum of outs]; each adapter sees x through a dropout of its own."""
        out: torch.Tensor = F.linear(x, self.weight)
        if not self.downs:
            return out
        seen = F.dropout(x.to(self.downs[0].dtype).expand(len(self.downs), -1, -1), self.dropout)
        low = torch.bmm(seen, torch.stack(self.downs).mT).transpose(0, 1).flatten(1)
        wide = torch.addmm(out.to(low.dtype), low, torch.block_diag(*self.ups).T, alpha=self.scaling)
        return wide.to(x.dtype)


class Layer(NamedTuple):
    """One decoder layer's weights."""

    input_norm: torch.Tensor
    qkv: Joined
    o: Joined
    post_norm: torch.Tensor
    gate_up: Joined
    down: Joined


class LeanLlama:
    """A PEFT student's final hidden states in training mode, by its own weights; no biases, as Llama has none."""

    def __init__(self, student: Any) -> None:
        model = student.get_base_model().model
        self._config = model.config
        self._embed, self._rotary, self._norm = model.embed_tokens, model.rotary_emb, model.norm.weight
        self._layers = [_layer(layer) for layer in model.layers]

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Final hidden states behind the norm, [examples, tokens, hidden], of right-padded token ids. Attention is
        causal, so no token sees the padding behind it and no mask is needed."""
        examples, tokens = input_ids.shape
        x: torch.Tensor = self._embed(input_ids).flatten(0, 1)
        cos, sin = self._rotary(x, torch.arange(tokens, device=x.device)[None])
        # Rotating takes (-second half, first half); the sign goes into the sine, so that a roll does the rest.
        sin = torch.cat((-sin[..., : sin.shape[-1] // 2], sin[..., sin.shape[-1] // 2 :]), dim=-1)
        for layer in self._layers:
            x = self._block(layer, x, examples, cos, sin)
        return self._normed(x, self._norm).view(examples, tokens, -1)

    def _block(
        self, layer: Layer, x: torch.Tensor, examples: int, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        x = x + self._attention(layer, self._normed(x, layer.input_norm), examples, cos, sin)
        gate, up = layer.gate_up(self._normed(x, layer.post_norm)).chunk(2, dim=-1)
        return x + layer.down(F.silu(gate) * up)

    def _normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, self._config.rms_norm_eps)

    def _attention(
        self, layer: Layer, x: torch.Tensor, examples: int, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        heads, kv_heads = self._config.num_attention_heads, self._config.num_key_value_heads
        all_heads = layer.qkv(x).unflatten(1, (heads + 2 * kv_heads, -1)).unflatten(0, (examples, -1)).transpose(1, 2)
        qk, v = all_heads.split((heads + kv_heads, kv_heads), dim=1)
        qk = torch.addcmul(qk * cos, qk.roll(qk.shape[-1] // 2, -1), sin)
        q, k = qk.split((heads, kv_heads), dim=1)
        k, v = (part.repeat_interleave(heads // kv_heads, dim=1) for part in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return layer.o(mixed.transpose(1, 2).flatten(0, 1).flatten(1))


def _layer(layer: Any) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return Layer(
        layer.input_layernorm.weight,
        _joined(attention.q_proj, attention.k_proj, attention.v_proj),
        _joined(attention.o_proj),
        layer.post_attention_layernorm.weight,
        _joined(mlp.gate_proj, mlp.up_proj),
        _joined(mlp.down_proj),
    )


def _joined(*linears: Any) -> Joined:
    plain = [getattr(linear, "base_layer", linear) for linear in linears]
    widths = [linear.out_features for linear in plain]
    weight = torch.cat([linear.weight.detach() for linear in plain]) if len(plain) > 1 else plain[0].weight
    for linear, view in zip(plain, weight.split(widths), strict=True):
        linear.weight.data = view
    adapted = [linear for linear in linears if hasattr(linear, "lora_A")]
    if not adapted:
        return Joined(weight, [], [], 1.0, 0.0)
    (name,) = adapted[0].active_adapters
    downs = [linear.lora_A[name].weight for linear in adapted]
    ups = [
        linear.lora_B[name].weight if linear in adapted else weight.new_zeros(width, 0, dtype=downs[0].dtype)
        for linear, width in zip(linears, widths, strict=True)
    ]
    dropout = getattr(adapted[0].lora_dropout[name], "p", 0.0)  # PEFT puts an Identity for no dropout
    return Joined(weight, downs, ups, adapted[0].scaling[name], dropout)
