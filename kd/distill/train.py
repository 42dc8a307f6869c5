"""LoRA-tune the student on matched rows: SGD with momentum, cosine annealing, as published; resumable."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from kd import models
from kd.config import Config, Distill
from kd.dataset import read_examples
from kd.distill import checkpoint
from kd.distill.alignment import Match, Matches, match_examples
from kd.distill.checkpoint import Record
from kd.distill.memory import lowerable, shortage_told
from kd.distill.objective import Loss, Teacher, distillation_loss
from kd.distill.step import EagerStep, GraphStep, States, make_batch, make_step, on_device
from kd.errors import UserError
from kd.files import resumable_folder, sha256, write_json, write_text
from kd.progress import progress
from kd.prompts import PROMPTS
from kd.teacher.capture import open_checked
from kd.teacher.store import MANIFEST, Head, TeacherStore

LOSS_FOLDER = "loss"
CHECK = "check.json"
VERSIONS = ("torch", "transformers", "peft")


@dataclass(frozen=True)
class Lesson:
    """What one student learns from: matched examples, the teacher's store (None for labels alone), and the test rows
    matched as the original's check loss matches them."""

    matches: Matches
    store: TeacherStore | None
    check: list[Match]

    @property
    def head(self) -> Head | None:
        return self.store.head if self.store else None

    @property
    def states(self) -> States | None:
        return self.store.rows if self.store else None


def train(config: Config, experiment: str) -> None:
    """Train one adapter and write it, with its loss curve and check loss, to artifacts/<profile>/adapters/<experiment>.

    A killed run goes on from its last checkpoint and ends in the same bytes.
    """
    lesson = prepare_lesson(config, experiment)
    print(f"{experiment}: {_counts(lesson.matches)}", file=sys.stderr)
    with (
        resumable_folder(config.artifacts / "adapters" / experiment, run_key(config, experiment)) as work,
        shortage_told(f"train, {experiment}", lowerable(config), lambda: checkpoint.going_on(work / "checkpoints")),
    ):
        student = fresh_student(config, experiment, lesson)
        checkpoints = work / "checkpoints"
        step = make_step(student, lesson.head, config.distill)
        curve = checkpoint.load(checkpoints, step.descent)
        with _loss_curve(work / LOSS_FOLDER, curve) as log:
            bar = progress(
                _descend(step, lesson, config.distill, curve, checkpoints),
                f"train, {experiment}",
                "step",
                step_count(lesson.matches.kept, config.distill),
            )
            bar.update(len(curve))
            for record in bar:
                log(record)
                bar.set_postfix_str(f"loss {record.loss:.3f}", refresh=False)
        loss = evaluate(student.get_base_model(), lesson.check, None, None, config.distill).cross_entropy
        write_json(work / CHECK, {"check_loss": float(loss), "rows": len(lesson.check)})
        save_adapter(student, config, experiment, lesson.matches, work)
        shutil.rmtree(checkpoints, ignore_errors=True)


def prepare_lesson(config: Config, experiment: str) -> Lesson:
    """Read the data and the teacher's store, verified, and match them by the protocol."""
    adapter, settings = config.adapters[experiment], config.distill
    examples = read_examples(config.artifacts / "data" / "train.jsonl")
    tests = read_examples(config.artifacts / "data" / "test.jsonl")
    tokenizer = models.load_tokenizer(models.model_folder(config.student.model))
    store = open_checked(config, adapter.prompt, tokenizer, examples) if adapter.prompt else None
    stored = [example.reading for example in store.manifest.examples] if store else None
    matches = match_examples(settings.protocol, examples, tokenizer, settings.max_tokens, stored, settings.quirks)
    check = match_examples("published", tests, tokenizer, settings.max_tokens, None)
    return Lesson(matches, store, check.kept)


def fresh_student(config: Config, experiment: str, lesson: Lesson) -> Any:
    """The student with a new adapter, seeded, on the device it is trained on."""
    device = models.default_device()
    torch.manual_seed(config.seed)  # for LoRA's initialisation and dropout
    base = models.load_model(models.model_folder(config.student.model), config.student.dtype, device)
    if lesson.store:
        _check_vocabulary(base, lesson.store)
    return add_lora(base, config, config.adapters[experiment].dropout).train()


def add_lora(base: Any, config: Config, dropout: float) -> Any:
    """The student with a fresh adapter on its attention projections; only the adapter is trained."""
    from peft import LoraConfig, get_peft_model

    lora = config.distill.lora
    modules = {name.rpartition(".")[2] for name, _ in base.named_modules() if name}
    unknown = [name for name in lora.target_modules if name.rpartition(".")[2] not in modules]
    if unknown:  # PEFT leaves it out without a word
        raise UserError(
            f"distill.lora.target_modules: the student has no module {unknown[0]!r}, only {', '.join(sorted(modules))}"
        )
    base.name_or_path = models.model_name(config.student.model)
    return get_peft_model(
        base,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=dropout,
            target_modules=lora.target_modules,
            revision=getattr(config.student.model, "revision", None),
        ),
    )


