"""Running an assessment: which rows are asked, who answers them, what is kept when it stops, and the log at its end."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kd import fingerprint
from kd.assess.generate import Ending, end_ids, respond, respond_one_at_a_time
from kd.assess.journal import Journal
from kd.assess.row import Row
from kd.config import Config
from kd.data.rows import Example, read_examples
from kd.errors import UserError, WorkFailedError
from kd.io.distributed import take_gpus, this_process, wait_for_others
from kd.io.files import remove_stale, unfinished_folder, whole_file, write_text
from kd.io.stopping import what_is_kept
from kd.kernels import lacking
from kd.models.adapters import ADAPTER_WEIGHTS, adapter_folder, load_student
from kd.models.load import context_length, default_device, load_tokenizer, model_folder
from kd.protocol.reading import student_token_ids
from kd.scoring.extract import extract
from kd.scoring.log import Response, log_file, log_text


@dataclass(frozen=True)
class Questions:
    """An experiment's test questions as its student reads them: as text in `prompts`, as tokens in `rows`."""

    examples: list[Example]
    prompts: list[str]
    rows: list[Row]
    tokenizer: Any


class Respondent:
    """An experiment's student, loaded, that answers rows of `questions`."""

    def __init__(self, config: Config, experiment: str, questions: Questions) -> None:
        self.student = load_student(
            model_folder(config.student.model),
            config.student.dtype,
            adapter_folder(config, experiment),
            default_device(),
        )
        stop = config.experiments[experiment].stop
        self.ending = Ending(questions.tokenizer, end_ids(self.student), stop)
        self.batch_tokens = config.assess.batch_tokens
        # Of all rows, not of those asked for, so that it is the same for what an interrupted run left.
        self.length = max(len(row.prompt) + row.limit for row in questions.rows)
        self.what = f"assess, {experiment}"

    def answer(self, rows: Sequence[Row], exact: bool) -> Iterator[list[Row]]:
        """Rows as they end or fail, in no particular order."""
        if exact:
            return respond_one_at_a_time(self.student, rows, self.ending, self.what)
        return respond(self.student, rows, self.ending, self.batch_tokens, self.length, self.what)


def assess(config: Config, experiment: str, *, exact: bool = False) -> None:
    """Let one student answer the test questions and write artifacts/<profile>/logs/<experiment>.csv.

    Rows that an unfinished run of the same assessment left are kept. Of several processes each does a part and the
    first writes the log. `exact` generates one row at a time, as the original did.
    """
    process = this_process()
    take_gpus(process)
    questions = read_questions(config, experiment)
    target, key = log_file(config, experiment), log_key(config, experiment, exact)
    count = len(questions.rows)
    with (
        unfinished_folder(target, key, process) as work,
        what_is_kept(work, kept := partial(_kept, work)),
    ):
        journal = Journal(work, process.rank)
        done = journal.read()
        todo = [questions.rows[i] for i in process.part(count) if i not in done]
        if todo:
            respondent = Respondent(config, experiment, questions)
            for ended in respondent.answer(todo, exact):
                journal.add({row.index: respondent.ending.response(row) for row in ended if not row.failure})
            _refuse_failed(todo, questions, kept())
        if process.rank == 0:
            remove_stale(work)
            waiting = f"assess, {experiment}, waiting for other processes"
            wait_for_others(lambda: count - len(journal.read()), waiting, "row")
            responses = journal.read()
            with whole_file(target, work / target.name) as file:
                in_order = [responses[i] for i in range(count)]
                write_text(file, log_text(questions.examples, questions.prompts, in_order))
            shutil.rmtree(work)


