"""The teacher stage: its store is the teacher's distributions, and nothing else is taken for it."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny_params
from ruamel.yaml import YAML
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import make_tiny_llama

from kd.cli import main
from kd.data.rows import read_examples
from kd.models.load import load_model, load_tokenizer
from kd.paper import PROMPTS
from kd.store import records
from kd.store.reader import TeacherStore

STORE = Path("artifacts/mini/teacher/teacher")
MANIFEST = STORE / "manifest.json"
SHARD = STORE / "states-00000.safetensors"


@pytest.fixture(scope="module")
def stores(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifacts of a folder in which the prompts `teacher` and `base` were captured."""
    with chdir(tmp_path_factory.mktemp("stores")):
        YAML().dump(make_tiny_params(tiny_llama), Path("params.yaml"))
        for command in (["prepare"], ["head"], ["teacher", "teacher"], ["teacher", "base"]):
            assert main(command) == 0
        return Path("artifacts").absolute()


@pytest.fixture
def captured(
    stores: Path, tiny_params: dict[str, Any], write_params: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """A working folder that is a copy of it; its params."""
    write_params(tiny_params)
    shutil.copytree(stores, "artifacts")
    return tiny_params


@pytest.mark.usefixtures("captured")
def test_rebuilt_logits_are_the_teachers_own(tiny_llama: Path) -> None:
    opened = TeacherStore(STORE)
    model = load_model(tiny_llama, "float32", "cpu")
    tokenizer = load_tokenizer(tiny_llama)
    for example in read_examples(Path("artifacts/mini/data/train.jsonl")):
        token_ids = tokenizer(PROMPTS["teacher"] + example.question, add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            expected = model(torch.tensor([token_ids])).logits[0]
        rebuilt = opened.logits(example.id)
        assert rebuilt.shape == (len(token_ids), tokenizer.vocab_size)
        # The state is kept as float16, eleven significant bits.
        assert (rebuilt - expected).abs().max() < 2e-3 * expected.abs().max()


@pytest.mark.usefixtures("captured")
def test_manifest_says_what_the_store_is() -> None:
    manifest = json.loads(MANIFEST.read_text())
    assert manifest["prompt"]["text"].startswith("As a teacher, guide your student")
    assert manifest["model"]["backend"] == "transformers"
    assert manifest["tokenization"]["bos"] is False
    assert [example["id"] for example in manifest["examples"]] == [f"train-{i:05d}" for i in range(1, 13)]


@pytest.mark.usefixtures("captured")
def test_same_bytes_twice() -> None:
    before = {path: path.read_bytes() for path in STORE.parent.rglob("*.*")}
    shutil.rmtree(STORE.parent)
    for command in (["head"], ["teacher", "teacher"], ["teacher", "base"]):
        assert main(command) == 0
    assert {path: path.read_bytes() for path in STORE.parent.rglob("*.*")} == before


def edit_manifest(change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads(MANIFEST.read_text())
    change(manifest)
    del manifest["seal"]
    MANIFEST.write_text(records._sealed(manifest))


def reorder_rows() -> None:
    def swap(manifest: dict[str, Any]) -> None:
        rows = manifest["examples"]
        rows[0], rows[1] = rows[1], rows[0]

    edit_manifest(swap)


def exchange_states() -> None:
    """The manifest is right, but two examples' rows have changed places in the shard."""
    with safe_open(SHARD, "pt") as file:
        states, metadata = file.get_tensor("states"), file.metadata()
    save_file({"states": states.flip(0).contiguous()}, SHARD, metadata)


def flip_a_bit() -> None:
    data = bytearray(SHARD.read_bytes())
    data[-1] ^= 1
    SHARD.write_bytes(data)


def cut_the_shard() -> None:
    SHARD.write_bytes(SHARD.read_bytes()[:-100])


def drop_the_last_row() -> None:
    edit_manifest(lambda manifest: manifest["examples"].pop())


def exchange_stores() -> None:
    base = STORE.with_name("base")
    base.rename(STORE.with_name("moved"))
    STORE.rename(base)
    STORE.with_name("moved").rename(STORE)


def another_question() -> None:
    path = Path("artifacts/mini/data/train.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[4]["question"] += " Really?"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def another_head() -> None:
    path = STORE.with_name("head") / "head.safetensors"
    tensors = load_file(path)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (reorder_rows, "teacher row 1: example 'train-00002' where the data has 'train-00001'"),
        (exchange_states, "states-00000.safetensors: its states are not those that were captured"),
        (flip_a_bit, "states-00000.safetensors: its states are not those that were captured"),
        (cut_the_shard, "states-00000.safetensors: missing or cut short"),
        (SHARD.unlink, "states-00000.safetensors: missing or cut short"),
        (drop_the_last_row, "holds 11 examples where the data has 12"),
        (exchange_stores, "captured with prompt 'base', not 'teacher'"),
        (another_question, "row 5 (train-00005): other tokens than the data's question: token"),
        (another_head, "head.safetensors: missing or not what its manifest says; run `kd head` again"),
        (
            lambda: edit_manifest(lambda m: m.update(version=9)),
            "format version 9, which this version of kd does not",
        ),
        (
            lambda: MANIFEST.write_text(MANIFEST.read_text().replace("torch", "porch")),
            "manifest.json: changed since it",
        ),
        (
            lambda: MANIFEST.write_text("{"),
            "manifest.json: the manifest that `kd teacher teacher` writes is not readable",
        ),
        (MANIFEST.unlink, "manifest.json: no such file"),
    ],
)
@pytest.mark.usefixtures("captured")
def test_store_that_is_not_what_it_should_be_is_refused_before_training(
    damage: Callable[[], None], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    damage()
    monkeypatch.setattr("kd.distill.adapter.load_model", lambda *_: pytest.fail("the student was loaded"))
    assert main(["train", "teacher-kd"]) == 2
    assert message in capsys.readouterr().err
    assert not Path("artifacts/mini/adapters").exists()


def test_store_of_another_tokenizer_or_model_is_refused(
    captured: dict[str, Any],
    write_params: Callable[[dict[str, Any]], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = {"source": "folder", "path": str(make_tiny_llama(tmp_path / "other", vocabulary=420))}
    write_params(captured | {"student": captured["student"] | {"model": other}})
    assert main(["train", "teacher-kd"]) == 2
    assert "the teacher has 400 logits, the student 420" in capsys.readouterr().err
    write_params(captured | {"teacher": captured["teacher"] | {"model": other}})
    assert main(["train", "teacher-kd"]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'other'}, " in error
    assert "the teacher has 420 logits, the student 400" in error


@pytest.mark.parametrize(
    ("quirk", "message"),
    [
        ("bos", "captured without BOS, which `distill.protocol` and its quirks want the other way; run `kd teacher"),
        # As the stores of `aligned` were before answers had an end.
        (
            "no-end",
            "captured without an end token, where `distill.protocol`, its quirks and the student's tokenizer want",
        ),
        ("prompt-offset", "row 1 (train-00001): the rows of tokens ("),
    ],
)
def test_a_quirk_that_is_the_teachers_keeps_other_rows_and_is_refused_without(
    quirk: str,
    message: str,
    tiny_params: dict[str, Any],
    write_params: Callable[[dict[str, Any]], None],
    tiny_llama: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny_params["distill"] |= {"protocol": "aligned", "quirks": [quirk], "epochs": 1}
    write_params(tiny_params)
    for command in (["prepare"], ["head"], ["teacher", "teacher"], ["train", "teacher-kd"]):
        assert main(command) == 0
    opened = TeacherStore(STORE)
    model, tokenizer = load_model(tiny_llama, "float32", "cpu"), load_tokenizer(tiny_llama)
    for example in read_examples(Path("artifacts/mini/data/train.jsonl")):
        primed_ids, question, answer = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (PROMPTS["teacher"] + example.question, example.question, "\n" + example.target)
        )
        answer += [] if quirk == "no-end" else [tokenizer.eos_token_id]
        # The row before the answer, counted as if BOS had been read, or as if the prompt had not.
        first = len(question if quirk == "prompt-offset" else primed_ids)
        read = primed_ids + answer if quirk == "bos" else [tokenizer.bos_token_id, *primed_ids, *answer]
        with torch.inference_mode():
            expected = model(torch.tensor([read])).logits[0, first : first + len(answer)]
        rebuilt = opened.logits(example.id)
        assert rebuilt.shape == expected.shape
        assert (rebuilt - expected).abs().max() < 2e-3 * expected.abs().max()
    capsys.readouterr()
    tiny_params["distill"]["quirks"] = []
    write_params(tiny_params)
    assert main(["train", "teacher-kd"]) == 2
    assert message in capsys.readouterr().err


def test_a_quirk_that_is_not_the_teachers_trains_on_the_store_that_is_there(
    tiny_params: dict[str, Any], write_params: Callable[[dict[str, Any]], None]
) -> None:
    def trained(*quirks: str) -> bytes:
        tiny_params["distill"] |= {"protocol": "aligned", "quirks": list(quirks), "epochs": 1}
        write_params(tiny_params)
        assert main(["train", "teacher-kd"]) == 0
        return Path("artifacts/mini/adapters/teacher-kd-1/adapter_model.safetensors").read_bytes()

    tiny_params["distill"]["protocol"] = "aligned"
    write_params(tiny_params)
    for command in (["prepare"], ["head"], ["teacher", "teacher"]):
        assert main(command) == 0
    before = MANIFEST.read_bytes()
    students = {trained(), trained("label-shift"), trained("teacher-order"), trained("teacher-order", "label-shift")}
    assert len(students) == 4
    card = Path("artifacts/mini/adapters/teacher-kd-1/README.md").read_text()
    assert "- protocol: aligned (but for teacher-order, label-shift)" in card
    assert MANIFEST.read_bytes() == before


def test_unknown_prompt_and_missing_data_exit_2(
    tiny_params: dict[str, Any], write_params: Callable[[dict[str, Any]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    write_params(tiny_params)
    assert main(["teacher", "techer"]) == 2
    assert "techer: unknown prompt" in capsys.readouterr().err
    assert main(["teacher", "teacher"]) == 2
    assert "train.jsonl: no such file; run `kd prepare`" in capsys.readouterr().err


def test_exllamav2_without_a_gpu_is_refused_with_what_to_do(
    tiny_params: dict[str, Any],
    write_params: Callable[[dict[str, Any]], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny_params["teacher"] |= {"backend": "exllamav2", "dtype": "float16", "cache": "q6"}
    write_params(tiny_params)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["head"]) == 2
    error = capsys.readouterr().err
    assert "exllamav2 needs an NVIDIA GPU and none is visible; run on a machine that has one" in error
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "exllamav2", None)
    assert main(["head"]) == 2
    assert "exllamav2 does not import" in capsys.readouterr().err


def changed_weights(llama: Path, folder: Path, change: Callable[[Any], object]) -> Path:
    """The model in another folder, its weights changed."""
    model = load_model(llama, "float32", "cpu")
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder)
    load_tokenizer(llama).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (1e6, r"are as large as \S+, where a store holds float16, up to 65504; choose another `teacher.model`"),
        (float("nan"), r"are not all numbers; look at its weights, or set a wider `teacher.dtype`"),
    ],
)
def test_states_that_float16_does_not_hold_are_refused_and_their_question_is_named(
    tiny_params: dict[str, Any],
    write_params: Callable[[dict[str, Any]], None],
    tiny_llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    scale: float,
    message: str,
) -> None:
    larger = changed_weights(tiny_llama, tmp_path / "large", lambda model: model.model.embed_tokens.weight.mul_(scale))
    tiny_params["teacher"]["model"]["path"] = str(larger)
    write_params(tiny_params)
    assert main(["prepare"]) == 0
    assert main(["head"]) == 0
    assert main(["teacher", "teacher"]) == 2
    assert re.search(rf"kd: train-000\d\d: the teacher's states {message}\n", capsys.readouterr().err)
    assert not STORE.exists()


def test_a_head_that_holds_no_numbers_is_refused(
    tiny_params: dict[str, Any],
    write_params: Callable[[dict[str, Any]], None],
    tiny_llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoilt = changed_weights(tiny_llama, tmp_path / "nan", lambda model: model.lm_head.weight[7, 3].fill_(torch.nan))
    tiny_params["teacher"]["model"]["path"] = str(spoilt)
    write_params(tiny_params)
    assert main(["head"]) == 2
    assert "nan: head.weight is not all finite numbers; mend the weights" in capsys.readouterr().err
