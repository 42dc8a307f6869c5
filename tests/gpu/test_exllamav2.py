"""The exllamav2 backend on a GPU: skipped, with the reason, wherever there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_tiny_llama

from kd import models
from kd.cli import main
from kd.config import load_config
from kd.dataset import read_examples
from kd.teacher import backends, capture
from kd.teacher.store import TeacherStore

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)
if find_spec("exllamav2") is None:
    pytest.skip("needs exllamav2 (requirements.lock's extra of that name)", allow_module_level=True)

STORE = Path("artifacts/mini/teacher/teacher")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sizes that exllamav2's kernels take; its 401 tokens are not a multiple of 32, so the head is padded."""
    return make_tiny_llama(
        tmp_path_factory.mktemp("llama"),
        vocabulary=401,
        hidden_size=256,
        intermediate_size=512,
        initializer_range=0.05,
    )


@pytest.fixture
def ready(llama: Path, tiny_params: dict[str, Any], write_params: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    model = {"source": "folder", "path": str(llama)}
    tiny_params["teacher"] = {"backend": "exllamav2", "model": model, "dtype": "float16", "cache": "q6"}
    tiny_params["student"]["model"] = model
    tiny_params["dataset"]["train_rows"] = 40
    write_params(tiny_params)
    for command in (["prepare"], ["head"]):
        assert main(command) == 0
    return tiny_params


@pytest.mark.usefixtures("ready")
def test_rebuilt_logits_are_exllamav2s_own() -> None:
    assert main(["teacher", "teacher"]) == 0
    config = load_config(Path("params.yaml"))
    examples = read_examples(Path("artifacts/mini/data/train.jsonl"))
    tokenizer = models.load_tokenizer(Path(config.teacher.model.path))  # type: ignore[union-attr]
    loaded: Any = backends.load(config.teacher, longest=256)
    norm, head = loaded.final_modules()
    opened = TeacherStore(STORE)
    opened.head = opened.head.to("cuda")
    for example in examples[:8]:
        own = loaded.model.forward(
            torch.tensor([capture.teacher_reading(tokenizer, "published", "teacher", example).token_ids])
        )[0]
        with torch.inference_mode():
            through_modules = head.forward(norm.forward(opened.states(example.id).cuda()[None]))[0]
        vocabulary = opened.head.vocabulary_size
        assert torch.equal(through_modules[:, :vocabulary], own[:, :vocabulary])
        rebuilt = opened.logits(example.id)
        assert (rebuilt - own[:, :vocabulary]).abs().max() <= 2e-3 * own[:, :vocabulary].abs().max()


def test_batches_stay_near_one_question_at_a_time(
    ready: dict[str, Any], write_params: Callable[[dict[str, Any]], None]
) -> None:
    assert main(["teacher", "teacher"]) == 0
    alone = TeacherStore(STORE)
    STORE.rename("alone")
    Path("artifacts/mini/teacher/head").rename("head")
    ready["teacher"]["batch_rows"] = 16
    write_params(ready)
    assert main(["head"]) == 0
    assert main(["teacher", "teacher"]) == 0
    together = TeacherStore(STORE)
    alone.folder = Path("alone")
    for example in alone.manifest.examples:
        expected = alone.states(example.id).float()
        assert (together.states(example.id).float() - expected).abs().max() < 0.05 * expected.std()


@pytest.mark.usefixtures("ready")
def test_two_processes_make_the_same_store_as_one() -> None:
    assert main(["teacher", "teacher"]) == 0
    expected = {path.name: path.read_bytes() for path in STORE.iterdir()}
    STORE.rename("one")
    command = [sys.executable, "-m", "kd.cli", "teacher", "teacher"]
    pair = [subprocess.Popen(command, env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2"}) for rank in range(2)]
    assert [process.wait() for process in pair] == [0, 0]
    assert {path.name: path.read_bytes() for path in STORE.iterdir()} == expected
