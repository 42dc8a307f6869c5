"""EXL2 models of any Llama's shape whose weights are random, made on the GPUs as exllamav2 asks for them.

They take no download and no disk, and as much memory and time as the real ones; what they say means nothing. A folder
has its config.json and its files of weights with true headers, but the files are one hole:

    write_folder(folder, shapes.LLAMA_405B) # and any tokenizer's files beside them
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
from typing import TYPE_CHECKING, Any

from kd.machine.shapes import EXL2, Shape, llama_config
from kd.models.settings import CONFIG, read_object, read_settings
from kd.models.weights import EMBEDDING, HEAD, INDEX, SINGLE, SIZES, expected

if TYPE_CHECKING:
    import torch

BITS, HEAD_BITS = 6, 8  # as the paper's teacher is quantized
BITS_THERE = (2, 3, 4, 5, 6, 8)
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
SHARD_NAME = "model-{:05d}-of-{:05d}.safetensors"
GROUP = 128  # weights of a column that share a scale
COLUMNS = 32  # a multiple of which the library has
FILE_BYTES = 8 * 10**9
DRAWN_ROWS = 1024  # of the embedding, which repeats them
GAIN = 0.5  # of a layer: the deviation of what it makes of inputs with deviation 1; so that states stay in float16
MEAN_SCALE = 123.5  # root mean square of (s + 1)^2 over the 16 values of a 4-bit scale s


def write_folder(folder: Path, shape: Shape) -> int:
    """Make an EXL2 model folder of 6 bits without a tokenizer; returns the bytes that its weights stand for."""
    return write_model(folder, llama_config(shape, "float16", EXL2))


def write_model(folder: Path, document: dict[str, Any]) -> int:
    """Make the folder of the Llama whose config.json is `document`, EXL2 or plain, without a tokenizer; returns the
    bytes that its weights stand for."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(document, indent=1))
    files: list[dict[str, Any]] = [{}]
    size = total = 0
    for name, (dtype, sizes) in tensors(folder).items():
        if size > FILE_BYTES:
            files.append({})
            size = 0
        end = size + SIZES[dtype] * math.prod(sizes)
        files[-1][name] = {"dtype": dtype, "shape": sizes, "data_offsets": [size, end]}
        total, size = total + end - size, end
    names = [SINGLE] if len(files) == 1 else [SHARD_NAME.format(i, len(files)) for i in range(1, len(files) + 1)]
    for name, header in zip(names, files, strict=True):
        _write_hole(folder / name, header)
    if len(files) > 1:
        where = {tensor: name for name, header in zip(names, files, strict=True) for tensor in header}
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}))
    return total


def tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every tensor of the model whose config.json is in `folder`, with safetensors' dtype and its shape."""
    document, settings = read_object(folder / CONFIG), read_settings(folder)
    if settings.quantization is None:
        plain = DTYPES[document.get("torch_dtype") or "float32"]
        return {name: (plain, sizes) for name, sizes in expected(settings).items()}
    bits, head_bits = bits_of(document)
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, sizes in expected(settings).items():
        if len(sizes) == 1 or name == EMBEDDING:
            found[name] = "F16", sizes
        else:
            rows, columns = sizes
            found |= _quantized(name.removesuffix(".weight"), rows, columns, head_bits if name == HEAD else bits)
    return found


def bits_of(document: dict[str, Any]) -> tuple[int, int]:
    """The bits of an EXL2 model's weights and of its head: as its config.json says, on average, rounded up to bits that
    there are; without that, those of the paper's teacher."""
    quantization = document.get("quantization_config") or {}

    def there(key: str, default: int) -> int:
        asked = quantization.get(key)
        asked = asked if isinstance(asked, int | float) else default
        return next((bits for bits in BITS_THERE if bits >= asked), BITS_THERE[-1])

    return there("bits", BITS), there("head_bits", HEAD_BITS)


def random_tensor(
    name: str, dtype: str, sizes: tuple[int, ...], device: str, all_bits: tuple[int, int] = (BITS, HEAD_BITS)
) -> torch.Tensor:
    """One tensor as it might be, of a model of so many bits and of so many in its head; the same each time on the same
    kind of device."""
    import torch

    draw = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    part = name.rpartition(".")[2]
    bits = all_bits[1 if name.startswith("lm_head.") else 0]
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
        case "weight" if len(sizes) == 2:  # of a layer that is not quantized
            weight = torch.randn(sizes, generator=draw, dtype=torch.float16, device=device)
            return weight.mul_(GAIN / math.sqrt(sizes[1]))
        case "weight":  # of a norm
            return torch.ones(sizes, dtype=torch.float16, device=device)
        case "bias":
            return torch.zeros(sizes, dtype=torch.float16, device=device)
    assert dtype == "I32", name
    return torch.randint(-(2**31), 2**31 - 1, sizes, generator=draw, dtype=torch.int32, device=device)


@contextmanager
def random_weights(bits: tuple[int, int] = (BITS, HEAD_BITS)) -> Iterator[None]:
    """Let exllamav2 have random tensors for whatever it would read from a file of a model of so many `bits`."""
    from exllamav2.fasttensors import STFile

    read = STFile.get_tensor

    def get_tensor(self: Any, key: str, device: str, *_: Any, out_dtype: Any = None, **__: Any) -> torch.Tensor:
        entry = self.header[key]
        tensor = random_tensor(key, entry["dtype"], tuple(entry["shape"]), device, bits)
        return tensor if out_dtype is None else tensor.to(out_dtype)

    STFile.get_tensor = get_tensor
    try:
        yield
    finally:
        STFile.get_tensor = read


def _write_hole(path: Path, header: dict[str, Any]) -> None:
    """A safetensors file of its header alone: what it names is there as zeros, which take no room on the disk."""
    raw = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + max(entry["data_offsets"][1] for entry in header.values()))


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
