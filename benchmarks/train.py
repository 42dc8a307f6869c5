"""Milliseconds per training step, beside the notebook's loop, at Llama 3.1 8B shape with random weights.

    python benchmarks/train.py [--tiny] [--quick]

The notebook's loop (<experiment>/distill.ipynb) is written anew here: the teacher's full fp16 logits come from host
memory, the student's logits are made for every position, and the CUDA cache is emptied five times a step. Both train
the published way on the same examples: random tokens, in lengths that are GSM8K's (deciles of its first 2638 training
rows). The floor is the time of reading the student's weights twice, forward and backward, at the bandwidth of a copy
measured in the same run. `graph, lean` is the graph step without Triton's kernels. `--tiny` runs the same code on a
tiny model, on a CPU too; `--quick` leaves out the notebook's loop, the eager step, the losses and the roundings.
"""

from __future__ import annotations

import argparse
import copy
import random
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from result import root_mean_square, write_result
from transformers import LlamaConfig, LlamaForCausalLM

from kd.config import Distill, load_config
from kd.distill.adapter import add_lora
from kd.distill.fused import runs_fused, triton_kernels
from kd.distill.step import BUCKET, Descent, EagerStep, GraphStep, make_batch, make_step
from kd.distill.train import descend
from kd.protocol.alignment import Match
from kd.store.head import TeacherHead

PAPER = load_config(Path(__file__).parent.parent / "profiles" / "paper.yaml")
QUESTIONS = (32, 39, 44, 49, 54, 59, 64, 71, 80, 102)
ANSWERS = (78, 96, 114, 132, 146, 163, 184, 207, 238, 300)
EXAMPLES = 50  # the losses of this many steps are kept
ROUNDS = 4  # of these steps; the first captures graphs and is not timed
# As published, and for comparing losses: no dropout, whose masks depend on padding, and a rate at which they move.
SETTINGS = {"": (0.1, PAPER.distill), ", compared": (0.0, PAPER.distill.model_copy(update={"learning_rate": 1e-3}))}
GIB = 2**30
PRODUCTS = re.compile("gemm|gemv|cutlass|xmma|nvjet|splitK", re.IGNORECASE)  # cuBLAS's kernels
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Shape(NamedTuple):
    student: LlamaConfig
    teacher_hidden: int


class Run(NamedTuple):
    losses: list[float]
    times: list[float]
    peak: int


