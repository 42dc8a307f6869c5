"""What is lost where a teacher is kept otherwise than exactly: the distillation objective, and the gradient that trains
the student, by what comes back of it beside what was there. benchmarks/formats.py measures it, docs/store.md has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from kd.config import Distill
from kd.distill.objective import Teacher, distillation_loss
from kd.store.head import NoHead

NOTHING = -1e4  # a log probability that is 0 as a probability at any temperature in use, and still a number
LEAST = 1e-8  # DistillKit's; without one, what float32 leaves of 1 is noise where the k largest have nearly all
LARGEST = 127  # of 8 bits with a sign


class Error(NamedTuple):
    """Relative errors: of the objective, and, by norms, of its gradient with respect to the student's hidden states."""

    objective: float
    gradient: float


def objective_errors(
    hidden: torch.Tensor,
    head: torch.Tensor,
    labels: torch.Tensor,
    exact: Teacher,
    kept: Mapping[str, Teacher],
    settings: Distill,
) -> dict[str, Error]:
    """How far the objective of some rows is from the one by the `exact` teacher, for each way it was `kept`.

    `hidden` [rows, hidden], `head` [vocabulary, hidden] and `labels` [rows] are as `distillation_loss` takes them;
    every row counts alike.
    """
    wanted, slope = _objective(hidden, head, labels, exact, settings)
    errors = {}
    for name, teacher in kept.items():
        found, gradient = _objective(hidden, head, labels, teacher, settings)
        off = (gradient - slope).norm() / slope.norm()
        errors[name] = Error(abs(found / wanted - 1), float(off))
    return errors


def in_eight_bits(states: torch.Tensor, group: int) -> torch.Tensor:
    """What comes back of states [rows, hidden] kept as 8-bit integers with a float16 scale for each `group` numbers."""
    groups = states.float().unflatten(-1, (-1, group))
    scale = (groups.abs().amax(-1, keepdim=True) / LARGEST).half().float().clamp(min=torch.finfo(torch.half).tiny)
    back: torch.Tensor = ((groups / scale).round().clamp(-LARGEST, LARGEST) * scale).flatten(-2)
    return back


def of_largest(
    token_ids: torch.Tensor, log_probabilities: torch.Tensor, vocabulary_size: int, *, share_rest: bool
) -> Teacher:
    """The teacher that comes back of each row's k largest log probabilities, [rows, k] as their token ids are.

    What they leave of the probability is shared by all other tokens alike, none below `LEAST`, or, without
    `share_rest`, no token's: then KL(student || teacher) is endless. (DistillKit's `symmetric_uniform` and `zero`,
    distillkit/compression/densify.py.)
    """
    rest = torch.full_like(log_probabilities[:, :1], NOTHING)
    if share_rest:
        others = max(1, vocabulary_size - token_ids.shape[-1])
        rest = ((1 - log_probabilities.exp().sum(-1, keepdim=True)) / others).clamp(min=LEAST).log()
    dense = rest.expand(-1, vocabulary_size).scatter(-1, token_ids, log_probabilities.float())
    return Teacher(NoHead(vocabulary_size, str(dense.device)), dense)


def _objective(
    hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, teacher: Teacher, settings: Distill
) -> tuple[float, torch.Tensor]:
    """The objective and its gradient, [rows, hidden]."""
    leaf = hidden.detach().clone().requires_grad_()
    weights = torch.full_like(labels, 1 / len(labels), dtype=torch.float32)
    # A copy, because logits that are float32 already would be softened where they lie.
    loss = distillation_loss(leaf, head, labels, weights, teacher._replace(states=teacher.states.clone()), settings)
    (gradient,) = torch.autograd.grad(loss.total, leaf)
    return float(loss.total), gradient
