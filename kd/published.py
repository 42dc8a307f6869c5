"""What the paper reports, to stand beside what a run measures (README of the original repository)."""

from __future__ import annotations

from dataclasses import dataclass

TEST_ROWS = 1319


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
