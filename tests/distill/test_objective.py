"""The objective against its definition."""

from __future__ import annotations

import pytest
import torch

from kd.distill.objective import distillation_loss, reverse_kl


def test_equals_the_definition_in_float64() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 11), torch.randn(5, 11)
    labels = torch.tensor([0, 3, 10, 3, 7])
    alpha, temperature = 0.3, 4.0
    s, t = student.double(), teacher.double()
    hard = -torch.stack([s[i].softmax(0)[label].log() for i, label in enumerate(labels)]).mean()
    p, q = (s / temperature).softmax(-1), (t / temperature).softmax(-1)
    soft = (p * (p / q).log()).sum() / 5
    loss = distillation_loss(student, labels, teacher, alpha, temperature)
    assert float(loss.total) == pytest.approx(float(alpha * hard + (1 - alpha) * temperature**2 * soft), rel=1e-6)
    assert float(loss.cross_entropy) == pytest.approx(float(hard), rel=1e-6)
    assert loss.divergence is not None
    assert float(loss.divergence) == pytest.approx(float(soft), rel=1e-5)


def test_is_what_the_original_asks_of_pytorch() -> None:
    """`kl_div(log of the teacher, the student's probabilities)`, batchmean: KL(student || teacher)."""
    torch.manual_seed(1)
    student, teacher = torch.randn(4, 9), torch.randn(4, 9)
    expected = torch.nn.functional.kl_div(teacher.log_softmax(1), student.softmax(1), reduction="batchmean")
    assert float(reverse_kl(student, teacher)) == pytest.approx(float(expected), rel=1e-5)


def test_gradient_is_right() -> None:
    torch.manual_seed(2)
    student = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: reverse_kl(s, teacher), (student,))


def test_without_a_teacher_it_is_cross_entropy_alone() -> None:
    student, labels = torch.randn(4, 9), torch.tensor([1, 2, 3, 4])
    loss = distillation_loss(student, labels, None, 0.6, 5.9)
    assert loss.divergence is None
    assert torch.equal(loss.total, torch.nn.functional.cross_entropy(student, labels))


def test_teacher_equal_to_student_adds_nothing() -> None:
    student = torch.randn(4, 9)
    assert float(reverse_kl(student, student.clone())) == pytest.approx(0, abs=1e-6)
