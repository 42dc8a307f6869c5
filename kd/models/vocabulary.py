"""A model folder's vocabulary: read by `tokenizers` alone, and refused where the folder's files disagree about it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kd.errors import UserError
from kd.models.settings import CONFIG, GENERATION, LFS, Settings, again, read_object

TOKENIZER, TOKENIZER_CONFIG, SPECIAL, ADDED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
# Those of transformers 4.44 that read a Llama's tokenizer.json; one that it does not know it fails on.
# With the token for what is unknown that each puts in where none is named.
CLASSES = {
    "PreTrainedTokenizerFast": None,
    "LlamaTokenizer": "<unk>",
    "CodeLlamaTokenizer": "<unk>",
    "GPT2Tokenizer": "<|endoftext|>",
}
PLAIN = "PreTrainedTokenizerFast"
OTHER_ROLES = ("unk", "pad", "sep", "cls", "mask")
ADDED_TOKEN = ("content", "lstrip", "rstrip", "normalized", "single_word", "special")
PADDINGS = (1, 8, 16, 32, 64, 128, 256, 512)  # of a vocabulary's size, so that matrices have rounder ones


class Vocabulary(NamedTuple):
    """Which id stands for which token, as a checksum, how many tokens there are, and the special ones' ids."""

    sha256: str
    tokens: int
    bos: int
    eos: int | None


def read_vocabulary(folder: Path, settings: Settings) -> Vocabulary:
    """The folder's vocabulary; a UserError says which files do not fit together."""
    options = read_object(folder / TOKENIZER_CONFIG)
    others = [read_object(folder / name) for name in (SPECIAL, ADDED) if (folder / name).exists()]
    unknown = _unknown_token(folder / TOKENIZER_CONFIG, options)
    ids = _ids(folder / TOKENIZER)
    if "added_tokens_decoder" not in options:  # transformers 4.44 reads the older files then
        options = {**options, **(others[0] if (folder / SPECIAL).exists() else {})}
    _check_added(folder / TOKENIZER_CONFIG, options, ids)
    size, tokens = settings.vocab_size, max(ids.values(), default=-1) + 1
    if size not in {-(-tokens // padding) * padding for padding in PADDINGS}:
        raise UserError(
            f"{folder / TOKENIZER}: {tokens} tokens where vocab_size of {CONFIG} is {size}; take both from one model"
        )
    for role in OTHER_ROLES:
        _special(folder / TOKENIZER_CONFIG, role, {"unk_token": unknown, **options}, ids)
    bos, eos = (_special(folder / TOKENIZER_CONFIG, role, options, ids) for role in ("bos", "eos"))
    if bos is None:
        raise UserError(
            f"{folder / TOKENIZER_CONFIG}: no bos_token, which the protocol puts before each text; choose another model"
        )
    if settings.bos not in (None, bos):
        raise UserError(
            f"{folder / TOKENIZER_CONFIG}: its bos_token is {bos} where bos_token_id of {CONFIG} is {settings.bos}; "
            "take both from one model"
        )
    if eos is not None and eos not in settings.ends:
        named = GENERATION if (folder / GENERATION).exists() else CONFIG
        raise UserError(
            f"{folder / TOKENIZER_CONFIG}: its eos_token is {eos} and not among those of {named}, "
            f"{', '.join(map(str, settings.ends))}; take both from one model"
        )
    return Vocabulary(sha256(ids), tokens, bos, eos)


def sha256(ids: Mapping[str, int]) -> str:
    """A fingerprint of a vocabulary: which id stands for which token."""
    entries = sorted((index, token) for token, index in ids.items())
    return hashlib.sha256("".join(f"{i}\t{token}\n" for i, token in entries).encode()).hexdigest()


def _unknown_token(path: Path, options: dict[str, Any]) -> str | None:
    """The token for what is unknown that the folder's class of tokenizers takes unsaid."""
    name = options.get("tokenizer_class")
    known = next((one for one in CLASSES if name in (one, f"{one.removesuffix('Fast')}Fast")), None)
    if known is None:
        raise UserError(
            f"{path}: tokenizer_class: expected one of {', '.join(CLASSES)}, found {name!r}; write {PLAIN}, which "
            f"reads {TOKENIZER} as it is"
        )
    return CLASSES[known]


def _ids(path: Path) -> dict[str, int]:
    """The tokens of tokenizer.json and their ids."""
    from tokenizers import Tokenizer

    with path.open("rb") as file:
        if file.read(len(LFS)) == LFS:
            raise UserError(f"{path}: a pointer of Git LFS, not the tokenizer; run `git lfs pull` in its folder")
    try:
        found: dict[str, int] = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # noqa: BLE001 (the library raises nothing more special)
        raise UserError(
            f"{path}: not readable by the pinned tokenizers ({' '.join(str(error).split())}); {again(path)}, or take "
            "the file as an older version of the library wrote it"
        ) from None
    return found


def _check_added(path: Path, options: dict[str, Any], ids: dict[str, int]) -> None:
    """What tokenizer_config.json says of special tokens must be so in tokenizer.json: transformers would add them."""
    added = options.get("added_tokens_decoder", {})
    if not isinstance(added, dict):
        raise UserError(f"{path}: added_tokens_decoder: expected tokens by their ids; {again(path)}")
    for number, token in added.items():
        content = token.get("content") if isinstance(token, dict) else None
        if not isinstance(content, str) or str(ids.get(content)) != number:
            raise UserError(
                f"{path}: token {number} is {content!r}, which it is not in {TOKENIZER}; take both from one model"
            )
        unlike = [name for name in token if name not in ADDED_TOKEN] + [
            name for name in ADDED_TOKEN if name != "content" and type(token.get(name, False)) is not bool
        ]
        if unlike:
            raise UserError(f"{path}: token {number}: {unlike[0]} is not as transformers 4.44 has it; {again(path)}")


def _special(path: Path, role: str, options: dict[str, Any], ids: dict[str, int]) -> int | None:
    token = options.get(f"{role}_token")
    content = token.get("content") if isinstance(token, dict) else token
    if token is None:
        return None
    if not isinstance(content, str) or content not in ids:
        raise UserError(
            f"{path}: its {role}_token {content!r} is not in {TOKENIZER}, and transformers would add it; take both "
            f"from one model, or write {PLAIN} for tokenizer_class and name no {role}_token"
        )
    return ids[content]
