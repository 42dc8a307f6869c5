"""Training: the published loop, its artifacts, and the same bytes twice."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kd.cli import main
from kd.dataset import read_examples
from kd.prompts import primed

ADAPTER = Path("artifacts/mini/adapters/teacher-kd")


@pytest.fixture
def ready(tiny_params: dict[str, Any], write_params: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """A working folder in which everything up to training is done; its params."""
    write_params(tiny_params)
    for command in (["prepare"], ["head"], ["teacher", "teacher"]):
        assert main(command) == 0
    return tiny_params


def losses(adapter: Path) -> list[float]:
    lines = (adapter / "loss/plots/metrics/loss.tsv").read_text().splitlines()
    return [float(line.split("\t")[1]) for line in lines[1:]]


def plain_published_loop(folder: Path, params: dict[str, Any]) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The published notebook's loop, stated plainly from the paper's description: whole logits, no store."""
    settings, rows = params["distill"], read_examples(Path("artifacts/mini/data/train.jsonl"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    teacher = AutoModelForCausalLM.from_pretrained(folder)
    captured = {}
    with torch.no_grad():
        for i, row in enumerate(rows, start=1):
            ids = tokenizer(primed("teacher", row.question), add_special_tokens=False, return_tensors="pt")["input_ids"]
            captured[f"Question {i}"] = teacher(ids).logits
    teacher_logits = [captured[key] for key in sorted(captured)]

    torch.manual_seed(params["seed"])
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    student = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora)
    student.train()
    parameters = [p for p in student.parameters() if p.requires_grad]
    momentum = [torch.zeros_like(p) for p in parameters]
    temperature, alpha, seen = settings["temperature"], settings["alpha"], []
    for step in range(2 * len(rows)):
        row, t = rows[step % len(rows)], teacher_logits[step % len(rows)][0]
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(row.question, add_special_tokens=False)["input_ids"]]])
        labels = torch.tensor([tokenizer.bos_token_id, *tokenizer(row.target, add_special_tokens=False)["input_ids"]])
        s = student(ids[:, :256]).logits[0]
        n = min(len(s), len(labels[:256]), len(t))
        hard = torch.nn.functional.cross_entropy(s[:n], labels[:n])
        log_p, log_q = (s[:n] / temperature).log_softmax(-1), (t[:n] / temperature).log_softmax(-1)
        loss = alpha * hard + (1 - alpha) * temperature**2 * (log_p.exp() * (log_p - log_q)).sum() / n
        seen.append(float(loss))
        rate = settings["learning_rate"] * (1 + math.cos(math.pi * step / len(rows))) / 2
        for p, m, g in zip(parameters, momentum, torch.autograd.grad(loss, parameters), strict=True):
            m.mul_(settings["momentum"]).add_(g + settings["weight_decay"] * p.detach())
            p.data.sub_(rate * m)
    names = [name for name, p in student.named_parameters() if p.requires_grad]
    return dict(zip(names, (p.detach() for p in parameters), strict=True)), seen


def test_published_equals_a_plain_statement_of_the_notebooks_loop(ready: dict[str, Any], tiny_llama: Path) -> None:
    assert main(["train", "teacher-kd"]) == 0
    expected, expected_losses = plain_published_loop(tiny_llama, ready)
    # The store keeps the teacher's states as float16; all else is the same arithmetic.
    assert losses(ADAPTER) == pytest.approx(expected_losses, rel=1e-3)
    trained = load_file(ADAPTER / "adapter_model.safetensors")
    assert len(trained) == len(expected)
    for name, value in expected.items():
        found = trained[name.replace(".default", "")]
        assert (found - value).norm() <= 1e-3 * value.norm(), name


def test_fine_tuning_needs_no_teacher_and_differs(
    tiny_params: dict[str, Any], write_params: Callable[[dict[str, Any]], None]
) -> None:
    write_params(tiny_params)
    assert main(["prepare"]) == 0
    assert main(["train", "fine-tuning"]) == 0
    folder = Path("artifacts/mini/adapters/fine-tuning")
    assert len(losses(folder)) == 24
    assert not (folder / "loss/plots/metrics/divergence.tsv").exists()


@pytest.mark.usefixtures("ready")
def test_same_bytes_twice_and_learning_rate_falls_and_climbs_back() -> None:
    assert main(["train", "teacher-kd"]) == 0
    before = {path: path.read_bytes() for path in ADAPTER.rglob("*") if path.is_file()}
    assert main(["train", "teacher-kd"]) == 0
    assert {path: path.read_bytes() for path in ADAPTER.rglob("*") if path.is_file()} == before
    rates = [
        float(line.split("\t")[1]) for line in (ADAPTER / "loss/plots/metrics/learning_rate.tsv").open() if "0" in line
    ]
    assert rates[0] == max(rates)
    assert min(rates) == pytest.approx(0, abs=1e-9)
    assert rates.index(min(rates)) == 12
    assert rates[-1] > 0.9 * rates[0]


def test_adapter_loads_with_peft_and_says_what_it_is(ready: dict[str, Any], tiny_llama: Path) -> None:
    assert main(["train", "teacher-kd"]) == 0
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    ids = torch.tensor([[0, 5, 6, 7]])
    with torch.inference_mode():
        before = base(ids).logits
        after = PeftModel.from_pretrained(base, ADAPTER)(ids).logits
    assert not torch.allclose(before, after)
    config = json.loads((ADAPTER / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0.1)
    assert config["target_modules"] == sorted(ready["distill"]["lora"]["target_modules"])
    card = (ADAPTER / "README.md").read_text()
    assert "teacher store `teacher/teacher`" in card
    assert "12 rows" in card


def test_diverging_run_stops_with_the_example_and_leaves_no_adapter(
    ready: dict[str, Any], write_params: Callable[[dict[str, Any]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    ready["distill"]["learning_rate"] = 1e30
    write_params(ready)
    assert main(["train", "teacher-kd"]) == 2
    assert "lower `distill.learning_rate`" in capsys.readouterr().err
    assert not ADAPTER.exists()


def test_unknown_experiment_exits_2(
    tiny_params: dict[str, Any], write_params: Callable[[dict[str, Any]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    write_params(tiny_params)
    assert main(["train", "no-distillation"]) == 2
    assert "no-distillation: unknown experiment, expected one of fine-tuning, base-kd" in capsys.readouterr().err
