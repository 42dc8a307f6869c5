"""Students trained side by side on one GPU, because a small student's step is bound by the number of its kernels.

They share the frozen model and read the same inputs, so N of them are one forward with N adapters. Each has its own
adapter and momenta, teacher rows, labels, alpha, T and learning rate, and learns as it would alone, but that dropout is
drawn for all together. Steps are of one example.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from kd.config import Adapter, Config, Distill
from kd.distill import checkpoint
from kd.distill.adapter import fresh_student, save_adapter
from kd.distill.checkpoint import Record
from kd.distill.lean import runs_lean
from kd.distill.lesson import Lesson, prepare_lesson
from kd.distill.memory import lowerable, shortage_told
from kd.distill.objective import cross_entropy, divergence
from kd.distill.step import Batch, Descent, EagerStep, GraphStep, make_batch, on_device
from kd.distill.train import learning_rate, read_behind, run_key, step_count
from kd.errors import UserError
from kd.io.files import resumable_folder, whole_folder, write_json
from kd.io.progress import progress
from kd.io.stopping import what_is_kept
from kd.protocol.alignment import Match
from kd.store.head import Head
from kd.store.tensors import system_errors

CHUNK_ROWS = 1024
ENDED = "cohort.json"  # in a cohort's folder once it is over: whom it trained, and who of them diverged


@dataclass(frozen=True)
class Member:
    """One student of a cohort: its params, the run's name in them, and what it learns from."""

    config: Config
    run: str
    lesson: Lesson

    @property
    def adapter(self) -> Adapter:
        """What is trained."""
        return self.config.adapters[self.run]

    @property
    def settings(self) -> Distill:
        """How it learns; labels alone are alpha = 1."""
        settings = self.config.distill
        return settings if self.lesson.store else settings.model_copy(update={"alpha": 1.0})

    @property
    def name(self) -> str:
        """Whose it is, in messages."""
        return f"{self.config.profile}/{self.run}"

    @property
    def folder(self) -> Path:
        """Where its adapter goes."""
        return self.config.artifacts / "adapters" / self.run


class CohortLoss(torch.autograd.Function):
    """`distillation_loss` for rows of several students: total, cross entropy and divergence [3, students], and the sum
    of the totals, which alone has a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        output: torch.Tensor,
        batch: Batch,
        shares: torch.Tensor,
        head: Head,
        alpha: torch.Tensor,
        temperature: torch.Tensor,
        settings: Distill,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert batch.states is not None
        values = torch.empty(len(hidden), 2, device=hidden.device)
        gradient = torch.empty_like(hidden)
        weights = shares.sum(0)[:, None]
        for start in range(0, len(hidden), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            logits = (hidden[rows] @ output.T).float()
            ce, slope = cross_entropy(logits, batch.labels[rows, None])
            kl, soft_slope = divergence(logits, head.logits(batch.states[rows]), temperature[rows], settings)
            values[rows] = torch.cat([ce, kl], dim=1)
            # T^2 of the objective over the T that softens the logits.
            slope = slope.mul_(alpha[rows]).add_(soft_slope.mul_((1 - alpha[rows]) * temperature[rows]))
            gradient[rows] = (slope.to(output.dtype) @ output) * weights[rows].to(output.dtype)
        ctx.gradient = gradient
        totals = alpha * values[:, :1] + (1 - alpha) * temperature**2 * values[:, 1:]
        # Not a product: 0 times the losses of a student that diverged is no number, and would be everybody's.
        shared = shares[..., None] * torch.cat([totals, values], dim=1)
        losses = shared.masked_fill(shares[..., None] == 0, 0).sum(1).T
        ctx.mark_non_differentiable(losses)
        return losses[0].sum(), losses

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.gradient * upstream[0].to(ctx.gradient.dtype), *(None,) * 7


class Cohort(Descent):
    """The same for several students: their trained weights and momenta [students, trained], and one update of all.

    `student` is a PEFT student whose adapter has no part in training; `show` lends it a member's weights.
    """

    def __init__(self, student: Any, starts: list[torch.Tensor], settings: list[Distill]) -> None:
        if not runs_lean(student):
            raise UserError("student.model: only a Llama without biases is trained in a cohort; train one at a time")
        super().__init__(student, settings[0], lean=True)
        self.weights = torch.stack(starts)
        self.momenta = torch.zeros_like(self.weights)
        self.rates = (len(settings), 1)
        device = self.weights.device
        self._alpha = torch.tensor([[one.alpha] for one in settings], device=device)
        self._temperature = torch.tensor([[one.temperature] for one in settings], device=device)

    def gradient(self, batch: Batch, head: Head | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The losses [3, students] of a batch with one example a student, and the weights' gradient."""
        assert head
        students, width = batch.input_ids.shape
        owner = batch.rows // width
        matched, leaves = self._forward(batch)
        # Every student counts whole, where `make_batch` gives each of n examples an nth.
        shares = (owner == torch.arange(students, device=owner.device)[:, None]) * (batch.weights * students)
        total, losses = CohortLoss.apply(  # type: ignore[no-untyped-call]
            matched,
            self._model.lm_head.weight,
            batch,
            shares,
            head,
            self._alpha[owner],
            self._temperature[owner],
            self._settings,
        )
        return losses, torch.autograd.grad(total, leaves)[0]

    @torch.no_grad()
    def show(self, member: int) -> None:
        """Give the student's own adapter the weights of one member."""
        for name, piece in self._pieces(self.weights).items():
            self._parameters[name].data.copy_(piece[member])


