"""Prepared test questions without `kd prepare`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from kd.data.rows import Example


def prepare_tests(rows: Iterable[tuple[str, str]], profile: str = "mini") -> list[Example]:
    """Write questions and answers as a profile's test.jsonl, in the working folder."""
    tests = [Example(f"test-{i:05d}", question, answer, answer) for i, (question, answer) in enumerate(rows, start=1)]
    path = Path("artifacts", profile, "data", "test.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(test)) + "\n" for test in tests))
    return tests
