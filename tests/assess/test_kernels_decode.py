"""Each kernel of a decoding step against the plain operation beside it.

Where there is no GPU, Triton's interpreter runs them, which knows no bfloat16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from asking import answers, rows_of
from tiny import make_tiny_llama

from kd.assess import plain
from kd.assess.decode import decode
from kd.assess.generate import Ending, end_ids
from kd.assess.plain import Slots
from kd.models.load import load_model, load_tokenizer

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
HALVES = [torch.float16, torch.bfloat16] if GPU else [torch.float16]
DTYPES = [torch.float32, *(HALVES if GPU else [])]
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # Triton's interpreter


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def kernels() -> Any:
    return pytest.importorskip("kd.assess.kernels", reason="Triton is not installed", exc_type=ImportError)


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def slots(positions: list[int], lasts: list[int], ends: list[int]) -> Slots:
    def whole(numbers: Any) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)

    tokens = torch.full((len(positions),), 3, device=DEVICE)
    return Slots(tokens, whole(positions), whole(lasts), whole([[-9] * 5] * len(positions)), whole(ends))


def assert_close(found: torch.Tensor, right: torch.Tensor) -> None:
    """As near as a few roundings of their dtype: all together, and the worst."""
    assert found.shape == right.shape
    assert found.dtype == right.dtype
    eps, away = torch.finfo(right.dtype).eps, (found - right).double()
    assert away.norm() <= 4 * eps * right.double().norm()
    assert away.abs().max() <= 16 * eps * right.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "parts"), [(1, 64, 0), (3, 96, 1), (5, 577, 3)])
def test_add_norm(kernels: Any, dtype: torch.dtype, rows: int, width: int, parts: int) -> None:
    ours, added = drawn(rows, width, dtype=dtype), drawn(parts, rows, width) if parts else None
    theirs, weight = ours.clone(), drawn(width, dtype=dtype)
    found, right = kernels.add_norm(ours, added, weight, 1e-5), plain.add_norm(theirs, added, weight, 1e-5)
    assert_close(ours, theirs)
    assert_close(found, right)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("head_dim", "group", "kv_heads", "length", "parts"),
    [(32, 3, 2, 80, 2), (64, 1, 1, 336, 1), (64, 4, 2, 176, 3), (128, 5, 1, 144, 1)],
)
def test_attend(
    kernels: Any, dtype: torch.dtype, head_dim: int, group: int, kv_heads: int, length: int, parts: int
) -> None:
    """At the first position, the last, at the edges of blocks; rows that are not live; caches with NaN behind a row."""
    positions = [0, length - 1, 15, 16, 17, 64, 63, 5]
    lasts = [length] * 6 + [63, 0]
    state, rows = slots(positions, lasts, []), len(positions)
    keys, values = (drawn(rows + 1, kv_heads, length, head_dim, dtype=dtype) for _ in range(2))
    for row, position in enumerate(positions):
        keys[row, :, position + 1 :] = values[row, :, position + 1 :] = torch.nan
    angles = torch.rand(length, head_dim // 2, device=DEVICE).repeat(1, 2)
    rotary = angles.cos().to(dtype), angles.sin().to(dtype)
    qkv = drawn(parts, rows, (group + 2) * kv_heads, head_dim)
    before = keys.clone(), values.clone()
    ours, theirs = (keys, values), (keys.clone(), values.clone())
    for block in (16, 64):
        tile = kernels.ATTENTION._replace(outputs=block)
        found, right = kernels.attend(qkv, *ours, rotary, state, tile), plain.attend(qkv, *theirs, rotary, state)
        assert_close(found, right)
        assert (found[6:] == 0).all()
        for cache, other, old in zip(ours, theirs, before, strict=True):
            assert_close(cache.nan_to_num(7), other.nan_to_num(7))
            assert torch.equal(cache[6:].nan_to_num(7), old[6:].nan_to_num(7))  # not live, or no row's


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rows", [1, 5, 16, 33])
def test_products(kernels: Any, dtype: torch.dtype, rows: int) -> None:
    tile = kernels.Tile(outputs=16, inputs=16, warps=4, stages=2)
    x, weight = drawn(rows, 128, dtype=dtype) / 8, drawn(74, 128, dtype=dtype)
    parts = kernels.product(x, weight, tile)
    assert len(parts) == 2
    assert_close(parts.sum(0).to(dtype), plain.product(x, weight)[0])
    assert_close(kernels.gated(x, weight, tile), plain.gated(x, weight))


def test_products_that_others_do_better(kernels: Any) -> None:
    for rows, width, dtype in ((kernels.PRODUCT_ROWS + 1, 64, torch.float16), (2, 72, torch.float16), (2, 64, None)):
        x, weight = drawn(rows, width, dtype=dtype or torch.float32), drawn(10, width, dtype=dtype or torch.float32)
        if x.dtype == torch.float16 and not GPU:
            x, weight = x.float(), weight.float()
        assert torch.equal(kernels.product(x, weight), plain.product(x, weight))
        assert_close(kernels.gated(x, weight), plain.gated(x, weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate(kernels: Any, dtype: torch.dtype) -> None:
    both = drawn(3, 2 * 1500, dtype=dtype)
    assert_close(kernels.gate(both), plain.gate(both))


@pytest.mark.parametrize("dtype", DTYPES)
def test_choose(kernels: Any, dtype: torch.dtype) -> None:
    logits = drawn(7, 5000, dtype=dtype)
    logits[1, 3] = torch.nan
    logits[2] = -torch.inf
    logits[3, 4100] = logits[3, 77] = 9  # the first of equals
    logits[4, 7] = 10  # ends a row
    logits[5, 4999] = torch.inf
    ours = slots([3, 3, 4, 3, 3, 3, 9, 3], [9, 9, 9, 9, 9, 4, 9, 9], [7, 40])
    theirs = Slots(*(tensor.clone() for tensor in ours))
    which = torch.tensor([0, 1, 2, 3, 4, 7, 6], dtype=torch.int32, device=DEVICE)
    kernels.choose(logits, which, ours)
    plain.choose(logits, which, theirs)
    for found, right in zip(ours, theirs, strict=True):
        assert torch.equal(found, right)
    assert ours.tokens.tolist()[2:5] == [0, 77, 7]
    assert ours.lasts.tolist() == [9, 4, 9, 9, 4, 4, 9, 9]
    assert ours.positions.tolist() == [4, 4, 5, 4, 4, 3, 9, 4]


@pytest.mark.often
def test_a_model_says_by_the_kernels_what_it_says_by_its_modules(
    kernels: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder: Path = make_tiny_llama(tmp_path_factory.mktemp("llama"), hidden_size=128, initializer_range=0.05)
    model, tokenizer = load_model(folder, "float32", DEVICE), load_tokenizer(folder)
    prompts, limit = ["Tom has 3 apples.", ""], 4
    expected = answers(model, tokenizer, prompts, limit, slots=None)
    rows, ending = rows_of(tokenizer, prompts, limit), Ending(tokenizer, end_ids(model))
    list(decode(model, rows, 48, 30, ending.reached, ending.end_ids, kernels))
    assert [ending.response(row) for row in rows] == expected
