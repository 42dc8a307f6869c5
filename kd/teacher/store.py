"""The teacher store: every distribution of the teacher, exact and small, and a manifest that says what it is.

The teacher's logits are head(norm(h)), and its final hidden state h is several times smaller than its logits, so a
store keeps h (float16) for every token of every example; norm and head are kept once per teacher, beside the stores.
A store of kind `logits`, imported from the original's files, holds the logits themselves. Format: docs/store.md.

Everything else in the package meets a store through `StoreWriter` and `TeacherStore`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from kd.errors import UserError, WorkFailedError
from kd.files import read_json, sha256, whole_file, write_text
from kd.teacher.tensors import tensor_bytes, write_tensors

if TYPE_CHECKING:
    import torch

Kind = Literal["states", "logits"]

HEAD_FOLDER = "head"
HEAD_FILE = "head.safetensors"
MANIFEST = "manifest.json"
SHARD_EXAMPLES = 16
WRITERS = 4  # shards on their way to the disk, which a killed capture loses at most, and what memory holds
HEAD_ROWS = 8192  # of the head's weight on their way to the disk at a time


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
        return f"{self.name} at {self.revision or 'no revision'} ({self.backend}, {self.dtype})"


class Prompt(_Record):
    """The response-priming prompt the teacher read before each question."""

    name: str
    text: str


class Tokenization(_Record):
    """How the teacher's text became tokens."""

    bos: bool
    vocabulary_sha256: str

    def __str__(self) -> str:
        return f"vocabulary {self.vocabulary_sha256[:12]}"


@dataclass(frozen=True)
class Reading:
    """What the teacher reads for one example, and the `span` [start, stop) of its tokens whose rows are kept."""

    example_id: str
    token_ids: list[int]
    span: tuple[int, int]


class StoredExample(_Record):
    """One example: what was read, and where the rows of its `span` lie: from `row` on in a shard, one per token."""

    id: str
    token_ids: list[int]
    span: tuple[int, int]
    shard: int
    row: int
    sha256: str

    @property
    def rows(self) -> int:
        """How many rows are kept."""
        return self.span[1] - self.span[0]

    @property
    def reading(self) -> Reading:
        """What the teacher read for it."""
        return Reading(self.id, self.token_ids, self.span)


class Shard(_Record):
    """One file of rows."""

    bytes: int
    sha256: str


class HeadManifest(_Record):
    """What a head folder holds."""

    format: Literal["kd-teacher-head"] = "kd-teacher-head"
    version: Literal[2] = 2
    model: ModelIdentity
    hidden_size: int
    vocabulary_size: int
    norm_eps: float
    sha256: str


class StoreManifest(_Record):
    """What a store holds: rows of `width` numbers, the hidden size (`states`) or the vocabulary's (`logits`)."""

    format: Literal["kd-teacher-store"] = "kd-teacher-store"
    version: Literal[2] = 2
    kind: Kind
    model: ModelIdentity
    prompt: Prompt
    tokenization: Tokenization
    batch_rows: int
    dtype: Literal["float16"] = "float16"
    width: int
    head_sha256: str | None
    shards: list[Shard]
    examples: list[StoredExample]


@dataclass(frozen=True)
class TeacherHead:
    """The teacher's final RMS norm and output head: states [tokens, hidden] -> logits [tokens, vocabulary].

    The norm's own dtype says where the teacher rounds: transformers brings the state to the head's dtype before it
    multiplies by the norm's weight, exllamav2 (whose weight is kept as float32) after.
    """

    norm: torch.Tensor
    weight: torch.Tensor
    eps: float

    @property
    def vocabulary_size(self) -> int:
        """How many logits a row has."""
        return self.weight.shape[0]

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Float32 logits; the product in the head's own dtype, as in the teacher."""
        return (self.normalized(states) @ self.weight.T).float()

    def normalized(self, states: torch.Tensor) -> torch.Tensor:
        """What the head multiplies: the norm in float32, its result in the head's dtype."""
        import torch

        wide = states.to(self.weight.device).float()  # in this order half as many bytes travel
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.norm * wide.to(self.norm.dtype)).to(self.weight.dtype)

    def to(self, device: str) -> TeacherHead:
        """The same head on another device."""
        return TeacherHead(self.norm.to(device), self.weight.to(device), self.eps)


