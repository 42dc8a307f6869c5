"""The store's own round trip."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from kd.errors import UserError, WorkFailedError
from kd.store import writer
from kd.store.head import TeacherHead, read_head, write_head
from kd.store.reader import TeacherStore
from kd.store.records import ModelIdentity, Prompt, Tokenization
from kd.store.tensors import write_tensors
from kd.store.writer import StoreWriter

MODEL = ModelIdentity(name="m", revision=None, weights=None, dtype="float32", backend="transformers", versions={})


TOKENIZATION = Tokenization(bos=False, vocabulary_sha256="")


def write_store(
    folder: Path, examples: dict[str, torch.Tensor], head: TeacherHead, span: tuple[int, int] | None = None
) -> TeacherStore:
    (folder / "head").mkdir()
    (folder / "base").mkdir()
    write_head(folder / "head", MODEL, head)
    manifest, _ = read_head(folder / "head")
    writer = StoreWriter(folder / "base", MODEL, Prompt(name="base", text=""), TOKENIZATION, key="0123")
    for example_id, states in examples.items():
        writer.add(example_id, list(range(len(states))), states, span)
    writer.finish(manifest.sha256)
    return TeacherStore(folder / "base")


def random_head(hidden: int, vocabulary: int) -> TeacherHead:
    return TeacherHead(torch.rand(hidden), torch.randn(vocabulary, hidden), 1e-5)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12), shard_examples=st.integers(2, 13))
def test_rows_come_back_from_any_number_of_shards(
    lengths: list[int], shard_examples: int, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "SHARD_EXAMPLES", shard_examples)
    folder = tmp_path_factory.mktemp("store")
    examples = {f"train-{i:05d}": torch.randn(length, 8).half() for i, length in enumerate(lengths, start=1)}
    opened = write_store(folder, examples, random_head(8, 5))
    opened.verify()
    for example_id in reversed(examples):
        assert torch.equal(opened.states(example_id), examples[example_id])
    assert len(opened.manifest.shards) == -(-len(lengths) // shard_examples)


def test_only_the_rows_of_the_span_are_kept(tmp_path: Path) -> None:
    states = torch.randn(9, 8).half()
    opened = write_store(tmp_path, {"train-00001": states}, random_head(8, 5), span=(4, 7))
    assert torch.equal(opened.states("train-00001"), states[4:7])
    assert opened.manifest.examples[0].token_ids == list(range(9))
    assert opened.logits("train-00001").shape == (3, 5)


def test_a_bit_flip_in_any_file_is_found(tmp_path: Path) -> None:
    examples = {f"train-{i:05d}": torch.randn(3, 8).half() for i in range(1, 4)}
    write_store(tmp_path, examples, random_head(8, 5)).verify()
    chance = random.Random(0)
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        manifest = path.name == "manifest.json"
        for at in range(len(whole)) if manifest else chance.sample(range(len(whole)), 100):
            flipped = bytearray(whole)
            flipped[at] ^= 1 << chance.randrange(8)
            path.write_bytes(flipped)
            with pytest.raises(UserError, match=path.name):
                TeacherStore(tmp_path / "base").verify()
        path.write_bytes(whole)


def test_a_bit_flip_is_found_by_reading_the_example_alone(tmp_path: Path) -> None:
    write_store(tmp_path, {"train-00001": torch.randn(3, 8).half()}, random_head(8, 5))
    path = tmp_path / "base" / "states-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    opened = TeacherStore(tmp_path / "base")
    with pytest.raises(UserError, match=r"states-00000.safetensors \(train-00001\): its states are not those"):
        opened.logits("train-00001")


def test_an_example_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, MODEL, Prompt(name="base", text=""), TOKENIZATION, key="0123")
    for _ in range(2):
        writer.add("train-00001", [1], torch.zeros(1, 8))
    with pytest.raises(WorkFailedError, match="train-00001 is there twice"):
        writer.finish("")


def test_a_store_takes_two_bytes_a_number_and_little_else(tmp_path: Path) -> None:
    hidden, examples = 64, {f"train-{i:05d}": torch.randn(60, 64).half() for i in range(1, 40)}
    write_store(tmp_path, examples, random_head(hidden, 5))
    size = sum(path.stat().st_size for path in (tmp_path / "base").iterdir())
    assert size <= (2 * hidden + 64) * 60 * len(examples)


def test_tensors_written_in_pieces_are_safetensors_own_bytes(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(5, 3).half(), "b": torch.randn(4).half()}
    save_file(tensors, tmp_path / "theirs", {"x": "y"})
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    pieces = [tensors["a"][:2], tensors["a"][2:], tensors["b"]]
    write_tensors(tmp_path / "ours", shapes, pieces, {"x": "y"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    with pytest.raises(ValueError, match="where the shapes need"):
        write_tensors(tmp_path / "ours", shapes, pieces[:2])


def test_head_is_norm_then_projection(tmp_path: Path) -> None:
    head = random_head(16, 30)
    states = (10 * torch.randn(7, 16)).half()
    opened = write_store(tmp_path, {"train-00001": states}, head)
    wide = states.double()
    normed = wide / (wide.pow(2).mean(-1, keepdim=True) + head.eps).sqrt() * head.norm
    assert torch.allclose(opened.logits("train-00001").double(), normed @ head.weight.double().T, atol=1e-4)
