"""One update: the lean forward against PEFT's, padding and batches against one example at a time."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
from adapted import examples, student, teacher_head

from kd.config import Distill, Projection, load_config
from kd.distill import checkpoint
from kd.distill.lean import Adapters, Joined
from kd.distill.step import Batch, Descent, EagerStep, deterministic, make_batch, make_step
from kd.errors import UserError
from kd.store.head import TeacherHead

PROFILES = Path(__file__).parent.parent.parent / "profiles"


@pytest.fixture
def settings() -> Distill:
    return load_config(PROFILES / "mini.yaml").distill


@pytest.fixture
def head() -> TeacherHead:
    return teacher_head()


@pytest.mark.parametrize("targets", [[*get_args(Projection)], ["v_proj", "up_proj", "down_proj"]])
def test_lean_forward_is_pefts(tiny_llama: Path, settings: Distill, head: TeacherHead, targets: list[str]) -> None:
    model = student(tiny_llama, targets)
    matches, states = examples()
    batch = make_batch(matches, states.__getitem__, bucket=32)
    expected_losses, expected = Descent(model, settings, lean=False).gradient(batch, head)
    losses, gradient = Descent(model, settings, lean=True).gradient(batch, head)
    assert torch.allclose(losses, expected_losses, rtol=1e-5)
    assert (gradient - expected).norm() <= 1e-5 * expected.norm()
    again, _ = Descent(model, settings, lean=False).gradient(batch, head)  # its weights are views of joined ones now
    assert torch.equal(again, expected_losses)


def test_lean_dropout_keeps_the_mean_and_differs_between_adapters() -> None:
    adapters = Adapters(["a", "b"], ["c", "d"], torch.eye(2)[..., None], 1.0, 0.25)
    tuned = {"a": torch.ones(1, 64), "b": torch.ones(1, 64), "c": torch.ones(1, 1), "d": torch.ones(1, 1)}
    torch.manual_seed(0)
    draws = Joined(torch.zeros(2, 64), adapters)(torch.ones(400, 64), tuned)
    assert draws.mean(0).tolist() == pytest.approx([64, 64], rel=0.02)
    assert draws.std(0).tolist() == pytest.approx([(64 / 3) ** 0.5] * 2, rel=0.2)
    assert abs(torch.corrcoef(draws.T)[0, 1]) < 0.2


def test_padding_changes_nothing_and_a_batch_is_the_mean_of_its_examples(
    tiny_llama: Path, settings: Distill, head: TeacherHead
) -> None:
    model = student(tiny_llama, ["q_proj", "v_proj"])
    descent = Descent(model, settings, lean=False)
    matches, states = examples()
    alone = [descent.gradient(make_batch([match], states.__getitem__), head) for match in matches]
    mean_losses, mean_gradient = (torch.stack(parts).mean(0) for parts in zip(*alone, strict=True))
    for bucket in (1, 16):
        losses, gradient = descent.gradient(make_batch(matches, states.__getitem__, bucket), head)
        assert torch.allclose(losses, mean_losses, rtol=1e-5)
        assert (gradient - mean_gradient).norm() <= 1e-5 * mean_gradient.norm()


def test_batch_pads_to_buckets_with_weightless_rows() -> None:
    matches, states = examples()
    batch = make_batch(matches[:2], states.__getitem__, bucket=8)
    assert batch.input_ids.shape == (2, 16)
    assert batch.rows.tolist()[:16] == [*range(7), *range(16 + 5, 16 + 14)]
    assert batch.states is not None
    assert batch.states.shape == (16, 24)
    batch = make_batch(matches[:1], states.__getitem__, bucket=8)
    assert batch.weights.tolist() == pytest.approx([1 / 7] * 7 + [0])


def test_update_is_pytorchs_sgd(tiny_llama: Path, settings: Distill) -> None:
    model = student(tiny_llama, ["q_proj", "o_proj"])
    descent = Descent(model, settings, lean=False)
    copy = torch.nn.Parameter(descent.weights.clone())
    optimizer = torch.optim.SGD([copy], lr=0.1, momentum=settings.momentum, weight_decay=settings.weight_decay)
    for step in range(4):
        copy.grad = torch.randn_like(copy)
        descent.apply(copy.grad.clone(), 0.1 if step % 2 else torch.tensor(0.1))
        optimizer.step()
    assert torch.allclose(descent.weights, copy, rtol=1e-6, atol=1e-7)
    trained = [p.flatten() for p in model.parameters() if p.requires_grad]
    assert torch.equal(torch.cat(trained), descent.weights)  # the modules have what was trained


def test_graphs_need_a_gpu(tiny_llama: Path, settings: Distill) -> None:
    model = student(tiny_llama, ["q_proj"])
    assert isinstance(make_step(model, None, settings), EagerStep)
    with pytest.raises(UserError, match=r"distill\.step: graph needs a CUDA device"):
        make_step(model, None, settings.model_copy(update={"step": "graph"}))


def test_an_update_leaves_torchs_flags_as_they_were(tiny_llama: Path, settings: Distill, head: TeacherHead) -> None:
    matches, states = examples()
    step = EagerStep(Descent(student(tiny_llama, ["q_proj"]), settings, lean=False), head, torch.device("cpu"))
    step(make_batch(matches, states.__getitem__), 0.1)
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError, match="put_"), deterministic():  # torch has no deterministic kernel for it
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1), accumulate=False)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_checkpoint_half_removed_does_not_count(tiny_llama: Path, settings: Distill, tmp_path: Path) -> None:
    descent = Descent(student(tiny_llama, ["q_proj"]), settings, lean=False)
    records = [checkpoint.Record(i, [f"train-{i}"], 1.5, 1.0, None, 0.1) for i in (1, 2)]
    checkpoint.save(tmp_path, descent, records)
    assert checkpoint.load(tmp_path, descent) == records
    (tmp_path / "00000002/state.safetensors").unlink()
    assert checkpoint.load(tmp_path, descent) == []
    assert checkpoint.latest(tmp_path) is None


def test_map_keeps_a_batch_without_a_teacher_without_one() -> None:
    matches, _ = examples()
    batch = make_batch(matches, None)
    assert batch.map(torch.clone).states is None
    assert isinstance(batch, Batch)
