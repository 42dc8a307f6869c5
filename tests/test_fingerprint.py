"""One key for all that shapes a result: what DVC watches, what unfinished work is taken up by, what counts as right."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from ruamel.yaml import YAML
from tiny import make_tiny_llama

from kd import fingerprint
from kd.assess.journal import Journal
from kd.cli import main
from kd.distill import train
from kd.errors import UserError
from kd.fingerprint import closure, model_sha256
from kd.teacher.backends.transformers import TransformersTeacher

# The module that does the work of each stage's command.
STAGES = {
    "inputs": "kd.inputs",
    "prepare": "kd.data.gsm8k",
    "head": "kd.teacher.capture",
    "teacher": "kd.teacher.capture",
    "statistics": "kd.analysis.certainty",
    "train": "kd.distill.train",
    "train-control": "kd.distill.train",
    "assess": "kd.assess.run",
    "assess-control": "kd.assess.run",
    "assess-untrained": "kd.assess.run",
    "report": "kd.report.run",
    "attention": "kd.report.attention",
    "audit": "kd.audit.run",
}
PAGE = {REPOSITORY / "kd/report" / f"page.{kind}" for kind in ("css", "html", "js")}  # read by page.py


def stages() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for file in ("dvc.yaml", "audit/dvc.yaml"):
        found |= YAML(typ="safe").load(REPOSITORY / file)["stages"]
    return {name: stage.get("do", stage) for name, stage in found.items()}


def code(deps: list[str]) -> list[set[Path]]:
    """The files of each dependency in kd/, without those that cannot change a result."""
    found = []
    for dep in deps:
        path = REPOSITORY / dep
        if dep.startswith("kd/"):
            assert path.exists(), dep
            files = {path} if path.is_file() else {one for one in path.rglob("*") if one.suffix in (".py", *suffixes())}
            found.append({one for one in files if counts(one)})
    return found


def suffixes() -> set[str]:
    return {path.suffix for path in PAGE}


def counts(path: Path) -> bool:
    if path in PAGE:
        return True
    name = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
    return name not in fingerprint.NEUTRAL and path in closure(name)


def wanted(stage: str) -> set[Path]:
    files = set(closure(STAGES[stage]))
    return files | PAGE if REPOSITORY / "kd/report/page.py" in files else files


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_the_code_that_its_command_imports(stage: str) -> None:
    named = code(stages()[stage]["deps"])
    names = sorted(path.relative_to(REPOSITORY).as_posix() for path in wanted(stage))
    assert set().union(*named) == wanted(stage), f"`deps` of {stage} should be, as folders where it can: {names}"
    for i, one in enumerate(named):  # so that what is taken out is missed
        assert one - set().union(*named[:i], *named[i + 1 :])


def test_every_stage_is_compared() -> None:
    assert set(stages()) == set(STAGES)


@pytest.fixture
def params(
    tiny_params: dict[str, Any], tiny_llama: Path, tmp_path: Path, write_params: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """A working folder with data and a model of its own, in which everything is there but what is tested."""
    shutil.copytree(tiny_llama, tmp_path / "llama")
    tiny_params["teacher"]["model"] = tiny_params["student"]["model"] = {"source": "folder", "path": "llama"}
    tiny_params["distill"]["checkpoint_every"] = 4
    write_params(tiny_params)
    return tiny_params


@dataclass(frozen=True)
class Stage:
    """A command whose work can be gone on with: what comes before it, what it makes, and after how many forwards,
    updates or rows kept it is stopped."""

    before: list[str]
    made: str
    stop: int


INTERRUPTED = {
    "teacher teacher": Stage(["prepare", "head"], "teacher/teacher", 20),
    "train fine-tuning": Stage(["prepare"], "adapters", 6),
    "assess no-distillation": Stage(["prepare"], "logs", 2),
}


@dataclass
class Work:
    """What was done: one entry for each forward, update or keeping of rows. Stops a run at its `limit`."""

    done: list[str] = field(default_factory=list)
    limit: int | None = None

    def note(self, patch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def noted(*arguments: Any, **named: Any) -> Any:
            if len(self.done) == self.limit:
                raise KeyboardInterrupt
            found = original(*arguments, **named)
            self.done.append(name)
            return found

        patch.setattr(owner, name, noted)

    def of(self, command: str, limit: int | None = None) -> int:
        """How much a run of `command` does, stopped at `limit`; unstopped it must end well."""
        self.done, self.limit = [], limit
        assert main(command.split()) == (0 if limit is None else 130)
        return len(self.done)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    found = Work()
    for owner, name in ((TransformersTeacher, "forward"), (train, "Record"), (Journal, "add")):
        found.note(monkeypatch, owner, name)
    return found


def other_weights(_: dict[str, Any], __: pytest.MonkeyPatch) -> None:
    for path in Path("llama").iterdir():
        path.unlink()
    make_tiny_llama(Path("llama"), seed=1)


def other_data(_: dict[str, Any], __: pytest.MonkeyPatch) -> None:
    for split in ("train", "test"):
        path = Path(f"artifacts/mini/data/{split}.jsonl")
        path.write_text(path.read_text().replace("How many", "How few", 1).replace("How much", "How little", 1))


def other_params(params: dict[str, Any], _: pytest.MonkeyPatch) -> None:
    params["teacher"]["batch_rows"] = 2
    params["distill"]["alpha"] = 0.5
    params["untrained"]["no-distillation"]["suffix"] = " Answer:"


def other_libraries(_: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    patch.setattr(fingerprint, "version", lambda library: f"{library}-other")


def other_code(_: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    patch.setattr(fingerprint, "code_sha256", lambda module: f"{module}-other")


def another_device(_: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    patch.setattr(fingerprint, "device_name", lambda: "another")


CHANGES = [other_weights, other_data, other_params, other_libraries, other_code, another_device]


@pytest.fixture
def long(params: dict[str, Any], write_params: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The params with more rows, of which an assessment answers few at a time."""
    params["assess"]["batch_tokens"] = 400
    params["dataset"] |= {"train_rows": 24, "test_rows": 12}
    params["distill"]["epochs"] = 1
    write_params(params)
    return params


