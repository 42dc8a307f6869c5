"""Milliseconds per training step, beside the notebook's loop, at Llama 3.1 8B shape with random weights.

    python benchmarks/train.py [--tiny]

The notebook's loop (<experiment>/distill.ipynb) is written anew here: the teacher's full fp16 logits come from host
memory, the student's logits are made for every position, and the CUDA cache is emptied five times a step. Both train
the published way on the same examples: random tokens, in lengths that are GSM8K's (deciles of its first 2638 training
rows). The floor is the time of reading the student's weights twice, forward and backward, at the bandwidth of a copy
measured in the same run. `--tiny` runs the same code on a tiny model, on a CPU too.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from result import write_result
from transformers import LlamaConfig, LlamaForCausalLM

from kd.config import Distill, load_config
from kd.distill.adapter import add_lora
from kd.distill.objective import Teacher, distillation_loss
from kd.distill.step import BUCKET, Descent, make_batch, make_step
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
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Shape(NamedTuple):
    student: LlamaConfig
    teacher_hidden: int
    objective_rows: int


class Run(NamedTuple):
    losses: list[float]
    times: list[float]
    peak: int


def shape(tiny: bool) -> Shape:
    """Llama 3.1 8B under a 405B teacher, or the same in tiny."""
    llama = {"rope_theta": 500000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "num_key_value_heads": 8}
    if tiny:
        sizes = {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
        return Shape(LlamaConfig(**sizes, num_attention_heads=16, **llama), 256, 128)
    sizes = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    return Shape(LlamaConfig(**sizes, num_attention_heads=32, **llama), 16384, 4096)


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


def our_run(matches: list[Match], states: Any, head: TeacherHead, settings: Distill) -> Callable[[Any], Run]:
    """Our loop; of several epochs the first, in which graphs are captured, is not timed."""

    def run(student: Any) -> Run:
        records = descend(make_step(student, head, settings), matches, states, settings)
        return timed((record.loss for record in records), skip=len(matches) if settings.epochs > 1 else 5)

    return run


def rounding(base: Any, matches: list[Match], states: Any, head: TeacherHead) -> dict[str, dict[str, float]]:
    """How far losses and gradients are from those of the same student in float32, root mean square of the relative
    errors: of the modules' forward on unpadded examples (eager) and of the lean one on padded examples (graph)."""
    exact = gradients_of(copy.deepcopy(base).float(), "eager", matches, states, head)
    errors = {}
    for name in ("eager", "lean"):
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
    descent = Descent(student, PAPER.distill, lean=forward == "lean")
    bucket = BUCKET if forward == "lean" else 1
    found = []
    for match in matches:
        batch = make_batch([match], states, bucket).map(lambda tensor: tensor.to(DEVICE))
        losses, gradient = descent.gradient(batch, head)
        found.append((losses[0], gradient))
    student.unload()
    return found


def root_mean_square(values: list[float]) -> float:
    return statistics.fmean(value**2 for value in values) ** 0.5


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


def objectives(sizes: Shape, head: TeacherHead) -> dict[str, Any]:
    """Time and memory of the objective and its gradient over many rows: in chunks, by the plain formula over whole
    tensors, and Liger Kernel's closest loss, where it is installed."""
    rows, settings = sizes.objective_rows, PAPER.distill
    vocabulary, width = sizes.student.vocab_size, sizes.student.hidden_size
    hidden = torch.randn(rows, width, device=DEVICE, dtype=head.weight.dtype, requires_grad=True)
    states = torch.randn(rows, sizes.teacher_hidden, device=DEVICE, dtype=torch.float16)
    weight = torch.randn(vocabulary, width, device=DEVICE, dtype=head.weight.dtype) * 0.02
    labels = torch.randint(vocabulary, (rows,), device=DEVICE)
    share = torch.full((rows,), 1 / rows, device=DEVICE)
    normed = (states.float() * torch.rsqrt(states.float().pow(2).mean(-1, keepdim=True) + head.eps)).to(weight.dtype)

    def chunked() -> torch.Tensor:
        return distillation_loss(hidden, weight, labels, share, Teacher(head, states), settings).total

    def plain() -> torch.Tensor:
        student, teacher = (hidden @ weight.T).float(), head.logits(states)
        log_p, log_q = (x.div(settings.temperature).log_softmax(-1) for x in (student, teacher))
        soft = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * settings.temperature**2
        return settings.alpha * F.cross_entropy(student, labels) + (1 - settings.alpha) * soft

    contenders = {"chunked": chunked, "plain formula": plain}
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    except ImportError:
        print("liger-kernel is not installed; its loss is left out")
    else:
        soft = (1 - settings.alpha) * settings.temperature**2
        liger = LigerFusedLinearJSDLoss(settings.alpha, soft, beta=1.0, temperature=settings.temperature)
        contenders["liger-kernel"] = lambda: liger(hidden, weight, normed, head.weight, labels)
    return {name: measured_objective(loss, hidden) for name, loss in contenders.items()}


