"""Reading a store, which is verified before it is trusted."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.errors import UserError
from kd.io.files import sha256
from kd.store.head import HEAD_FOLDER, Head, NoHead, read_head, read_head_manifest, verify_head
from kd.store.records import MANIFEST, ModelIdentity, Prompt, Reading, StoreManifest, Tokenization, read_sealed
from kd.store.shards import checksum, shard_file, shard_rows

if TYPE_CHECKING:
    import torch


class TeacherStore:
    """A store opened for reading: its manifest and its head are right and its shards are there.

    An example's rows are compared with their checksum when they are first read, and all files by `verify`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: StoreManifest = read_sealed(folder / MANIFEST, StoreManifest)
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

    @property
    def vocabulary_size(self) -> int:
        """How many logits a row makes."""
        if self.manifest.kind == "logits":
            return self.manifest.width
        return read_head_manifest(self._head_folder).vocabulary_size

    def check(self, model: ModelIdentity, prompt: Prompt, tokenization: Tokenization, expected: list[Reading]) -> None:
        """Refuse a store that is not this teacher's for `prompt`, this tokenizer and these examples in this order.

        `expected` is what the teacher must have read. Versions of libraries may differ.
        """
        found = self.manifest
        self._refuse_if(found.model.differs(model), f"captured from {found.model}, not {model}")
        name, text = found.prompt.name, found.prompt.text
        self._refuse_if(name != prompt.name, f"captured with prompt {name!r}, not {prompt.name!r}")
        self._refuse_if(text != prompt.text, f"captured with the prompt {text!r}, not {prompt.text!r}")
        bos = found.tokenization.bos
        self._refuse_if(
            bos != tokenization.bos,
            f"captured {'with' if bos else 'without'} BOS, which `distill.protocol` and its quirks want the other way",
        )
        end, wanted_end = found.tokenization.end, tokenization.end
        self._refuse_if(
            end != wanted_end,
            f"captured {_ended(end)}, where `distill.protocol`, its quirks and the student's tokenizer want an answer "
            f"{_ended(wanted_end)}",
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
            self._shards[example.shard] = shard_rows(self._path(example.shard))
        rows: torch.Tensor = self._shards[example.shard][example.row : example.row + example.rows]
        if example_id not in self._verified:
            if checksum(rows) != example.sha256:
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
        return shard_file(self.folder, self.manifest.kind, number)


def _ended(end: int | None) -> str:
    return "without an end token" if end is None else f"with the end token {end}"
