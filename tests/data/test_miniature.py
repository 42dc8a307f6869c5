"""The built-in problems: GSM8K's schema, correct arithmetic, no repetition."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from kd.data.miniature import TEMPLATES, problems
from kd.data.rows import final_answer

CALCULATION = re.compile(r"(\d+) ([-+*/]) (\d+) = \$?<<(\d+)([-+*/])(\d+)=(\d+)>>(\d+)")


@given(seed=st.integers(0, 2**32), count=st.integers(1, 120))
def test_answers_follow_gsm8ks_schema_and_are_right(seed: int, count: int) -> None:
    for problem in problems(count, seed):
        steps = problem.main_answer.split("\n")
        assert 1 <= len(steps) - 1 <= 3
        for step in steps[:-1]:
            found = CALCULATION.search(step)
            assert found, step
            a, sign, b, *again, result, shown = found.groups()
            assert again == [a, sign, b]
            assert result == shown
            assert eval(f"{a}{sign}{b}") == int(result)
        assert final_answer(problem.main_answer) == result
        assert [line.split(" ** ")[1] for line in problem.socratic_answer.split("\n")[:-1]] == steps[:-1]
        assert all(line.split(" ** ")[0].endswith("?") for line in problem.socratic_answer.split("\n")[:-1])
        assert "{" not in problem.question + problem.socratic_answer


def test_no_question_is_repeated_and_many_templates_appear() -> None:
    questions = {problem.question for problem in problems(3000, 1)}
    assert len(questions) == 3000
    assert len(TEMPLATES) >= 30
    assert len({re.sub(r"\d+|[A-Z]\w+", "_", question) for question in questions}) >= len(TEMPLATES)


def test_the_same_seed_gives_the_same_problems() -> None:
    assert problems(50, 7) == problems(50, 7)
    assert problems(50, 7) != problems(50, 8)
    assert problems(50, 7) == problems(80, 7)[:50]
