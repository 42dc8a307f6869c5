"""`kd attention`: the students' attention and confidence as tables and charts (docs/attention.md)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kd.analysis.attention import METRICS, Measured, maps, measure, questions_of
from kd.analysis.students import Students, student_names
from kd.config import Config
from kd.errors import UserError
from kd.io.files import whole_folder, write_text
from kd.io.table import table_text
from kd.protocol.reading import student_token_ids
from kd.report import attention_charts as charts
from kd.report.published import read_prompts

TOP_HEADS = 10
LAYER_HEADER = ("experiment", "layer", *METRICS, "similarity_to_next")
CONFIDENCE_HEADER = ("experiment", "question", "question_positions", "answer", "answer_positions")
SUMMARY_HEADER = ("Experiment", "Entropy", "Focus", "Sparsity", "Similarity", "Sure, question", "Sure, answer")


def analyse(config: Config) -> dict[str, Measured]:
    """Measure every student, write artifacts/<profile>/attention/ and return the students by their experiments."""
    from matplotlib.style import context

    measured = measure(config)
    prompts = read_prompts(config)
    with whole_folder(charts.folder(config)) as work, context("default"):
        write_text(work / "attention.csv", table_text(layer_rows(measured)))
        write_text(work / "heads.csv", table_text(head_rows(measured)))
        write_text(work / "confidence.csv", table_text(confidence_rows(measured)))
        for i, metric in enumerate(METRICS):
            charts.layer_chart(metric, {name: one.layers[:, i] for name, one in measured.items()}, work)
        charts.layer_chart("similarity", {name: one.similarity for name, one in measured.items()}, work)
        charts.student_chart({name: (one.question.mean, one.answer.mean) for name, one in measured.items()}, work)
        if prompts:
            charts.teacher_chart(prompts, work)
    return measured


def draw_heads(config: Config, heads: Sequence[tuple[int, int]]) -> list[Path]:
    """Draw the named heads (layer, head) of every student on the first test question; returns the images' paths."""
    from matplotlib.style import context

    names = student_names(config)
    students = Students(config, names)
    for layer, head in heads:
        if layer >= students.layers or head >= students.heads:
            raise UserError(
                f"--heads {layer}:{head}: no such head; the student has layers 0 to {students.layers - 1} "
                f"and heads 0 to {students.heads - 1}"
            )
    question = student_token_ids(students.tokenizer, questions_of(config)[0].question)
    found = {}
    for name in names:
        with students.student(name) as model:
            found[name] = maps(model, question, heads)
    with whole_folder(charts.heads_folder(config)) as work, context("default"):
        drawn = [
            charts.head_chart(layer, head, {name: one[layer, head] for name, one in found.items()}, work)
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


def _number(value: float) -> str:
    return f"{value:.9g}"
