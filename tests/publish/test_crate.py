"""`kd publish crate` and `kd publish verify`: what goes into a crate, what it says of itself, and what is refused."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZIP_BZIP2, ZIP_DEFLATED, ZipFile, ZipInfo

import numpy as np
import pytest
from crates import ARTIFACTS, LORA, METADATA, PREVIEW, rewritten, write_checkout, write_lock
from dvc_data.hashfile.hash_info import HashInfo
from dvc_data.hashfile.tree import Tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rocrate.rocrate import ROCrate
from ruamel.yaml import YAML
from safetensors.numpy import save_file

from kd.cli import main
from kd.errors import UserError
from kd.publish.lock import dvc_md5
from kd.publish.verify import verify

CRATE = Path("kd-mini.zip")
LOG = "artifacts/mini/logs/base-kd-1.csv"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with results and their crate."""
    folder = tmp_path_factory.mktemp("checkout")
    write_checkout(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["publish", "crate", str(CRATE)]) == 0
    return folder


@pytest.fixture
def checkout(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it without the crate, the working folder."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns(CRATE.name))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def crate(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The crate alone, in a working folder that has nothing else."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copy(whole / CRATE, tmp_path))


@pytest.fixture(scope="module")
def described(whole: Path) -> dict[str, dict[str, Any]]:
    """Its description: every entity by its identifier."""
    with ZipFile(whole / CRATE) as archive:
        graph = json.loads(archive.read(METADATA))["@graph"]
    assert len({entity["@id"] for entity in graph}) == len(graph)
    return {entity["@id"]: entity for entity in graph}


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence with which kd refuses."""
    capsys.readouterr()
    assert main(["publish", *arguments]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    return said


def names(crate: Path) -> set[str]:
    with ZipFile(crate) as archive:
        return set(archive.namelist())


def every(entity: dict[str, Any], key: str) -> list[str]:
    """The identifiers that a property refers to."""
    value = entity.get(key, [])
    return [one["@id"] for one in (value if isinstance(value, list) else [value])]


def test_a_crate_has_what_was_made_and_by_what(whole: Path) -> None:
    found = names(whole / CRATE)
    assert {"LICENSE", "NOTICE", "params.yaml", "dvc.yaml", "dvc.lock", "requirements.lock", PREVIEW, METADATA} < found
    assert {f"artifacts/mini/report/{name}" for name in ("results.json", "results.md", "index.html")} < found
    assert {"artifacts/mini/data/test.jsonl", "artifacts/mini/runs/report.json", LOG} < found
    assert "artifacts/mini/adapters/base-kd-1/adapter_model.safetensors" in found
    assert not [name for name in found if name.startswith(("kd/", ".", "artifacts/mini/teacher"))]


def test_rocrates_reader_finds_every_file_with_its_size_and_checksum(whole: Path, tmp_path: Path) -> None:
    with ZipFile(whole / CRATE) as archive:
        archive.extractall(tmp_path)
    read = ROCrate(tmp_path)
    files = {entity.id: entity for entity in (*read.data_entities, read.preview) if "sha256" in entity.properties()}
    assert files.keys() | {METADATA} == names(whole / CRATE)
    for name, entity in files.items():
        content = (tmp_path / name).read_bytes()
        assert (int(entity["contentSize"]), entity["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert read.root_dataset["author"]["name"] == "The kd authors"
    assert read.license.id == "https://spdx.org/licenses/MIT"
    assert "trained students" in read.description
    assert read.mainEntity.id == "dvc.yaml"


def test_it_is_what_the_provenance_run_crate_profile_says(described: dict[str, dict[str, Any]]) -> None:
    """The musts of RO-Crate 1.1 and of Process, Workflow and Provenance Run Crate 0.5."""
    root, metadata = described["./"], described[METADATA]
    assert every(metadata, "about") == ["./"]
    assert "https://w3id.org/ro/crate/1.1" in every(metadata, "conformsTo")
    assert {"name", "description", "datePublished", "license"} <= root.keys()
    for profile in every(root, "conformsTo"):
        assert described[profile]["@type"] == "CreativeWork"
    wanted = {f"https://w3id.org/ro/wfrun/{level}/0.5" for level in ("process", "workflow", "provenance")}
    assert wanted < set(every(root, "conformsTo"))
    workflow = described[every(root, "mainEntity")[0]]
    assert {"File", "SoftwareSourceCode", "ComputationalWorkflow"} == set(workflow["@type"])
    assert described[every(workflow, "programmingLanguage")[0]]["@type"] == "ComputerLanguage"
    actions = [entity for entity in described.values() if entity["@type"] == "CreateAction"]
    assert {action["@id"] for action in actions} == set(every(root, "mentions"))
    tools = {tool for action in actions for tool in every(action, "instrument")}
    assert tools == {workflow["@id"], *every(workflow, "hasPart")}
    for action in actions:
        assert every(action, "result")
        for part in every(action, "object") + every(action, "result"):
            assert {"File", "Dataset"} & {described[part]["@type"], *described[part]["@type"]}
        assert action["startTime"] <= action["endTime"]
    for entity in described.values():  # each data entity is a part of the root, or of a part of it
        if entity["@type"] == "Dataset":
            assert all(part in described for part in every(entity, "hasPart"))
    parts = {part for entity in described.values() if entity["@type"] == "Dataset" for part in every(entity, "hasPart")}
    files = {name for name, entity in described.items() if "sha256" in entity and name != PREVIEW}
    assert files < parts


def test_a_run_is_an_action_of_its_command(described: dict[str, dict[str, Any]]) -> None:
    train = described["#run/train/base-kd-1"]
    assert "artifacts/mini/data/test.jsonl" in every(train, "object")
    assert every(train, "result") == ["artifacts/mini/adapters/base-kd-1/"]
    assert train["startTime"] == "2026-01-02T00:00:00+00:00"
    tool = described[every(train, "instrument")[0]]
    assert tool["@type"] == "SoftwareApplication"
    assert [described[one]["name"] for one in every(tool, "softwareRequirements")][:2] == ["python", "torch"]
    report = described["#run/report"]
    assert {"artifacts/mini/adapters/", "artifacts/mini/logs/", "params.yaml"} < set(every(report, "object"))
    assert report["endTime"] == described["./"]["datePublished"]


def test_the_same_results_give_the_same_bytes(whole: Path, checkout: Path) -> None:
    for path in checkout.rglob("*"):
        os.utime(path, (1, 1))
    assert main(["publish", "crate", str(CRATE)]) == 0
    assert CRATE.read_bytes() == (whole / CRATE).read_bytes()


@pytest.mark.usefixtures("checkout")
def test_what_may_not_be_passed_on_stays_out(whole: Path) -> None:
    published = Path("data/published/ai-KD.csv")
    for path in (
        published,
        ARTIFACTS / "logs/ai-KD.csv",
        ARTIFACTS / "report/ai-KD.csv",
        Path("artifacts/audit/x.html"),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("question,model_answer\n")
    for folder in ("adapters/base-kd-1", "adapters/another-1", "teacher/head", "inputs", "attention"):
        (ARTIFACTS / folder).mkdir(parents=True, exist_ok=True)
        save_file({"lm_head.weight": np.ones((4, 2))}, ARTIFACTS / folder / "model.safetensors")
    (ARTIFACTS / "adapters/base-kd-1/optimizer.bin").write_bytes(b"0")
    write_lock()
    assert main(["publish", "crate", str(CRATE)]) == 0
    assert names(CRATE) == names(whole / CRATE)


@pytest.mark.usefixtures("checkout")
def test_a_published_log_under_another_name_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = ARTIFACTS / "attention" / "attention.csv"
    log.parent.mkdir()
    log.write_text("as published\n")
    write_lock()
    monkeypatch.setattr("kd.publish.agreement.SHA256", {"ai-KD.csv": hashlib.sha256(log.read_bytes()).hexdigest()})
    said = refused(capsys, "crate", str(CRATE))
    assert said.startswith(f"kd: {log}: the paper's ai-KD.csv, which carries no licence")
    assert not CRATE.exists()


@pytest.mark.usefixtures("checkout")
def test_an_adapter_that_holds_a_models_weights_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    weights = ARTIFACTS / "adapters/base-kd-1/adapter_model.safetensors"
    save_file(LORA | {"base_model.model.lm_head.weight": np.ones((4, 2))}, weights)
    assert main(["report"]) == 0
    write_lock()
    said = refused(capsys, "crate", str(CRATE))
    assert said.startswith(f"kd: {weights}: base_model.model.lm_head.weight not of a LoRA adapter")


def another_length() -> None:
    path = Path(LOG)
    path.write_text(path.read_text().replace(",5,False,", ",6,False,"))
    write_lock()


def another_score() -> None:
    path = Path(LOG)
    path.write_text(path.read_text().replace("99", "2"))
    write_lock()


def another_rate() -> None:
    params = YAML(typ="safe").load(Path("params.yaml"))
    params["distill"]["learning_rate"] = 0.1
    YAML().dump(params, Path("params.yaml"))


def another_adapter() -> None:
    with (ARTIFACTS / "adapters/base-kd-1/README.md").open("a") as file:
        file.write("And more.\n")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (another_length, "base-kd-1.csv: not what artifacts/mini/report/index.html was made of; run `dvc repro`"),
        (another_score, "not what the logs and params come to; run `dvc repro`"),
        (another_rate, "params.yaml: distill: another value than artifacts/mini/"),
        (another_adapter, "adapters/base-kd-1: not what dvc.lock has of it; run `dvc checkout` to have that back"),
        (lambda: (ARTIFACTS / "runs/report.json").unlink(), "runs/report.json: no such file"),
        (lambda: shutil.rmtree("artifacts"), "report/results.json: no such file"),
        (lambda: Path("dvc.lock").unlink(), "dvc.lock: no such file; `dvc repro` writes it"),
        (lambda: Path("NOTICE").unlink(), "NOTICE: no such file; start kd in the package's checkout"),
        (lambda: Path("CITATION.cff").write_text("title: x\nlicense: MIT\n"), "CITATION.cff: authors: missing"),
        (lambda: (ARTIFACTS / "runs/report.json").write_text("[]"), "runs/report.json: not the record of a run"),
    ],
)
@pytest.mark.usefixtures("checkout")
def test_stale_or_missing_results_are_refused(
    change: Callable[[], object], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change()
    assert said in refused(capsys, "crate", str(CRATE))
    assert not CRATE.exists()


@pytest.mark.usefixtures("checkout")
def test_a_crate_is_called_a_zip_and_lies_beside_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert "give it a name that ends in .zip" in refused(capsys, "crate", "params.yaml")
    within = ARTIFACTS / "report" / CRATE
    assert f"{within}: lies among the results and would change them" in refused(capsys, "crate", str(within))
    assert not within.exists()


@pytest.mark.usefixtures("checkout")
def test_captures_come_along_when_asked_for_and_without_the_teachers_head(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = YAML(typ="safe").load(Path("params.yaml"))
    params["teacher"]["model"] = params["student"]["model"] = {"source": "folder", "path": str(tiny_llama)}
    params["dataset"] |= {"train_rows": 4}
    YAML().dump(params, Path("params.yaml"))
    tests = (ARTIFACTS / "data/test.jsonl").read_bytes()
    for command in ("prepare", "head", "teacher base"):
        assert main(command.split()) == 0
    (ARTIFACTS / "data/test.jsonl").write_bytes(tests)
    assert main(["report"]) == 0
    write_lock()
    capsys.readouterr()
    assert main(["publish", "crate", "with.zip", "--with-stores"]) == 0
    said = capsys.readouterr().err
    assert "captures are 0.0 MB of with.zip" in said
    assert f"folders of this machine: teacher.model.path {tiny_llama}, student.model.path {tiny_llama}\n" in said
    stores = {name for name in names(Path("with.zip")) if "/teacher/" in name and "/runs/" not in name}
    assert stores == {f"artifacts/mini/teacher/base/{name}" for name in ("manifest.json", "states-00000.safetensors")}
    assert main(["publish", "verify", "with.zip"]) == 0
    assert main(["publish", "crate", "without.zip"]) == 0
    assert names(Path("with.zip")) - names(Path("without.zip")) == stores


@pytest.mark.usefixtures("checkout")
def test_large_crates_show_how_far_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kd.publish.crate.SHOWN_BYTES", 0)
    for command in ("crate", "verify"):
        assert main(["publish", command, str(CRATE)]) == 0
        assert f"{command}: 100%" in capsys.readouterr().err


def test_a_crate_holds_anywhere(crate: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["publish", "verify", str(crate)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{crate}: holds: {len(names(crate)) - 1} files, ")
    assert out.endswith("the table of profile mini, 4 rows, comes out of its logs again\n")
    assert err == ""
    assert list(crate.parent.iterdir()) == [crate]  # nothing is left beside it
    again = rewritten(crate, method=ZIP_DEFLATED, more=[("artifacts/", b"")])
    assert main(["publish", "verify", str(again)]) == 0


@pytest.mark.parametrize("name", [LOG, METADATA, PREVIEW, "LICENSE"])
def test_a_flipped_byte_is_named(crate: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with ZipFile(crate) as archive:
        content, place = archive.read(name), archive.getinfo(name).header_offset
    raw = bytearray(crate.read_bytes())
    raw[raw.index(content, place) + len(content) // 2] ^= 1
    crate.write_bytes(raw)
    assert refused(capsys, "verify", str(crate)).startswith(f"kd: {crate}: {name} is damaged (Bad CRC-32 ")


@pytest.mark.parametrize("name", [LOG, PREVIEW, "LICENSE"])
def test_a_byte_changed_on_purpose_is_named(crate: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with ZipFile(crate) as archive:
        changed = bytearray(archive.read(name))
    changed[len(changed) // 2] ^= 1
    said = refused(capsys, "verify", str(rewritten(crate, {name: bytes(changed)})))
    assert f"{name} is not the file that {METADATA} describes, by its SHA-256; fetch it again" in said


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_byte_anywhere_is_told_in_a_sentence(crate: Path, data: st.DataObject) -> None:
    """Or it is one of those in a zip's own tables that say nothing of a file's content, such as its time."""
    raw = bytearray(crate.read_bytes())
    tables = raw.index(b"PK\x01\x02")
    place = data.draw(st.integers(tables, len(raw) - 1) | st.integers(len(raw) - 22, len(raw) - 1) | st.integers(0, 60))
    raw[place] ^= data.draw(st.integers(1, 255))
    broken = crate.with_name("broken.zip")
    broken.write_bytes(raw)
    try:
        said = verify(broken)
    except UserError as error:
        said = str(error)
    assert said.startswith(f"{broken}")
    broken.write_bytes(raw[: data.draw(st.integers(0, len(raw) - 1))])
    with pytest.raises(UserError, match=r"broken\.zip"):
        verify(broken)


def described_anew(crate: Path, name: str, content: bytes) -> dict[str, bytes | None]:
    """A changed file, and the description made to fit."""
    with ZipFile(crate) as archive:
        document = json.loads(archive.read(METADATA))
    for entity in document["@graph"]:
        if entity["@id"] == name:
            entity |= {"contentSize": str(len(content)), "sha256": hashlib.sha256(content).hexdigest()}
    return {name: content, METADATA: json.dumps(document).encode()}


def test_results_that_the_logs_do_not_come_to_are_refused(crate: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = "artifacts/mini/report/results.json"
    with ZipFile(crate) as archive:
        document, log = json.loads(archive.read(results)), archive.read(LOG)
    document["experiments"]["base-kd"]["runs"][0]["correct"] += 1
    changed = rewritten(crate, described_anew(crate, results, json.dumps(document).encode()))
    said = refused(capsys, "verify", str(changed))
    assert f"{results}: experiments.base-kd.runs.0.correct: not what the logs and params come to" in said
    changed = rewritten(crate, described_anew(crate, LOG, log.replace(b"99", b"6")))
    assert f"{results}: experiments.base-kd.accuracy: not what" in refused(capsys, "verify", str(changed))
    changed = rewritten(crate, described_anew(crate, LOG, b"question\n"))
    assert f"changed.zip: {LOG}" in refused(capsys, "verify", str(changed))
    check = "artifacts/mini/adapters/base-kd-1/check.json"
    changed = rewritten(crate, described_anew(crate, check, b"[]"))
    assert "changed.zip: artifacts/mini: check.base-kd-1: expected a mapping" in refused(capsys, "verify", str(changed))


def link(name: str) -> ZipInfo:
    info = ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("../evil.txt", b"x"), "'../evil.txt' is no name of a file within a crate"),
        (("/etc/evil", b"x"), "'/etc/evil' is no name of a file within a crate"),
        (("a\\..\\evil", b"x"), "is no name of a file within a crate"),
        (("C:evil", b"x"), "is no name of a file within a crate"),
        (("a/" * 120 + "b", b"x"), "is no name of a file within a crate"),
        (("LICENSE/more", b"x"), "LICENSE is in it as a file and as a folder"),
        (("notes.txt", b"x"), "notes.txt is in it, but not in ro-crate-metadata.json"),
        ((link("params.link"), b"/etc/passwd"), "params.link is a link or a device"),
        (("LICENSE", b"mine"), "LICENSE is in it twice"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_what_is_in_it_beside_its_files_is_refused(
    crate: Path, more: tuple[str | ZipInfo, bytes], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capsys, "verify", str(rewritten(crate, more=[more])))


def test_what_is_missing_or_no_crate_is_told(crate: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{LOG} is missing" in refused(capsys, "verify", str(rewritten(crate, {LOG: None})))
    assert f"no {METADATA} in it" in refused(capsys, "verify", str(rewritten(crate, {METADATA: None})))
    assert "no RO-Crate's description" in refused(capsys, "verify", str(rewritten(crate, {METADATA: b"[]"})))
    assert "not JSON" in refused(capsys, "verify", str(rewritten(crate, {METADATA: b"{"})))
    assert "has no name, contentSize or sha256" in refused(
        capsys, "verify", str(rewritten(crate, {METADATA: b'{"@graph": [{"@id": "../x", "sha256": 1}]}'}))
    )
    assert "has 3 bytes, not " in refused(capsys, "verify", str(rewritten(crate, {"LICENSE": b"MIT"})))
    packed = rewritten(crate, method=ZIP_BZIP2)
    assert "is packed in a way that no crate is" in refused(capsys, "verify", str(packed))
    assert "no such file" in refused(capsys, "verify", "nowhere.zip")
    assert "is a folder" in refused(capsys, "verify", ".")
    assert "/dev/zero: a pipe or a device" in refused(capsys, "verify", "/dev/zero")
    Path("text.zip").write_text("no zip")
    assert "no zip file, or cut" in refused(capsys, "verify", "text.zip")


def test_a_full_disk_is_told_with_its_mend(
    crate: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("kd.publish.verify._check", full)
    assert main(["publish", "verify", str(crate)]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert said.endswith("make room on that disk, or set TMPDIR to a folder on another")


def test_a_bomb_is_refused_before_it_is_unpacked(crate: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bomb = rewritten(crate, described_anew(crate, "LICENSE", bytes(60 * 10**6)), method=ZIP_DEFLATED)
    assert "unpacks to more than 100 times its size" in refused(capsys, "verify", str(bomb))


def test_a_folders_checksum_is_dvcs(tmp_path: Path) -> None:
    tree = Tree()
    for name in ("b.txt", "a/c.txt", "a.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
        tree.add(tuple(name.split("/")), None, HashInfo("md5", dvc_md5(path)))
    tree.digest()
    assert dvc_md5(tmp_path) == tree.hash_info.value
    assert dvc_md5(tmp_path / "a.txt") == hashlib.md5(b"a.txt").hexdigest()
