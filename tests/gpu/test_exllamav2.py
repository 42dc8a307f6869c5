"""The exllamav2 backend on a GPU: skipped, with the reason, wherever there is none."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import begin

from kd.cli import main
from kd.config import load_config
from kd.data.rows import read_examples
from kd.models.load import load_tokenizer
from kd.paper import PROMPTS
from kd.protocol.reading import teacher_reading
from kd.store.reader import TeacherStore
from kd.teacher import backends

pytestmark = [
    pytest.mark.usefixtures("gpu"),
    pytest.mark.skipif(find_spec("exllamav2") is None, reason="needs exllamav2"),
]

STORE = Path("artifacts/mini/teacher/teacher")


@pytest.fixture
def ready(gpu_params: dict[str, Any], write_params: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    gpu_params["teacher"] |= {"backend": "exllamav2", "dtype": "float16", "cache": "q6"}
    gpu_params["dataset"]["train_rows"] = 40
    write_params(gpu_params)
    for command in (["prepare"], ["head"]):
        assert main(command) == 0
    return gpu_params


@pytest.mark.usefixtures("ready")
def test_rebuilt_logits_are_exllamav2s_own() -> None:
    assert main(["teacher", "teacher"]) == 0
    config = load_config(Path("params.yaml"))
    examples = read_examples(Path("artifacts/mini/data/train.jsonl"))
    tokenizer = load_tokenizer(Path(config.teacher.model.path))  # type: ignore[union-attr]
    loaded: Any = backends.load(config.teacher, longest=256)
    norm, head = loaded.final_modules()
    opened = TeacherStore(STORE)
    opened.head = opened.head.to("cuda")
    for example in examples[:8]:
        own = loaded.model.forward(
            torch.tensor([teacher_reading(tokenizer, "published", PROMPTS["teacher"], example).token_ids])
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
    pair = [begin("teacher", "teacher", RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    for process in pair:
        _, said = process.communicate()
        assert process.returncode == 0, said
    assert {path.name: path.read_bytes() for path in STORE.iterdir()} == expected


@pytest.mark.usefixtures("ready")
def test_a_killed_capture_goes_on_and_ends_in_the_same_bytes() -> None:
    assert main(["teacher", "teacher"]) == 0
    expected = {path.name: path.read_bytes() for path in STORE.iterdir()}
    STORE.rename("one")
    process = begin("teacher", "teacher")
    while not list(Path("artifacts").glob("mini/teacher/.partial/*/*/states-*.safetensors")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert main(["teacher", "teacher"]) == 0
    assert {path.name: path.read_bytes() for path in STORE.iterdir()} == expected