def compare(config: Config, experiment: str, count: int) -> dict[str, Any]:
    """Answer the first `count` test questions both ways: which share of the responses, and of the answers that the
    rules take from them, is identical, and how long each way took (seconds). Writes nothing."""
    questions = read_questions(config, experiment)
    respondent = Respondent(config, experiment, questions)
    responses: dict[str, list[Response]] = {}
    seconds: dict[str, float] = {}
    for way in ("batched", "exact"):
        start = time.perf_counter()
        rows = [Row(row.index, row.prompt, row.limit) for row in questions.rows[:count]]
        for ended in respondent.answer(rows, exact=way == "exact"):
            _refuse_failed(ended, questions, "nothing is compared")
        seconds[way] = time.perf_counter() - start
        responses[way] = [respondent.ending.response(row) for row in rows]
    answers = {way: [found.answer for found in extract(r.text for r in given)] for way, given in responses.items()}
    return {
        "experiment": experiment,
        "rows": len(responses["exact"]),
        "identical_responses": _share_alike(responses["batched"], responses["exact"]),
        "identical_answers": _share_alike(answers["batched"], answers["exact"]),
        "tokens": {way: sum(response.tokens for response in given) for way, given in responses.items()},
        "seconds": seconds,
    }


def comparison_text(compared: dict[str, Any]) -> str:
    """The result of `compare` as a few lines for a terminal."""
    tokens, seconds = compared["tokens"], compared["seconds"]
    lines = [f"{way}: {seconds[way]:.1f} s, {tokens[way] / seconds[way]:.0f} tokens/s" for way in ("batched", "exact")]
    return "\n".join(
        [
            f"{compared['experiment']}, {compared['rows']} rows",
            f"identical responses: {compared['identical_responses']:.1%}",
            f"identical extracted answers: {compared['identical_answers']:.1%}",
            *lines,
        ]
    )


def read_questions(config: Config, experiment: str) -> Questions:
    """The prepared test questions with the experiment's suffix; a UserError where one does not fit the context."""
    settings = config.experiments[experiment]
    folder = model_folder(config.student.model)
    tokenizer = load_tokenizer(folder)
    context = context_length(folder)
    examples = read_examples(config.artifacts / "data" / "test.jsonl")
    prompts = [example.question + settings.suffix for example in examples]
    rows = []
    for index, (example, prompt) in enumerate(zip(examples, prompts, strict=True)):
        token_ids = student_token_ids(tokenizer, prompt)
        if len(token_ids) >= context:
            raise UserError(
                f"{example.id}: {len(token_ids)} tokens leave no room for an answer in the student's context of "
                f"{context}; shorten the question or leave it out of the data"
            )
        rows.append(Row(index, token_ids, min(settings.max_new_tokens, context - len(token_ids))))
    return Questions(examples, prompts, rows, tokenizer)


def _kept(work: Path) -> str:
    return f"finished rows are kept in {work}; the same command tries only the others again"


def _refuse_failed(rows: Sequence[Row], questions: Questions, consequence: str) -> None:
    failed = [f"{questions.examples[row.index].id} failed ({row.failure})" for row in rows if row.failure]
    if failed:
        raise WorkFailedError(f"{', '.join(failed)}; {consequence}")


def log_key(config: Config, experiment: str, exact: bool) -> str:
    """The key of all that shapes a log."""
    adapter = adapter_folder(config, experiment)
    kernels = not exact and lacking() is None
    return fingerprint.key(
        __name__,
        {
            "student": config.student.model_dump(),
            "assess": config.assess.model_dump(),
            "experiment": asdict(config.experiments[experiment]),
            "exact": exact,
            "kernels": kernels,
        },
        files=[
            config.artifacts / "data" / "test.jsonl",
            *([adapter / "adapter_config.json", adapter / ADAPTER_WEIGHTS] if adapter else []),
        ],
        models={"student": model_folder(config.student.model)},
        libraries=("torch", "transformers", "peft", "tokenizers", *(["triton"] if kernels else [])),
        device=fingerprint.device_name(),
    )


def _share_alike(some: Sequence[object], others: Sequence[object]) -> float:
    return sum(one == other for one, other in zip(some, others, strict=True)) / len(some)