@dataclass(frozen=True)
class NoHead:
    """Stands in for the head where a store holds logits: rows [tokens, vocabulary] are what they are."""

    vocabulary_size: int
    device: str = "cpu"

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """The same logits as float32 on this device."""
        return rows.to(self.device).float()

    def to(self, device: str) -> NoHead:
        """The same for another device."""
        return NoHead(self.vocabulary_size, device)


Head = TeacherHead | NoHead


def write_head(folder: Path, model: ModelIdentity, head: TeacherHead) -> None:
    """Write a teacher's norm and head into an empty `folder`."""
    path = folder / HEAD_FILE
    tensors = {"norm.weight": head.norm, "head.weight": head.weight}
    pieces = (piece for tensor in tensors.values() for piece in tensor.split(HEAD_ROWS))
    write_tensors(path, {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}, pieces)
    vocabulary_size, hidden_size = head.weight.shape
    manifest = HeadManifest(
        model=model,
        hidden_size=hidden_size,
        vocabulary_size=vocabulary_size,
        norm_eps=head.eps,
        sha256=sha256(path),
    )
    _write_sealed(folder / MANIFEST, manifest)


def read_head_manifest(folder: Path) -> HeadManifest:
    """What a head folder says it holds."""
    manifest: HeadManifest = _read_sealed(folder / MANIFEST, HeadManifest)
    return manifest


def read_head(folder: Path) -> tuple[HeadManifest, TeacherHead]:
    """A teacher's head with its checksum verified."""
    from safetensors.torch import load_file

    manifest = verify_head(folder)
    tensors = load_file(folder / HEAD_FILE)
    return manifest, TeacherHead(tensors["norm.weight"], tensors["head.weight"], manifest.norm_eps)


def verify_head(folder: Path) -> HeadManifest:
    """Compare a head with its checksum without loading it."""
    manifest, path = read_head_manifest(folder), folder / HEAD_FILE
    if not path.exists() or sha256(path) != manifest.sha256:
        raise UserError(f"{path}: missing or not what its manifest says; run `kd head` again")
    return manifest


