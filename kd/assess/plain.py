"""A decoding step's operations in torch: what the kernels of `kd/assess/kernels.py` compute, function by function.

Shapes and meanings are said there. All of it stands in a CUDA graph, so nothing here depends on a value.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F  # noqa: N812

from kd.assess.row import NAN_TOKEN


class Slots(NamedTuple):
    """What a step reads and changes of each slot, on the device.

    `tokens` [slots] int64 are the newest, at `positions` [slots] int32; `lasts` [slots] int32 are where a row ends at
    the latest: a slot is live while its position is below. `ring` [slots, n] int32 holds the token of position p at p
    modulo n; `ends` [m] int32 are the tokens that end a row.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    lasts: torch.Tensor
    ring: torch.Tensor
    ends: torch.Tensor


def add_norm(hidden: torch.Tensor, parts: torch.Tensor | None, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """`kernels.add_norm`."""
    if parts is not None:
        hidden += parts.float().sum(0).to(hidden.dtype)
    x = hidden.float()
    normed: torch.Tensor = weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)).to(hidden.dtype)
    return normed


def attend(
    qkv: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    slots: Slots,
) -> torch.Tensor:
    """`kernels.attend`, over the whole cache with a mask."""
    rows, width = qkv.shape[1], qkv.shape[3]
    kv_heads, length = keys.shape[1:3]
    heads = qkv.shape[2] - 2 * kv_heads
    positions = slots.positions[:rows].long()
    live = positions < slots.lasts[:rows]
    joined = qkv.float().sum(0).to(keys.dtype)
    cosines, sines = (table[positions][:, None].float() for table in rotary)
    rotated = joined[:, : heads + kv_heads].float()
    first, second = rotated.chunk(2, dim=-1)
    rotated = (rotated * cosines + torch.cat((-second, first), dim=-1) * sines).to(keys.dtype)
    numbers = torch.arange(rows, device=keys.device)
    for cache, new in ((keys, rotated[:, heads:]), (values, joined[:, heads + kv_heads :])):
        cache[numbers, :, positions] = torch.where(live[:, None, None], new, cache[numbers, :, positions])
    seen = torch.arange(length, device=keys.device) <= positions[:, None]
    mask = torch.zeros_like(seen, dtype=keys.dtype).masked_fill(~seen, -torch.inf)[:, None, None]
    query = rotated[:, :heads].reshape(rows, kv_heads, heads // kv_heads, width)
    # What a row does not see may be NaN, which a mask would let through.
    keys, values = (cache[:rows].masked_fill(~seen[:, None, :, None], 0) for cache in (keys, values))
    read = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
    return torch.where(live[:, None], read.reshape(rows, -1), 0)


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`kernels.product`, in one part."""
    return F.linear(x, weight)[None]


def gated(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`kernels.gated`."""
    return gate(F.linear(x, weight))


def gate(both: torch.Tensor) -> torch.Tensor:
    """`kernels.gate`."""
    left, right = both.chunk(2, dim=-1)
    return F.silu(left) * right


def choose(logits: torch.Tensor, which: torch.Tensor, slots: Slots) -> None:
    """`kernels.choose`."""
    which = which.long()
    chosen = logits.argmax(-1).masked_fill(logits.isnan().any(-1), NAN_TOKEN)
    before = slots.positions[which]
    live = before < slots.lasts[which]
    position = (before + 1).long()
    over = live & (torch.isin(chosen, slots.ends) | (chosen == NAN_TOKEN))
    place = position % slots.ring.shape[1]
    slots.ring[which, place] = torch.where(live, chosen.int(), slots.ring[which, place])
    slots.tokens[which] = torch.where(live, chosen.clamp(min=0), slots.tokens[which])
    slots.positions[which] = torch.where(live, position.int(), before)
    slots.lasts[which] = torch.where(over, position.int(), slots.lasts[which])