def train_cohort(runs: list[tuple[Config, str]], state: Path) -> None:
    """Train the adapters of several runs at once and write each as `kd train` does, without curve and check loss.

    `state` is the folder of the unfinished work, and in the end holds `cohort.json`: the `students` as
    <profile>/<run>, and those that `diverged`, which get no adapter. A UserError where the runs cannot share a
    forward.
    """
    members = [Member(*run, lesson) for run, lesson in zip(runs, _lessons(runs), strict=True)]
    matches = [member.lesson.matches.kept for member in members]
    keys = [run_key(member.config, member.run, __name__) for member in members]
    lower = [f"the number of its students ({len(runs)})", *lowerable(members[0].config)]
    with (
        resumable_folder(state, hashlib.sha256("".join(keys).encode()).hexdigest()[:16]) as work,
        what_is_kept(work, lambda: f"the same command {checkpoint.going_on(work)}"),
        shortage_told("cohort", lower, lambda: checkpoint.going_on(work)),
    ):
        student, cohort, step = begin(members, matches)
        curve = checkpoint.load(work, cohort)
        settings = members[0].settings
        every = settings.checkpoint_every
        bar = progress(descend(members, matches, step, len(curve)), "cohort", "step", step_count(matches[0], settings))
        bar.update(len(curve))
        for record in bar:
            if not math.isfinite(record.loss):  # the last one has diverged
                break
            curve.append(record)
            bar.set_postfix_str(f"mean loss {record.loss:.3f}", refresh=False)
            if record.step % every == 0 and record.step < step_count(matches[0], settings):
                checkpoint.save(work, cohort, curve)
        diverged = []
        for number, member in enumerate(members):
            if not cohort.weights[number].isfinite().all():
                print(f"{member.folder}: diverged and is left out; lower its `distill.learning_rate`", file=sys.stderr)
                diverged.append(member.name)
                continue
            cohort.show(number)
            with whole_folder(member.folder) as folder, system_errors(folder):
                save_adapter(student, member.config, member.run, member.lesson.matches, folder)
        for path in work.iterdir():
            shutil.rmtree(path)
        write_json(work / ENDED, {"students": [member.name for member in members], "diverged": diverged})


def _lessons(runs: list[tuple[Config, str]]) -> Iterator[Lesson]:
    """Each run's lesson, made once for runs of the same data, teacher and params that differ in their seed alone."""
    made: dict[tuple[str, ...], Lesson] = {}
    for config, run in runs:
        prompt = config.adapters[run].prompt
        read = [str((config.artifacts / part).resolve()) for part in ("data", "teacher")]
        key = str(prompt), config.model_copy(update={"profile": "", "seeds": []}).model_dump_json(), *read
        if key not in made:
            made[key] = prepare_lesson(config, prompt)
        yield made[key]


