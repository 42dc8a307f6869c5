"""The paper's own assessment logs: fetched from its repository, checksums verified, and read.

Source: assessment/logs/*.csv of the paper's repository, at `COMMIT`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kd.data.number import equal
from kd.data.rows import final_answer
from kd.errors import UserError
from kd.io.download import download
from kd.io.files import sha256
from kd.io.table import read_table
from kd.scoring.extract import without_prompt
from kd.scoring.rules.notebook import spelled
from kd.scoring.rules.rule import Extraction

COMMIT = "b869e932d160de2faab22ec0e962c1a01873aef9"
SOURCE = f"https://raw.githubusercontent.com/alonso130r/knowledge-distillation/{COMMIT}/assessment/logs"
DATA = Path("data") / "published"
DVC_FILE = Path("data.dvc")
TRUTH = "extracted_true_answers.csv"
DECISION = "model_ex1"

# The log of each experiment. Confidence-KD's was published raw, without the numbers taken from its responses.
LOGS = {
    "no-distillation": "no-distil.csv",
    "fine-tuning": "no-distil-fine-tune.csv",
    "base-kd": "base-KD.csv",
    "confidence-kd": "reversekl-KD-raw.csv",
    "teacher-kd": "teacher-KD.csv",
    "ground-truth-kd": "ai-KD.csv",
}

SHA256 = {
    "ai-KD.csv": "119c918678e7912e6c561920b9b2cb32cb71c3b4c1daa638574804d4270ef5d6",
    "base-KD.csv": "f12c096742752bcaa0a5a04c1a84f8b078b9e611825e79d5bf381af3af1ce22c",
    "extracted_true_answers.csv": "7c9704f7851af8bb401d01138064ccc06af298d920710a60aa9731616266ef6a",
    "no-distil-fine-tune.csv": "9a66ddbeb68daa51154dce499f57121adc28d6ecbc4b7ae6cf5046eb07c5d470",
    "no-distil.csv": "84588c84d75ea2de4cf25f0b4b4daa06cc9271217e7c6d9c34c44acc6f7d434a",
    "reversekl-KD-raw.csv": "46d5a2a3133e1c68c88d7a34ca4e6a5877adec54c4e2d07b24c6b40befd3913c",
    "teacher-KD.csv": "476e3bc377559c1917cf0621a2da63811ab4b382887229bfab9d17422a0ba4da",
}


@dataclass(frozen=True)
class Log:
    """One published log: responses without their prompts, questions and worked answers, true answers, and per row the
    number the authors took (None for the log that was published raw)."""

    responses: list[str]
    questions: list[str]
    worked: list[str]
    truth: list[str]
    decided: list[str] | None
    tokens: list[int]
    reached_limit: list[bool]


def fetch(source: str = SOURCE) -> list[str]:
    """Bring the published files to data/published; returns the names that had to be fetched, [] where all were there.

    A file whose checksum is right stays as it is; any other is replaced once its own download has the right one.
    """
    missing = [name for name in SHA256 if not is_published(DATA / name)]
    for name in missing:
        download(f"{source.rstrip('/')}/{name}", DATA / name, SHA256[name])
    if DVC_FILE.exists():
        _put_into_dvc_cache()
    return missing


def _put_into_dvc_cache() -> None:
    """Let DVC know the files of data.dvc, so that `dvc status` is clean and `dvc checkout` can bring them back."""
    from dvc.repo import Repo

    for path in sorted(DATA.parent.rglob("*")):
        if path.is_file() and not (path.parent == DATA and path.name in SHA256):
            raise UserError(f"{path}: {DVC_FILE} covers the published files alone; move this one out of {DATA.parent}/")
    Repo().commit(str(DVC_FILE), force=True)


def is_published(path: Path) -> bool:
    """Whether `path` holds the published file of its name, byte for byte."""
    return path.is_file() and sha256(path) == SHA256.get(path.name)


def read_log(data: Path, experiment: str) -> Log:
    """One experiment's log, checked against the published test set."""
    path = data / LOGS[experiment]
    raw = experiment == "confidence-kd"
    columns = ["question", "answer", "model_answer", "model_output_tokens", "model_max_tokens"]
    rows = _read(path, columns if raw else [*columns, DECISION])
    test_set = _read(data / TRUTH, ["question", "answer", "extracted_answer"])
    if len(rows) != len(test_set):
        raise UserError(f"{path}: {len(rows)} rows where the test set ({data / TRUTH}) has {len(test_set)}")
    for number, (row, known) in enumerate(zip(rows, test_set, strict=True), start=1):
        if (row["question"], row["answer"]) != (known["question"], known["answer"]):
            raise UserError(f"{path} row {number}: another question or answer than row {number} of {data / TRUTH}")
    return Log(
        responses=[without_prompt(row["model_answer"], row["question"] if raw else "") for row in rows],
        questions=[row["question"] for row in test_set],
        worked=[row["answer"] for row in test_set],
        truth=[_truth(data / TRUTH, number, row) for number, row in enumerate(test_set, start=1)],
        decided=None if raw else [_number(path, n, DECISION, row) for n, row in enumerate(rows, start=1)],
        tokens=[int(float(_number(path, n, "model_output_tokens", row))) for n, row in enumerate(rows, start=1)],
        reached_limit=[row["model_max_tokens"] == "True" for row in rows],
    )


def rows_right(log: Log, automatic: list[Extraction]) -> list[bool]:
    """Which rows count as correct: by the authors' decisions or, in the raw log, by their automatic rules alone."""
    taken: Sequence[str | None] = log.decided or [found.answer for found in automatic]
    return [equal(answer, truth) for answer, truth in zip(taken, log.truth, strict=True)]


def _read(path: Path, columns: list[str]) -> list[dict[str, str]]:
    return read_table(path, columns, "`kd data fetch` brings the published logs to data/published")


def _truth(path: Path, number: int, row: dict[str, str]) -> str:
    true, behind_marks = _number(path, number, "extracted_answer", row), final_answer(row["answer"])
    if behind_marks is None or not equal(behind_marks, true):
        raise UserError(f"{path} row {number}: extracted_answer {true} is not the number behind #### in its answer")
    return true


def _number(path: Path, number: int, column: str, row: dict[str, str]) -> str:
    try:
        return spelled(float(row[column]))
    except ValueError:
        raise UserError(f"{path} row {number}: {column} is {row[column]!r}, expected a number") from None
