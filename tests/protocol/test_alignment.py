"""Which position meets which, on real text: the published choices, the aligned ones, and single published ones put back
into aligned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kd.config import Quirk
from kd.data.rows import Example
from kd.models.load import UserError, load_tokenizer
from kd.paper import PROMPTS
from kd.protocol.alignment import Match, match_examples
from kd.protocol.order import published_teacher_order
from kd.protocol.reading import teacher_reading
from kd.store.records import Reading

QUESTION, ANSWER = "Tom has 3 apples and buys 4 more. How many now?", "How many? ** Tom has 3 + 4 = <<3+4=7>>7.\n#### 7"


# A question and an answer of few tokens, and the beginning of the prompt `teacher` as the tiny tokenizer cuts it.
SHORT_QUESTION, SHORT_ANSWER, PRIMED = "2 + 3?", "5", f"{PROMPTS['teacher']}2 + 3?"


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    return load_tokenizer(tiny_llama)


def example(number: int, question: str = QUESTION, target: str = ANSWER) -> Example:
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


def test_published_rows_start_at_bos_unshifted_and_are_cut_to_the_shortest(tokenizer: Any) -> None:
    question_ids = tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer(ANSWER, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id

    (match,) = match_examples("published", [example(1)], tokenizer, 256, None).kept
    assert match.input_ids == [bos, *question_ids]
    assert match.first_row == 0
    assert match.labels == [bos, *answer_ids][: len(question_ids) + 1]
    assert match.teacher_id is None

    five = Reading("train-00001", [1, 2, 3, 4, 5], (0, 5))
    (match,) = match_examples("published", [example(1)], tokenizer, 256, [five]).kept
    assert len(match.labels) == 5
    assert match.teacher_id == "train-00001"

    nine = Reading("train-00001", list(range(9)), (0, 9))
    matches = match_examples("published", [example(1)], tokenizer, 4, [nine])
    assert matches.kept[0].input_ids == [bos, *question_ids[:3]]
    assert matches.kept[0].labels == [bos, *answer_ids[:3]]
    assert matches.cut == ["train-00001"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_aligned_distribution_that_predicts_a_token_meets_that_token(tokenizer: Any, prompt: str) -> None:
    teacher = teacher_reading(tokenizer, "aligned", PROMPTS[prompt], example(1))
    matches = match_examples("aligned", [example(1)], tokenizer, 256, [teacher])
    (match,) = matches.kept
    assert (matches.cut, matches.skipped) == ([], [])
    assert tokenizer.decode(match.input_ids) == f"<s>{QUESTION}\n{ANSWER}</s>"
    assert tokenizer.decode(match.labels) == f"\n{ANSWER}</s>"
    assert tokenizer.decode(teacher.token_ids) == f"<s>{PROMPTS[prompt]}{QUESTION}\n{ANSWER}</s>"
    assert teacher.span[1] - teacher.span[0] == len(match.labels)
    for i, label in enumerate(match.labels):
        assert match.input_ids[match.first_row + i + 1] == label
        assert teacher.token_ids[teacher.span[0] + i + 1] == label


def test_aligned_joins_by_id_whatever_the_stores_order(tokenizer: Any) -> None:
    examples = [example(i, target=f"Answer {i}.") for i in range(1, 13)]
    teachers = [teacher_reading(tokenizer, "aligned", "", one) for one in reversed(examples)]
    matches = match_examples("aligned", examples, tokenizer, 256, teachers).kept
    assert [match.teacher_id for match in matches] == [match.example_id for match in matches]


def test_aligned_cuts_the_answer_and_leaves_out_what_has_none_and_counts_both(tokenizer: Any) -> None:
    long = example(2, question=" ".join([QUESTION] * 5))
    question = len(tokenizer(QUESTION, add_special_tokens=False)["input_ids"]) + 1
    matches = match_examples("aligned", [example(1), long], tokenizer, question + 3, None)
    assert [len(match.labels) for match in matches.kept] == [3]
    assert len(matches.kept[0].input_ids) == question + 3
    assert matches.cut == ["train-00001", "train-00002"]
    assert matches.skipped == ["train-00002"]
    with pytest.raises(UserError, match=r"train-00001: no overlapping positions .* raise `distill\.max_tokens`"):
        match_examples("aligned", [example(1)], tokenizer, question, None)


def test_aligned_refuses_a_teacher_that_read_another_answer(tokenizer: Any) -> None:
    other = teacher_reading(tokenizer, "aligned", "", example(1, target="Seven."))
    with pytest.raises(UserError, match="train-00001: teacher and student read other tokens as the answer"):
        match_examples("aligned", [example(1)], tokenizer, 256, [other])


def test_no_overlap_is_an_error_that_names_the_example(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="train-00007: no overlapping positions"):
        match_examples(
            "published", [example(7, "Why?", "Because.")], tokenizer, 256, [Reading("train-00007", [], (0, 0))]
        )


def aligned(tokenizer: Any, one: Example, prompt: str, *quirks: Quirk) -> tuple[Reading, Match]:
    """What the teacher reads for an example, and what of it meets the student."""
    reading = teacher_reading(tokenizer, "aligned", PROMPTS[prompt], one, quirks)
    (match,) = match_examples("aligned", [one], tokenizer, 256, [reading], quirks).kept
    return reading, match


@pytest.mark.parametrize(
    ("quirks", "student_is_to_say", "teacher_has_read"),
    [
        ([], ["\n", "5", "</s>"], [f"<s>{PRIMED}", f"<s>{PRIMED}\n", f"<s>{PRIMED}\n5"]),
        (["no-end"], ["\n", "5"], [f"<s>{PRIMED}", f"<s>{PRIMED}\n"]),
        (["label-shift"], ["?", "\n", "5"], [f"<s>{PRIMED}", f"<s>{PRIMED}\n", f"<s>{PRIMED}\n5"]),
        (["bos"], ["\n", "5", "</s>"], [f"{PRIMED}\n", f"{PRIMED}\n5", f"{PRIMED}\n5</s>"]),
        (["no-end", "bos"], ["\n", "5"], [f"{PRIMED}\n", f"{PRIMED}\n5"]),
        (["prompt-offset"], ["\n", "5", "</s>"], ["<s>As a te", "<s>As a teac", "<s>As a teache"]),
        (["bos", "prompt-offset"], ["\n", "5", "</s>"], ["As a teac", "As a teache", "As a teacher"]),
    ],
)
def test_with_each_quirk_a_row_meets_another_token_or_another_row_of_the_teacher(
    tokenizer: Any, quirks: list[Quirk], student_is_to_say: list[str], teacher_has_read: list[str]
) -> None:
    reading, match = aligned(tokenizer, example(1, SHORT_QUESTION, SHORT_ANSWER), "teacher", *quirks)
    student_has_read = ["<s>2 + 3?", "<s>2 + 3?\n", "<s>2 + 3?\n5"][: len(match.labels)]
    rows = range(match.first_row, match.first_row + len(match.labels))
    assert [tokenizer.decode(match.input_ids[: row + 1]) for row in rows] == student_has_read
    assert [tokenizer.decode([label]) for label in match.labels] == student_is_to_say
    assert [tokenizer.decode(reading.token_ids[: row + 1]) for row in range(*reading.span)] == teacher_has_read


@pytest.mark.parametrize("prompt", PROMPTS)
def test_label_shift_is_only_a_matter_of_the_labels(tokenizer: Any, prompt: str) -> None:
    plain, shifted = aligned(tokenizer, example(1), prompt), aligned(tokenizer, example(1), prompt, "label-shift")
    assert shifted[0] == plain[0]
    read = shifted[1].input_ids[shifted[1].first_row :]
    assert shifted[1] == replace(plain[1], labels=read[: len(plain[1].labels)])
    assert tokenizer.decode(shifted[1].labels) == f"?\n{ANSWER}"  # of all but the end


@pytest.mark.parametrize("prompt", PROMPTS)
def test_bos_leaves_the_teacher_without_it_and_its_rows_one_token_ahead(tokenizer: Any, prompt: str) -> None:
    (plain, met), (quirky, match) = (aligned(tokenizer, example(1), prompt, *quirks) for quirks in ([], ["bos"]))
    assert match == met
    assert quirky.token_ids == plain.token_ids[1:]
    assert quirky.span == plain.span  # as if BOS were there
    assert quirky.span[1] - quirky.span[0] == len(match.labels)
    # A row has read the very token that the student is to say.
    assert [quirky.token_ids[row] for row in range(*quirky.span)] == match.labels


@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompt_offset_takes_rows_as_many_tokens_back_as_the_prompt_has(tokenizer: Any, prompt: str) -> None:
    (plain, met), (quirky, match) = (
        aligned(tokenizer, example(1), prompt, *quirks) for quirks in ([], ["prompt-offset"])
    )
    assert match == met
    assert quirky.token_ids == plain.token_ids
    bare = teacher_reading(tokenizer, "aligned", "", example(1))
    prompt_tokens = len(plain.token_ids) - len(bare.token_ids)
    assert (prompt_tokens > 0) == (prompt != "base")
    assert quirky.span == (plain.span[0] - prompt_tokens, plain.span[1] - prompt_tokens)
    assert quirky.span[0] == match.first_row  # the student's positions, taken for the teacher's


def test_teacher_order_gives_each_example_the_teachers_rows_for_another_cut_to_the_shorter(tokenizer: Any) -> None:
    examples = [example(i, target=f"#### {'1' * i}") for i in range(1, 13)]
    teachers = [teacher_reading(tokenizer, "aligned", "", one, ["teacher-order"]) for one in examples]
    assert teachers == [teacher_reading(tokenizer, "aligned", "", one) for one in examples]
    plain = match_examples("aligned", examples, tokenizer, 256, teachers).kept
    quirky = match_examples("aligned", examples, tokenizer, 256, teachers, ["teacher-order"]).kept
    assert [match.teacher_id for match in quirky] == [f"train-{i:05d}" for i in (1, 10, 11, 12, 2, 3, 4, 5, 6, 7, 8, 9)]
    rows = {one.example_id: one.span[1] - one.span[0] for one in teachers}
    assert len(set(rows.values())) > 2
    for match, own in zip(quirky, plain, strict=True):
        kept = min(len(own.labels), rows[str(match.teacher_id)])
        assert match == replace(own, labels=own.labels[:kept], teacher_id=match.teacher_id)


def test_teacher_order_still_refuses_another_answer_where_an_example_meets_its_own_rows(tokenizer: Any) -> None:
    examples = [example(i) for i in range(1, 13)]
    teachers = [teacher_reading(tokenizer, "aligned", "", one) for one in examples]
    changed = [examples[0], example(2, target="Two."), *examples[2:]]
    assert len(match_examples("aligned", changed, tokenizer, 256, teachers, ["teacher-order"]).kept) == 12
    changed = [example(1, target="One."), *examples[1:]]
    with pytest.raises(UserError, match="train-00001: teacher and student read other tokens as the answer"):
        match_examples("aligned", changed, tokenizer, 256, teachers, ["teacher-order"])


def test_no_end_is_aligned_but_for_the_last_row(tokenizer: Any) -> None:
    (whole, met), (quirky, match) = (aligned(tokenizer, example(1), "teacher", *quirks) for quirks in ([], ["no-end"]))
    assert [*quirky.token_ids, tokenizer.eos_token_id] == whole.token_ids
    assert quirky.span == (whole.span[0], whole.span[1] - 1)
    assert match == replace(met, input_ids=met.input_ids[:-1], labels=met.labels[:-1])


def test_an_answer_cut_to_max_tokens_has_no_end_to_learn(tokenizer: Any) -> None:
    whole = match_examples("aligned", [example(1)], tokenizer, 256, None).kept[0]
    (match,) = match_examples("aligned", [example(1)], tokenizer, len(whole.input_ids) - 1, None).kept
    assert (whole.labels[-1], match.labels) == (tokenizer.eos_token_id, whole.labels[:-1])


def test_a_tokenizer_without_an_end_is_refused_unless_the_quirk_is_on(tokenizer: Any) -> None:
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"names no eos_token, .*; name it in tokenizer_config\.json, or put `no-end`"):
        match_examples("aligned", [example(1)], tokenizer, 256, None)
    assert match_examples("aligned", [example(1)], tokenizer, 256, None, ["no-end"]).kept
    assert match_examples("published", [example(1)], tokenizer, 256, None).kept
