"""A store as DistillKit's compressed logits (github.com/arcee-ai/DistillKit at commit a61c2e7, distillkit/compression
and distillkit/sample_logits_vllm.py): of each token's distribution the k largest log probabilities, as float32.

A folder of `data_0.parquet` …, one row an example, and `compression_config.yaml`, the settings its decoder needs.
Columns: `input_ids` [tokens]; `compressed_logprobs` [tokens][4 k bytes], largest first, little endian;
`bytepacked_indices` [tokens][bytes], the k token ids in as many bits each as the vocabulary needs, first bit first;
`labels` [tokens], the token ids where the store has the teacher's row, elsewhere -100, by which DistillKit leaves a
position out of its losses. Row i is the distribution behind token i there as it is here, so nothing is shifted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kd.errors import UserError
from kd.io.files import whole_folder, write_text
from kd.io.progress import progress
from kd.models.load import default_device
from kd.store.reader import TeacherStore
from kd.store.records import StoredExample
from kd.teacher.exchange import refuse_other_folder

if TYPE_CHECKING:
    import torch

TOP_K = 128  # what DistillKit's README recommends
FILE_EXAMPLES = 256  # as its own capture writes them
GROUP_EXAMPLES = 16  # that memory holds
LEFT_OUT = -100
SETTINGS = "compression_config.yaml"


def export_top_k(folder: Path, target: Path, k: int = TOP_K) -> None:
    """Write the store in `folder` as DistillKit's own capture of the same tokens would be, all k values exact.

    Where the store has no row of a token, all probability is shared by k tokens alike: numbers that spoil nothing, and
    `labels` leave them out.
    """
    refuse_other_folder(target, SETTINGS, "an export for DistillKit")
    opened = TeacherStore(folder)
    if k > opened.vocabulary_size:
        raise UserError(f"--top-k {k}: the teacher's vocabulary has {opened.vocabulary_size} tokens; name no more")
    opened.head = opened.head.to(default_device())
    examples = opened.manifest.examples
    with whole_folder(target) as work, progress((), f"export to {target.name}", "question", len(examples)) as bar:
        for number, start in enumerate(range(0, len(examples), FILE_EXAMPLES)):
            _write_file(work / f"data_{number}.parquet", opened, examples[start : start + FILE_EXAMPLES], k, bar)
        write_text(work / SETTINGS, settings_text(opened.vocabulary_size, k))


def largest(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest log probabilities of rows of logits [rows, vocabulary] and their token ids, both [rows, k], largest
    first."""
    log_probabilities, token_ids = logits.log_softmax(-1).topk(k)
    return token_ids, log_probabilities


def index_bits(vocabulary_size: int) -> int:
    """How many bits a token id takes."""
    return max(1, (vocabulary_size - 1).bit_length())


def row_bytes(vocabulary_size: int, k: int) -> int:
    """How many bytes a token takes: k float32 values and k packed ids."""
    return 4 * k + (k * index_bits(vocabulary_size) + 7) // 8


def packed(token_ids: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """Rows of ids [rows, k] as bytes [rows, bytes], each id in `bits` bits, the first the most significant, the last
    byte filled up with zeros."""
    places = np.arange(bits - 1, -1, -1)
    digits = (token_ids[:, :, None] >> places & 1).astype(np.uint8)
    return np.packbits(digits.reshape(len(token_ids), -1), axis=1)


def settings_text(vocabulary_size: int, k: int) -> str:
    """DistillKit's `DistributionQuantizationConfig` of an export, as YAML; the same goes into its params as
    `logprob_compressor`."""
    settings = {
        "d": vocabulary_size,
        "k": k,
        "exact_k": k,
        "exact_dtype": "float32",
        "polynomial_terms": None,
        "residual_bins": [],
        "delta_encoding": False,
        "error_diffusion": False,
    }
    return "".join(f"{key}: {json.dumps(value).strip(chr(34))}\n" for key, value in settings.items())


def _write_file(path: Path, opened: TeacherStore, examples: Sequence[StoredExample], k: int, bar: Any) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    ids, rows = pa.list_(pa.uint64()), pa.list_(pa.list_(pa.uint8()))
    columns = {
        "input_ids": ids,
        "compressed_logprobs": rows,
        "bytepacked_indices": rows,
        "labels": pa.list_(pa.int64()),
    }
    about = opened.manifest.model_dump(include={"key", "model", "prompt", "tokenization"})
    schema = pa.schema(columns, metadata={"kd": json.dumps(about)})
    with parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, len(examples), GROUP_EXAMPLES):
            group = examples[start : start + GROUP_EXAMPLES]
            writer.write_table(pa.Table.from_arrays(list(_columns(opened, group, k)), schema=schema))
            bar.update(len(group))


def _columns(opened: TeacherStore, examples: Sequence[StoredExample], k: int) -> Iterator[Any]:
    """The columns of a few examples, in the order of the schema."""
    import pyarrow as pa

    values, ids, labels = [], [], []
    for example in examples:
        token_ids, log_probabilities = largest(opened.logits(example.id), k)
        values.append(_every_token(example, log_probabilities.cpu().numpy(), np.full(k, -np.log(k))))
        ids.append(_every_token(example, token_ids.cpu().numpy(), np.arange(k)))
        labels.append(np.full(len(example.token_ids), LEFT_OUT))
        labels[-1][slice(*example.span)] = example.token_ids[slice(*example.span)]
    lengths = [len(example.token_ids) for example in examples]
    read = np.concatenate([np.array(example.token_ids, dtype=np.uint64) for example in examples])
    yield _lists(pa.array(read), lengths)
    for table in (
        np.concatenate(values).astype("<f4").view(np.uint8),
        packed(np.concatenate(ids), index_bits(opened.vocabulary_size)),
    ):
        yield _lists(_lists(pa.array(table.ravel()), [table.shape[1]] * len(table)), lengths)
    yield _lists(pa.array(np.concatenate(labels)), lengths)


def _every_token(
    example: StoredExample, rows: np.ndarray[Any, Any], otherwise: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    """The rows of an example's span, with `otherwise` for the tokens before and behind it: [tokens, k]."""
    start, stop = example.span
    every = np.tile(otherwise.astype(rows.dtype), (len(example.token_ids), 1))
    every[start:stop] = rows
    return every


def _lists(values: Any, lengths: Sequence[int]) -> Any:
    """An Arrow array of lists, cut from `values`."""
    import pyarrow as pa

    return pa.ListArray.from_arrays(pa.array(np.cumsum([0, *lengths]), pa.int32()), values)
