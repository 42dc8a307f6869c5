"""How sure the teacher is behind each prompt: the mean of its largest next-token probability.

As the original measured it (assessment/prob-stats.ipynb): every fifth question of a store, all positions of these
together; which every fifth depends on the order of `safe_open(...).keys()`, in which "Question 10" follows
"Question 1". Read from the stores one question at a time.
"""

from __future__ import annotations

from typing import Any

from kd.config import Config
from kd.errors import finite
from kd.io.files import whole_file, write_json
from kd.io.progress import progress
from kd.models.load import default_device
from kd.protocol.order import published_teacher_order
from kd.store.reader import TeacherStore

STEP = 5


def measure_prompts(config: Config) -> dict[str, Any]:
    """Measure every prompt's store and write artifacts/<profile>/statistics.json; returns what it holds."""
    found = {prompt: _measure(config, prompt) for prompt in config.prompts}
    with whole_file(config.artifacts / "statistics.json") as work:
        write_json(work, found)
    return found


def _measure(config: Config, prompt: str) -> dict[str, Any]:
    opened = TeacherStore(config.artifacts / "teacher" / prompt)
    opened.head = opened.head.to(default_device())
    chosen = published_teacher_order([example.id for example in opened.manifest.examples])[::STEP]
    total, positions = 0.0, 0
    for example_id in progress(chosen, f"statistics, {prompt}", "question"):
        largest = opened.logits(example_id).softmax(-1).amax(-1)
        total += float(largest.double().sum())
        positions += len(largest)
    mean = finite(total / positions, f"{opened.folder}: the mean probability", "choose another `teacher.model`")
    return {
        "mean_max_probability": mean,
        "positions": positions,
        "questions": len(chosen),
        "versions": opened.manifest.model.versions,
    }
