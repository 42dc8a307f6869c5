"""Stores and the notebooks' files: each becomes the other; and what `kd store inspect` says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from params import keep
from safetensors.torch import load_file, save_file

from kd.cli import main
from kd.store.reader import TeacherStore

STORE = Path("artifacts/mini/teacher/base")
FILE = Path("base.safetensors")


@pytest.fixture
def exported(
    on_cpu: None, tiny_params: dict[str, Any], write_params: Callable[[dict[str, Any]], None]
) -> dict[str, torch.Tensor]:
    """A working folder with a store and the notebooks' file made of it; its tensors. Where these are compared, their
    bits are the CPU's."""
    del on_cpu
    write_params(tiny_params)
    for command in (["prepare"], ["head"], ["teacher", "base"], ["store", "export", str(STORE), str(FILE)]):
        assert main(command) == 0
    return load_file(FILE)


def test_export_is_the_notebooks_own_file(exported: dict[str, torch.Tensor]) -> None:
    opened = TeacherStore(STORE)
    assert len(exported) == 12
    for number, example in enumerate(opened.manifest.examples, start=1):
        logits = exported[f"Question {number}"]
        assert logits.dtype == torch.float16
        assert torch.equal(logits[0].float(), opened.logits(example.id).half().float())
    save_file(exported, "theirs.safetensors")
    assert FILE.read_bytes() == Path("theirs.safetensors").read_bytes()


def test_an_imported_store_trains_like_any_other(exported: dict[str, torch.Tensor]) -> None:
    logits = {example.id: TeacherStore(STORE).logits(example.id) for example in TeacherStore(STORE).manifest.examples}
    assert main(["store", "import", str(FILE), str(STORE), "--prompt", "base"]) == 0
    opened = TeacherStore(STORE)
    assert (opened.manifest.kind, opened.head.vocabulary_size) == ("logits", exported["Question 1"].shape[2])
    for example_id, expected in logits.items():
        assert torch.equal(opened.logits(example_id), expected.half().float())
    assert main(["train", "base-kd"]) == 0
    assert main(["store", "export", str(STORE), "again.safetensors"]) == 0
    assert Path("again.safetensors").read_bytes() == FILE.read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("Question 12"), "holds 11 tensors where the data has 12 questions"),
        (lambda t: t.update({"Question 13": t.pop("Question 12")}), "has no 'Question 12'"),
        (lambda t: t.update({"Question 3": t["Question 3"].float()}), "'Question 3' is float32 [1, "),
        (lambda t: t.update({"Question 3": t["Question 3"][:, 1:].clone()}), "tokens of train-00003 need float16 [1, "),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    change: Callable[[dict[str, torch.Tensor]], object],
    message: str,
    exported: dict[str, torch.Tensor],
    capsys: pytest.CaptureFixture[str],
) -> None:
    change(exported)
    save_file(exported, FILE)
    before = {path.name: path.read_bytes() for path in STORE.iterdir()}
    assert main(["store", "import", str(FILE), str(STORE), "--prompt", "base"]) == 2
    assert message in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in STORE.iterdir()} == before


@pytest.mark.usefixtures("exported")
def test_inspect_verifies_and_says_what_a_store_holds(capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["store", "inspect", str(STORE), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["examples"], found["shards"], found["kind"], found["verified"]) == (12, 1, "states", True)
    assert found["rows"] == sum(len(example.token_ids) for example in TeacherStore(STORE).manifest.examples)
    assert main(["store", "inspect", str(STORE)]) == 0
    assert "12 examples" in capsys.readouterr().out
    shard = STORE / "states-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[9] ^= 1  # in its header
    shard.write_bytes(data)
    assert main(["store", "inspect", str(STORE)]) == 2
    assert "states-00000.safetensors: its states are not those that were captured" in capsys.readouterr().err


def test_prompt_statistics_are_the_originals(
    tiny_params: dict[str, Any],
    write_params: Callable[[dict[str, Any]], None],
    exported: dict[str, torch.Tensor],
    capsys: pytest.CaptureFixture[str],
) -> None:
    keep(tiny_params, "base-kd", "no-distillation")
    write_params(tiny_params)
    chosen = [exported[name][0].float() for name in sorted(exported)[::5]]  # as `safe_open(...).keys()` gives them
    expected = torch.cat([logits.softmax(-1).max(-1)[0] for logits in chosen]).mean()
    capsys.readouterr()
    assert main(["statistics", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["base"]
    assert found["mean_max_probability"] == pytest.approx(float(expected), rel=1e-3)
    assert found["questions"] == 3
    assert main(["statistics"]) == 0
    assert f"{found['mean_max_probability']:.4f}" in capsys.readouterr().out.splitlines()[-1]
