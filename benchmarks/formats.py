"""What the distillation objective loses where a teacher is kept otherwise than exactly, and the bytes a token takes.

    python benchmarks/formats.py [--run teacher-kd-1]

Reads a finished profile (params.yaml, `dvc repro`): the store that the run's student learned from, and the student as
it came out. The exact teacher is read again, in its own dtype; as float16 its states must be those of the store, bit
for bit. For each training example the objective and its gradient by what comes back of each way of keeping the teacher
are compared with those by the exact one, at the params' T and at T = 1: root mean square of the relative errors.

Of the k largest log probabilities the rest comes back shared by all other tokens alike, DistillKit's
`symmetric_uniform`. In a table of their own they are as DistillKit takes them where nothing is asked of it: the rest is
no token's, and the divergence is forward KL, whose value that leaves finite.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from result import root_mean_square, write_result

from kd.analysis.formats import Error, in_eight_bits, objective_errors, of_largest
from kd.config import Config, Distill, load_config
from kd.distill.lesson import Lesson, prepare_lesson
from kd.distill.objective import Teacher
from kd.distill.step import make_batch
from kd.io.progress import progress
from kd.models.adapters import adapter_folder, load_student
from kd.models.load import default_device, model_folder
from kd.store.head import NoHead, TeacherHead
from kd.store.reader import TeacherStore
from kd.teacher import backends
from kd.teacher.distillkit import largest, row_bytes

PAPER = (16384, 128256)  # hidden size and vocabulary of the 405B teacher
LARGEST = (8, 32, 128, 512, 4096)
GROUP = 64
SPREAD, CUT = "largest {}, rest shared", "largest {}, rest zero"


class Format(NamedTuple):
    """A way of keeping the teacher: bytes a token, of hidden size and vocabulary, and what comes back of states."""

    size: Callable[[int, int], float]
    teacher: Callable[[torch.Tensor], Teacher]


class Setting(NamedTuple):
    """What an error is of: an objective, and the ways of keeping the teacher that it can be computed by."""

    distill: Distill
    formats: dict[str, Format]


def states_formats(head: TeacherHead) -> dict[str, Format]:
    """States, whole and rounded, and the notebooks' logits."""
    vocabulary = head.vocabulary_size
    return {
        "states, float16 (the store)": Format(lambda h, _: 2 * h, lambda s: Teacher(head, s.half())),
        "states, bfloat16": Format(lambda h, _: 2 * h, lambda s: Teacher(head, s.bfloat16())),
        f"states, 8 bits, a scale for {GROUP}": Format(
            lambda h, _: h + 2 * h / GROUP, lambda s: Teacher(head, in_eight_bits(s, GROUP))
        ),
        "states, 8 bits, a scale a token": Format(
            lambda h, _: h + 2, lambda s: Teacher(head, in_eight_bits(s, s.shape[1]))
        ),
        "logits, float16 (the notebooks)": Format(
            lambda _, v: 2 * v, lambda s: Teacher(NoHead(vocabulary, str(s.device)), head.logits(s).half())
        ),
    }


def largest_formats(head: TeacherHead, name: str, *, share_rest: bool) -> Iterator[tuple[str, Format]]:
    """The k largest log probabilities, as an export for DistillKit has them."""
    vocabulary = head.vocabulary_size

    def teacher(k: int) -> Callable[[torch.Tensor], Teacher]:
        return lambda s: of_largest(*largest(head.logits(s), k), vocabulary, share_rest=share_rest)

    def size(k: int) -> Callable[[int, int], float]:
        return lambda _, width: row_bytes(width, k)

    for k in LARGEST:
        yield name.format(k), Format(size(k), teacher(k))


def settings(config: Config, head: TeacherHead) -> dict[str, Setting]:
    """The objectives by name."""
    spread = states_formats(head) | dict(largest_formats(head, SPREAD, share_rest=True))
    cut = dict(largest_formats(head, CUT, share_rest=False))
    found = {}
    for divergence, formats in (("reverse-kl", spread), ("forward-kl", cut)):
        for temperature in (config.distill.temperature, 1.0):
            update = {"divergence": divergence, "temperature": temperature}
            found[f"{divergence}, T = {temperature:.4g}"] = Setting(config.distill.model_copy(update=update), formats)
    return found


def exact_states(config: Config, store: TeacherStore) -> dict[str, torch.Tensor]:
    """The states that a store was made of, before they became float16."""
    examples = store.manifest.examples
    teacher = backends.load(config.teacher, max(len(example.token_ids) for example in examples))
    stream = teacher.states([example.token_ids] for example in examples)
    found = {}
    for example, (states,) in zip(progress(examples, "teacher", "question"), stream, strict=True):
        found[example.id] = states[slice(*example.span)].clone()
        if not torch.equal(found[example.id].half().cpu(), store.rows(example.id)):
            raise SystemExit(f"{store.folder}: {example.id} was captured on another machine; capture it here")
    return found


