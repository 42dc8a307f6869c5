"""GSM8K rows from each source, and broken files named by file and line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kd import config
from kd.cli import main
from kd.data import gsm8k
from kd.data.rows import Example, final_answer, read_examples

GSM8K = Path(__file__).parents[3] / "shared" / "gsm8k"


def gsm8k_row(i: int) -> dict[str, str]:
    return {"question": f"What is {i} + 1?", "answer": f"It is <<{i}+1={i + 1}>>{i + 1}.\n#### {i + 1}"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five rows a split, as GSM8K's own files have them."""
    target = tmp_path / "gsm8k"
    target.mkdir()
    for split in ("train", "test"):
        rows = [gsm8k_row(i) for i in range(5)]
        (target / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        socratic = [row | {"answer": f"How much? ** {row['answer']}"} for row in rows]
        (target / f"{split}_socratic.jsonl").write_text("".join(json.dumps(row) + "\n" for row in socratic))
    return target


def folder_dataset(folder: Path, **changes: Any) -> config.FolderDataset:
    values = {"source": "folder", "path": str(folder), "answers": "main", "train_rows": 3, "test_rows": 2}
    return config.FolderDataset.model_validate(values | changes)


def test_folder_rows_keep_their_order_and_get_ids(folder: Path, tmp_path: Path) -> None:
    gsm8k.prepare(folder_dataset(folder), tmp_path / "data")
    rows = read_examples(tmp_path / "data" / "train.jsonl")
    assert rows[1] == Example("train-00002", "What is 1 + 1?", gsm8k_row(1)["answer"], gsm8k_row(1)["answer"])
    assert [row.id for row in read_examples(tmp_path / "data" / "test.jsonl")] == ["test-00001", "test-00002"]


def test_socratic_answers_join_the_main_ones(folder: Path, tmp_path: Path) -> None:
    gsm8k.prepare(folder_dataset(folder, answers="socratic"), tmp_path / "data")
    row = read_examples(tmp_path / "data" / "train.jsonl")[0]
    assert row.answer == gsm8k_row(0)["answer"]
    assert row.target == f"How much? ** {row.answer}"


def test_miniature_splits_share_no_question(tmp_path: Path) -> None:
    values = {"source": "miniature", "seed": 3, "answers": "socratic", "train_rows": 20, "test_rows": 10}
    gsm8k.prepare(config.MiniatureDataset.model_validate(values), tmp_path / "data")
    train = read_examples(tmp_path / "data" / "train.jsonl")
    test = read_examples(tmp_path / "data" / "test.jsonl")
    assert (len(train), len(test)) == (20, 10)
    assert not {row.question for row in train} & {row.question for row in test}
    assert all(" ** " in row.target and " ** " not in row.answer for row in train)


def broken_json(folder: Path) -> None:
    path = folder / "train.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:-5], *lines[2:]]))


def missing_mark(folder: Path) -> None:
    path = folder / "test.jsonl"
    path.write_text(path.read_text().replace("#### 4", "4"))


def missing_question(folder: Path) -> None:
    path = folder / "train.jsonl"
    path.write_text(path.read_text().replace('"question"', '"query"', 1))


def other_question(folder: Path) -> None:
    path = folder / "train_socratic.jsonl"
    path.write_text(path.read_text().replace("What is 2", "What was 2"))


def not_utf8(folder: Path) -> None:
    (folder / "train.jsonl").write_bytes(b'{"question": "\xff"}\n')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (broken_json, "train.jsonl line 2: not JSON"),
        (missing_mark, "test.jsonl line 4: the answer does not end in `#### ` and a number"),
        (missing_question, "train.jsonl line 1: `question` is missing or not text"),
        (other_question, "train_socratic.jsonl row 3: another question than row 3 of the main split"),
        (not_utf8, "train.jsonl: not UTF-8 text"),
        (lambda folder: (folder / "train_socratic.jsonl").unlink(), "set `dataset.answers: main`"),
        (lambda folder: (folder / "test.jsonl").unlink(), "test.jsonl: no such file"),
    ],
)
def test_broken_folders_exit_2_and_leave_nothing(
    damage: Callable[[Path], None],
    message: str,
    folder: Path,
    tiny_params: dict[str, Any],
    write_params: Callable[[dict[str, Any]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(folder)
    tiny_params["dataset"] = folder_dataset(folder, answers="socratic").model_dump()
    write_params(tiny_params)
    assert main(["prepare"]) == 2
    assert message in capsys.readouterr().err
    assert not Path("artifacts").exists()


def test_more_rows_than_there_are(
    folder: Path,
    tiny_params: dict[str, Any],
    write_params: Callable[[dict[str, Any]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny_params["dataset"] = folder_dataset(folder, test_rows=9).model_dump()
    write_params(tiny_params)
    assert main(["prepare"]) == 2
    assert "dataset.test_rows: 9 rows asked for, but the test split has 5" in capsys.readouterr().err


def test_hub_dataset_without_network_says_what_to_do(
    tiny_params: dict[str, Any],
    write_params: Callable[[dict[str, Any]], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route to the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    rows = {"answers": "socratic", "train_rows": 12, "test_rows": 6}
    tiny_params["dataset"] = {"source": "hub", "name": "openai/gsm8k", "revision": "e" * 40, **rows}
    write_params(tiny_params)
    assert main(["prepare"]) == 2
    assert "set `source: folder` and a path" in capsys.readouterr().err


def test_hub_rows_of_both_configurations_are_joined(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` reads the JSON lines as it would the Hub's, so the real table type is exercised."""
    import datasets

    real = datasets.load_dataset
    asked: list[tuple[str, str, str, str]] = []

    def local(name: str, configuration: str, split: str, revision: str) -> Any:
        asked.append((name, configuration, split, revision))
        file = folder / f"{split}{'_socratic' if configuration == 'socratic' else ''}.jsonl"
        return real("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", local)
    values = {"source": "hub", "name": "openai/gsm8k", "revision": "e" * 40, "answers": "socratic"}
    gsm8k.prepare(config.HubDataset.model_validate(values | {"train_rows": 5, "test_rows": 5}), tmp_path / "data")
    assert read_examples(tmp_path / "data" / "train.jsonl")[4].target.startswith("How much? ** ")
    assert ("openai/gsm8k", "main", "test", "e" * 40) in asked


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("so\n#### 18", "18"),
        ("#### 70,000", "70000"),
        ("#### -3", "-3"),
        ("#### 2.5\n", "2.5"),
        ("#### .5", "0.5"),
        ("#### +18", "18"),
        ("#### $18", "18"),
        ("#### -$1,800.50", "-1800.5"),
        ("#### 18.", "18"),
        ("####18.0", "18"),
        ("#### 40%", "40"),
        ("#### \u22125", "-5"),
        ("#### 5\nso\n#### 6", "6"),
        ("18", None),
        ("####", None),
        ("#### eighteen", None),
        ("#### 18 dollars", None),
        ("#### 1,8", None),
        ("#### --5", None),
        ("#### 3/4", None),
        ("#### 18\nor so", None),
    ],
)
def test_final_answer(answer: str, number: str | None) -> None:
    assert final_answer(answer) == number


@pytest.mark.skipif(not GSM8K.exists(), reason="the shared GSM8K folder is not beside this checkout")
def test_real_gsm8k_is_read_whole(tmp_path: Path) -> None:
    rows = folder_dataset(GSM8K, train_rows=7473, test_rows=1319)
    gsm8k.prepare(rows, tmp_path / "data")
    examples = read_examples(tmp_path / "data" / "train.jsonl")
    assert len(examples) == 7473
    assert final_answer(examples[0].answer) == "72"
