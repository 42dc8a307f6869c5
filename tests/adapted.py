"""A student with an adapter, without the pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


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
