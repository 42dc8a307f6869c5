"""`kd publish hub`, against a Hub on this machine."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from crates import write_lock
from huggingface_hub import ModelCard, RepoCard, configure_http_backend
from params import keep
from ruamel.yaml import YAML
from upload_server import ME, MY_TOKEN, Asked, Stored, UploadHub

from kd.cli import main
from kd.config import Config, load_config
from kd.publish.card import Edition, model_card
from kd.publish.hub import Repository, plan

NAME, BASE = f"{ME}/tiny", f"{ME}/tiny-llama"
DRY = ["publish", "hub", NAME, "--base-model", BASE]
UPLOAD = [*DRY, "--upload"]
RUNS = ["base-kd-1", "base-kd-2"]
MINE = [f"datasets/{NAME}", *(f"{NAME}-{run}" for run in RUNS)]


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A folder with the report of a student that was trained with two seeds."""
    folder = tmp_path_factory.mktemp("reported")
    params = YAML(typ="safe").load(REPOSITORY / "profiles" / "mini.yaml")
    params["dataset"] |= {"train_rows": 6, "test_rows": 4}
    params["teacher"]["model"] = params["student"]["model"] = {"source": "folder", "path": str(tiny_llama)}
    params["seeds"] = [1, 2]
    params["assess"]["max_new_tokens"] = 4
    keep(params, "base-kd", "no-distillation-matched")
    stages = "prepare", "head", "teacher base", "train base-kd", "assess base-kd", "assess no-distillation-matched"
    with pytest.MonkeyPatch.context() as here:
        here.chdir(folder)
        here.setenv("CUDA_VISIBLE_DEVICES", "")
        YAML().dump(params, Path("params.yaml"))
        for stage in (*stages, "report"):
            assert main(stage.split()) == 0
        write_lock()
    return folder


