"""What the paper reports and the files behind it: figures of its table, and the assessment logs of its repository."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kd.download import download
from kd.errors import UserError
from kd.files import sha256

TEST_ROWS = 1319
COMMIT = "b869e932d160de2faab22ec0e962c1a01873aef9"
SOURCE = f"https://raw.githubusercontent.com/alonso130r/knowledge-distillation/{COMMIT}/assessment/logs"
DATA = Path("data") / "published"
DVC_FILE = Path("data.dvc")
TRUTH = "extracted_true_answers.csv"


@dataclass(frozen=True)
class PublishedResult:
    """One row of the published table: its name there, the accuracy printed (percent), the count behind it."""

    name: str
    accuracy: float
    correct: int


RESULTS: dict[str, PublishedResult] = {
    "no-distillation": PublishedResult("No-distillation (control)", 12.20, 161),
    "fine-tuning": PublishedResult("Fine-tuning (control)", 25.01, 303),
    "base-kd": PublishedResult("Base-KD", 30.62, 404),
    "confidence-kd": PublishedResult("Confidence-KD", 34.04, 499),
    "teacher-kd": PublishedResult("Teacher-KD", 42.30, 558),
    "ground-truth-kd": PublishedResult("Ground truth-KD", 48.14, 635),
}

# The teacher's mean largest next-token probability behind a prompt (assessment/prob-stats.ipynb).
MEAN_MAX_PROBABILITY = {"base": 0.573, "confidence": 0.5205}
# Mean cross entropy over the socratic test split after training, misaligned as in training; none for base-kd.
CHECK_LOSSES = {"fine-tuning": 8.879, "confidence-kd": 10.740, "teacher-kd": 10.402, "ground-truth-kd": 11.069}

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
