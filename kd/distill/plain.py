"""What the kernels of `kd.distill.kernels` compute, in torch: the same functions by the same names, any device.

`kd.distill.fused` is a forward and a backward written out in these operations. Rows are tokens. Everything between
products is computed in float32 and rounded once, where it is stored; adapters are float32 throughout, as in PEFT. What
is many layers' at once is written where the caller says (`out`), so that the adapters' gradients of all layers can be
made together.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812

from kd.config import Distill
from kd.distill.objective import cross_entropy, divergence

WORDS = 4  # of random numbers that Philox gives at once: one for each adapter of a layer


class Heads(NamedTuple):
    """How a row of queries, keys and values [(heads + 2 * kv_heads) * dim] is made up."""

    heads: int
    kv_heads: int
    dim: int

    @property
    def widths(self) -> tuple[int, int, int]:
        """Of queries, keys, values."""
        return self.heads * self.dim, self.kv_heads * self.dim, self.kv_heads * self.dim


class Down(NamedTuple):
    """The A of adapters with one input: `weight` [adapters * rank, in], `keep` [tokens, at least in] uint8, whose bit
    `first` + i says what the i-th adapter sees (None: everything), and `scale`, 1 / (1 - dropout)."""

    weight: torch.Tensor
    rank: int
    keep: torch.Tensor | None
    first: int
    scale: float


class Up(NamedTuple):
    """The B of adapters, `weight` [sum of outs, rank], and LoRA's scaling."""

    weight: torch.Tensor
    scaling: float


class Turn(NamedTuple):
    """Cosine and sine of each position's angles, [positions, dim / 2] float32."""

    cos: torch.Tensor
    sin: torch.Tensor


def dropout_bits(seed: torch.Tensor, dropout: float, out: torch.Tensor) -> None:
    """Fill `out` (uint8) with four independent bits each, 1 with probability 1 - dropout, by Philox 4x32-10 (Salmon et
    al., SC 2011) of the int64 scalar `seed` and an element's number."""
    number = torch.arange(out.numel(), device=out.device)
    words = philox(seed, number)
    bits = torch.zeros_like(number)
    for i, word in enumerate(words):
        bits |= (word >= threshold(dropout)).long() << i
    out.copy_(bits.view_as(out))


def threshold(dropout: float) -> int:
    """The least 32-bit word that keeps."""
    return round(dropout * 2**32)


