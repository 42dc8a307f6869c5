"""A student's adapter: made, and written with a card that says what it is."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from kd.config import Config
from kd.io.files import write_text
from kd.models.load import default_device, load_model, model_folder, model_name
from kd.protocol.alignment import Matches

VERSIONS = ("torch", "transformers", "peft")


def fresh_student(config: Config, run: str) -> Any:
    """The student with a new adapter, seeded, on the device it is trained on."""
    device, adapter = default_device(), config.adapters[run]
    torch.manual_seed(adapter.seed)  # for LoRA's initialisation and dropout
    base = load_model(model_folder(config.student.model), config.student.dtype, device)
    return add_lora(base, config, adapter.dropout).train()


def add_lora(base: Any, config: Config, dropout: float) -> Any:
    """The student with a fresh adapter on its attention projections; only the adapter is trained."""
    from peft import LoraConfig, get_peft_model

    lora = config.distill.lora
    base.name_or_path = model_name(config.student.model)
    return get_peft_model(
        base,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=dropout,
            target_modules=lora.target_modules,
            revision=getattr(config.student.model, "revision", None),
        ),
    )


def save_adapter(student: Any, config: Config, run: str, matches: Matches, folder: Path) -> None:
    """PEFT's own format, the same bytes each time, with a card that says what the adapter is."""
    for adapter in student.peft_config.values():
        adapter.target_modules = sorted(adapter.target_modules)  # PEFT keeps a set, whose order changes by process
    # "auto" would ask the Hub whether the base model's vocabulary was resized; it never is here.
    student.save_pretrained(folder, save_embedding_layers=False)
    write_text(folder / "README.md", _card(config, run, matches))


def counts(matches: Matches) -> str:
    """How many examples are trained on, and which are not as they were."""
    said = f"{len(matches.kept)} examples"
    if matches.cut:
        said += f"; {len(matches.cut)} longer than `max_tokens` and cut to it ({_some(matches.cut)})"
    if matches.skipped:
        said += f"; {len(matches.skipped)} left out, no answer position within it ({_some(matches.skipped)})"
    return said


def _some(ids: list[str]) -> str:
    return ", ".join(ids[:5]) + (", …" if len(ids) > 5 else "")


def _card(config: Config, run: str, matches: Matches) -> str:
    adapter, settings, data = config.adapters[run], config.distill, config.dataset
    base = model_name(config.student.model)
    source = f"teacher store `teacher/{adapter.prompt}`" if adapter.prompt else "labels alone (no teacher)"
    text = config.prompts[adapter.prompt].strip() if adapter.prompt else ""
    prompt = f"- prompt of its teacher: {text or 'none'}\n" if adapter.prompt else ""
    quirks = f" (but for {', '.join(settings.quirks)})" if settings.quirks else ""
    llama = "\nBuilt with Llama.\n" if "llama-3" in base.lower() else ""
    versions = ", ".join(f"{name} {version(name)}" for name in VERSIONS)
    return f"""---
base_model: {base}
library_name: peft
---
# {run}

A LoRA adapter of {base}, trained by `kd train {run}` (profile {config.profile}).
{llama}
- learns from: {source}
{prompt}- data: {data.train_rows} rows, {data.source}, {data.answers} answers; {counts(matches)}
- protocol: {settings.protocol}{quirks}, {settings.divergence}, T {settings.temperature}, alpha {settings.alpha}, \
{settings.epochs} epoch{"s" if settings.epochs > 1 else ""}, {settings.batch_rows} examples an update
- seed: {adapter.seed}
- versions: {versions}
"""
