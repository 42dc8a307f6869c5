"""The shapes of models: what a rehearsal must know of one instead of having it."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from kd import config
from kd.errors import UserError, WorkFailedError
from kd.models import hub
from kd.models.load import model_name
from kd.models.settings import CONFIG, read_object

EXL2 = {"quant_method": "exl2", "bits": 6.0, "head_bits": 8}  # as the paper's teacher is quantized


class Shape(NamedTuple):
    """A Llama's sizes."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int = 128256
    context: int = 131072
    tied: bool = False


SMOLLM2_135M = Shape(576, 1536, 30, 9, 3, vocabulary=49152, context=8192, tied=True)
LLAMA_1B = Shape(2048, 8192, 16, 32, 8, tied=True)
LLAMA_3B = Shape(3072, 8192, 28, 24, 8, tied=True)
LLAMA_8B = Shape(4096, 14336, 32, 32, 8)
LLAMA_70B = Shape(8192, 28672, 80, 64, 8)
LLAMA_405B = Shape(16384, 53248, 126, 128, 8)

KNOWN = {
    "meta-llama/Llama-3.2-1B-Instruct": LLAMA_1B,
    "meta-llama/Llama-3.2-3B-Instruct": LLAMA_3B,
    "meta-llama/Meta-Llama-3.1-8B-Instruct": LLAMA_8B,
    "meta-llama/Meta-Llama-3.1-70B-Instruct": LLAMA_70B,
    "ek826/Meta-Llama-3.1-405B-Instruct-6.0bpw-exl2": LLAMA_405B,
}


def settings_of(model: config.Model) -> dict[str, Any]:
    """The config.json of a model: its own where it lies here, from the table of known shapes, or from the Hub, that
    file alone. Its special tokens are those of a stand-in."""
    match model:
        case config.BundledModel():
            found = llama_config(SMOLLM2_135M, "float32")  # as it is converted (kd/models/smollm2.py)
        case config.FolderModel():
            found = _own(model)
        case config.HubModel():
            found = _of_hub(model)
    return found | {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}


def llama_config(shape: Shape, dtype: str, quantization: dict[str, Any] | None = None) -> dict[str, Any]:
    """The config.json of a Llama of that shape."""
    document = {
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
        "tie_word_embeddings": shape.tied,
        "torch_dtype": dtype,
    }
    return document | ({"quantization_config": quantization} if quantization else {})


def _own(model: config.FolderModel) -> dict[str, Any]:
    path = model.folder / CONFIG
    if not path.is_file():
        raise UserError(
            f"{path}: not there; put the model's config.json there, of which alone a rehearsal needs to know"
        )
    return read_object(path)


def _of_hub(model: config.HubModel) -> dict[str, Any]:
    path = hub.snapshot(model) / CONFIG
    if path.is_file():
        return read_object(path)
    if model.name in KNOWN:
        quantized = model.name.endswith("exl2")
        return llama_config(KNOWN[model.name], "float16" if quantized else "bfloat16", EXL2 if quantized else None)
    try:
        found = json.loads(hub.read_small(model, CONFIG))
    except (UserError, WorkFailedError) as error:
        raise type(error)(f"{error}; or put its config.json at {path}") from None
    except ValueError:
        raise WorkFailedError(
            f"{model_name(model)}: what the Hub gives as its {CONFIG} is not JSON; put the right one at {path}"
        ) from None
    if not isinstance(found, dict):
        raise WorkFailedError(f"{model_name(model)}: its {CONFIG} is no JSON object; put the right one at {path}")
    return found
