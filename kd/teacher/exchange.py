"""Stores in exchange with the paper's notebooks: one safetensors file a prompt, `Question 1` … `Question N`, each the
float16 logits [1, tokens, vocabulary] of one question (llama-3.1-405b-6bpw/inference_gsm8k*.ipynb, `save_logits`).

Neither way holds more than a few questions in memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kd import fingerprint
from kd.config import Config
from kd.data.rows import read_examples
from kd.errors import UserError
from kd.io.files import whole_file, whole_folder
from kd.io.progress import progress
from kd.io.text import refuse_folder
from kd.models.load import default_device, load_tokenizer, model_folder
from kd.protocol.reading import readings
from kd.store.reader import TeacherStore
from kd.store.records import MANIFEST, Reading
from kd.store.tensors import write_tensors
from kd.store.writer import StoreWriter
from kd.teacher import backends
from kd.teacher.capture import prompt_record, tokenization


def export_logits(folder: Path, file: Path) -> None:
    """Write the store in `folder` as the notebooks would have: its logits, in the order of safetensors' own writer."""
    import torch

    refuse_folder(file)
    opened = TeacherStore(folder)
    opened.head = opened.head.to(default_device())
    examples = {f"Question {i}": example for i, example in enumerate(opened.manifest.examples, start=1)}
    names = sorted(examples)
    width = opened.head.vocabulary_size
    shapes = {name: (torch.float16, (1, examples[name].rows, width)) for name in names}
    logits = (opened.logits(examples[name].id).half() for name in progress(names, f"export to {file.name}", "question"))
    with whole_file(file) as work:
        write_tensors(work, shapes, logits)


def import_logits(config: Config, file: Path, folder: Path, prompt: str) -> None:
    """Make a store of kind `logits` of the notebooks' `file`, taken to be what the params' teacher said behind `prompt`
    to the prepared training questions; a UserError names the question that does not fit."""
    refuse_folder(file)
    refuse_other_folder(folder, MANIFEST, "a store")
    tokenizer, wanted = what_is_read(config, prompt)
    tensors = open_tensors(file)
    if len(tensors.keys()) != len(wanted):
        raise UserError(f"{file}: holds {len(tensors.keys())} tensors where the data has {len(wanted)} questions")
    # The libraries that computed the file are not known.
    model = backends.identity(config.teacher).model_copy(update={"versions": {}})
    imported = fingerprint.key(__name__, {"prompt": prompt_record(config, prompt).model_dump()}, files=[file])
    with whole_folder(folder) as work:
        about = (model, prompt_record(config, prompt), tokenization(tokenizer, config.distill))
        writer = StoreWriter(work, *about, key=imported, kind="logits")
        for number, reading in enumerate(progress(wanted, f"import {file.name}", "question"), start=1):
            logits = _logits(file, tensors, f"Question {number}", reading)
            writer.add(reading.example_id, reading.token_ids, logits, reading.span)
        writer.finish(head_sha256=None)


def what_is_read(config: Config, prompt: str) -> tuple[Any, list[Reading]]:
    """The teacher's tokenizer, and what the teacher reads behind `prompt` for each prepared training question."""
    tokenizer = load_tokenizer(model_folder(config.teacher.model))
    examples = read_examples(config.artifacts / "data" / "train.jsonl")
    return tokenizer, readings(config.distill, config.prompts[prompt], tokenizer, examples)


def refuse_other_folder(target: Path, file: str, what: str) -> None:
    """Refuse to replace what lies at `target`, unless that is an earlier folder of the kind, by a `file` in it."""
    if target.is_dir() and any(target.iterdir()) and not (target / file).exists():
        raise UserError(f"{target}: holds something else than {what}, which would be gone; name another folder")
    if target.is_file():
        raise UserError(f"{target}: is a file, where {what} is a folder; name another")


def open_tensors(file: Path) -> Any:
    """A safetensors file, opened; a UserError where it is none."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, "pt")
    except (FileNotFoundError, SafetensorError) as error:
        raise UserError(f"{file}: not a safetensors file ({error}); make it again") from None


def _logits(file: Path, tensors: Any, name: str, reading: Reading) -> Any:
    import torch

    if name not in tensors.keys():  # noqa: SIM118  (not a dictionary)
        raise UserError(f"{file}: has no {name!r}; its keys should be 'Question 1' to 'Question N'")
    logits, tokens = tensors.get_tensor(name), len(reading.token_ids)
    if logits.dtype != torch.float16 or logits.ndim != 3 or logits.shape[:2] != (1, tokens):
        raise UserError(
            f"{file}: {name!r} is {str(logits.dtype).removeprefix('torch.')} {list(logits.shape)} where the {tokens} "
            f"tokens of {reading.example_id} need float16 [1, {tokens}, vocabulary]; check its prompt and tokenizer"
        )
    return logits[0]
