"""The weights of a model folder, by their headers alone: that they are all there, whole, and those of its settings."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from kd.errors import UserError
from kd.models.settings import CONFIG, LFS, Settings, again, read_object

WEIGHTS = "*.safetensors"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"(.+)-\d+-of-(\d+)\.safetensors")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
HEADER_BYTES = 100_000_000  # the most that the library reads
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
FLOATS = ("F64", "F32", "F16", "BF16")
# What EXL2 has in the place of a Linear layer's weight.
QUANTIZED = ("q_weight", "q_invperm", "q_scale", "q_scale_max", "q_groups")
QUANTIZED_TOO = ("q_perm", "bias")
COPIED_BYTES = 2**24
FREQUENCIES = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")  # of old folders; computed today


class Tensor(NamedTuple):
    """A tensor as a header names it, and where its bytes lie: first and last in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Header(NamedTuple):
    """What a safetensors file says of itself."""

    tensors: dict[str, Tensor]
    format: str | None


def projections(settings: Settings) -> dict[str, tuple[int, int]]:
    """The Linear layers of each of a Llama's layers by name, with their shapes [out, in]."""
    hidden, inner = settings.hidden_size, settings.intermediate_size
    narrow = hidden // settings.heads * settings.kv_heads
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def expected(settings: Settings) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Llama in transformers' names, with its shape; a tied head has none of its own."""
    vocabulary, hidden = settings.vocab_size, settings.hidden_size
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (vocabulary, hidden), "model.norm.weight": (hidden,)}
    if not settings.tied:
        shapes[HEAD] = (vocabulary, hidden)
    for layer in (f"model.layers.{number}" for number in range(settings.layers)):
        shapes |= {f"{layer}.{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
        for name, shape in projections(settings).items():
            shapes[f"{layer}.{name}.weight"] = shape
            if settings.attention_bias if name.startswith("self_attn") else settings.mlp_bias:
                shapes[f"{layer}.{name}.bias"] = shape[:1]
    return shapes


def check_weights(folder: Path, settings: Settings) -> bool:
    """Refuse weights that are not whole or not those of `settings`; returns whether they are quantized (EXL2)."""
    headers = {path: read_header(path) for path in sorted(folder.glob(WEIGHTS)) if path.is_file()}
    quantized = settings.quantization is not None or any(
        name.endswith(".q_weight") for header in headers.values() for name in header.tensors
    )
    if quantized:
        _check_shards(folder, headers)
    else:
        _check_files(folder, headers)
    found = _together(headers)
    if settings.layers > len(found):
        raise UserError(f"{folder}: {len(found)} tensors, too few for {settings.layers} layers as {CONFIG} has them")
    if quantized:
        _check_quantized(folder, settings, found)
    else:
        _check_tensors(folder, settings, found)
    return quantized


def read_header(path: Path, mend: str = "") -> Header:
    """The header of a safetensors file, refused unless the file has the bytes that it names, and no others; `mend` says
    how to make it anew (default: where a model's file comes from)."""
    mend = mend or again(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(len(LFS))
        if first == LFS:
            raise UserError(
                f"{path}: a pointer of Git LFS, not the weights; run `git lfs pull` in its folder, or {mend}"
            )
        length = int.from_bytes(first[:8], "little")
        if size < 8 or length > min(HEADER_BYTES, size - 8):
            raise UserError(f"{path}: no safetensors file, or cut in its header; {mend}")
        file.seek(8)
        raw = file.read(length)
    try:
        document = json.loads(raw)
        metadata = document.pop("__metadata__", None) or {}
        tensors = {name: _tensor(entry, 8 + length) for name, entry in document.items()}
        kind = metadata.get("format")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path}: its header is not one of safetensors; {mend}") from None
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.start):
        if tensor.start != end:
            raise UserError(f"{path}: its header leaves bytes between tensors; {mend}")
        end = tensor.end
    if end != size:
        raise UserError(f"{path}: {size} bytes where its header names {end}, cut or damaged; {mend}")
    return Header(tensors, kind)


def some(names: Iterable[str]) -> str:
    """The first of some names, and how many more there are."""
    first, *others = sorted(names)
    return first + (f" and {len(others)} more" if others else "")


def _tensor(entry: dict[str, object], offset: int) -> Tensor:
    """One entry of a header; ValueError, LookupError or TypeError where it is not one."""
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (isinstance(dtype, str) and isinstance(shape, list) and isinstance(offsets, list)):
        raise TypeError
    start, end = offsets
    if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
        raise ValueError
    if end - start != math.prod(shape) * SIZES.get(dtype, 1):
        raise ValueError
    return Tensor(dtype, tuple(shape), offset + start, offset + end)


def _check_shards(folder: Path, headers: dict[Path, Header]) -> None:
    """exllamav2 reads every file there is; that none is missing can be seen by their names alone."""
    shards = Counter(match.groups() for path in headers if (match := SHARD.fullmatch(path.name)))
    for (stem, total), count in shards.items():
        if count != int(total):
            raise UserError(f"{folder}: {count} of {int(total)} files {stem}-*.safetensors; fetch or copy the others")


