"""Students trained a second: one alone, several in a process each, and several as a cohort, at SmolLM2-135M's shape.

    python benchmarks/cohort.py [--tiny]

Random weights, float32 with TensorFloat-32 products as in a study; the aligned protocol on random tokens
in lengths that are GSM8K's, one example a step. The processes begin together, each when its graphs are captured; they
gain by NVIDIA's MPS, where it runs (`nvidia-cuda-mps-control -d`). `--tiny` is a tiny model, on a CPU too.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Iterator
from itertools import chain, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"] = "1"  # torch reads it when it is imported

import torch
from result import write_result
from train import ANSWERS, DEVICE, GIB, PAPER, QUESTIONS, synchronize
from transformers import LlamaConfig, LlamaForCausalLM

from kd.distill.adapter import add_lora
from kd.distill.cohort import Cohort
from kd.distill.step import EagerStep, GraphStep, make_batch, make_step, on_device
from kd.protocol.alignment import Match
from kd.store.head import TeacherHead

SETTINGS = PAPER.distill.model_copy(update={"protocol": "aligned"})
RATE = 5e-6
LIMIT = SETTINGS.max_tokens
PARTS = 5  # of the timed steps, for the spread
MPS = "CUDA_MPS_PIPE_DIRECTORY"


class Work(NamedTuple):
    """What one process does: the model's shape, the examples of an epoch and the timed epochs after the first."""

    llama: LlamaConfig
    examples: int
    epochs: int


def student_and_head(llama: LlamaConfig) -> tuple[Any, TeacherHead]:
    """A student with a new adapter and, for a teacher, a head of the same width."""
    torch.manual_seed(1)
    with torch.device(DEVICE):
        base = LlamaForCausalLM(llama).eval()
        weight = torch.empty(llama.vocab_size, llama.hidden_size).normal_(std=0.01)
        head = TeacherHead(torch.ones(llama.hidden_size), weight, 1e-5)
    return add_lora(base, PAPER, 0.1).train(), head


def make_examples(work: Work) -> tuple[list[Match], dict[str | None, torch.Tensor]]:
    """Aligned matches and, by id, the teacher's states."""
    draw = random.Random(0)
    matches: list[Match] = []
    states: dict[str | None, torch.Tensor] = {}
    for i in range(work.examples):
        question, answer = 1 + QUESTIONS[i % 10], 1 + ANSWERS[i * 7 % 10]
        ids = [draw.randrange(work.llama.vocab_size) for _ in range(question + answer)][:LIMIT]
        matches.append(Match(str(i), ids, question - 1, ids[question:], str(i)))
        states[str(i)] = torch.randn(len(ids) - question, work.llama.hidden_size, dtype=torch.float16)
    return matches, states


def trained(work: Work, students: int | None, ready: Any = None) -> list[float]:
    """Seconds that each part of the timed steps took, of a cohort of so many students or (None) of one alone."""
    student, head = student_and_head(work.llama)
    if students is None:
        step = make_step(student, head, SETTINGS)
    else:
        start = torch.cat([p.detach().flatten() for p in student.parameters() if p.requires_grad])
        cohort = Cohort(student, [start.clone() for _ in range(students)], [SETTINGS] * students)
        step = (GraphStep if DEVICE == "cuda" else EagerStep)(cohort, head, student.device)
    matches, states = make_examples(work)
    rate = torch.full((students or 1, 1), RATE, device=DEVICE) if students else torch.tensor(RATE, device=DEVICE)

    def run(epochs: int) -> Iterator[torch.Tensor]:
        examples = chain.from_iterable(repeat(matches, epochs))
        batches = (make_batch([match] * (students or 1), states.__getitem__, step.bucket) for match in examples)
        for batch in on_device(batches, torch.device(DEVICE)):
            yield step(batch, rate)

    for _ in run(1):  # captures the graphs
        pass
    synchronize()
    if ready:
        ready.wait()
    part, times, since = work.examples * work.epochs // PARTS, [], time.perf_counter()
    for number, _ in enumerate(run(work.epochs), start=1):
        if number % part == 0:
            synchronize()
            times.append(time.perf_counter() - since)
            since = time.perf_counter()
    return times


def apart(work: Work, processes: int) -> list[float]:
    """The parts' seconds when so many processes train one student each; of every part the slowest process's."""
    spawn = get_context("spawn")
    ready = spawn.Barrier(processes)
    results = spawn.SimpleQueue()
    running = [spawn.Process(target=_one_of, args=(work, ready, results)) for _ in range(processes)]
    for process in running:
        process.start()
    times = [results.get() for _ in running]
    for process in running:
        process.join()
    return [max(part) for part in zip(*times, strict=True)]


def _one_of(work: Work, ready: Any, results: Any) -> None:
    results.put(trained(work, None, ready))


def figures_of(work: Work, students: int, times: list[float]) -> dict[str, Any]:
    """Steps a second of all students together, median and spread over the parts."""
    part = work.examples * work.epochs // PARTS
    rates = sorted(students * part / seconds for seconds in times)
    peak = torch.cuda.max_memory_allocated() / GIB if DEVICE == "cuda" else None
    return {"students": students, "steps_s": statistics.median(rates), "least_and_most": [rates[0], rates[-1]]} | (
        {"peak_gib": peak} if peak else {}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on a CPU too")
    tiny = parser.parse_args().tiny
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    if not tiny:
        sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    vocabulary, keys = (1024, 2) if tiny else (49152, 3)
    llama = LlamaConfig(vocab_size=vocabulary, num_key_value_heads=keys, tie_word_embeddings=True, **sizes)
    work = Work(llama, examples=10 if tiny else 50, epochs=PARTS)
    processes, cohorts = (2, (1, 2)) if tiny else (8, (1, 5, 15, 30))

    found = {"alone": figures_of(work, 1, trained(work, None))}
    found[f"{processes} processes"] = figures_of(work, processes, apart(work, processes))
    found[f"{processes} processes"].pop("peak_gib", None)  # this process's, not theirs
    for students in cohorts:
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        found[f"cohort of {students}"] = figures_of(work, students, trained(work, students))
    print(f"{'':<14}  {'steps/s, all students':>22}  {'least to most':>18}  {'over alone':>10}  {'peak GiB':>8}")
    for name, one in found.items():
        spread = "{:.1f} to {:.1f}".format(*one["least_and_most"])
        over, peak = one["steps_s"] / found["alone"]["steps_s"], one.get("peak_gib")
        print(f"{name:<14}  {one['steps_s']:>22.1f}  {spread:>18}  {over:>10.2f}  {f'{peak:.1f}' if peak else '':>8}")
    best, rival = found[f"cohort of {2 if tiny else 15}"]["steps_s"], found[f"{processes} processes"]["steps_s"]
    write_result(
        "cohort-tiny" if tiny else "cohort",
        {"cohort_over_alone": best / found["alone"]["steps_s"], "cohort_over_processes": best / rival},
        {"runs": found, "mps": MPS in os.environ and Path(os.environ[MPS]).exists()},
    )


if __name__ == "__main__":
    main()
