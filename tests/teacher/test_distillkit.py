"""An export for DistillKit: what lies in it, and where DistillKit is installed, what its own decoder makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import contents
from hypothesis import given
from hypothesis import strategies as st
from params import keep
from pyarrow import parquet
from ruamel.yaml import YAML

from kd.cli import main
from kd.store.reader import TeacherStore
from kd.teacher import distillkit

STORE, OUT = Path("artifacts/mini/teacher/base"), Path("out")
K = 5


@pytest.fixture
def store(
    on_cpu: None,
    tiny_params: dict[str, Any],
    write_params: Callable[[dict[str, Any]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> TeacherStore:
    """A store of kept answers, and `out`, exported of it in several files."""
    del on_cpu
    keep(tiny_params, "base-kd")
    tiny_params["distill"]["protocol"] = "aligned"
    write_params(tiny_params)
    monkeypatch.setattr(distillkit, "FILE_EXAMPLES", 8)
    monkeypatch.setattr(distillkit, "GROUP_EXAMPLES", 3)
    export = ["store", "export", str(STORE), str(OUT), "--format", "distillkit", "--top-k", str(K)]
    for command in (["prepare"], ["head"], ["teacher", "base"], export):
        assert main(command) == 0
    return TeacherStore(STORE)


def exported() -> list[dict[str, Any]]:
    assert [path.name for path in sorted(OUT.iterdir())] == [distillkit.SETTINGS, "data_0.parquet", "data_1.parquet"]
    return [row for path in sorted(OUT.glob("*.parquet")) for row in parquet.read_table(path).to_pylist()]


def test_an_export_has_the_largest_log_probabilities_of_every_row(store: TeacherStore) -> None:
    bits = distillkit.index_bits(store.vocabulary_size)
    for row, example in zip(exported(), store.manifest.examples, strict=True):
        start, stop = example.span
        assert row["input_ids"] == example.token_ids
        kept = [start <= at < stop for at in range(len(example.token_ids))]
        assert row["labels"] == [
            token if inside else -100 for token, inside in zip(example.token_ids, kept, strict=True)
        ]
        values = np.array(row["compressed_logprobs"], np.uint8).view("<f4")
        digits = np.unpackbits(np.array(row["bytepacked_indices"], np.uint8), axis=1)[:, : K * bits]
        ids = digits.reshape(len(kept), K, bits) @ (1 << np.arange(bits - 1, -1, -1))
        wanted = store.logits(example.id).log_softmax(-1).topk(K)
        assert np.array_equal(values[start:stop], wanted.values.numpy())
        assert np.array_equal(ids[start:stop], wanted.indices.numpy())
        outside = [at for at, inside in enumerate(kept) if not inside]
        assert np.exp(values[outside]).sum(1) == pytest.approx(1)  # finite, so that what is left out spoils nothing
        assert np.isfinite(values).all()
    assert json.loads(parquet.read_schema(OUT / "data_0.parquet").metadata[b"kd"])["prompt"]["name"] == "base"


def test_distillkits_own_decoder_reads_it_bit_for_bit(store: TeacherStore) -> None:
    reason = "DistillKit is not installed; a clone of arcee-ai/DistillKit on PYTHONPATH is enough"
    compression = pytest.importorskip("distillkit.compression", reason=reason)
    settings = compression.DistributionQuantizationConfig.model_validate(
        YAML(typ="safe").load(OUT / distillkit.SETTINGS)
    )
    decoder = compression.LogprobCompressor(config=settings)
    size = (settings.logprob_bits() + 7) // 8
    assert settings.total_bits() == 8 * distillkit.row_bytes(store.vocabulary_size, K)
    for row, example in zip(exported(), store.manifest.examples, strict=True):
        assert {len(one) for one in row["compressed_logprobs"]} == {size}
        columns = ("compressed_logprobs", "bytepacked_indices")
        ids, values = decoder.decompress_to_sparse({name: torch.tensor([row[name]]) for name in columns})
        wanted = store.logits(example.id).log_softmax(-1).topk(K)
        assert torch.equal(values[0, slice(*example.span)], wanted.values)
        assert torch.equal(ids[0, slice(*example.span)], wanted.indices)


@pytest.mark.usefixtures("store")
def test_the_same_store_gives_the_same_bytes_and_what_does_not_fit_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = contents(OUT)
    export = ["store", "export", str(STORE)]
    assert main([*export, "again", "--format", "distillkit", "--top-k", str(K)]) == 0
    assert contents(Path("again")) == before
    capsys.readouterr()
    for arguments, message in (
        (["out", "--format", "distillkit", "--top-k", "5000"], "--top-k 5000: the teacher's vocabulary has 4"),
        (["params.yaml", "--format", "distillkit"], "params.yaml: is a file, where an export for"),
        (["artifacts", "--format", "distillkit"], "artifacts: holds something else than an export for DistillKit"),
        (["file", "--top-k", "5"], "--top-k: the notebooks' file has every logit; leave it out"),
    ):
        assert main([*export, *arguments]) == 2
        assert message in capsys.readouterr().err
    assert contents(OUT) == before


@given(st.integers(2, 2**20), st.data())
def test_packed_ids_are_their_digits_end_to_end(vocabulary_size: int, data: st.DataObject) -> None:
    bits, k = distillkit.index_bits(vocabulary_size), data.draw(st.integers(1, 9))
    ids = data.draw(st.lists(st.integers(0, vocabulary_size - 1), min_size=k, max_size=k))
    digits = "".join(f"{one:0{bits}b}" for one in ids)
    (found,) = distillkit.packed(np.array([ids]), bits)
    assert "".join(f"{byte:08b}" for byte in found) == digits.ljust(8 * len(found), "0")
    assert len(found) == distillkit.row_bytes(vocabulary_size, k) - 4 * k