@pytest.mark.parametrize("command", INTERRUPTED)
@pytest.mark.usefixtures("long")
def test_what_was_begun_is_gone_on_with(work: Work, command: str) -> None:
    stage = INTERRUPTED[command]
    for name in stage.before:
        assert main([name]) == 0
    whole = work.of(command)
    shutil.rmtree(f"artifacts/mini/{stage.made}")
    work.of(command, stage.stop)
    assert work.of(command) < whole


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("command", INTERRUPTED)
def test_what_was_begun_with_other_inputs_is_not(
    long: dict[str, Any],
    write_params: Callable[[dict[str, Any]], None],
    monkeypatch: pytest.MonkeyPatch,
    work: Work,
    command: str,
    change: Callable[[dict[str, Any], pytest.MonkeyPatch], None],
) -> None:
    stage = INTERRUPTED[command]
    for name in stage.before:
        assert main([name]) == 0
    work.of(command, stage.stop)
    change(long, monkeypatch)
    write_params(long)
    if "head" in stage.before:
        assert main(["head"]) == 0
    begun_anew = work.of(command)
    shutil.rmtree(f"artifacts/mini/{stage.made}")
    assert begun_anew == work.of(command)


@pytest.mark.parametrize("change", CHANGES)
def test_a_store_made_of_other_inputs_is_not_there_and_right(
    params: dict[str, Any],
    write_params: Callable[[dict[str, Any]], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    work: Work,
    change: Callable[[dict[str, Any], pytest.MonkeyPatch], None],
) -> None:
    for command in (["prepare"], ["head"], ["teacher", "teacher"], ["teacher", "teacher"]):
        assert main(command) == 0
    assert "is there and right" in capsys.readouterr().err
    change(params, monkeypatch)
    write_params(params)
    if change is other_weights:
        assert main(["teacher", "teacher"]) == 2
        assert "the head of llama at weights " in capsys.readouterr().err
        assert main(["head"]) == 0
    assert work.of("teacher teacher")


def test_an_adapter_is_not_trained_on_another_teacher_in_the_same_folder(
    params: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["prepare"], ["head"], ["teacher", "teacher"]):
        assert main(command) == 0
    other_weights(params, None)  # type: ignore[arg-type]
    assert main(["train", "teacher-kd"]) == 2
    assert "captured from llama at weights " in capsys.readouterr().err


def test_an_old_store_is_refused_with_one_sentence(params: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    del params
    for command in (["prepare"], ["head"], ["teacher", "teacher"]):
        assert main(command) == 0
    manifest = Path("artifacts/mini/teacher/teacher/manifest.json")
    manifest.write_text(manifest.read_text().replace('"version": 3', '"version": 2'))
    assert main(["train", "teacher-kd"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(
        f"kd: {manifest}: format version 2, which this version of kd does not read; run `kd teacher"
    )


def test_weights_are_read_once_and_again_when_they_change(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    read: list[str] = []
    original = fingerprint.sha256

    def counted(path: Path) -> str:
        read.append(path.suffix)
        return original(path)

    monkeypatch.setattr(fingerprint, "sha256", counted)
    first = model_sha256(folder)
    assert read.count(".safetensors") == 1
    assert model_sha256(folder) == first
    assert read.count(".safetensors") == 1
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(1, 1))
    assert model_sha256(folder) != first
    assert read.count(".safetensors") == 2
    config = folder / "config.json"
    config.write_text(config.read_text() + " ")
    assert read.count(".safetensors") == 2
    (tmp_path / ".model.sha256.json").write_text("[1]")  # what is kept there is only to save time
    assert model_sha256(folder) != first
    assert read.count(".safetensors") == 3


def test_a_cut_file_of_the_hubs_cache_is_refused_and_nothing_is_left_among_its_snapshots(tmp_path: Path) -> None:
    content = b"weights"
    blob = tmp_path / "blobs" / hashlib.sha256(content).hexdigest()
    folder = tmp_path / "snapshots" / "revision"
    blob.parent.mkdir()
    folder.mkdir(parents=True)
    blob.write_bytes(content)
    (folder / "model.safetensors").symlink_to(blob)
    whole = model_sha256(folder)
    assert model_sha256(folder) == whole
    assert list(folder.parent.iterdir()) == [folder]
    blob.write_bytes(content[:-1])
    with pytest.raises(
        UserError, match=rf"model.safetensors: not what the Hub gave.* remove {blob} and fetch it again"
    ):
        model_sha256(folder)
