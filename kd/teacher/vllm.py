"""A store of the hidden states that vLLM extracts (docs/features/speculative_decoding/extract_hidden_states.md in its
repository, and its ExampleHiddenStatesConnector): a safetensors file a request, named by whoever asked, with
`token_ids` [tokens] and `hidden_states` [tokens, layers, hidden] in the model's dtype.

The last of the layers is taken; asked for as layer `num_hidden_layers`, it is the state before the final norm, which is
what a store keeps. A file says neither which layers it has nor what model it is of: it is known by its tokens, and how
well the states predict those is said, for a person to judge.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kd import fingerprint
from kd.config import Config
from kd.errors import UserError
from kd.io.files import whole_folder, write_whole_file
from kd.io.progress import progress
from kd.models.weights import FLOATS
from kd.store.head import HEAD_FOLDER, read_head, read_head_manifest
from kd.store.records import MANIFEST, HeadManifest, Reading
from kd.store.writer import StoreWriter
from kd.teacher import backends
from kd.teacher.capture import prompt_record, tokenization
from kd.teacher.exchange import open_tensors, refuse_other_folder, what_is_read

if TYPE_CHECKING:
    import torch

PROMPT = "prompt_token_ids"
TOKENS, STATES = "token_ids", "hidden_states"
SHOWN = 8  # tokens in a message


def write_tokens(config: Config, file: Path, prompt: str) -> None:
    """Write what the params' teacher reads behind `prompt` for each prepared training question, JSON lines that are
    each a prompt as vLLM takes it: token ids, so that no tokenizer of its own comes between."""
    _, wanted = what_is_read(config, prompt)
    write_whole_file(file, "".join(json.dumps({PROMPT: reading.token_ids}) + "\n" for reading in wanted))


def import_states(config: Config, source: Path, folder: Path, prompt: str) -> None:
    """Make a store of kind `states` of the files in `source`, taken to be what the params' teacher has for `prompt` and
    the prepared training questions; other requests' files there are passed over.

    A UserError names the question whose tokens no file has, or the file that does not fit.
    """
    refuse_other_folder(folder, MANIFEST, "a store")
    tokenizer, wanted = what_is_read(config, prompt)
    head = _head(config)
    files = _files_of(source, wanted)
    # vLLM's own version is not known.
    model = backends.identity(config.teacher).model_copy(update={"versions": {"vllm": "unknown"}})
    shaped = {"prompt": prompt_record(config, prompt).model_dump(), "head": head.sha256}
    imported = fingerprint.key(__name__, shaped, files=files)
    with whole_folder(folder) as work:
        about = (model, prompt_record(config, prompt), tokenization(tokenizer, config.distill))
        writer = StoreWriter(work, *about, key=imported)
        pairs = progress(list(zip(wanted, files, strict=True)), f"import {source.name}", "question")
        for reading, file in pairs:
            writer.add(reading.example_id, reading.token_ids, _states(file, reading, head), reading.span)
        writer.finish(head.sha256)
    found, guessed = _surprise(config, wanted[0], _states(files[0], wanted[0], head)), math.log(head.vocabulary_size)
    print(
        f"{folder}: by its states a token of {wanted[0].example_id} takes {found:.2f} nats, by a guess {guessed:.2f}; "
        "near a guess or above it, the last layer asked of vLLM was another than num_hidden_layers",
        file=sys.stderr,
    )


def _surprise(config: Config, reading: Reading, states: torch.Tensor) -> float:
    """The mean cross entropy of what is read by states [tokens, hidden], each row's of the next token."""
    import torch

    _, head = read_head(config.artifacts / "teacher" / HEAD_FOLDER)
    tokens = torch.tensor(reading.token_ids[1:])
    return float(torch.nn.functional.cross_entropy(head.logits(states[:-1].half()), tokens))


def _head(config: Config) -> HeadManifest:
    """The head that makes logits of the states, which must be the params' teacher's."""
    folder, model = config.artifacts / "teacher" / HEAD_FOLDER, backends.identity(config.teacher)
    head = read_head_manifest(folder)
    if head.model.differs(model):
        raise UserError(f"{folder}: the head of {head.model}, not of {model}; run `kd head` again")
    return head


def _files_of(source: Path, wanted: Sequence[Reading]) -> list[Path]:
    """For each reading the file that has its tokens."""
    by_tokens = {tuple(tokens): file for file, tokens in _tokens(source)}
    for reading in wanted:
        if tuple(reading.token_ids) not in by_tokens:
            first = ", ".join(map(str, reading.token_ids[:SHOWN]))
            raise UserError(
                f"{source}: no file has the {len(reading.token_ids)} tokens of {reading.example_id} ({first} …) as "
                f"{TOKENS}; give vLLM those that `kd store tokens` writes, and all of them"
            )
    return [by_tokens[tuple(reading.token_ids)] for reading in wanted]


def _tokens(source: Path) -> Iterator[tuple[Path, list[int]]]:
    """The files of a folder, each with the tokens it is of."""
    if not source.is_dir():
        raise UserError(f"{source}: no folder; name the `shared_storage_path` that vLLM wrote its files to")
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise UserError(f"{source}: has no .safetensors file; name the `shared_storage_path` that vLLM wrote to")
    for file in progress(files, f"read tokens in {source.name}", "file"):
        opened = open_tensors(file)
        if missing := {TOKENS, STATES} - set(opened.keys()):
            raise UserError(f"{file}: has no {' and no '.join(sorted(missing))}; it is none of vLLM's hidden states")
        yield file, opened.get_tensor(TOKENS).flatten().tolist()


def _states(file: Path, reading: Reading, head: HeadManifest) -> torch.Tensor:
    """The last layer's states [tokens, hidden]."""
    found = open_tensors(file).get_slice(STATES)
    shape, tokens = found.get_shape(), len(reading.token_ids)
    if len(shape) != 3 or shape[0] != tokens or shape[1] == 0 or shape[2] != head.hidden_size:
        raise UserError(
            f"{file}: {STATES} are {shape} where the {tokens} tokens of {reading.example_id} and the teacher's head "
            f"need [{tokens}, layers, {head.hidden_size}]; extract them again from the params' teacher"
        )
    if found.get_dtype() not in FLOATS:
        raise UserError(f"{file}: {STATES} are {found.get_dtype()}, not one of {', '.join(FLOATS)}; extract them again")
    states: torch.Tensor = found[:, shape[1] - 1]
    return states