def begin(members: list[Member], matches: list[list[Match]]) -> tuple[Any, Cohort, EagerStep | GraphStep]:
    """A student that stands for all, the cohort at its start, and its step."""
    _check_alike(members, matches)
    starts: dict[int, torch.Tensor] = {}
    for member in members:
        if member.adapter.seed not in starts:
            student = fresh_student(member.config, member.run)
            trained = [p.detach().flatten() for p in student.parameters() if p.requires_grad]
            starts[member.adapter.seed] = torch.cat(trained)
    settings = [member.settings for member in members]
    cohort = Cohort(student, [starts[member.adapter.seed].clone() for member in members], settings)
    graph = student.device.type == "cuda" and settings[0].step != "eager"
    kind = GraphStep if graph else EagerStep
    return student, cohort, kind(cohort, _head(members).to(str(student.device)), student.device)


def descend(
    members: list[Member], matches: list[list[Match]], step: EagerStep | GraphStep, done: int = 0
) -> Iterator[Record]:
    """Train from update `done` on; each record's rate is the mean over the students, its losses that over those that
    have not diverged."""
    settings = [member.settings for member in members]
    for number, losses in descend_apart(members, matches, step, done):
        example = matches[0][(number - 1) % len(matches[0])].example_id
        total, ce, kl = map(_mean, losses)
        rate = fmean(learning_rate(number - 1, one) for one in settings)
        yield Record(number, [example], total, ce, kl, rate)


def descend_apart(
    members: list[Member], matches: list[list[Match]], step: EagerStep | GraphStep, done: int = 0
) -> Iterator[tuple[int, list[list[float]]]]:
    """Train from update `done` on: each update's number, and the totals, cross entropies and divergences [3, students]
    before it."""
    settings = [member.settings for member in members]
    steps = step_count(matches[0], settings[0])
    rates = torch.tensor([[[learning_rate(i, one)] for one in settings] for i in range(steps)]).to(step.device)
    batches = list(zip(*(_owned(number, own) for number, own in enumerate(matches)), strict=True))
    ahead = (batches * settings[0].epochs)[done:]
    width = next(member.lesson.store.manifest.width for member in members if member.lesson.store)

    def states(key: str) -> torch.Tensor:
        number, _, teacher_id = key.partition("/")
        member = members[int(number)]
        if member.lesson.states is None:
            return torch.zeros(member.settings.max_tokens, width, dtype=torch.float16)
        return member.lesson.states(teacher_id)

    tensors = on_device((make_batch(list(batch), states, step.bucket) for batch in ahead), step.device)
    launched = ((number, step(inputs, rates[number - 1])) for number, inputs in enumerate(tensors, start=done + 1))
    yield from read_behind(launched, settings[0].checkpoint_every, steps)


def _mean(losses: list[float]) -> float:
    """The mean over the students whose losses are numbers; NaN where none is."""
    return fmean([loss for loss in losses if math.isfinite(loss)] or [math.nan])


def _owned(number: int, matches: list[Match]) -> list[Match]:
    """One member's matches, whose teacher ids say whose they are."""
    return [replace(match, teacher_id=f"{number}/{match.teacher_id}") for match in matches]


def _head(members: list[Member]) -> Head:
    return next(member.lesson.head for member in members if member.lesson.head)


def _check_alike(members: list[Member], matches: list[list[Match]]) -> None:
    """Refuse runs that differ in what a cohort shares."""
    apart = ("alpha", "temperature", "learning_rate", "cosine_steps", "quirks", "protocol")
    first = members[0]
    inputs = [match.input_ids for match in matches[0]]
    for member, own in zip(members, matches, strict=True):
        common = [
            (m.settings.model_dump(exclude=set(apart)), m.config.student, m.adapter.dropout) for m in (first, member)
        ]
        if common[0] != common[1] or member.settings.batch_rows != 1:
            raise UserError(f"{member.name}: other settings than the cohort's first run, or `batch_rows` other than 1")
        if [match.input_ids for match in own] != inputs:
            raise UserError(f"{member.name}: reads other inputs than the cohort's first run; give it another cohort")
        if member.lesson.head and _head(members) and _teacher(member) != _teacher_of(members):
            raise UserError(
                f"{member.name}: learns from another teacher than the cohort's first; give it another cohort"
            )
    if not any(member.lesson.store for member in members):
        raise UserError("a cohort needs a student with a teacher; train the others one at a time")


def _teacher(member: Member) -> str:
    assert member.lesson.store
    return str(member.lesson.store.manifest.head_sha256)


def _teacher_of(members: list[Member]) -> str:
    return next(_teacher(member) for member in members if member.lesson.store)
