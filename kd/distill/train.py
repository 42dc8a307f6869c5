"""LoRA-tune the student on matched rows: SGD with momentum, cosine annealing, as published; resumable."""

from __future__ import annotations

import math
import shutil
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kd import fingerprint
from kd.config import Config, Distill
from kd.distill import checkpoint
from kd.distill.adapter import VERSIONS, counts, fresh_student, save_adapter
from kd.distill.checkpoint import Record
from kd.distill.fused import kernels_name
from kd.distill.lesson import Lesson, prepare_lesson
from kd.distill.memory import lowerable, shortage_told
from kd.distill.objective import Loss, Teacher, distillation_loss
from kd.distill.step import EagerStep, GraphStep, States, make_batch, make_step, on_device
from kd.errors import UserError, finite
from kd.io.files import resumable_folder, write_json
from kd.io.progress import progress
from kd.io.stopping import what_is_kept
from kd.models.load import model_folder
from kd.protocol.alignment import Match
from kd.store.head import Head
from kd.store.records import MANIFEST
from kd.store.tensors import system_errors

LOSS_FOLDER = "loss"
CHECK = "check.json"


def train(config: Config, run: str) -> None:
    """Train one adapter and write it, with its loss curve and check loss, to artifacts/<profile>/adapters/<run>.

    A killed run goes on from its last checkpoint and ends in the same bytes.
    """
    lesson = prepare_lesson(config, config.adapters[run].prompt)
    print(f"{run}: {counts(lesson.matches)}", file=sys.stderr)
    with (
        resumable_folder(config.artifacts / "adapters" / run, run_key(config, run)) as work,
        what_is_kept(work, lambda: f"the same command {checkpoint.going_on(checkpoints)}"),
        shortage_told(f"train, {run}", lowerable(config), lambda: checkpoint.going_on(checkpoints)),
    ):
        checkpoints = work / "checkpoints"
        student = fresh_student(config, run)
        step = make_step(student, lesson.head, config.distill)
        curve = checkpoint.load(checkpoints, step.descent)
        with loss_curve(work / LOSS_FOLDER, curve) as log:
            bar = progress(
                _descend(step, lesson, config.distill, curve, checkpoints),
                f"train, {run}",
                "step",
                step_count(lesson.matches.kept, config.distill),
            )
            bar.update(len(curve))
            for record in bar:
                log(record)
                bar.set_postfix_str(f"loss {record.loss:.3f}", refresh=False)
        libraries = (*VERSIONS, "triton") if step.descent.operations else VERSIONS
        about = {"rows": len(lesson.check), "versions": fingerprint.versions(libraries)}
        write_json(work / CHECK, {"check_loss": _check_loss(student, run, lesson, config.distill)} | about)
        with system_errors(work):
            save_adapter(student, config, run, lesson.matches, work)
        shutil.rmtree(checkpoints, ignore_errors=True)


def run_key(config: Config, run: str, module: str = __name__) -> str:
    """The key of all that shapes an adapter, or what else `module` makes of the same."""
    adapter, data = config.adapters[run], config.artifacts / "data"
    store = [config.artifacts / "teacher" / adapter.prompt / MANIFEST] if adapter.prompt is not None else []
    return fingerprint.key(
        module,
        config.model_dump(include={"student", "distill"}) | {"adapter": asdict(adapter)},
        files=[data / "train.jsonl", data / "test.jsonl", *store],
        models={"student": model_folder(config.student.model)},
        libraries=(*VERSIONS, "tokenizers"),
        device=", ".join(filter(None, [fingerprint.device_name(), kernels_name(config.distill)])),
    )


def step_count(matches: list[Match], settings: Distill) -> int:
    """The updates of a whole run."""
    return settings.epochs * math.ceil(len(matches) / settings.batch_rows)


def learning_rate(done: int, settings: Distill) -> float:
    """Cosine annealing after `done` updates, as `CosineAnnealingLR` has it: to 0 at `cosine_steps` and up again."""
    return settings.learning_rate * (1 + math.cos(math.pi * done / settings.cosine_steps)) / 2


def descend(
    step: EagerStep | GraphStep, matches: list[Match], states: States | None, settings: Distill, done: int = 0
) -> Iterator[Record]:
    """Train, from update `done` on: for each epoch and batch one update and one scheduler step.

    After the last record, and one whose number is a multiple of `checkpoint_every`, the weights are as its update left
    them.
    """
    batches = [matches[i : i + settings.batch_rows] for i in range(0, len(matches), settings.batch_rows)]
    ahead = (batches * settings.epochs)[done:]
    tensors = on_device((make_batch(batch, states, step.bucket) for batch in ahead), step.device)
    launched = (
        (number, step(inputs, learning_rate(number - 1, settings)))
        for number, inputs in enumerate(tensors, start=done + 1)
    )
    for number, losses in read_behind(launched, settings.checkpoint_every, done + len(ahead)):
        total, cross_entropy, divergence = losses
        examples = [match.example_id for match in ahead[number - done - 1]]
        rate = learning_rate(number - 1, settings)
        yield Record(number, examples, total, cross_entropy, divergence if states else None, rate)


