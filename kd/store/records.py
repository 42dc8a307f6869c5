"""What a store and a head say of themselves: their manifests, sealed by their own checksum. Format: docs/store.md."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from kd.errors import UserError
from kd.io.files import read_json, whole_file, write_text

Kind = Literal["states", "logits"]
MANIFEST = "manifest.json"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelIdentity(_Record):
    """Whose states these are, and what computed them. `weights` is the checksum of a local model's folder, None for a
    model of the Hub, which its revision pins, and where the folder is not at hand to compare."""

    name: str
    revision: str | None
    weights: str | None
    dtype: str
    backend: str
    versions: dict[str, str]

    def differs(self, other: ModelIdentity) -> bool:
        """Whether this is another model, or the same read otherwise; versions of libraries may differ."""
        weights = self.weights and other.weights and self.weights != other.weights
        return bool(weights) or any(
            getattr(self, name) != getattr(other, name) for name in ("name", "revision", "dtype", "backend")
        )

    def __str__(self) -> str:
        pinned = self.revision or (f"weights {self.weights[:12]}" if self.weights else "no revision")
        return f"{self.name} at {pinned} ({self.backend}, {self.dtype})"


class Prompt(_Record):
    """The response-priming prompt the teacher read before each question."""

    name: str
    text: str


class Tokenization(_Record):
    """How the teacher's text became tokens; `end` is the token behind each answer, None where there is no answer or it
    has no end."""

    bos: bool
    end: int | None = None
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
    version: Literal[3] = 3
    model: ModelIdentity
    hidden_size: int
    vocabulary_size: int
    norm_eps: float
    sha256: str


class StoreManifest(_Record):
    """What a store holds: rows of `width` numbers, the hidden size (`states`) or the vocabulary's (`logits`). Its `key`
    is that of all that shaped it (kd/fingerprint.py)."""

    format: Literal["kd-teacher-store"] = "kd-teacher-store"
    version: Literal[3] = 3
    key: str
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


def write_sealed(path: Path, manifest: BaseModel) -> None:
    """Write a manifest, whole, with its own checksum at its end."""
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


def read_sealed(path: Path, kind: type[Any]) -> Any:
    """The manifest of that `kind` in `path`; a UserError where it is missing, of another version or changed."""
    maker = "kd head" if kind is HeadManifest else f"kd teacher {path.parent.name}"
    document = read_json(path, f"the manifest that `{maker}` writes")
    try:
        if not isinstance(document, dict):
            raise UserError(f"{path}: not the manifest of a teacher store; run `{maker}` again")
        if document.get("version") != kind.model_fields["version"].default:
            raise UserError(
                f"{path}: format version {document.get('version')}, which this version of kd does not read; "
                f"run `{maker}` again"
            )
        document.pop("seal", None)
        manifest = kind.model_validate(document)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise UserError(
            f"{path}: not a store this version reads ({key}: {problem['msg']}); run `{maker}` again"
        ) from None
    if path.read_text(encoding="utf-8") != _sealed(document):
        raise UserError(f"{path}: changed since it was written; run `{maker}` again")
    return manifest
