"""The paper's figures beside one's own: only where a profile reruns the paper."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from kd import paper
from kd.config import BundledModel, Config, Dataset, Experiment, FolderModel, MiniatureDataset, Model
from kd.io.files import read_json


def differences(config: Config) -> list[str]:
    """What this experiment has that the paper's had not, in words; nothing where it is the paper's.

    It goes by what the params say. A folder of GSM8K is GSM8K; a folder of a model is the model whose name it has,
    whatever its revision. How the work is done (dtype, batches of the teacher, cache, step) is not compared.
    """
    data, distill = config.dataset, config.distill
    training = distill.model_dump(include=set(paper.TRAINING))
    found = {
        "other data": not _is_gsm8k(data) or data.answers != paper.TRAIN_ANSWERS,
        "another number of rows": (data.train_rows, data.test_rows) != (paper.TRAIN_ROWS, paper.TEST_ROWS),
        "another teacher": not _is(config.teacher.model, paper.TEACHER),
        "another student": not any(_is(config.student.model, name) for name in paper.STUDENTS),
        "another protocol": distill.protocol != paper.TRAINING["protocol"],
        "other prompts": any(text != config.prompts.get(name, text) for name, text in paper.PROMPTS.items()),
        "other settings in training": training | {"protocol": ""} != paper.TRAINING | {"protocol": ""}
        or any(one.dropout != paper.DROPOUT.get(one.student, 0.1) for one in config.adapters.values()),
        "students asked in another way": not all(
            _is_asked_so(one) for one in config.experiments.values() if one.student in paper.RESULTS
        ),
    }
    return [what for what, is_so in found.items() if is_so]


def read_prompts(config: Config) -> dict[str, Any]:
    """What `measure_prompts` wrote, with the `published` figure of each (None: there is none to stand beside it);
    nothing where it has not run."""
    path = config.artifacts / "statistics.json"
    if not path.exists():
        return {}
    figures = {} if differences(config) else paper.MEAN_MAX_PROBABILITY
    measured = read_json(path, "what `kd statistics` writes")
    return {prompt: one | {"published": figures.get(prompt)} for prompt, one in measured.items()}


def _is_gsm8k(data: Dataset) -> bool:
    return not isinstance(data, MiniatureDataset) and (data.source == "folder" or data.name == paper.DATASET)


def _is(model: Model, name: str) -> bool:
    """Whether it is the Hub's model of that name, or a copy of it in a folder."""
    if isinstance(model, BundledModel):
        return False
    if isinstance(model, FolderModel):
        return model.folder.name == PurePath(name).name
    return model.name == name


def _is_asked_so(one: Experiment) -> bool:
    """Whether a row of the paper's table is asked as the paper asked it."""
    of_paper = (paper.SUFFIX, paper.CONTROL_LIMIT) if one.student == paper.CONTROL else ("", paper.LIMIT)
    return (one.suffix, one.max_new_tokens) == of_paper and not one.stop
