"""The store's own round trip."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kd.teacher import store
from kd.teacher.store import ModelIdentity, Prompt, StoreWriter, TeacherHead, TeacherStore, Tokenization, write_head

MODEL = ModelIdentity(name="m", revision=None, dtype="float32", backend="transformers", versions={})


def write_store(folder: Path, examples: dict[str, torch.Tensor], head: TeacherHead) -> TeacherStore:
    (folder / "head").mkdir()
    (folder / "base").mkdir()
    write_head(folder / "head", MODEL, head)
    manifest, _ = store.read_head(folder / "head")
    writer = StoreWriter(
        folder / "base", MODEL, Prompt(name="base", text=""), Tokenization(bos=False, vocabulary_sha256="")
    )
    for example_id, states in examples.items():
        writer.add(example_id, list(range(len(states))), states, (0, len(states)))
    writer.finish(manifest.sha256)
    return TeacherStore(folder / "base")


def random_head(hidden: int, vocabulary: int) -> TeacherHead:
    return TeacherHead(torch.rand(hidden), torch.randn(vocabulary, hidden), 1e-5)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12), rows_per_shard=st.integers(1, 60))
def test_states_come_back_from_any_number_of_shards(
    lengths: list[int], rows_per_shard: int, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "SHARD_BYTES", rows_per_shard * 8 * 2)
    folder = tmp_path_factory.mktemp("store")
    examples = {f"train-{i:05d}": torch.randn(length, 8).half() for i, length in enumerate(lengths, start=1)}
    opened = write_store(folder, examples, random_head(8, 5))
    for example_id in reversed(examples):
        assert torch.equal(opened.states(example_id), examples[example_id])
    biggest = max(lengths) + rows_per_shard
    for shard in (folder / "base").glob("states-*.safetensors"):
        assert shard.stat().st_size < biggest * 8 * 2 + 512


def test_head_is_norm_then_projection(tmp_path: Path) -> None:
    head = random_head(16, 30)
    states = (10 * torch.randn(7, 16)).half()
    opened = write_store(tmp_path, {"train-00001": states}, head)
    wide = states.double()
    normed = wide / (wide.pow(2).mean(-1, keepdim=True) + head.eps).sqrt() * head.norm
    assert torch.allclose(opened.logits("train-00001").double(), normed @ head.weight.double().T, atol=1e-4)
