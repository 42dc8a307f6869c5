"""The robust rules on answers as models of several families write them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd.audit.logs import read_log
from kd.data.number import canonical
from kd.scoring.extract import extract
from kd.scoring.rules.part import own_part

PUBLIC = Path(__file__).parents[3] / "shared" / "cases" / "extraction.jsonl"

CASES = [
    # Boxes.
    (r"So the total is $\boxed{18}$.", "18", "boxed"),
    (r"\boxed{\$18.50}", "18.5", "boxed"),
    (r"\boxed{18 \text{ dollars}}", "18", "boxed"),
    (r"\boxed{\text{18 eggs}}", "18", "boxed"),
    (r"\boxed{x = 18}", "18", "boxed"),
    (r"\boxed{12 + 6 = 18}", "18", "boxed"),
    (r"\boxed{70{,}000}", "70000", "boxed"),
    (r"\boxed{70\,000}", "70000", "boxed"),
    (r"\boxed{1\;234\;567}", "1234567", "boxed"),
    (r"\boxed{40\%}", "40", "boxed"),
    (r"\boxed{-3}", "-3", "boxed"),
    ("\\boxed{\u22123}", "-3", "boxed"),
    (r"\boxed{\frac{3}{4}}", "0.75", "boxed"),
    (r"\boxed{-\dfrac{1}{3}}", "-0.333333", "boxed"),
    (r"\boxed{2\frac{1}{2}}", "2.5", "boxed"),
    (r"\boxed{3/4}", "0.75", "boxed"),
    (r"\boxed{\mathbf{{18}}}", "18", "boxed"),
    (r"\boxed{24 \text{ m}^2}", "24", "boxed"),
    (r"\boxed{}\n\boxed{A} and then \boxed{7}", "7", "boxed"),
    (r"Step 1: \boxed{\text{none}} The answer is 5.", "5", "answer-marker"),
    (r"It is 5. \boxed{1", "1", "last-number"),  # cut off before the box closed
    # GSM8K's own mark.
    ("He has 5 + 6 = <<5+6=11>>11.\n#### 11", "11", "hash-marks"),
    ("#### $1,234.00\nQ: next 5", "1234", "hash-marks"),
    ("#### Step 2: add\n#### The total is 9", "9", "hash-marks"),
    ("##### 5 apples", "5", "last-number"),
    # "The answer is".
    ("1 + 2 = 3. The answer is 3. Let me check: 3 - 2 = 1.", "3", "answer-marker"),
    ("The final answer is: $\\$1,800$.", "1800", "answer-marker"),
    ("**Answer:** 18", "18", "answer-marker"),
    ("**Answer: 18 eggs**", "18", "answer-marker"),
    ("**Final Answer**: $18", "18", "answer-marker"),
    ("Answer:\n\n18", "18", "answer-marker"),
    ("Solution: add them.\nA: 18\n", "18", "answer-marker"),
    ("The correct answer is (B) 14.", "14", "answer-marker"),
    ("So the answer should be 14, not 15.", "14", "answer-marker"),
    ("The answer is 3 + 4 = 7 apples.", "7", "answer-marker"),
    ("The answer is 3/4 of a mile.", "0.75", "answer-marker"),
    ("The answer is -5 degrees.", "-5", "answer-marker"),
    ("She has 9. The answer is given above.", "9", "last-number"),
    ("My answer is that 12 of them are red, out of 20.", "12", "answer-marker"),
    # A number the response opens with.
    ("18", "18", "opening"),
    ("18.", "18", "opening"),
    ("$32\n\nJanet makes $32 every day by selling the remaining 16 eggs.", "32", "opening"),
    ("$18 \n \n * 16 - 3 = 13", "18", "opening"),
    ("18 eggs/day\n\nShe has 16.", "18", "opening"),
    ("**$26**\n\n**Here's how:**\n1. Take 20\n2. Add 6 to 20", "26", "opening"),
    ("100 sheep.", "100", "opening"),
    ("* 5 eggs\n* 6 eggs\n\nTotal: 11 eggs", "11", "last-number"),
    ("\n \n 50% \n \n", "50", "opening"),
    ("$18.00.", "18", "opening"),
    ("= 18\n", "18", "opening"),
    ("?\n\n18 eggs per day.", "18", "opening"),
    ("**18**", "18", "opening"),
    ("$28$ Mason eats 4 carrots on 5 days, so 20", "28", "opening"),
    ("6.  Emily has 4 kids named Amy and Jackson", "6", "opening"),
    ("$240.00 $240.00. 60 days is 60 nights", "240", "opening"),
    ("12/5 pounds. The reason is that there are 12", "2.4", "opening"),
    ("-4 degrees.", "-4", "opening"),
    ("2.5\n## Step 1: Count the eggs.\nThere are 16.", "16", "last-number"),  # worked steps follow
    ("3 x 4 = 12 and so on", "12", "last-number"),
    ("1. Add 3 and 4.\n2. That makes 7", "7", "last-number"),
    # The number nearest the end, steps and items of lists aside.
    ("Tom has 3 apples. He buys 4 more, so he has 3 + 4 = 7 apples now.", "7", "last-number"),
    ("The cost is $0.25.\n\n## Step 6: Multiply the book's", "0.25", "last-number"),
    ("It is 14.\n3. Then we check", "14", "last-number"),
    ("How many eggs are left? She sold 5 of 9. That leaves 4.", "4", "last-number"),
    ("She pays 1\u202f200 dollars", "1200", "last-number"),
    ("It costs 70{,}000 dollars", "70000", "last-number"),
    ("Therefore each gets \\frac{1}{2}", "0.5", "last-number"),
    ("the T-Rex ate 1/2 of it", "0.5", "last-number"),
    ("It takes 16-9", "9", "last-number"),
    ("The balance is -9", "-9", "last-number"),
    # Another question behind the answer is not read.
    ("There are 7.\n\nQuestion: If Ann has 3 and 4", "7", "last-number"),
    ("So 7 remain.\nQ: How many are 5 and 6?\nA: 11", "7", "last-number"),
    ("So 7 remain.\n### Problem 2: Tom has 5.", "7", "last-number"),
    ("So 7 remain.\nHuman: and 12?", "7", "last-number"),
    # Nothing there.
    ("", None, "undecided"),
    ("I do not know.", None, "undecided"),
    ("## Step 1: Think.", None, "undecided"),
    (r"\boxed{}", None, "undecided"),
    ("٣ and ३", None, "undecided"),
]


@pytest.mark.parametrize(("response", "answer", "rule"), CASES)
def test_reads_the_answer_a_person_would(response: str, answer: str | None, rule: str) -> None:
    (found,) = extract([response], "robust")
    assert (found.answer, found.rule) == (answer, rule)


def kinds(path: Path) -> dict[str, list[tuple[str, str]]]:
    """Responses and their right answers by the kind of difficulty in them."""
    found: dict[str, list[tuple[str, str]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        case = json.loads(line)
        found.setdefault(case["kind"], []).append((case["response"], case["answer"]))
    return found


# In our own words, as models of many families write them: Markdown, LaTeX, JSON, tags and chat templates.
OURS = kinds(Path(__file__).with_name("kinds.jsonl"))


@pytest.mark.parametrize("kind", OURS)
def test_reads_every_kind_of_answer(kind: str) -> None:
    assert len(OURS[kind]) >= 10
    misread = [case for case in OURS[kind] if answer(case[0]) != case[1]]
    assert not misread


@pytest.mark.skipif(not PUBLIC.exists(), reason="the shared extraction cases are not beside this checkout")
def test_reads_the_public_cases() -> None:
    """From bug reports of other projects and public responses of other models."""
    cases = [case for group in kinds(PUBLIC).values() for case in group]
    assert [case for case in cases if answer(case[0]) != case[1]] == []


def answer(response: str) -> str | None:
    (found,) = extract([response], "robust")
    return found.answer


WORDS = sorted({word for group in OURS.values() for response, _ in group for word in re.split(r"( |\n)", response)})


@given(
    st.text(max_size=200)
    | st.lists(st.sampled_from(WORDS), max_size=30).map("".join)
    | st.text(alphabet="0123456789,.-$%{}\\boxedfrac \nStepA:/#=<>^½()*", max_size=300)
)
def test_any_text_gives_a_number_within_it_or_nothing(response: str) -> None:
    (found,) = extract([response], "robust")
    if found.answer is None or found.span is None:
        assert (found.answer, found.span, found.rule) == (None, None, "undecided")
        return
    own_start, own_stop = own_part(response)
    start, stop = found.span
    assert own_start <= start < stop <= own_stop
    assert float(found.answer) == float(found.answer)
    assert found.answer == canonical("-" if found.answer[0] == "-" else "", found.answer.lstrip("-"))


@given(
    st.integers(-(10**9), 10**9),
    st.sampled_from(["\\boxed{%s}", "\\boxed{%s \\text{ eggs}}", "#### %s", "The answer is %s.", "**Answer:** %s"]),
    st.sampled_from(["{:d}", "{:,d}"]),
    st.sampled_from(["", " and 5 more.", "\nStep 9: then 3", "\n\nQ: What are 4 and 4?"]),
)
def test_a_marked_answer_is_found_whatever_follows(number: int, mark: str, spelling: str, tail: str) -> None:
    response = "First 1 and 2 make 3.\n" + mark % spelling.format(number) + tail
    (found,) = extract([response], "robust")
    assert found.answer == str(number)


def test_agreement_with_the_authors_hand_decisions_is_that_of_the_documentation(published_logs: Path) -> None:
    """docs/extraction.md states these counts; a change of the rules must restate them."""
    agreed = {}
    for name in ("no-distillation", "fine-tuning", "base-kd", "teacher-kd", "ground-truth-kd"):
        log = read_log(published_logs, name)
        assert log.decided is not None
        left = [i for i, found in enumerate(extract(log.responses, "notebook")) if found.answer is None]
        taken = extract((log.responses[i] for i in left), "robust")
        agreed[name] = (
            sum((found.answer or "-1") == log.decided[i] for i, found in zip(left, taken, strict=True)),
            len(left),
        )
    assert agreed == {
        "no-distillation": (31, 35),
        "fine-tuning": (78, 134),
        "base-kd": (112, 138),
        "teacher-kd": (101, 119),
        "ground-truth-kd": (91, 125),
    }
