"""Training: the published loop, its artifacts, and the same bytes twice."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable
from contextlib import chdir
from functools import partial
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from commands import contents, unfinished
from conftest import make_tiny_params
from forked import SAID, begin, status
from peft import LoraConfig, PeftModel, get_peft_model
from ruamel.yaml import YAML
from safetensors.torch import load_file
from tiny import make_tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from kd.cli import main
from kd.config import Projection
from kd.data.rows import read_examples
from kd.models.adapters import load_student
from kd.paper import PROMPTS

ADAPTER = Path("artifacts/mini/adapters/teacher-kd-1")


@pytest.fixture(scope="module")
def taught(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifacts of everything up to training."""
    with chdir(tmp_path_factory.mktemp("taught")):
        YAML().dump(make_tiny_params(tiny_llama), Path("params.yaml"))
        for command in (["prepare"], ["head"], ["teacher", "teacher"]):
            assert main(command) == 0
        return Path("artifacts").absolute()


@pytest.fixture
def ready(taught: Path, tiny_params: dict[str, Any], write_params: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """A working folder in which everything up to training is done; its params."""
    write_params(tiny_params)
    shutil.copytree(taught, "artifacts")
    return tiny_params


@pytest.fixture(scope="module")
def trained(taught: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter, trained by the params as they are."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copy(taught.parent / "params.yaml", folder)
    shutil.copytree(taught, folder / "artifacts")
    with chdir(folder):
        assert main(["train", "teacher-kd"]) == 0
    return folder / ADAPTER


def losses(adapter: Path) -> list[float]:
    lines = (adapter / "loss/plots/metrics/loss.tsv").read_text().splitlines()
    return [float(line.split("\t")[1]) for line in lines[1:]]


def plain_published_loop(
    folder: Path, params: dict[str, Any], steps: int
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The published notebook's loop, stated plainly from the paper's description: whole logits, no store of ours.

    The teacher's states are rounded to float16, as the store keeps them.
    """
    settings, rows = params["distill"], read_examples(Path("artifacts/mini/data/train.jsonl"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    teacher = AutoModelForCausalLM.from_pretrained(folder)
    teacher.model.norm.register_forward_pre_hook(lambda _, inputs: (inputs[0].half().float(),))
    captured = {}
    with torch.no_grad():
        for i, row in enumerate(rows, start=1):
            text = PROMPTS["teacher"] + row.question
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            captured[f"Question {i}"] = teacher(ids).logits
    teacher_logits = [captured[key] for key in sorted(captured)]

    torch.manual_seed(params["seeds"][0])
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    student = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora)
    student.train()
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(
        trained, lr=settings["learning_rate"], momentum=settings["momentum"], weight_decay=settings["weight_decay"]
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=settings["cosine_steps"])
    temperature, alpha, seen = settings["temperature"], settings["alpha"], []
    for step in range(steps):
        row, t = rows[step % len(rows)], teacher_logits[step % len(rows)][0]
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(row.question, add_special_tokens=False)["input_ids"]]])
        labels = torch.tensor([tokenizer.bos_token_id, *tokenizer(row.target, add_special_tokens=False)["input_ids"]])
        s = student(ids[:, :256]).logits[0]
        n = min(len(s), len(labels[:256]), len(t))
        hard = torch.nn.functional.cross_entropy(s[:n], labels[:n])
        log_p, log_q = (s[:n] / temperature).log_softmax(-1), (t[:n] / temperature).log_softmax(-1)
        loss = alpha * hard + (1 - alpha) * temperature**2 * (log_p.exp() * (log_p - log_q)).sum() / n
        seen.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return {name: p.detach() for name, p in student.named_parameters() if p.requires_grad}, seen


def distance(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The relative difference of all numbers together."""
    a, b = (torch.cat([tensors[name].flatten() for name in wanted]).double() for tensors in (found, wanted))
    return float((a - b).norm() / b.norm())


@pytest.mark.usefixtures("on_cpu")  # to the last bits of float32, as the plain loop is computed there
def test_published_equals_a_plain_statement_of_the_notebooks_loop(
    ready: dict[str, Any], write_params: Callable[[dict[str, Any]], None], tiny_llama: Path
) -> None:
    ready["dataset"]["train_rows"] = 10  # two epochs make 20 steps
    ready["distill"] |= {"cosine_steps": 10, "learning_rate": 1e-3}
    write_params(ready)
    for command in (["prepare"], ["teacher", "teacher"], ["train", "teacher-kd"]):
        assert main(command) == 0
    expected, expected_losses = plain_published_loop(tiny_llama, ready, steps=20)
    assert losses(ADAPTER) == pytest.approx(expected_losses, rel=1e-5)
    trained = load_file(ADAPTER / "adapter_model.safetensors")
    assert len(trained) == len(expected)
    found = {name: trained[name.replace(".default", "")] for name in expected}
    assert distance(found, expected) <= 1e-6
    for name in expected:  # B starts at zero, so it is all sums of gradients, each with float32's own error
        assert distance({name: found[name]}, {name: expected[name]}) <= 3e-6, name


def test_fine_tuning_needs_no_teacher_and_differs(
    tiny_params: dict[str, Any], write_params: Callable[[dict[str, Any]], None]
) -> None:
    write_params(tiny_params)
    assert main(["prepare"]) == 0
    assert main(["train", "fine-tuning"]) == 0
    folder = Path("artifacts/mini/adapters/fine-tuning-1")
    assert len(losses(folder)) == 24
    assert not (folder / "loss/plots/metrics/divergence.tsv").exists()


@pytest.mark.usefixtures("ready")
def test_same_bytes_twice_and_learning_rate_falls_and_climbs_back(trained: Path) -> None:
    assert main(["train", "teacher-kd"]) == 0
    assert contents(ADAPTER) == contents(trained)
    rates = [
        float(line.split("\t")[1]) for line in (ADAPTER / "loss/plots/metrics/learning_rate.tsv").open() if "0" in line
    ]
    assert rates[0] == max(rates)
    assert min(rates) == pytest.approx(0, abs=1e-9)
    assert rates.index(min(rates)) == 12
    assert rates[-1] > 0.9 * rates[0]


def test_the_loss_curve_has_a_line_for_each_step_and_the_last_ones_values_beside(
    trained: Path, tiny_params: dict[str, Any]
) -> None:
    curves = {}
    for name in ("loss", "cross_entropy", "divergence", "learning_rate"):
        header, *lines = (trained / f"loss/plots/metrics/{name}.tsv").read_text().splitlines()
        assert header == f"step\t{name}"
        assert [line.split("\t")[0] for line in lines] == [str(step) for step in range(24)]
        curves[name] = [float(line.split("\t")[1]) for line in lines]
    alpha, temperature = tiny_params["distill"]["alpha"], tiny_params["distill"]["temperature"]
    parts = zip(curves["cross_entropy"], curves["divergence"], strict=True)
    assert curves["loss"] == pytest.approx([alpha * ce + (1 - alpha) * temperature**2 * kl for ce, kl in parts])
    last = {name: values[-1] for name, values in curves.items()}
    assert json.loads((trained / "loss/metrics.json").read_text()) == {"step": 23, **last}


def test_adapter_loads_with_peft_and_says_what_it_is(
    trained: Path, tiny_params: dict[str, Any], tiny_llama: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    ids = torch.tensor([[0, 5, 6, 7]])
    with torch.inference_mode():
        before = base(ids).logits
        after = PeftModel.from_pretrained(base, trained)(ids).logits
    assert not torch.allclose(before, after)
    config = json.loads((trained / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0.1)
    assert config["target_modules"] == sorted(tiny_params["distill"]["lora"]["target_modules"])
    card = (trained / "README.md").read_text()
    for said in (
        f"base_model: {tiny_llama}",
        "teacher store `teacher/teacher`",
        "prompt of its teacher: As a teacher, guide your student",
        "data: 12 rows, miniature, socratic answers; 12 examples",
        "protocol: published, reverse-kl, T 5.94",
        "seed: 1",
        "torch 2.4.0, transformers 4.44.2, peft 0.12.0",
    ):
        assert said in card
    assert "Built with Llama" not in card
    check = json.loads((trained / "check.json").read_text())
    assert check["rows"] == 6
    assert 4 < check["check_loss"] < 40


def test_diverging_run_stops_with_step_example_and_checkpoint_and_leaves_no_adapter(
    ready: dict[str, Any], write_params: Callable[[dict[str, Any]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    ready["distill"] |= {"learning_rate": 1e30, "checkpoint_every": 1}
    write_params(ready)
    assert main(["train", "teacher-kd"]) == 2
    error = capsys.readouterr().err
    assert "kd: step 2 (train-00002): the loss became nan" in error
    assert re.search(
        r"the last good checkpoint is artifacts/mini/adapters/\.partial/teacher-kd-1/[0-9a-f]{16}/checkpoints/00000001",
        error,
    )
    assert "lower `distill.learning_rate`" in error
    assert not ADAPTER.exists()


def test_a_git_repository_without_a_commit_is_asked_for_one(
    tiny_params: dict[str, Any], write_params: Callable[[dict[str, Any]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    write_params(tiny_params)
    subprocess.run(["git", "init", "--quiet", "."], check=True)
    assert main(["prepare"]) == 0
    capsys.readouterr()
    assert main(["train", "fine-tuning"]) == 2
    said = capsys.readouterr().err
    assert "dvclive wants a commit in the Git repository around this folder (Empty git repo)" in said
    assert "`git add --all && git commit`" in said
    assert "Traceback" not in said


def test_unknown_experiment_exits_2(
    tiny_params: dict[str, Any], write_params: Callable[[dict[str, Any]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    write_params(tiny_params)
    assert main(["train", "no-distillation"]) == 2
    assert "no-distillation: unknown student, expected one of fine-tuning, base-kd" in capsys.readouterr().err


def at(place: str, call: int, happens: Callable[[], object]) -> None:
    """Let something happen at the beginning of the so-manieth call of a module's function."""
    module, _, name = place.rpartition(".")
    owner, calls = import_module(module), count(1)
    original = getattr(owner, name)

    def counted(*arguments: Any, **named: Any) -> Any:
        if next(calls) == call:
            happens()
        return original(*arguments, **named)

    setattr(owner, name, counted)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def fill_the_disk() -> None:
    """A limit to the size of files ends a write as a full disk does."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


UPDATE, SAVES = "kd.distill.train.Record", "kd.distill.train.save_adapter"
KEEPS, WRITES = "kd.distill.checkpoint.write_json", "kd.distill.checkpoint.write_tensors"
# Runs one behind the other: what happens to each, its exit status, and what it says. They are killed between two
# checkpoints, while the next is made, and when all updates are done.
WORK = r"artifacts/mini/adapters/\.partial/teacher-kd-1/[0-9a-f]{16}"
FULL = rf"kd: {WORK}\S*: File too large; make room on that disk; the same command goes on from {WORK}/checkpoints/0"
KILLED = [
    (partial(at, UPDATE, 8, die), -signal.SIGKILL, ".*"),
    (partial(at, KEEPS, 1, die), -signal.SIGKILL, ".*"),
    (partial(at, SAVES, 1, die), -signal.SIGKILL, ".*"),
]
STOPPED = [
    (
        partial(at, UPDATE, 8, terminate),
        143,
        rf"kd: terminated; the same command goes on from {WORK}/checkpoints/00000005\n",
    ),
    (partial(at, WRITES, 1, fill_the_disk), 1, rf"{FULL}0000005\n"),
    (partial(at, SAVES, 1, fill_the_disk), 1, rf"{FULL}0000024\n"),
]


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("runs", [KILLED, STOPPED], ids=["killed", "stopped"])
def test_ended_anywhere_the_next_run_goes_on_and_ends_in_the_same_bytes(
    ready: dict[str, Any], write_params: Callable[[dict[str, Any]], None], runs: list[tuple[Any, int, str]]
) -> None:
    ready["distill"]["checkpoint_every"] = 5
    write_params(ready)
    assert main(["train", "teacher-kd"]) == 0
    expected = contents(ADAPTER)
    shutil.rmtree(ADAPTER)
    for first, ends, words in runs:
        SAID.unlink(missing_ok=True)
        assert status(begin("train", "teacher-kd", first=first)) == ends
        assert re.search(rf"^{words}\Z", SAID.read_text(), re.MULTILINE), SAID.read_text()
        assert "Traceback" not in SAID.read_text()
        assert not ADAPTER.exists()
    (work,) = Path("artifacts/mini/adapters/.partial/teacher-kd-1").glob("?" * 16)
    assert [path.name for path in (work / "checkpoints").iterdir()] == ["00000024"]
    assert main(["train", "teacher-kd"]) == 0
    assert contents(ADAPTER) == expected
    assert not unfinished()


def test_vocabulary_of_teacher_and_student_must_be_one(
    ready: dict[str, Any],
    write_params: Callable[[dict[str, Any]], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = make_tiny_llama(tmp_path / "wider", vocabulary=408)
    ready["student"]["model"] = {"source": "folder", "path": str(other)}
    write_params(ready)
    assert main(["train", "teacher-kd"]) == 2
    assert "the teacher has 400 logits, the student 408; choose a teacher and a student" in capsys.readouterr().err
    teacher = Path(ready["teacher"]["model"]["path"])
    ready["teacher"]["model"]["path"] = "elsewhere"  # its store alone is here
    write_params(ready)
    assert main(["train", "teacher-kd"]) == 2
    assert f"captured from {teacher}" in capsys.readouterr().err


def test_over_long_examples_are_counted_on_stderr_and_in_the_card(
    ready: dict[str, Any], write_params: Callable[[dict[str, Any]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    ready["distill"]["max_tokens"] = 20
    write_params(ready)
    assert main(["train", "teacher-kd"]) == 0
    said = "12 examples; 12 longer than `max_tokens` and cut to it (train-00001, train-00002"
    assert said in capsys.readouterr().err
    assert said in (ADAPTER / "README.md").read_text()


def test_batches_of_several_examples_make_fewer_steps(
    ready: dict[str, Any], write_params: Callable[[dict[str, Any]], None]
) -> None:
    ready["distill"] |= {"batch_rows": 5, "learning_rate": 0.01}
    write_params(ready)
    assert main(["train", "teacher-kd"]) == 0
    assert len(losses(ADAPTER)) == 6


@pytest.mark.parametrize(
    "target",
    ["k_prj", "lm_head", "embed_tokens", "norm", "input_layernorm", "self_attn", "model", "layers.0.q_proj", ""],
)
def test_only_projections_are_tuned(
    target: str,
    ready: dict[str, Any],
    write_params: Callable[[dict[str, Any]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    ready["distill"]["lora"]["target_modules"] = ["q_proj", target]
    write_params(ready)
    assert main(["train", "fine-tuning"]) == 2
    error = capsys.readouterr().err
    assert "distill.lora.target_modules.1: expected 'q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj'" in error
    assert error.count("\n") == 1
    ready["distill"]["lora"]["target_modules"] = ["q_proj", "q_proj"]
    write_params(ready)
    assert main(["train", "fine-tuning"]) == 2
    assert "target_modules: a projection stands twice" in capsys.readouterr().err


@pytest.mark.parametrize("targets", [[*get_args(Projection)], ["up_proj"], ["down_proj", "v_proj"]])
def test_every_projection_that_is_offered_is_trained_saved_merged_and_assessed(
    targets: list[str], ready: dict[str, Any], write_params: Callable[[dict[str, Any]], None], tiny_llama: Path
) -> None:
    ready["distill"]["lora"]["target_modules"] = targets
    write_params(ready)
    for command in ("train", "assess"):
        assert main([command, "fine-tuning"]) == 0
    folder = Path("artifacts/mini/adapters/fine-tuning-1")
    trained = load_file(folder / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in trained} == set(targets)
    assert all(tensor.any() for tensor in trained.values())  # B starts at zero
    merged = load_student(tiny_llama, "float32", folder, "cpu")
    base = load_file(tiny_llama / "model.safetensors")
    changed = {name.split(".")[-2] for name, p in merged.named_parameters() if not torch.equal(p, base[name])}
    assert changed == set(targets)
