"""The objective against its definition: values and gradients, in chunks and whole, against float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from kd.config import Distill, load_config
from kd.distill import objective
from kd.distill.objective import Loss, Teacher, distillation_loss, forward_kl, jensen_shannon, reverse_kl
from kd.store.head import TeacherHead

PAPER = load_config(Path(__file__).parent.parent.parent / "profiles" / "paper.yaml").distill
ROWS, HIDDEN, VOCABULARY, TEACHER_HIDDEN = 11, 8, 37, 6
DIVERGENCES = [("reverse-kl", 0.5), ("forward-kl", 0.5), ("jsd", 0.5), ("jsd", 0.1)]


def settings(divergence: str = "reverse-kl", beta: float = 0.5, **changes: Any) -> Distill:
    return PAPER.model_copy(update={"divergence": divergence, "jsd_beta": beta} | changes)


def inputs(
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Teacher]:
    """Hidden states, head, labels, weights (the last two rows are padding) and the teacher."""
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN).to(dtype).requires_grad_()
    head = torch.randn(VOCABULARY, HIDDEN).to(dtype)
    labels = torch.randint(VOCABULARY, (ROWS,))
    weights = torch.tensor([1 / (ROWS - 2)] * (ROWS - 2) + [0.0, 0.0])
    norm, weight = torch.rand(TEACHER_HIDDEN).to(dtype), torch.randn(VOCABULARY, TEACHER_HIDDEN).to(dtype)
    return hidden, head, labels, weights, Teacher(TeacherHead(norm, weight, 1e-5), torch.randn(ROWS, TEACHER_HIDDEN))


def plain(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, teacher: Teacher, how: Distill) -> Loss:
    """The definition, in float64, by autograd, over the rows that are not padding."""
    n = ROWS - 2
    states = teacher.states.double()
    normed = states / (states.pow(2).mean(-1, keepdim=True) + teacher.head.eps).sqrt() * teacher.head.norm.double()
    logits = (hidden.double() @ head.double().T)[:n]
    p = (logits / how.temperature).softmax(-1)
    q = (normed @ teacher.head.weight.double().T / how.temperature).softmax(-1)[:n]
    if how.divergence == "reverse-kl":
        soft = (p * (p / q).log()).sum() / n
    elif how.divergence == "forward-kl":
        soft = (q * (q / p).log()).sum() / n
    else:
        m = how.jsd_beta * q + (1 - how.jsd_beta) * p
        soft = (how.jsd_beta * q * (q / m).log() + (1 - how.jsd_beta) * p * (p / m).log()).sum() / n
    hard = F.cross_entropy(logits, labels[:n])
    return Loss(how.alpha * hard + (1 - how.alpha) * how.temperature**2 * soft, hard, soft)


@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
@pytest.mark.parametrize("chunk", [3, 256])
def test_values_and_gradients_are_the_definitions(
    divergence: str, beta: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objective, "CHUNK_ROWS", chunk)
    how = settings(divergence, beta)
    hidden, head, labels, weights, teacher = inputs()
    found = distillation_loss(hidden, head, labels, weights, teacher, how)
    (gradient,) = torch.autograd.grad(3 * found.total, hidden)
    exact = hidden.detach().double().requires_grad_()
    wanted = plain(exact, head, labels, teacher, how)
    (exact_gradient,) = torch.autograd.grad(3 * wanted.total, exact)
    for name in Loss._fields:
        assert float(getattr(found, name)) == pytest.approx(float(getattr(wanted, name)), rel=1e-5), name
    assert (gradient - exact_gradient).norm() <= 1e-5 * exact_gradient.norm()
    assert not gradient[-2:].any()  # padding


def test_bfloat16_gradient_is_as_good_as_autograds() -> None:
    hidden, head, labels, weights, teacher = inputs(torch.bfloat16)
    (found,) = torch.autograd.grad(distillation_loss(hidden, head, labels, weights, teacher, PAPER).total, hidden)
    exact = hidden.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(plain(exact, head, labels, teacher, PAPER).total, exact)
    assert (found.double() - wanted).norm() <= 1e-2 * wanted.norm()


@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
def test_slopes_are_the_derivatives(divergence: str, beta: float) -> None:
    """By autograd through the value itself, in float64."""
    torch.manual_seed(1)
    logits, other = (torch.randn(4, 9, dtype=torch.float64, requires_grad=True) for _ in range(2))
    functions = {"reverse-kl": reverse_kl, "forward-kl": forward_kl, "jsd": lambda p, q: jensen_shannon(p, q, beta)}
    of = functions[divergence]
    value, _ = of(logits.log_softmax(-1), other.log_softmax(-1))
    (wanted,) = torch.autograd.grad(value.sum(), logits)
    with torch.no_grad():
        _, slope = of(logits.log_softmax(-1), other.log_softmax(-1))
    assert torch.allclose(slope, wanted, rtol=1e-9, atol=1e-12)


def test_reverse_kl_is_what_the_original_asks_of_pytorch() -> None:
    """`kl_div(log of the teacher, the student's probabilities)`, batchmean: KL(student || teacher)."""
    torch.manual_seed(1)
    student, teacher = torch.randn(4, 9).log_softmax(1), torch.randn(4, 9).log_softmax(1)
    expected = F.kl_div(teacher, student.exp(), reduction="batchmean")
    assert float(reverse_kl(student, teacher)[0].mean()) == pytest.approx(float(expected), rel=1e-5)


def test_jsd_survives_a_probability_of_zero() -> None:
    log_p = torch.tensor([[0.0, -200.0, -200.0]])
    value, slope = jensen_shannon(log_p, log_p.flip(1), 0.5)
    assert float(value) == pytest.approx(float(torch.tensor(2.0).log()), rel=1e-5)
    assert slope.isfinite().all()


def test_without_a_teacher_it_is_cross_entropy_alone() -> None:
    hidden, head, labels, weights, _ = inputs()
    loss = distillation_loss(hidden, head, labels, weights, None, PAPER)
    expected = F.cross_entropy((hidden @ head.T)[:-2], labels[:-2])
    assert float(loss.total) == pytest.approx(float(expected), rel=1e-6)
    found, wanted = (torch.autograd.grad(value, hidden)[0] for value in (loss.total, expected))
    assert torch.allclose(found, wanted, atol=1e-7)


def test_nothing_of_the_size_of_all_logits_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors saved for backward hold [rows, hidden] at most, and no tensor made on the way exceeds a chunk."""
    monkeypatch.setattr(objective, "CHUNK_ROWS", 2)
    hidden, head, labels, weights, teacher = inputs()
    biggest = 0
    weights_at = {head.untyped_storage().data_ptr(), teacher.head.weight.untyped_storage().data_ptr()}

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal biggest
            out = func(*args, **(kwargs or {}))
            logits_like = isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[1] == VOCABULARY
            if logits_like and out.untyped_storage().data_ptr() not in weights_at:
                biggest = max(biggest, len(out))
            return out

    with Watch():
        distillation_loss(hidden, head, labels, weights, teacher, PAPER).total.backward()
    assert biggest == 2
