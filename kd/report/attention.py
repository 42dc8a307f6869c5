"""How the students attend: entropy, focus, sparsity and likeness of layers, from attention streamed layer by layer.

The quantities are those of the paper's attention analysis; docs/attention.md defines them and says how to read them.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cosine_similarity
from transformers import DynamicCache

from kd.config import Config
from kd.dataset import Example, read_examples
from kd.distill.alignment import student_token_ids
from kd.errors import UserError
from kd.files import whole_folder, write_text
from kd.progress import progress
from kd.report import attention_charts as charts
from kd.report.confidence import (
    Answer,
    Confidence,
    answer_probabilities,
    confidence,
    largest_probabilities,
    read_answers,
)
from kd.report.students import Students, student_names
from kd.report.teachers import read_prompts

METRICS = ("entropy", "focus", "sparsity")
SPARSE = 0.1  # a weight below this counts as none
TOP_HEADS = 10
LAYER_HEADER = ("experiment", "layer", *METRICS, "similarity_to_next")
CONFIDENCE_HEADER = ("experiment", "question", "question_positions", "answer", "answer_positions")
SUMMARY_HEADER = ("Experiment", "Entropy", "Focus", "Sparsity", "Similarity", "Sure, question", "Sure, answer")


@dataclass(frozen=True)
class Measured:
    """One student, averaged over the questions.

    `heads` holds each head's entropy (nats), focus and sparsity, [layers, heads, 3]; `similarity` that of each layer
    to the next, [layers - 1]; `question` and `answer` how sure the student is over the positions of either.
    """

    heads: NDArray[np.float64]
    similarity: NDArray[np.float64]
    question: Confidence
    answer: Confidence

    @property
    def layers(self) -> NDArray[np.float64]:
        """Entropy, focus and sparsity averaged over the heads, [layers, 3]."""
        averaged: NDArray[np.float64] = self.heads.mean(axis=1)
        return averaged


class Layers:
    """The metrics of one text, from the attention weights of each layer in turn.

    Of a layer only the map averaged over its heads is kept, [tokens, tokens], and only until the next layer.
    """

    def __init__(self) -> None:
        self._heads: list[torch.Tensor] = []
        self._similarity: list[torch.Tensor] = []
        self._last: torch.Tensor | None = None

    def add(self, weights: torch.Tensor) -> None:
        """Take the next layer's weights [heads, tokens, tokens]."""
        self._heads.append(head_metrics(weights))
        mean = weights.float().mean(0).flatten()
        if self._last is not None:
            self._similarity.append(cosine_similarity(self._last, mean, dim=0))
        self._last = mean

    def heads(self) -> NDArray[np.float64]:
        """[layers, heads, 3]"""
        return torch.stack(self._heads).double().cpu().numpy()

    def similarity(self) -> NDArray[np.float64]:
        """[layers - 1]"""
        return torch.tensor(self._similarity, dtype=torch.float64).numpy()


def head_metrics(weights: torch.Tensor) -> torch.Tensor:
    """Entropy (nats), focus and sparsity of each head of one layer on one text, float32 [heads, 3].

    `weights` are [heads, tokens, tokens]: row q tells how much position q attends to each position up to q. Entropy is
    the mean over the rows of -sum(w ln w); focus the mean of the diagonal, what a token attends to itself; sparsity the
    share of weights below `SPARSE` on and below the diagonal. What the causal mask hides counts nowhere.
    """
    weights = weights.float()
    entropy = torch.special.entr(weights).sum(-1).mean(-1)
    focus = weights.diagonal(dim1=-2, dim2=-1).mean(-1)
    seen = torch.ones(weights.shape[-2:], dtype=torch.bool, device=weights.device).tril()
    sparsity = (weights[:, seen] < SPARSE).float().mean(-1)
    return torch.stack([entropy, focus, sparsity], dim=-1)


