"""Assessment logs as lm-evaluation-harness leaves its own runs: for each run a folder with a results file and, for
every test question, a line of what was asked, answered and taken from the answer.

Format: lm_eval/loggers/evaluation_tracker.py and lm_eval/result_schema.py in its repository at commit 4e7e0d4 (version
0.4.13.dev0). A run takes the place of its model, the profile that of its task, and the rules of the log, with what a
person decided, that of its filter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from kd.config import Config, Experiment
from kd.errors import UserError
from kd.io.files import write_whole_file
from kd.machine.record import FOLDER as RECORDS
from kd.models.load import model_name
from kd.publish.records import read_made
from kd.scoring.log import Answered, read_answered
from kd.scoring.review import NO_ANSWER

FILTER = "documented"  # the rules, docs/extraction.md
METRIC = "exact_match"
NOT_FOUND = "[invalid]"  # the harness's word for a response that its filter finds nothing in
MAKER = "kd"
NOT_KNOWN = datetime(1970, 1, 1, tzinfo=UTC)  # when a run whose record is not here was assessed


def write_samples(config: Config, folder: Path) -> list[Path]:
    """Write every run's log into `folder`, `<run>/samples_<profile>_<time>.jsonl` and `<run>/results_<time>.json`; the
    files. The time is that of the assessment, in UTC, as its record has it; other files there are left alone."""
    if folder.is_file():
        raise UserError(f"{folder}: is a file; name a folder")
    read = {run: read_answered(config, run) for run in config.experiments}  # all of them before anything is written
    written = []
    for run, rows in read.items():
        at = _assessed_at(config, run)
        name = at.replace(tzinfo=None).isoformat().replace(":", "-")
        samples = [_sample(number, row, config.experiments[run]) for number, row in enumerate(rows)]
        lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        document = json.dumps(_results(config, run, samples, at), indent=2, ensure_ascii=False)
        for file, text in ((f"samples_{config.profile}_{name}.jsonl", lines), (f"results_{name}.json", document)):
            write_whole_file(folder / run / file, text)
            written.append(folder / run / file)
    return written


def _sample(number: int, row: Answered, asked: Experiment) -> dict[str, Any]:
    """One test question, keys in the harness's order. What it was asked, answered and scored are lists of one request
    and one repetition; the hashes are those that its own runs on the same question have."""
    doc = {"question": row.question, "answer": row.answer}
    prompt = row.question + asked.suffix
    return {
        "doc_id": number,
        "doc": doc,
        "target": row.answer,
        "arguments": {"gen_args_0": {"arg_0": prompt, "arg_1": _generation(asked)}},
        "resps": [[row.written]],
        "filtered_resps": [NOT_FOUND if row.taken in (None, NO_ANSWER) else row.taken],
        "filter": FILTER,
        "metrics": [METRIC],
        "doc_hash": _sha256(json.dumps(doc, indent=2, ensure_ascii=False)),
        "prompt_hash": _sha256(prompt),
        "target_hash": _sha256(row.answer),
        METRIC: float(row.right),
    }


def _results(config: Config, run: str, samples: Sequence[dict[str, Any]], at: datetime) -> dict[str, Any]:
    """What one run came to. Of the harness's keys those are left out that say what it does not know of a run that is
    not its own: its version, its commit and its machine."""
    task, asked = config.profile, config.experiments[run]
    scores = [sample[METRIC] for sample in samples]
    hashes = "".join(sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"] for sample in samples)
    return {
        "results": {
            task: {
                "name": task,
                "alias": task,
                "sample_len": len(samples),
                f"{METRIC},{FILTER}": fmean(scores),
                f"{METRIC}_stderr,{FILTER}": stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else "N/A",
            }
        },
        "group_subtasks": {task: []},
        "configs": {task: _task(config, asked)},
        "versions": {task: None},
        "n-shot": {task: 0},
        "higher_is_better": {task: {METRIC: True}},
        "n-samples": {task: {"original": len(samples), "effective": len(samples)}},
        "config": {"model": MAKER, "model_args": _model(config, asked), "model_dtype": config.student.dtype},
        "date": at.timestamp(),
        "task_hashes": {task: _sha256(hashes)},
        "model_source": MAKER,
        "model_name": run,
        "model_name_sanitized": run,
        "system_instruction": None,
        "chat_template": None,
        "fewshot_as_multiturn": False,
    }


def _task(config: Config, asked: Experiment) -> dict[str, Any]:
    """The test as the harness describes one of its tasks."""
    return {
        "task": config.profile,
        "dataset_path": getattr(config.dataset, "name", config.dataset.source),
        "test_split": "test",
        "doc_to_text": "{{question}}" + asked.suffix,
        "doc_to_target": "{{answer}}",
        "num_fewshot": 0,
        "output_type": "generate_until",
        "generation_kwargs": _generation(asked),
        "repeats": 1,
        "filter_list": [{"name": FILTER, "filter": [{"function": "custom"}]}],
        "metric_list": [{"metric": METRIC, "aggregation": "mean", "higher_is_better": True}],
    }


def _model(config: Config, asked: Experiment) -> dict[str, str]:
    """The student, a folder by its last name alone, and its adapter where it has one."""
    model = config.student.model
    name = Path(model.path).name if model.source == "folder" else model_name(model)
    student = {"pretrained": name, "dtype": config.student.dtype}
    return student if asked.adapter is None else student | {"peft": f"adapters/{asked.adapter}"}


def _generation(asked: Experiment) -> dict[str, Any]:
    return {"until": list(asked.stop), "do_sample": False, "temperature": 0.0, "max_gen_toks": asked.max_new_tokens}


def _assessed_at(config: Config, run: str) -> datetime:
    """When a run's assessment ended, where its record is here."""
    path = config.artifacts / RECORDS / "assess" / f"{run}.json"
    if not path.exists():
        return NOT_KNOWN
    return read_made(path).ended.astimezone(UTC)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