def read_behind(launched: Iterable[tuple[int, torch.Tensor]], every: int, last: int) -> Iterator[tuple[int, list[Any]]]:
    """The numbers of updates and their losses [3], or a cohort's [3, students]. A GPU is kept busy by launching an
    update before the losses of the one before are read; at a multiple of `every` and at the `last` all are read before
    the next launch."""
    waiting: deque[tuple[int, torch.Tensor, torch.cuda.Event | None]] = deque()
    for number, losses in launched:
        waiting.append((number, *_on_host(losses)))
        unread = 0 if number % every == 0 or number == last else 1
        while len(waiting) > unread:
            earlier, host, arrived = waiting.popleft()
            if arrived:
                arrived.synchronize()
            yield earlier, host.tolist()


def evaluate(model: Any, matches: list[Match], states: States | None, head: Head | None, settings: Distill) -> Loss:
    """The objective of a causal language model (a student's `get_base_model()`) over examples, without dropout: the
    mean of the examples' means."""
    rows = 16
    training = model.training
    model.eval()
    total = torch.zeros(3, device=model.device)
    with torch.inference_mode():
        for start in range(0, len(matches), rows):
            batch = make_batch(matches[start : start + rows], states).map(lambda tensor: tensor.to(model.device))
            hidden = model.model(batch.input_ids, use_cache=False).last_hidden_state
            teacher = Teacher(head, batch.states) if head and batch.states is not None else None
            loss = distillation_loss(
                hidden.flatten(0, 1)[batch.rows],
                model.lm_head.weight,
                batch.labels,
                batch.weights,
                teacher,
                settings,
            )
            total += torch.stack(loss) * len(batch.input_ids)
    model.train(training)
    return Loss(*(total / len(matches)))


def _check_loss(student: Any, run: str, lesson: Lesson, settings: Distill) -> float | None:
    """The original's check after training: mean cross entropy over the test rows, misaligned as its training was; None
    where there is nothing to check so."""
    if not lesson.check:
        return None
    loss = evaluate(student.get_base_model(), lesson.check, None, None, settings).cross_entropy
    return finite(float(loss), f"{run}: its check loss", "lower `distill.learning_rate`")


def _descend(
    step: EagerStep | GraphStep, lesson: Lesson, settings: Distill, curve: list[Record], checkpoints: Path
) -> Iterator[Record]:
    """`descend`, with each record added to `curve`, a checkpoint now and then, and an end to a run that diverged."""
    steps = step_count(lesson.matches.kept, settings)
    for record in descend(step, lesson.matches.kept, lesson.states, settings, len(curve)):
        due = record.step % settings.checkpoint_every == 0 or record.step == steps
        if not math.isfinite(record.loss) or (due and not step.descent.is_finite()):
            raise UserError(
                f"step {record.step} ({', '.join(record.examples)}): the loss became {record.loss} or the weights are "
                f"not finite; the last good checkpoint is {checkpoint.latest(checkpoints) or 'the start'}; "
                "lower `distill.learning_rate`"
            )
        curve.append(record)
        if due:
            checkpoint.save(checkpoints, step.descent, curve)
        yield record


def _on_host(losses: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """The losses in the CPU's memory, from a GPU once the event has come."""
    if losses.device.type != "cuda":
        return losses, None
    host = torch.empty(losses.shape, pin_memory=True)
    host.copy_(losses, non_blocking=True)
    return host, torch.cuda.current_stream().record_event()


@contextmanager
def loss_curve(folder: Path, curve: list[Record]) -> Iterator[Any]:
    """dvclive's files in `folder`, begun anew with `curve`; yields what adds a record."""
    from dvclive import Live
    from scmrepo.exceptions import SCMError

    try:
        began = Live(str(folder), save_dvc_exp=False, dvcyaml=None, monitor_system=False)
    except SCMError as error:
        raise UserError(
            f"the loss curve: dvclive wants a commit in the Git repository around this folder ({error}); make one "
            "(`git add --all && git commit`)"
        ) from error
    with began as live:

        def log(record: Record) -> None:
            live.step = record.step - 1  # dvclive's own `next_step` reads all earlier steps again each time
            for name in ("loss", "cross_entropy", "divergence", "learning_rate"):
                if (value := getattr(record, name)) is not None:
                    live.log_metric(name, value)

        for record in curve:
            log(record)
        yield log
