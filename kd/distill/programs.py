"""Triton kernels between the products of a step, and over rows of logits. What each computes: `kd.distill.plain`.

A step over one question is some hundred tokens, so what is not a product is bound by launches and by how often a row is
read. A program has a whole row (norms, the adapters' A), or a block of rows and columns. No result depends on an order:
what is summed over tokens is summed by one program, in fixed steps, and nothing is added atomically. Sums are float32.
"""

import triton
import triton.language as tl


@triton.jit
def dropout_bits(out, seed, count, least, block: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    a, b, c, d = tl.randint4x(tl.load(seed), place.to(tl.int32))
    least = tl.full((block,), least, tl.int64)
    # A word is unsigned; widened, it is compared as such.
    bits = (a.to(tl.uint32, bitcast=True).to(tl.int64) >= least).to(tl.int32)
    bits |= (b.to(tl.uint32, bitcast=True).to(tl.int64) >= least).to(tl.int32) << 1
    bits |= (c.to(tl.uint32, bitcast=True).to(tl.int64) >= least).to(tl.int32) << 2
    bits |= (d.to(tl.uint32, bitcast=True).to(tl.int64) >= least).to(tl.int32) << 3
    tl.store(out + place, bits.to(tl.uint8), mask=place < count)


@triton.jit
def store_lows(
    x,
    weight,
    keep,
    out,
    scale,
    cols,
    inside,
    width: tl.constexpr,
    lows: tl.constexpr,
    rank: tl.constexpr,
    first: tl.constexpr,
):
    """A row x in float32, as each adapter sees it, times the rows of A."""
    for low in tl.static_range(lows):
        terms = x * tl.load(weight + low * width + cols, mask=inside, other=0.0)
        if first >= 0:
            terms = tl.where(((keep >> (first + low // rank)) & 1) != 0, terms, 0.0)
        tl.store(out + low, tl.sum(terms, axis=0) * scale)


@triton.jit
def project_down(
    x,
    weight,
    keep,
    keep_stride,
    scale,
    out,
    width: tl.constexpr,
    block: tl.constexpr,
    lows: tl.constexpr,
    rank: tl.constexpr,
    first: tl.constexpr,
):
    token = tl.program_id(0)
    cols = tl.arange(0, block)
    inside = cols < width
    row = tl.load(x + token * width + cols, mask=inside, other=0.0).to(tl.float32)
    bits = cols
    if first >= 0:
        bits = tl.load(keep + token * keep_stride + cols, mask=inside, other=0).to(tl.int32)
    store_lows(row, weight, bits, out + token * lows, scale, cols, inside, width, lows, rank, first)


@triton.jit
def add_lows(
    total,
    low_gradient,
    weight,
    bits,
    scale,
    cols,
    inside,
    width: tl.constexpr,
    lows: tl.constexpr,
    rank: tl.constexpr,
    first: tl.constexpr,
):
    """`total` and what comes to it through the adapters."""
    for low in tl.static_range(lows):
        terms = tl.load(low_gradient + low) * scale * tl.load(weight + low * width + cols, mask=inside, other=0.0)
        if first >= 0:
            terms = tl.where(((bits >> (first + low // rank)) & 1) != 0, terms, 0.0)
        total += terms
    return total


@triton.jit
def project_down_backward(
    gradient,
    low_gradient,
    weight,
    keep,
    keep_stride,
    scale,
    width: tl.constexpr,
    block: tl.constexpr,
    lows: tl.constexpr,
    rank: tl.constexpr,
    first: tl.constexpr,
):
    token = tl.program_id(0)
    cols = tl.program_id(1) * block + tl.arange(0, block)
    inside = cols < width
    place = gradient + token * width + cols
    total = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    bits = cols
    if first >= 0:
        bits = tl.load(keep + token * keep_stride + cols, mask=inside, other=0).to(tl.int32)
    total = add_lows(total, low_gradient + token * lows, weight, bits, scale, cols, inside, width, lows, rank, first)
    tl.store(place, total.to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def add_norm(
    x,
    delta,
    up_low,
    up,
    weight,
    down,
    keep,
    keep_stride,
    scale,
    total,
    normed,
    factor,
    low_out,
    eps,
    scaling,
    added: tl.constexpr,
    up_rank: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
    lows: tl.constexpr,
    rank: tl.constexpr,
    first: tl.constexpr,
):
    token = tl.program_id(0)
    cols = tl.arange(0, block)
    inside = cols < width
    at = token * width + cols
    row = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if added:
        more = tl.load(delta + at, mask=inside, other=0.0).to(tl.float32)
        for low in tl.static_range(up_rank):
            share = tl.load(up_low + token * up_rank + low) * scaling
            more += share * tl.load(up + cols * up_rank + low, mask=inside, other=0.0)
        rounded = (row + more).to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=inside)
        row = rounded.to(tl.float32)
    unit = tl.rsqrt(tl.sum(row * row, axis=0) / width + eps)
    tl.store(factor + token, unit)
    rounded = (row * unit * tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)).to(normed.dtype.element_ty)
    tl.store(normed + at, rounded, mask=inside)
    if lows > 0:
        bits = cols
        if first >= 0:
            bits = tl.load(keep + token * keep_stride + cols, mask=inside, other=0).to(tl.int32)
        row = rounded.to(tl.float32)
        store_lows(row, down, bits, low_out + token * lows, scale, cols, inside, width, lows, rank, first)


@triton.jit
def add_norm_backward(
    gradient,
    residual,
    x,
    factor,
    weight,
    low_gradient,
    down,
    keep,
    keep_stride,
    scale,
    up,
    out,
    low_out,
    scaling,
    past: tl.constexpr,
    up_rank: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
    lows: tl.constexpr,
    rank: tl.constexpr,
    first: tl.constexpr,
):
    token = tl.program_id(0)
    cols = tl.arange(0, block)
    inside = cols < width
    at = token * width + cols
    row = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    if lows > 0:
        bits = cols
        if first >= 0:
            bits = tl.load(keep + token * keep_stride + cols, mask=inside, other=0).to(tl.int32)
        row = add_lows(row, low_gradient + token * lows, down, bits, scale, cols, inside, width, lows, rank, first)
    row *= tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    by = tl.load(factor + token)
    unit = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * by
    row = by * (row - unit * (tl.sum(row * unit, axis=0) / width))
    if past:
        row += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    rounded = row.to(out.dtype.element_ty)
    tl.store(out + at, rounded, mask=inside)
    row = rounded.to(tl.float32)
    for low in tl.static_range(up_rank):
        terms = row * tl.load(up + cols * up_rank + low, mask=inside, other=0.0)
        tl.store(low_out + token * up_rank + low, tl.sum(terms, axis=0) * scaling)


@triton.jit
def rotate(
    qkv,
    low,
    up,
    cos,
    sin,
    scaling,
    tokens,
    positions,
    rank: tl.constexpr,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    half: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    width: tl.constexpr = (heads + 2 * kv_heads) * 2 * half
    token = tl.program_id(0) * rows + tl.arange(0, rows)
    pair = tl.program_id(1) * columns + tl.arange(0, columns)
    head, within = pair // half, pair % half
    col = head * 2 * half + within
    owner = (head >= heads).to(tl.int32) + (head >= heads + kv_heads).to(tl.int32)
    apart = pair < width // 2
    inside = (token < tokens)[:, None] & apart[None, :]
    place = qkv + token[:, None] * width + col[None, :]
    one = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(place + half, mask=inside, other=0.0).to(tl.float32)
    for i in tl.static_range(rank):
        share = (
            tl.load(low + token[:, None] * (3 * rank) + (owner * rank + i)[None, :], mask=inside, other=0.0) * scaling
        )
        one += share * tl.load(up + col * rank + i, mask=apart, other=0.0)[None, :]
        other += share * tl.load(up + (col + half) * rank + i, mask=apart, other=0.0)[None, :]
    angle = (token % positions)[:, None] * half + within[None, :]
    turned = inside & (owner < 2)[None, :]
    c = tl.load(cos + angle, mask=turned, other=1.0)
    s = tl.load(sin + angle, mask=turned, other=0.0)
    tl.store(place, (one * c - other * s).to(qkv.dtype.element_ty), mask=inside)
    tl.store(place + half, (other * c + one * s).to(qkv.dtype.element_ty), mask=inside)


@triton.jit
def rotate_backward(
    q,
    k,
    v,
    up,
    cos,
    sin,
    out,
    low_out,
    scaling,
    positions,
    rank: tl.constexpr,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    half: tl.constexpr,
    block: tl.constexpr,
):
    """One program for a token's queries, one for its keys, one for its values."""
    group: tl.constexpr = heads // kv_heads
    dim: tl.constexpr = 2 * half
    token = tl.program_id(0)
    owner = tl.program_id(1)
    pair = tl.arange(0, block)
    head, within = pair // half, pair % half
    own = tl.where(owner == 0, heads, kv_heads)
    inside = head < own
    source = token * heads * dim + within
    if owner == 0:
        one = tl.load(q + source + head * dim, mask=inside, other=0.0).to(tl.float32)
        other = tl.load(q + source + head * dim + half, mask=inside, other=0.0).to(tl.float32)
    else:
        one = tl.zeros((block,), tl.float32)
        other = tl.zeros((block,), tl.float32)
        for i in tl.static_range(group):
            at = source + (head * group + i) * dim
            if owner == 1:
                one += tl.load(k + at, mask=inside, other=0.0).to(tl.float32)
                other += tl.load(k + at + half, mask=inside, other=0.0).to(tl.float32)
            else:
                one += tl.load(v + at, mask=inside, other=0.0).to(tl.float32)
                other += tl.load(v + at + half, mask=inside, other=0.0).to(tl.float32)
    angle = (token % positions) * half + within
    turned = inside & (owner < 2)
    c = tl.load(cos + angle, mask=turned, other=1.0)
    s = tl.load(sin + angle, mask=turned, other=0.0)
    begin = tl.where(owner == 0, 0, tl.where(owner == 1, heads * dim, (heads + kv_heads) * dim))
    col = begin + head * dim + within
    first = (one * c + other * s).to(out.dtype.element_ty)
    second = (other * c - one * s).to(out.dtype.element_ty)
    place = out + token * ((heads + 2 * kv_heads) * dim) + col
    tl.store(place, first, mask=inside)
    tl.store(place + half, second, mask=inside)
    one, other = first.to(tl.float32), second.to(tl.float32)
    for i in tl.static_range(rank):
        terms = one * tl.load(up + col * rank + i, mask=inside, other=0.0)
        terms += other * tl.load(up + (col + half) * rank + i, mask=inside, other=0.0)
        tl.store(low_out + token * (3 * rank) + owner * rank + i, tl.sum(terms, axis=0) * scaling)


@triton.jit
def attention(
    qkv,
    out,
    kept,
    tokens,
    scale,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    dim: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """Online softmax over blocks of keys (Dao, FlashAttention-2, arXiv 2307.08691)."""
    width: tl.constexpr = (heads + 2 * kv_heads) * dim
    block, head, example = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    d = tl.arange(0, dim)
    row = block * rows + tl.arange(0, rows)
    base = qkv + example * tokens * width
    key = base + (heads + head // (heads // kv_heads)) * dim
    value = key + kv_heads * dim
    mine = (row < tokens)[:, None]
    q = tl.load(base + head * dim + row[:, None] * width + d[None, :], mask=mine, other=0.0)
    most = tl.full((rows,), float("-inf"), tl.float32)
    total = tl.zeros((rows,), tl.float32)
    mixed = tl.zeros((rows, dim), tl.float32)
    for start in range(0, tl.minimum((block + 1) * rows, tokens), columns):
        col = start + tl.arange(0, columns)
        k = tl.load(key + col[None, :] * width + d[:, None], mask=(col < tokens)[None, :], other=0.0)
        v = tl.load(value + col[:, None] * width + d[None, :], mask=(col < tokens)[:, None], other=0.0)
        score = tl.dot(q, k, input_precision="ieee") * (scale * 1.4426950408889634)
        score = tl.where((col[None, :] <= row[:, None]) & (col < tokens)[None, :], score, float("-inf"))
        now = tl.maximum(most, tl.max(score, axis=1))
        p = tl.exp2(score - now[:, None])
        less = tl.exp2(most - now)
        total = total * less + tl.sum(p, axis=1)
        mixed = mixed * less[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        most = now
    place = out + (example * tokens + row)[:, None] * (heads * dim) + head * dim + d[None, :]
    tl.store(place, (mixed / total[:, None]).to(out.dtype.element_ty), mask=mine)
    tl.store(kept + (example * heads + head) * tokens + row, most + tl.log2(total), mask=row < tokens)


@triton.jit
def queries_gradient(
    query,
    key,
    value,
    mixed,
    lse,
    gradient,
    out,
    block,
    tokens,
    scale,
    width: tl.constexpr,
    mixed_width: tl.constexpr,
    dim: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """Of a block of one head's queries. All places are those of the head's first token."""
    d = tl.arange(0, dim)
    row = block * rows + tl.arange(0, rows)
    mine = (row < tokens)[:, None]
    at = row[:, None] * mixed_width + d[None, :]
    q = tl.load(query + row[:, None] * width + d[None, :], mask=mine, other=0.0)
    do = tl.load(gradient + at, mask=mine, other=0.0)
    delta = tl.sum(do.to(tl.float32) * tl.load(mixed + at, mask=mine, other=0.0).to(tl.float32), axis=1)
    norm = tl.load(lse + row, mask=row < tokens, other=0.0)
    dq = tl.zeros((rows, dim), tl.float32)
    for start in range(0, tl.minimum((block + 1) * rows, tokens), columns):
        col = start + tl.arange(0, columns)
        there = (col < tokens)[:, None]
        k = tl.load(key + col[:, None] * width + d[None, :], mask=there, other=0.0)
        v = tl.load(value + col[:, None] * width + d[None, :], mask=there, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * 1.4426950408889634)
        p = tl.exp2(score - norm[:, None])
        p = tl.where((col[None, :] <= row[:, None]) & (col < tokens)[None, :], p, 0.0)
        ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
    tl.store(out + at, (dq * scale).to(out.dtype.element_ty), mask=mine)


@triton.jit
def keys_gradient(
    query,
    key,
    value,
    mixed,
    lse,
    gradient,
    k_out,
    v_out,
    block,
    tokens,
    scale,
    width: tl.constexpr,
    mixed_width: tl.constexpr,
    dim: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """Of a block of keys and of values, what comes of one head of queries."""
    d = tl.arange(0, dim)
    col = block * columns + tl.arange(0, columns)
    there = (col < tokens)[:, None]
    k = tl.load(key + col[:, None] * width + d[None, :], mask=there, other=0.0)
    v = tl.load(value + col[:, None] * width + d[None, :], mask=there, other=0.0)
    dk = tl.zeros((columns, dim), tl.float32)
    dv = tl.zeros((columns, dim), tl.float32)
    for start in range(block * columns // rows * rows, tokens, rows):
        row = start + tl.arange(0, rows)
        mine = (row < tokens)[:, None]
        at = row[:, None] * mixed_width + d[None, :]
        q = tl.load(query + row[:, None] * width + d[None, :], mask=mine, other=0.0)
        do = tl.load(gradient + at, mask=mine, other=0.0)
        delta = tl.sum(do.to(tl.float32) * tl.load(mixed + at, mask=mine, other=0.0).to(tl.float32), axis=1)
        norm = tl.load(lse + row, mask=row < tokens, other=0.0)
        score = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * 1.4426950408889634)
        p = tl.exp2(score - norm[None, :])
        p = tl.where((col[:, None] <= row[None, :]) & (row < tokens)[None, :], p, 0.0)
        dv += tl.dot(p.to(do.dtype), do, input_precision="ieee")
        ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])
        dk += tl.dot(ds.to(q.dtype), q, input_precision="ieee")
    at = col[:, None] * mixed_width + d[None, :]
    tl.store(k_out + at, (dk * scale).to(k_out.dtype.element_ty), mask=there)
    tl.store(v_out + at, dv.to(v_out.dtype.element_ty), mask=there)


@triton.jit
def attention_backward(
    qkv,
    mixed,
    kept,
    gradient,
    q_out,
    k_out,
    v_out,
    tokens,
    scale,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    dim: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """The first programs make a block of queries' gradients each, the others one of keys' and values'."""
    width: tl.constexpr = (heads + 2 * kv_heads) * dim
    block, head, example = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    blocks = tl.cdiv(tokens, rows)
    query = qkv + example * tokens * width + head * dim
    key = qkv + example * tokens * width + (heads + head // (heads // kv_heads)) * dim
    value = key + kv_heads * dim
    mine = example * tokens * (heads * dim) + head * dim
    lse = kept + (example * heads + head) * tokens
    if block < blocks:
        queries_gradient(
            query, key, value, mixed + mine, lse, gradient + mine, q_out + mine,
            block, tokens, scale, width, heads * dim, dim, rows, columns,
        )  # fmt: skip
    else:
        keys_gradient(
            query, key, value, mixed + mine, lse, gradient + mine, k_out + mine, v_out + mine,
            block - blocks, tokens, scale, width, heads * dim, dim, rows, columns,
        )  # fmt: skip


@triton.jit
def swiglu(gate_up, out, width: tl.constexpr, block: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * block + tl.arange(0, block)
    inside = cols < width
    place = gate_up + token * (2 * width) + cols
    gate = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(place + width, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * width + cols, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward(gradient, gate_up, width: tl.constexpr, block: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * block + tl.arange(0, block)
    inside = cols < width
    place = gate_up + token * (2 * width) + cols
    gate = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(place + width, mask=inside, other=0.0).to(tl.float32)
    wide = tl.load(gradient + token * width + cols, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    tl.store(place, (wide * up * share * (1 + gate * (1 - share))).to(gate_up.dtype.element_ty), mask=inside)
    tl.store(place + width, (wide * gate * share).to(gate_up.dtype.element_ty), mask=inside)


@triton.jit
def gradient(
    source,
    low,
    keep,
    out,
    scale,
    tokens,
    keep_layer,
    keep_token,
    out_layer,
    out_low,
    out_column,
    columns,
    widest,
    others,
    shared: tl.constexpr,
    lows: tl.constexpr,
    rank: tl.constexpr,
    lanes: tl.constexpr,
    first: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
):
    """A layer's block of columns of one adapter: low-rank rows, transposed, times the columns that belong to it."""
    layer = tl.program_id(0).to(tl.int64)
    adapter = tl.program_id(2)
    begin, width = 0, widest
    if not shared:
        begin = tl.where(adapter == 0, 0, widest + (adapter - 1) * others)
        width = tl.where(adapter == 0, widest, others)
    within = tl.program_id(1) * block + tl.arange(0, block)
    lane = tl.arange(0, lanes)
    col = begin + within
    here = within < width
    total = tl.zeros((lanes, rows, block), tl.float32)
    for start in range(0, tokens, rows):
        token = start + tl.arange(0, rows)
        inside = (token < tokens)[:, None] & here[None, :]
        piece = tl.load(
            source + layer * tokens * columns + token[:, None] * columns + col[None, :], mask=inside, other=0.0
        )
        piece = piece.to(tl.float32)
        if first >= 0:
            bits = tl.load(keep + layer * keep_layer + token[:, None] * keep_token + col[None, :], mask=inside, other=0)
            piece = tl.where(((bits.to(tl.int32) >> (first + adapter)) & 1) != 0, piece, 0.0)
        at = low + layer * tokens * lows + token[None, :] * lows + adapter * rank + lane[:, None]
        small = tl.load(at, mask=(token < tokens)[None, :] & (lane < rank)[:, None], other=0.0)
        total += small[:, :, None] * piece[None, :, :]
    result = tl.sum(total, axis=1) * scale
    row = lane + (adapter * rank if shared else 0)
    place = out + layer * out_layer + row[:, None] * out_low + col[None, :] * out_column
    tl.store(place, result, mask=(lane < rank)[:, None] & here[None, :])


@triton.jit
def distill(
    student,
    teacher,
    labels,
    shares,
    values,
    alpha,
    temperature,
    beta,
    vocabulary: tl.constexpr,
    kind: tl.constexpr,
    block: tl.constexpr,
):
    """A row's logits are read three times: for the log-sum-exps, the divergence, the gradient."""
    row = tl.program_id(0).to(tl.int64)
    ours = student + row * vocabulary
    theirs = teacher + row * vocabulary
    label = tl.load(labels + row)
    lane = tl.arange(0, block)
    cold = 1.0 / temperature
    most, most_t = float("-inf"), float("-inf")
    sum_hard = tl.zeros((block,), tl.float32)
    sum_soft = tl.zeros((block,), tl.float32)
    sum_t = tl.zeros((block,), tl.float32)
    for start in range(0, vocabulary, block):
        inside = start + lane < vocabulary
        s = tl.load(ours + start + lane, mask=inside, other=float("-inf")).to(tl.float32)
        now = tl.maximum(most, tl.max(s, axis=0))
        sum_hard = sum_hard * tl.exp(most - now) + tl.exp(s - now)
        if kind > 0:
            sum_soft = sum_soft * tl.exp((most - now) * cold) + tl.exp((s - now) * cold)
            t = tl.load(theirs + start + lane, mask=inside, other=float("-inf")).to(tl.float32)
            now_t = tl.maximum(most_t, tl.max(t, axis=0))
            sum_t = sum_t * tl.exp((most_t - now_t) * cold) + tl.exp((t - now_t) * cold)
            most_t = now_t
        most = now
    lse_hard = most + tl.log(tl.sum(sum_hard, axis=0))
    tl.store(values + 2 * row, lse_hard - tl.load(ours + label).to(tl.float32))
    lse_p, lse_q, mean, value = 0.0, 0.0, 0.0, 0.0
    if kind > 0:
        lse_p = most * cold + tl.log(tl.sum(sum_soft, axis=0))
        lse_q = most_t * cold + tl.log(tl.sum(sum_t, axis=0))
        of_p = tl.zeros((block,), tl.float32)
        of_q = tl.zeros((block,), tl.float32)
        for start in range(0, vocabulary, block):
            inside = start + lane < vocabulary
            log_p = tl.load(ours + start + lane, mask=inside, other=0.0).to(tl.float32) * cold - lse_p
            log_q = tl.load(theirs + start + lane, mask=inside, other=0.0).to(tl.float32) * cold - lse_q
            if kind == 1:
                of_p += tl.where(inside, tl.exp(log_p) * (log_p - log_q), 0.0)
            elif kind == 2:
                of_q += tl.where(inside, tl.exp(log_q) * (log_q - log_p), 0.0)
            else:
                log_m = log_mixture(log_p, log_q, beta)
                of_p += tl.where(inside, tl.exp(log_p) * (log_p - log_m), 0.0)
                of_q += tl.where(inside, tl.exp(log_q) * (log_q - log_m), 0.0)
        mean, value = tl.sum(of_p, axis=0), tl.sum(of_q, axis=0)
        if kind == 3:
            mean *= 1 - beta
            value *= beta
        value += mean
    tl.store(values + 2 * row + 1, value)
    share = tl.load(shares + row)
    hard, soft = share, 0.0
    if kind > 0:
        # T^2 of the objective over the T that softens the logits.
        hard, soft = share * alpha, share * (1 - alpha) * temperature
    for start in range(0, vocabulary, block):
        inside = start + lane < vocabulary
        s = tl.load(ours + start + lane, mask=inside, other=0.0).to(tl.float32)
        slope = hard * (tl.exp(s - lse_hard) - (start + lane == label).to(tl.float32))
        if kind > 0:
            log_p = s * cold - lse_p
            log_q = tl.load(theirs + start + lane, mask=inside, other=0.0).to(tl.float32) * cold - lse_q
            if kind == 1:
                slope += soft * tl.exp(log_p) * (log_p - log_q - mean)
            elif kind == 2:
                slope += soft * (tl.exp(log_p) - tl.exp(log_q))
            else:
                slope += soft * tl.exp(log_p) * ((1 - beta) * (log_p - log_mixture(log_p, log_q, beta)) - mean)
        tl.store(ours + start + lane, slope.to(student.dtype.element_ty), mask=inside)


@triton.jit
def log_mixture(log_p, log_q, beta):
    """log(beta q + (1 - beta) p)."""
    one, other = log_q + tl.log(beta), log_p + tl.log(1 - beta)
    most = tl.maximum(one, other)
    return most + tl.log(tl.exp(one - most) + tl.exp(other - most))
