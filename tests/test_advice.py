"""What messages, help and docs tell people to do: its commands, names and files are there, and following it helps."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from conftest import REPOSITORY, make_tiny_params
from dvc.cli import DvcParserError
from dvc.cli.parser import get_main_parser
from params import keep
from pydantic import BaseModel
from ruamel.yaml import YAML

from kd.cli import EPILOG, main, parser
from kd.config import Config

DOCS = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("studies/*/README.md")])
CODE = [*sorted((REPOSITORY / "kd").rglob("*.py")), REPOSITORY / "noxfile.py"]


def strings(path: Path) -> Iterator[str]:
    """What a module says: its strings but for docstrings, `x` for each value put in."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    silent = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "x" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and not {id(node)} & (inner | silent):
            yield node.value


@cache
def texts() -> list[tuple[str, str]]:
    """Everything that people read, with where it stands."""
    docs = [(path.relative_to(REPOSITORY).as_posix(), path.read_text(encoding="utf-8")) for path in DOCS]
    return docs + [(path.relative_to(REPOSITORY).as_posix(), "\n".join(strings(path))) for path in CODE]


def commands() -> Iterator[tuple[str, str]]:
    """Command lines: between backticks, or in lines set in, a comment or description behind them left out."""
    for where, text in texts():
        found = re.findall(r"`([a-z][^`\n]*)`", text)
        found += [re.split(r"\s{2,}| \||\s#", line.strip())[0] for line in text.splitlines() if line.startswith("  ")]
        yield from ((where, part.strip()) for line in found for part in line.split("&&"))


def of(program: str) -> list[Any]:
    """The arguments of each command line that starts `program`, by itself or behind a launcher."""
    start = re.compile(rf"(?:^|\s|-m ){program}(?:\.cli)? ((?:--?)?[a-z].*)$")
    lines = {(match[1], where) for where, line in commands() if (match := start.search(line))}
    return [pytest.param(words(line), id=f"{where}: {line}") for line, where in sorted(lines)]


def words(line: str) -> list[str]:
    """The words of a command line, something in the place of what stands for something else."""
    line = re.sub(r"[\[\]\"';]|\.$", "", re.sub(r"<[^>]*>|…", "x", line))
    return [{"N": "1", "M": "1", "L:H,x": "0:0"}.get(word, word) for word in line.split()]


def parses(by: ArgumentParser, arguments: list[str]) -> bool:
    """Whether a parser takes the arguments, or has a command of that name where they are a name alone."""
    alone = all(word.isalpha() for word in arguments)
    for line in (arguments, [*arguments, "--help"]) if alone else (arguments,):
        try:
            by.parse_args(line)
        except SystemExit as end:
            if end.code == 0:
                return True
            continue
        except DvcParserError:
            continue
        return True
    return False


@pytest.fixture(scope="module")
def ours() -> ArgumentParser:
    return parser()


@pytest.mark.parametrize("arguments", of("kd"))
def test_every_command_of_ours_that_is_named_parses(ours: ArgumentParser, arguments: list[str]) -> None:
    assert parses(ours, arguments)


def test_the_help_says_when_to_use_every_command() -> None:
    named = set(re.findall(r"\bkd ([a-z]+)", EPILOG)) | {"study"}  # which has a README of its own
    assert set(re.findall(r"^    ([a-z]+)(?: |$)", parser().format_help(), re.MULTILINE)) == named


