"""config.json and generation_config.json of a Llama folder, read with no library and refused where one would misread.

transformers passes over keys that it does not know, takes its own default for what is missing, and of a key that stands
twice the last; any of these is another model without a word. So every key is known here, or refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from kd.errors import UserError
from kd.io.text import parse_json

CONFIG, GENERATION = "config.json", "generation_config.json"
LFS = b"version https://git-lfs"
LARGEST = 1e30  # of a number that means something here
FLOATS = ("float32", "float16", "bfloat16", "float64")
WHOLE = "take the model's whole folder anew"


class Rule(NamedTuple):
    """What a key's value must be: as a test, and in words."""

    holds: Callable[[Any], bool]
    expected: str


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -LARGEST < value < LARGEST  # and so no NaN


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_flag(value: Any) -> bool:
    return type(value) is bool


def _is_token(value: Any) -> bool:
    return value is None or type(value) is int


def _is_tokens(value: Any) -> bool:
    return _is_token(value) or (isinstance(value, list) and all(type(one) is int for one in value))


def _is_anything(_: Any) -> bool:
    return True


COUNT = Rule(_is_count, "a whole number from 1 to 2^31")
POSITIVE = Rule(_is_positive, "a number greater than 0")
FLAG = Rule(_is_flag, "true or false")
TOKEN = Rule(_is_token, "a token's number")
ANYTHING = Rule(_is_anything, "anything")

REQUIRED = {  # whatever shapes the result, and for which libraries have defaults that are another model's
    "model_type": Rule(lambda value: value == "llama", "llama; this package reads Llama models"),
    "vocab_size": COUNT,
    "hidden_size": COUNT,
    "intermediate_size": COUNT,
    "num_hidden_layers": COUNT,
    "num_attention_heads": COUNT,
    "max_position_embeddings": COUNT,
    "rms_norm_eps": POSITIVE,
    "rope_theta": POSITIVE,
}
OPTIONAL = {
    "architectures": Rule(lambda value: value == ["LlamaForCausalLM"], "[LlamaForCausalLM], a causal Llama"),
    "num_key_value_heads": Rule(lambda value: value is None or _is_count(value), COUNT.expected),
    "head_dim": Rule(lambda value: value is None or _is_count(value), COUNT.expected),
    "hidden_act": Rule(lambda value: value == "silu", "silu, a Llama's"),
    "rope_scaling": Rule(lambda value: value is None or isinstance(value, dict), "a mapping or null"),
    "rope_interleaved": Rule(lambda value: value is False, "false; transformers 4.44 knows no other way"),
    "attention_bias": FLAG,
    "mlp_bias": FLAG,
    "tie_word_embeddings": FLAG,
    "use_cache": FLAG,
    "attention_dropout": Rule(lambda value: _is_number(value) and 0 <= value < 1, "a number from 0 to below 1"),
    "initializer_range": Rule(lambda value: _is_number(value) and value >= 0, "a number from 0 up"),
    "pretraining_tp": Rule(lambda value: value == 1, "1; the weights of a Llama do not depend on it"),
    "torch_dtype": Rule(lambda value: value is None or value in FLOATS, f"one of {', '.join(FLOATS)}"),
    "quantization_config": Rule(lambda value: value is None or isinstance(value, dict), "a mapping or null"),
    "bos_token_id": TOKEN,
    "pad_token_id": TOKEN,
    "eos_token_id": Rule(_is_tokens, "a token's number or a list of them"),
    # Notes of whoever saved the folder; nothing reads them, or we say it ourselves.
    "_name_or_path": ANYTHING,
    "dtype": ANYTHING,
    "is_llama_config": ANYTHING,
    "transformers_version": ANYTHING,
    "transformers.js_config": ANYTHING,
    "unsloth_fixed": ANYTHING,
    "unsloth_version": ANYTHING,
}
# The kinds of rope_scaling that transformers 4.44 and this package compute alike, with the numbers that each needs, and
# those that it may have.
ROPE = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": (("factor",), ("attention_factor", "beta_fast", "beta_slow")),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
}
# exllamav2 0.1.8 looks for each kind under one name alone, and passes over all others.
EXLLAMAV2_ROPE = {"rope_type": ("default", "llama3"), "type": ("default", "linear")}


