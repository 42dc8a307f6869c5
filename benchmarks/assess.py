"""Tokens per second of the assessment, beside the notebook's way: `generate`, one row at a time.

    python benchmarks/assess.py [--tiny]

A Llama in the shape of Llama 3.1 8B with random weights, bfloat16, on one GPU; `--tiny`, a very small one on the CPU,
only shows that the benchmark runs. Prompts are random tokens of GSM8K's lengths and no row ends before its limit
(`min_new_tokens` there, no end token here), so the work does not depend on what random weights say. The batched figure
is of whole rows, with prefill and the capture of CUDA graphs; of one row at a time some tokens are enough. The floor of
a decode step is the time of reading the weights once at the bandwidth of a copy on the same device in the same run.
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
from transformers import LlamaConfig, LlamaForCausalLM

from kd.assess.decode import Row, SlotDecoder, decode

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
    batched = batched_rate(model, prompts, batch_tokens)
    print(f"batched: {batched:.0f} tokens/s", flush=True)
    step = step_seconds(model, STEP_ROWS)
    bandwidth = copy_bandwidth(device)
    weights = sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
    floor = weights / bandwidth
    print(f"decode step of {STEP_ROWS} rows: {step * 1e3:.2f} ms; weights once: {floor * 1e3:.2f} ms", flush=True)
    write_result(
        "assess-tiny" if tiny else "assess",
        {"speedup": batched / statistics.median(one_row), "decode_over_floor": step / floor},
        {
            "one_row_tokens_per_s": {"median": statistics.median(one_row), "values": one_row},
            "batched_tokens_per_s": {"rows": rows, "tokens_per_row": LIMIT, "value": batched},
            "decode_step_ms": {"rows": STEP_ROWS, "position": LIMIT, "median": step * 1e3},
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


def batched_rate(model: Any, prompts: list[list[int]], batch_tokens: int) -> float:
    """Tokens per second of our decoder on all prompts."""
    rows = [Row(i, prompt, LIMIT) for i, prompt in enumerate(prompts)]
    length = max(map(len, prompts)) + LIMIT
    taken = seconds(lambda: list(decode(model, rows, batch_tokens, length, lambda row: len(row.new) == row.limit)))
    assert all(len(row.new) == LIMIT for row in rows), [row.failure for row in rows if row.failure]
    return len(rows) * LIMIT / taken


def step_seconds(model: Any, rows: int) -> float:
    """Median seconds of a decode step, tokens to and from the device included, for rows that stand at LIMIT."""
    decoder = SlotDecoder(model, rows, 512)
    newest = {slot: (slot, LIMIT) for slot in range(rows)}
    with torch.inference_mode():
        return statistics.median([seconds(lambda: decoder.step(newest)) for _ in range(25)][5:])


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
