"""Which position meets which: the published choices, on real text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kd import models
from kd.dataset import Example
from kd.distill.alignment import published_matches, published_teacher_order


def example(number: int, question: str, target: str) -> Example:
    return Example(f"train-{number:05d}", question, "#### 1", target)


def test_teacher_order_is_the_key_order_of_real_safetensors_files(tmp_path: Path) -> None:
    path = tmp_path / "teacher.safetensors"
    save_file({f"Question {i}": torch.zeros(1) for i in range(1, 121)}, path)
    with safe_open(path, "pt") as file:
        keys = list(file.keys())
    ids = [f"Question {i}" for i in range(1, 121)]
    assert published_teacher_order(ids) == keys


def test_of_2638_questions_only_the_first_meets_its_own_rows() -> None:
    ids = [f"train-{i:05d}" for i in range(1, 2639)]
    order = published_teacher_order(ids)
    assert sorted(order) == ids
    assert [i for i, (a, b) in enumerate(zip(ids, order, strict=True)) if a == b] == [0]


def test_rows_start_at_bos_unshifted_and_are_cut_to_the_shortest(tiny_llama: Path) -> None:
    tokenizer = models.load_tokenizer(tiny_llama)
    question, answer = "Tom has 3 apples and buys 4 more. How many now?", "How many? ** Tom has 3 + 4 = <<3+4=7>>7."
    question_ids = tokenizer(question, add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id

    [match] = published_matches([example(1, question, answer)], tokenizer, 256, None)
    assert match.input_ids == [bos, *question_ids]
    assert match.labels == [bos, *answer_ids][: len(question_ids) + 1]
    assert match.teacher_id is None

    [match] = published_matches([example(1, question, answer)], tokenizer, 256, {"train-00001": 5})
    assert len(match.labels) == 5
    assert match.teacher_id == "train-00001"

    [match] = published_matches([example(1, question, answer)], tokenizer, 4, {"train-00001": 9})
    assert match.input_ids == [bos, *question_ids[:3]]
    assert match.labels == [bos, *answer_ids[:3]]


def test_no_overlap_is_an_error_that_names_the_example(tiny_llama: Path) -> None:
    tokenizer = models.load_tokenizer(tiny_llama)
    with pytest.raises(models.UserError, match="train-00007: no overlapping positions"):
        published_matches([example(7, "Why?", "Because.")], tokenizer, 256, {"train-00007": 0})
