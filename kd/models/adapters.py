"""Adapters on disk: where a student's lies, whether it is what was trained, and the student with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kd.config import Config, Dtype, Lora
from kd.errors import UserError
from kd.models.check import check_folder
from kd.models.load import load_model, model_folder, model_name
from kd.models.settings import Settings, read_object
from kd.models.weights import FLOATS, projections, read_header, some

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# What PEFT writes beside what params say of an adapter. With other values it would merge something else, read other
# files, or pass over tensors without a word.
PLAIN: dict[str, Any] = {
    "alpha_pattern": {},
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "megatron_config": None,
    "modules_to_save": None,
    "peft_type": "LORA",
    "rank_pattern": {},
    "use_dora": False,
    "use_rslora": False,
}
UNREAD = ("auto_mapping", "inference_mode", "lora_dropout", "megatron_core")  # in merging
WRITTEN = ("base_model_name_or_path", "lora_alpha", "lora_dropout", "peft_type", "r", "target_modules")


def adapter_folder(config: Config, experiment: str) -> Path | None:
    """The experiment's adapter, refused unless it is whole and what `kd train` makes of these params for this student;
    None for the bare student.

    peft fills up what an adapter lacks with fresh weights, which change nothing, and would unpickle another file.
    """
    name = config.experiments[experiment].adapter
    if name is None:
        return None
    folder = config.artifacts / "adapters" / name
    if not folder.exists():
        raise UserError(f"{folder}: no such adapter; run `kd train {name}`")
    mend = f"run `kd train {name}` again"
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):  # peft would unpickle another file in place of weights
        if not (folder / file).is_file():
            raise UserError(f"{folder}: no {file}; {mend}")
    _check_settings(folder / ADAPTER_CONFIG, config, mend)
    student = check_folder(model_folder(config.student.model), "transformers").settings
    _check_tensors(folder / ADAPTER_WEIGHTS, student, config.distill.lora, mend)
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


def _check_settings(path: Path, config: Config, mend: str) -> None:
    """Refuse an adapter's settings that are not those which these params train."""
    wanted, settings = _wanted(config), read_object(path, mend)
    if missing := set(WRITTEN) - settings.keys():
        raise UserError(f"{path}: no {some(missing)}; {mend}")
    if type(settings["lora_dropout"]) not in (int, float):
        raise UserError(f"{path}: lora_dropout is {settings['lora_dropout']!r}, no number; {mend}")
    for key, value in settings.items():
        if key in UNREAD or (key == "task_type" and value in (None, "CAUSAL_LM")):
            continue
        if key not in wanted:
            raise UserError(f"{path}: {key} {value!r}, of which `kd train` knows nothing; {mend}")
        if _in_order(value) != wanted[key]:
            raise UserError(f"{path}: {key} is {value!r}, not {wanted[key]!r} as these params train it; {mend}")


def _wanted(config: Config) -> dict[str, Any]:
    """The settings of an adapter that these params train."""
    lora, model = config.distill.lora, config.student.model
    return PLAIN | {
        "base_model_name_or_path": model_name(model),
        "revision": getattr(model, "revision", None),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": sorted(lora.target_modules),
    }


def _in_order(value: Any) -> Any:
    """A list of names in their order, which means nothing."""
    return sorted(value) if isinstance(value, list) and all(isinstance(one, str) for one in value) else value


def _check_tensors(path: Path, student: Settings, lora: Lora, mend: str) -> None:
    """Refuse an adapter that has not exactly the tensors of `lora` on every layer of the student."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(student.layers):
        for name, (out, into) in projections(student).items():
            if name.rpartition(".")[2] in lora.target_modules:
                module = f"base_model.model.model.layers.{layer}.{name}"
                shapes[f"{module}.lora_A.weight"] = (lora.rank, into)
                shapes[f"{module}.lora_B.weight"] = (out, lora.rank)
    found = read_header(path, mend).tensors
    if wrong := shapes.keys() ^ found.keys():
        raise UserError(f"{path}: {some(wrong)} missing, or not of this student; {mend}")
    if wrong := {name for name, shape in shapes.items() if found[name].shape != shape}:
        raise UserError(f"{path}: {some(wrong)} in another shape than rank and student make it; {mend}")
    if wrong := {name for name, tensor in found.items() if tensor.dtype not in FLOATS}:
        raise UserError(f"{path}: {some(wrong)} not in floating point; {mend}")
