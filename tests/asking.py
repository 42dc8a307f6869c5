"""Asking a model without the pipeline."""

from __future__ import annotations

from typing import Any

from kd.assess.decode import ALIGNMENT
from kd.assess.generate import Ending, end_ids, respond, respond_one_at_a_time
from kd.assess.row import Row
from kd.models.load import encode
from kd.scoring.log import Response


def rows_of(tokenizer: Any, prompts: list[str], limit: int) -> list[Row]:
    return [Row(i, encode(tokenizer, prompt, bos=True), limit) for i, prompt in enumerate(prompts)]


def answers(
    model: Any, tokenizer: Any, prompts: list[str], limit: int, slots: int | None = 8, stop: tuple[str, ...] = ()
) -> list[Response]:
    """Responses in the prompts' order; `slots` None is one row at a time."""
    rows, ending = rows_of(tokenizer, prompts, limit), Ending(tokenizer, end_ids(model), stop)
    length = max(len(row.prompt) for row in rows) + limit
    if slots is None:
        ended = respond_one_at_a_time(model, rows, ending, "test")
    else:
        ended = respond(model, rows, ending, slots * (length + ALIGNMENT), length, "test")
    assert sorted(row.index for some in ended for row in some) == list(range(len(prompts)))
    return [ending.response(row) for row in rows]
