"""How the students attend: entropy, focus, sparsity and likeness of layers, from attention streamed layer by layer.

The quantities are those of the paper's attention analysis; docs/attention.md defines them and says how to read them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cosine_similarity
from transformers import DynamicCache

from kd.analysis.confidence import (
    Answer,
    Confidence,
    answer_probabilities,
    confidence,
    largest_probabilities,
    read_answers,
)
from kd.analysis.students import Students, student_names
from kd.config import Config
from kd.data.rows import Example, read_examples
from kd.io.progress import progress
from kd.protocol.reading import student_token_ids

METRICS = ("entropy", "focus", "sparsity")
SPARSE = 0.1  # a weight below this counts as none


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


@torch.inference_mode()
def measure(config: Config) -> dict[str, Measured]:
    """Every student on the first `attention.questions` test questions (all where there are fewer) and on the responses
    in its log."""
    names, examples = student_names(config), questions_of(config)
    students = Students(config, names)
    answers = {name: read_answers(config, name, students.tokenizer, len(examples)) for name in names}
    questions = [student_token_ids(students.tokenizer, example.question) for example in examples]
    measured = {}
    with progress((), "attention", "question", total=len(names) * len(questions)) as bar:
        for name in names:
            with students.student(name) as model:
                measured[name] = _measure(model, questions, answers[name], bar.update)
    return measured


def questions_of(config: Config) -> list[Example]:
    """The test questions that are read."""
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
def maps(
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
