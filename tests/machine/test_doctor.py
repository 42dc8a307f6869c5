"""`kd doctor`: each check against machines that have and lack it, and what `kd prepare` makes of them."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import REPOSITORY
from hub_server import NAME, REVISION, Hub
from params import as_params
from tiny import make_tiny_llama

from kd import config
from kd.cli import main
from kd.machine import doctor, probe
from kd.machine.probe import GIB, Disk, Gpu, Machine, Source
from kd.machine.version import Package
from kd.models import hub

PAPER = config.load_config(REPOSITORY / "profiles" / "paper.yaml")
MINI = config.load_config(REPOSITORY / "profiles" / "mini.yaml")
H100 = Gpu("NVIDIA H100 96GB", 94 * GIB, (9, 0))
# All that the paper's profile needs, and nothing yet on its disks.
FIT = Machine(
    python="3.11.9",
    packages=tuple(Package(name, version, version) for name, version in {"torch": "2.4.0", "peft": "0.12.0"}.items()),
    memory=128 * GIB,
    results=Disk(Path("artifacts/paper"), 100 * GIB, 0, device=1),
    copies=Disk(Path(".dvc/cache"), 100 * GIB, 0, device=1),
    models=Disk(Path("cache"), 320 * GIB, 0, device=2),
    data=Source("openai/gsm8k", "on the Hub"),
    teacher=Source("teacher", "cache/teacher"),
    student=Source("student", "cache/student"),
    gpus=(H100,) * 4,
    driver="550.54.15",
    extension="",
    kernels="",
    vocabularies="",
)


@pytest.fixture(autouse=True)
def _not_in_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KD_ENVIRONMENT", raising=False)


def failed(params: config.Config, **changes: Any) -> dict[str, str]:
    """The checks that fail once FIT has these changes, with their mends."""
    checks = doctor.check(params, dataclasses.replace(FIT, **changes))
    return {check.name: check.mend or "" for check in checks if check.status == "fail"}


def test_a_fit_machine_passes_every_check_of_the_papers_profile() -> None:
    assert {check.status for check in doctor.check(PAPER, FIT)} == {"pass"}
    assert failed(PAPER) == {}


@pytest.mark.parametrize(
    ("changes", "name", "mend"),
    [
        ({"python": "3.12.1"}, "Python", "make the environment with Python 3.11"),
        ({"packages": (Package("torch", "2.4.0", "2.11.0"),)}, "torch", "install torch==2.4.0 from requirements.lock"),
        ({"packages": (Package("exllamav2", "0.1.8", None),)}, "exllamav2", "install exllamav2==0.1.8"),
        ({"gpus": (), "extension": None}, "GPUs", "4 NVIDIA GPUs of 78 GiB or more; CUDA_VISIBLE_DEVICES"),
        ({"gpus": (Gpu("V100", 400 * GIB, (7, 0)),)}, "GPU generation", "compute capability 8.0 or newer"),
        ({"driver": "515.43.04"}, "NVIDIA driver", "update it to 525.60 or newer"),
        ({"driver": "525.59"}, "NVIDIA driver", "update it to 525.60 or newer"),
        ({"gpus": (), "driver": None, "extension": None}, "NVIDIA driver", "install a driver from 525.60 up"),
        ({"extension": "undefined symbol"}, "exllamav2 loads", "a CUDA compiler (nvcc) that builds its extension"),
        ({"memory": 32 * GIB}, "memory", "64 GiB"),
        (
            {"results": Disk(Path("a"), 50 * GIB, 0, 1)},
            "disk for results",
            "make room, or move this whole checkout to a",
        ),
        ({"copies": Disk(Path("b"), 20 * GIB, 0, 3)}, "disk for DVC's copies", "then `dvc cache dir --local FOLDER`"),
        ({"models": Disk(Path("c"), 300 * GIB, 0, 2)}, "disk for models", "make room, or set HF_HUB_CACHE"),
        ({"refusal": "artifacts: a link; make it a folder"}, "place of results", "a link; make it a folder"),
        ({"data": Source("gsm8k", None, "gsm8k: no connection; …")}, "data", "no connection"),
        ({"student": Source("s", None, "s: ask for access")}, "student", "ask for access"),
    ],
)
def test_what_a_machine_lacks_fails_with_its_mend(changes: dict[str, Any], name: str, mend: str) -> None:
    assert mend in failed(PAPER, **changes)[name]


def test_an_image_without_the_extension_names_the_target_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KD_ENVIRONMENT", "/opt/kd/venv")
    assert "docker build --target gpu --tag kd:gpu ." in failed(PAPER, extension="no nvcc")["exllamav2 loads"]


def test_a_machine_without_what_tritons_kernels_need_is_told_and_fits() -> None:
    lacking = dataclasses.replace(FIT, kernels="a C compiler (gcc or clang)")
    (found,) = (check for check in doctor.check(PAPER, lacking) if check.status != "pass")
    assert (found.name, found.status) == ("Triton's kernels", "skipped")
    assert "they need a C compiler (gcc or clang); without them training and answers go on, slower" in found.found
    assert found.mend
    assert {check.name: check.status for check in doctor.check(MINI, FIT)}["Triton's kernels"] == "not needed"


def test_nothing_else_fails_than_what_is_lacking() -> None:
    assert list(failed(PAPER, gpus=(), extension=None)) == ["GPUs"]
    assert list(failed(PAPER, gpus=(H100,) * 3)) == ["GPUs"]
    assert list(failed(PAPER, memory=0)) == ["memory"]


@pytest.mark.parametrize(
    "changes",
    [
        {"packages": (Package("torch", "2.4.0", "2.4.0+cu121"),)},  # a build with its own mark
        {"driver": "525.60.13"},
        {"driver": None},  # no nvidia-smi in the container, but torch sees GPUs
        {"gpus": (Gpu("H100 80GB", 79 * GIB, (9, 0)),) * 8},  # smaller, but more: the teacher is spread over all
        {"gpus": (Gpu("H200", 140 * GIB, (9, 0)),) * 3},  # fewer, but larger
        {"models": Disk(Path("c"), 10 * GIB, 305 * GIB, 2)},  # what is owed has come already
        {"results": Disk(Path("a"), 1 * GIB, 45 * GIB, 1)},  # all results are here, and DVC's copies of them
        {"results": Disk(Path("a"), 31 * GIB, 0, 1), "copies": Disk(Path("b"), 31 * GIB, 0, 3)},  # a disk for each
        {"models": None},  # folders of one's own
        {"teacher": Source("t", "cache"), "student": Source("s", "cache", "no network")},  # nobody need ask the Hub
        {"teacher": Source("t", None)},  # the Hub gives it
    ],
)
def test_what_is_as_good_passes(changes: dict[str, Any]) -> None:
    assert failed(PAPER, **changes) == {}


def test_one_gpu_must_hold_what_is_not_spread() -> None:
    update = {"teacher": MINI.teacher, "student": MINI.student}
    single = PAPER.model_copy(update=update | {"needs": config.Needs(gpus=1, gpu_memory_gib=24)})
    assert failed(single, gpus=(Gpu("L4", 22 * GIB, (8, 9)),) * 2).keys() == {"GPU memory"}
    assert failed(single, gpus=(Gpu("V100", 32 * GIB, (7, 0)),)) == {}  # float32 needs no newer GPU


def test_one_disk_has_to_take_results_and_models() -> None:
    disk = Disk(Path("a"), 350 * GIB, 0, 1)
    found = failed(PAPER, results=disk, copies=disk, models=disk)
    assert found.keys() == {"disk for results", "disk for DVC's copies", "disk for models"}


def test_the_miniature_needs_no_gpu_and_asks_no_network(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("read_gpus", "read_driver", "read_extension", "_refusal"):
        monkeypatch.setattr(probe, name, lambda *_: pytest.fail("not needed"))
    params = str(REPOSITORY / "profiles" / "mini.yaml")
    assert main(["doctor", "--params", params]) == 0
    table = capsys.readouterr().out
    assert "GPUs" in table
    assert "not needed" in table
    assert main(["doctor", "--params", params, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["profile"], document["passed"]) == ("mini", True)
    assert {check["name"]: check["found"] for check in document["checks"]}["torch"] == "2.4.0"


@pytest.fixture
def usual_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """DVC's copies lie where they usually do; DVC, which is not the question, is not started to say so."""
    monkeypatch.setattr(probe, "copies_folder", lambda: Path(".dvc/cache"))


