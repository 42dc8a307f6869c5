"""What is assessed is what was trained: an adapter that is not is refused by its settings and its header."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import student
from safetensors.torch import load_file, save_file

from kd.cli import main
from kd.config import load_config
from kd.errors import UserError
from kd.models.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_folder

FOLDER = Path("artifacts/mini/adapters/base-kd-1")
AGAIN = "run `kd train base-kd-1` again"
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def adapter(
    tiny_llama: Path, tiny_params: dict[str, Any], write_params: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """An adapter as training leaves it, in a working folder; its settings."""
    write_params(tiny_params)
    tuned = student(tiny_llama, tiny_params["distill"]["lora"]["target_modules"])
    tuned.save_pretrained(FOLDER, save_embedding_layers=False)
    assert adapter_folder(load_config(Path("params.yaml")), "base-kd-1") == FOLDER
    settings: dict[str, Any] = json.loads((FOLDER / ADAPTER_CONFIG).read_text())
    return settings


def refusal() -> str:
    with pytest.raises(UserError) as caught:
        adapter_folder(load_config(Path("params.yaml")), "base-kd-1")
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 8),
        ("lora_alpha", 16),
        ("target_modules", ["q_proj"]),
        ("target_modules", "all-linear"),
        ("base_model_name_or_path", "some/other-model"),
        ("revision", "0" * 40),
        ("peft_type", "IA3"),
        ("task_type", "SEQ_CLS"),
        ("bias", "all"),
        ("use_dora", True),
        ("use_rslora", True),
        ("fan_in_fan_out", True),
        ("modules_to_save", ["lm_head"]),
        ("layers_to_transform", [0]),
        ("layer_replication", [[0, 1]]),
        ("rank_pattern", {"q_proj": 2}),
        ("alpha_pattern", {"q_proj": 2}),
        ("init_lora_weights", "pissa"),
        ("lora_dropout", "x"),
        ("exclude_modules", ["q_proj"]),  # of a newer peft
    ],
)
def test_settings_that_would_merge_something_else(key: str, value: Any, adapter: dict[str, Any]) -> None:
    (FOLDER / ADAPTER_CONFIG).write_text(json.dumps(adapter | {key: value}))
    assert str(FOLDER / ADAPTER_CONFIG) in refusal()
    assert key in refusal()
    assert AGAIN in refusal()


@pytest.mark.parametrize("key", ["r", "lora_alpha", "target_modules", "peft_type", "base_model_name_or_path"])
def test_settings_that_peft_would_fill_in(key: str, adapter: dict[str, Any]) -> None:
    del adapter[key]
    (FOLDER / ADAPTER_CONFIG).write_text(json.dumps(adapter))
    assert f"no {key}; {AGAIN}" in refusal()


@pytest.mark.usefixtures("adapter")
def test_tensors_that_peft_would_pass_over_or_make_up() -> None:
    path = FOLDER / ADAPTER_WEIGHTS
    trained = load_file(path)
    for change, message in (
        ({name: tensor for name, tensor in trained.items() if name != A}, f"{A} missing"),
        ({}, "and 15 more missing"),
        (trained | {"base_model.model.lm_head.weight": torch.zeros(2)}, "lm_head.weight missing, or not of this"),
        ({name.replace("base_model.", ""): tensor for name, tensor in trained.items()}, "missing, or not of this"),
        (trained | {A: torch.zeros(2, 32)}, f"{A} in another shape"),
        (trained | {A: torch.zeros(4, 32, dtype=torch.int8)}, f"{A} not in floating point"),
    ):
        save_file(change, path)
        assert message in refusal()
        assert AGAIN in refusal()


@pytest.mark.usefixtures("adapter")
def test_adapter_files_that_are_cut_or_pointers() -> None:
    for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
        path = FOLDER / name
        whole = path.read_bytes()
        for spoilt in (
            b"",
            whole[:5],
            whole[: len(whole) // 2],
            whole[:-1],
            b"version https://git-lfs.github.com/spec/v1",
        ):
            path.write_bytes(spoilt)
            assert str(path) in refusal()
            assert AGAIN in refusal()
        path.unlink()
        assert f"no {name}; {AGAIN}" in refusal()
        path.write_bytes(whole)
    assert adapter_folder(load_config(Path("params.yaml")), "base-kd-1") == FOLDER


@pytest.mark.usefixtures("adapter")
def test_the_command_refuses_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare"]) == 0
    (FOLDER / ADAPTER_WEIGHTS).write_bytes(b"")
    capsys.readouterr()
    assert main(["assess", "base-kd"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
