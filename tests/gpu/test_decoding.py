"""Batched decoding with CUDA graphs, by the kernels and by the modules: what `generate` says, however many slots the
memory leaves."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from asking import answers, rows_of

from kd.assess import generate
from kd.assess.ahead import AheadDecoder, decode_ahead, kernels_for
from kd.assess.decode import SlotDecoder, decode
from kd.assess.generate import Ending, respond
from kd.assess.row import Row
from kd.data.miniature import problems
from kd.kernels import lacking
from kd.models.adapters import load_student
from kd.models.load import load_tokenizer

pytestmark = pytest.mark.usefixtures("gpu")

LIMIT = 40


@pytest.fixture
def student(gpu_llama: Path) -> Any:
    return load_student(gpu_llama, "float32", None, "cuda")


@pytest.fixture(params=["kernels", "modules"], autouse=True)
def kernels(request: pytest.FixtureRequest, student: Any, monkeypatch: pytest.MonkeyPatch) -> ModuleType | None:
    """What `respond` decodes by: the kernels, or without them."""
    if request.param == "modules":
        monkeypatch.setattr(generate, "kernels_for", lambda _: None)
        return None
    if missing := lacking():
        pytest.skip(f"needs {missing}")
    return kernels_for(student)


@pytest.fixture
def prompts() -> list[str]:
    return [problem.question for problem in problems(40, seed=3)]


def test_batches_say_what_generate_says(gpu_llama: Path, student: Any, prompts: list[str]) -> None:
    tokenizer = load_tokenizer(gpu_llama)
    alone = answers(student, tokenizer, prompts, LIMIT, slots=None)
    for slots in (1, 7, 16, 64):  # rows wait for slots, or slots for rows
        assert answers(student, tokenizer, prompts, LIMIT, slots) == alone


def test_a_string_that_stops_ends_rows_alike(gpu_llama: Path, student: Any, prompts: list[str]) -> None:
    tokenizer = load_tokenizer(gpu_llama)
    stop = ("e",)
    alone = answers(student, tokenizer, prompts, LIMIT, None, stop)
    assert answers(student, tokenizer, prompts, LIMIT, 16, stop) == alone
    assert any(not response.reached_limit for response in alone)


def test_a_batch_that_does_not_fit_is_halved_and_says_the_same(
    gpu_llama: Path,
    student: Any,
    prompts: list[str],
    memory_limit: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    kernels: ModuleType | None,
) -> None:
    tokenizer = load_tokenizer(gpu_llama)
    expected = answers(student, tokenizer, prompts, LIMIT, slots=16)
    tried = []
    kind: Any = AheadDecoder if kernels else SlotDecoder
    real = kind.__init__

    def counted(self: Any, model: Any, slots: int, *more: Any) -> None:
        tried.append(slots)
        real(self, model, slots, *more)

    monkeypatch.setattr(kind, "__init__", counted)
    length = 16_384  # more positions than a row needs, so that the cache is what takes the memory
    rows, ending = rows_of(tokenizer, prompts, LIMIT), Ending(tokenizer, frozenset({1}))
    settings = student.config
    per_slot = 2 * settings.num_hidden_layers * settings.num_key_value_heads * 64 * 4 * length
    memory_limit(24 * per_slot)
    ended = [row for some in respond(student, rows, ending, 32 * length, length, "test") for row in some]
    assert tried == [32, 16]
    assert [ending.response(row) for row in sorted(ended, key=lambda row: row.index)] == expected


def test_a_row_that_does_not_fit_alone_is_named(
    gpu_llama: Path, student: Any, memory_limit: Callable[[int], None], kernels: ModuleType | None
) -> None:
    rows = rows_of(load_tokenizer(gpu_llama), ["How many?"], LIMIT)
    memory_limit(2**20)
    ((row,),) = [some for some in decode(student, rows, 1, 16_384, lambda _: False, operations=kernels) if some]
    assert row.failure == "out of GPU memory, alone on it"


def test_no_number_in_one_row_leaves_the_others_alone(gpu_llama: Path, student: Any, prompts: list[str]) -> None:
    tokenizer = load_tokenizer(gpu_llama)
    expected = answers(student, tokenizer, prompts, LIMIT, slots=16)
    rows = rows_of(tokenizer, ["How many?", *prompts], LIMIT)
    token = min(set(range(student.config.vocab_size)).difference(*(row.prompt for row in rows)))
    rows[0].prompt.append(token)
    with torch.no_grad():
        student.model.embed_tokens.weight[token] = torch.nan
    ending = Ending(tokenizer, frozenset({1}))
    length = max(len(row.prompt) for row in rows) + LIMIT
    for _ in respond(student, rows, ending, 16 * (length + 16), length, "test"):
        pass
    clean = [i for i, row in enumerate(rows) if token not in row.prompt and token not in row.new]
    assert rows[0].failure is not None
    assert [ending.response(rows[i]) for i in clean] == [expected[i - 1] for i in clean]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_tokens_twice(gpu_llama: Path, prompts: list[str], dtype: Any, kernels: ModuleType | None) -> None:
    if kernels is None:
        pytest.skip("is about the kernels")
    student, tokenizer = load_student(gpu_llama, dtype, None, "cuda"), load_tokenizer(gpu_llama)
    length, stop = 256, set(range(0, 401, 9))  # tokens of which only the host knows that they end a row
    found = []
    for _ in range(2):
        rows = rows_of(tokenizer, prompts, LIMIT)
        decoder = AheadDecoder(student, 12, length, frozenset({1}), kernels)
        waiting, active = deque(sorted(rows, key=lambda row: -len(row.prompt))), dict[int, Row]()
        list(decode_ahead(decoder, waiting, active, lambda row: len(row.new) == LIMIT or row.new[-1] in stop | {1}))
        found.append([row.new for row in rows])
    assert found[0] == found[1]


def test_a_gpu_without_a_compiler_says_so_and_decodes(
    student: Any, prompts: list[str], gpu_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    tokenizer = load_tokenizer(gpu_llama)
    expected = answers(student, tokenizer, prompts[:5], LIMIT)
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr(generate, "kernels_for", kernels_for)
    assert answers(student, tokenizer, prompts[:5], LIMIT) == expected
    assert "which is slower: the kernels need a C compiler" in capsys.readouterr().err