class StoreWriter:
    """Fills a folder with rows, example after example; the manifest comes last.

    A shard holds `shard_examples` of them: 16 or two batches, so that questions of like length can share a batch.

    A shard appears whole or not at all, so several processes can fill one folder, each its own shards, and a later
    one can go on where an earlier was killed: `begin_shard` what `has_shard` denies.
    """

    def __init__(
        self,
        folder: Path,
        model: ModelIdentity,
        prompt: Prompt,
        tokenization: Tokenization,
        *,
        kind: Kind = "states",
        batch_rows: int = 1,
    ) -> None:
        self._folder = folder
        self._model = model
        self._prompt = prompt
        self._tokenization = tokenization
        self._kind = kind
        self._batch_rows = batch_rows
        self._shard = 0
        self._pending: list[tuple[Reading, torch.Tensor]] = []
        self._threads = ThreadPoolExecutor(WRITERS)  # write shards while the next is read
        self._writing: deque[Future[None]] = deque()
        self._read_back: dict[Path, _ReadBack] = {}  # of the shards that this process wrote
        self.shard_examples = max(SHARD_EXAMPLES, 2 * batch_rows)

    def has_shard(self, number: int) -> bool:
        """Whether a shard is there, whole."""
        return _shard(self._folder, self._kind, number).exists()

    def begin_shard(self, number: int) -> None:
        """Write what is pending; the next example is the first of shard `number`."""
        self._write_pending()
        self._shard = number

    def add(
        self, example_id: str, token_ids: list[int], rows: torch.Tensor, span: tuple[int, int] | None = None
    ) -> None:
        """Add one example: `rows` [tokens, width], one row per token id; those of `span` (all) are kept as float16."""
        start, stop = span or (0, len(token_ids))
        self._pending.append((Reading(example_id, token_ids, (start, stop)), rows[start:stop]))
        if len(self._pending) == self.shard_examples:
            self.begin_shard(self._shard + 1)

    def finish(self, head_sha256: str | None) -> StoreManifest:
        """Write what is pending and the manifest of all shards, tied to the head they were captured with (`states`).

        Every row is read back and compared with its checksum: what this process wrote as soon as it was written, beside
        the teacher's work; what it found, or other processes wrote, now. WorkFailedError where an example is there
        twice or not what was captured.
        """
        self.flush()
        with ThreadPoolExecutor() as pool:
            found = list(pool.map(lambda path: self._read_back.get(path) or _read_back(path), self._written()))
        examples = [example for shard in found for example in shard.examples]
        _refuse_repeated(self._folder, [example.id for example in examples])
        manifest = StoreManifest(
            kind=self._kind,
            model=self._model,
            prompt=self._prompt,
            tokenization=self._tokenization,
            batch_rows=self._batch_rows,
            width=found[0].width if found else 0,
            head_sha256=head_sha256,
            shards=[shard.shard for shard in found],
            examples=examples,
        )
        _write_sealed(self._folder / MANIFEST, manifest)
        return manifest

    def flush(self) -> None:
        """Write what is pending as a shard, and return when it is on the disk."""
        self._write_pending()
        while self._writing:
            self._writing.popleft().result()

    def settle(self) -> None:
        """Return when no shard is on its way any more, whatever became of them: something else has failed."""
        wait(self._writing)

    def _write_pending(self) -> None:
        if len(self._writing) == WRITERS:  # so memory holds few shards; and an error is raised here
            self._writing.popleft().result()
        if self._pending:
            path = _shard(self._folder, self._kind, self._shard)
            self._writing.append(self._threads.submit(self._write_and_read_back, path, self._shard, self._pending))
            self._pending = []

    def _write_and_read_back(self, path: Path, number: int, pending: list[tuple[Reading, torch.Tensor]]) -> None:
        _write_shard(path, self._kind, number, pending)
        self._read_back[path] = _read_back(path)

    def _written(self) -> Iterator[Path]:
        for number in range(len(list(self._folder.glob(f"{self._kind}-*.safetensors")))):
            yield _shard(self._folder, self._kind, number)


def _write_shard(path: Path, kind: Kind, number: int, pending: list[tuple[Reading, torch.Tensor]]) -> None:
    import torch

    examples, row = [], 0
    together = torch.cat([rows for _, rows in pending]).to(torch.float16).cpu()  # one transfer from the device
    kept = together.split([len(rows) for _, rows in pending])
    for (reading, _), rows in zip(pending, kept, strict=True):
        examples.append(
            StoredExample(
                id=reading.example_id,
                token_ids=reading.token_ids,
                span=reading.span,
                shard=number,
                row=row,
                sha256=_checksum(rows),
            )
        )
        row += len(rows)
    # The shard describes itself, so a process that goes on, or puts shards together, needs nothing else.
    description = json.dumps([example.model_dump() for example in examples], separators=(",", ":"))
    shapes = {str(kind): (together.dtype, tuple(together.shape))}
    with whole_file(path, path.with_suffix(".part")) as work:
        write_tensors(work, shapes, [together], {"examples": description})


@dataclass(frozen=True)
class _ReadBack:
    shard: Shard
    width: int
    examples: list[StoredExample]


def _read_back(path: Path) -> _ReadBack:
    """A shard as it lies on the disk, its rows compared with their checksums."""
    examples, rows = _described_examples(path), _rows(path)
    for example in examples:
        if _checksum(rows[example.row : example.row + example.rows]) != example.sha256:
            raise WorkFailedError(f"{path}: its rows are not those that were captured; remove it and go on")
    return _ReadBack(Shard(bytes=path.stat().st_size, sha256=sha256(path)), rows.get_shape()[1], examples)


