"""What an experiment takes from outside: its data and its models, named by their bytes.

`kd inputs` is the pipeline's first stage and runs each time. Whatever is wrong with an input is said there, in seconds;
and DVC, which does not look into folders that params name, sees by what it writes that one has other bytes.
"""

from __future__ import annotations

from typing import Any

from kd import config
from kd.config import Config
from kd.data.gsm8k import source_files
from kd.errors import UserError
from kd.fingerprint import model_sha256, versions
from kd.io.files import sha256, whole_folder, write_json
from kd.io.place import refuse_results_folder
from kd.models import smollm2
from kd.models.check import Backend, check_folder
from kd.models.load import refuse_two_vocabularies

FOLDER = "inputs"


def write_inputs(params: Config) -> dict[str, Any]:
    """Check the data, the models and the place for results, and write what they are to artifacts/<profile>/inputs/;
    returns it by name."""
    refuse_results_folder(params.artifacts)
    found = {
        "data": _data(params.dataset),
        "teacher": _model(params.teacher.model, params.teacher.backend),
        "student": _model(params.student.model, "transformers"),
    }
    refuse_two_vocabularies(params.teacher.model, params.student.model)
    with whole_folder(params.artifacts / FOLDER) as work:
        for name, one in found.items():
            write_json(work / f"{name}.json", one)
    return found


def _data(dataset: config.Dataset) -> dict[str, Any]:
    match dataset:
        case config.MiniatureDataset():
            return {"source": dataset.source}
        case config.HubDataset():
            return {"source": dataset.source, "name": dataset.name, "revision": dataset.revision}
        case config.FolderDataset():
            files = source_files(dataset)
            for path in files:
                if not path.is_file():
                    raise UserError(f"{path}: no such file; put it there, or name another folder in `dataset.path`")
            return {"source": dataset.source, "files": {path.name: sha256(path) for path in files}}


def _model(model: config.Model, backend: Backend) -> dict[str, Any]:
    """A model of the Hub by its revision, which pins its bytes: it need not be here to train on a store that is."""
    match model:
        case config.BundledModel():
            return {"source": model.source, "versions": versions([smollm2.PACKAGE])}
        case config.HubModel():
            return {"source": model.source, "name": model.name, "revision": model.revision}
        case config.FolderModel():
            check_folder(model.folder, backend)
            return {"source": model.source, "sha256": model_sha256(model.folder)}