class Settings(NamedTuple):
    """What a folder's settings say: the shape of a Llama, its special tokens and how it is quantized (None: not)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    context: int
    tied: bool
    attention_bias: bool
    mlp_bias: bool
    bos: int | None
    ends: tuple[int, ...]
    quantization: str | None


def read_settings(folder: Path) -> Settings:
    """The settings of a folder; a UserError names the key of config.json or generation_config.json at fault."""
    path = folder / CONFIG
    document = read_object(path)
    quantization = _quantization(path, document)
    _check_keys(path, document)
    _check_rope(path, document)
    heads, hidden, vocabulary = (document[key] for key in ("num_attention_heads", "hidden_size", "vocab_size"))
    kv_heads = document.get("num_key_value_heads") or heads
    if hidden % (2 * heads) or heads % kv_heads:
        raise UserError(
            f"{path}: hidden_size {hidden}, num_attention_heads {heads} and num_key_value_heads {kv_heads} do not "
            f"divide into heads of one even size; {WHOLE}"
        )
    if document.get("head_dim") not in (None, hidden // heads):
        raise UserError(
            f"{path}: head_dim is {document['head_dim']}, and transformers 4.44 computes with hidden_size / "
            f"num_attention_heads, {hidden // heads}; choose a model whose heads have that size"
        )
    padding = document.get("pad_token_id")
    if padding is not None and not -vocabulary <= padding < vocabulary:
        raise UserError(f"{path}: pad_token_id {padding} is no row of {vocabulary}; set it to null")
    return Settings(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=document["intermediate_size"],
        layers=document["num_hidden_layers"],
        heads=heads,
        kv_heads=kv_heads,
        context=document["max_position_embeddings"],
        tied=document.get("tie_word_embeddings", False),
        attention_bias=document.get("attention_bias", False),
        mlp_bias=document.get("mlp_bias", False),
        bos=document.get("bos_token_id"),
        ends=_ends(folder, document, vocabulary),
        quantization=quantization,
    )


def check_exllamav2(folder: Path) -> None:
    """Refuse settings that exllamav2 0.1.8 stumbles over, or passes over where transformers reads them."""
    path = folder / CONFIG
    document = read_object(path)
    for key in ("architectures", "initializer_range"):
        if key not in document:
            raise UserError(f"{path}: no {key}, which exllamav2 needs; {WHOLE}")
    rope = document.get("rope_scaling") or {}
    read = {kind for name, kinds in EXLLAMAV2_ROPE.items() for kind in kinds if rope.get(name) == kind}
    if rope and not read:
        raise UserError(
            f"{path}: exllamav2 would pass over this rope_scaling; it reads `rope_type: llama3` and `type: linear`; "
            "set `backend: transformers`"
        )


def read_object(path: Path, mend: str = "") -> dict[str, Any]:
    """The JSON object in a file of a model; a UserError where it is none, or where a key stands twice in it, says how
    to `mend` it (default: from where the model came)."""
    mend = mend or again(path)
    raw = path.read_bytes()
    if raw.startswith(LFS):
        raise UserError(f"{path}: a pointer of Git LFS, not the file; run `git lfs pull` in its folder, or {mend}")
    try:
        document = parse_json(raw.decode())
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error}); {mend}") from None
    if not isinstance(document, dict):
        raise UserError(f"{path}: not a JSON object; {mend}")
    return document


def again(path: Path) -> str:
    """How to get a file of a model anew; one of the Hub's cache is a link, behind which its bytes lie."""
    if path.is_symlink():
        return f"remove {path.resolve()} and run `kd models fetch`, or whatever brought it, again"
    return "copy it again from where the model came from"


def _quantization(path: Path, document: dict[str, Any]) -> str | None:
    """The tool that quantized the folder, if one did; refused unless it is EXL2."""
    settings = document.get("quantization_config")
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method != "exl2":
        raise UserError(
            f"{path}: quantized ({method or 'by an unknown tool'}), which this package does not read; take the model's "
            "unquantized folder, or for a teacher on GPUs an EXL2 one"
        )
    return "exl2"


def _check_keys(path: Path, document: dict[str, Any]) -> None:
    if document.get("rope_parameters") is not None:
        raise UserError(
            f"{path}: rope_parameters is transformers 5's, and 4.44 would pass over it; write what it holds as "
            "`rope_theta` and `rope_scaling`, and remove it"
        )
    for key in REQUIRED:
        if key not in document:
            raise UserError(f"{path}: no {key}, for which a default would be another model's; {WHOLE}")
    for key, value in document.items():
        known = REQUIRED.get(key) or OPTIONAL.get(key)
        if known and not known.holds(value):
            raise UserError(f"{path}: {key}: expected {known.expected}, found {json.dumps(value)}")
        if not known and value is not None and not _is_default(key, value):
            raise UserError(
                f"{path}: {key} is no setting of a Llama in transformers 4.44, which would pass over it or give "
                "something else; take the model as it was saved for 4.44, or remove the key if it means nothing"
            )


def _is_default(key: str, value: Any) -> bool:
    """Whether a key of all transformers' models says what it says unsaid."""
    from transformers import PretrainedConfig

    defaults = json.loads(PretrainedConfig().to_json_string(use_diff=False))
    return key in defaults and bool(defaults[key] == value)


def _check_rope(path: Path, document: dict[str, Any]) -> None:
    rope = document.get("rope_scaling")
    if rope is None:
        return
    kinds = {rope[name] if isinstance(rope[name], str) else None for name in ("type", "rope_type") if name in rope}
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind not in ROPE:
        found = json.dumps({name: rope[name] for name in ("type", "rope_type") if name in rope})
        raise UserError(f"{path}: rope_scaling: expected a rope_type of {', '.join(ROPE)}, found {found}")
    needed, possible = ROPE[kind]
    for name in needed:
        if name not in rope:
            raise UserError(f"{path}: rope_scaling: no {name}, which {kind} needs; {WHOLE}")
    for name, value in rope.items():
        if name in ("type", "rope_type"):
            continue
        if name not in (*needed, *possible):
            raise UserError(f"{path}: rope_scaling: {name}, which transformers 4.44 would pass over; {WHOLE}")
        if not _is_positive(value):
            raise UserError(f"{path}: rope_scaling: {name}: expected {POSITIVE.expected}, found {json.dumps(value)}")
    if kind == "llama3" and not rope["low_freq_factor"] < rope["high_freq_factor"]:
        raise UserError(f"{path}: rope_scaling: low_freq_factor is not below high_freq_factor; {WHOLE}")


def _ends(folder: Path, document: dict[str, Any], vocabulary: int) -> tuple[int, ...]:
    """The tokens that end a response: of generation_config.json where it is there, as transformers has it."""
    path = folder / GENERATION
    if path.exists():
        document = read_object(path)
    else:
        path = folder / CONFIG
    ends = document.get("eos_token_id")
    numbers = ends if isinstance(ends, list) else [ends]
    if not numbers or not all(type(one) is int and 0 <= one < vocabulary for one in numbers):
        raise UserError(
            f"{path}: eos_token_id: expected the token that ends a response, or a list of them, below {vocabulary}, "
            f"found {json.dumps(ends)}"
        )
    return tuple(numbers)
