"""Every operation of a step on random tensors, as kernels or plain: what `tests/distill` and `tests/gpu` compare."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch

from kd.config import Distill
from kd.distill import plain
from kd.distill.plain import Down, Heads, Turn, Up


class Sizes(NamedTuple):
    """Of a model: `tokens` are those of all examples."""

    tokens: int
    examples: int
    hidden: int
    heads: Heads
    feed: int
    rank: int
    vocabulary: int


class Draw:
    """Random tensors, seeded, on one device; `dtype` is the model's."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype, device: str, dropout: bool) -> None:
        self.sizes, self.dtype, self.device = sizes, dtype, device
        self._generator = torch.Generator().manual_seed(7)
        self._dropout = dropout

    def model(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return (self.wide(*shape) * scale).to(self.dtype)

    def wide(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator).to(self.device)

    def down(self, adapters: int, width: int, first: int, layers: int | None = None) -> Down:
        shape = (self.sizes.tokens, width + 3) if layers is None else (layers, self.sizes.tokens, width + 3)
        keep = torch.randint(16, shape, generator=self._generator, dtype=torch.uint8).to(self.device)
        weight = self.wide(adapters * self.sizes.rank, width)
        return Down(weight, self.sizes.rank, keep if self._dropout else None, first, 1.25 if self._dropout else 1.0)

    def up(self, outs: int) -> Up:
        return Up(self.wide(outs, self.sizes.rank), 0.5)

    def turn(self) -> Turn:
        positions = self.sizes.tokens // self.sizes.examples
        angle = torch.rand(positions, self.sizes.heads.dim // 2, generator=self._generator).to(self.device) * 6
        return Turn(angle.cos(), angle.sin())


Operation = Callable[[ModuleType, Draw], list[torch.Tensor]]


def project_down(do: ModuleType, draw: Draw) -> list[torch.Tensor]:
    sizes = draw.sizes
    x, down = draw.model(sizes.tokens, sizes.hidden), draw.down(3, sizes.hidden, 0)
    out = draw.wide(sizes.tokens, 3 * sizes.rank)
    do.project_down(x, down, out)
    return [out]


def project_down_backward(do: ModuleType, draw: Draw) -> list[torch.Tensor]:
    sizes = draw.sizes
    gradient, down = draw.model(sizes.tokens, sizes.hidden), draw.down(1, sizes.hidden, 3)
    do.project_down_backward(gradient, draw.wide(sizes.tokens, sizes.rank), down)
    return [gradient]


def norm_alone(do: ModuleType, draw: Draw) -> list[torch.Tensor]:
    sizes = draw.sizes
    x, weight = draw.model(sizes.tokens, sizes.hidden), draw.model(sizes.hidden)
    normed = torch.empty_like(x)
    return [normed, *do.add_norm(x, None, weight, 1e-5, normed)]


def add_norm(do: ModuleType, draw: Draw) -> list[torch.Tensor]:
    sizes = draw.sizes
    x, delta, weight = (
        draw.model(sizes.tokens, sizes.hidden),
        draw.model(sizes.tokens, sizes.hidden),
        draw.model(sizes.hidden),
    )
    normed, low = torch.empty_like(x), draw.wide(sizes.tokens, 3 * sizes.rank)
    up = draw.wide(sizes.tokens, sizes.rank), draw.up(sizes.hidden)
    down = draw.down(3, sizes.hidden, 0), low
    return [*do.add_norm(x, delta, weight, 1e-5, normed, up=up, down=down), normed, low]


def norm_alone_backward(do: ModuleType, draw: Draw) -> list[torch.Tensor]:
    sizes = draw.sizes
    gradient, x = draw.model(sizes.tokens, sizes.hidden), draw.model(sizes.tokens, sizes.hidden)
    out = torch.empty_like(x)
    do.add_norm_backward(gradient, None, x, draw.wide(sizes.tokens).abs(), draw.model(sizes.hidden), out)
    return [out]


def add_norm_backward(do: ModuleType, draw: Draw) -> list[torch.Tensor]:
    sizes = draw.sizes
    gradient, residual, x = (draw.model(sizes.tokens, sizes.hidden) for _ in range(3))
    out, low = torch.empty_like(x), draw.wide(sizes.tokens, sizes.rank)
    down = draw.wide(sizes.tokens, 3 * sizes.rank), draw.down(3, sizes.hidden, 0)
    factor, weight = draw.wide(sizes.tokens).abs(), draw.model(sizes.hidden)
    do.add_norm_backward(gradient, residual, x, factor, weight, out, down=down, up=(draw.up(sizes.hidden), low))
    return [out, low]


def rotate(do: ModuleType, draw: Draw) -> list[torch.Tensor]:
    sizes = draw.sizes
    outs = sum(sizes.heads.widths)
    qkv, low = draw.model(sizes.tokens, outs), draw.wide(sizes.tokens, 3 * sizes.rank)
    do.rotate(qkv, low, draw.up(outs), draw.turn(), sizes.heads)
    return [qkv]


def rotate_backward(do: ModuleType, draw: Draw) -> list[torch.Tensor]:
    sizes = draw.sizes
    outs = sum(sizes.heads.widths)
    q, k, v = (draw.model(sizes.tokens, sizes.heads.widths[0]) for _ in range(3))
    out, low = draw.model(sizes.tokens, outs), draw.wide(sizes.tokens, 3 * sizes.rank)
    do.rotate_backward((q, k, v), draw.up(outs), draw.turn(), sizes.heads, out, low)
    return [out, low]


def attention(do: ModuleType, draw: Draw) -> list[torch.Tensor]:
    sizes = draw.sizes
    qkv = draw.model(sizes.tokens, sum(sizes.heads.widths))
    mixed, gradient = draw.model(sizes.tokens, sizes.heads.widths[0]), draw.model(sizes.tokens, sizes.heads.widths[0])
    kept = do.attention(qkv, sizes.heads, sizes.examples, mixed)
    return [mixed, *do.attention_backward(gradient, qkv, mixed, kept, sizes.heads, sizes.examples)]


def swiglu(do: ModuleType, draw: Draw) -> list[torch.Tensor]:
    return [do.swiglu(draw.model(draw.sizes.tokens, 2 * draw.sizes.feed))]


def swiglu_backward(do: ModuleType, draw: Draw) -> list[torch.Tensor]:
    gradient, gate_up = (draw.model(draw.sizes.tokens, width * draw.sizes.feed) for width in (1, 2))
    do.swiglu_backward(gradient, gate_up)
    return [gate_up]


def down_gradient(do: ModuleType, draw: Draw) -> list[torch.Tensor]:
    sizes = draw.sizes
    x, low = draw.model(2, sizes.tokens, sizes.hidden), draw.wide(2, sizes.tokens, 3 * sizes.rank)
    out = draw.wide(2, 5 + 3 * sizes.rank * sizes.hidden)[:, 5:].unflatten(1, (3 * sizes.rank, sizes.hidden))
    do.down_gradient(x, low, draw.down(3, sizes.hidden, 0, layers=2), out)
    return [out]


def up_gradient(do: ModuleType, draw: Draw) -> list[torch.Tensor]:
    sizes = draw.sizes
    outs = sum(sizes.heads.widths)
    gradient, low = draw.model(2, sizes.tokens, outs), draw.wide(2, sizes.tokens, 3 * sizes.rank)
    out = draw.wide(2, 5 + outs * sizes.rank)[:, 5:].unflatten(1, (outs, sizes.rank))
    do.up_gradient(gradient, low, 0.5, sizes.heads.widths, out)
    return [out]


def distilled(settings: Distill, teacher: bool) -> Operation:
    """The objective's, with these settings."""

    def distill(do: ModuleType, draw: Draw) -> list[torch.Tensor]:
        rows, vocabulary = draw.sizes.tokens, draw.sizes.vocabulary
        ours, theirs = (draw.model(rows, vocabulary, scale=3) for _ in range(2))
        labels = torch.arange(rows, device=draw.device) * 7 % vocabulary
        shares = draw.wide(rows).abs()
        shares[-1] = 0
        return [do.distill(ours, theirs if teacher else None, labels, shares, settings), ours]

    return distill


OPERATIONS: list[Operation] = [
    project_down, project_down_backward, norm_alone, add_norm, norm_alone_backward, add_norm_backward, rotate,
    rotate_backward, attention, swiglu, swiglu_backward, down_gradient, up_gradient,
]  # fmt: skip


def compare(
    operation: Operation, kernels: ModuleType, sizes: Sizes, dtype: torch.dtype, device: str, dropout: bool
) -> None:
    """Both versions from the same tensors; the exact one computes in float32 on the same rounded inputs."""
    found, wanted = (operation(do, Draw(sizes, dtype, device, dropout)) for do in (kernels, plain))
    near = 2e-5 if dtype == torch.float32 else 1e-2
    for ours, exact in zip(found, wanted, strict=True):
        assert ours.dtype == exact.dtype
        error = (ours.float() - exact.float()).norm() / exact.float().norm()
        assert error <= near, f"{operation.__name__}: {float(error):.1e}"


def settings_of(settings: Distill) -> list[tuple[Distill, bool]]:
    """Each divergence, and labels alone."""
    kinds: list[dict[str, Any]] = [{"divergence": kind} for kind in ("reverse-kl", "forward-kl", "jsd")]
    kinds.append({"divergence": "jsd", "jsd_beta": 0.1})
    return [(settings.model_copy(update=kind), True) for kind in kinds] + [(settings, False)]
