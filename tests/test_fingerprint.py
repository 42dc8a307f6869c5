"""One key for all that shapes a result: what DVC watches, what unfinished work is taken up by, what counts as right."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, make_tiny_params
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


@cache
def counts(path: Path) -> bool:
    if path in PAGE:
        return True
    name = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
    return name not in fingerprint.NEUTRAL and path in closure(name)


@cache
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


@pytest.fixture(scope="module")
def prepared(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with data, a head and a model of its own; an assessment answers few of its rows at a time."""
    folder = tmp_path_factory.mktemp("prepared")
    shutil.copytree(tiny_llama, folder / "llama")
    params = make_tiny_params(tiny_llama)
    params["teacher"]["model"] = params["student"]["model"] = {"source": "folder", "path": "llama"}
    params["dataset"] |= {"train_rows": TRAIN_ROWS, "test_rows": TEST_ROWS}
    params["distill"] |= {"epochs": 1, "checkpoint_every": 4}
    params["assess"]["batch_tokens"] = 400
    YAML().dump(params, folder / "params.yaml")
    run_in(folder, "prepare", "head")
    return folder


def run_in(folder: Path, *commands: str) -> None:
    with pytest.MonkeyPatch.context() as here:
        here.chdir(folder)
        for command in commands:
            assert main(command.split()) == 0


@dataclass(frozen=True)
class Stage:
    """A command whose work can be gone on with: how many rows it goes through, and after how many it is stopped."""

    rows: int
    stop: int


TRAIN_ROWS, TEST_ROWS = 24, 12
INTERRUPTED = {
    "teacher teacher": Stage(TRAIN_ROWS, 20),
    "train fine-tuning": Stage(TRAIN_ROWS, 6),
    "assess no-distillation": Stage(TEST_ROWS, 6),
}


@dataclass
class Work:
    """How many rows were done: those of each forward, update or keeping. Stops a run at its `limit`."""

    done: int = 0
    limit: int | None = None

    def note(self, patch: pytest.MonkeyPatch, owner: Any, name: str, rows: Callable[..., int]) -> None:
        original = getattr(owner, name)

        def noted(*arguments: Any, **named: Any) -> Any:
            if self.limit is not None and self.done >= self.limit:
                raise KeyboardInterrupt
            found = original(*arguments, **named)
            self.done += rows(*arguments)
            return found

        patch.setattr(owner, name, noted)

    def of(self, command: str, limit: int | None = None) -> int:
        """How much a run of `command` does, stopped at `limit`; unstopped it must end well."""
        self.done, self.limit = 0, limit
        assert main(command.split()) == (0 if limit is None else 130)
        return self.done


def noted(patch: pytest.MonkeyPatch) -> Work:
    found = Work()
    found.note(patch, TransformersTeacher, "forward", lambda _, batch: len(batch))
    found.note(patch, train, "Record", lambda *_: 1)
    found.note(patch, Journal, "add", lambda _, responses: len(responses))
    return found


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    return noted(monkeypatch)


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


@pytest.fixture(scope="module", params=INTERRUPTED)
def command(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def begun(command: str, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of that folder where the command was stopped."""
    folder = shutil.copytree(prepared, tmp_path_factory.mktemp("begun"), dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        noted(patch).of(command, INTERRUPTED[command].stop)
    return folder


def work_in_copy(made: Path, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Let the working folder be a copy of one that was made."""
    shutil.copytree(made, folder, dirs_exist_ok=True)
    patch.chdir(folder)


@pytest.fixture
def in_begun(begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work_in_copy(begun, tmp_path, monkeypatch)


@pytest.mark.usefixtures("in_begun")
def test_what_was_begun_is_gone_on_with(work: Work, command: str) -> None:
    assert work.of(command) < INTERRUPTED[command].rows


def make(change: Callable[[dict[str, Any], pytest.MonkeyPatch], None], patch: pytest.MonkeyPatch) -> None:
    """Make a change in the working folder."""
    params = YAML(typ="safe").load(Path("params.yaml"))
    change(params, patch)
    YAML().dump(params, Path("params.yaml"))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.usefixtures("in_begun")
def test_what_was_begun_with_other_inputs_is_not(
    monkeypatch: pytest.MonkeyPatch,
    work: Work,
    command: str,
    change: Callable[[dict[str, Any], pytest.MonkeyPatch], None],
) -> None:
    make(change, monkeypatch)
    if command.startswith("teacher"):
        assert main(["head"]) == 0
    assert work.of(command) == INTERRUPTED[command].rows


@pytest.fixture(scope="module")
def captured(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the prepared folder with a teacher's store."""
    folder = shutil.copytree(prepared, tmp_path_factory.mktemp("captured"), dirs_exist_ok=True)
    run_in(folder, "teacher teacher")
    return folder


@pytest.fixture
def in_captured(captured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work_in_copy(captured, tmp_path, monkeypatch)


@pytest.mark.usefixtures("in_captured")
def test_a_store_made_of_the_same_inputs_is_there_and_right(capsys: pytest.CaptureFixture[str], work: Work) -> None:
    assert work.of("teacher teacher") == 0
    assert "is there and right" in capsys.readouterr().err


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.usefixtures("in_captured")
def test_a_store_made_of_other_inputs_is_not_there_and_right(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    work: Work,
    change: Callable[[dict[str, Any], pytest.MonkeyPatch], None],
) -> None:
    make(change, monkeypatch)
    if change is other_weights:
        assert main(["teacher", "teacher"]) == 2
        assert "the head of llama at weights " in capsys.readouterr().err
        assert main(["head"]) == 0
    assert work.of("teacher teacher")


@pytest.mark.usefixtures("in_captured")
def test_an_adapter_is_not_trained_on_another_teacher_in_the_same_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make(other_weights, monkeypatch)
    assert main(["train", "teacher-kd"]) == 2
    assert "captured from llama at weights " in capsys.readouterr().err


@pytest.mark.usefixtures("in_captured")
def test_an_old_store_is_refused_with_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
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
