"""The extraction rules: what each takes, their order, and what no text can do to them."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd.data.number import canonical
from kd.scoring.extract import RULE_SETS, extract
from kd.scoring.rules.documented import RULES
from kd.scoring.rules.rule import UNDECIDED, Extraction


def one(response: str, rules: str = "documented") -> Extraction:
    (found,) = extract([response], rules)
    return found


CASES = [
    # Rule 1: the first \boxed{} that holds a number.
    (r"So \boxed{18} and then \boxed{19}.", "18", "boxed"),
    (r"12 eggs" "\n" r"The final answer is: $\boxed{7}$", "7", "boxed"),
    (r"\boxed{ 70,000 }", "70000", "boxed"),
    (r"\boxed{\$5.50}", "5.5", "boxed"),
    (r"\boxed{40\%}", "40", "boxed"),
    (r"\boxed{-3}", "-3", "boxed"),
    (r"\boxed{x} then \boxed{4}", "4", "boxed"),
    (r"\boxed{} 3", "3", "first-line"),
    (r"\boxed{12", "12", "first-line"),
    # Rule 2: the first line, if all its numbers are the same number.
    ("18", "18", "first-line"),
    ("\n\n18 dollars\n5 + 6", "18", "first-line"),
    ("18, that is 18.0 or 018\n7", "18", "first-line"),
    ("A) 2.5\nThe answer is 9", "2.5", "first-line"),
    # Rule 3: the first number after "the [final/correct] answer is".
    ("1 + 2\nThe answer is 3. Or 4.", "3", "answer-is"),
    ("1 + 2\nso the final answer is: $1,234.50!\n9", "1234.5", "answer-is"),
    ("1 + 2\nthe correct answer is\n\n 8", "8", "answer-is"),
    ("1 + 2\nthe answer is five", "2", "last-number"),
    ("other answer is 5 and 6\n7", "7", "last-number"),
    # Rule 4: the number nearest the end.
    ("3 + 4 = 7", "7", "last-number"),
    ("3 + 4\nthat makes 16-9", "9", "last-number"),
    ("3 + 4\nthat makes = -9", "-9", "last-number"),
    ("3 + 4\nit costs $.50", "0.5", "last-number"),
    ("1, 2 and 1,2345", "2345", "last-number"),
    ("1 2\n3.", "3", "last-number"),
    # A number's sign and currency are part of it; a point behind a letter is none of its own.
    (r"\boxed{-\$20}", "-20", "boxed"),
    (r"\boxed{-$20}", "-20", "boxed"),
    ("\u20135 points", "-5", "first-line"),
    ("1 2\nThe answer is -\u00a35.", "-5", "answer-is"),
    ("1 2\nThe answer is Rs.18", "18", "answer-is"),
    ("1 2\nthat is approx.60 km", "60", "last-number"),
    ("10\u201312\nor 10\u201312", "12", "last-number"),
    # What none settles.
    ("", None, UNDECIDED),
    ("no idea", None, UNDECIDED),
    (", . - $ %", None, UNDECIDED),
    ("٣ and ३ are digits of other scripts", None, UNDECIDED),
]


@pytest.mark.parametrize(("response", "answer", "rule"), CASES)
def test_documented_behaviour(response: str, answer: str | None, rule: str) -> None:
    found = one(response)
    assert (found.answer, found.rule) == (answer, rule)


def test_rules_stand_in_the_documented_order() -> None:
    assert list(RULES) == ["boxed", "first-line", "answer-is", "last-number"]


@pytest.mark.parametrize(
    ("sign", "digits", "number"),
    [("", "007", "7"), ("", "1,000.500", "1000.5"), ("-", "0.0", "0"), ("-", ".5", "-0.5"), ("", "000", "0")],
)
def test_one_spelling_per_number(sign: str, digits: str, number: str) -> None:
    assert canonical(sign, digits) == number


@given(
    st.text(alphabet=st.characters(codec=None), max_size=300)
    | st.text(alphabet="0123456789,.-$%{}\\boxed \n", max_size=300)
)
def test_any_text_gives_a_number_where_it_stands_or_nothing(response: str) -> None:
    found = one(response)
    assert (found.answer is None) == (found.rule == UNDECIDED) == (found.span is None)
    if found.answer is not None and found.span is not None:
        assert found.answer == canonical("-" if found.answer[0] == "-" else "", found.answer.lstrip("-"))
        (again,) = extract([response[slice(*found.span)].removeprefix("\\boxed{").removesuffix("}")])
        assert again.answer is not None
        assert again.answer.lstrip("-") == found.answer.lstrip("-")


@given(st.integers(-(10**12), 10**12), st.sampled_from(["", ".", "\n", " apples", "!"]))
def test_a_lone_number_is_found_in_either_notation(number: int, tail: str) -> None:
    for text in (f"{number}{tail}", f"{number:,}{tail}", f"It is\n{number:,}{tail}", rf"\boxed{{{number:,}}}{tail}"):
        assert one(text).answer == str(number)


HOSTILE = {
    "digits": "1" * 2**18,
    "digit groups": "1," * 2**17,
    "thousands": "1" + ",000" * 2**16,
    "fractions": "1." * 2**17,
    "boxes": r"\boxed{" * 2**15,
    "boxes without a number": r"\boxed{1x}" * 2**15,
    "boxed digits": r"\boxed{" + "1" * 2**18,
    "boxed spaces": r"\boxed{" + " " * 2**18,
    "boxed number and spaces": (r"\boxed{1" + " " * 1000) * 2**10,
    "nested braces": r"\boxed{" + "{" * 2**17 + "}" * 2**17,
    "phrases": "the answer is " * 2**16,
    "signs": "-" * 2**18,
    "dollars": "$" * 2**18,
    "newlines": "\n" * 2**18,
    "newlines behind a number": "1" + "\n " * 2**17,
    "hash marks": "####\n" * 2**15,
    "markers": "answer: " * 2**15,
    "slashes": "1/" * 2**17,
    "fractions in LaTeX": r"\frac{1}{" * 2**15,
    "numbers apart by spaces": "1 000 " * 2**15,
    "boxes taken back": r"\boxed{2} wait \boxed{3} " * 2**13,
    "boxes on one line": "".join(rf"\boxed{{{i}}}" for i in range(2**14)),
    "arithmetic": "#### " + "9 * " * 2**16,
    "powers": "#### " + "9^9 * 1e99 * " * 2**14,
    "a fraction of many digits": "1" * 10_000 + "/3",
    "labels": "the answer to that is 5 " * 2**13,
    "outcomes": "the result is 5 " * 2**13,
    "label without its verb": "the answer to " * 2**14,
    "headings behind hash marks": "#### 5 pens\n" * 2**14,
    "restated": "#### " + "the 1 " * 2**16,
    "brackets": "(" * 2**16 + "1",
    "steps": "Step 1\n" * 2**15,
    "items": "1. a\n" * 2**15,
    "checks": "Check: " * 2**15 + "1",
    "checks of numbers": "check: 1\n" * 2**15,
    "tags": "<answer>" * 2**15 + "1",
    "thoughts": "<think>1</think>" * 2**14,
    "turns": " <|im_end|>1" * 2**14,
    "minus and spaces": " - 1" * 2**16,
    "number words": "twenty-" * 2**15 + ".",
    "drawing": "draw(1" * 2**15,
    "answers in JSON": '"answer":1,' * 2**14,
    "two lower letters": "\u0130answer is 4 " * 2**13,
    "nuls": "\0" * 2**18,
    "surrogates": "\ud800" * 2**18,
    "right to left": "\u202e٣٤" * 2**16,
}


@pytest.mark.parametrize("rules", [name for name in RULE_SETS if name != "math-verify"])
@pytest.mark.parametrize("name", HOSTILE)
def test_long_texts_of_anything_take_linear_time(name: str, rules: str) -> None:
    start = time.process_time()
    one(HOSTILE[name], rules)
    assert time.process_time() - start < 5  # quadratic time would be many minutes