def shape(tiny: bool) -> Shape:
    """Llama 3.1 8B under a 405B teacher, or the same in tiny."""
    llama = {"rope_theta": 500000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "num_key_value_heads": 8}
    if tiny:
        sizes = {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
        return Shape(LlamaConfig(**sizes, num_attention_heads=16, **llama), 256)
    sizes = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    return Shape(LlamaConfig(**sizes, num_attention_heads=32, **llama), 16384)


def make_examples(vocabulary: int, teacher_hidden: int) -> tuple[list[Match], dict[str, torch.Tensor]]:
    """Matches and, by id, the teacher's states."""
    draw = random.Random(0)
    matches, states = [], {}
    for i in range(EXAMPLES):
        question, answer = 1 + QUESTIONS[i % 10], 1 + ANSWERS[i * 7 % 10]
        rows = min(question, answer, question - 1)
        ids = [draw.randrange(vocabulary) for _ in range(question + rows)]
        matches.append(Match(f"train-{i:05d}", ids[:question], 0, ids[question:], f"train-{i:05d}"))
        states[f"train-{i:05d}"] = torch.randn(rows, teacher_hidden, dtype=torch.float16)
    return matches, states


def notebook_loop(
    student: Any, matches: list[Match], logits: dict[str, torch.Tensor], settings: Distill
) -> Iterator[float]:
    """The original's training loop, in its order of operations."""
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(
        trained, lr=settings.learning_rate, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=settings.cosine_steps)
    temperature, alpha = settings.temperature, settings.alpha
    for match in matches:
        empty_cache()
        ids = torch.tensor([match.input_ids], device=DEVICE)
        labels = torch.tensor(match.labels, device=DEVICE)
        teacher = logits[match.example_id].to(DEVICE)
        empty_cache()
        out = student(ids, use_cache=False).logits[0, : len(labels)]
        empty_cache()
        hard = F.cross_entropy(out, labels)
        log_teacher = F.log_softmax(teacher.float() / temperature, dim=-1)
        soft = F.kl_div(log_teacher, F.softmax(out / temperature, dim=-1), reduction="batchmean")
        loss = alpha * hard + (1 - alpha) * temperature**2 * soft
        empty_cache()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        empty_cache()
        yield loss.item()


def empty_cache() -> None:
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def timed(losses: Iterator[float], skip: int = 0) -> Run:
    """Run a loop to its end; the times of its steps but for the first `skip`, from one loss read to the next."""
    found, times = [], []
    synchronize()
    start = time.perf_counter()
    for loss in losses:
        now = time.perf_counter()
        found.append(loss)
        times.append((now - start) * 1000)
        start = now
    return Run(found, times[skip:], torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0)


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def with_fresh_adapter(base: Any, dropout: float, run: Callable[[Any], Run]) -> Run:
    """One run of a student with a newly seeded adapter, which is taken off again."""
    torch.manual_seed(1)
    student = add_lora(base, PAPER, dropout).train()
    empty_cache()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    result = run(student)
    student.unload()
    return result


def notebook_run(matches: list[Match], logits: dict[str, torch.Tensor], settings: Distill) -> Callable[[Any], Run]:
    return lambda student: timed(notebook_loop(student, matches, logits, settings), skip=5)


def our_run(
    matches: list[Match], states: Any, head: TeacherHead, settings: Distill, make: Callable[..., Any] = make_step
) -> Callable[[Any], Run]:
    """Our loop; of several epochs the first, in which graphs are captured, is not timed."""

    def run(student: Any) -> Run:
        records = descend(make(student, head, settings), matches, states, settings)
        return timed((record.loss for record in records), skip=len(matches) if settings.epochs > 1 else 5)

    return run


def lean_step(student: Any, head: TeacherHead, settings: Distill) -> EagerStep | GraphStep:
    """The step that `make_step` makes where there are no kernels."""
    kind = GraphStep if DEVICE == "cuda" else EagerStep
    return kind(Descent(student, settings, lean=True), head.to(DEVICE), student.device)


STEPS = {"eager": make_step, "graph, lean": lean_step, "auto": make_step}


def breakdown(base: Any, matches: list[Match], states: Any, head: TeacherHead, name: str) -> dict[str, Any]:
    """Milliseconds of GPU time an update of the longest example takes, by kernel, and the number of its kernels."""
    steps = 5
    longest = max(matches, key=lambda match: len(match.input_ids))
    found: dict[str, list[float]] = {}

    def run(student: Any) -> Run:
        step = STEPS[name](student, head, PAPER.distill)
        batch = make_batch([longest], states, step.bucket).map(lambda tensor: tensor.to(DEVICE))
        step(batch, 1e-6)
        synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            for _ in range(steps):
                step(batch, 1e-6)
            synchronize()
        for event in profiler.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                found.setdefault(event.name, []).append(event.time_range.elapsed_us() / 1000)
        return Run([], [0.0], 0)

    with_fresh_adapter(base, 0.1, run)
    by_name = {key: {"ms": sum(times) / steps, "launches": len(times) / steps} for key, times in found.items()}
    by_name = dict(sorted(by_name.items(), key=lambda item: -item[1]["ms"]))
    whole = {part: sum(kernel[part] for kernel in by_name.values()) for part in ("ms", "launches")}
    products = sum(kernel["ms"] for key, kernel in by_name.items() if PRODUCTS.search(key))
    return {"tokens": len(longest.input_ids), **whole, "products_ms": products, "kernels": by_name}


def print_breakdown(name: str, parts: dict[str, Any]) -> None:
    print(
        f"\n{name}, {parts['tokens']} tokens: {parts['ms']:.2f} ms in {parts['launches']:.0f} kernels, "
        f"{parts['products_ms']:.2f} of it products"
    )
    for key, kernel in list(parts["kernels"].items())[:24]:
        print(f"  {kernel['ms']:7.3f} ms  {kernel['launches']:6.1f} times  {key[:88]}")


def rounding(base: Any, matches: list[Match], states: Any, head: TeacherHead) -> dict[str, dict[str, float]]:
    """How far losses and gradients are from those of the same student in float32, root mean square of the relative
    errors: of the modules' forward on unpadded examples (eager), of the lean one and of the one in kernels on padded
    examples (graph)."""
    exact = gradients_of(copy.deepcopy(base).float(), "eager", matches, states, head)
    errors = {}
    for name in ("eager", "lean", *(["kernels"] if triton_kernels() else [])):
        pairs = list(zip(gradients_of(base, name, matches, states, head), exact, strict=True))
        losses = [(found / wanted - 1).item() for (found, _), (wanted, _) in pairs]
        gradients = [((found - wanted).norm() / wanted.norm()).item() for (_, found), (_, wanted) in pairs]
        errors[name] = {"loss": root_mean_square(losses), "gradient": root_mean_square(gradients)}
    return errors


def gradients_of(
    base: Any, forward: str, matches: list[Match], states: Any, head: TeacherHead
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Loss and gradient of each example, the same adapter each time, no dropout, no update."""
    torch.manual_seed(1)
    student = add_lora(base, PAPER, 0.0).train()
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)  # a new adapter's B is 0, and so the gradient of its A
    assert runs_fused(student)
    operations = triton_kernels() if forward == "kernels" else None
    descent = Descent(student, PAPER.distill, lean=forward != "eager", operations=operations)
    bucket = BUCKET if forward != "eager" else 1
    found = []
    for match in matches:
        batch = make_batch([match], states, bucket).map(lambda tensor: tensor.to(DEVICE))
        losses, gradient = descent.gradient(batch, head)
        found.append((losses[0], gradient))
    student.unload()
    return found


def seconds_to_copy(size: int) -> float:
    """Seconds to copy `size` bytes on the device, the median of several."""
    source = torch.ones(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        synchronize()
        start = time.perf_counter()
        target.copy_(source)
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def summary(run: Run, baseline: int) -> dict[str, Any]:
    return {
        "ms_per_step": statistics.median(run.times),
        "mean_ms_per_step": statistics.fmean(run.times),
        "least_and_most_ms": [min(run.times), max(run.times)],
        "peak_gib_over_weights": (run.peak - baseline) / GIB,
        "losses": run.losses[:EXAMPLES],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on a CPU too")
    parser.add_argument("--quick", action="store_true", help="graph steps only")
    options = parser.parse_args()
    base, head = models(shape(options.tiny))
    weights = sum(p.numel() * p.element_size() for p in base.parameters())
    baseline = weights + head.weight.numel() * head.weight.element_size()
    copied = weights // 4
    bandwidth = 2 * copied / seconds_to_copy(copied)
    floor = 2 * weights / bandwidth * 1000
    print(f"weights {weights / GIB:.2f} GiB, copy {bandwidth / 1e12:.2f} TB/s, floor {floor:.2f} ms a step", flush=True)
    matches, states = make_examples(base.config.vocab_size, head.norm.numel())
    runs = all_runs(base, matches, states, head, options.quick)
    measured = {name: summary(run, baseline) for name, run in runs.items()}
    print(
        f"\n{'':<20}  {'ms/step':>8}  {'floors':>6}  {'least to most':>16}  {'GiB over weights':>16}  {'last loss':>9}"
    )
    for name, run in measured.items():
        spread = "{:.1f} to {:.1f}".format(*run["least_and_most_ms"])
        print(
            f"{name:<20}  {run['ms_per_step']:>8.2f}  {run['ms_per_step'] / floor:>6.2f}  {spread:>16}  "
            f"{run['peak_gib_over_weights']:>16.2f}  {run['losses'][-1]:>9.4f}"
        )
    empty_cache()
    graphs = [name for name in STEPS if name != "eager"] if DEVICE == "cuda" else []
    parts = {name: breakdown(base, matches, states.get, head, name) for name in graphs}
    for name, part in parts.items():
        print_breakdown(name, part)
    empty_cache()
    errors = {} if options.quick else rounding(base, matches[:10], states.get, head)
    for name, error in errors.items():
        print(f"relative error against float32, {name}: loss {error['loss']:.2e}, gradient {error['gradient']:.2e}")
    if options.quick:
        return
    ours, notebook_ms = measured["auto"], measured["notebook"]["ms_per_step"]
    write_result(
        "train-tiny" if options.tiny else "train",
        {
            "speedup": notebook_ms / ours["ms_per_step"],
            "step_over_floor": ours["ms_per_step"] / floor,
            "lean_step_over_floor": measured["graph, lean"]["ms_per_step"] / floor,
            "peak_gib_over_weights": ours["peak_gib_over_weights"],
        },
        {
            "floor_ms": floor,
            "copy_tb_s": bandwidth / 1e12,
            "steps": measured,
            "rounding": errors,
            "gpu_time": parts,
        },
    )


def models(sizes: Shape) -> tuple[Any, TeacherHead]:
    """The student and the teacher's head, random, on the device; bfloat16 on a GPU."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if DEVICE == "cuda" else torch.float32)
    with torch.device(DEVICE):
        base = LlamaForCausalLM(sizes.student).eval()
        weight = torch.empty(sizes.student.vocab_size, sizes.teacher_hidden).normal_(std=0.01)
        head = TeacherHead(torch.ones(sizes.teacher_hidden), weight, 1e-5)
    torch.set_default_dtype(torch.float32)
    return base, head


def all_runs(
    base: Any, matches: list[Match], states: dict[str, torch.Tensor], head: TeacherHead, quick: bool
) -> dict[str, Run]:
    """The notebook's loop and every step, or the graph steps alone."""
    runs = {}
    logits = {} if quick else {key: head.logits(value).half().cpu() for key, value in states.items()}
    for name, (dropout, settings) in SETTINGS.items():
        if not quick:
            runs[f"notebook{name}"] = with_fresh_adapter(base, dropout, notebook_run(matches, logits, settings))
        for step, make in STEPS.items():
            if quick and (name or step == "eager"):
                continue
            how = {"step": "eager", "epochs": 1} if step == "eager" else {"step": "auto", "epochs": ROUNDS}
            ours = our_run(matches, states.get, head, settings.model_copy(update=how), make)
            runs[f"{step}{name}"] = with_fresh_adapter(base, dropout, ours)
    return runs


if __name__ == "__main__":
    main()
