"""Tokens per second of the assessment, beside the notebook's way: `generate`, one row at a time.

    python benchmarks/assess.py [--tiny]

A Llama in the shape of Llama 3.1 8B with random weights, bfloat16, on one GPU; `--tiny`, a very small one on the CPU,
only shows that the benchmark runs. Prompts are random tokens of GSM8K's lengths and no row ends before its limit
(`min_new_tokens` there, no end token here), so the work does not depend on what random weights say. Rows are decoded by
the modules (kd/assess/decode.py) and by the kernels (kd/assess/ahead.py). The batched figures are of whole rows, with
prefill and the capture of CUDA graphs, behind a short run that compiles the kernels; of one row at a time some tokens
are enough. The floor of a decode step is the time of reading the weights once at the bandwidth of a copy on the same
device in the same run.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from result import write_result
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from kd.assess import plain
from kd.assess.ahead import LOOK, AheadDecoder, kernels_for
from kd.assess.decode import SlotDecoder, decode
from kd.assess.row import Row

LIMIT = 350
STEP_ROWS = 64
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "bos_token_id": None,
    "eos_token_id": None,
}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4} | {
    "vocab_size": 512,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}


def main() -> None:
    tiny = "--tiny" in sys.argv
    device, dtype = ("cpu", torch.float32) if tiny else ("cuda", torch.bfloat16)
    one_row_tokens, rows, batch_tokens = (16, 24, 8192) if tiny else (64, 1024, 262144)
    model = random_llama(LLAMA_8B | (TINY if tiny else {}), dtype, device)
    draw = random.Random(1)
    prompts = [[draw.randrange(model.config.vocab_size) for _ in range(draw.randint(45, 180))] for _ in range(rows)]

    one_row = [one_row_rate(model, prompt, one_row_tokens) for prompt in prompts[:4]][1:]  # the first one warms up
    print(f"one row at a time: {statistics.median(one_row):.1f} tokens/s", flush=True)
    kernels = kernels_for(model) or plain
    alike, uneven = [LIMIT] * rows, [draw.randint(20, LIMIT) for _ in range(rows)]
    batched_rate(model, prompts[:STEP_ROWS], alike[:STEP_ROWS], batch_tokens, kernels)  # compiles them
    ways = (("modules", None), ("kernels", kernels), ("kernels again", kernels))
    batched, of_uneven = (
        {way: batched_rate(model, prompts, limits, batch_tokens, operations) for way, operations in ways}
        for limits in (alike, uneven)
    )
    print("batched, tokens/s:", {way: round(rate) for way, rate in batched.items()}, flush=True)
    print(f"of 20 to {LIMIT} tokens, tokens/s:", {way: round(rate) for way, rate in of_uneven.items()}, flush=True)
    by_modules, by_kernels = modules_step(model, STEP_ROWS), kernels_step(model, STEP_ROWS, kernels)
    steps = {way: step_seconds(work) / count for way, (work, count) in (by_modules | by_kernels).items()}
    bandwidth = copy_bandwidth(device)
    weights = sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
    floor = weights / bandwidth
    print(f"weights once: {floor * 1e3:.2f} ms; a decode step of {STEP_ROWS} rows:", flush=True)
    kernel_times = {}
    for way, (work, count) in (by_modules | by_kernels).items():
        kernel_times[way] = breakdown(work, count) if device == "cuda" else {}
        print(f"{way}: {steps[way] * 1e3:.2f} ms", *kernel_lines(kernel_times[way]), sep="\n    ", flush=True)
    write_result(
        "assess-tiny" if tiny else "assess",
        {
            "speedup": batched["kernels"] / statistics.median(one_row),
            "over_modules": batched["kernels"] / batched["modules"],
            "decode_over_floor": steps["kernels"] / floor,
        },
        {
            "one_row_tokens_per_s": {"median": statistics.median(one_row), "values": one_row},
            "batched_tokens_per_s": {"rows": rows, "tokens_per_row": LIMIT, "values": batched},
            "uneven_tokens_per_s": {"rows": rows, "tokens_per_row": f"20 to {LIMIT}", "values": of_uneven},
            "decode_step_ms": {"rows": STEP_ROWS, "position": LIMIT}
            | {way: median * 1e3 for way, median in steps.items()},
            "kernels_ms_a_step": kernel_times,
            "weights_gb": weights / 1e9,
            "copy_gb_per_s": bandwidth / 1e9,
            "floor_ms": floor * 1e3,
        },
    )


def random_llama(shape: dict[str, Any], dtype: torch.dtype, device: str) -> Any:
    """A Llama with random weights, made on the device."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id = None
    return model