@contextmanager
def layers_to(receive: Callable[[torch.Tensor], None], model: Any) -> Iterator[None]:
    """Within the block, hand `receive` each layer's weights [heads, tokens, tokens] as they are made.

    The model gets none of them back, so that a layer's are freed before the next layer makes its own: transformers
    would keep the maps of all layers until its forward returns.
    """

    def take(_: Any, __: Any, output: tuple[Any, ...]) -> tuple[Any, ...]:
        mixed, weights, *rest = output
        receive(weights[0])
        return mixed, None, *rest

    hooks = [layer.self_attn.register_forward_hook(take) for layer in model.model.layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def analyse(config: Config) -> dict[str, Measured]:
    """Measure every student, write artifacts/<profile>/attention/ and return the students by their experiments."""
    measured = measure(config)
    prompts = read_prompts(config)
    with whole_folder(charts.folder(config)) as work:
        write_text(work / "attention.csv", _csv(layer_rows(measured)))
        write_text(work / "heads.csv", _csv(head_rows(measured)))
        write_text(work / "confidence.csv", _csv(confidence_rows(measured)))
        for i, metric in enumerate(METRICS):
            charts.layer_chart(metric, {name: one.layers[:, i] for name, one in measured.items()}, work)
        charts.layer_chart("similarity", {name: one.similarity for name, one in measured.items()}, work)
        charts.student_chart({name: (one.question.mean, one.answer.mean) for name, one in measured.items()}, work)
        if prompts:
            charts.teacher_chart(prompts, work)
    return measured


@torch.inference_mode()
def measure(config: Config) -> dict[str, Measured]:
    """Every student on the first `attention.questions` test questions (all where there are fewer) and on the responses
    in its log."""
    names, examples = student_names(config), _questions(config)
    students = Students(config, names)
    answers = {name: read_answers(config, name, students.tokenizer, len(examples)) for name in names}
    questions = [student_token_ids(students.tokenizer, example.question) for example in examples]
    measured = {}
    with progress((), "attention", "question", total=len(names) * len(questions)) as bar:
        for name in names:
            with students.student(name) as model:
                measured[name] = _measure(model, questions, answers[name], bar.update)
    return measured


def draw_heads(config: Config, heads: Sequence[tuple[int, int]]) -> list[Path]:
    """Draw the named heads (layer, head) of every student on the first test question; returns the images' paths."""
    names = student_names(config)
    students = Students(config, names)
    for layer, head in heads:
        if layer >= students.layers or head >= students.heads:
            raise UserError(
                f"--heads {layer}:{head}: no such head; the student has layers 0 to {students.layers - 1} "
                f"and heads 0 to {students.heads - 1}"
            )
    question = student_token_ids(students.tokenizer, _questions(config)[0].question)
    maps = {}
    for name in names:
        with students.student(name) as model:
            maps[name] = _maps(model, question, heads)
    with whole_folder(charts.heads_folder(config)) as work:
        drawn = [
            charts.head_chart(layer, head, {name: found[layer, head] for name, found in maps.items()}, work)
            for layer, head in heads
        ]
    return [charts.heads_folder(config) / path.name for path in drawn]


def layer_rows(measured: dict[str, Measured]) -> list[tuple[str, ...]]:
    """The rows of attention.csv, its header first; the last layer has no next one."""
    rows: list[tuple[str, ...]] = [LAYER_HEADER]
    for name, one in measured.items():
        similarity = [*map(_number, one.similarity), ""]
        for layer, values in enumerate(one.layers):
            rows.append((name, str(layer), *map(_number, values), similarity[layer]))
    return rows


def head_rows(measured: dict[str, Measured]) -> list[tuple[str, ...]]:
    """The rows of heads.csv, its header first: the heads whose entropy, and those whose focus, varies most between the
    students (population variance), and each student's value."""
    rows: list[tuple[str, ...]] = [("metric", "rank", "layer", "head", "variance", *measured)]
    every = np.stack([one.heads for one in measured.values()])
    for metric in ("entropy", "focus"):
        values = every[..., METRICS.index(metric)]
        variance = values.var(axis=0)
        order = np.argsort(-variance, axis=None, kind="stable")[:TOP_HEADS]
        for rank, (layer, head) in enumerate(zip(*np.unravel_index(order, variance.shape), strict=True), start=1):
            numbers = map(_number, (variance[layer, head], *values[:, layer, head]))
            rows.append((metric, str(rank), str(layer), str(head), *numbers))
    return rows


def confidence_rows(measured: dict[str, Measured]) -> list[tuple[str, ...]]:
    """The rows of confidence.csv, its header first."""
    rows: list[tuple[str, ...]] = [CONFIDENCE_HEADER]
    for name, one in measured.items():
        question, answer = one.question, one.answer
        rows.append(
            (name, _number(question.mean), str(question.positions), _number(answer.mean), str(answer.positions))
        )
    return rows


def summary_rows(measured: dict[str, Measured]) -> list[tuple[str, ...]]:
    """A table for a terminal, its header first: each student averaged over its layers."""
    rows: list[tuple[str, ...]] = [SUMMARY_HEADER]
    for name, one in measured.items():
        values = (*one.layers.mean(axis=0), one.similarity.mean(), one.question.mean, one.answer.mean)
        rows.append((name, *(f"{value:.4f}" for value in values)))
    return rows


def _questions(config: Config) -> list[Example]:
    return read_examples(config.artifacts / "data" / "test.jsonl")[: config.attention.questions]


def _measure(
    model: Any, questions: Sequence[list[int]], answers: Sequence[Answer], done: Callable[[], object]
) -> Measured:
    """One student; `done` is called after each question."""
    heads, similarity, asked, answered = [], [], [], []
    for question, answer in zip(questions, answers, strict=True):
        layers, cache = Layers(), DynamicCache()
        with layers_to(layers.add, model):
            asked.append(largest_probabilities(model, question, cache, tell_attention=True))
        heads.append(layers.heads())
        similarity.append(layers.similarity())
        answered.append(answer_probabilities(model, answer, question, cache))
        done()
    return Measured(np.mean(heads, axis=0), np.mean(similarity, axis=0), confidence(asked), confidence(answered))


@torch.inference_mode()
def _maps(
    model: Any, token_ids: list[int], heads: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], NDArray[np.float32]]:
    """The attention [tokens, tokens] of the named heads (layer, head) on one text."""
    maps: dict[tuple[int, int], NDArray[np.float32]] = {}
    layers = iter(range(model.config.num_hidden_layers))

    def keep(weights: torch.Tensor) -> None:
        layer = next(layers)
        maps.update({(layer, head): weights[head].float().cpu().numpy() for at, head in heads if at == layer})

    with layers_to(keep, model):
        largest_probabilities(model, token_ids, DynamicCache(), tell_attention=True)
    return maps


def _number(value: float) -> str:
    return f"{value:.9g}"


def _csv(rows: Sequence[tuple[str, ...]]) -> str:
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(rows)
    return table.getvalue()
