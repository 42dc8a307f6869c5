"""The teacher store: every distribution of the teacher, exact and small, and a manifest that says what it is.

The teacher's logits are head(norm(h)), and its final hidden state h is several times smaller than its logits, so a
store keeps h (float16) for every token of every example; norm and head are kept once per teacher, beside the stores:

    teacher/head/   manifest.json  head.safetensors      (`norm.weight` [hidden], `head.weight` [vocabulary, hidden])
    teacher/base/   manifest.json  states-00000.safetensors …   (`states` [tokens, hidden], examples end to end)

Everything else in the package meets a store through `StoreWriter` and `TeacherStore`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from kd.errors import UserError
from kd.files import read_json, sha256, write_json

if TYPE_CHECKING:
    import torch

HEAD_FOLDER = "head"
MANIFEST = "manifest.json"
SHARD_BYTES = 256 * 2**20


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelIdentity(_Record):
    """Whose states these are, and what computed them."""

    name: str
    revision: str | None
    dtype: str
    backend: str
    versions: dict[str, str]

    def __str__(self) -> str:
        return f"{self.name} at {(self.revision or 'no revision')[:12]} ({self.backend}, {self.dtype})"


class Prompt(_Record):
    """The response-priming prompt the teacher read before each question."""

    name: str
    text: str


class Tokenization(_Record):
    """How the teacher's text became tokens."""

    bos: bool
    vocabulary_sha256: str


class StoredExample(_Record):
    """Where one example's rows lie: rows start:stop of a shard, those of the tokens `span` of `token_ids`."""

    id: str
    token_ids: list[int]
    span: tuple[int, int]
    shard: int
    start: int
    stop: int
    sha256: str


class HeadManifest(_Record):
    """What a head folder holds."""

    format: Literal["kd-teacher-head"] = "kd-teacher-head"
    version: Literal[1] = 1
    model: ModelIdentity
    hidden_size: int
    vocabulary_size: int
    norm_eps: float
    sha256: str


class StoreManifest(_Record):
    """What a store holds."""

    format: Literal["kd-teacher-store"] = "kd-teacher-store"
    version: Literal[1] = 1
    kind: Literal["states"] = "states"
    model: ModelIdentity
    prompt: Prompt
    tokenization: Tokenization
    dtype: Literal["float16"] = "float16"
    hidden_size: int
    head_sha256: str
    examples: list[StoredExample]


@dataclass(frozen=True)
class TeacherHead:
    """The teacher's final RMS norm and output head: states [tokens, hidden] -> logits [tokens, vocabulary]."""

    norm: torch.Tensor
    weight: torch.Tensor
    eps: float

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Float32 logits; the norm in float32 and the product in the head's own dtype, as in the teacher."""
        import torch

        wide = states.to(self.weight.device, torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.norm * wide.to(self.weight.dtype) @ self.weight.T).float()

    def to(self, device: str) -> TeacherHead:
        """The same head on another device."""
        return TeacherHead(self.norm.to(device), self.weight.to(device), self.eps)


def write_head(folder: Path, model: ModelIdentity, head: TeacherHead) -> None:
    """Write a teacher's norm and head into an empty `folder`."""
    from safetensors.torch import save_file

    path = folder / "head.safetensors"
    save_file({"norm.weight": head.norm.contiguous(), "head.weight": head.weight.contiguous()}, path)
    vocabulary_size, hidden_size = head.weight.shape
    manifest = HeadManifest(
        model=model,
        hidden_size=hidden_size,
        vocabulary_size=vocabulary_size,
        norm_eps=head.eps,
        sha256=sha256(path),
    )
    write_json(folder / MANIFEST, manifest.model_dump())


def read_head(folder: Path) -> tuple[HeadManifest, TeacherHead]:
    """A teacher's head with its checksum verified."""
    from safetensors.torch import load_file

    manifest = _read_manifest(folder, HeadManifest)
    path = folder / "head.safetensors"
    if not path.exists() or sha256(path) != manifest.sha256:
        raise UserError(f"{path}: missing or not what its manifest says; run `kd head` again")
    tensors = load_file(path)
    return manifest, TeacherHead(tensors["norm.weight"], tensors["head.weight"], manifest.norm_eps)


class StoreWriter:
    """Fills an empty folder with states, example after example; the manifest comes last."""

    def __init__(self, folder: Path, model: ModelIdentity, prompt: Prompt, tokenization: Tokenization) -> None:
        self._folder = folder
        self._model = model
        self._prompt = prompt
        self._tokenization = tokenization
        self._examples: list[StoredExample] = []
        self._pending: list[torch.Tensor] = []
        self._rows = 0
        self._shards = 0
        self._hidden_size = 0

    def add(self, example_id: str, token_ids: list[int], states: torch.Tensor, span: tuple[int, int]) -> None:
        """Add one example: `states` [rows, hidden], one per token of `token_ids[slice(*span)]`, kept as float16."""
        import torch

        rows = states.to("cpu", torch.float16)
        start, stop = self._rows, self._rows + len(rows)
        self._examples.append(
            StoredExample(
                id=example_id,
                token_ids=token_ids,
                span=span,
                shard=self._shards,
                start=start,
                stop=stop,
                sha256=_checksum(rows),
            )
        )
        self._pending.append(rows)
        self._rows = stop
        self._hidden_size = rows.shape[1]
        if stop * self._hidden_size * 2 >= SHARD_BYTES:
            self._flush()

    def finish(self, head_sha256: str) -> None:
        """Write what is pending and the manifest, tied to the head it was captured with."""
        if self._pending:
            self._flush()
        manifest = StoreManifest(
            model=self._model,
            prompt=self._prompt,
            tokenization=self._tokenization,
            hidden_size=self._hidden_size,
            head_sha256=head_sha256,
            examples=self._examples,
        )
        write_json(self._folder / MANIFEST, manifest.model_dump())

    def _flush(self) -> None:
        import torch
        from safetensors.torch import save_file

        save_file({"states": torch.cat(self._pending)}, _shard(self._folder, self._shards))
        self._pending = []
        self._rows = 0
        self._shards += 1


