"""The distillation objective over matched rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Loss:
    """The loss to descend and its parts, scalars; `divergence` is None without a teacher."""

    total: torch.Tensor
    cross_entropy: torch.Tensor
    divergence: torch.Tensor | None


def distillation_loss(
    student: torch.Tensor,
    labels: torch.Tensor,
    teacher: torch.Tensor | None,
    alpha: float,
    temperature: float,
) -> Loss:
    """alpha * CE + (1 - alpha) * T^2 * KL(student || teacher); CE alone where `teacher` is None.

    `student` and `teacher` are logits [rows, vocabulary] and `labels` token ids [rows]. CE is taken at temperature
    1, KL between both distributions softened by T, summed over the vocabulary; both are averaged over rows. Computed
    in float32. (Paper, section 3.3; `KnowledgeDistillationLoss` in the original's distill.ipynb.)
    """
    import torch.nn.functional as F  # noqa: N812

    cross_entropy = F.cross_entropy(student.float(), labels)
    if teacher is None:
        return Loss(cross_entropy, cross_entropy.detach(), None)
    divergence = reverse_kl(student.float() / temperature, teacher.float() / temperature)
    total = alpha * cross_entropy + (1 - alpha) * temperature**2 * divergence
    return Loss(total, cross_entropy.detach(), divergence.detach())


def reverse_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(student || teacher) of logits [rows, vocabulary], averaged over rows."""
    log_student = student.log_softmax(-1)
    return (log_student.exp() * (log_student - teacher.log_softmax(-1))).sum(-1).mean()
