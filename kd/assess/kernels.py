"""A decoding step's kernels, in Triton: few, so that a step is little more than reading the weights once.

`kd/assess/plain.py` says the same in torch, function by function, and the tests compare the two. A sum has one order,
whatever runs beside it: where a sum is split among programs, each leaves its part and the kernel that reads the parts
adds them from the first to the last. Sums, norms, rotations and weights of attention are in float32; what a module of
transformers rounds to the model's dtype is rounded here too, but for the parts of a product.
"""

# ruff: noqa: N803 (arguments that are constants to the compiler are in capitals, as is the custom)
# Not `from __future__ import annotations`: Triton reads which arguments are constants from the annotations themselves.
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch.nn import functional as F  # noqa: N812

from kd.assess.plain import Slots

LOG2_E = 1.4426950408889634
SMALLEST_DOT = 16  # Triton's matrix products have no dimension below it


class Tile(NamedTuple):
    """How a kernel cuts its work: positions or outputs, and summed inputs, of a program; warps; loads under way."""

    outputs: int
    inputs: int
    warps: int
    stages: int


# The best for Llama 3.1 8B's shape on an H100.
ATTENTION = Tile(outputs=64, inputs=0, warps=4, stages=2)
PRODUCT = Tile(outputs=64, inputs=128, warps=4, stages=3)
PRODUCT_ROWS = 64  # up to so many rows a product is bound by reading the weights, and our own reads them faster
PROGRAMS = 2  # of one kernel on a multiprocessor, where its work can be split that far


