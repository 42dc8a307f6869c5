"""Milliseconds and memory of the objective with its gradient over 4096 rows of 128,256 logits.

    python benchmarks/objective.py [--tiny]

The student's hidden states have 4096 numbers, the teacher's 16,384, as in Llama 3.1 8B and 405B; bfloat16. Ours in
Triton's kernels and without, beside the plain formula over whole tensors and Liger Kernel's closest loss, where
liger-kernel is installed (0.5.10 runs on torch 2.4.0; it is compiled by torch, and makes the head's gradient as well).
`--tiny` runs the same code on small tensors, on a CPU too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from result import write_result

from kd.config import Distill, load_config
from kd.distill.fused import triton_kernels
from kd.distill.objective import Teacher, distillation_loss
from kd.store.head import TeacherHead

SETTINGS = load_config(Path(__file__).parent.parent / "profiles" / "paper.yaml").distill
ROUNDS = 12
WARM = 4  # of them: what is compiled, and cuBLAS's workspaces
GIB = 2**30
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Sizes(NamedTuple):
    rows: int
    vocabulary: int
    hidden: int
    teacher_hidden: int


class Inputs(NamedTuple):
    hidden: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor
    share: torch.Tensor
    head: TeacherHead
    states: torch.Tensor


def make_inputs(sizes: Sizes) -> Inputs:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    with torch.device(DEVICE):
        weight = torch.empty(sizes.vocabulary, sizes.teacher_hidden, dtype=dtype).normal_(std=0.01)
        return Inputs(
            torch.randn(sizes.rows, sizes.hidden, dtype=dtype, requires_grad=True),
            torch.empty(sizes.vocabulary, sizes.hidden, dtype=dtype).normal_(std=0.02),
            torch.randint(sizes.vocabulary, (sizes.rows,)),
            torch.full((sizes.rows,), 1 / sizes.rows),
            TeacherHead(torch.ones(sizes.teacher_hidden, dtype=dtype), weight, 1e-5),
            torch.randn(sizes.rows, sizes.teacher_hidden, dtype=torch.float16),
        )


def contenders(given: Inputs, settings: Distill) -> dict[str, Callable[[], torch.Tensor]]:
    """What makes the loss, by name; its backward makes the hidden states' gradient."""
    teacher = Teacher(given.head, given.states)
    common = given.hidden, given.weight, given.labels, given.share, teacher, settings

    def plain() -> torch.Tensor:
        student, logits = (given.hidden @ given.weight.T).float(), given.head.logits(given.states)
        log_p, log_q = (x.div(settings.temperature).log_softmax(-1) for x in (student, logits))
        soft = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * settings.temperature**2
        return settings.alpha * F.cross_entropy(student, given.labels) + (1 - settings.alpha) * soft

    found: dict[str, Callable[[], torch.Tensor]] = {
        "chunked": lambda: distillation_loss(*common).total,
        "plain formula": plain,
    }
    if kernels := triton_kernels():
        found = {"kernels": lambda: distillation_loss(*common, kernels).total, **found}
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    except ImportError:
        print("liger-kernel is not installed; its loss is left out")
        return found
    soft = (1 - settings.alpha) * settings.temperature**2
    liger = LigerFusedLinearJSDLoss(settings.alpha, soft, beta=1.0, temperature=settings.temperature)
    normed = given.head.normalized(given.states)
    found["liger-kernel"] = lambda: liger(given.hidden, given.weight, normed, given.head.weight, given.labels)
    return found


def measure(loss: Callable[[], torch.Tensor], hidden: torch.Tensor) -> dict[str, Any]:
    """Times of all rounds, the peak of memory over what was there, the loss, and the gradient's norm."""
    times, value = [], 0.0
    for turn in range(ROUNDS):
        hidden.grad = None
        if DEVICE == "cuda":
            if turn == WARM:
                torch.cuda.empty_cache()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if DEVICE == "cuda" else 0
        start = time.perf_counter()
        total = loss()
        total.backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1000)
        value = total.item()
        peak = (torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0) - before
        del total
    assert hidden.grad is not None
    norm = float(hidden.grad.float().norm())
    return {"ms": statistics.median(times[WARM:]), "all_ms": times, "peak_gib": peak / GIB, "loss": value, "norm": norm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small tensors, on a CPU too")
    tiny = parser.parse_args().tiny
    given = make_inputs(Sizes(128, 1024, 128, 256) if tiny else Sizes(4096, 128256, 4096, 16384))
    measured = {name: measure(loss, given.hidden) for name, loss in contenders(given, SETTINGS).items()}
    for name, found in measured.items():
        times = found["all_ms"][WARM:]
        print(
            f"{name:<14}  {found['ms']:.1f} ms ({min(times):.1f} to {max(times):.1f})  "
            f"{found['peak_gib']:.2f} GiB  loss {found['loss']:.5f}  gradient {found['norm']:.5e}",
            flush=True,
        )
    ours = measured.get("kernels", measured["chunked"])
    figures = {"ms": ours["ms"], "peak_gib": ours["peak_gib"]}
    if "liger-kernel" in measured:
        figures["over_liger"] = ours["ms"] / measured["liger-kernel"]["ms"]
    write_result("objective-tiny" if tiny else "objective", figures, measured)


if __name__ == "__main__":
    main()
