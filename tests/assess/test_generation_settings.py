"""A model's generation settings: both ways of answering obey its end tokens, and nothing else of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from asking import answers
from transformers import AutoModelForCausalLM

from kd.cli import main
from kd.models.load import encode, load_model, load_tokenizer

PROMPTS = ["Tom has 3 apples.", "A box holds 6 pens. Maria buys", "How many"]
LIMIT = 24
SETTINGS: list[dict[str, Any]] = [
    {"repetition_penalty": 5.0, "no_repeat_ngram_size": 2},
    {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 1},
    {"suppress_tokens": list(range(5, 300)), "begin_suppress_tokens": [400 - 1], "bad_words_ids": [[70], [80]]},
    {"forced_bos_token_id": 7, "forced_eos_token_id": 9, "min_new_tokens": 20, "min_length": 60},
    {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True, "penalty_alpha": 0.6},
    {"max_length": 3, "max_new_tokens": 2, "max_time": 1e-9, "use_cache": False, "stop_strings": ["a", "e"]},
    {"return_dict_in_generate": True, "output_scores": True, "exponential_decay_length_penalty": [2, 9.0]},
    {"guidance_scale": 3.0, "sequence_bias": [[[70], 90.0]], "renormalize_logits": True, "some_setting_of_2027": 1},
    {"num_beams": "two", "cache_implementation": "none of these", "temperature": "hot"},
]


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_llama, tmp_path / "model")


def set_generation(folder: Path, **settings: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1} | settings))


def both_ways(folder: Path) -> list[list[Any]]:
    model, tokenizer = load_model(folder, "float32", "cpu"), load_tokenizer(folder)
    return [answers(model, tokenizer, PROMPTS, LIMIT, slots) for slots in (8, None)]


@pytest.mark.usefixtures("on_cpu")  # where a row's tokens do not depend on what shares its batch
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: next(iter(settings)))
def test_other_settings_change_neither_way(settings: dict[str, Any], folder: Path) -> None:
    plain = both_ways(folder)
    assert plain[0] == plain[1]
    set_generation(folder, **settings)
    assert both_ways(folder) == plain


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("as_list", [False, True])
def test_both_ways_end_at_the_tokens_that_the_settings_name(as_list: bool, folder: Path) -> None:
    long, tokenizer = both_ways(folder)[0], load_tokenizer(folder)
    spoken = encode(tokenizer, long[0].text, bos=False)[3]  # amid the first answer
    set_generation(folder, eos_token_id=[1, spoken] if as_list else spoken)
    if not as_list:  # the tokenizer's own must be among them
        path = folder / "tokenizer_config.json"
        settings = json.loads(path.read_text()) | {"eos_token": tokenizer.convert_ids_to_tokens(spoken)}
        path.write_text(json.dumps(settings))
    batched, exact = both_ways(folder)
    assert batched == exact
    assert batched[0].tokens < long[0].tokens


@pytest.mark.usefixtures("on_cpu")
def test_without_generation_settings_configs_end_tokens_hold(folder: Path) -> None:
    plain = both_ways(folder)
    (folder / "generation_config.json").unlink()
    assert both_ways(folder) == plain


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"eos_token_id": 1',
        '{"eos_token_id": 1, "eos_token_id": 2}',
        '{"eos_token_id": "1"}',
        '{"eos_token_id": 1, "max_new_tokens": -4}',
        '{"eos_token_id": 1, "early_stopping": 5}',
        '{"eos_token_id": 1, "watermarking_config": "x"}',
    ],
)
def test_broken_settings_are_refused_before_the_weights_are_loaded(
    content: str,
    folder: Path,
    tiny_params: dict[str, Any],
    write_params: Callable[[dict[str, Any]], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (folder / "generation_config.json").write_text(content)
    tiny_params["teacher"]["model"] = tiny_params["student"]["model"] = {"source": "folder", "path": str(folder)}
    write_params(tiny_params)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    assert main(["head"]) == 2
    error = capsys.readouterr().err
    assert f"kd: {folder}/generation_config.json: " in error
    assert error.splitlines()[-1].startswith("kd: ")


@pytest.mark.usefixtures("on_cpu")
def test_compare_finds_both_ways_alike_whatever_the_settings(
    folder: Path,
    tiny_params: dict[str, Any],
    write_params: Callable[[dict[str, Any]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    set_generation(folder, **SETTINGS[0])
    tiny_params["student"]["model"] = {"source": "folder", "path": str(folder)}
    write_params(tiny_params)
    assert main(["prepare"]) == 0
    capsys.readouterr()
    assert main(["assess", "no-distillation", "--compare", "6", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["identical_responses"] == 1.0