def _check_files(folder: Path, headers: dict[Path, Header]) -> None:
    """Refuse files that transformers would not read or not find, and what it cannot read."""
    there, index = {path.name for path in headers}, folder / INDEX
    named = _index(index) if index.exists() else {}
    wanted = set(named.values()) or {SINGLE}
    if SINGLE in there and wanted != {SINGLE}:
        raise UserError(
            f"{folder}: two sets of weights, {SINGLE} and those of {INDEX}; remove the one that is not meant"
        )
    if wanted == {SINGLE} != there and SINGLE not in there:
        raise UserError(f"{folder}: neither {SINGLE} nor {INDEX}, which says what its shards hold; copy it there")
    if missing := wanted - there:
        raise UserError(f"{folder}: no {some(missing)}, which {INDEX} names; fetch or copy it")
    if surplus := there - wanted:
        raise UserError(f"{folder}: {some(surplus)}, of which {INDEX if named else SINGLE} knows nothing; remove it")
    for name, file in named.items():
        if name not in headers[folder / file].tensors:
            raise UserError(f"{folder / file}: no tensor {name}, which {INDEX} looks for there; {again(folder / file)}")
    for path, header in headers.items():
        if header.format != "pt":
            raise UserError(
                f"{path}: its metadata do not say `format: pt`, which transformers 4.44 needs; write it again with "
                "safetensors' save_file(tensors, path, metadata={'format': 'pt'})"
            )
        if unlisted := header.tensors.keys() - named.keys() if named else None:
            raise UserError(f"{path}: {some(unlisted)}, of which {INDEX} knows nothing; take both from one model")


def _index(path: Path) -> dict[str, str]:
    """Tensors and their files, as the index has them."""
    names = read_object(path).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise UserError(f"{path}: no weight_map of names and files; {again(path)}")
    return names


def _together(headers: dict[Path, Header]) -> dict[str, tuple[Path, Tensor]]:
    found: dict[str, tuple[Path, Tensor]] = {}
    for path, header in headers.items():
        for name, tensor in header.tensors.items():
            if name in found:
                raise UserError(f"{path}: {name}, which {found[name][0].name} has as well; remove the file not meant")
            found[name] = path, tensor
    return found


def _check_tensors(folder: Path, settings: Settings, found: dict[str, tuple[Path, Tensor]]) -> None:
    shapes = expected(settings)
    if settings.tied and HEAD in found and EMBEDDING in found:
        _check_tied(found[HEAD], found[EMBEDDING])
        shapes[HEAD] = shapes[EMBEDDING]
    for name, (path, tensor) in found.items():
        if name not in shapes and not FREQUENCIES.fullmatch(name):
            raise UserError(f"{path}: {name}, which the Llama of {CONFIG} has not; take both from one model")
        if tensor.dtype not in FLOATS:
            raise UserError(
                f"{path}: {name} holds {tensor.dtype}, quantized in a way that {CONFIG} does not tell; take the "
                "model's unquantized folder"
            )
    if HEAD not in found and HEAD in shapes and not shapes.keys() - found.keys() - {HEAD}:
        raise UserError(
            f"{folder}: no {HEAD}, and {CONFIG} does not say `tie_word_embeddings: true`, so that a head would be made "
            f"up; {again(folder / SINGLE)}, or set it if the model's head is its embedding"
        )
    if missing := shapes.keys() - found.keys():
        raise UserError(f"{folder}: no tensor {some(missing)}; its weights are not whole, or not of this {CONFIG}")
    for name, shape in shapes.items():
        path, tensor = found[name]
        if tensor.shape != shape:
            raise UserError(
                f"{path}: {name} is {list(tensor.shape)} where {CONFIG} makes it {list(shape)}; take both from one "
                "model"
            )


def _check_tied(one: tuple[Path, Tensor], other: tuple[Path, Tensor]) -> None:
    """A head beside the embedding that it is tied to must be the same: which of both is read, no one says."""
    (path, head), (beside, embedding) = one, other
    with path.open("rb") as first, beside.open("rb") as second:
        first.seek(head.start)
        second.seek(embedding.start)
        left, same = head.end - head.start, head[:2] == embedding[:2]
        while same and left:
            size = min(left, COPIED_BYTES)
            same, left = first.read(size) == second.read(size), left - size
    if not same:
        raise UserError(
            f"{path}: {HEAD} is not the embedding, though {CONFIG} says `tie_word_embeddings: true`; set it to false "
            "if the model has a head of its own"
        )


def _check_quantized(folder: Path, settings: Settings, found: dict[str, tuple[Path, Tensor]]) -> None:
    """EXL2: every layer is there, as it is or quantized; exllamav2 itself reads the shapes."""
    shapes, known = expected(settings), set()
    for name, shape in shapes.items():
        module, _, last = name.rpartition(".")
        parts = {f"{module}.{part}" for part in QUANTIZED}
        if name in found:
            known.add(name)
            path, tensor = found[name]
            if tensor.shape != shape and name != HEAD:
                raise UserError(f"{path}: {name} is {list(tensor.shape)} where {CONFIG} makes it {list(shape)}")
        elif last != "weight" or not parts <= found.keys():
            raise UserError(
                f"{folder}: no {name}, nor all of it quantized; its weights are not whole, or not of this {CONFIG}"
            )
        known |= parts | {f"{module}.{part}" for part in QUANTIZED_TOO}
    if settings.tied:  # its head may have been quantized apart from the embedding
        known |= {f"lm_head.{part}" for part in ("weight", *QUANTIZED, *QUANTIZED_TOO)}
    if surplus := [name for name in found if name not in known and not FREQUENCIES.fullmatch(name)]:
        raise UserError(f"{folder}: {some(surplus)}, which the Llama of {CONFIG} has not; take both from one model")
