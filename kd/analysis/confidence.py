"""How sure a student is of each next token: the largest probability among all tokens, as measured of the teacher."""

from __future__ import annotations

from itertools import takewhile
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache

from kd.config import Config
from kd.errors import finite
from kd.models.load import encode
from kd.protocol.reading import student_token_ids
from kd.scoring.log import read_log


class Confidence(NamedTuple):
    """The mean of the largest next-token probability over `positions`, those of all questions together."""

    mean: float
    positions: int


class Answer(NamedTuple):
    """A logged response as tokens [prompt + response], and the `rows` [start, stop) that chose its tokens."""

    token_ids: list[int]
    rows: tuple[int, int]


def read_answers(config: Config, experiment: str, tokenizer: Any, count: int) -> list[Answer]:
    """An experiment's responses to the first `count` test questions.

    The log holds text; prompt and response are tokenized apart, as they were when the response was generated. The
    row behind the last token chose the end, unless the limit ended the response: then nothing was chosen there. The
    row behind the prompt always chose something.
    """
    suffix = config.experiments[experiment].suffix
    answers = []
    for row in read_log(config, experiment)[:count]:
        prompt_ids = student_token_ids(tokenizer, row.question + suffix)
        token_ids = prompt_ids + encode(tokenizer, row.written, bos=False)
        start = len(prompt_ids) - 1
        answers.append(Answer(token_ids, (start, max(start + 1, len(token_ids) - row.reached_limit))))
    return answers


def largest_probabilities(
    model: Any, token_ids: list[int], cache: DynamicCache, *, tell_attention: bool = False
) -> torch.Tensor:
    """The largest next-token probability behind each token, float32 [tokens]; the tokens follow what `cache` holds of
    earlier ones, and join it. `tell_attention` makes every attention module return its weights, for whoever listens.
    """
    ids = torch.tensor([token_ids], device=model.device)
    states = model.model(
        ids, past_key_values=cache, use_cache=True, output_attentions=tell_attention
    ).last_hidden_state[0]
    largest: torch.Tensor = model.lm_head(states).float().softmax(-1).amax(-1)
    return largest


def answer_probabilities(model: Any, answer: Answer, question: list[int], cache: DynamicCache) -> torch.Tensor:
    """`largest_probabilities` at the rows of `answer`, float32 [rows]. `cache` holds the tokens of `question`, of which
    those that the answer's prompt starts with are not read again."""
    start, stop = answer.rows
    pairs = zip(question, answer.token_ids[:start], strict=False)
    kept = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    cache.crop(kept)
    return largest_probabilities(model, answer.token_ids[kept:], cache)[start - kept : stop - kept]


def confidence(largest: list[torch.Tensor]) -> Confidence:
    """All positions of several texts together, each position as much as any other."""
    together = torch.cat(largest).double()
    mean = finite(
        float(together.mean()), "the student's mean probability", "lower `distill.learning_rate`, train it again"
    )
    return Confidence(mean, len(together))
