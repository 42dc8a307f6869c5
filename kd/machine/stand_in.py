"""Folders that stand in for models: true settings and headers, a tokenizer of numbers, and weights that are made up as
a library would read them. They take no download and no disk."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.config import FolderModel, Model
from kd.machine.random_exl2 import bits_of, random_weights, write_model
from kd.models.settings import CONFIG, read_object
from kd.models.vocabulary import PLAIN, TOKENIZER, TOKENIZER_CONFIG

if TYPE_CHECKING:
    import torch

BLOCK = 1_000_003  # numbers drawn, of which weights are made over and over; a prime, so that no two rows are alike
STEP = 7919  # numbers from one tensor's first to the next one's
DEVIATION = 0.02


@dataclass
class MadeUp:
    """How long it has taken to make weights up, which a real model does not take."""

    seconds: float = 0.0


def write_stand_in(folder: Path, document: dict[str, Any]) -> int:
    """Make the folder of a model with the config.json `document`; returns the bytes that its weights stand for."""
    size = write_model(folder, document)
    save_tokenizer(folder, document["vocab_size"])
    record = {path.name: [*_stamp(path), "0" * 64] for path in folder.glob("*.safetensors")}
    (folder.parent / f".{folder.name}.sha256.json").write_text(json.dumps(record))  # nobody needs to read the zeros
    return size


def save_tokenizer(folder: Path, vocabulary: int) -> None:
    """A tokenizer of so many words, which are numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<s>": 0, "</s>": 1} | {str(number): number for number in range(2, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / TOKENIZER))
    special = {"bos_token": "<s>", "eos_token": "</s>", "clean_up_tokenization_spaces": False}
    (folder / TOKENIZER_CONFIG).write_text(json.dumps({"tokenizer_class": PLAIN, **special}))


@contextmanager
def made_up_weights(model: Model, backend: str) -> Iterator[MadeUp]:
    """Let the `backend` have random weights for what it reads from the stand-in that `model` names."""
    assert isinstance(model, FolderModel)
    made_up = MadeUp()
    with ExitStack() as stack:
        if backend == "exllamav2":
            stack.enter_context(random_weights(bits_of(read_object(model.folder / CONFIG))))
        stack.enter_context(_made_up_for_transformers(made_up))
        yield made_up


@contextmanager
def _made_up_for_transformers(made_up: MadeUp) -> Iterator[None]:
    """Every model that transformers has loaded gets random weights, still in the host's memory."""
    import torch
    from transformers import AutoModelForCausalLM

    read = AutoModelForCausalLM.from_pretrained

    def from_pretrained(*arguments: Any, **named: Any) -> Any:
        model = read(*arguments, **named)
        start = time.perf_counter()
        for parameter in model.parameters():
            parameter.data = torch.empty_like(parameter.data)  # a page of the file would be copied before it is written
        _fill([parameter.data for parameter in model.parameters()])
        made_up.seconds += time.perf_counter() - start
        return model

    AutoModelForCausalLM.from_pretrained = from_pretrained
    try:
        yield
    finally:
        AutoModelForCausalLM.from_pretrained = read


def _fill(tensors: list[torch.Tensor]) -> None:
    """Random numbers for weights, ones for norms. A draw for each number would take minutes."""
    import torch

    drawn = torch.empty(2 * BLOCK).normal_(std=DEVIATION, generator=torch.Generator().manual_seed(0))
    blocks = {tensor.dtype: drawn.to(tensor.dtype) for tensor in tensors}
    for number, tensor in enumerate(tensors):
        if tensor.dim() == 1:
            tensor.fill_(1)
            continue
        start = number * STEP % BLOCK
        for piece in tensor.view(-1).split(BLOCK):
            piece.copy_(blocks[tensor.dtype][start : start + len(piece)])


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
