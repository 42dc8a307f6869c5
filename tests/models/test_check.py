"""What a model folder can be but should not: refused before work begins, or the same model as before."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_tiny_llama

from kd.assess.generate import end_ids
from kd.cli import main
from kd.errors import UserError
from kd.models.check import check_folder
from kd.models.load import encode, load_model, load_tokenizer
from kd.models.settings import check_exllamav2, read_settings
from kd.models.weights import expected

TEXT = "Tom has 3 apples. He buys 14 more; how many apples does he have now?"
FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
]
WEIGHTS = "model.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 269060552\n"


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Other models: with another vocabulary, with other sizes, and with weights of the same sizes."""
    made = [{"vocabulary": 420}, {"hidden_size": 64}, {"num_hidden_layers": 3}, {"tie_word_embeddings": True}]
    return [make_tiny_llama(tmp_path_factory.mktemp("other"), **one) for one in made]


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """A good folder, to be spoilt."""
    return shutil.copytree(tiny_llama, tmp_path / "model")


def outcome(folder: Path) -> list[Any]:
    """What comes of a folder that is not refused: tokens, logits, and what ends a response."""
    check_folder(folder, "transformers")
    token_ids = encode(load_tokenizer(folder), TEXT, bos=True)
    model = load_model(folder, "float32", "cpu")
    with torch.inference_mode():
        return [token_ids, model(torch.tensor([token_ids])).logits.tolist(), end_ids(model)]


@pytest.fixture(scope="module")
def good(tiny_llama: Path) -> list[Any]:
    return outcome(tiny_llama)


def refused_or_the_same(folder: Path, good: list[Any]) -> None:
    try:
        found, said = outcome(folder), ""
    except UserError as error:
        found, said = None, str(error)
    assert found == good or (str(folder) in said and "\n" not in said)


