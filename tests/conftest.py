"""Fixtures: a tiny random Llama with its own tokenizer, and a folder to run `kd` in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from kd import miniature

REPOSITORY = Path(__file__).parent.parent


def make_tiny_llama(folder: Path, seed: int = 0, vocabulary: int = 400) -> Path:
    """A two-layer Llama with random weights and a byte-level tokenizer trained on the miniature."""
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
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
        initializer_range=0.5,  # the usual 0.02 makes all distributions nearly uniform and every test blind
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture
def tiny_params(tiny_llama: Path) -> dict[str, Any]:
    """profiles/mini.yaml with the tiny Llama on both sides and a handful of rows."""
    params: dict[str, Any] = YAML(typ="safe").load(REPOSITORY / "profiles" / "mini.yaml")
    params["dataset"] |= {"train_rows": 12, "test_rows": 6}
    params["teacher"]["model"] = params["student"]["model"] = {"source": "folder", "path": str(tiny_llama)}
    params["distill"] |= {"cosine_steps": 12, "learning_rate": 0.05}
    for experiment in params["experiments"].values():
        experiment["max_new_tokens"] = 6
    return params


@pytest.fixture
def write_params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], None]:
    """Make tmp_path the working folder and write its params.yaml."""
    monkeypatch.chdir(tmp_path)

    def write(params: dict[str, Any]) -> None:
        YAML().dump(params, Path("params.yaml"))

    return write