@pytest.fixture
def here(reported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: a copy of that one, beside what must not go."""
    shutil.copytree(reported, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    published = tmp_path / "data" / "published"
    published.mkdir(parents=True)
    (published / "ai-KD.csv").write_text("a published log\n")
    return tmp_path


@pytest.fixture
def hub(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    """A Hub, and the token of somebody who may write there."""
    started = UploadHub()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", started.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    monkeypatch.setenv("HF_TOKEN", MY_TOKEN)
    yield started
    started.close()
    configure_http_backend()


def card(hub: UploadHub, run: str) -> ModelCard:
    return ModelCard(hub.repositories[f"{NAME}-{run}"].files["README.md"].decode())


def results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path("artifacts/mini/report/results.json").read_text())
    return found


def test_nothing_is_sent_unless_asked_and_every_file_is_listed(
    hub: UploadHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert main(DRY) == 0
    listed = capsys.readouterr()
    assert hub.asked == []
    assert "nothing was sent" in listed.err
    assert f"student.model.path {results()['student']['model']['path']}" in listed.err
    monkeypatch.setenv("HF_TOKEN", MY_TOKEN)
    assert main(UPLOAD) == 0
    rows = [line.split() for line in listed.out.splitlines()[2:]]
    sizes = {
        ("datasets/" * (kind == "dataset") + name, file): int(size.replace(",", "")) for kind, name, size, file in rows
    }
    assert sizes == {
        (name, file): len(body)
        for name, stored in hub.repositories.items()
        for file, body in stored.files.items()
        if file != ".gitattributes"
    }
    assert list(hub.repositories) == MINE


def test_the_hubs_own_reader_finds_the_results_in_a_card(hub: UploadHub) -> None:
    assert main(UPLOAD) == 0
    student = results()["experiments"]["base-kd"]
    for run, found in zip(RUNS, student["runs"], strict=True):
        read = card(hub, run)
        one, mean = read.data.eval_results
        assert read.data.model_name == f"tiny-{run}"
        assert (one.task_type, one.metric_type, one.metric_value) == ("text-generation", "accuracy", found["accuracy"])
        assert one.metric_args == {"correct": found["correct"], "rows": 4}
        assert mean.metric_value == student["accuracy"]
        assert mean.metric_args == {"seeds": [1, 2], "collapsed": student["collapsed"]}
        assert "mean of 2 seeds" in mean.metric_name
        # The rows are those of its log, at the state of the dataset repository that the tag names.
        assert (one.dataset_type, one.dataset_config, one.dataset_split) == (NAME, run, "test")
        assert list(hub.repositories[MINE[0]].tags) == [one.dataset_revision]
        assert (read.data.base_model, read.data.library_name, read.data.license) == (BASE, "peft", "other")
        assert "learns from: teacher store `teacher/base`" in read.text
        assert f"one of 2: over all of them base-kd has {student['accuracy']:.2%}" in read.text
        assert ("**This run collapsed**" in read.text) == bool(found["signs"])
        assert str(Path(results()["student"]["model"]["path"]).parent) not in read.content


@pytest.mark.usefixtures("here")
def test_a_card_has_the_figures_of_its_run_and_whether_it_collapsed() -> None:
    found = results()
    student = found["experiments"]["base-kd"]
    student |= {"collapsed": [2], "accuracy": 0.375}
    student["runs"][1] |= {"correct": 3, "accuracy": 0.75}
    student["runs"][0]["signs"], student["runs"][1]["signs"] = [], [{"by": "loss", "first": 1.5, "last": 9.25}]
    edition = Edition(load_config(Path("params.yaml")), found, NAME, BASE)
    first, second = (ModelCard(model_card(edition, run, "", "kd-0")) for run in RUNS)
    assert "**This run collapsed**: its training loss rose from 1.5 to 9.25." in second.text
    assert "This run collapsed" not in first.text
    assert "1 collapsed (seed 2)" in first.text
    assert [one.metric_value for one in second.data.eval_results] == [0.75, 0.375]
    assert "This run has 3 of 4 test questions right, 75.00%" in second.text


def test_the_dataset_has_page_and_results_and_loads_by_run(hub: UploadHub, here: Path) -> None:
    from datasets import load_dataset

    assert main(UPLOAD) == 0
    files = hub.repositories[MINE[0]].files
    assert files["report/index.html"] == Path("artifacts/mini/report/index.html").read_bytes()
    assert json.loads(files["report/results.json"]) == results()
    for path, body in files.items():
        (here / "got" / path).parent.mkdir(parents=True, exist_ok=True)
        (here / "got" / path).write_bytes(body)
    for name, run in [("no-distillation-matched", "no-distillation-matched"), ("base-kd", "base-kd-2")]:
        log = load_dataset(str(here / "got"), run, split="test", cache_dir=str(here / "cache"))
        assert (len(log), sum(log["correct"])) == (4, results()["experiments"][name]["runs"][-1]["correct"])


@pytest.mark.usefixtures("on_cpu")
def test_an_adapter_loads_with_its_base_model_in_one_line(
    hub: UploadHub, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    assert main(UPLOAD) == 0
    hub.repositories[BASE] = Stored({path.name: path.read_bytes() for path in tiny_llama.iterdir()})
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.url)
    options = {"cache_dir": "cache", "torch_dtype": torch.float32}
    model = AutoPeftModelForCausalLM.from_pretrained(f"{NAME}-base-kd-1", **options)
    bare = AutoModelForCausalLM.from_pretrained(tiny_llama, torch_dtype=torch.float32)
    token_ids = torch.tensor([[0, 5, 6, 7]])
    assert not torch.equal(model(token_ids).logits, bare(token_ids).logits)


def test_what_is_there_is_not_sent_again(hub: UploadHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(UPLOAD) == 0
    commits = {name: stored.commits for name, stored in hub.repositories.items()}
    hub.asked.clear()
    capsys.readouterr()
    assert main(UPLOAD) == 0
    assert {name: stored.commits for name, stored in hub.repositories.items()} == commits
    assert not hub.sent("PUT", "") + hub.sent("POST", "/commit/") + hub.sent("POST", "/preupload/")
    sent = {line.split()[1]: line.split()[2] for line in capsys.readouterr().out.splitlines()[2:]}
    assert sent == dict.fromkeys((NAME, *(f"{NAME}-{run}" for run in RUNS)), "0")


def breaking(method: str, part: str) -> Callable[[Asked], bool]:
    return lambda asked: asked.method == method and part in asked.path


@pytest.mark.parametrize(
    ("method", "part"), [("PUT", "Signature"), ("POST", "/commit/"), ("POST", "/preupload/"), ("GET", "whoami")]
)
def test_a_cut_connection_is_one_sentence(
    hub: UploadHub, capsys: pytest.CaptureFixture[str], method: str, part: str
) -> None:
    hub.breaks = breaking(method, part)
    assert main(UPLOAD) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("kd: ")
    assert said.endswith("no connection; what was sent is kept, run the same command again")
    assert "Signature" not in said


def test_a_hub_that_says_nothing_is_given_up(
    hub: UploadHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kd.publish.hub.TIMEOUT_S", 0.1)
    hub.close()  # its port is still open
    assert main(UPLOAD) == 1
    assert f"kd: {hub.url}: no answer within" in capsys.readouterr().err.splitlines()[-1]


def test_the_next_run_goes_on_where_a_connection_broke(hub: UploadHub) -> None:
    hub.breaks = breaking("POST", f"{NAME}-base-kd-2/commit/")
    assert main(UPLOAD) == 1
    assert len(hub.sent("POST", "/commit/")) == 3
    hub.breaks = lambda _: False
    hub.asked.clear()
    assert main(UPLOAD) == 0
    assert [asked.path for asked in hub.sent("POST", "/commit/")] == [f"/api/models/{NAME}-base-kd-2/commit/main"]
    assert not hub.sent("PUT", "")  # its weights had come
    assert list(hub.repositories) == MINE
    assert all("README.md" in stored.files for stored in hub.repositories.values())


@pytest.mark.parametrize(
    ("constant", "value", "said"),
    [
        ("ENDPOINT", "nonsense", "HF_ENDPOINT: not the address of a server"),
        ("HF_HUB_OFFLINE", True, "HF_HUB_OFFLINE: is"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_no_hub_is_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, constant: str, value: Any, said: str
) -> None:
    monkeypatch.setattr(f"huggingface_hub.constants.{constant}", value)
    assert main(UPLOAD) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_server_that_is_busy_is_one_sentence(hub: UploadHub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.status = lambda asked: 503 if "/commit/" in asked.path else 200
    assert main(UPLOAD) == 1
    assert f"{NAME}: the server answered 503" in capsys.readouterr().err.splitlines()[-1]


def test_why_the_hub_takes_no_commit_is_said_in_its_own_words(
    hub: UploadHub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.status = lambda asked: 413 if "/commit/" in asked.path else 200
    assert main(UPLOAD) == 1
    assert "(as the test wants it)" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("token", "said"),
    [
        (None, "HF_TOKEN: not set"),
        ("hf_WrongSecret", "does not accept the token (401); set it to a valid one that may write"),
        ("hf_Wrong\nSecret", "HF_TOKEN: holds characters that no token has"),
        ("hf_WrongSecrét", "HF_TOKEN: holds characters that no token has"),
    ],
)
def test_a_wrong_token_is_one_sentence_without_the_token(
    hub: UploadHub,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    token: str | None,
    said: str,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(Path("params.yaml")))  # a login's is not taken
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    assert main(UPLOAD) == 2
    shown = "".join(capsys.readouterr())
    assert said in shown.splitlines()[-1]
    assert "Secr" not in shown
    assert hub.repositories == {}


def test_the_token_goes_to_the_hub_alone_and_is_never_said(hub: UploadHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(UPLOAD) == 0
    assert MY_TOKEN not in "".join(capsys.readouterr())
    assert {asked.authorization for asked in hub.asked if asked.host == "storage"} == {None}
    assert not [name for name, stored in hub.repositories.items() for body in stored.files.values() if b"hf_" in body]


@pytest.mark.parametrize("there", [True, False])
def test_a_name_of_somebody_else_is_one_sentence(
    hub: UploadHub, capsys: pytest.CaptureFixture[str], there: bool
) -> None:
    if there:
        hub.repositories |= {name.replace(ME, "another"): Stored() for name in MINE}
    assert main(["publish", "hub", "another/tiny", "--base-model", BASE, "--upload"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "another/tiny: " in said
    assert "does not let you write there (403)" in said


def test_a_repository_with_other_work_is_not_written_over(hub: UploadHub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.repositories[MINE[2]] = Stored({"README.md": b"# Something else\n"})
    assert main(UPLOAD) == 2
    assert f"{NAME}-base-kd-2: is there and holds something else (README.md)" in capsys.readouterr().err
    assert not hub.sent("POST", "/commit/")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda: Path("artifacts/mini/logs/base-kd-1.csv").write_text("a published log\n"), "base-kd-1.csv: no column"),
        (lambda: spoil("adapters/base-kd-2/adapter_model.safetensors"), "base-kd-2: not what dvc.lock has of it"),
        (lambda: shorten("logs/base-kd-2.csv"), "base-kd-2.csv: not what artifacts/mini/report/index.html was made of"),
        (
            lambda: Path("artifacts/mini/adapters/base-kd-2/adapter_config.json").unlink(),
            "no such file; run `kd train base-kd-2`",
        ),
        (lambda: Path("artifacts/mini/report/notes.md").write_text("mine\n"), "report: not what dvc.lock has of it"),
        (lambda: Path("artifacts/mini/report/results.json").write_text("[]"), "results.json: not what the logs and"),
        (lambda: count_one_more(), "experiments.base-kd.runs.0.correct: not what the logs and params come to"),
        (lambda: Path("artifacts/mini/report/results.json").unlink(), "it should hold what `kd report` writes"),
        (lambda: set_param("seeds", [1, 3]), "base-kd-3.csv: no such file; run `kd assess base-kd-3`"),
        (lambda: set_param("distill.learning_rate", 0.5), "params.yaml: distill: another value than artifacts/mini/"),
        (lambda: set_param("profile", "mini2"), "artifacts/mini2/report/results.json: no such file"),
    ],
)
def test_what_is_not_behind_the_report_does_not_go(
    here: Path, capsys: pytest.CaptureFixture[str], change: Callable[[], object], said: str
) -> None:
    change()
    assert main(DRY) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert here


def spoil(name: str) -> None:
    path = Path("artifacts/mini", name)
    path.write_bytes(path.read_bytes()[:-1] + b"0")


def shorten(name: str) -> None:
    """Another count of tokens, which no figure hangs on, and dvc.lock made to fit."""
    path = Path("artifacts/mini", name)
    path.write_text(path.read_text().replace(",4,True", ",3,True"))
    write_lock()


def count_one_more() -> None:
    found = results()
    found["experiments"]["base-kd"]["runs"][0]["correct"] += 1
    Path("artifacts/mini/report/results.json").write_text(json.dumps(found))


def set_param(key: str, value: Any) -> None:
    params = YAML(typ="safe").load(Path("params.yaml"))
    *parents, last = key.split(".")
    of = params
    for parent in parents:
        of = of[parent]
    of[last] = value
    YAML().dump(params, Path("params.yaml"))


@pytest.mark.usefixtures("here")
def test_weights_of_a_model_stay(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(tiny_llama / "model.safetensors", "artifacts/mini/adapters/base-kd-1/adapter_model.safetensors")
    assert main(["report"]) == 0
    assert main(DRY) == 2
    assert "not of a LoRA adapter, and a model's weights stay here" in capsys.readouterr().err


@pytest.mark.usefixtures("here")
def test_a_published_log_under_another_name_stays(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = Path("artifacts/mini/report/ai-KD.tsv")
    log.write_text("as published\n")
    write_lock()
    monkeypatch.setattr("kd.publish.agreement.SHA256", {"ai-KD.csv": hashlib.sha256(log.read_bytes()).hexdigest()})
    assert main(DRY) == 2
    assert f"kd: {log}: the paper's ai-KD.csv, which carries no licence" in capsys.readouterr().err


@pytest.mark.usefixtures("here")
def test_stores_weights_and_published_logs_are_never_listed(capsys: pytest.CaptureFixture[str]) -> None:
    Path("artifacts/mini/report/model.safetensors").write_bytes(b"weights")
    write_lock()
    assert main(DRY) == 0
    listed = capsys.readouterr().out
    assert not [word for word in ("states-", "head.", "ai-KD", "train.jsonl", "model.safetensors ") if word in listed]
    assert listed.count("report/model.safetensors") == 0


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tiny", "--base-model", BASE], "REPOSITORY: tiny says no owner; expected OWNER/NAME, such as your-name/tiny"),
        (["some one/tiny", "--base-model", BASE], "REPOSITORY: some one/tiny is no name of the Hub"),
        ([f"someone/{'a' * 90}", "--base-model", BASE], "aa-base-kd-1 is no name of the Hub"),
        ([NAME], "name the Hub's model that it is with --base-model OWNER/NAME"),
        ([NAME, "--base-model", "a folder"], "--base-model: a folder is no name of the Hub"),
    ],
)
def test_a_name_that_cannot_be_is_one_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main(["publish", "hub", *arguments]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.usefixtures("here")
def test_what_llama_made_has_its_name_notice_and_licence(capsys: pytest.CaptureFixture[str]) -> None:
    llama = "meta-llama/Llama-3.1-8B-Instruct"
    assert main(["publish", "hub", NAME, "--base-model", llama]) == 2
    assert "choose someone/Llama-tiny" in capsys.readouterr().err
    for one in plan(*read_params(), "someone/Llama-tiny", llama):
        assert b"Llama 3.1 is licensed under the Llama 3.1 Community License" in bytes_of(one, "NOTICE")
        assert RepoCard(bytes_of(one, "README.md").decode()).data.get("license") == "llama3.1"
        assert b"Built with Llama." in bytes_of(one, "README.md")
        assert b"arXiv:2412.17846" in bytes_of(one, "README.md")


@pytest.mark.usefixtures("here")
def test_data_and_models_of_the_hub_have_their_names_and_revisions() -> None:
    data = {"source": "hub", "name": "openai/gsm8k", "revision": "e" * 40}
    set_param("dataset", data | {"answers": "main", "train_rows": 6, "test_rows": 4})
    set_param("student", {"model": {"source": "bundled"}, "dtype": "float32"})
    assert main(["report"]) == 0
    write_lock()
    dataset, adapter, _ = plan(*read_params(), NAME)
    read = ModelCard(bytes_of(adapter, "README.md").decode())
    one = read.data.eval_results[0]
    assert (one.dataset_type, one.dataset_config, one.dataset_revision) == ("openai/gsm8k", "main", "e" * 40)
    assert one.source_url.endswith(f"/datasets/{NAME}/tree/{dataset.tag}")
    assert read.data.datasets == ["openai/gsm8k"]
    assert (read.data.base_model, read.data.license) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
    assert json.loads(bytes_of(adapter, "adapter_config.json"))["base_model_name_or_path"] == read.data.base_model


def read_params() -> tuple[Config, Path]:
    path = Path("params.yaml")
    return load_config(path), path


def bytes_of(repository: Repository, path: str) -> bytes:
    content = repository.files[path]
    return content if isinstance(content, bytes) else content.read_bytes()