@pytest.fixture
def unfit(usual_copies: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A machine without GPUs, models and network; the paper's profile."""
    del usual_copies
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(probe, "read_gpus", lambda: ())
    monkeypatch.setattr(probe, "read_driver", lambda: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    return str(REPOSITORY / "profiles" / "paper.yaml")


def test_the_papers_profile_stops_at_prepare_and_says_what_is_missing(
    unfit: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", "--params", unfit]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    for lacking in (
        "none visible, 4 needed",
        "neither here nor given by the Hub",
        "no connection",
        "kd: this machine lacks",
    ):
        assert lacking in printed.err
    assert list(tmp_path.iterdir()) == []


def test_the_doctors_verdict_is_its_exit_status_and_json(unfit: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--params", unfit, "--json"]) == 1
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    checks = {check["name"]: check for check in document["checks"]}
    assert not document["passed"]
    assert checks["GPUs"]["status"] == "fail"
    assert checks["exllamav2 loads"]["status"] == "skipped"
    assert all(check["mend"] for check in checks.values() if check["status"] == "fail")
    assert "kd: this machine lacks what the profile needs: GPUs, NVIDIA driver" in printed.err


def test_what_prepare_writes_does_not_depend_on_the_machine(
    write_params: Callable[[dict[str, Any]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = []
    for needs, found in ({}, None), ({"gpus": 4}, FIT), ({"gpus": 4}, dataclasses.replace(FIT, gpus=(H100,) * 8)):
        write_params(as_params(MINI) | {"needs": needs})
        monkeypatch.setattr(doctor, "read_machine", lambda _, found=found: found)
        assert main(["prepare"]) == 0
        written.append({path.name: path.read_bytes() for path in Path("artifacts/mini/data").iterdir()})
    assert written[0] == written[1] == written[2]


def test_gpus_are_those_that_torch_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = SimpleNamespace(name="H100", total_memory=94 * GIB, major=9, minor=0)
    cuda = SimpleNamespace(is_available=lambda: True, device_count=lambda: 2, get_device_properties=lambda _: seen)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert probe.read_gpus() == (Gpu("H100", 94 * GIB, (9, 0)),) * 2
    cuda.is_available = lambda: False
    assert probe.read_gpus() == ()
    monkeypatch.setitem(sys.modules, "torch", None)  # not installed
    assert probe.read_gpus() == ()


@pytest.mark.parametrize(
    ("program", "version"), [("echo 550.54.15; echo 550.54.15", "550.54.15"), ("exit 9", None), (None, None)]
)
def test_the_driver_is_what_nvidia_smi_says(
    program: str | None, version: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    if program:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{program}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    assert probe.read_driver() == version


def test_an_extension_that_does_not_load_says_why_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "exllamav2.py").write_text("raise ImportError('undefined symbol: _ZN2at')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert probe.read_extension() == "ImportError: undefined symbol: _ZN2at"
    (tmp_path / "exllamav2.py").write_text("")
    assert probe.read_extension() == ""


def test_a_model_on_the_hub_is_found_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    server = Hub()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    model = config.HubModel(source="hub", name=NAME, revision=REVISION)
    assert probe.find_model(model) == Source(NAME, None, None)
    server.refuse = 403
    assert "ask for access" in (probe.find_model(model).refusal or "")
    server.refuse = None
    hub.fetch([model])
    assert probe.find_model(model) == Source(NAME, str(hub.snapshot(model)))
    assert not any("safetensors" in path for path in server.paths("hub")[:2])
    data = PAPER.model_copy(
        update={"dataset": PAPER.dataset.model_copy(update={"name": NAME}), "profile": "nowhere-prepared"}
    )
    assert "404" in (probe.find_data(data).refusal or "")
    server.close()


def test_a_folder_of_data_or_of_a_model_must_have_its_files(tmp_path: Path) -> None:
    rows = config.FolderDataset(source="folder", path=str(tmp_path), answers="main", train_rows=1, test_rows=1)
    params = MINI.model_copy(update={"dataset": rows, "profile": "nowhere-prepared"})
    (tmp_path / "train.jsonl").touch()
    assert probe.find_data(params).refusal == f"put {tmp_path / 'test.jsonl'} there"
    (tmp_path / "test.jsonl").touch()
    assert probe.find_data(params).found == str(tmp_path)
    model = config.FolderModel(source="folder", path=str(tmp_path))
    assert probe.find_model(model).found is None
    make_tiny_llama(tmp_path)
    assert probe.find_model(model) == Source(str(tmp_path), str(tmp_path))
    (tmp_path / "config.json").write_text("")
    assert "config.json: not readable as JSON" in (probe.find_model(model).refusal or "")


def test_a_disk_is_found_before_its_folder_is_made(tmp_path: Path) -> None:
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "file").write_bytes(b"12345")
    disk = probe.read_disk(tmp_path / "not" / "made", [tmp_path / "held", tmp_path / "absent"])
    assert (disk.held, disk.device) == (5, tmp_path.stat().st_dev)
    assert disk.free > 0


HUB = {"source": "hub", "name": NAME, "revision": REVISION}
BUNDLED = {"source": "bundled"}


@pytest.mark.parametrize(
    ("teacher", "student", "variable"),
    [(BUNDLED, BUNDLED, "KD_CACHE"), (HUB, HUB, "HF_HUB_CACHE"), (BUNDLED, HUB, "HF_HUB_CACHE")],
)
@pytest.mark.usefixtures("usual_copies")
def test_the_models_disk_is_the_one_that_takes_them_and_the_variable_that_is_named_moves_it(
    teacher: dict[str, str], student: dict[str, str], variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def choose(folder: Path) -> None:
        monkeypatch.setenv("KD_CACHE", str(folder if variable == "KD_CACHE" else tmp_path / "unused"))
        hub_cache = folder if variable == "HF_HUB_CACHE" else tmp_path / "unused"
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub_cache))

    small, large = tmp_path / "small", tmp_path / "large"
    monkeypatch.setattr(probe, "free_bytes", lambda path: 1000 * GIB if path.is_relative_to(large) else GIB)
    monkeypatch.setattr(probe, "read_disk", of_a_disk_each(probe.read_disk))
    monkeypatch.setattr(probe, "_refusal", lambda _: None)
    document = as_params(MINI) | {"needs": {"models_gib": 300}}
    document["teacher"] |= {"model": teacher}
    document["student"] |= {"model": student}
    params = config.Config.model_validate(document)
    choose(small)
    check = {check.name: check for check in doctor.examine(params)}["disk for models"]
    assert check.status == "fail"
    assert f"for {small}" in check.found
    assert check.mend == f"make room, or set {variable} to a folder on a larger disk"
    choose(large)
    assert {check.name: check.status for check in doctor.examine(params)}["disk for models"] == "pass"


def of_a_disk_each(read: Callable[..., Disk]) -> Callable[..., Disk]:
    """As if every folder that is looked at lay on a disk of its own."""
    return lambda path, held: dataclasses.replace(read(path, held), device=hash(path))


@pytest.mark.usefixtures("usual_copies")
def test_models_in_folders_of_ones_own_take_no_disk(tmp_path: Path) -> None:
    document = as_params(MINI) | {"needs": {"models_gib": 10**6}}
    for role in ("teacher", "student"):
        document[role] |= {"model": {"source": "folder", "path": str(tmp_path)}}
    params = config.Config.model_validate(document)
    assert {check.name: check.status for check in doctor.examine(params)}["disk for models"] == "not needed"


def test_a_larger_disk_for_results_or_for_dvcs_copies_mends_what_both_lack_together() -> None:
    one = Disk(Path("a"), 50 * GIB, 0, 1)  # 60 are needed, half of them for the copies
    lacking = failed(PAPER, results=one, copies=one)
    assert lacking.keys() == {"disk for results", "disk for DVC's copies"}
    assert "move this whole checkout to a larger disk" in lacking["disk for results"]
    assert failed(PAPER, results=Disk(Path("a"), 70 * GIB, 0, 1), copies=Disk(Path("b"), 70 * GIB, 0, 1)) == {}
    assert "`dvc cache dir --local FOLDER`" in lacking["disk for DVC's copies"]
    assert failed(PAPER, results=one, copies=Disk(Path("FOLDER"), 40 * GIB, 0, 3)) == {}


def test_the_images_places_are_its_volumes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KD_ENVIRONMENT", "/opt/kd/venv")
    none = Disk(Path("a"), 0, 0, 1)
    mends = failed(PAPER, results=none, copies=none, models=none)
    assert {mend.partition(" at ")[2] for mend in mends.values()} == {"/kd/artifacts", "/models"}
