"""The students' attention and confidence: against plain definitions, streamed, the same bytes each time."""

from __future__ import annotations

import csv
import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from itertools import pairwise
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_tiny_params
from params import experiments, keep, run_of
from peft import LoraConfig, PeftModel, get_peft_model
from ruamel.yaml import YAML
from tiny import make_tiny_llama
from transformers import AutoModelForCausalLM, DynamicCache

from kd.analysis.attention import Layers, layers_to, measure
from kd.analysis.confidence import Answer, answer_probabilities, largest_probabilities
from kd.analysis.students import student_names
from kd.cli import main
from kd.config import Config, load_config
from kd.data.rows import read_examples
from kd.models.load import encode, load_tokenizer
from kd.report.attention import head_rows
from kd.scoring.log import Response, log_text

ARTIFACTS = Path("artifacts/mini")
ATTENTION = ARTIFACTS / "attention"
STUDENTS = [
    "no-distillation-matched",
    *map(run_of, ("fine-tuning", "base-kd", "confidence-kd", "teacher-kd", "ground-truth-kd")),
]
RESPONSES = [  # text, and whether the limit ended it
    Response("", 1, False),
    Response(" The answer is 4.", 5, True),
    Response("\nHe has 3 + 4 = 7.", 9, False),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A folder with everything that `kd attention` reads of the miniature, adapters that differ among it, and with what
    it makes of that."""
    folder, params = tmp_path_factory.mktemp("made"), make_tiny_params(tiny_llama)
    params["attention"]["questions"] = len(RESPONSES)
    with chdir(folder):
        YAML().dump(params, Path("params.yaml"))
        assert main(["prepare"]) == 0
        for seed, name in enumerate(Config.model_validate(params).adapters):
            save_adapter(tiny_llama, ARTIFACTS / "adapters" / name, seed)
        examples = read_examples(ARTIFACTS / "data" / "test.jsonl")
        (ARTIFACTS / "logs").mkdir()
        for name, experiment in experiments(params).items():
            prompts = [example.question + experiment.suffix for example in examples]
            (ARTIFACTS / "logs" / f"{name}.csv").write_text(log_text(examples, prompts, RESPONSES * 2))
        figures = dict(zip(("base", "teacher", "ground-truth", "confidence"), (0.43, 0.41, 0.42, 0.45), strict=True))
        published = {"base": 0.573, "confidence": 0.52}
        statistics = {
            name: {"mean_max_probability": one, "published": published.get(name)} for name, one in figures.items()
        }
        (ARTIFACTS / "statistics.json").write_text(json.dumps(statistics))
        assert main(["attention"]) == 0
    return folder


@pytest.fixture
def analysed(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder that is a copy of it."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def trained(analysed: None) -> None:
    """A working folder in which only the analysis is missing."""
    del analysed
    shutil.rmtree(ATTENTION)


def save_adapter(student: Path, folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(student), settings)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)  # PEFT's own zeros would leave the student as it was
    adapted.peft_config["default"].base_model_name_or_path = str(student)
    adapted.save_pretrained(folder)


def plain_student(student: Path, adapter: Path | None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(student, attn_implementation="eager").eval()
    return model if adapter is None else PeftModel.from_pretrained(model, adapter)


def questions(student: Path) -> list[list[int]]:
    tokenizer = load_tokenizer(student)
    rows = read_examples(ARTIFACTS / "data" / "test.jsonl")[: len(RESPONSES)]
    return [encode(tokenizer, row.question, bos=True) for row in rows]


def table(name: str) -> list[dict[str, str]]:
    with (ATTENTION / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def plain_head(rows: list[list[float]]) -> tuple[float, float, float]:
    """Entropy, focus and sparsity of one head by the words of docs/attention.md."""
    entropy = focus = below = seen = 0.0
    for q, row in enumerate(rows):
        focus += row[q]
        for k in range(q + 1):
            seen += 1
            below += row[k] < 0.1
            entropy -= row[k] * log(row[k]) if row[k] > 0 else 0
    return entropy / len(rows), focus / len(rows), below / seen


def plain_similarity(one: list[list[list[float]]], other: list[list[list[float]]]) -> float:
    """Cosine of two layers [heads, tokens, tokens], each averaged over its heads."""
    first, second = (
        [sum(head[q][k] for head in layer) / len(layer) for q in range(len(layer[0])) for k in range(len(layer[0]))]
        for layer in (one, other)
    )
    product = sum(a * b for a, b in zip(first, second, strict=True))
    return product / (sum(a * a for a in first) * sum(b * b for b in second)) ** 0.5


def plain_metrics(model: Any, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Per layer and head, and per pair of layers, on one question."""
    with torch.no_grad():
        maps = [weights[0].tolist() for weights in model(torch.tensor([ids]), output_attentions=True).attentions]
    heads = np.array([[plain_head(head) for head in layer] for layer in maps])
    similarity = np.array([plain_similarity(a, b) for a, b in pairwise(maps)])
    return heads, similarity


@pytest.mark.parametrize(("student", "adapter"), [("no-distillation-matched", None), ("teacher-kd-1", "teacher-kd-1")])
@pytest.mark.usefixtures("on_cpu", "analysed")  # to the last bits of float32
def test_metrics_are_those_of_the_plain_definitions(student: str, adapter: str | None, tiny_llama: Path) -> None:
    model = plain_student(tiny_llama, ARTIFACTS / "adapters" / adapter if adapter else None)
    plain = [plain_metrics(model, ids) for ids in questions(tiny_llama)]
    heads, similarity = (np.mean(values, axis=0) for values in zip(*plain, strict=True))
    rows = [row for row in table("attention") if row["experiment"] == student]
    assert [row["layer"] for row in rows] == ["0", "1"]
    for row, values in zip(rows, heads.mean(axis=1), strict=True):
        assert [float(row[name]) for name in ("entropy", "focus", "sparsity")] == pytest.approx(values, abs=1e-6)
    assert float(rows[0]["similarity_to_next"]) == pytest.approx(similarity[0], abs=1e-6)
    assert rows[1]["similarity_to_next"] == ""
    assert measure(load_config(Path("params.yaml")))[student].heads == pytest.approx(heads, abs=1e-6)


@pytest.mark.usefixtures("analysed")
def test_students_differ_and_the_heads_that_vary_most_come_first() -> None:
    assert len({row["entropy"] for row in table("attention") if row["layer"] == "1"}) == len(STUDENTS)
    measured = measure(load_config(Path("params.yaml")))
    rows = table("heads")
    assert list(rows[0]) == ["metric", "rank", "layer", "head", "variance", *STUDENTS]
    for i, metric in enumerate(("entropy", "focus")):
        ranked = [row for row in rows if row["metric"] == metric]
        assert [row["rank"] for row in ranked] == [str(rank) for rank in range(1, 9)]  # two layers of four heads
        variances = [float(row["variance"]) for row in ranked]
        assert variances == sorted(variances, reverse=True)
        for row in ranked:
            values = [one.heads[int(row["layer"]), int(row["head"]), i] for one in measured.values()]
            assert [float(row[name]) for name in STUDENTS] == pytest.approx(values, abs=1e-8)
            assert float(row["variance"]) == pytest.approx(np.mean((values - np.mean(values)) ** 2), rel=1e-6)
    assert len(head_rows({name: deep(one) for name, one in measured.items()})) == 1 + 2 * 10


def deep(one: Any) -> Any:
    """The same student, ten times as deep."""
    return type(one)(np.tile(one.heads, (10, 1, 1)), one.similarity, one.question, one.answer)


@pytest.mark.parametrize("adapter", [None, "base-kd-1"])
@pytest.mark.usefixtures("on_cpu", "analysed")  # to the last bits of float32
def test_confidence_is_the_mean_of_the_largest_probability(adapter: str | None, tiny_llama: Path) -> None:
    model = plain_student(tiny_llama, ARTIFACTS / "adapters" / adapter if adapter else None)
    tokenizer = load_tokenizer(tiny_llama)
    asked: list[float] = []
    answered: list[float] = []
    for ids, response in zip(questions(tiny_llama), RESPONSES, strict=True):
        token_ids = ids + encode(tokenizer, response.text, bos=False)
        with torch.no_grad():
            largest = model(torch.tensor([token_ids])).logits[0].softmax(-1).amax(-1).tolist()
        asked += largest[: len(ids)]
        answered += largest[len(ids) - 1 : -1 if response.reached_limit else None]
    row = next(row for row in table("confidence") if row["experiment"] == (adapter or "no-distillation-matched"))
    assert (int(row["question_positions"]), int(row["answer_positions"])) == (len(asked), len(answered))
    assert float(row["question"]) == pytest.approx(np.mean(asked), abs=1e-6)
    assert float(row["answer"]) == pytest.approx(np.mean(answered), abs=1e-6)


@pytest.mark.usefixtures("trained")
def test_without_adapters_the_bare_student_is_measured_on_the_answers_to_its_own_prompt(
    tiny_params: dict[str, Any], write_params: Callable[[dict[str, Any]], None], tiny_llama: Path
) -> None:
    tiny_params["attention"]["questions"] = len(RESPONSES)
    experiment = tiny_params["untrained"]["no-distillation"]
    keep(tiny_params, "no-distillation")
    write_params(tiny_params)
    model, tokenizer = plain_student(tiny_llama, None), load_tokenizer(tiny_llama)
    answered: list[float] = []
    for row, response in zip(read_examples(ARTIFACTS / "data" / "test.jsonl"), RESPONSES, strict=False):
        prompt = encode(tokenizer, row.question + experiment["suffix"], bos=True)
        token_ids = prompt + encode(tokenizer, response.text, bos=False)
        with torch.no_grad():
            largest = model(torch.tensor([token_ids])).logits[0].softmax(-1).amax(-1).tolist()
        answered += largest[len(prompt) - 1 : -1 if response.reached_limit else None]
    measured = measure(load_config(Path("params.yaml")))
    assert list(measured) == ["no-distillation"]
    assert measured["no-distillation"].answer.positions == len(answered)
    assert measured["no-distillation"].answer.mean == pytest.approx(np.mean(answered), abs=1e-6)


@pytest.mark.parametrize("prompt", [[0, 5, 6, 7], [0, 5, 6, 7, 8], [0, 5, 9, 8], [0]])
def test_what_the_prompt_shares_with_the_question_is_read_once(prompt: list[int], tiny_llama: Path) -> None:
    model, cache = plain_student(tiny_llama, None), DynamicCache()
    answer = Answer([*prompt, 10, 11, 12], (len(prompt) - 1, len(prompt) + 2))
    with torch.inference_mode():
        largest_probabilities(model, [0, 5, 6, 7], cache)
        found = answer_probabilities(model, answer, [0, 5, 6, 7], cache)
        expected = model(torch.tensor([answer.token_ids])).logits[0].softmax(-1).amax(-1)[slice(*answer.rows)]
    assert found.tolist() == pytest.approx(expected.tolist(), abs=5e-6)  # another order of float32 additions


@contextmanager
def alive_before_each_layer(model: Any, maps: list[Any]) -> Iterator[list[int]]:
    """How many of the earlier layers' maps are still in memory whenever a layer has made its own."""
    alive: list[int] = []

    def count(_: Any, __: Any, output: tuple[Any, ...]) -> None:
        alive.append(sum(map() is not None for map in maps))
        maps.append(weakref.ref(output[1]))

    hooks = [layer.self_attn.register_forward_hook(count) for layer in model.model.layers]
    yield alive
    for hook in hooks:
        hook.remove()


def test_no_more_than_one_layers_map_is_alive(tmp_path: Path) -> None:
    model = plain_student(make_tiny_llama(tmp_path, num_hidden_layers=5), None)
    layers, maps = Layers(), list[Any]()

    def add(weights: torch.Tensor) -> None:
        maps.append(weakref.ref(weights))  # a view of the map, which would keep it alive
        layers.add(weights)

    with torch.inference_mode():
        with alive_before_each_layer(model, []) as kept:
            everything = model(torch.tensor([[0, 5, 6, 7]]), output_attentions=True)
        with alive_before_each_layer(model, maps) as streamed, layers_to(add, model):
            largest_probabilities(model, [0, 5, 6, 7], DynamicCache(), tell_attention=True)
    assert len(everything.attentions) == 5
    assert kept == [0, 1, 2, 3, 4]  # what transformers does by itself
    assert streamed == [0] * 5
    assert layers.heads().shape == (5, 4, 3)
    assert layers.similarity().shape == (4,)


@pytest.mark.usefixtures("analysed")
def test_the_same_bytes_twice() -> None:
    first = {path.name: path.read_bytes() for path in ATTENTION.iterdir()}
    charts = ("entropy", "focus", "sparsity", "similarity", "confidence", "teacher-confidence")
    images = {f"{chart}.{kind}" for chart in charts for kind in ("svg", "png")}
    assert set(first) == images | {"attention.csv", "heads.csv", "confidence.csv"}
    assert list(table("attention")[0]) == ["experiment", "layer", "entropy", "focus", "sparsity", "similarity_to_next"]
    assert list(dict.fromkeys(row["experiment"] for row in table("attention"))) == STUDENTS
    shutil.rmtree(ATTENTION)
    assert main(["attention"]) == 0
    assert {path.name: path.read_bytes() for path in ATTENTION.iterdir()} == first


@pytest.mark.usefixtures("trained")
def test_charts_name_the_students_as_text() -> None:
    (ARTIFACTS / "statistics.json").unlink()
    assert main(["attention"]) == 0
    charts = [path.read_text(encoding="utf-8") for path in ATTENTION.glob("*.svg")]
    assert len(charts) == 5  # all but the teacher's, which has not been measured
    for svg in charts:
        assert "<svg" in svg
        assert "no-distillation-matched" in svg  # as text


@pytest.mark.usefixtures("trained")
def test_heads_are_drawn_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attention", "--heads", "0:3,1:0"]) == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [path.name for path in paths] == ["layer-00-head-03.png", "layer-01-head-00.png"]
    first = [path.read_bytes() for path in paths]
    assert all(image.startswith(b"\x89PNG") for image in first)
    assert first[0] != first[1]
    assert not ATTENTION.exists()
    assert main(["attention", "--heads", "1:0"]) == 0
    assert paths[1].read_bytes() == first[1]


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("adapters/base-kd-1", "artifacts/mini/adapters/base-kd-1: no such adapter; run `kd train base-kd-1`"),
        ("logs/teacher-kd-1.csv", "artifacts/mini/logs/teacher-kd-1.csv: no such file; run `kd assess teacher-kd-1`"),
        ("data/test.jsonl", "artifacts/mini/data/test.jsonl: no such file; run `kd prepare`"),
    ],
)
@pytest.mark.usefixtures("trained")
def test_what_is_missing_exits_2_and_names_the_mend(
    missing: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (ARTIFACTS / missing).rename("elsewhere")
    assert main(["attention"]) == 2
    assert message in capsys.readouterr().err
    assert not ATTENTION.exists()


@pytest.mark.usefixtures("trained")
def test_an_adapter_that_peft_would_unpickle_is_refused_unread(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    adapter = ARTIFACTS / "adapters" / "base-kd-1"
    weights = (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert main(["attention"]) == 2
    assert f"{adapter}: no adapter_model.safetensors; run `kd train base-kd-1` again" in capsys.readouterr().err
    weights.rename(adapter / "adapter_model.safetensors")
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": "XLORA", "adapters": {"a": "x"}}))
    assert main(["attention"]) == 2
    assert f"{config}: peft_type is 'XLORA', not 'LORA'" in capsys.readouterr().err


@pytest.mark.usefixtures("trained")
def test_a_head_that_is_not_there_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attention", "--heads", "0:3,2:1"]) == 2
    assert "--heads 2:1: no such head; the student has layers 0 to 1 and heads 0 to 3" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["attention", "--heads", "0:3,2"])
    assert "expected layer:head, as in 3:5,7:1, found '0:3,2'" in capsys.readouterr().err


def test_the_bare_student_goes_by_the_row_that_asks_it_the_bare_question(
    tiny_params: dict[str, Any], write_params: Callable[[dict[str, Any]], None]
) -> None:
    write_params(tiny_params)
    assert student_names(load_config(Path("params.yaml"))) == STUDENTS
    del tiny_params["untrained"]["no-distillation-matched"]
    write_params(tiny_params | {"seeds": [1, 2], "controls": [], "prompts": {"base": ""}})
    assert student_names(load_config(Path("params.yaml"))) == ["no-distillation", "base-kd-1", "base-kd-2"]
