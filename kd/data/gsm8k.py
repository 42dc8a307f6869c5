"""GSM8K rows and splits: from the Hub, from a folder of the original JSON lines, or the built-in miniature.

`prepare` writes `train.jsonl` and `test.jsonl`; every later stage reads those and nothing else (kd/data/rows.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from kd import config
from kd.data import miniature
from kd.data.rows import Example, final_answer
from kd.errors import UserError
from kd.io.files import json_lines, whole_folder, write_text
from kd.io.text import refuse_half_characters


def prepare(dataset: config.Dataset, target: Path) -> None:
    """Write the experiment's rows to `target`/train.jsonl and test.jsonl."""
    splits = _load(dataset)
    wanted = {"train": dataset.train_rows, "test": dataset.test_rows}
    with whole_folder(target) as work:
        for split, rows in splits.items():
            if len(rows) < wanted[split]:
                raise UserError(
                    f"dataset.{split}_rows: {wanted[split]} rows asked for, but the {split} split has {len(rows)}"
                )
            lines = (json.dumps(asdict(row), ensure_ascii=False) for row in rows[: wanted[split]])
            write_text(work / f"{split}.jsonl", "".join(line + "\n" for line in lines))


def source_files(dataset: config.FolderDataset) -> list[Path]:
    """The files of a folder that `prepare` reads."""
    kinds = ("", "_socratic") if dataset.answers == "socratic" else ("",)
    return [dataset.folder / f"{split}{kind}.jsonl" for split in ("train", "test") for kind in kinds]


def _load(dataset: config.Dataset) -> dict[str, list[Example]]:
    match dataset:
        case config.MiniatureDataset():
            return _miniature(dataset)
        case config.FolderDataset():
            return {split: _folder_split(dataset.folder, split, dataset.answers) for split in ("train", "test")}
        case config.HubDataset():
            return {split: _hub_split(dataset, split) for split in ("train", "test")}


def _miniature(dataset: config.MiniatureDataset) -> dict[str, list[Example]]:
    problems = miniature.problems(dataset.train_rows + dataset.test_rows, dataset.seed, dataset.steps)
    rows = [
        (p.question, p.main_answer, p.main_answer if dataset.answers == "main" else p.socratic_answer) for p in problems
    ]
    return {
        "train": _number("train", rows[: dataset.train_rows]),
        "test": _number("test", rows[dataset.train_rows :]),
    }


def _folder_split(folder: Path, split: str, answers: str) -> list[Example]:
    main = list(_gsm8k_lines(folder / f"{split}.jsonl", "put it there, or name another folder in `dataset.path`"))
    if answers == "main":
        return _number(split, ((question, answer, answer) for question, answer in main))
    path = folder / f"{split}_socratic.jsonl"
    mend = "it has the socratic answers to train on, or set `dataset.answers: main`"
    return _number(split, _join(main, list(_gsm8k_lines(path, mend)), str(path)))


def _hub_split(dataset: config.HubDataset, split: str) -> list[Example]:
    from datasets import load_dataset

    def rows(configuration: str) -> list[tuple[str, str]]:
        what = f"{dataset.name} ({configuration}, {split}) at {dataset.revision[:7]}"
        try:
            table = load_dataset(dataset.name, configuration, split=split, revision=dataset.revision)
        except (OSError, ValueError) as error:  # no network, no such repository, no cached copy
            raise UserError(
                f"dataset: {what} could not be loaded ({type(error).__name__}: {error}); "
                "connect to the Hub, or set `source: folder` and a path"
            ) from error
        return [_checked(f"{what} row {i}", row) for i, row in enumerate(table, start=1)]

    main = rows("main")
    if dataset.answers == "main":
        return _number(split, ((question, answer, answer) for question, answer in main))
    return _number(split, _join(main, rows("socratic"), f"{dataset.name} (socratic, {split})"))


def _join(main: list[tuple[str, str]], socratic: list[tuple[str, str]], where: str) -> Iterator[tuple[str, str, str]]:
    """Main and socratic rows belong together by position; their questions must agree."""
    if len(main) != len(socratic):
        raise UserError(f"{where}: {len(socratic)} rows, but the main split has {len(main)}; they must match")
    for i, ((question, answer), (other, target)) in enumerate(zip(main, socratic, strict=True), start=1):
        if question != other:
            raise UserError(f"{where} row {i}: another question than row {i} of the main split; they must match")
        yield question, answer, target


def _number(split: str, rows: Iterable[tuple[str, str, str]]) -> list[Example]:
    return [Example(f"{split}-{i:05d}", *row) for i, row in enumerate(rows, start=1)]


def _gsm8k_lines(path: Path, mend: str) -> Iterator[tuple[str, str]]:
    for line, row in json_lines(path, mend):
        yield _checked(f"{path} line {line}", row)


def _checked(where: str, row: object) -> tuple[str, str]:
    """Question and answer of one GSM8K row."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with `question` and `answer`")
    for key in ("question", "answer"):
        if not isinstance(row.get(key), str):
            raise UserError(f"{where}: `{key}` is missing or not text")
        refuse_half_characters({key: row[key]}, where)
    if final_answer(row["answer"]) is None:
        raise UserError(f"{where}: the answer does not end in `#### ` and a number; mend or remove the row")
    return row["question"], row["answer"]
