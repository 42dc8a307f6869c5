"""How well a student predicts the test answers, and how far it is from its teacher there: finer than an accuracy, which
moves only when a whole answer turns right."""

from __future__ import annotations

from contextlib import closing
from typing import Any

from kd.config import Config
from kd.data.rows import read_examples
from kd.distill.step import States
from kd.distill.train import evaluate
from kd.errors import finite
from kd.io.files import as_json, write_whole_file
from kd.io.progress import progress
from kd.models.adapters import adapter_folder, load_student
from kd.models.load import context_length, default_device, load_tokenizer, model_folder, refuse_two_vocabularies
from kd.protocol.alignment import match_examples
from kd.protocol.reading import teacher_reading
from kd.store.records import Reading
from kd.teacher import backends

LOWER_RATE = "lower `distill.learning_rate` and train it again"


def measure(config: Config, experiment: str) -> dict[str, Any]:
    """Measure one student as it is assessed and write artifacts/<profile>/measures/<experiment>.json; returns it.

    `answer_loss` is the cross entropy of the test rows' answers, with their end token, behind BOS + question;
    `divergence`, by the teacher's prompt, is `distill.divergence` from the teacher on the same tokens. Both are at
    T = 1, in nats a token, and the mean of the rows' means; rows are matched as `aligned` does it, whatever the student
    was trained by. The prompt is that of the student's own teacher; a student without one is measured against every
    prompt's.
    """
    folder = model_folder(config.student.model)
    tests = read_examples(config.artifacts / "data" / "test.jsonl")
    tokenizer = load_tokenizer(folder)
    refuse_two_vocabularies(config.teacher.model, config.student.model)
    adapter, device = adapter_folder(config, experiment), default_device()
    readings = {
        prompt: [teacher_reading(tokenizer, "aligned", config.prompts[prompt], example) for example in tests]
        for prompt in _prompts(config, experiment)
    }
    longest = max(len(reading.token_ids) for some in readings.values() for reading in some)
    student = load_student(folder, config.student.dtype, adapter, device)
    head = backends.read_head(config.teacher).to(device)
    teacher = backends.load(config.teacher, longest)
    settings = config.distill.model_copy(update={"temperature": 1.0})
    divergence = {}
    for prompt, wanted in readings.items():
        matches = match_examples("aligned", tests, tokenizer, context_length(folder), wanted)
        states = _states(teacher, wanted, config.teacher.batch_rows, f"teacher, {prompt}")
        loss = evaluate(student, matches.kept, states, head, settings)
        divergence[prompt] = float(loss.divergence)
        finite(divergence[prompt], f"{experiment}: its divergence behind {prompt}", LOWER_RATE)
    answer_loss = finite(float(loss.cross_entropy), f"{experiment}: its answer loss", LOWER_RATE)
    measured = {"answer_loss": answer_loss, "divergence": divergence, "rows": len(matches.kept)}
    write_whole_file(config.artifacts / "measures" / f"{experiment}.json", as_json(measured))
    return measured


def _prompts(config: Config, experiment: str) -> list[str]:
    adapter = config.experiments[experiment].adapter
    prompt = config.adapters[adapter].prompt if adapter else None
    return [prompt] if prompt else list(config.prompts)


def _states(teacher: backends.LoadedTeacher, readings: list[Reading], batch_rows: int, what: str) -> States:
    """The teacher's states for each example's answer, in the CPU's memory."""
    batches = [readings[start : start + batch_rows] for start in range(0, len(readings), batch_rows)]
    stream = teacher.states([reading.token_ids for reading in batch] for batch in batches)
    states = {}
    with closing(stream):
        for batch, found in zip(progress(batches, what, "batch"), stream, strict=True):
            for reading, rows in zip(batch, found, strict=True):
                states[reading.example_id] = rows[slice(*reading.span)].cpu()
    return states.__getitem__