def refusal(folder: Path, backend: Any = "transformers") -> str:
    with pytest.raises(UserError) as caught:
        check_folder(folder, backend)
    return str(caught.value)


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None takes one out."""
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not ...}))


@pytest.mark.parametrize("name", FILES)
def test_a_file_missing_empty_cut_or_another_kind_of_file(name: str, folder: Path, good: list[Any]) -> None:
    path = folder / name
    whole = path.read_bytes()
    path.unlink()
    refused_or_the_same(folder, good)
    path.symlink_to("nowhere")
    refused_or_the_same(folder, good)
    path.unlink()
    for spoilt in (
        b"",
        whole[:1],
        whole[: len(whole) // 2],
        whole[:-1],
        whole + b"x",
        b"[]",
        b"null",
        b"\xff\xfe{}",
        POINTER.encode(),
        b"\xef\xbb\xbf" + whole,
        b"[" * 100_000,
    ):
        path.write_bytes(spoilt)
        refused_or_the_same(folder, good)
    path.write_bytes(whole)
    assert outcome(folder) == good


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_model(name: str, folder: Path, good: list[Any], others: list[Path]) -> None:
    for other in others:
        shutil.copy(other / name, folder)
        refused_or_the_same(folder, good)


def keys() -> list[str]:
    """The keys that transformers 4.44 writes."""
    from transformers import LlamaConfig

    wanted = LlamaConfig(architectures=["LlamaForCausalLM"], torch_dtype="float32", initializer_range=0.5, vocab_size=1)
    return [*wanted.to_diff_dict()]


@pytest.mark.parametrize("key", keys())
def test_a_key_of_config_gone_doubled_or_of_another_type(key: str, folder: Path, good: list[Any]) -> None:
    path = folder / "config.json"
    text = path.read_text()
    document = json.loads(text)
    assert key in document
    edit(path, **{key: ...})
    refused_or_the_same(folder, good)
    for other in (document[key], 7):
        path.write_text(text.rstrip()[:-1] + f", {json.dumps(key)}: {json.dumps(other)}}}")
        assert f"{key!r} stands twice" in refusal(folder)
    for other in (None, "x", -1, 0, 1.5, 10**30, 10**400, True, [], {}, [1], {"a": 1}, float("nan")):
        path.write_text(json.dumps(document | {key: other}))
        if key not in ("rms_norm_eps", "rope_theta") or type(other) not in (int, float) or not 0 < other < 1e30:
            refused_or_the_same(folder, good)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, 'model_type: expected llama; this package reads Llama models, found "gpt2"'),
        ({"model_type": "llama5"}, "model_type: expected llama"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures: expected [LlamaForCausalLM]"),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, "rope_parameters is transformers 5's"),
        ({"rope_scaling": {"rope_type": "mrope"}}, "rope_scaling: expected a rope_type of default, linear"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling: no low_freq_factor, which llama3"),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}}, "expected a rope_type of"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, 'factor: expected a number greater than 0, found "2"'),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "truncate": False}}, "truncate, which transformers 4.44"),
        ({"head_dim": 16}, "head_dim is 16, and transformers 4.44 computes with hidden_size / num_attention_heads, 8"),
        ({"rope_interleaved": True}, "rope_interleaved: expected false"),
        ({"hidden_act": "gelu"}, "hidden_act: expected silu"),
        ({"sliding_window": 4096}, "sliding_window is no setting of a Llama in transformers 4.44"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.X"}}, "auto_map is no setting of a Llama"),
        ({"repetition_penalty": 1.3}, "repetition_penalty is no setting of a Llama"),
        ({"return_dict": False}, "return_dict is no setting of a Llama"),
        ({"pad_token_id": 400}, "pad_token_id 400 is no row of 400"),
        ({"num_attention_heads": 3}, "do not divide into heads of one even size"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "quantized (bitsandbytes)"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized (gptq), which this package"),
        ({"quantization_config": {"bits": 4}}, "quantized (by an unknown tool)"),
        ({"quantization_config": {"quant_method": "exl2", "bits": 6.0}}, "no model.embed_tokens.weight"),
        ({"bos_token_id": 1}, "its bos_token is 0 where bos_token_id of config.json is 1"),
        ({"vocab_size": 408}, "model.embed_tokens.weight is [400, 32] where config.json makes it [408, 32]"),
        ({"tie_word_embeddings": True}, "lm_head.weight is not the embedding"),
        ({"num_hidden_layers": 3}, "no tensor model.layers.2.input_layernorm.weight and 8 more"),
        ({"num_hidden_layers": 1}, "model.layers.1."),
        ({"attention_bias": True}, "no tensor model.layers.0.self_attn.k_proj.bias and 7 more"),
    ],
)
def test_settings_that_would_be_another_model(changes: dict[str, Any], message: str, folder: Path) -> None:
    edit(folder / "config.json", **changes)
    if "quant_method" in str(changes) and "exl2" in str(changes):
        assert "quantized as EXL2, which transformers does not read; set `teacher.backend: exll" in refusal(folder)
        return
    assert message in refusal(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"head_dim": 8, "dtype": "bfloat16", "transformers_version": "4.57.1"},
        {"_name_or_path": "x", "is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {}},
        {"unsloth_fixed": True, "sliding_window": None, "output_attentions": False, "return_dict": True},
        {"eos_token_id": [0, 1], "torch_dtype": "bfloat16", "use_cache": False, "rope_scaling": None},
    ],
)
def test_what_the_hubs_llamas_say_besides(changes: dict[str, Any], folder: Path, good: list[Any]) -> None:
    edit(folder / "config.json", **changes)
    assert outcome(folder) == good


LLAMA_31_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 128256,
}
LLAMA_31_405B = {
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_attention_heads": 128,
    "num_hidden_layers": 126,
    "quantization_config": {
        "quant_method": "exl2",
        "version": "0.1.8",
        "bits": 6.0,
        "head_bits": 8,
        "calibration": {"rows": 115, "length": 2048, "dataset": "(default)"},
    },
}
LLAMA_32_1B = {
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "rope_scaling": LLAMA_31_8B["rope_scaling"] | {"factor": 32.0},  # type: ignore[operator]
    "tie_word_embeddings": True,
    "transformers_version": "4.45.0.dev0",
}
SMOLLM2_135M = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "vocab_size": 49152,
}


@pytest.mark.parametrize("changes", [{}, LLAMA_31_405B, LLAMA_32_1B, SMOLLM2_135M])
def test_the_settings_of_the_papers_models_are_read(changes: dict[str, Any], tmp_path: Path) -> None:
    document = LLAMA_31_8B | changes
    (tmp_path / "config.json").write_text(json.dumps(document))
    found = read_settings(tmp_path)
    assert found.layers == document["num_hidden_layers"]
    assert set(found.ends) <= {2, 128001, 128008, 128009}
    check_exllamav2(tmp_path)


@pytest.mark.parametrize(
    "rope",
    [
        {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        {"type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0},
        {"rope_type": "default"},
    ],
)
def test_ways_of_scaling_positions_are_read(rope: dict[str, Any], folder: Path) -> None:
    edit(folder / "config.json", rope_scaling=rope)
    assert len(outcome(folder)[0]) > 1


def test_exllamav2_is_not_given_what_it_passes_over(folder: Path) -> None:
    check_folder(folder, "exllamav2")
    edit(folder / "config.json", rope_scaling={"rope_type": "yarn", "factor": 4.0})
    assert "exllamav2 would pass over this rope_scaling" in refusal(folder, "exllamav2")
    edit(folder / "config.json", rope_scaling=None, initializer_range=...)
    assert "no initializer_range, which exllamav2 needs" in refusal(folder, "exllamav2")


@pytest.fixture
def tensors(folder: Path) -> Iterator[dict[str, torch.Tensor]]:
    """The folder's weights, to be changed; the test writes them."""
    return load_file(folder / WEIGHTS)


