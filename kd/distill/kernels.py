"""The operations of `kd.distill.plain` as Triton kernels: their launches. The kernels are in `kd.distill.programs`.

Importing it needs Triton. With TRITON_INTERPRET=1 in the environment before that, the kernels run on CPU tensors, which
is how the tests compare them with `kd.distill.plain` without a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from kd.config import Distill
from kd.distill import plain, programs
from kd.distill.plain import Down, Heads, Turn, Up, threshold

# For Llama 3.1 8B's shape and batches of one.
ROW_WARPS = 8
FEED_BLOCK = 1024
ROTATED = 16, 64  # tokens and pairs of a block
ATTENDED = 64, 64  # queries and keys
ATTENTION_WARPS, ATTENTION_BACKWARD_WARPS = 4, 8
SUMMED = 16, 64  # tokens and columns at a time of an adapter's gradient
LOGITS_BLOCK, LOGITS_WARPS = 8192, 16
WIDEST_HEAD = 128
DIVERGENCES = {"reverse-kl": 1, "forward-kl": 2, "jsd": 3}  # 0: no teacher


def dropout_bits(seed: torch.Tensor, dropout: float, out: torch.Tensor) -> None:
    """See `kd.distill.plain`, as for all that follows."""
    block = 1024
    programs.dropout_bits[(triton.cdiv(out.numel(), block),)](out, seed, out.numel(), threshold(dropout), block)


def project_down(x: torch.Tensor, down: Down, out: torch.Tensor) -> None:
    tokens, width = x.shape
    programs.project_down[(tokens,)](x, *_down(down, x), out, **_row(width), **_adapters(down))


def project_down_backward(gradient: torch.Tensor, low_gradient: torch.Tensor, down: Down) -> None:
    tokens, width = gradient.shape
    block = min(FEED_BLOCK, triton.next_power_of_2(width))
    grid = (tokens, triton.cdiv(width, block))
    programs.project_down_backward[grid](
        gradient, low_gradient, *_down(down, gradient), width=width, block=block, **_adapters(down)
    )


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
    tokens, width = x.shape
    total = x if delta is None else torch.empty_like(x)
    factor = torch.empty(tokens, dtype=torch.float32, device=x.device)
    low, own = up or (x, None)
    of, to = down or (None, x)
    programs.add_norm[(tokens,)](
        x,
        x if delta is None else delta,
        low,
        own.weight if own else x,
        weight,
        *_down(of, x),
        total,
        normed,
        factor,
        to,
        eps,
        own.scaling if own else 0.0,
        added=delta is not None,
        up_rank=own.weight.shape[1] if own else 0,
        **_row(width),
        **_adapters(of),
    )
    return total, factor


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
    tokens, width = x.shape
    low, of = down or (x, None)
    own, to = up or (None, x)
    programs.add_norm_backward[(tokens,)](
        gradient,
        x if residual is None else residual,
        x,
        factor,
        weight,
        low,
        *_down(of, x),
        own.weight if own else x,
        out,
        to,
        own.scaling if own else 0.0,
        past=residual is not None,
        up_rank=own.weight.shape[1] if own else 0,
        **_row(width),
        **_adapters(of),
    )


def rotate(qkv: torch.Tensor, low: torch.Tensor, up: Up, turn: Turn, heads: Heads) -> None:
    tokens = len(qkv)
    pairs = sum(heads.widths) // 2
    rows, columns = ROTATED[0], min(ROTATED[1], triton.next_power_of_2(pairs))
    grid = (triton.cdiv(tokens, rows), triton.cdiv(pairs, columns))
    programs.rotate[grid](
        qkv,
        low,
        up.weight,
        *turn,
        up.scaling,
        tokens,
        len(turn.cos),
        rank=up.weight.shape[1],
        heads=heads.heads,
        kv_heads=heads.kv_heads,
        half=heads.dim // 2,
        rows=rows,
        columns=columns,
    )


def rotate_backward(
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    up: Up,
    turn: Turn,
    heads: Heads,
    out: torch.Tensor,
    low_gradient: torch.Tensor,
) -> None:
    width = heads.heads * heads.dim // 2
    programs.rotate_backward[(len(out), 3)](
        *gradients,
        up.weight,
        *turn,
        out,
        low_gradient,
        up.scaling,
        len(turn.cos),
        rank=up.weight.shape[1],
        heads=heads.heads,
        kv_heads=heads.kv_heads,
        half=heads.dim // 2,
        block=triton.next_power_of_2(width),
        num_warps=_warps(width),
    )


def attention(qkv: torch.Tensor, heads: Heads, examples: int, out: torch.Tensor) -> Any:
    """The backward takes the base-2 log-sum-exp of each row of scores, [examples, heads, tokens] float32, where the
    kernels fit: heads that fill a block, and a dtype that tensor cores multiply."""
    fits = heads.dim in (16, 32, 64, WIDEST_HEAD) and not (qkv.is_cuda and qkv.dtype == torch.float32)
    if not fits:
        return plain.attention(qkv, heads, examples, out)
    tokens = len(qkv) // examples
    kept = torch.empty(examples, heads.heads, tokens, dtype=torch.float32, device=qkv.device)
    grid = (triton.cdiv(tokens, ATTENDED[0]), heads.heads, examples)
    programs.attention[grid](qkv, out, kept, tokens, **_attended(heads), num_warps=ATTENTION_WARPS)
    return kept


def attention_backward(
    gradient: torch.Tensor, qkv: torch.Tensor, mixed: torch.Tensor, kept: Any, heads: Heads, examples: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if not isinstance(kept, torch.Tensor):
        return plain.attention_backward(gradient, qkv, mixed, kept, heads, examples)
    tokens = len(qkv) // examples
    q, k, v = (torch.empty_like(gradient) for _ in range(3))
    grid = (triton.cdiv(tokens, ATTENDED[0]) + triton.cdiv(tokens, ATTENDED[1]), heads.heads, examples)
    programs.attention_backward[grid](
        qkv, mixed, kept, gradient, q, k, v, tokens, **_attended(heads), num_warps=ATTENTION_BACKWARD_WARPS
    )
    return q, k, v


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    tokens, width = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(tokens, width)
    block = min(FEED_BLOCK, triton.next_power_of_2(width))
    programs.swiglu[tokens, triton.cdiv(width, block)](gate_up, out, width=width, block=block)
    return out


def swiglu_backward(gradient: torch.Tensor, gate_up: torch.Tensor) -> None:
    tokens, width = gradient.shape
    block = min(FEED_BLOCK, triton.next_power_of_2(width))
    programs.swiglu_backward[tokens, triton.cdiv(width, block)](gradient, gate_up, width=width, block=block)


def down_gradient(x: torch.Tensor, low_gradient: torch.Tensor, down: Down, out: torch.Tensor) -> None:
    count = low_gradient.shape[2] // down.rank
    _low_rank_gradient(x, low_gradient, down, (x.shape[2],) * count, out, out.stride()[1:], shared=True)


def up_gradient(
    gradient: torch.Tensor, low: torch.Tensor, scaling: float, widths: tuple[int, ...], out: torch.Tensor
) -> None:
    down = Down(low, out.shape[2], None, 0, scaling)
    _low_rank_gradient(gradient, low, down, widths, out, out.stride()[:0:-1], shared=False)


def distill(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    labels: torch.Tensor,
    shares: torch.Tensor,
    settings: Distill,
) -> torch.Tensor:
    rows, vocabulary = student.shape
    values = torch.empty(rows, 2, dtype=torch.float32, device=student.device)
    programs.distill[(rows,)](
        student,
        student if teacher is None else teacher,
        labels,
        shares,
        values,
        settings.alpha,
        settings.temperature,
        settings.jsd_beta,
        vocabulary=vocabulary,
        kind=0 if teacher is None else DIVERGENCES[settings.divergence],
        block=min(LOGITS_BLOCK, triton.next_power_of_2(vocabulary)),
        num_warps=LOGITS_WARPS,
    )
    return values


def _down(down: Down | None, stand_in: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int, float]:
    """A's weight, the bits, their stride by the token, and the scale, for a kernel's signature."""
    if down is None:
        return stand_in, stand_in, 0, 0.0
    keep = down.keep
    return down.weight, stand_in if keep is None else keep, 0 if keep is None else keep.stride(-2), down.scale


def _adapters(down: Down | None) -> dict[str, Any]:
    """How many rows A has (0: there is none), and where its adapters' bits are (-1: nothing is dropped)."""
    if down is None:
        return {"lows": 0, "rank": 1, "first": -1}
    return {"lows": len(down.weight), "rank": down.rank, "first": -1 if down.keep is None else down.first}


