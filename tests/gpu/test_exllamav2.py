"""The exllamav2 backend on one GPU and several: skipped, with the reason, wherever there is none."""

from __future__ import annotations

import gc
import shutil
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import begin, contents, run
from safetensors.torch import save_file

from kd.cli import main
from kd.config import Teacher
from kd.data.rows import read_examples
from kd.machine.random_exl2 import random_tensor, random_weights, tensors, write_folder
from kd.machine.shapes import LLAMA_8B, Shape
from kd.models.load import load_tokenizer, pad_right
from kd.models.settings import read_settings
from kd.models.weights import EMBEDDING
from kd.paper import PROMPTS
from kd.protocol.reading import teacher_reading
from kd.store.reader import TeacherStore
from kd.teacher import backends
from kd.teacher.backends.placement import GIB, LIBRARIES, Forward

pytestmark = [
    pytest.mark.usefixtures("gpu"),
    pytest.mark.skipif(find_spec("exllamav2") is None, reason="needs exllamav2"),
]

STORE = Path("artifacts/mini/teacher/teacher")
SHAPE = Shape(hidden=256, inner=512, layers=6, heads=4, kv_heads=2, vocabulary=401, context=2048)


@pytest.fixture(scope="session")
def exl2(gpu_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random quantized model, as files."""
    folder = tmp_path_factory.mktemp("exl2")
    write_folder(folder, SHAPE)
    devices = {name: "cpu" if name == EMBEDDING else "cuda" for name in tensors(folder)}
    made = {name: random_tensor(name, *about, devices[name]).cpu() for name, about in tensors(folder).items()}
    (file,) = folder.glob("*.safetensors")
    save_file(made, file)
    for path in gpu_llama.glob("*token*"):
        shutil.copy(path, folder)
    return folder


def prepare(params: dict[str, Any], write_params: Callable[[dict[str, Any]], None], model: Path) -> dict[str, Any]:
    """Everything that a capture by exllamav2 needs."""
    params["teacher"] |= {"backend": "exllamav2", "dtype": "float16"}
    params["teacher"]["model"] = {"source": "folder", "path": str(model)}
    params["dataset"]["train_rows"] = 40
    write_params(params)
    for command in (["prepare"], ["head"]):
        assert main(command) == 0
    return params


@pytest.fixture
def ready(
    gpu_params: dict[str, Any], write_params: Callable[[dict[str, Any]], None], gpu_llama: Path
) -> dict[str, Any]:
    return prepare(gpu_params, write_params, gpu_llama)


@pytest.fixture
def ready_exl2(
    gpu_params: dict[str, Any], write_params: Callable[[dict[str, Any]], None], exl2: Path
) -> dict[str, Any]:
    return prepare(gpu_params, write_params, exl2)


def library_model(folder: Path, rows: int = 1) -> Any:
    """The library's own model, loaded in its own way."""
    import exllamav2

    settings = exllamav2.ExLlamaV2Config(str(folder))
    settings.max_batch_size, settings.max_input_len = rows, 256
    model = exllamav2.ExLlamaV2(settings)
    model.load_autosplit(exllamav2.ExLlamaV2Cache(model, max_seq_len=256, lazy=True))
    return model


@pytest.mark.usefixtures("ready")
def test_rebuilt_logits_are_exllamav2s_own(gpu_llama: Path) -> None:
    assert main(["teacher", "teacher"]) == 0
    examples = read_examples(Path("artifacts/mini/data/train.jsonl"))
    tokenizer = load_tokenizer(gpu_llama)
    model = library_model(gpu_llama)
    norm, head = model.modules[model.head_layer_idx - 1 :]
    opened = TeacherStore(STORE)
    opened.head = opened.head.to("cuda")
    for example in examples[:8]:
        own = model.forward(
            torch.tensor([teacher_reading(tokenizer, "published", PROMPTS["teacher"], example).token_ids])
        )[0]
        with torch.inference_mode():
            through_modules = head.forward(norm.forward(opened.states(example.id).cuda()[None]))[0]
        vocabulary = opened.head.vocabulary_size
        assert torch.equal(through_modules[:, :vocabulary], own[:, :vocabulary])
        rebuilt = opened.logits(example.id)
        assert (rebuilt - own[:, :vocabulary]).abs().max() <= 2e-3 * own[:, :vocabulary].abs().max()


@pytest.mark.parametrize("rows", [1, 3])
def test_one_gpu_two_and_four_give_the_librarys_own_states(
    ready_exl2: dict[str, Any], write_params: Callable[[dict[str, Any]], None], exl2: Path, rows: int
) -> None:
    ready_exl2["teacher"]["batch_rows"] = rows
    write_params(ready_exl2)
    assert main(["head"]) == 0
    stores = []
    for count in (1, 2, 4):
        if count <= torch.cuda.device_count():
            shutil.rmtree(STORE, ignore_errors=True)
            run("teacher", "teacher", CUDA_VISIBLE_DEVICES=",".join(map(str, range(count))))
            stores.append(contents(STORE))
    assert all(store == stores[0] for store in stores)
    model, opened = library_model(exl2, rows), TeacherStore(STORE)
    examples = opened.manifest.examples
    for start in range(0, len(examples), 16):  # a shard, in which questions of like length share a forward
        shard = sorted(examples[start : start + 16], key=lambda one: -len(one.token_ids))
        for batch in (shard[i : i + rows] for i in range(0, len(shard), rows)):
            ids = pad_right([example.token_ids for example in batch], 33)
            _, own = model.forward(ids, last_id_only=True, return_last_state=True)
            for example, states in zip(batch, own, strict=True):
                assert torch.equal(opened.states(example.id), states[: len(example.token_ids)].cpu())


def test_weights_made_as_they_are_asked_for_are_those_of_files(exl2: Path, gpu_llama: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "made", SHAPE)
    for path in gpu_llama.glob("*token*"):
        shutil.copy(path, tmp_path / "made")
    batches = [[list(range(50)), list(range(100, 140))], [list(range(7, 60))]]
    found = []
    for folder in (exl2, tmp_path / "made"):
        document = {"backend": "exllamav2", "dtype": "float16", "batch_rows": 2}
        teacher = Teacher.model_validate(document | {"model": {"source": "folder", "path": str(folder)}})
        if folder == exl2:
            found.append(list(backends.load(teacher, 64).states(batches)))
        else:
            with random_weights():
                found.append(list(backends.load(teacher, 64).states(batches)))
    for batch, other in zip(*found, strict=True):
        assert all(torch.equal(states, same) for states, same in zip(batch, other, strict=True))
        assert all(states.isfinite().all() for states in batch)


def test_a_forward_takes_no_more_memory_than_is_reckoned(gpu_llama: Path, tmp_path: Path) -> None:
    write_folder(tmp_path, LLAMA_8B._replace(layers=4, vocabulary=SHAPE.vocabulary))
    for path in gpu_llama.glob("*token*"):
        shutil.copy(path, tmp_path)
    teacher = Teacher.model_validate(
        {"backend": "exllamav2", "dtype": "float16", "batch_rows": 8}
        | {"model": {"source": "folder", "path": str(tmp_path)}}
    )
    gc.collect()
    before = torch.cuda.memory_allocated()
    with random_weights():
        loaded: Any = backends.load(teacher, 256)
    weights = sum(
        module.weight_footprint() for stage in loaded._stages if stage.device == 0 for module in stage.modules
    )
    torch.cuda.reset_peak_memory_stats()
    list(loaded.states([[[7] * 256] * 8] * 3))
    beside = torch.cuda.max_memory_allocated() - before - weights
    reckoned = Forward(read_settings(tmp_path), quantized=True, rows=8, tokens=256).size() - LIBRARIES
    print(f"beside the weights {beside / GIB:.3f} GiB, reckoned {reckoned / GIB:.3f}")
    assert beside <= reckoned + LIBRARIES // 4


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


@pytest.mark.usefixtures("ready_exl2")
def test_two_processes_make_the_same_store_as_one() -> None:
    assert main(["teacher", "teacher"]) == 0
    expected = contents(STORE)
    STORE.rename("one")
    pair = [begin("teacher", "teacher", RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    for process in pair:
        _, said = process.communicate()
        assert process.returncode == 0, said
    assert contents(STORE) == expected


@pytest.mark.usefixtures("ready_exl2")
def test_a_killed_capture_goes_on_and_ends_in_the_same_bytes() -> None:
    assert main(["teacher", "teacher"]) == 0
    expected = contents(STORE)
    STORE.rename("one")
    process = begin("teacher", "teacher")
    while not list(Path("artifacts").glob("mini/teacher/.partial/*/*/states-*.safetensors")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert main(["teacher", "teacher"]) == 0
    assert contents(STORE) == expected


@pytest.mark.usefixtures("ready_exl2")
def test_a_stage_that_fails_ends_all_and_the_same_command_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from exllamav2.mlp import ExLlamaV2MLP

    assert main(["teacher", "teacher"]) == 0
    expected = contents(STORE)
    STORE.rename("one")
    forward, calls = ExLlamaV2MLP.forward, iter(range(10**6))

    def failing(self: Any, *arguments: Any, **more: Any) -> Any:
        if self.layer_idx == SHAPE.layers - 1 and next(calls) == 25:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return forward(self, *arguments, **more)

    monkeypatch.setattr(ExLlamaV2MLP, "forward", failing)
    assert main(["teacher", "teacher"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "illegal memory access" in last
    assert "1 of 3 shards are kept" in last
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("stage")]
    assert main(["teacher", "teacher"]) == 0
    assert contents(STORE) == expected


@pytest.mark.usefixtures("ready_exl2")
def test_what_does_not_fit_is_refused_before_it_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (GIB // 2, GIB))
    assert main(["teacher", "teacher"]) == 2
    assert "GiB free; take GPUs with more memory, or a smaller teacher" in capsys.readouterr().err
