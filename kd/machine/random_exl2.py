"""EXL2 models of any Llama's shape whose weights are random, made on the GPUs as exllamav2 asks for them.

They take no download and no disk, and as much memory and time as the real ones; what they say means nothing. A folder
has its config.json and its files of weights with true headers, but the files are one hole:

    write_folder(folder, LLAMA_405B)        # and any tokenizer's files beside them
    with random_weights():
        teacher = kd.teacher.backends.load(...)
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kd.models.settings import CONFIG, read_settings
from kd.models.weights import EMBEDDING, HEAD, SIZES, expected

if TYPE_CHECKING:
    import torch

BITS, HEAD_BITS = 6, 8  # as the paper's teacher is quantized
GROUP = 128  # weights of a column that share a scale
COLUMNS = 32  # a multiple of which the library has
FILE_BYTES = 8 * 10**9
DRAWN_ROWS = 1024  # of the embedding, which repeats them
GAIN = 0.5  # of a layer: the deviation of what it makes of inputs with deviation 1; so that states stay in float16
MEAN_SCALE = 123.5  # root mean square of (s + 1)^2 over the 16 values of a 4-bit scale s


class Shape(NamedTuple):
    """A Llama's sizes."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int = 128256
    context: int = 131072


LLAMA_8B = Shape(4096, 14336, 32, 32, 8)
LLAMA_70B = Shape(8192, 28672, 80, 64, 8)
LLAMA_405B = Shape(16384, 53248, 126, 128, 8)


def write_folder(folder: Path, shape: Shape) -> int:
    """Make a model folder without a tokenizer; returns the bytes that its weights stand for."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(_config(shape), indent=1))
    files: list[dict[str, Any]] = [{}]
    size = total = 0
    for name, (dtype, sizes) in tensors(folder).items():
        if size > FILE_BYTES:
            files.append({})
            size = 0
        end = size + SIZES[dtype] * math.prod(sizes)
        files[-1][name] = {"dtype": dtype, "shape": sizes, "data_offsets": [size, end]}
        total, size = total + end - size, end
    for number, header in enumerate(files, start=1):
        raw = json.dumps(header).encode()
        with (folder / f"output-{number:05d}-of-{len(files):05d}.safetensors").open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            file.truncate(8 + len(raw) + max(entry["data_offsets"][1] for entry in header.values()))
    return total


def tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every tensor of the EXL2 model whose config.json is in `folder`, with safetensors' dtype and its shape."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, sizes in expected(read_settings(folder)).items():
        if len(sizes) == 1 or name == EMBEDDING:
            found[name] = "F16", sizes
        else:
            rows, columns = sizes
            found |= _quantized(name.removesuffix(".weight"), rows, columns, HEAD_BITS if name == HEAD else BITS)
    return found


def random_tensor(name: str, dtype: str, sizes: tuple[int, ...], device: str) -> torch.Tensor:
    """One tensor as it might be; the same each time on the same kind of device."""
    import torch

    draw = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    part = name.rpartition(".")[2]
    bits = HEAD_BITS if name.startswith("lm_head.") else BITS
    if name == EMBEDDING:
        rows = torch.randn(min(sizes[0], DRAWN_ROWS), sizes[1], generator=draw, device=device).half()
        return rows.repeat(-(-sizes[0] // DRAWN_ROWS), 1)[: sizes[0]].contiguous()
    match part:
        case "q_invperm":
            return torch.rand(sizes, generator=draw, device=device).argsort().int()
        case "q_groups":
            pairs = [(bits, group * GROUP * bits // 32) for group in range(sizes[0] // 2)]
            return torch.tensor(pairs, dtype=torch.int16, device=device).flatten()
        case "q_scale_max":
            deviation = 2**bits / math.sqrt(12)  # of a weight of so many bits, all equally likely
            largest = 256 * GAIN / math.sqrt(sizes[0] * GROUP) / deviation / MEAN_SCALE
            return torch.full(sizes, largest, dtype=torch.float16, device=device)
        case "weight":  # of a norm
            return torch.ones(sizes, dtype=torch.float16, device=device)
    assert dtype == "I32", name
    return torch.randint(-(2**31), 2**31 - 1, sizes, generator=draw, dtype=torch.int32, device=device)


@contextmanager
def random_weights() -> Iterator[None]:
    """Let exllamav2 have random tensors for whatever it would read from a file."""
    from exllamav2.fasttensors import STFile

    read = STFile.get_tensor

    def get_tensor(self: Any, key: str, device: str, *_: Any, out_dtype: Any = None, **__: Any) -> torch.Tensor:
        entry = self.header[key]
        tensor = random_tensor(key, entry["dtype"], tuple(entry["shape"]), device)
        return tensor if out_dtype is None else tensor.to(out_dtype)

    STFile.get_tensor = get_tensor
    try:
        yield
    finally:
        STFile.get_tensor = read


def _quantized(layer: str, rows: int, columns: int, bits: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What EXL2 has in the place of a weight [rows, columns], which it holds transposed."""
    width, groups = -(-rows // COLUMNS) * COLUMNS, columns // GROUP
    return {
        f"{layer}.q_weight": ("I32", (columns * bits // 32, width)),
        f"{layer}.q_invperm": ("I32", (columns,)),
        f"{layer}.q_scale": ("I32", (groups, width // 8)),
        f"{layer}.q_scale_max": ("F16", (groups,)),
        f"{layer}.q_groups": ("I16", (2 * groups,)),
    }


def _config(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.context,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
        "quantization_config": {"quant_method": "exl2", "bits": BITS, "head_bits": HEAD_BITS},
    }