def philox(seed: torch.Tensor, number: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four 32-bit words, in int64, for each `number` below 2^32."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = number, *(torch.zeros_like(number) for _ in range(3))
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps where int64 ends, and the bits are right
        c0, c1, c2, c3 = ((b >> 32) & low) ^ c1 ^ k0, b & low, ((a >> 32) & low) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def project_down(x: torch.Tensor, down: Down, out: torch.Tensor) -> None:
    """What the adapters see of x [tokens, in], times their A: `out` [tokens, adapters * rank]."""
    for i, (weight, low) in enumerate(zip(_each(down), out.split(down.rank, dim=1), strict=True)):
        low.copy_(_seen(x, down, i) @ weight.T * down.scale)


def project_down_backward(gradient: torch.Tensor, low_gradient: torch.Tensor, down: Down) -> None:
    """Add to an input's `gradient` [tokens, in], in place, what comes through the adapters."""
    gradient.copy_(gradient.float() + _through(low_gradient, down))


def add_norm(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    normed: torch.Tensor,
    *,
    up: tuple[torch.Tensor, Up] | None = None,
    down: tuple[Down, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + delta, all [tokens, hidden], and its RMS norm, written to `normed`: the sum, and the norm's factor [tokens].

    `up` are low-rank rows and their B, whose product is part of delta; `down` the A of those that read the normed, and
    where their product goes.
    """
    if delta is not None:
        wide = delta.float()
        if up:
            wide = wide + up[1].scaling * (up[0] @ up[1].weight.T)
        x = (x.float() + wide).to(x.dtype)
    factor = torch.rsqrt(x.float().pow(2).mean(-1) + eps)
    normed.copy_(x.float() * factor[:, None] * weight.float())
    if down:
        project_down(normed, *down)
    return x, factor


def add_norm_backward(
    gradient: torch.Tensor,
    residual: torch.Tensor | None,
    x: torch.Tensor,
    factor: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    down: tuple[torch.Tensor, Down] | None = None,
    up: tuple[Up, torch.Tensor] | None = None,
) -> None:
    """The gradient of x + delta, `out` [tokens, hidden]: `residual`, what comes past the norm, and the normed's
    `gradient` through it.

    `down` are the low-rank rows' gradient and the A that read the normed; `up` the B in delta, and where its low-rank
    rows' gradient goes.
    """
    wide = gradient.float()
    if down:
        wide = wide + _through(*down)
    wide = wide * weight.float()
    unit = x.float() * factor[:, None]
    wide = factor[:, None] * (wide - unit * (wide * unit).mean(-1, keepdim=True))
    out.copy_(wide if residual is None else residual.float() + wide)
    if up:
        up[1].copy_(up[0].scaling * (out.float() @ up[0].weight))


def rotate(qkv: torch.Tensor, low: torch.Tensor, up: Up, turn: Turn, heads: Heads) -> None:
    """Add the adapters' part (`low` [tokens, 3 * rank]) to queries, keys and values, and turn queries and keys, in
    place. Tokens of several examples stand one example after the other."""
    rank = up.weight.shape[1]
    parts = zip(qkv.split(heads.widths, 1), low.split(rank, 1), up.weight.split(heads.widths), strict=True)
    for i, (part, rows, weight) in enumerate(parts):
        wide = part.float() + up.scaling * (rows @ weight.T)
        part.copy_(wide if i == 2 else _turned(wide, turn, heads.dim, 1))


def rotate_backward(
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    up: Up,
    turn: Turn,
    heads: Heads,
    out: torch.Tensor,
    low_gradient: torch.Tensor,
) -> None:
    """The gradient of qkv before `rotate`, to `out`, and of its low-rank rows [tokens, 3 * rank], from those of
    queries, keys and values [tokens, heads * dim]: keys' and values' for each head of queries, not yet summed up."""
    rank = up.weight.shape[1]
    parts = zip(
        gradients, out.split(heads.widths, 1), low_gradient.split(rank, 1), up.weight.split(heads.widths), strict=True
    )
    for i, (gradient, target, rows, weight) in enumerate(parts):
        wide = gradient.float()
        if i:
            wide = wide.view(len(wide), heads.kv_heads, -1, heads.dim).sum(2).flatten(1)
        target.copy_(wide if i == 2 else _turned(wide, turn, heads.dim, -1))
        rows.copy_(up.scaling * (target.float() @ weight))


def attention(qkv: torch.Tensor, heads: Heads, examples: int, out: torch.Tensor) -> Any:
    """Causal attention of each example, to `out` [tokens, heads * dim]; what the backward takes."""
    q, k, v = leaves = [part.detach().requires_grad_() for part in _by_head(qkv, heads, examples)]
    with torch.enable_grad():
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    out.view(examples, -1, heads.heads, heads.dim).copy_(mixed.detach().transpose(1, 2))
    return leaves, mixed


def attention_backward(
    gradient: torch.Tensor, qkv: torch.Tensor, mixed: torch.Tensor, kept: Any, heads: Heads, examples: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of queries, keys and values, each [tokens, heads * dim], from that of what they mixed."""
    del qkv, mixed
    leaves, own = kept
    apart = gradient.view(examples, -1, heads.heads, heads.dim).transpose(1, 2)
    q, k, v = (part.transpose(1, 2).reshape(gradient.shape) for part in torch.autograd.grad(own, leaves, apart))
    return q, k, v


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of [tokens, gate and up]."""
    gate, up = gate_up.float().chunk(2, dim=1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def swiglu_backward(gradient: torch.Tensor, gate_up: torch.Tensor) -> None:
    """The gradient of gate and up, in their place."""
    gate, up = gate_up.float().chunk(2, dim=1)
    wide, share = gradient.float(), gate.sigmoid()
    slope = share * (1 + gate * (1 - share))
    gate_up.copy_(torch.cat([wide * up * slope, wide * gate * share], dim=1))


def down_gradient(x: torch.Tensor, low_gradient: torch.Tensor, down: Down, out: torch.Tensor) -> None:
    """The gradient of every layer's A, `out` [layers, adapters * rank, in], of x [layers, tokens, in], the low-rank
    rows' gradient [layers, tokens, adapters * rank] and `keep` [layers, tokens, at least in] (`weight` is not used)."""
    for layer in range(len(x)):
        keep = None if down.keep is None else down.keep[layer]
        parts = zip(out[layer].split(down.rank), low_gradient[layer].split(down.rank, 1), strict=True)
        for i, (target, rows) in enumerate(parts):
            target.copy_(down.scale * (rows.T @ _seen(x[layer], down._replace(keep=keep), i)))


def up_gradient(
    gradient: torch.Tensor, low: torch.Tensor, scaling: float, widths: tuple[int, ...], out: torch.Tensor
) -> None:
    """The gradient of every layer's B, `out` [layers, sum of outs, rank], of the outputs' `gradient` [layers, tokens,
    sum of outs], made up of `widths`, the first of them as wide or wider than the others, and `low` [layers, tokens,
    adapters * rank]."""
    rank = out.shape[2]
    parts = zip(gradient.split(widths, 2), low.split(rank, 2), out.split(widths, 1), strict=True)
    for wide, rows, target in parts:
        target.copy_(scaling * (wide.float().transpose(1, 2) @ rows))


def distill(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    labels: torch.Tensor,
    shares: torch.Tensor,
    settings: Distill,
) -> torch.Tensor:
    """Cross entropy and divergence of each row [rows, 2], from the logits of `student` and `teacher` [rows,
    vocabulary] (None: cross entropy alone). The student's are overwritten with their gradient of the whole objective,
    times the row's share."""
    ce, slope = cross_entropy(student.float(), labels[:, None])
    value = torch.zeros_like(ce)
    if teacher is not None:
        logits = student.to(torch.float32, copy=True), teacher.to(torch.float32, copy=True)
        value, soft_slope = divergence(*logits, settings.temperature, settings)
        # T^2 of the objective over the T that softens the logits.
        slope = slope.mul_(settings.alpha).add_(soft_slope, alpha=(1 - settings.alpha) * settings.temperature)
    student.copy_(slope.mul_(shares[:, None]))
    return torch.cat([ce, value], dim=1)


def _each(down: Down) -> tuple[torch.Tensor, ...]:
    parts: tuple[torch.Tensor, ...] = down.weight.split(down.rank)
    return parts


def _seen(x: torch.Tensor, down: Down, i: int) -> torch.Tensor:
    """What the i-th adapter sees of x, not yet scaled."""
    if down.keep is None:
        return x.float()
    return x.float() * ((down.keep[:, : x.shape[1]] >> (down.first + i)) & 1)


def _through(low_gradient: torch.Tensor, down: Down) -> torch.Tensor:
    """The gradient of an adapters' input [tokens, in], from that of their low-rank rows."""
    total = torch.zeros(len(low_gradient), down.weight.shape[1], device=low_gradient.device)
    for i, (weight, rows) in enumerate(zip(_each(down), low_gradient.split(down.rank, dim=1), strict=True)):
        total += _seen(rows @ weight, down, i)
    return total * down.scale


def _turned(x: torch.Tensor, turn: Turn, dim: int, direction: int) -> torch.Tensor:
    """Heads [tokens, heads * dim] turned by each position's angle, or back."""
    examples = len(x) // len(turn.cos)
    first, second = x.view(examples, len(turn.cos), -1, dim).chunk(2, dim=-1)
    cos, sin = turn.cos[:, None], turn.sin[:, None] * direction
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(2).flatten(0, 1)


def _by_head(qkv: torch.Tensor, heads: Heads, examples: int) -> list[torch.Tensor]:
    """Queries, keys and values [examples, heads, tokens, dim], keys and values once for each head of queries."""
    group = heads.heads // heads.kv_heads
    parts = [
        part.view(examples, -1, part.shape[1] // heads.dim, heads.dim).transpose(1, 2)
        for part in qkv.split(heads.widths, 1)
    ]
    return [parts[0], *(part.repeat_interleave(group, dim=1) for part in parts[1:])]
