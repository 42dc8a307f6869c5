"""Assessment: batched greedy answers, the log, and its score."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import answers
from hypothesis import given
from hypothesis import strategies as st

from kd.cli import main
from kd.data.rows import read_examples
from kd.models.load import encode, load_model, load_tokenizer
from kd.scoring.extract import extract
from kd.scoring.log import COLUMNS, is_correct

LOGS = Path("artifacts/mini/logs")


def read_log(experiment: str) -> list[dict[str, str]]:
    with (LOGS / f"{experiment}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def prepared(tiny_params: dict[str, Any], write_params: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    write_params(tiny_params)
    assert main(["prepare"]) == 0
    return tiny_params


def greedy(model: Any, token_ids: list[int], limit: int, end: int) -> list[int]:
    """One row at a time, the whole sequence anew for every token."""
    new: list[int] = []
    with torch.inference_mode():
        while len(new) < limit and end not in new:
            new.append(int(model(torch.tensor([token_ids + new])).logits[0, -1].argmax()))
    return new


def test_batches_answer_as_one_row_at_a_time_does(tiny_llama: Path) -> None:
    model = load_model(tiny_llama, "float32", "cpu")
    tokenizer = load_tokenizer(tiny_llama)
    prompts = ["Tom has 3 apples.", "Why?", "A box holds 6 pens. Maria buys 3 boxes. How many?", "", "Ada </s> walks."]
    expected = [greedy(model, encode(tokenizer, prompt, bos=True), 12, tokenizer.eos_token_id) for prompt in prompts]
    for slots in (None, 1, 2, 5):
        responses = answers(model, tokenizer, prompts, 12, slots)
        for response, ids in zip(responses, expected, strict=True):
            assert response.text == tokenizer.decode(ids, skip_special_tokens=True)
            assert response.tokens == len(ids)
            assert response.reached_limit == (tokenizer.eos_token_id not in ids)


def test_end_token_ends_a_row_and_is_counted(tiny_llama: Path) -> None:
    model = load_model(tiny_llama, "float32", "cpu")
    tokenizer = load_tokenizer(tiny_llama)
    second = answers(model, tokenizer, ["Tom"], 2)[0]
    [_, end] = greedy(model, encode(tokenizer, "Tom", bos=True), 2, -1)
    assert second.reached_limit
    model.generation_config.eos_token_id = end
    stopped = answers(model, tokenizer, ["Tom", "Why is it so?"], 9)[0]
    assert stopped.tokens == 2
    assert not stopped.reached_limit


def test_log_has_the_originals_columns_and_ours(prepared: dict[str, Any]) -> None:
    assert main(["assess", "no-distillation"]) == 0
    rows = read_log("no-distillation")
    examples = read_examples(Path("artifacts/mini/data/test.jsonl"))
    assert list(rows[0]) == list(COLUMNS)
    assert [row["question"] for row in rows] == [example.question for example in examples]
    suffix = prepared["untrained"]["no-distillation"]["suffix"]
    for row, example in zip(rows, examples, strict=True):
        assert row["answer"] == example.answer
        assert row["model_answer"].startswith(example.question + suffix)
        assert 1 <= int(row["model_output_tokens"]) <= 6
        assert (row["model_max_tokens"] == "True") <= (row["model_output_tokens"] == "6")
        assert (row["rule"] == "undecided") == (row["extracted_answer"] == "-1" and row["correct"] == "False")


def test_the_prompt_itself_is_never_read_as_the_answer(prepared: dict[str, Any]) -> None:
    assert main(["assess", "no-distillation"]) == 0
    suffix = prepared["untrained"]["no-distillation"]["suffix"]
    for row in read_log("no-distillation"):
        response = row["model_answer"].removeprefix(row["question"] + suffix)
        (found,) = extract([response])
        assert (row["extracted_answer"], row["rule"]) == (found.answer or "-1", found.rule)


@pytest.mark.usefixtures("prepared")
def test_same_bytes_twice() -> None:
    assert main(["assess", "no-distillation"]) == 0
    before = (LOGS / "no-distillation.csv").read_bytes()
    assert main(["assess", "no-distillation"]) == 0
    assert (LOGS / "no-distillation.csv").read_bytes() == before


@pytest.mark.usefixtures("prepared")
def test_adapter_changes_the_answers_and_must_fit_the_student(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["assess", "fine-tuning"]) == 2
    assert "adapters/fine-tuning-1: no such adapter; run `kd train fine-tuning-1`" in capsys.readouterr().err
    assert main(["train", "fine-tuning"]) == 0
    assert main(["assess", "fine-tuning"]) == 0
    model, tokenizer = load_model(tiny_llama, "float32", "cpu"), load_tokenizer(tiny_llama)
    rows = read_log("fine-tuning-1")
    bare = answers(model, tokenizer, [row["question"] for row in rows], 6)
    assert [row["model_answer"] for row in rows] != [
        row["question"] + r.text for row, r in zip(rows, bare, strict=True)
    ]

    config = Path("artifacts/mini/adapters/fine-tuning-1/adapter_config.json")
    config.write_text(config.read_text().replace(str(tiny_llama), "some/other-model"))
    assert main(["assess", "fine-tuning"]) == 2
    assert "base_model_name_or_path is 'some/other-model', not" in capsys.readouterr().err

    config.write_text(config.read_text().replace("some/other-model", str(tiny_llama)))
    config.with_name("adapter_model.safetensors").rename(config.with_name("adapter_model.bin"))
    assert main(["assess", "fine-tuning"]) == 2
    assert "no adapter_model.safetensors; run `kd train fine-tuning-1` again" in capsys.readouterr().err


@given(st.integers(-(10**9), 10**9))
def test_correct_means_the_same_number(number: int) -> None:
    answer = f"so\n#### {number:,}"
    assert is_correct(str(number), answer)
    assert not is_correct(str(number + 1), answer)
    assert not is_correct(None, answer)
