"""Filling a store, by several processes and behind kills."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING

from kd.errors import WorkFailedError
from kd.store.records import MANIFEST, Kind, ModelIdentity, Prompt, Reading, StoreManifest, Tokenization, write_sealed
from kd.store.shards import ReadBack, read_back, shard_file, write_shard

if TYPE_CHECKING:
    import torch

SHARD_EXAMPLES = 16
WRITERS = 4  # shards on their way to the disk, which a killed capture loses at most, and what memory holds


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
        key: str,
        kind: Kind = "states",
        batch_rows: int = 1,
    ) -> None:
        self._folder = folder
        self._model = model
        self._prompt = prompt
        self._tokenization = tokenization
        self._key = key
        self._kind = kind
        self._batch_rows = batch_rows
        self._shard = 0
        self._pending: list[tuple[Reading, torch.Tensor]] = []
        self._threads = ThreadPoolExecutor(WRITERS)  # write shards while the next is read
        self._writing: deque[Future[None]] = deque()
        self._read_back: dict[Path, ReadBack] = {}  # of the shards that this process wrote
        self.shard_examples = max(SHARD_EXAMPLES, 2 * batch_rows)

    def has_shard(self, number: int) -> bool:
        """Whether a shard is there, whole."""
        return shard_file(self._folder, self._kind, number).exists()

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
            found = list(pool.map(lambda path: self._read_back.get(path) or read_back(path), self._written()))
        examples = [example for shard in found for example in shard.examples]
        _refuse_repeated(self._folder, [example.id for example in examples])
        manifest = StoreManifest(
            key=self._key,
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
        write_sealed(self._folder / MANIFEST, manifest)
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
            path = shard_file(self._folder, self._kind, self._shard)
            self._writing.append(self._threads.submit(self._write, path, self._shard, self._pending))
            self._pending = []

    def _write(self, path: Path, number: int, pending: list[tuple[Reading, torch.Tensor]]) -> None:
        self._read_back[path] = write_shard(path, self._kind, number, pending)

    def _written(self) -> Iterator[Path]:
        for number in range(len(list(self._folder.glob(f"{self._kind}-*.safetensors")))):
            yield shard_file(self._folder, self._kind, number)


def _refuse_repeated(folder: Path, ids: list[str]) -> None:
    repeated = [example_id for example_id, count in Counter(ids).items() if count > 1]
    if repeated:
        raise WorkFailedError(f"{folder}: {repeated[0]} is there twice; remove the folder and capture again")
