"""A store of the hidden states that vLLM extracts: written here as its connector writes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import contents
from params import keep
from safetensors.torch import load_file, save_file

from kd.cli import main
from kd.config import load_config
from kd.data.rows import read_examples
from kd.models.load import load_tokenizer, model_folder
from kd.protocol.reading import readings
from kd.store.reader import TeacherStore
from kd.store.records import Reading
from kd.teacher import backends

STORE, SOURCE = Path("artifacts/mini/teacher/base"), Path("extracted")
IMPORT = ["store", "import", str(SOURCE), str(STORE), "--prompt", "base", "--format", "vllm"]


@pytest.fixture
def wanted(on_cpu: None, tiny_params: dict[str, Any], write_params: Callable[[dict[str, Any]], None]) -> list[Reading]:
    """A working folder with the data, the head and vLLM's files of any states; what the teacher reads."""
    del on_cpu
    keep(tiny_params, "base-kd")
    tiny_params["distill"]["protocol"] = "aligned"
    write_params(tiny_params)
    for command in (["prepare"], ["head"]):
        assert main(command) == 0
    config = load_config(Path("params.yaml"))
    tokenizer = load_tokenizer(model_folder(config.teacher.model))
    examples = read_examples(config.artifacts / "data" / "train.jsonl")
    found = readings(config.distill, config.prompts["base"], tokenizer, examples)
    SOURCE.mkdir()
    for number, reading in enumerate(found):
        write(number, reading.token_ids, torch.randn(len(reading.token_ids), 1, 32))
    return found


def write(number: int, token_ids: list[int], states: torch.Tensor) -> None:
    """A request's file, under a name that says nothing of the question."""
    path = SOURCE / f"cmpl-{(number * 7 + 3) % 12:x}-0.safetensors"
    save_file({"hidden_states": states, "token_ids": torch.tensor(token_ids)}, path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_vllms_states_make_a_store_as_a_capture_does(
    wanted: list[Reading], dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = backends.load(load_config(Path("params.yaml")).teacher, 200)
    states = {
        reading.example_id: state.to(dtype)
        for reading, (state,) in zip(wanted, teacher.states([one.token_ids] for one in wanted), strict=True)
    }
    for number, reading in enumerate(wanted):
        last = states[reading.example_id]
        write(number, reading.token_ids, torch.stack([torch.randn_like(last), last], 1))
    save_file({"hidden_states": torch.ones(2, 1, 32), "token_ids": torch.tensor([1, 2])}, SOURCE / "other.safetensors")
    (SOURCE / "cmpl-0-0.safetensors.lock").touch()
    assert main(["store", "tokens", "base.jsonl", "--prompt", "base"]) == 0
    prompts = [json.loads(line) for line in Path("base.jsonl").read_text().splitlines()]
    assert prompts == [{"prompt_token_ids": reading.token_ids} for reading in wanted]
    capsys.readouterr()
    assert main(IMPORT) == 0
    imported = TeacherStore(STORE)
    assert (imported.manifest.kind, imported.manifest.model.versions) == ("states", {"vllm": "unknown"})
    for reading in wanted:
        assert torch.equal(imported.states(reading.example_id), states[reading.example_id][slice(*reading.span)].half())
    logits = imported.head.logits(states["train-00001"].half())[:-1]
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(wanted[0].token_ids[1:]))
    assert f"a token of train-00001 takes {loss:.2f} nats, by a guess 5.99" in capsys.readouterr().err
    if dtype == torch.float16:  # the backend's own states, so the store is that of a capture but for who made it
        shards = {name: data for name, data in contents(STORE).items() if name.suffix == ".safetensors"}
        assert main(["train", "base-kd"]) == 0
        assert main(["teacher", "base"]) == 0
        assert {name: contents(STORE)[name] for name in shards} == shards


def change(file: Path, **tensors: torch.Tensor | None) -> None:
    """Put other tensors into a file; None takes one out."""
    found = load_file(file) | tensors
    save_file({name: tensor for name, tensor in found.items() if tensor is not None}, file)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: change(file, token_ids=torch.tensor([7])), "no file has the "),
        (lambda file: change(file, token_ids=None), "has no token_ids; it is none of vLLM's hidden states"),
        (lambda file: change(file, hidden_states=torch.zeros(3, 1, 32)), "hidden_states are [3, 1, 32] where the "),
        (lambda file: change(file, hidden_states=torch.zeros(3, 32)), "hidden_states are [3, 32] where the "),
        (
            lambda file: change(file, hidden_states=load_file(file)["hidden_states"].int()),
            "hidden_states are I32, not one of F64, F32, F16, BF16",
        ),
        (
            lambda file: change(file, hidden_states=load_file(file)["hidden_states"].to(torch.float8_e4m3fn)),
            "hidden_states are F8_E4M3, not one of",
        ),
        (
            lambda file: change(file, hidden_states=load_file(file)["hidden_states"] * 1e6),
            "where a store holds float16, up to 65504",
        ),
        (lambda file: file.write_bytes(b"half a file"), "not a safetensors file ("),
        (lambda file: [path.unlink() for path in file.parent.iterdir()], "has no .safetensors file"),
        (lambda file: file.parent.rename("elsewhere"), "extracted: no folder; name the `shared_storage_path`"),
    ],
)
@pytest.mark.usefixtures("wanted")
def test_files_that_do_not_fit_are_refused(
    spoil: Callable[[Path], object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(SOURCE / "cmpl-3-0.safetensors")
    capsys.readouterr()
    assert main([*IMPORT[:3], "artifacts", *IMPORT[4:]]) == 2
    assert "artifacts: holds something else than a store, which would be gone" in capsys.readouterr().err
    assert main(IMPORT) == 2
    assert message in capsys.readouterr().err
    assert not STORE.exists()
