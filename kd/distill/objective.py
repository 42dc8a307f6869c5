"""The distillation objective over matched rows: alpha * CE + (1 - alpha) * T^2 * divergence.

A row of logits is 128,256 numbers where a hidden state is 4,096, so the objective starts from hidden states and makes
logits, the student's and the teacher's, for a few rows at a time. The gradient with respect to the hidden states is
worked out on the way: nothing of [rows, vocabulary] outlives its chunk. (The idea is Liger Kernel's and torchtune's
linear cross entropy; the head is frozen, so it needs no gradient.)
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, NamedTuple

import torch

from kd.config import Distill
from kd.store.head import Head, NoHead

CHUNK_ROWS = 256
# With kernels nothing but both logits is made, in the models' own dtypes, and larger products are faster ones.
FUSED_ROWS = 1024


class Loss(NamedTuple):
    """The loss to descend and its parts, float32 scalars. Only `total` has a gradient; `divergence` is 0 without a
    teacher."""

    total: torch.Tensor
    cross_entropy: torch.Tensor
    divergence: torch.Tensor


class Teacher(NamedTuple):
    """The teacher's side of the rows: its head, and its states [rows, teacher hidden]."""

    head: Head
    states: torch.Tensor


def distillation_loss(
    hidden: torch.Tensor,
    head: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    teacher: Teacher | None,
    settings: Distill,
    operations: ModuleType | None = None,
) -> Loss:
    """The objective, and its parts, of the student's final hidden states; CE alone where `teacher` is None.

    `hidden` [rows, hidden] and `head` [vocabulary, hidden] make the student's logits; `labels` [rows] are token ids;
    `weights` [rows], float32, are each row's share: 1 / rows for a mean, 0 for padding. CE is taken at temperature 1,
    the divergence between both distributions softened by T and summed over the vocabulary, all in float32. (Paper,
    section 3.3; `KnowledgeDistillationLoss` in the original's distill.ipynb.) Of `operations`, such as
    `kd.distill.kernels`, `distill` takes the place of the passes over the logits.
    """
    if operations:
        return Loss(*_FusedLoss.apply(hidden, head, labels, weights, teacher, settings, operations))  # type: ignore[no-untyped-call]
    return Loss(*_ChunkedLoss.apply(hidden, head, labels, weights, teacher, settings))  # type: ignore[no-untyped-call]


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor,
        teacher: Teacher | None,
        settings: Distill,
    ) -> Loss:
        total_ce = hidden.new_zeros((), dtype=torch.float32)
        total_divergence = torch.zeros_like(total_ce)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            share = weights[rows, None]
            logits = (hidden[rows] @ head.T).float()
            ce, slope = cross_entropy(logits, labels[rows, None])
            total_ce += (ce * share).sum()
            if teacher:
                theirs = teacher.head.logits(teacher.states[rows])
                value, soft_slope = divergence(logits, theirs, settings.temperature, settings)
                total_divergence += (value * share).sum()
                # T^2 of the objective over the T that softens the logits.
                slope = slope.mul_(settings.alpha).add_(soft_slope, alpha=(1 - settings.alpha) * settings.temperature)
            if gradient is not None:
                gradient[rows] = (slope.to(head.dtype) @ head) * share.to(head.dtype)
        ctx.gradient = gradient
        ctx.mark_non_differentiable(total_ce, total_divergence)
        soft = (1 - settings.alpha) * settings.temperature**2 * total_divergence
        total = settings.alpha * total_ce + soft if teacher else total_ce.clone()
        return Loss(total, total_ce, total_divergence)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None, None]:
        return ctx.gradient * upstream[0].to(ctx.gradient.dtype), None, None, None, None, None


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor,
        teacher: Teacher | None,
        settings: Distill,
        operations: ModuleType,
    ) -> Loss:
        gradient = torch.empty_like(hidden)

        def chunk(rows: slice) -> torch.Tensor:
            theirs = _logits(teacher.head, teacher.states[rows]) if teacher else None
            logits = hidden[rows] @ head.T
            values: torch.Tensor = operations.distill(logits, theirs, labels[rows], weights[rows], settings)
            torch.mm(logits, head, out=gradient[rows])
            return values

        starts = range(0, len(hidden), FUSED_ROWS)
        values = torch.cat([chunk(slice(start, start + FUSED_ROWS)) for start in starts])
        ce, soft = (values * weights[:, None]).sum(0)
        ctx.gradient = gradient
        ctx.mark_non_differentiable(ce, soft)
        total = settings.alpha * ce + (1 - settings.alpha) * settings.temperature**2 * soft if teacher else ce.clone()
        return Loss(total, ce, soft)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.gradient * upstream[0].to(ctx.gradient.dtype), *(None,) * 6


def _logits(head: Head, states: torch.Tensor) -> torch.Tensor:
    """The teacher's, in the dtype that its product has."""
    return states if isinstance(head, NoHead) else head.normalized(states) @ head.weight.T


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-log softmax(logits)[label] of each row [rows, 1], and its gradient [rows, vocabulary]."""
    log_p = logits.log_softmax(-1)
    value = -log_p.gather(1, labels)
    slope = log_p.exp_()
    # Not a scatter: torch's deterministic one sorts and waits for the host, which nothing in a CUDA graph may.
    slope.add_(torch.arange(slope.shape[1], device=labels.device) == labels, alpha=-1)
    return value, slope


def divergence(
    student: torch.Tensor, teacher: torch.Tensor, temperature: torch.Tensor | float, settings: Distill
) -> tuple[torch.Tensor, torch.Tensor]:
    """The divergence of each row of logits at temperature T, common or each row's [rows, 1], as [rows, 1], and its
    gradient with respect to the student's logits over T [rows, vocabulary]. Both logits are overwritten."""
    log_p = student.div_(temperature).log_softmax(-1)
    log_q = teacher.div_(temperature).log_softmax(-1)
    match settings.divergence:
        case "reverse-kl":
            return reverse_kl(log_p, log_q)
        case "forward-kl":
            return forward_kl(log_p, log_q)
        case "jsd":
            return jensen_shannon(log_p, log_q, settings.jsd_beta)


def reverse_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(student || teacher) of log probabilities, and its slope: the published objective."""
    return _expectation(log_p.exp(), log_p - log_q)


def forward_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(teacher || student) of log probabilities, and its slope."""
    q = log_q.exp()
    return (q * (log_q - log_p)).sum(-1, keepdim=True), log_p.exp() - q


def jensen_shannon(log_p: torch.Tensor, log_q: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalized JSD, beta * KL(teacher || m) + (1 - beta) * KL(student || m) with m = beta * teacher + (1 - beta) *
    student, and its slope (Agarwal et al., arXiv 2306.13649, equation 1)."""
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log(1 - beta))
    theirs = beta * (log_q.exp() * (log_q - log_m)).sum(-1, keepdim=True)
    ours, slope = _expectation(log_p.exp(), (1 - beta) * (log_p - log_m))
    return theirs + ours, slope


def _expectation(p: torch.Tensor, score: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """sum(p * score) of each row, and p * (score - that): its slope, as the score's own change cancels in the sum."""
    terms = p * score
    mean = terms.sum(-1, keepdim=True)
    return mean, terms.addcmul_(p, mean, value=-1)
