"""Batched decoding: memory that runs out, rows that fail, and the GPU's schedule played on a CPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from asking import answers, rows_of

from kd.assess.decode import SlotDecoder, decode
from kd.assess.generate import Ending, end_ids, respond_one_at_a_time
from kd.assess.row import NOT_A_NUMBER, Row
from kd.errors import UserError
from kd.models.load import encode, load_model, load_tokenizer

PROMPTS = [
    "Tom has 3 apples.",
    "Why?",
    "A box holds 6 pens. Maria buys 3 boxes. How many?",
    "",
    "Ada </s> walks.",
    "Each shelf holds 20 books and there are 7 shelves.",
    "Ben",
]


@pytest.fixture
def llama(tiny_llama: Path) -> Any:
    return load_model(tiny_llama, "float32", "cpu")


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    return load_tokenizer(tiny_llama)


def decoded(model: Any, tokenizer: Any, prompts: list[str], limit: int, batch_tokens: int) -> list[Row]:
    rows, ending = rows_of(tokenizer, prompts, limit), Ending(tokenizer, end_ids(model))
    length = max(len(row.prompt) for row in rows) + limit
    ended = [row.index for some in decode(model, rows, batch_tokens, length, ending.reached) for row in some]
    assert sorted(ended) == list(range(len(prompts)))  # each once
    return rows


def test_out_of_memory_halves_the_batch_and_loses_no_row(
    llama: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [row.new for row in decoded(llama, tokenizer, PROMPTS, 12, 10_000)]
    tried = []

    def step(decoder: SlotDecoder, newest: Any) -> dict[int, int]:
        tried.append(decoder.slots)
        if decoder.slots > 2 and len(tried) % 3 == 0:  # now and then, also halfway through rows
            raise torch.cuda.OutOfMemoryError
        return original(decoder, newest)

    original = SlotDecoder.step
    monkeypatch.setattr(SlotDecoder, "step", step)
    rows = decoded(llama, tokenizer, PROMPTS, 12, 8 * 48)
    assert [row.new for row in rows] == expected
    assert sorted(set(tried)) == [2, 4, 8]


def test_a_row_too_large_for_the_whole_memory_fails_alone(
    llama: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = decoded(llama, tokenizer, PROMPTS, 12, 10_000)
    longest = max(len(row.prompt) for row in expected)

    def prefill(decoder: SlotDecoder, prompts: dict[int, list[int]]) -> dict[int, int]:
        if any(len(prompt) == longest for prompt in prompts.values()):
            raise torch.cuda.OutOfMemoryError
        return original(decoder, prompts)

    original = SlotDecoder.prefill
    monkeypatch.setattr(SlotDecoder, "prefill", prefill)
    for row, right in zip(decoded(llama, tokenizer, PROMPTS, 12, 4 * 48), expected, strict=True):
        if len(row.prompt) == longest:
            assert "out of GPU memory" in str(row.failure)
        else:
            assert (row.new, row.failure) == (right.new, None)


def test_nan_in_one_row_fails_it_and_does_not_reach_the_next_in_its_slot(llama: Any, tokenizer: Any) -> None:
    expected = decoded(llama, tokenizer, PROMPTS, 12, 10_000)
    poisoned = [*PROMPTS[:3], "Poison ~ here, in a text that is the longest of them all by far.", *PROMPTS[3:]]
    [tilde] = encode(tokenizer, "~", bos=False)
    assert all(tilde not in row.prompt + row.new for row in expected)
    with torch.no_grad():
        llama.model.embed_tokens.weight[tilde] = torch.nan
    rows = decoded(llama, tokenizer, poisoned, 12, 96)  # one slot: every row follows the poisoned one
    one_by_one = rows_of(tokenizer, poisoned, 12)
    list(respond_one_at_a_time(llama, one_by_one, Ending(tokenizer, end_ids(llama)), "test"))
    for found in (rows, one_by_one):
        assert [row.index for row in found if row.failure == NOT_A_NUMBER] == [3]
        assert [row.new for row in found if not row.failure] == [row.new for row in expected]


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_the_schedule_of_a_gpu_gives_the_same_tokens(
    llama: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, slots: int
) -> None:
    """Prompts read together, steps on fewer rows and positions, rows moved down; without the graphs."""
    expected = answers(llama, tokenizer, PROMPTS, 30)
    shapes = set()

    def replay(decoder: SlotDecoder, rows: int, length: int) -> torch.Tensor:
        shapes.add(rows)
        return decoder._step(rows, length)

    def on_gpu(decoder: SlotDecoder, *arguments: Any) -> None:
        original(decoder, *arguments)
        decoder.on_gpu = True

    original = SlotDecoder.__init__
    monkeypatch.setattr(SlotDecoder, "__init__", on_gpu)
    monkeypatch.setattr(SlotDecoder, "_replay", replay)
    lengths = [len(row.prompt) for row in rows_of(tokenizer, PROMPTS, 1)]
    rows = [Row(i, row.prompt, 30 - 4 * i) for i, row in enumerate(rows_of(tokenizer, PROMPTS, 1))]  # end one by one
    ending = Ending(tokenizer, end_ids(llama))
    list(decode(llama, rows, slots * 80, max(lengths) + 30, ending.reached))
    for row, right in zip(rows, expected, strict=True):
        assert right.text.startswith(ending.response(row).text)
        assert len(row.new) == min(row.limit, right.tokens)
    assert 1 in shapes
    assert (len(shapes) > 1) == (slots > 1)


def test_a_row_does_not_depend_on_what_shares_its_batch(llama: Any, tokenizer: Any) -> None:
    [row] = rows_of(tokenizer, ["Tom has 3 apples."], 1)
    seen: list[torch.Tensor] = []
    llama.lm_head.register_forward_hook(lambda _module, _inputs, logits: seen.append(logits.clone()))
    found = []
    for slot, others in ((0, {}), (2, {0: 5, 4: 17}), (4, {1: 2, 20: 9, 3: 30})):  # lengths by slot; 8 and 24 rows
        decoder = SlotDecoder(llama, 21, 64)
        with torch.inference_mode():
            decoder.prefill({slot: row.prompt} | {other: [7] * length for other, length in others.items()})
            decoder.step({slot: (9, len(row.prompt))} | {other: (3, length) for other, length in others.items()})
        found.append(seen[-1][slot])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_other_architectures_are_sent_to_the_exact_way() -> None:
    with pytest.raises(UserError, match=r"SimpleNamespace: batched decoding knows Llama alone; use .* --exact"):
        next(decode(SimpleNamespace(), [], 1, 1, lambda _: True))
