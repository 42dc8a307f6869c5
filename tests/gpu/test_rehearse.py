"""`kd rehearse` on a GPU: by CUDA graphs, with a teacher of either backend; skipped where there is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from kd.cli import main
from kd.machine.shapes import EXL2, Shape, llama_config

pytestmark = pytest.mark.usefixtures("gpu")
SHAPE = Shape(hidden=256, inner=512, layers=6, heads=4, kv_heads=2, vocabulary=401, context=2048)


def rehearsed(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    status = main(["rehearse", "--json", "--price", "10"])
    said = capsys.readouterr()
    assert status == 0, said.err
    assert list(Path("artifacts").glob(".rehearse-*")) == []
    found: dict[str, Any] = json.loads(said.out)
    assert found["seconds"] > 0
    for stage in found["stages"]:
        if stage["stage"] in ("head", "teacher", "train", "assess"):
            assert 0 < max(stage["gpu_gib"]) <= torch.cuda.get_device_properties(0).total_memory / 2**30
            assert stage["one_s"] > 1
    return found


def test_a_teacher_of_transformers(
    gpu_params: dict[str, Any],
    write_params: Callable[[dict[str, Any]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    for role in ("teacher", "student"):
        gpu_params[role]["dtype"] = "bfloat16"
    write_params(gpu_params)
    rehearsed(capsys)


@pytest.mark.skipif(find_spec("exllamav2") is None, reason="needs exllamav2")
def test_a_quantized_teacher(
    gpu_params: dict[str, Any],
    write_params: Callable[[dict[str, Any]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = Path("only-a-config")
    gpu_params["teacher"] |= {"backend": "exllamav2", "dtype": "float16", "batch_rows": 2}
    gpu_params["teacher"]["model"] = {"source": "folder", "path": str(folder)}
    write_params(gpu_params)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(llama_config(SHAPE, "float16", EXL2)))
    rehearsed(capsys)