def one_row_rate(model: Any, prompt: list[int], tokens: int) -> float:
    """Tokens per second of transformers' generate on one prompt, as the notebook calls it."""
    ids = torch.tensor([prompt], device=model.device)

    def generate() -> None:
        with torch.no_grad():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )

    return tokens / seconds(generate)


def batched_rate(model: Any, prompts: list[list[int]], limits: list[int], batch_tokens: int, operations: Any) -> float:
    """Tokens per second of our decoder on all prompts, each continued by its limit."""
    rows = [Row(i, prompt, limit) for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))]
    length = max(map(len, prompts)) + LIMIT
    steps = decode(model, rows, batch_tokens, length, lambda row: len(row.new) == row.limit, operations=operations)
    taken = seconds(lambda: list(steps))
    assert all(len(row.new) == row.limit for row in rows), [row.failure for row in rows if row.failure]
    return sum(limits) / taken


Work = tuple[Callable[[], object], int]  # and how many decode steps it is


def modules_step(model: Any, rows: int) -> dict[str, Work]:
    """A step for rows that stand at LIMIT, tokens to and from the device included."""
    decoder = SlotDecoder(model, rows, 512)
    newest = {slot: (slot, LIMIT) for slot in range(rows)}
    return {"modules": (torch.inference_mode()(lambda: decoder.step(newest)), 1)}


def kernels_step(model: Any, rows: int, operations: Any) -> dict[str, Work]:
    """A round of steps about LIMIT, with what the host reads of the round before."""
    decoder = AheadDecoder(model, rows, 512, frozenset(), operations)
    active = {slot: Row(slot, [0] * (LIMIT - LOOK // 2), 10**6) for slot in range(rows)}
    decoder.owed = dict.fromkeys(range(rows), 10**6)
    decoder.state.lasts.fill_(511)

    @torch.inference_mode()
    def round_of_steps() -> None:
        decoder.state.positions.fill_(LIMIT - LOOK // 2)
        decoder.launch(active)
        decoder.report(active)

    return {"kernels": (round_of_steps, LOOK)}


def step_seconds(work: Callable[[], object]) -> float:
    """Median seconds of `work`, repeated, without the first times, which record graphs."""
    times = []
    for _ in range(25):
        start = time.perf_counter()
        work()  # it waits for the device where a caller would
        times.append(time.perf_counter() - start)
    return statistics.median(times[5:])


def breakdown(work: Callable[[], object], steps: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each kernel of the GPU in a step, and how often it runs, the longest first."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(3):
            work()
        torch.cuda.synchronize()
    found = [event for event in profiled.key_averages() if event.device_type == DeviceType.CUDA]
    found.sort(key=lambda event: -event.self_device_time_total)
    return {
        event.key[:60]: {"ms": event.self_device_time_total / 3e3 / steps, "times": event.count / 3 / steps}
        for event in found
    }


def kernel_lines(times: dict[str, dict[str, float]], most: int = 14) -> list[str]:
    """The longest of a step's kernels, for a terminal."""
    total = sum(kernel["ms"] for kernel in times.values())
    lines = [f"{kernel['ms']:7.3f} ms {kernel['times']:6.1f} times  {name}" for name, kernel in times.items()]
    return [f"{total:7.3f} ms in kernels", *lines[:most]] if times else []


def copy_bandwidth(device: str) -> float:
    """Bytes per second read and written by a copy of 4 GB on a GPU (64 MB on a CPU), median of ten."""
    source = torch.empty((1 << 32) if device == "cuda" else (1 << 26), dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    taken = [seconds(lambda: target.copy_(source)) for _ in range(13)][3:]
    return 2 * source.numel() / statistics.median(taken)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