def add_norm(hidden: torch.Tensor, parts: torch.Tensor | None, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """`hidden` [rows, width] becomes its sum with `parts` [n, rows, width]; returns it normed (RMS) by `weight`."""
    rows, width = hidden.shape
    normed = torch.empty_like(hidden)
    count = 0 if parts is None else len(parts)
    block = triton.next_power_of_2(width)
    _add_norm[(rows,)](
        hidden,
        hidden if parts is None else parts,
        weight,
        normed,
        hidden.numel(),
        width,
        epsilon,
        PARTS=count,
        BLOCK=block,
        num_warps=min(8, max(1, block // 512)),
    )
    return normed


def attend(
    qkv: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    slots: Slots,
    tile: Tile = ATTENTION,
) -> torch.Tensor:
    """One token of each row: rotate, put key and value into the cache, attend to all up to itself.

    `qkv` [n, rows, heads + 2 * kv heads, head dim] in parts; `keys` and `values` [slots, kv heads, length, head dim] of
    one layer; `rotary` the cosines and sines [length, head dim]. Returns [rows, heads * head dim], zeros where a row is
    not live, of which nothing is read or written.
    """
    parts, rows, every, width = qkv.shape
    kv_heads, length = keys.shape[1:3]
    heads = every - 2 * kv_heads
    splits = _splits(rows * kv_heads, triton.cdiv(length, tile.outputs), keys.device)
    out = torch.empty(rows, heads * width, dtype=keys.dtype, device=keys.device)
    # What a split leaves: its weighted values, and behind them the largest score and the sum of weights.
    left = torch.empty(rows, heads, splits, width + 2, dtype=torch.float32, device=keys.device) if splits > 1 else out
    _attend[(rows, kv_heads, splits)](
        qkv,
        keys,
        values,
        *rotary,
        slots.positions,
        slots.lasts,
        out if splits == 1 else left,
        qkv[0].numel(),
        kv_heads,
        length,
        LOG2_E / width**0.5,
        PARTS=parts,
        GROUP=heads // kv_heads,
        GROUP_ROWS=max(SMALLEST_DOT, triton.next_power_of_2(heads // kv_heads)),
        HALF=width // 2,
        SPLITS=splits,
        BLOCK=tile.outputs,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if splits > 1:
        _combine[(rows, heads)](left, out, WIDTH=width, SPLITS=splits, num_warps=1)
    return out


def product(x: torch.Tensor, weight: torch.Tensor, tile: Tile = PRODUCT) -> torch.Tensor:
    """`x` [rows, in] by `weight` [out, in], in parts [n, rows, out] that add up to it (in x's dtype if it is one)."""
    rows, width = x.shape
    out = len(weight)
    if not _reads_faster(x, tile):
        return F.linear(x, weight)[None]
    tiles = triton.cdiv(out, tile.outputs)
    splits = _splits(tiles, width // tile.inputs // 4, x.device)
    parts = torch.empty(splits, rows, out, dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    _product[(tiles, splits)](
        x,
        weight,
        parts,
        rows,
        out,
        width,
        splits,
        ROWS=max(SMALLEST_DOT, triton.next_power_of_2(rows)),
        OUTPUTS=tile.outputs,
        INPUTS=tile.inputs,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return parts


def gated(x: torch.Tensor, weight: torch.Tensor, tile: Tile = PRODUCT) -> torch.Tensor:
    """SwiGLU of `x` [rows, in] by gate and up, one behind the other in `weight` [2 * out, in]: [rows, out]."""
    rows, width = x.shape
    out = len(weight) // 2
    if not _reads_faster(x, tile):
        return gate(F.linear(x, weight))
    done = torch.empty(rows, out, dtype=x.dtype, device=x.device)
    _gated[(triton.cdiv(out, tile.outputs),)](
        x,
        weight,
        done,
        rows,
        out,
        width,
        ROWS=max(SMALLEST_DOT, triton.next_power_of_2(rows)),
        OUTPUTS=tile.outputs,
        INPUTS=tile.inputs,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return done


def gate(both: torch.Tensor) -> torch.Tensor:
    """SwiGLU of gate and up beside each other, [rows, 2 * width]: silu(gate) * up, [rows, width]."""
    rows, width = both.shape[0], both.shape[1] // 2
    done = torch.empty(rows, width, dtype=both.dtype, device=both.device)
    _gate[(rows, triton.cdiv(width, 1024))](both, done, width, BLOCK=1024, num_warps=4)
    return done


def choose(logits: torch.Tensor, which: torch.Tensor, slots: Slots) -> None:
    """The most likely token of each row of `logits` [rows, vocabulary], the first of equals, to its slot `which`
    [rows]: it becomes the slot's newest, and its last if it ends a row or there is none (NaN). Slots not live stay."""
    rows, vocabulary = logits.shape
    block = min(4096, triton.next_power_of_2(vocabulary))
    _choose[(rows,)](
        logits,
        which,
        slots.tokens,
        slots.positions,
        slots.lasts,
        slots.ring,
        slots.ends,
        vocabulary,
        slots.ring.shape[1],
        len(slots.ends),
        BLOCK=block,
        num_warps=min(8, max(1, block // 512)),
    )


def _reads_faster(x: torch.Tensor, tile: Tile) -> bool:
    """Whether the kernel here takes this product: few rows, of two bytes a number, and whole blocks of inputs."""
    rows, width = x.shape
    return rows <= PRODUCT_ROWS and x.dtype.itemsize == 2 and width % tile.inputs == 0


def _splits(programs: int, most: int, device: torch.device) -> int:
    """Into how many parts each of so many programs' sums is cut, so that they fill the GPU; at least 1."""
    return max(1, min(most, PROGRAMS * _multiprocessors(device) // programs))


def _multiprocessors(device: torch.device) -> int:
    # Triton's interpreter runs on a CPU; there some are made up, so that sums are split as on a GPU.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


@triton.jit
def _add_norm(hidden, parts, weight, normed, stride, width, epsilon, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """A program a row."""
    at = tl.arange(0, BLOCK)
    inside = at < width
    here = tl.program_id(0).to(tl.int64) * width + at
    x = tl.load(hidden + here, mask=inside, other=0.0).to(tl.float32)
    if PARTS > 0:
        added = tl.load(parts + here, mask=inside, other=0.0).to(tl.float32)
        for part in tl.static_range(1, PARTS):
            added += tl.load(parts + part * stride + here, mask=inside, other=0.0).to(tl.float32)
        x = (x + added.to(hidden.dtype.element_ty).to(tl.float32)).to(hidden.dtype.element_ty)
        tl.store(hidden + here, x, mask=inside)
        x = x.to(tl.float32)
    scale = tl.math.rsqrt(tl.sum(x * x, axis=0) / width + epsilon)
    by = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    y = by * (x * scale).to(normed.dtype.element_ty).to(tl.float32)
    tl.store(normed + here, y.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _added(parts, at, stride, inside, PARTS: tl.constexpr, dtype: tl.constexpr):
    """The sum of all parts at `at`, rounded to `dtype`, in float32."""
    x = tl.load(parts + at, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        x += tl.load(parts + part * stride + at, mask=inside, other=0.0).to(tl.float32)
    return x.to(dtype).to(tl.float32)


@triton.jit
def _attend(
    qkv,
    keys,
    values,
    cosines,
    sines,
    positions,
    lasts,
    out,
    stride,
    kv_heads,
    length,
    scale,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    HALF: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program a row, key head (with the GROUP query heads that share it) and split of the positions before it."""
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    dtype: tl.constexpr = keys.dtype.element_ty
    width: tl.constexpr = 2 * HALF
    position = tl.load(positions + row)
    live = position < tl.load(lasts + row)
    group, d, both = tl.arange(0, GROUP_ROWS), tl.arange(0, HALF), tl.arange(0, 2 * HALF)
    real = (group < GROUP)[:, None]
    heads = kv_heads * GROUP
    begun = row.to(tl.int64) * (heads + 2 * kv_heads) * width

    # Rotated: (a, b) becomes (a cos - b sin, b cos + a sin), where halves of cosines and sines are alike.
    cos = tl.load(cosines + position * width + d).to(tl.float32)
    sin = tl.load(sines + position * width + d).to(tl.float32)
    at = begun + (head * GROUP + group)[:, None] * width + d[None, :]
    a = _added(qkv, at, stride, real, PARTS, dtype)
    b = _added(qkv, at + HALF, stride, real, PARTS, dtype)
    query_a = (a * cos[None, :] - b * sin[None, :]).to(dtype)
    query_b = (b * cos[None, :] + a * sin[None, :]).to(dtype)
    at_key = begun + (heads + head) * width + d
    a = _added(qkv, at_key, stride, d < HALF, PARTS, dtype)
    b = _added(qkv, at_key + HALF, stride, d < HALF, PARTS, dtype)
    key_a, key_b = (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)
    value = _added(qkv, begun + (heads + kv_heads + head) * width + both, stride, both < width, PARTS, dtype)

    cache = (row.to(tl.int64) * kv_heads + head) * length * width
    if split == 0 and live:
        tl.store(keys + cache + position * width + d, key_a)
        tl.store(keys + cache + position * width + HALF + d, key_b)
        tl.store(values + cache + position * width + both, value.to(dtype))

    # The token itself is the first split's, from registers; the cache has the others.
    own = tl.sum(query_a.to(tl.float32) * key_a.to(tl.float32)[None, :], axis=1)
    own = (own + tl.sum(query_b.to(tl.float32) * key_b.to(tl.float32)[None, :], axis=1)) * scale
    own = tl.where(live, own, 0.0)  # of a row that is not, it may be NaN
    first = split == 0
    most = tl.where(first, own, float("-inf"))
    total = tl.where(first, 1.0, 0.0) + tl.zeros([GROUP_ROWS], dtype=tl.float32)
    read = tl.where(first, 1.0, 0.0) * value[None, :] + tl.zeros([GROUP_ROWS, 2 * HALF], dtype=tl.float32)

    seen = tl.where(live, position, 0)
    share = tl.cdiv(tl.cdiv(seen, BLOCK), SPLITS) * BLOCK
    stop = tl.minimum(split * share + share, seen)
    for start in range(split * share, stop, BLOCK):
        n = start + tl.arange(0, BLOCK)
        there = n < stop
        where = keys + cache + n[:, None] * width + d[None, :]
        keys_a = tl.load(where, mask=there[:, None], other=0.0)
        keys_b = tl.load(where + HALF, mask=there[:, None], other=0.0)
        scores = tl.dot(query_a, tl.trans(keys_a), input_precision="ieee")
        scores = tl.dot(query_b, tl.trans(keys_b), scores, input_precision="ieee")
        scores = tl.where(there[None, :], scores * scale, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, axis=1))
        before = tl.math.exp2(most - higher)
        weights = tl.math.exp2(scores - higher[:, None])
        seen_values = tl.load(values + cache + n[:, None] * width + both[None, :], mask=there[:, None], other=0.0)
        read = tl.dot(weights.to(dtype), seen_values, read * before[:, None], input_precision="ieee")
        total = total * before + tl.sum(weights, axis=1)
        most = higher

    if SPLITS == 1:
        done = tl.where(live, read / total[:, None], 0.0).to(dtype)
        at = (row.to(tl.int64) * heads + head * GROUP + group)[:, None] * width + both[None, :]
        tl.store(out + at, done, mask=real)
    else:
        to = ((row.to(tl.int64) * heads + head * GROUP + group) * SPLITS + split) * (width + 2)
        tl.store(out + to[:, None] + both[None, :], tl.where(live, read, 0.0), mask=real)
        tl.store(out + to + width, most, mask=group < GROUP)
        tl.store(out + to + width + 1, total, mask=group < GROUP)


@triton.jit
def _combine(left, out, WIDTH: tl.constexpr, SPLITS: tl.constexpr):
    """A program a row and head: what its splits left, added from the first, which has the token itself and so a
    finite score, to the last."""
    row_head = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    d = tl.arange(0, WIDTH)
    begun = left + row_head * SPLITS * (WIDTH + 2)
    most = tl.load(begun + WIDTH)
    for split in tl.static_range(1, SPLITS):
        most = tl.maximum(most, tl.load(begun + split * (WIDTH + 2) + WIDTH))
    read = tl.zeros([WIDTH], dtype=tl.float32)
    total = 0.0
    for split in tl.static_range(SPLITS):
        at = begun + split * (WIDTH + 2)
        by = tl.math.exp2(tl.load(at + WIDTH) - most)
        read += by * tl.load(at + d)
        total += by * tl.load(at + WIDTH + 1)
    tl.store(out + row_head * WIDTH + d, (read / total).to(out.dtype.element_ty))


@triton.jit
def _product(
    x, weight, parts, rows, out, width, splits, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr
):
    """A program OUTPUTS of `out` and one of `splits` shares of `width`. The weights stand on the left, where the
    matrix units take 64 or more; the few rows stand on the right."""
    tile, split = tl.program_id(0), tl.program_id(1)
    n, m, k = tile * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, ROWS), tl.arange(0, INPUTS)
    blocks = width // INPUTS
    here = weight + n.to(tl.int64)[:, None] * width + k[None, :]
    theirs = x + m[None, :] * width + k[:, None]
    sums = tl.zeros([OUTPUTS, ROWS], dtype=tl.float32)
    for block in range(split * blocks // splits, (split + 1) * blocks // splits):
        w = tl.load(here + block * INPUTS, mask=(n < out)[:, None], other=0.0, eviction_policy="evict_first")
        y = tl.load(theirs + block * INPUTS, mask=(m < rows)[None, :], other=0.0)
        sums = tl.dot(w, y, sums, input_precision="ieee")
    to = parts + (split * rows + m[None, :]).to(tl.int64) * out + n[:, None]
    tl.store(to, sums.to(parts.dtype.element_ty), mask=(n < out)[:, None] & (m < rows)[None, :])


@triton.jit
def _gated(x, weight, done, rows, out, width, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr):
    """A program OUTPUTS of gate and the same of up."""
    n, m, k = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, ROWS), tl.arange(0, INPUTS)
    there = (n < out)[:, None]
    gates = weight + n.to(tl.int64)[:, None] * width + k[None, :]
    ups = gates + out.to(tl.int64) * width
    theirs = x + m[None, :] * width + k[:, None]
    gate = tl.zeros([OUTPUTS, ROWS], dtype=tl.float32)
    up = tl.zeros([OUTPUTS, ROWS], dtype=tl.float32)
    for block in range(0, width // INPUTS):
        g = tl.load(gates + block * INPUTS, mask=there, other=0.0, eviction_policy="evict_first")
        u = tl.load(ups + block * INPUTS, mask=there, other=0.0, eviction_policy="evict_first")
        y = tl.load(theirs + block * INPUTS, mask=(m < rows)[None, :], other=0.0)
        gate = tl.dot(g, y, gate, input_precision="ieee")
        up = tl.dot(u, y, up, input_precision="ieee")
    both = _silu(gate, done.dtype.element_ty) * up.to(done.dtype.element_ty).to(tl.float32)
    to = done + m[None, :].to(tl.int64) * out + n[:, None]
    tl.store(to, both.to(done.dtype.element_ty), mask=there & (m < rows)[None, :])


@triton.jit
def _silu(x, dtype: tl.constexpr):
    """x / (1 + exp(-x)) of x rounded to `dtype`, rounded to it, in float32."""
    x = x.to(dtype).to(tl.float32)
    return (x / (1.0 + tl.math.exp(-x))).to(dtype).to(tl.float32)


@triton.jit
def _gate(both, done, width, BLOCK: tl.constexpr):
    """A program a row and BLOCK of its numbers."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(both + row * 2 * width + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * width + width + at, mask=inside, other=0.0).to(tl.float32)
    y = _silu(gate, done.dtype.element_ty) * up
    tl.store(done + row * width + at, y.to(done.dtype.element_ty), mask=inside)


@triton.jit
def _choose(logits, which, tokens, positions, lasts, ring, ends, vocabulary, ring_size, end_count, BLOCK: tl.constexpr):
    """A program a row. Each of BLOCK lanes keeps the first largest of what it has seen."""
    row = tl.program_id(0)
    slot = tl.load(which + row)
    position, last = tl.load(positions + slot), tl.load(lasts + slot)
    begun = logits + row.to(tl.int64) * vocabulary
    best = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    place = tl.full([BLOCK], 2147483647, dtype=tl.int32)
    wrong = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(begun + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
        wrong = tl.where(x != x, 1, wrong)
        place = tl.where((x > best) | ((place == 2147483647) & (at < vocabulary)), at, place)
        best = tl.where(x > best, x, best)
    token = tl.min(tl.where(best == tl.max(best, axis=0), place, 2147483647), axis=0)
    token = tl.where(tl.max(wrong, axis=0) > 0, -1, token)
    if position < last:
        position += 1
        tl.store(tokens + slot, tl.maximum(token, 0).to(tl.int64))
        tl.store(ring + slot * ring_size + position % ring_size, token)
        tl.store(positions + slot, position)
        over = token == -1
        for i in range(end_count):
            over = over | (token == tl.load(ends + i))
        if over:
            tl.store(lasts + slot, position)