def write(folder: Path, tensors: dict[str, torch.Tensor], metadata: Any = {"format": "pt"}) -> None:  # noqa: B006
    save_file(tensors, folder / WEIGHTS, metadata)


NORM, HEAD = "model.norm.weight", "lm_head.weight"


def without(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def having(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(HEAD), "no lm_head.weight, and config.json does not say `tie_word_embeddings: true`"),
        (without(NORM), "no tensor model.norm.weight"),
        (having("model.layers.2.mlp.up_proj.weight", torch.zeros(2)), "model.layers.2.mlp.up_proj.weight, which the"),
        (having(NORM, torch.zeros(31)), "model.norm.weight is [31] where config.json makes it [32]"),
        (having(NORM, torch.zeros(32, dtype=torch.int8)), "model.norm.weight holds I8, quantized in a way"),
        (having(NORM, torch.zeros(32).to(torch.float8_e4m3fn)), "model.norm.weight holds F8_E4M3, quantized in a way"),
    ],
)
def test_weights_that_are_not_those_of_the_settings(
    change: Any, message: str, folder: Path, tensors: dict[str, torch.Tensor]
) -> None:
    change(tensors)
    write(folder, tensors)
    assert message in refusal(folder)


def test_weights_without_the_mark_that_transformers_wants(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    for metadata in (None, {"format": "np"}):
        write(folder, tensors, metadata)
        assert "metadata={'format': 'pt'}" in refusal(folder)


def test_old_frequencies_are_passed_over(folder: Path, tensors: dict[str, torch.Tensor], good: list[Any]) -> None:
    write(folder, tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert outcome(folder) == good


def test_a_tied_head_is_absent_or_the_same(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    edit(folder / "config.json", tie_word_embeddings=True)
    head = tensors.pop(HEAD)
    write(folder, tensors)
    tied = outcome(folder)
    write(folder, tensors | {HEAD: tensors["model.embed_tokens.weight"].clone()})
    assert outcome(folder) == tied
    write(folder, tensors | {HEAD: head})
    assert "lm_head.weight is not the embedding" in refusal(folder)


def test_what_another_tool_left_in_the_folder(folder: Path, tiny_llama: Path) -> None:
    shutil.copy(tiny_llama / WEIGHTS, folder / "consolidated.safetensors")
    assert "consolidated.safetensors, of which model.safetensors knows nothing; remove it" in refusal(folder)
    (folder / "consolidated.safetensors").unlink()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tiny_llama)}))
    assert "adapter_config.json: transformers would load the model that it names" in refusal(folder)


