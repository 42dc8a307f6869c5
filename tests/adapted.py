"""A student with an adapter, and what it learns from, without the pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from kd.protocol.alignment import Match
from kd.store.head import TeacherHead

VOCABULARY = 400


def student(
    folder: Path,
    targets: list[str],
    dropout: float = 0.0,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    std: float = 0.1,
) -> Any:
    """The folder's model with an adapter, seeded, whose B is not zero but of deviation `std`."""
    torch.manual_seed(3)
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=targets)
    base = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=getattr(torch, dtype)).to(device)
    model = get_peft_model(base, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    return model.train()


def teacher_head() -> TeacherHead:
    """A teacher's, seeded."""
    torch.manual_seed(5)
    return TeacherHead(torch.rand(24), torch.randn(VOCABULARY, 24), 1e-5)


def examples() -> tuple[list[Match], dict[str, torch.Tensor]]:
    """Three of random tokens, and the teacher's states by id."""
    torch.manual_seed(4)
    matches, states = [], {}
    for i, (length, first, rows) in enumerate([(9, 0, 7), (14, 5, 9), (5, 2, 3)]):
        ids, labels = (torch.randint(VOCABULARY, (n,)).tolist() for n in (length, rows))
        matches.append(Match(f"train-{i}", ids, first, labels, f"train-{i}"))
        states[f"train-{i}"] = torch.randn(rows, 24).half()
    return matches, states
