"""The step's kernels on a GPU, each against its plain version; the step made of them is in `test_training.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import operations
import pytest
import torch

from kd.config import Distill, load_config
from kd.distill import fused, plain
from kd.distill.objective import Teacher, distillation_loss
from kd.kernels import lacking
from kd.store.head import TeacherHead

pytestmark = pytest.mark.usefixtures("gpu")

MINI = load_config(Path(__file__).parents[2] / "profiles" / "mini.yaml").distill
# Odd where it may be, two examples, several blocks of attention; then Llama 3.1 8B's widths, and SmolLM2's.
SIZES = {
    "odd": operations.Sizes(2 * 75, 2, 24, plain.Heads(6, 2, 16), 37, 3, 101),
    "8B": operations.Sizes(96, 1, 4096, plain.Heads(32, 8, 128), 14336, 4, 128256),
    "135M": operations.Sizes(224, 1, 576, plain.Heads(9, 3, 64), 1536, 4, 49152),
}


CASES = [("odd", torch.float32), ("8B", torch.float32), *((size, torch.bfloat16) for size in SIZES)]


@pytest.fixture
def kernels(gpu: None) -> Any:
    del gpu
    if missing := lacking():
        pytest.skip(f"the kernels need {missing}")
    return fused.triton_kernels()


@pytest.mark.parametrize(("size", "dtype"), CASES)
@pytest.mark.parametrize("operation", operations.OPERATIONS)
def test_a_kernel_is_its_plain_version(
    kernels: Any, operation: operations.Operation, size: str, dtype: torch.dtype
) -> None:
    for dropout in (False, True):
        operations.compare(operation, kernels, SIZES[size], dtype, "cuda", dropout)


@pytest.mark.parametrize(("size", "dtype"), CASES)
@pytest.mark.parametrize(("how", "teacher"), operations.settings_of(MINI))
def test_the_objectives_kernel_is_its_plain_version(
    kernels: Any, how: Distill, teacher: bool, size: str, dtype: torch.dtype
) -> None:
    operations.compare(operations.distilled(how, teacher), kernels, SIZES[size], dtype, "cuda", False)


def test_dropout_is_philoxs_bits(kernels: Any) -> None:
    found, wanted = (torch.empty(3, 50, 700, dtype=torch.uint8, device="cuda") for _ in range(2))
    seed = torch.tensor(2**40 + 12345, device="cuda")
    kernels.dropout_bits(seed, 0.6, found)
    plain.dropout_bits(seed, 0.6, wanted)
    assert torch.equal(found, wanted)


def test_dropout_counts_beyond_32_bits(kernels: Any) -> None:
    """As 16,384 tokens of Llama 3.1 8B need it: 32 layers of 4096 columns."""
    out, seed = torch.empty(2**31 + 4096, dtype=torch.uint8, device="cuda"), torch.tensor(7, device="cuda")
    kernels.dropout_bits(seed, 0.6, out)
    words = plain.philox(seed, torch.arange(2**31 - 4096, 2**31 + 4096, device="cuda"))
    wanted = sum((word >= plain.threshold(0.6)).long() << i for i, word in enumerate(words))
    assert torch.equal(out[2**31 - 4096 :].long(), wanted)


@pytest.mark.parametrize("operation", operations.OPERATIONS)
def test_a_kernel_gives_the_same_bits_twice(kernels: Any, operation: operations.Operation) -> None:
    runs = [operation(kernels, operations.Draw(SIZES["8B"], torch.bfloat16, "cuda", True)) for _ in range(3)]
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@pytest.mark.parametrize("chunk", [64, 1024])
def test_the_fused_objective_is_as_good_as_the_plain_one(
    kernels: Any, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both against the plain one of the same bfloat16 tensors in float32."""
    monkeypatch.setattr("kd.distill.objective.FUSED_ROWS", chunk)
    torch.manual_seed(1)
    rows, vocabulary, width = 200, 32000, 512
    with torch.device("cuda"):
        hidden, output = torch.randn(rows, width).bfloat16(), (torch.randn(vocabulary, width) * 0.1).bfloat16()
        norm, weight, states = torch.ones(256), (torch.randn(vocabulary, 256) * 0.2).bfloat16(), torch.randn(rows, 256)
        labels, shares = torch.randint(vocabulary, (rows,)), torch.full((rows,), 1 / rows)
    errors = []
    exact = None
    for dtype, do in ((torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, kernels)):
        leaf = hidden.to(dtype).requires_grad_()
        teacher = Teacher(TeacherHead(norm.to(dtype), weight.to(dtype), 1e-5), states)
        loss = distillation_loss(leaf, output.to(dtype), labels, shares, teacher, MINI, do)
        (gradient,) = torch.autograd.grad(loss.total, leaf)
        exact = exact or (loss.total, gradient)
        errors.append((float(loss.total / exact[0] - 1), float((gradient - exact[1]).norm() / exact[1].norm())))
    assert abs(errors[2][0]) <= 2 * abs(errors[1][0]) + 1e-4
    assert errors[2][1] <= 1.1 * errors[1][1]


def test_without_a_compiler_the_step_goes_on_and_says_so(tmp_path: Path) -> None:
    code = (
        "from kd.distill import fused; print(fused.triton_kernels()); "
        "from kd.config import load_config; from pathlib import Path; "
        "print(repr(fused.kernels_name(load_config(Path('profiles/mini.yaml')).distill)))"
    )
    root = Path(__file__).parents[2]
    environment = os.environ | {"PATH": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), *filter(None, [environment.get("PYTHONPATH")])])
    environment.pop("CC", None)
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["None", "''"]
    assert "goes on without Triton's kernels, slower: they need a C compiler (gcc or clang)" in run.stderr