@pytest.fixture
def sharded(folder: Path) -> Path:
    """The folder with its weights in several files."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder, max_shard_size="60KB")
    return folder


def test_shards_are_all_there_and_no_others(sharded: Path, good: list[Any]) -> None:
    assert outcome(sharded) == good
    index = sharded / f"{WEIGHTS}.index.json"
    shards = sorted(sharded.glob("*.safetensors"))
    held, named = shards[0].read_bytes(), index.read_text()
    shards[0].unlink()
    assert f"no {shards[0].name}, which {index.name} names" in refusal(sharded)
    shutil.copy(shards[1], shards[0])
    assert "looks for there" in refusal(sharded)
    shards[0].write_bytes(held)
    shutil.copy(shards[0], sharded / "model-00009-of-00009.safetensors")
    assert "model-00009-of-00009.safetensors, of which" in refusal(sharded)
    (sharded / "model-00009-of-00009.safetensors").unlink()
    for spoilt, message in (
        ("", "not readable as JSON"),
        ("{}", "no weight_map of names and files"),
        (named.replace("model.norm.weight", "model.norms.weight"), "no tensor model.norms.weight, which"),
        (named.replace('"model.norm.weight": "model-', '"model.norm.weight": "../model-'), "no ../model-"),
    ):
        index.write_text(spoilt)
        assert message in refusal(sharded)
    index.unlink()
    assert f"neither {WEIGHTS} nor {index.name}" in refusal(sharded)
    index.write_text(named)
    shutil.copy(shards[0], sharded / WEIGHTS)
    assert "two sets of weights" in refusal(sharded)


def test_of_hundreds_of_gigabytes_the_headers_are_read(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    sizes = {key: LLAMA_31_405B[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads")}
    edit(folder / "config.json", num_key_value_heads=8, num_hidden_layers=126, **sizes)
    named = {}
    for number, (name, shape) in enumerate(expected(read_settings(folder)).items()):
        shard = named[name] = f"model-{number:05}.safetensors"
        size = 2 * math.prod(shape)
        entry = {"dtype": "BF16", "shape": shape, "data_offsets": [0, size]}
        header = json.dumps({"__metadata__": {"format": "pt"}, name: entry}).encode()
        (folder / shard).write_bytes(len(header).to_bytes(8, "little") + header)
        os.truncate(folder / shard, 8 + len(header) + size)  # a hole
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": named}))
    assert sum(path.stat().st_size for path in folder.iterdir()) > 500e9
    assert not check_folder(folder, "transformers").quantized


def quantize(folder: Path) -> None:
    """The folder as EXL2 has it, by its names."""
    tensors = load_file(folder / WEIGHTS)
    found = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if "norm" in name or "embed" in name:
            found[name] = tensor.half()
        else:
            parts = {"q_weight": torch.int32, "q_invperm": torch.int32, "q_scale": torch.int32}
            parts |= {"q_scale_max": torch.float16, "q_groups": torch.int16}
            found |= {f"{module}.{part}": torch.zeros(4, dtype=dtype) for part, dtype in parts.items()}
    (folder / WEIGHTS).unlink()
    save_file(found, folder / "output.safetensors")
    quantization = {
        "quant_method": "exl2",
        "version": "0.1.8",
        "bits": 6.0,
        "head_bits": 8,
        "calibration": {"rows": 115},
    }
    edit(folder / "config.json", quantization_config=quantization)


def test_an_exl2_folder_is_for_exllamav2_alone(folder: Path) -> None:
    quantize(folder)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"x": "of-the-original.safetensors"}}))
    assert check_folder(folder, "exllamav2").quantized
    assert "set `teacher.backend: exllamav2`" in refusal(folder)
    edit(folder / "config.json", quantization_config=...)  # of the first versions
    assert check_folder(folder, "exllamav2").quantized
    tensors = load_file(folder / "output.safetensors")
    del tensors["model.layers.1.mlp.up_proj.q_scale"]
    save_file(tensors, folder / "output.safetensors")
    assert "no model.layers.1.mlp.up_proj.weight, nor all of it quantized" in refusal(folder, "exllamav2")
    (folder / "output.safetensors").rename(folder / "output-00001-of-00002.safetensors")
    assert "1 of 2 files output-*.safetensors" in refusal(folder, "exllamav2")


def newer(tokenizer: dict[str, Any]) -> None:
    """As tokenizers 0.20 writes merges: pairs."""
    tokenizer["model"]["merges"] = [merge.split(" ") for merge in tokenizer["model"]["merges"]]


def test_a_tokenizer_of_a_newer_library_or_of_another_model(folder: Path, others: list[Path]) -> None:
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    newer(tokenizer)
    path.write_text(json.dumps(tokenizer))
    assert f"{path}: not readable by the pinned tokenizers" in refusal(folder)
    shutil.copy(others[0] / path.name, path)
    assert "420 tokens where vocab_size of config.json is 400" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tokenizer_class": "TokenizersBackend"},
            "write PreTrainedTokenizerFast, which reads tokenizer.json as it is",
        ),
        ({"tokenizer_class": ...}, "tokenizer_class: expected one of"),
        ({"bos_token": "<bos>"}, "its bos_token '<bos>' is not in tokenizer.json"),
        ({"bos_token": None}, "no bos_token, which the protocol puts before each text"),
        ({"bos_token": 5}, "its bos_token None is not in"),
        ({"bos_token": "</s>"}, "its bos_token is 1 where bos_token_id of config.json is 0"),
        ({"eos_token": "<s>"}, "its eos_token is 0 and not among those of generation_config.json, 1"),
        ({"added_tokens_decoder": {"400": {"content": "<pad>"}}}, "token 400 is '<pad>', which it is not in"),
        ({"added_tokens_decoder": []}, "added_tokens_decoder: expected tokens by their ids"),
    ],
)
def test_tokenizer_settings_that_do_not_fit(changes: dict[str, Any], message: str, folder: Path) -> None:
    edit(folder / "tokenizer_config.json", **changes)
    if "None is not in" in message:
        message = "its bos_token 5 is not in"
    assert message in refusal(folder)


def test_a_class_that_adds_tokens_is_refused_and_the_advice_works(folder: Path, good: list[Any]) -> None:
    edit(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer", unk_token="<unk>")
    said = "its unk_token '<unk>' is not in tokenizer.json, and transformers would add it"
    assert said in refusal(folder)
    edit(folder / "tokenizer_config.json", unk_token=...)  # the class has it unsaid
    assert said in refusal(folder)
    assert "or write PreTrainedTokenizerFast for tokenizer_class and name no unk_token" in refusal(folder)
    edit(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    assert outcome(folder) == good


@pytest.mark.parametrize("content", ['{"eos_token_id": "1"}', "{}", '{"eos_token_id": []}', '{"eos_token_id": [400]}'])
def test_generation_settings_must_name_what_ends_a_response(content: str, folder: Path) -> None:
    (folder / "generation_config.json").write_text(content)
    assert "generation_config.json: eos_token_id: expected the token that ends a response" in refusal(folder)


def test_a_snapshot_of_the_hub_is_read_through_its_links(folder: Path, good: list[Any]) -> None:
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    assert outcome(folder) == good
    blob = (folder / WEIGHTS).resolve()
    blob.write_bytes(blob.read_bytes()[:-1])
    assert f"cut or damaged; remove {blob} and run `kd models fetch`" in refusal(folder)


def test_a_folder_is_looked_at_again_when_a_file_changes(folder: Path) -> None:
    assert check_folder(folder).settings.context == 2048
    edit(folder / "config.json", max_position_embeddings=1024)
    os.utime(folder / "config.json", ns=(1, 1))
    assert check_folder(folder).settings.context == 1024


@pytest.fixture
def run(
    folder: Path, tiny_params: dict[str, Any], write_params: Callable[[dict[str, Any]], None]
) -> Callable[..., int]:
    """`kd`, with the folder as a teacher, a student or both."""

    def run(*command: str, roles: tuple[str, ...] = ("teacher", "student"), path: str | None = None) -> int:
        for role in roles:
            tiny_params[role]["model"] = {"source": "folder", "path": path or str(folder)}
        write_params(tiny_params)
        return main([*command])

    return run


@pytest.mark.parametrize(
    "command", [["inputs"], ["head"], ["teacher", "base"], ["train", "base-kd"], ["assess", "base-kd"]]
)
def test_each_stage_refuses_before_it_begins(
    command: list[str], run: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("prepare") == 0
    (folder / "adapter_config.json").write_text("{}")
    before = sorted(Path("artifacts").rglob("*"))
    assert run(*command) == 2
    assert f"kd: {folder}/adapter_config.json: transformers would load" in capsys.readouterr().err
    assert sorted(Path("artifacts").rglob("*")) == before


def test_a_tilde_is_the_home_folder(
    run: Callable[..., int], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert run("inputs", path="~/model") == 0
    assert run("head", path="~/model") == 0
    assert '"name": "~/model"' in Path("artifacts/mini/teacher/head/manifest.json").read_text()
    assert run("inputs", path="~nobody-of-that-name/model") == 2
    assert "~nobody-of-that-name/model: no such model folder" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["inputs"], ["head"]])
def test_two_vocabularies_are_said_before_the_head(
    command: list[str], run: Callable[..., int], others: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*command, roles=("student",), path=str(others[0])) == 2
    assert "logits, the student" in capsys.readouterr().err
    assert not Path("artifacts").exists()


def test_the_doctor_tells_of_two_vocabularies(
    run: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = (folder / "tokenizer.json").read_text()
    assert run("doctor", roles=("student",)) == 0
    swapped = tokenizer.replace('"!": 2,', '"!": 3,').replace('"\\"": 3,', '"\\"": 2,')
    assert swapped != tokenizer
    (folder / "tokenizer.json").write_text(swapped)
    assert run("doctor", roles=("student",)) == 1
    printed = capsys.readouterr()
    assert "the teacher's is not the student's" in printed.out
    assert "choose a teacher and a student with one vocabulary" in printed.out
    assert run("inputs", roles=("student",)) == 2
