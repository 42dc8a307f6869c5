"""How long the experiment's rows are, in tokens; and rows of those lengths that say nothing."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from kd import config
from kd.data.gsm8k import prepare, source_files
from kd.data.rows import Example, read_examples
from kd.models import hub, smollm2
from kd.models.load import cache_folder
from kd.models.vocabulary import TOKENIZER

# GSM8K's first 2638 training rows in SmolLM2's tokens (of the socratic answers, those of the test split): the lengths
# that so many of them are shorter than.
SHARES = (0, 0.01, 0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95, 0.99, 1)
QUESTIONS = (12, 27, 32, 39, 44, 49, 54, 59, 64, 71, 80, 102, 130, 194)
ANSWERS = {
    "main": (30, 46, 57, 71, 83, 93, 105, 119, 134, 151, 175, 226, 291, 454),
    "socratic": (47, 65, 78, 96, 114, 132, 146, 163, 184, 207, 237, 299, 368, 505),
}
# Multiples of these, without their whole parts, fill a square evenly, however many are taken (Roberts' sequence).
FILLING = (0.7548776662466927, 0.5698402909980532)
PIECES = re.compile(r"[^\W\d_]{1,7}|\d|[^\w\s]|\n")  # about the tokens of an English text
ALL = "all.jsonl"  # all training rows, where train.jsonl has some
FIRST_WORD = 2  # of a stand-in's vocabulary: 0 and 1 are its special tokens

Lengths = list[tuple[int, int]]  # of a question and its answer


def row_lengths(params: config.Config, scratch: Path) -> dict[str, Lengths]:
    """The lengths of the training and the test rows: of the rows themselves where they are here, else GSM8K's."""
    dataset, count = params.dataset, token_counter(params.student.model)
    wanted = {"train": dataset.train_rows, "test": dataset.test_rows}
    folder = params.artifacts / "data"
    if not all((folder / f"{split}.jsonl").is_file() for split in wanted):
        folder = scratch / "data"
        if not _can_prepare(dataset):
            return {split: gsm8k_lengths(rows, dataset.answers) for split, rows in wanted.items()}
        prepare(dataset, folder)
    found = {}
    for split, rows in wanted.items():
        examples = read_examples(folder / f"{split}.jsonl")
        there = [(count(example.question), count(example.target)) for example in examples]
        found[split] = [there[i % len(there)] for i in range(rows)]
    return found


def token_counter(model: config.Model) -> Callable[[str], int]:
    """What counts the tokens of a text: by the model's tokenizer where it lies here, else about."""
    match model:
        case config.BundledModel():
            folder = smollm2.converted(cache_folder())
        case config.FolderModel():
            folder = model.folder
        case config.HubModel():
            folder = hub.snapshot(model)
    if not (folder / TOKENIZER).is_file():
        return lambda text: len(PIECES.findall(text))
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def gsm8k_lengths(rows: int, answers: str) -> Lengths:
    """Lengths of so many rows, spread as GSM8K's are."""

    def length(i: int, part: int, lengths: Sequence[int]) -> int:
        return round(float(np.interp(i * FILLING[part] % 1, SHARES, lengths)))

    return [(length(i, 0, QUESTIONS), length(i, 1, ANSWERS[answers])) for i in range(rows)]


def spread(lengths: Lengths, count: int) -> Lengths:
    """So many of `lengths`, evenly from the shortest to the longest, the longest among them, in no order."""
    by_size = sorted(lengths, key=sum)
    count = min(count, len(by_size))
    chosen = [by_size[(2 * i + 1) * len(by_size) // (2 * count)] for i in range(count - 1)] + by_size[-1:]
    random.Random(0).shuffle(chosen)
    return chosen


def write_rows(path: Path, lengths: Lengths, vocabulary: int) -> None:
    """Rows of these lengths as `kd prepare` writes them, their words tokens of a stand-in's tokenizer."""
    draw = random.Random(path.stem)
    rows = [
        Example(f"{path.stem}-{i:05d}", words(draw, question, vocabulary), "#### 1", words(draw, answer, vocabulary))
        for i, (question, answer) in enumerate(lengths, start=1)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))


def words(draw: random.Random, count: int, vocabulary: int) -> str:
    """So many words of a stand-in's vocabulary."""
    return " ".join(str(draw.randrange(FIRST_WORD, vocabulary)) for _ in range(count))


def batch_tokens(lengths: Sequence[int], shard: int, rows: int) -> list[int]:
    """The tokens of each forward, padding included, where `rows` questions of like length share one within a shard."""
    found = []
    for start in range(0, len(lengths), shard):
        ordered = sorted(lengths[start : start + shard], reverse=True)
        batches = (ordered[i : i + rows] for i in range(0, len(ordered), rows))
        found += [len(batch) * batch[0] for batch in batches]
    return found


def _can_prepare(dataset: config.Dataset) -> bool:
    match dataset:
        case config.MiniatureDataset():
            return True
        case config.FolderDataset():
            return all(path.is_file() for path in source_files(dataset))
        case config.HubDataset():
            return False
