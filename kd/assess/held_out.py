"""How well a student predicts the test answers, and how far it is from its teacher there: finer than an accuracy, which
moves only when a whole answer turns right."""

from __future__ import annotations

import json
from typing import Any

from kd import models
from kd.assess.generate import load_student
from kd.assess.run import adapter_folder
from kd.config import Config
from kd.dataset import read_examples
from kd.distill.alignment import match_examples
from kd.distill.step import States
from kd.distill.train import evaluate
from kd.files import write_whole_file
from kd.progress import progress
from kd.teacher import backends
from kd.teacher.capture import teacher_reading
from kd.teacher.store import Reading, TeacherHead

BATCH = 32  # questions a forward of the teacher


def measure(config: Config, experiment: str) -> dict[str, Any]:
    """Measure one student as it is assessed and write artifacts/<profile>/measures/<experiment>.json; returns it.

    `answer_loss` is the cross entropy of the test rows' answers behind BOS + question + line end, `divergence` that of
    `distill.divergence` from the teacher on the same tokens, both at T = 1 and in nats a token: the mean of the rows'
    means. Both are matched as `aligned` matches them, whatever the student was trained by. The teacher reads the
    student's own prompt; that of a student without a teacher is the first of `prompts`.
    """
    folder = models.model_folder(config.student.model)
    prompt = _prompt(config, experiment)
    tests = read_examples(config.artifacts / "data" / "test.jsonl")
    tokenizer = models.load_tokenizer(folder)
    readings = [teacher_reading(tokenizer, "aligned", prompt, example) for example in tests]
    matches = match_examples("aligned", tests, tokenizer, models.context_length(folder), readings)
    states, head = _teacher(config, prompt, readings)
    student = load_student(folder, config.student.dtype, adapter_folder(config, experiment), models.default_device())
    settings = config.distill.model_copy(update={"temperature": 1.0})
    loss = evaluate(student, matches.kept, states, head.to(models.default_device()), settings)
    measured = {
        "answer_loss": float(loss.cross_entropy),
        "divergence": float(loss.divergence),
        "prompt": prompt,
        "rows": len(matches.kept),
    }
    write_whole_file(config.artifacts / "measures" / f"{experiment}.json", json.dumps(measured, indent=1) + "\n")
    return measured


def _prompt(config: Config, experiment: str) -> str:
    adapter = config.experiments[experiment].adapter
    return (adapter and config.adapters[adapter].prompt) or config.prompts[0]


def _teacher(config: Config, prompt: str, readings: list[Reading]) -> tuple[States, TeacherHead]:
    """The teacher's states for each example's answer, in the CPU's memory, and its head; the teacher itself is gone."""
    teacher = backends.load(config.teacher, max(len(reading.token_ids) for reading in readings))
    states = {}
    for start in progress(range(0, len(readings), BATCH), f"teacher, {prompt}", "batch"):
        batch = readings[start : start + BATCH]
        for reading, rows in zip(batch, teacher.states([one.token_ids for one in batch]), strict=True):
            states[reading.example_id] = rows[slice(*reading.span)].cpu()
    return states.__getitem__, teacher.head()
