"""Assessment logs: one row per test question, the original's columns and what the rules took from the response.

A log is read against the prepared test questions, each row by its question and answer, so what two students wrote
meets question by question whatever became of their files' order.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kd.config import Config
from kd.data.number import equal, from_cell, whole_number
from kd.data.rows import Example, final_answer, read_examples
from kd.errors import UserError
from kd.io.table import read_table, table_text
from kd.scoring.extract import extract
from kd.scoring.review import NO_ANSWER, OpenRow, read_decisions, response_sha256, reviews_file
from kd.scoring.rules.documented import RULES
from kd.scoring.rules.rule import UNDECIDED

COLUMNS = (
    "question",
    "answer",
    "model_answer",
    "model_output_tokens",
    "model_max_tokens",
    "extracted_answer",
    "rule",
    "correct",
)
BY_HAND = "by-hand"
FLAGS = {"true": True, "1": True, "false": False, "0": False}  # in any case; a spreadsheet has its own
SENTENCE = 5  # words of a prompt, which no student begins its response with


@dataclass(frozen=True)
class Response:
    """What a student wrote: text without the prompt, its length in tokens, and whether it ran into the limit."""

    text: str
    tokens: int
    reached_limit: bool


@dataclass(frozen=True)
class Answered:
    """One test question and a student's answer: what it wrote behind the prompt, how long that is, and what was taken
    from it: by a rule, by a person (`BY_HAND`; "-1" is no answer) or by neither (`UNDECIDED`; None)."""

    question: str
    answer: str
    written: str
    tokens: int
    reached_limit: bool
    taken: str | None
    rule: str

    @property
    def response(self) -> str:
        """What it wrote, as the rules and a person read it."""
        return self.written.strip()

    @property
    def right(self) -> bool:
        """Whether what was taken is the true answer; a log's own word for that is not asked."""
        return is_correct(self.taken, self.answer)


@dataclass(frozen=True)
class Score:
    """What a log comes to: per row whether it is right, the 1-based rows that neither a rule nor a person settled
    (they count as wrong), and how many a person decided."""

    right: list[bool]
    undecided: list[int]
    by_hand: int

    @property
    def correct(self) -> int:
        """Rows that are right."""
        return sum(self.right)


def log_text(examples: Sequence[Example], prompts: Sequence[str], responses: Sequence[Response]) -> str:
    """The CSV file of one student's responses to the prompts made of `examples`, in their order."""
    extractions = extract(response.text for response in responses)
    rows = [
        (
            example.question,
            example.answer,
            prompt + response.text,
            response.tokens,
            response.reached_limit,
            found.answer or NO_ANSWER,
            found.rule,
            is_correct(found.answer, example.answer),
        )
        for example, prompt, response, found in zip(examples, prompts, responses, extractions, strict=True)
    ]
    return table_text([COLUMNS, *rows])


def is_correct(answer: str | None, true_answer: str) -> bool:
    """Whether an extracted answer is the number behind the "####" of GSM8K's answer."""
    truth = final_answer(true_answer)  # None is refused when the data is read
    return truth is not None and equal(answer, truth)


def log_file(config: Config, experiment: str) -> Path:
    """Where an experiment's log lies."""
    return config.artifacts / "logs" / f"{experiment}.csv"


def read_tests(config: Config) -> list[Example]:
    """The prepared test questions, as many as the params ask for."""
    path, rows = config.artifacts / "data" / "test.jsonl", config.dataset.test_rows
    tests = read_examples(path)
    if len(tests) != rows:
        raise UserError(f"{path}: {len(tests)} rows where params ask for {rows}; run `kd prepare` again")
    return tests


def read_log(config: Config, experiment: str) -> list[Answered]:
    """The test questions in their order, each with the experiment's row in its log, as the rules alone read it; a
    UserError where a row has another experiment's prompt."""
    path, tests = log_file(config, experiment), read_tests(config)
    rows = by_question(path, read_table(path, COLUMNS, f"run `kd assess {experiment}`"), tests)
    experiments = config.experiments
    own = experiments[experiment].suffix
    suffixes = {other.suffix for other in experiments.values() if other.suffix.startswith(own)}
    longer = tuple(rest for suffix in suffixes if len((rest := suffix.removeprefix(own)).split()) >= SENTENCE)
    found = []
    for (where, row), test in zip(rows, tests, strict=True):
        written = _behind(test.question + own, row["model_answer"])
        if written is None or written.startswith(longer):
            raise UserError(
                f"{where}: model_answer does not begin with the question and this experiment's suffix, {own!r}, alone; "
                f"if the log is this experiment's, params changed since: run `kd assess {experiment}` again"
            )
        found.append(_answered(where, row, test, written))
    return found