def _row(width: int) -> dict[str, int]:
    """A whole row in one program."""
    return {"width": width, "block": triton.next_power_of_2(width), "num_warps": _warps(width)}


def _warps(width: int) -> int:
    warps: int = triton.next_power_of_2(max(1, min(ROW_WARPS, width // 256)))
    return warps


def _attended(heads: Heads) -> dict[str, Any]:
    return {
        "scale": heads.dim**-0.5,
        "heads": heads.heads,
        "kv_heads": heads.kv_heads,
        "dim": heads.dim,
        "rows": ATTENDED[0],
        "columns": ATTENDED[1],
    }


def _low_rank_gradient(
    source: torch.Tensor,
    low: torch.Tensor,
    down: Down,
    widths: tuple[int, ...],
    out: torch.Tensor,
    strides: tuple[int, ...],
    *,
    shared: bool,
) -> None:
    """`strides` of `out` are those of a low-rank row and of a column; `shared` says that all adapters have the same
    columns."""
    layers, tokens, columns = source.shape
    rows, block = SUMMED
    grid = (layers, triton.cdiv(max(widths), block), len(widths))
    keep = down.keep
    programs.gradient[grid](
        source,
        low,
        source if keep is None else keep,
        out,
        down.scale,
        tokens,
        0 if keep is None else keep.stride(0),
        0 if keep is None else keep.stride(1),
        out.stride(0),
        *strides,
        columns,
        widths[0],
        widths[-1],
        shared=shared,
        lows=low.shape[2],
        rank=down.rank,
        lanes=triton.next_power_of_2(down.rank),
        first=-1 if keep is None else down.first,
        rows=rows,
        block=block,
    )
