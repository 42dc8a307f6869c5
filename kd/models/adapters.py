"""Adapters on disk: where a student's lies, whether it is this student's, and the student with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kd.config import Config, Dtype
from kd.errors import UserError
from kd.io.files import read_json
from kd.models.load import load_model, model_name

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def adapter_folder(config: Config, experiment: str) -> Path | None:
    """The experiment's adapter, refused unless it was trained on this student; None for the bare student.

    It is a LoRA adapter in safetensors: in place of missing weights peft would unpickle another file or ask the Hub,
    and the settings of other kinds can name such files elsewhere.
    """
    name = config.experiments[experiment].adapter
    if name is None:
        return None
    folder, base = config.artifacts / "adapters" / name, model_name(config.student.model)
    if not folder.exists():
        raise UserError(f"{folder}: no such adapter; run `kd train {name}`")
    settings = read_json(folder / "adapter_config.json", "an adapter")
    trained_on, kind = settings.get("base_model_name_or_path"), settings.get("peft_type")
    if trained_on != base:
        raise UserError(f"{folder}: an adapter for {trained_on}, not for the student {base}; train it again")
    if kind != "LORA":
        raise UserError(f"{folder}: an adapter of the kind {kind}, not LORA; run `kd train {name}` again")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise UserError(f"{folder}: no {ADAPTER_WEIGHTS}; run `kd train {name}` again")
    return folder


def with_adapter(model: Any, adapter: Path, name: str = "default") -> Any:
    """The model, or the `PeftModel` it is already, with one more LoRA adapter before its weights.

    `adapter` must come from `adapter_folder`, which refuses what peft would unpickle.
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return PeftModel.from_pretrained(model, adapter, adapter_name=name)
    model.load_adapter(str(adapter), adapter_name=name)
    return model


def load_student(folder: Path, dtype: Dtype, adapter: Path | None, device: str) -> Any:
    """The student, with an adapter merged into its weights in memory where one is given."""
    model = load_model(folder, dtype, device)
    return model if adapter is None else with_adapter(model, adapter).merge_and_unload()