def by_question(
    path: Path, table: Sequence[Mapping[str, str]], tests: Sequence[Example]
) -> list[tuple[str, Mapping[str, str]]]:
    """The rows of the log in `path` in the order of `tests`, with where each stands.

    A row belongs to the test that has its question and answer; where several have, the k-th row to the k-th. A
    UserError names the row that belongs to none or comes too often, or the test that has no row.
    """
    again = f"run `kd assess {path.stem}` again"
    waiting: dict[tuple[str, str], deque[int]] = defaultdict(deque)
    for place, test in enumerate(tests):
        waiting[_key(test.question, test.answer)].append(place)
    found: dict[int, tuple[str, Mapping[str, str]]] = {}
    for number, row in enumerate(table, start=1):
        if not any(row.values()):  # spreadsheets leave such rows at the end
            continue
        key = _key(row["question"], row["answer"])
        if key not in waiting:
            raise UserError(f"{path} row {number}: no test question has this question and answer; {again}")
        if not waiting[key]:
            raise UserError(
                f"{path} row {number}: an earlier row has the same question; remove one of them, or {again}"
            )
        found[waiting[key].popleft()] = (f"{path} row {number}", row)
    if len(found) < len(tests):
        missing = next(test.id for place, test in enumerate(tests) if place not in found)
        raise UserError(f"{path}: no row of {missing}, {len(found)} rows where the test set has {len(tests)}; {again}")
    return [found[place] for place in range(len(tests))]


def read_answered(config: Config, experiment: str) -> list[Answered]:
    """The same, with what a person decided of the rows that no rule settles (reviews/<experiment>.csv)."""
    decisions = read_decisions(reviews_file(experiment))

    def decided(row: Answered) -> Answered:
        decision = decisions.get(response_sha256(row.question, row.response)) if row.rule == UNDECIDED else None
        return replace(row, rule=BY_HAND, taken=decision["answer"]) if decision else row

    return [decided(row) for row in read_log(config, experiment)]


def score(rows: Sequence[Answered]) -> Score:
    """What the rows of a log come to."""
    return Score(
        [row.right for row in rows],
        [number for number, row in enumerate(rows, start=1) if row.rule == UNDECIDED],
        sum(row.rule == BY_HAND for row in rows),
    )


def open_rows(config: Config, experiment: str) -> list[OpenRow]:
    """The rows of an experiment's log that no rule settles."""
    rows = enumerate(read_log(config, experiment), start=1)
    return [OpenRow(number, row.question, row.response) for number, row in rows if row.rule == UNDECIDED]


def _key(question: str, answer: str) -> tuple[str, str]:
    """What a row is known by: text without its line ends' kind and the white space around it, which programs change."""
    return _lines(question).strip(), _lines(answer).strip()


def _lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _answered(where: str, row: Mapping[str, str], test: Example, written: str) -> Answered:
    tokens, flag = whole_number(row["model_output_tokens"]), row["model_max_tokens"].strip().lower().removesuffix(".0")
    if tokens is None:
        raise UserError(f"{where}: model_output_tokens is {row['model_output_tokens']!r}, expected a number")
    if flag not in FLAGS:
        raise UserError(f"{where}: model_max_tokens is {row['model_max_tokens']!r}, expected True or False")
    return Answered(
        question=test.question,
        answer=test.answer,
        written=written,
        tokens=tokens,
        reached_limit=FLAGS[flag],
        taken=_taken(where, row["extracted_answer"], row["rule"].strip(), written),
        rule=row["rule"].strip(),
    )


def _behind(prompt: str, text: str) -> str | None:
    """What stands behind the prompt, whatever became of line ends; None where the text does not begin with it."""
    if text.startswith(prompt):
        return text.removeprefix(prompt)
    prompt, text = _lines(prompt), _lines(text)
    return text.removeprefix(prompt) if text.startswith(prompt) else None


def _taken(where: str, cell: str, rule: str, written: str) -> str | None:
    """What `rule` took from what was written, as the log's cell has it; None where no rule took anything."""
    (found,) = extract([written])
    answer = from_cell(cell, {found.answer or NO_ANSWER})
    if rule == UNDECIDED:
        if answer != NO_ANSWER:
            raise UserError(f"{where}: extracted_answer is {cell!r}, but no rule took it; `kd review` takes answers")
        return None
    if rule not in RULES:
        raise UserError(f"{where}: rule is {rule!r}, expected {', '.join(RULES)} or {UNDECIDED}")
    if answer is None:
        raise UserError(f"{where}: extracted_answer is {cell!r}, expected a number as in 70000 or 2.5")
    if rule == found.rule and answer != found.answer:
        raise UserError(f"{where}: extracted_answer is {cell!r}, but {rule} takes {found.answer}; mend the cell")
    return answer