class TeacherStore:
    """A store opened for reading, verified: the head belongs to it and every row has its checksum."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = _read_manifest(folder, StoreManifest)
        head_manifest, self.head = read_head(folder.parent / HEAD_FOLDER)
        if head_manifest.sha256 != self.manifest.head_sha256:
            raise UserError(
                f"{folder}: captured with another head than {folder.parent / HEAD_FOLDER}; run `kd head` and "
                f"`kd teacher {self.manifest.prompt.name}` again"
            )
        self._by_id = {example.id: example for example in self.manifest.examples}
        self._shards: dict[int, Any] = {}
        self._verify()

    def check(
        self,
        model: ModelIdentity,
        prompt: Prompt,
        tokenization: Tokenization,
        expected: dict[str, tuple[list[int], tuple[int, int]]],
    ) -> None:
        """Refuse a store that is not this teacher's for `prompt`, this tokenizer and these examples in this order.

        `expected` maps each example id to the token ids the teacher must have read and the span of its rows.
        """
        found = self.manifest
        again = f"run `kd teacher {prompt.name}` again"
        if str(found.model) != str(model):
            raise UserError(f"{self.folder}: captured from {found.model}, not {model}; {again}")
        if found.prompt != prompt:
            raise UserError(f"{self.folder}: captured with prompt {found.prompt.name!r}, not {prompt.name!r}; {again}")
        if found.tokenization != tokenization:
            raise UserError(
                f"{self.folder}: captured with another tokenizer (bos {found.tokenization.bos}, vocabulary "
                f"{found.tokenization.vocabulary_sha256[:12]}, not bos {tokenization.bos}, vocabulary "
                f"{tokenization.vocabulary_sha256[:12]}); teacher and student must share one, or {again}"
            )
        ids = [example.id for example in found.examples]
        if len(ids) != len(expected):
            raise UserError(f"{self.folder}: holds {len(ids)} examples where the data has {len(expected)}; {again}")
        for row, (example, wanted) in enumerate(zip(found.examples, expected, strict=True), start=1):
            if example.id != wanted:
                raise UserError(
                    f"{self.folder} row {row}: example {example.id!r} where the data has {wanted!r}; {again}"
                )
            if (example.token_ids, example.span) != expected[wanted]:
                raise UserError(f"{self.folder} row {row} ({wanted}): other tokens than the data's question; {again}")

    def states(self, example_id: str) -> torch.Tensor:
        """The final hidden states of one example, before the norm: [tokens, hidden], float16."""
        example = self._by_id[example_id]
        rows: torch.Tensor = self._shard(example.shard)[example.start : example.stop]
        return rows

    def logits(self, example_id: str) -> torch.Tensor:
        """The teacher's logits for one example, rebuilt: [tokens, vocabulary], float32, on the head's device."""
        return self.head.logits(self.states(example_id))

    def _shard(self, number: int) -> Any:
        """A slice that reads only the rows asked for."""
        from safetensors import SafetensorError, safe_open

        if number not in self._shards:
            path = _shard(self.folder, number)
            try:
                self._shards[number] = safe_open(path, "pt").get_slice("states")
            except (FileNotFoundError, SafetensorError) as error:
                raise UserError(f"{path}: missing or cut short ({error}); capture the prompt again") from None
        return self._shards[number]

    def _verify(self) -> None:
        for row, example in enumerate(self.manifest.examples, start=1):
            states = self.states(example.id)
            start, stop = example.span
            if list(states.shape) != [stop - start, self.manifest.hidden_size]:
                raise UserError(
                    f"{self.folder} row {row} ({example.id}): {len(states)} states for {stop - start} tokens; "
                    f"run `kd teacher {self.manifest.prompt.name}` again"
                )
            if _checksum(states) != example.sha256:
                raise UserError(
                    f"{self.folder} row {row} ({example.id}): its states are not those that were captured; "
                    f"run `kd teacher {self.manifest.prompt.name}` again"
                )


def _read_manifest(folder: Path, kind: type[Any]) -> Any:
    path = folder / MANIFEST
    document = read_json(path, "the manifest of a teacher store")
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise UserError(f"{path}: not a store this version reads ({key}: {problem['msg']}); capture it again") from None


def _shard(folder: Path, number: int) -> Path:
    return folder / f"states-{number:05d}.safetensors"


def _checksum(rows: torch.Tensor) -> str:
    return hashlib.sha256(rows.contiguous().numpy().data).hexdigest()