@pytest.fixture(scope="module")
def sessions() -> set[str]:
    command = [sys.executable, "-m", "nox", "--list", "--noxfile", str(REPOSITORY / "noxfile.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(re.findall(r"^[*-] ([a-z-]+)", done.stdout, re.MULTILINE))


def test_every_session_that_is_named_is_there(sessions: set[str]) -> None:
    named = re.compile(r"\bnox (?:-s|--session) ([a-z-]+)")
    assert {name for _, text in texts() for name in named.findall(text)} <= sessions
    table = (REPOSITORY / "docs/usage.md").read_text(encoding="utf-8").partition("| session |")[2].partition("\n\n")[0]
    listed = {name for row in table.splitlines() for name in re.findall(r"`([a-z-]+)`", row.split("|")[1:][0])}
    assert listed == sessions


@pytest.fixture(scope="module")
def dvcs() -> ArgumentParser:
    made: ArgumentParser = get_main_parser()
    return made


@pytest.fixture(scope="module")
def stages() -> set[str]:
    """What DVC may be asked to run: the pipeline's stages, each by itself or all of a name."""
    pipeline = YAML(typ="safe").load(REPOSITORY / "dvc.yaml")["stages"]
    params = YAML(typ="safe").load(REPOSITORY / "params.yaml")
    found = {f"{name}@{key}" if key else name for name, stage in pipeline.items() for key in keys(stage, params)}
    return {*found, *pipeline, "train@x"}


@pytest.mark.parametrize("arguments", of("dvc"))
def test_every_command_of_dvcs_that_is_named_parses(
    dvcs: ArgumentParser, stages: set[str], arguments: list[str]
) -> None:
    assert parses(dvcs, arguments)
    if arguments[0] in ("repro", "commit"):
        assert {word for word in arguments[1:] if word.isalpha() or "@" in word} <= stages


def keys(stage: dict[str, Any], params: dict[str, Any]) -> list[str]:
    if "matrix" in stage:
        filled = {key: params[of.strip("${}")] if isinstance(of, str) else of for key, of in stage["matrix"].items()}
        return ["-".join(map(str, names)) for names in product(*filled.values())]
    return list(params[stage["foreach"].strip("${}")]) if "foreach" in stage else [""]


def leads_on(annotation: Any, parts: list[str]) -> bool:
    """Whether a type of params has these keys within each other."""
    if not parts or get_origin(annotation) is dict:
        return not parts or leads_on(get_args(annotation)[1], parts[1:])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        field = annotation.model_fields.get(parts[0])
        return field is not None and leads_on(field.annotation, parts[1:])
    return any(leads_on(choice, parts) for choice in get_args(annotation))


def test_every_key_of_params_that_is_named_is_there() -> None:
    named = {
        (where, key)
        for where, text in texts()
        for key in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:`|: )", text)
        if key.partition(".")[0] in Config.model_fields and not key.endswith((".yaml", ".json", ".csv"))
    }
    assert len(named) > 10
    assert [pair for pair in sorted(named) if not leads_on(Config, pair[1].split("."))] == []


def test_every_file_that_is_named_is_there() -> None:
    named = {
        (where, path)
        for where, text in texts()
        for path in re.findall(r"`((?:kd|tests|docs|profiles|studies|benchmarks)/[\w./-]*)`", text)
        if not path.startswith("studies/") or "/work" not in path
    }
    assert len(named) > 20
    assert [pair for pair in sorted(named) if not (REPOSITORY / pair[1]).exists()] == []


def change(params: dict[str, Any], values: dict[str, Any]) -> None:
    """Set keys of params, or with `...` remove them."""
    for key, value in values.items():
        *outer, last = key.split(".")
        inner = params
        for name in outer:
            inner = inner[name]
        inner[last] = value
        if value is ...:
            del inner[last]


MY_ROWS = {"source": "folder", "path": ".", "answers": "socratic", "train_rows": 12, "test_rows": 6}


@pytest.mark.parametrize(
    ("wrong", "said", "mended"),
    [
        ({"distill.quirks": ["bos"]}, "empty the list, or choose `aligned`", {"distill.quirks": []}),
        ({"distill.quirks": ["bos"]}, "choose `aligned`", {"distill.protocol": "aligned"}),
        (
            {"distill.quirks": ["bos", "bos"], "distill.protocol": "aligned"},
            "name each once",
            {"distill.quirks": ["bos"]},
        ),
        (
            {"teacher.cache": "q6"},
            "belongs to `backend: exllamav2`, not to transformers; remove it",
            {"teacher.cache": None},
        ),
        ({"controls": ["base-kd-1"]}, "choose another", {"controls": ["another"]}),
        ({"untrained.base-kd": {}}, "choose another", {"untrained.base-kd": ..., "untrained.another": {}}),
        (
            {"seed": 7, "seeds": ..., "dataset.seed": ...},
            "seed: a list now, `seeds: [7]`, and that of the problems is `dataset.seed: 7`",
            {"seed": ..., "seeds": [7], "dataset.seed": 7},
        ),
        (
            {"adapters": {"fine-tuning": {"needs": "data"}}, "controls": ...},
            "adapters: `controls: [fine-tuning]` now",
            {"adapters": ..., "controls": ["fine-tuning"]},
        ),
        (
            {"experiments": {"bare": {"needs": "data"}}, "untrained": ...},
            "`untrained` now, with the rows of the bare student alone, without `needs`",
            {"experiments": ..., "untrained": {"bare": {}}},
        ),
        ({"distill.dropouts": {"bsae-kd": 0.2}}, "did you mean 'base-kd'?", {"distill.dropouts": {"base-kd": 0.2}}),
        ({"search.alpha": [0.9, 0.1]}, "expected [low, high]", {"search.alpha": [0.1, 0.9]}),
        ({"dataset": MY_ROWS}, "set `dataset.answers: main`", {"dataset": MY_ROWS | {"answers": "main"}}),
        ({"dataset": MY_ROWS | {"answers": "main", "train_rows": 99}}, "split has 12", {"dataset.train_rows": 12}),
        ({"launcher": "srun 'a"}, "not a command", {"launcher": "srun a"}),
        (
            {"attention.questoins": 3},
            "did you mean 'questions'?",
            {"attention.questoins": ..., "attention.questions": 3},
        ),
    ],
)
def test_a_params_file_is_mended_as_its_message_says(
    wrong: dict[str, Any],
    said: str,
    mended: dict[str, Any],
    tiny_params: dict[str, Any],
    write_params: Callable[[dict[str, Any]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    change(tiny_params, wrong)
    write_params(tiny_params)
    for name in ("train", "test"):
        row = {"question": "How many are 1 and 1?", "answer": "1 + 1 = 2\n#### 2"}
        Path(f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 12)
    assert main(["prepare"]) == 2
    assert said in capsys.readouterr().err
    change(tiny_params, mended)
    write_params(tiny_params)
    assert main(["prepare"]) == 0


def test_a_missing_params_file_is_made_as_its_message_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(REPOSITORY / "profiles", "profiles")
    for name in ("params.yaml", "my own.yaml"):
        assert main(["prepare", "--params", name]) == 2
        advice = re.search(r"`(cp [^`]+)`", capsys.readouterr().err)
        assert advice
        subprocess.run(advice[1], shell=True, check=True)
        assert main(["prepare", "--params", name]) == 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A folder with one prompt's results, each stage run."""
    folder = tmp_path_factory.mktemp("whole")
    params = make_tiny_params(tiny_llama)
    params["dataset"] |= {"train_rows": 6, "test_rows": 4}
    keep(params, "base-kd")
    with pytest.MonkeyPatch.context() as here:
        here.chdir(folder)
        YAML().dump(params, Path("params.yaml"))
        for stage in ("prepare", "head", "teacher base", "train base-kd", "assess base-kd", "statistics"):
            assert main(stage.split()) == 0
    return folder


@pytest.fixture
def in_a_copy(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder is a copy of that one."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("command", "wrong", "said", "mended"),
    [
        ("train", {"distill.step": "graph"}, "use `auto` or `eager`", {"distill.step": "eager"}),
        ("train", {"distill.learning_rate": 1e30}, "lower `distill.learning_rate`", {"distill.learning_rate": 1e-3}),
        (
            "search",
            {"search.learning_rate": [1e30, 1e30]},
            "lower `search.learning_rate`",
            {"search.learning_rate": [1e-3, 1e-3]},
        ),
        ("search", {"search.eval_rows": 6}, "leave some to train on", {"search.eval_rows": 5}),
    ],
)
@pytest.mark.usefixtures("on_cpu", "in_a_copy")
def test_work_that_params_forbid_is_done_once_they_are_mended_as_the_message_says(
    command: str,
    wrong: dict[str, Any],
    said: str,
    mended: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    params = YAML(typ="safe").load(Path("params.yaml"))
    params["search"] |= {"trials": 1, "eval_rows": 2}
    for values, status in ((wrong, 2), (mended, 0)):
        change(params, values)
        YAML().dump(params, Path("params.yaml"))
        capsys.readouterr()
        assert main([command, "base-kd"]) == status
        assert status == 0 or said in capsys.readouterr().err


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def junk(path: Path) -> None:
    path.write_text("junk\n")


def other_version(path: Path) -> None:
    path.write_text(path.read_text().replace('"version": ', '"version": 9'))


def edited(path: Path) -> None:
    path.write_text(path.read_text().replace('"seal": "', '"seal": "0'))


TEACHER, HEAD = "teacher/base/manifest.json", "teacher/head/manifest.json"


@pytest.mark.parametrize(
    ("file", "spoil", "command"),
    [
        *((TEACHER, spoil, "statistics") for spoil in (cut, junk, Path.unlink, other_version, edited)),
        *((HEAD, spoil, "statistics") for spoil in (cut, junk, Path.unlink, other_version, edited)),
        *(("teacher/base/states-00000.safetensors", spoil, "statistics") for spoil in (cut, Path.unlink)),
        *(("teacher/head/head.safetensors", spoil, "statistics") for spoil in (cut, Path.unlink)),
        ("statistics.json", cut, "report"),
        ("adapters/base-kd-1/check.json", junk, "report"),
        ("adapters/base-kd-1/adapter_model.safetensors", Path.unlink, "assess base-kd"),
        ("data/test.jsonl", Path.unlink, "assess base-kd"),
        ("logs/base-kd-1.csv", Path.unlink, "report"),
    ],
)
@pytest.mark.usefixtures("in_a_copy")
def test_what_is_spoilt_is_made_again_by_the_commands_that_the_message_names(
    file: str,
    spoil: Callable[[Path], None],
    command: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(Path("artifacts/mini", file))
    capsys.readouterr()
    assert main(command.split()) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"kd: {Path('artifacts/mini', file).parent}")
    advice = re.findall(r"`kd ([^`]+)`", said)
    assert advice
    for again in advice:
        assert main(again.split()) == 0
    assert main(command.split()) == 0