class TeacherStore:
    """A store opened for reading: its manifest and its head are right and its shards are there.

    An example's rows are compared with their checksum when they are first read, and all files by `verify`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: StoreManifest = _read_sealed(folder / MANIFEST, StoreManifest)
        self._again = f"run `kd teacher {self.manifest.prompt.name}` again"
        self._by_id = {example.id: example for example in self.manifest.examples}
        self._shards: dict[int, Any] = {}
        self._verified: set[str] = set()
        self._check_head()
        self._check_shards()

    @cached_property
    def head(self) -> Head:
        """What makes logits of rows; on the CPU until it is replaced by its copy on another device."""
        if self.manifest.kind == "logits":
            return NoHead(self.manifest.width)
        return read_head(self._head_folder)[1]

    def check(self, model: ModelIdentity, prompt: Prompt, tokenization: Tokenization, expected: list[Reading]) -> None:
        """Refuse a store that is not this teacher's for `prompt`, this tokenizer and these examples in this order.

        `expected` is what the teacher must have read. Versions of libraries may differ.
        """
        found = self.manifest
        self._refuse_if(str(found.model) != str(model), f"captured from {found.model}, not {model}")
        name, text = found.prompt.name, found.prompt.text
        self._refuse_if(name != prompt.name, f"captured with prompt {name!r}, not {prompt.name!r}")
        self._refuse_if(text != prompt.text, f"captured with the prompt {text!r}, not {prompt.text!r}")
        bos = found.tokenization.bos
        self._refuse_if(
            bos != tokenization.bos,
            f"captured {'with' if bos else 'without'} BOS, which `distill.protocol` and its quirks want the other way",
        )
        self._refuse_if(
            found.tokenization != tokenization,
            f"captured with another tokenizer ({found.tokenization}, not {tokenization}); teacher and student must "
            "share one",
        )
        count = len(found.examples)
        self._refuse_if(count != len(expected), f"holds {count} examples where the data has {len(expected)}")
        for row, (example, wanted) in enumerate(zip(found.examples, expected, strict=True), start=1):
            self._check_reading(f" row {row}", example.reading, wanted)

    def verify(self) -> None:
        """Compare every file with its checksum; a UserError names the one that is not what was captured."""
        if self.manifest.kind == "states":
            verify_head(self._head_folder)
        paths = [self._path(number) for number in range(len(self.manifest.shards))]
        with ThreadPoolExecutor() as pool:
            for path, found, shard in zip(paths, pool.map(sha256, paths), self.manifest.shards, strict=True):
                if found != shard.sha256:
                    raise UserError(
                        f"{path}: its {self.manifest.kind} are not those that were captured (SHA-256 {found[:12]}, not "
                        f"{shard.sha256[:12]}); {self._again}"
                    )

    def rows(self, example_id: str) -> torch.Tensor:
        """The kept rows of one example, [rows, width], float16: final hidden states before the norm, or logits.

        Reads them alone, not their shard. KeyError for an unknown id; UserError where they are not what was captured.
        """
        example = self._by_id[example_id]
        if example.shard not in self._shards:
            self._shards[example.shard] = _rows(self._path(example.shard))
        rows: torch.Tensor = self._shards[example.shard][example.row : example.row + example.rows]
        if example_id not in self._verified:
            if _checksum(rows) != example.sha256:
                raise UserError(
                    f"{self._path(example.shard)} ({example_id}): its {self.manifest.kind} are not those that were "
                    f"captured; {self._again}"
                )
            self._verified.add(example_id)
        return rows

    def states(self, example_id: str) -> torch.Tensor:
        """The rows of a store of kind `states`."""
        if self.manifest.kind != "states":
            raise UserError(f"{self.folder}: holds logits, imported from the original's file, and no states")
        return self.rows(example_id)

    def logits(self, example_id: str) -> torch.Tensor:
        """The teacher's logits for one example: [rows, vocabulary], float32, on the head's device."""
        return self.head.logits(self.rows(example_id))

    def _refuse_if(self, condition: bool, wrong: str, row: str = "") -> None:
        if condition:
            raise UserError(f"{self.folder}{row}: {wrong}; {self._again}")

    def _check_reading(self, row: str, found: Reading, wanted: Reading) -> None:
        found_id, wanted_id = found.example_id, wanted.example_id
        self._refuse_if(found_id != wanted_id, f"example {found_id!r} where the data has {wanted_id!r}", row)
        row += f" ({found_id})"
        if found.token_ids != wanted.token_ids:
            pairs = zip([*found.token_ids, None], [*wanted.token_ids, None], strict=False)
            at, (stored, asked) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
            self._refuse_if(True, f"other tokens than the data's question: token {at} is {stored}, not {asked}", row)
        self._refuse_if(found.span != wanted.span, f"the rows of tokens {found.span}, not {wanted.span}", row)

    @property
    def _head_folder(self) -> Path:
        return self.folder.parent / HEAD_FOLDER

    def _check_head(self) -> None:
        if self.manifest.kind == "logits":
            return
        found, wanted = read_head_manifest(self._head_folder).sha256, self.manifest.head_sha256
        if found != wanted:
            raise UserError(
                f"{self.folder}: captured with head {str(wanted)[:12]}, but {self._head_folder} holds {found[:12]}; "
                f"run `kd head` and `kd teacher {self.manifest.prompt.name}` again"
            )

    def _check_shards(self) -> None:
        for number, shard in enumerate(self.manifest.shards):
            path = self._path(number)
            size = path.stat().st_size if path.exists() else 0
            if size != shard.bytes:
                raise UserError(f"{path}: missing or cut short ({size} of {shard.bytes} bytes); {self._again}")

    def _path(self, number: int) -> Path:
        return _shard(self.folder, self.manifest.kind, number)


def _refuse_repeated(folder: Path, ids: list[str]) -> None:
    repeated = [example_id for example_id, count in Counter(ids).items() if count > 1]
    if repeated:
        raise WorkFailedError(f"{folder}: {repeated[0]} is there twice; remove the folder and capture again")


def _shard(folder: Path, kind: Kind, number: int) -> Path:
    return folder / f"{kind}-{number:05d}.safetensors"


def _rows(path: Path) -> Any:
    """The rows of a shard as a slice that reads only those asked for."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, "pt").get_slice(path.name.partition("-")[0])
    except (FileNotFoundError, SafetensorError) as error:
        raise UserError(f"{path}: not readable ({error}); capture the prompt again") from None


