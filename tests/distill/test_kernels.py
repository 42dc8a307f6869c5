"""The step's operations: each kernel against its plain version, and both, put together, against the modules' own way.

Without a GPU, Triton's interpreter runs the kernels on CPU tensors, in float32: it has no bfloat16 products, and cuts
where a GPU rounds. On a GPU `tests/gpu/test_triton.py` does it in both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import VOCABULARY, examples, student, teacher_head

kernels = pytest.importorskip("kd.distill.kernels", reason="Triton is not installed", exc_type=ImportError)

import operations  # noqa: E402

from kd.config import Distill, load_config  # noqa: E402
from kd.distill import fused, plain  # noqa: E402
from kd.distill.objective import Teacher, distillation_loss  # noqa: E402
from kd.distill.step import Descent, make_batch  # noqa: E402
from kd.store.head import NoHead, TeacherHead  # noqa: E402

SETTINGS = load_config(Path(__file__).parents[2] / "profiles" / "mini.yaml").distill
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
# Odd where it may be, and two examples; then powers of two.
SIZES = [
    operations.Sizes(22, 2, 24, plain.Heads(6, 2, 16), 37, 3, 101),
    operations.Sizes(32, 1, 64, plain.Heads(2, 2, 32), 64, 4, 128),
]
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # Triton's interpreter
needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU tests/gpu compares the kernels")


@needs_interpreter
@pytest.mark.parametrize("sizes", SIZES, ids=["odd", "even"])
@pytest.mark.parametrize("operation", operations.OPERATIONS)
def test_a_kernel_is_its_plain_version(operation: operations.Operation, sizes: operations.Sizes) -> None:
    for dropout in (False, True):
        operations.compare(operation, kernels, sizes, torch.float32, "cpu", dropout)


@needs_interpreter
@pytest.mark.parametrize("blocks", [(16, 16), (16, 32), (32, 16)])
def test_attention_goes_over_several_blocks(blocks: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "ATTENDED", blocks)
    sizes = SIZES[0]._replace(tokens=2 * 45)
    operations.compare(operations.attention, kernels, sizes, torch.float32, "cpu", False)


@needs_interpreter
@pytest.mark.parametrize(("settings", "teacher"), operations.settings_of(SETTINGS))
def test_the_objectives_kernel_is_its_plain_version(
    settings: Distill, teacher: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    operation = operations.distilled(settings, teacher)
    for block in (16, 8192):
        monkeypatch.setattr(kernels, "LOGITS_BLOCK", block)
        operations.compare(operation, kernels, SIZES[0], torch.float32, "cpu", False)


@needs_interpreter
def test_dropout_is_philoxs_bits() -> None:
    found, wanted = torch.empty(2, 3, 700, dtype=torch.uint8), torch.empty(2, 3, 700, dtype=torch.uint8)
    seed = torch.tensor(2**40 + 12345)
    kernels.dropout_bits(seed, 0.3, found)
    plain.dropout_bits(seed, 0.3, wanted)
    assert torch.equal(found, wanted)


def test_philox_is_the_published_generator() -> None:
    """The first known answer of Random123 (Salmon et al., SC 2011): key and counter 0."""
    words = plain.philox(torch.tensor(0), torch.tensor([0]))
    assert [int(word) for word in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_dropout_keeps_its_share_and_differs_between_adapters() -> None:
    bits = torch.empty(200, 500, dtype=torch.uint8)
    plain.dropout_bits(torch.tensor(5), 0.25, bits)
    kept = torch.stack([(bits >> i) & 1 for i in range(4)]).flatten(1).float()
    assert kept.mean(1).tolist() == pytest.approx([0.75] * 4, abs=0.01)
    assert (torch.corrcoef(kept) - torch.eye(4)).abs().max() < 0.02


@pytest.fixture
def head() -> TeacherHead:
    return teacher_head()


@pytest.fixture(params=[plain, pytest.param(kernels, marks=needs_interpreter)], ids=["plain", "kernels"])
def do(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_the_fused_step_is_pefts(tiny_llama: Path, head: TeacherHead, do: Any) -> None:
    model = student(tiny_llama, TARGETS)
    assert fused.runs_fused(model)
    matches, states = examples()
    batch = make_batch(matches, states.__getitem__, bucket=16)
    expected_losses, expected = Descent(model, SETTINGS, lean=False).gradient(batch, head)
    losses, gradient = Descent(model, SETTINGS, lean=True, operations=do).gradient(batch, head)
    assert torch.allclose(losses, expected_losses, rtol=1e-5)
    assert (gradient - expected).norm() <= 1e-5 * expected.norm()


def test_the_gradient_under_dropout_is_the_losses_slope(tiny_llama: Path, head: TeacherHead) -> None:
    """By differences along the gradient, with the same masks."""
    descent = Descent(student(tiny_llama, TARGETS, 0.3), SETTINGS, lean=True, operations=plain)
    matches, states = examples()
    batch = make_batch(matches, states.__getitem__, bucket=16)

    def at(offset: torch.Tensor) -> tuple[float, torch.Tensor]:
        torch.manual_seed(9)
        descent.weights.add_(offset)
        losses, gradient = descent.gradient(batch, head)
        descent.weights.sub_(offset)
        return float(losses[0]), gradient

    _, gradient = at(torch.zeros_like(descent.weights))
    step = gradient * (1e-2 / gradient.norm())
    (above, _), (below, _) = at(step), at(-step)
    assert (above - below) / 2 == pytest.approx(float(gradient.norm()) * 1e-2, rel=2e-3)


def test_other_students_keep_the_lean_step(tiny_llama: Path) -> None:
    assert not fused.runs_fused(student(tiny_llama, ["q_proj", "v_proj"]))
    assert not fused.runs_fused(student(tiny_llama, [*TARGETS, "up_proj"]))
    assert not fused.runs_fused(student(tiny_llama, TARGETS, dtype="float16"))


@needs_interpreter
def test_where_kernels_do_not_run_the_step_goes_on_and_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (7, 0))
    fused.triton_kernels.cache_clear()
    assert [fused.triton_kernels() for _ in range(2)] == [None, None]
    fused.triton_kernels.cache_clear()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("kd train: goes on without Triton's kernels, slower: they need an NVIDIA GPU")


@pytest.mark.parametrize("chunk", [3, 256])
@pytest.mark.parametrize("stored", ["states", "logits"])
def test_the_fused_objective_is_the_plain_one(
    head: TeacherHead, do: Any, chunk: int, stored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kd.distill.objective.FUSED_ROWS", chunk)
    torch.manual_seed(1)
    hidden = torch.randn(7, 32, requires_grad=True)
    output, states = torch.randn(VOCABULARY, 32), torch.randn(7, 24)
    labels, shares = torch.randint(VOCABULARY, (7,)), torch.tensor([0.2] * 5 + [0.0, 0.0])
    teacher = Teacher(head, states) if stored == "states" else Teacher(NoHead(VOCABULARY), head.logits(states).half())
    for of in (teacher, None):
        found, wanted = (
            distillation_loss(hidden, output, labels, shares, of, SETTINGS, operations) for operations in (do, None)
        )
        assert torch.allclose(torch.stack(found), torch.stack(wanted), rtol=1e-5)
        gradient, exact = (torch.autograd.grad(2 * loss.total, hidden)[0] for loss in (found, wanted))
        assert (gradient - exact).norm() <= 1e-5 * exact.norm()
