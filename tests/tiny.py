"""A tiny random Llama, made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kd.data import miniature


def make_tiny_llama(folder: Path, seed: int = 0, vocabulary: int = 400, **config: Any) -> Path:
    """A two-layer Llama with random weights and a byte-level tokenizer trained on the miniature; `config` overrides."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([problem.question for problem in miniature.problems(200, 0)], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    shape = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
        "initializer_range": 0.5,  # the usual 0.02 makes all distributions nearly uniform and every test blind
    }
    LlamaForCausalLM(LlamaConfig(**(shape | config))).save_pretrained(folder)
    return folder