def _described_examples(path: Path) -> list[StoredExample]:
    """The examples of a shard, as it says itself."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return TypeAdapter(list[StoredExample]).validate_json(file.metadata()["examples"])


def _checksum(rows: torch.Tensor) -> str:
    return hashlib.sha256(tensor_bytes(rows)).hexdigest()


def _write_sealed(path: Path, manifest: BaseModel) -> None:
    with whole_file(path, path.with_suffix(".part")) as work:
        write_text(work, _sealed(manifest.model_dump()))


def _sealed(document: dict[str, Any]) -> str:
    """A manifest's text, which ends with its own checksum; each item of its lists has a line."""
    seal = hashlib.sha256(json.dumps(document).encode()).hexdigest()
    lines = [f" {json.dumps(key)}: {_value(value)}" for key, value in (document | {"seal": seal}).items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _value(value: Any) -> str:
    if not isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)
    return "[\n" + ",\n".join(f"  {json.dumps(item, separators=(',', ':'))}" for item in value) + "\n ]"


def _read_sealed(path: Path, kind: type[Any]) -> Any:
    document = read_json(path, "the manifest of a teacher store")
    try:
        if not isinstance(document, dict):
            raise UserError(f"{path}: not the manifest of a teacher store; capture it again")
        document.pop("seal", None)
        manifest = kind.model_validate(document)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise UserError(f"{path}: not a store this version reads ({key}: {problem['msg']}); capture it again") from None
    if path.read_text(encoding="utf-8") != _sealed(document):
        raise UserError(f"{path}: changed since it was written; capture it again")
    return manifest
