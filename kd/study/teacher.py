"""A teacher that knows more than its student: the student's own model, fully fine-tuned on other problems.

Cross entropy of the main answer and an end token behind BOS + question + line end, as the aligned protocol reads them;
AdamW, a linear warm-up over a twentieth of the steps, then a cosine down to 0.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import torch

from kd.config import Config
from kd.data.rows import Example, read_examples
from kd.distill.step import deterministic
from kd.io.files import whole_folder
from kd.io.progress import progress
from kd.models.load import default_device, load_model, load_tokenizer, model_folder, pad_right
from kd.protocol.reading import answer_token_ids, student_token_ids
from kd.study.plan import Tuned

IGNORED = -100  # torch's label for positions that do not count
WARM_UP = 0.05
CLIPPED_NORM = 1.0

Tokens = tuple[list[int], int]  # of one example, and how many of them are the question's


def tune(config: Config, settings: Tuned, students: Path, target: Path) -> None:
    """Train the teacher on the params' training rows, but for questions that the `students`' data has as well, and
    write it, whole or not at all."""
    asked = {row.question for split in ("train", "test") for row in read_examples(students / f"{split}.jsonl")}
    rows = read_examples(config.artifacts / "data" / "train.jsonl")
    examples = [row for row in rows if row.question not in asked]
    folder = model_folder(config.student.model)
    torch.manual_seed(config.seeds[0])
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, config.student.dtype, default_device())
    tokens = [_tokens(tokenizer, example) for example in examples]
    with deterministic():
        _descend(model, [one for one in tokens if len(one[0]) <= settings.max_tokens], settings, config.seeds[0])
    with whole_folder(target) as work:
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)


def _tokens(tokenizer: Any, example: Example) -> Tokens:
    question = student_token_ids(tokenizer, example.question)
    return [*question, *answer_token_ids(tokenizer, example)], len(question)


def _descend(model: Any, tokens: list[Tokens], settings: Tuned, seed: int) -> None:
    draw = random.Random(seed)
    batches = []
    for _ in range(settings.epochs):
        order = draw.sample(tokens, len(tokens))
        batches += [order[i : i + settings.batch_rows] for i in range(0, len(order), settings.batch_rows)]
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, len(batches)))
    model.train()
    with progress(batches, "tuned teacher", "step") as bar:
        for batch in bar:
            input_ids, labels = (tensor.to(model.device) for tensor in _batch(batch))
            loss = model(input_ids=input_ids, labels=labels).loss  # the library shifts them
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPED_NORM)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)


def _share(step: int, steps: int) -> float:
    """The share of the full learning rate."""
    warm = max(1, round(WARM_UP * steps))
    return min((step + 1) / warm, (1 + math.cos(math.pi * step / steps)) / 2)


def _batch(batch: list[Tokens]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, padded on the right, and labels [examples, tokens]."""
    input_ids = pad_right([ids for ids, _ in batch])
    labels = torch.full_like(input_ids, IGNORED)
    for row, (ids, question) in enumerate(batch):
        labels[row, question : len(ids)] = torch.tensor(ids[question:])
    return input_ids, labels
