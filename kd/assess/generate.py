"""Greedy responses of a student to prompts: many at once, or one row at a time as the original did."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kd.assess.ahead import kernels_for
from kd.assess.decode import decode
from kd.assess.row import NOT_A_NUMBER, Row
from kd.io.progress import progress, show_state
from kd.io.stopping import device_failed
from kd.scoring.log import Response


@dataclass(frozen=True)
class Ending:
    """Where a response ends: behind an end token, before one of the strings `stop`, or at its row's limit."""

    tokenizer: Any
    end_ids: frozenset[int]
    stop: Sequence[str] = ()

    def reached(self, row: Row) -> bool:
        """Whether `row` ends with its newest token."""
        if row.new[-1] in self.end_ids or len(row.new) == row.limit:
            return True
        return bool(self.stop) and self._stops(self._text(row))

    def response(self, row: Row) -> Response:
        """What an ended row says."""
        text = self._text(row)
        at_limit = len(row.new) == row.limit and row.new[-1] not in self.end_ids and not self._stops(text)
        cut = min((text.index(string) for string in self.stop if string in text), default=len(text))
        return Response(text[:cut], len(row.new), at_limit)

    def _stops(self, text: str) -> bool:
        return any(string in text for string in self.stop)

    def _text(self, row: Row) -> str:
        text: str = self.tokenizer.decode(row.new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def end_ids(student: Any) -> frozenset[int]:
    """The tokens that end a response, as the model's generation settings name them."""
    ends = student.generation_config.eos_token_id
    return frozenset([] if ends is None else ends if isinstance(ends, list) else [ends])


def respond(
    student: Any, rows: Sequence[Row], ending: Ending, batch_tokens: int, length: int, what: str
) -> Iterator[list[Row]]:
    """Continue every row greedily, many at once (`decode.decode`); yields rows as they end or fail."""
    kernels = kernels_for(student)
    steps = decode(student, rows, batch_tokens, length, ending.reached, ending.end_ids, kernels)
    return _shown(steps, len(rows), what)


def respond_one_at_a_time(student: Any, rows: Sequence[Row], ending: Ending, what: str) -> Iterator[list[Row]]:
    """Continue every row greedily by `transformers`' own generate, as the original did; yields each as it ends."""
    return _shown(_one_at_a_time(student, rows, ending), len(rows), what)


def _shown(steps: Iterator[list[Row]], total: int, what: str) -> Iterator[list[Row]]:
    """`steps` without the empty ones, with progress on stderr."""
    tokens = 0
    with progress((), what, "question", total=total) as bar:
        for ended in steps:
            tokens += sum(len(row.new) for row in ended)
            show_state(bar, f"{tokens} tokens finished")
            if ended:
                bar.update(len(ended))
                yield ended


def _one_at_a_time(student: Any, rows: Sequence[Row], ending: Ending) -> Iterator[list[Row]]:
    for row in rows:
        try:
            row.new = _generate(student, row, ending)
        except RuntimeError as error:
            if not device_failed(error) and str(error) != NOT_A_NUMBER:
                raise
            row.failure = " ".join(str(error).split())
        yield [row]


@torch.inference_mode()
def _generate(student: Any, row: Row, ending: Ending) -> list[int]:
    from transformers import GenerationConfig

    ids = torch.tensor([row.prompt], device=student.device)
    plainly = GenerationConfig(  # and not as the model's own settings have it, which batches know nothing of
        max_new_tokens=row.limit,
        do_sample=False,
        eos_token_id=sorted(ending.end_ids) or None,
        pad_token_id=min(ending.end_ids, default=0),  # nothing is padded; it only silences a warning
    )
    output = student.generate(
        ids,
        plainly,
        attention_mask=torch.ones_like(ids),
        logits_processor=[_refuse_nan],
        stopping_criteria=[_stops_when(row, ending)],
    )
    new: list[int] = output[0, len(row.prompt) :].tolist()
    return new


def _refuse_nan(_: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    if logits.isnan().any():
        raise RuntimeError(NOT_A_NUMBER)
    return logits


def _stops_when(row: Row, ending: Ending) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """`ending` in the form that `generate` takes."""

    def stops(ids: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        ended = ending.reached(Row(row.index, row.prompt, row.limit, ids[0, len(row.prompt) :].tolist()))
        return torch.tensor([ended], device=ids.device)

    return stops
