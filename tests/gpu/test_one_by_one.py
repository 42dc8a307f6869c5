"""One question a forward, as CUDA graphs by length: the bits of the model's own forward, whatever is recorded."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import contents

from kd.cli import main
from kd.config import FolderModel, Teacher
from kd.models.load import load_model
from kd.teacher.backends import transformers as backend

pytestmark = pytest.mark.usefixtures("gpu")


def own_states(model: Any, token_ids: list[int]) -> torch.Tensor:
    """What transformers' own forward gives the final norm."""
    seen: list[torch.Tensor] = []
    hook = model.model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    with torch.inference_mode():
        model(torch.tensor([token_ids], device="cuda"))
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("graphs", [3, 100])
def test_the_states_are_the_models_own_bit_for_bit(
    gpu_llama: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any, graphs: int
) -> None:
    monkeypatch.setattr(backend, "GRAPHS", graphs)
    model = load_model(gpu_llama, dtype, "cuda")
    teacher = backend.TransformersTeacher(
        Teacher(backend="transformers", model=FolderModel(source="folder", path=str(gpu_llama)), dtype=dtype)
    )
    draw = random.Random(0)
    questions = [[draw.randrange(401) for _ in range(draw.choice((1, 2, 17, 32, 33, 61)))] for _ in range(60)]
    found = [states for (states,) in teacher.states([question] for question in questions)]
    for question, states in zip(questions, found, strict=True):
        assert torch.equal(states, own_states(model, question))


def test_a_store_captured_one_by_one_has_the_bytes_of_the_launched_forward(
    gpu_params: dict[str, Any],
    write_params: Callable[[dict[str, Any]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu_params["teacher"]["batch_rows"] = 1
    write_params(gpu_params)
    store = Path("artifacts/mini/teacher/teacher")
    for stage in (["prepare"], ["head"], ["teacher", "teacher"]):
        assert main(stage) == 0
    recorded = contents(store)
    for path in store.iterdir():
        path.unlink()
    store.rmdir()
    monkeypatch.setattr(backend.ByLength, "__call__", lambda self, ids: self._run(ids))
    assert main(["teacher", "teacher"]) == 0
    assert contents(store) == recorded