def probability_kept(head: TeacherHead, states: dict[str, torch.Tensor], temperature: float) -> dict[int, float]:
    """How much of a row's probability the k largest have, by k."""
    found: dict[int, list[torch.Tensor]] = {k: [] for k in LARGEST}
    for rows in states.values():
        falling = (head.logits(rows) / temperature).softmax(-1).topk(max(LARGEST)).values.cumsum(-1)
        for k, kept in found.items():
            kept.append(falling[:, k - 1])
    return {k: float(torch.cat(kept).mean()) for k, kept in found.items()}


def measure(
    config: Config, run: str, lesson: Lesson, head: TeacherHead, states: dict[str, torch.Tensor]
) -> dict[str, dict[str, list[Error]]]:
    """The errors of every example, by objective and format."""
    device = default_device()
    student = load_student(
        model_folder(config.student.model), config.student.dtype, adapter_folder(config, run), device
    )
    objectives = settings(config, head)
    errors: dict[str, dict[str, list[Error]]] = {
        name: {way: [] for way in objective.formats} for name, objective in objectives.items()
    }
    for match in progress(lesson.matches.kept, "objective", "example"):
        batch = make_batch([match], None).map(lambda tensor: tensor.to(device))
        with torch.no_grad():
            hidden = student.model(batch.input_ids, use_cache=False).last_hidden_state[0, batch.rows]
        theirs = states[str(match.teacher_id)][: len(match.labels)]
        for name, (distill, formats) in objectives.items():
            kept = {way: one.teacher(theirs) for way, one in formats.items()}
            exact = Teacher(head, theirs)
            found = objective_errors(hidden, student.lm_head.weight.detach(), batch.labels, exact, kept, distill)
            for way, error in found.items():
                errors[name][way].append(error)
    return errors


def summary(errors: list[Error]) -> dict[str, Any]:
    return {
        "objective": root_mean_square([error.objective for error in errors]),
        "gradient": root_mean_square([error.gradient for error in errors]),
        "least_and_most": [min(errors).objective, max(errors).objective],
    }


def table(measured: dict[str, Any], name: str, other: str) -> str:
    """Two objectives side by side, each way of keeping the teacher a row."""
    lines = [
        f"| | bytes a token | at the 405B | {name} | its gradient | {other} | its gradient |",
        "|---|---|---|---|---|---|---|",
    ]
    for way, size in measured["bytes_per_token"].items():
        if way in measured["errors"][name]:
            errors = [measured["errors"][at][way] for at in (name, other)]
            cells = [percent(error[part]) for error in errors for part in ("objective", "gradient")]
            lines.append(f"| {way} | {size['here']:,.0f} | {size['at the 405B']:,.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def percent(error: float) -> str:
    return f"{error:,.0%}" if error >= 0.1 else f"{100 * error:.2g}%"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="teacher-kd-1", help="whose student and teacher (teacher-kd-1)")
    run = parser.parse_args().run
    config = load_config(Path("params.yaml"))
    lesson = prepare_lesson(config, config.adapters[run].prompt)
    store = lesson.store
    if store is None:
        raise SystemExit(f"{run}: learned from no teacher; name one that did")
    head = store.head.to(default_device())
    assert isinstance(head, TeacherHead)
    states = exact_states(config, store)
    errors = measure(config, run, lesson, head, states)
    ways = {way: one for objective in settings(config, head).values() for way, one in objective.formats.items()}
    here = (store.manifest.width, store.vocabulary_size)
    measured = {
        "run": run,
        "examples": len(lesson.matches.kept),
        "rows": sum(len(match.labels) for match in lesson.matches.kept),
        "hidden_and_vocabulary": here,
        "bytes_per_token": {
            way: {"here": one.size(*here), "at the 405B": one.size(*PAPER)} for way, one in ways.items()
        },
        "probability_kept": {
            f"T = {t:.4g}": probability_kept(head, states, t) for t in (config.distill.temperature, 1.0)
        },
        "errors": {name: {way: summary(one) for way, one in by_way.items()} for name, by_way in errors.items()},
    }
    (hot, mild, *forward) = measured["errors"]
    print(table(measured, hot, mild), table(measured, *forward), sep="\n\n")
    at = measured["errors"]
    figures = {
        "float16_states": at[hot]["states, float16 (the store)"]["objective"],
        "bfloat16_states": at[hot]["states, bfloat16"]["objective"],
        "largest_128": at[hot][SPREAD.format(128)]["objective"],
        "largest_128_at_1": at[mild][SPREAD.format(128)]["objective"],
    }
    write_result("formats", figures, measured)


if __name__ == "__main__":
    main()