def measured_objective(loss: Callable[[], torch.Tensor], hidden: torch.Tensor) -> dict[str, Any]:
    times, value = [], 0.0
    for _ in range(8):
        hidden.grad = None
        empty_cache()
        synchronize()
        before = torch.cuda.memory_allocated() if DEVICE == "cuda" else 0
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        total = loss()
        total.backward()
        synchronize()
        times.append((time.perf_counter() - start) * 1000)
        value = total.item()
        peak = (torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0) - before
        del total
    return {"ms": statistics.median(times[3:]), "all_ms": times, "peak_gib": peak / GIB, "loss": value}


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
    sizes = shape(parser.parse_args().tiny)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if DEVICE == "cuda" else torch.float32)
    with torch.device(DEVICE):
        base = LlamaForCausalLM(sizes.student).eval()
        weight = torch.empty(sizes.student.vocab_size, sizes.teacher_hidden).normal_(std=0.01)
        head = TeacherHead(torch.ones(sizes.teacher_hidden), weight, 1e-5)
    torch.set_default_dtype(torch.float32)
    weights = sum(p.numel() * p.element_size() for p in base.parameters())
    baseline = weights + weight.numel() * weight.element_size()
    copied = weights // 4
    bandwidth = 2 * copied / seconds_to_copy(copied)
    floor = 2 * weights / bandwidth * 1000
    matches, states = make_examples(sizes.student.vocab_size, sizes.teacher_hidden)
    logits = {key: head.logits(value).half().cpu() for key, value in states.items()}

    runs = {}
    for name, (dropout, settings) in SETTINGS.items():
        runs[f"notebook{name}"] = with_fresh_adapter(base, dropout, notebook_run(matches, logits, settings))
        for step, rounds in (("eager", 1), ("auto", ROUNDS)):
            ours = settings.model_copy(update={"step": step, "epochs": rounds})
            runs[f"{step}{name}"] = with_fresh_adapter(base, dropout, our_run(matches, states.get, head, ours))
    measured = {name: summary(run, baseline) for name, run in runs.items()}
    print(f"weights {weights / GIB:.2f} GiB, copy {bandwidth / 1e12:.2f} TB/s, floor {floor:.2f} ms a step\n")
    print(f"{'':<20}  {'ms/step':>8}  {'least to most':>16}  {'GiB over weights':>16}  {'last loss':>9}")
    for name, run in measured.items():
        spread = "{:.1f} to {:.1f}".format(*run["least_and_most_ms"])
        print(
            f"{name:<20}  {run['ms_per_step']:>8.2f}  {spread:>16}  {run['peak_gib_over_weights']:>16.2f}  "
            f"{run['losses'][-1]:>9.4f}"
        )
    empty_cache()
    errors = rounding(base, matches[:10], states.get, head)
    for name, error in errors.items():
        print(f"relative error against float32, {name}: loss {error['loss']:.2e}, gradient {error['gradient']:.2e}")
    empty_cache()
    compared = objectives(sizes, head)
    for name, found in compared.items():
        print(f"objective, {name:<14}  {found['ms']:.1f} ms  {found['peak_gib']:.2f} GiB  loss {found['loss']:.4f}")
    ours, notebook_ms = measured["auto"], measured["notebook"]["ms_per_step"]
    write_result(
        "train-tiny" if sizes.objective_rows < 4096 else "train",
        {
            "speedup": notebook_ms / ours["ms_per_step"],
            "step_over_floor": ours["ms_per_step"] / floor,
            "peak_gib_over_weights": ours["peak_gib_over_weights"],
        },
        {
            "floor_ms": floor,
            "copy_tb_s": bandwidth / 1e12,
            "steps": measured,
            "rounding": errors,
            "objective": compared,
        },
    )


if __name__ == "__main__":
    main()