def run_key(config: Config, experiment: str) -> str:
    """A fingerprint of everything that shapes an adapter: parameters, data, teacher rows, code, versions, device."""
    adapter, data = config.adapters[experiment], config.artifacts / "data"
    code = [*sorted(Path(__file__).parent.glob("*.py")), Path(models.__file__)]
    store = [config.artifacts / "teacher" / adapter.prompt / MANIFEST] if adapter.prompt else []
    document = {
        "params": config.model_dump(include={"seed", "student", "distill"}),
        "adapter": adapter.model_dump(),
        "files": [sha256(path) for path in (data / "train.jsonl", data / "test.jsonl", *store, *code)],
        "versions": [version(name) for name in VERSIONS],
        "device": models.default_device(),
    }
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]


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


def read_behind(
    launched: Iterable[tuple[int, torch.Tensor]], every: int, last: int
) -> Iterator[tuple[int, list[float]]]:
    """The numbers of updates and their losses [3]. A GPU is kept busy by launching an update before the losses of the
    one before are read; at a multiple of `every` and at the `last` all are read before the next launch."""
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


def save_adapter(student: Any, config: Config, experiment: str, matches: Matches, folder: Path) -> None:
    """PEFT's own format, the same bytes each time, with a card that says what the adapter is."""
    for adapter in student.peft_config.values():
        adapter.target_modules = sorted(adapter.target_modules)  # PEFT keeps a set, whose order changes by process
    # "auto" would ask the Hub whether the base model's vocabulary was resized; it never is here.
    student.save_pretrained(folder, save_embedding_layers=False)
    write_text(folder / "README.md", _card(config, experiment, matches))


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
def _loss_curve(folder: Path, curve: list[Record]) -> Iterator[Any]:
    """dvclive's files in `folder`, begun anew with `curve`; yields what adds a record."""
    from dvclive import Live

    with Live(str(folder), save_dvc_exp=False, dvcyaml=None, monitor_system=False) as live:

        def log(record: Record) -> None:
            live.step = record.step - 1  # dvclive's own `next_step` reads all earlier steps again each time
            for name in ("loss", "cross_entropy", "divergence", "learning_rate"):
                if (value := getattr(record, name)) is not None:
                    live.log_metric(name, value)

        for record in curve:
            log(record)
        yield log


def _counts(matches: Matches) -> str:
    """How many examples are trained on, and which are not as they were."""
    said = f"{len(matches.kept)} examples"
    if matches.cut:
        said += f"; {len(matches.cut)} longer than `max_tokens` and cut to it ({_some(matches.cut)})"
    if matches.skipped:
        said += f"; {len(matches.skipped)} left out, no answer position within it ({_some(matches.skipped)})"
    return said


def _some(ids: list[str]) -> str:
    return ", ".join(ids[:5]) + (", …" if len(ids) > 5 else "")


def _check_vocabulary(student: Any, store: TeacherStore) -> None:
    teacher_size, student_size = store.head.vocabulary_size, student.config.vocab_size
    if teacher_size != student_size:
        raise UserError(
            f"{store.folder}: the teacher has {teacher_size} logits, the student {student_size}; "
            "choose a teacher and a student with one vocabulary"
        )


def _card(config: Config, experiment: str, matches: Matches) -> str:
    adapter, settings, data = config.adapters[experiment], config.distill, config.dataset
    base = models.model_name(config.student.model)
    source = f"teacher store `{adapter.needs}`" if adapter.prompt else "labels alone (no teacher)"
    prompt = f"- prompt of its teacher: {PROMPTS[adapter.prompt].strip() or 'none'}\n" if adapter.prompt else ""
    quirks = f" (but for {', '.join(settings.quirks)})" if settings.quirks else ""
    llama = "\nBuilt with Llama.\n" if "llama-3" in base.lower() else ""
    versions = ", ".join(f"{name} {version(name)}" for name in VERSIONS)
    return f"""---
base_model: {base}
library_name: peft
---
# {experiment}

A LoRA adapter of {base}, trained by `kd train {experiment}` (profile {config.profile}).
{llama}
- learns from: {source}
{prompt}- data: {data.train_rows} rows, {data.source}, {data.answers} answers; {_counts(matches)}
- protocol: {settings.protocol}{quirks}, {settings.divergence}, T {settings.temperature}, alpha {settings.alpha}, \
{settings.epochs} epochs, {settings.batch_rows} examples an update
- seed: {config.seed}
- versions: {versions}
"""
