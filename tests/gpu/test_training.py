"""Training on a GPU: an update as a CUDA graph, the same bytes twice and behind a kill, students side by side."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapted
import pytest
import torch
from commands import begin, contents, run
from params import as_params
from safetensors.torch import load_file

from kd.cli import main
from kd.config import Config, Distill, load_config
from kd.distill import checkpoint
from kd.distill.cohort import train_cohort
from kd.distill.fused import kernels_name, triton_kernels
from kd.distill.step import BUCKET, Descent, GraphStep, make_batch, make_step
from kd.distill.train import descend
from kd.kernels import lacking
from kd.protocol.alignment import Match
from kd.store.head import TeacherHead

pytestmark = pytest.mark.usefixtures("gpu")

Write = Callable[[dict[str, Any]], None]
ADAPTER = Path("artifacts/mini/adapters/teacher-kd-1")
VOCABULARY = 401
DTYPES = ["bfloat16", "float32"]  # attention has another kernel in each


@pytest.fixture
def settings() -> Distill:
    """Six epochs over twelve examples."""
    mini = load_config(Path(__file__).parents[2] / "profiles" / "mini.yaml").distill
    changes = {"epochs": 6, "checkpoint_every": 30, "learning_rate": 0.02, "cosine_steps": 72}
    return mini.model_copy(update=changes)


@pytest.fixture
def head() -> TeacherHead:
    torch.manual_seed(5)
    return TeacherHead(torch.rand(96), torch.randn(VOCABULARY, 96), 1e-5)


def student(folder: Path, dtype: str, dropout: float) -> Any:
    """The Llama on the GPU, with an adapter on its attention."""
    modules = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return adapted.student(folder, modules, dropout, dtype=dtype, device="cuda", std=0.05)


def examples() -> tuple[list[Match], dict[str, torch.Tensor]]:
    """Twelve, in three padded shapes."""
    torch.manual_seed(4)
    matches, states = [], {}
    for i in range(12):
        length, rows = (20, 14) if i % 3 else (40 + i, 35)
        ids, labels = (torch.randint(VOCABULARY, (n,)).tolist() for n in (length, rows))
        matches.append(Match(f"train-{i}", ids, length - rows, labels, f"train-{i}"))
        states[f"train-{i}"] = torch.randn(rows, 96).half()
    return matches, states


def trained(model: Any, head: TeacherHead, settings: Distill) -> tuple[list[float], torch.Tensor]:
    """The losses of a run over the examples, and the weights at its end."""
    matches, states = examples()
    step = make_step(model, head, settings)
    return [record.loss for record in descend(step, matches, states.__getitem__, settings)], step.descent.weights


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_update_stands_in_a_graph(gpu_llama: Path, settings: Distill, head: TeacherHead, dtype: str) -> None:
    matches, states = examples()
    step = make_step(student(gpu_llama, dtype, 0.1), head, settings)
    assert isinstance(step, GraphStep)
    batch = make_batch(matches[:1], states.__getitem__, step.bucket).map(torch.Tensor.cuda)
    try:
        losses = step(batch, 0.1)
    except RuntimeError as error:
        pytest.fail(f"an operation of the update waits for the host, or has no deterministic kernel: {error}")
    assert losses.isfinite().all()


@pytest.mark.parametrize(("dtype", "near"), [("bfloat16", 0.02), ("float32", 1e-4)])
def test_graphs_do_what_eager_steps_do(
    gpu_llama: Path, settings: Distill, head: TeacherHead, dtype: str, near: float
) -> None:
    runs = [
        trained(student(gpu_llama, dtype, 0.0), head, settings.model_copy(update={"step": step}))
        for step in ("eager", "graph")
    ]
    start = student(gpu_llama, dtype, 0.0)
    first = torch.cat([p.detach().flatten() for p in start.parameters() if p.requires_grad])
    (losses, weights), (graph_losses, graph_weights) = runs
    assert graph_losses == pytest.approx(losses, rel=near)
    assert (graph_weights - weights).norm() <= 2 * near * (weights - first).norm()  # of the way it went


@pytest.fixture
def kernels(gpu: None) -> Any:
    del gpu
    if missing := lacking():
        pytest.skip(f"the kernels need {missing}")
    return triton_kernels()


def test_a_graph_step_takes_the_kernels(gpu_llama: Path, settings: Distill, head: TeacherHead, kernels: Any) -> None:
    step = make_step(student(gpu_llama, "bfloat16", 0.1), head, settings)
    assert step.descent.operations is kernels
    assert kernels_name(settings) == "Triton 3.0.0 kernels"
    assert kernels_name(settings.model_copy(update={"step": "eager"})) == ""
    other = adapted.student(gpu_llama, ["q_proj", "down_proj"], 0.1, dtype="bfloat16", device="cuda")
    assert make_step(other, head, settings).descent.operations is None


@pytest.mark.parametrize(("dtype", "near"), [("bfloat16", 0.03), ("float32", 1e-5)])
def test_gradients_by_kernels_are_the_eager_steps(
    gpu_llama: Path, settings: Distill, head: TeacherHead, kernels: Any, dtype: str, near: float
) -> None:
    matches, states = examples()
    found = []
    for fused in (False, True):
        model = student(gpu_llama, dtype, 0.0)
        descent = Descent(model, settings, lean=fused, operations=kernels if fused else None)
        batch = make_batch(matches[:3], states.__getitem__, BUCKET if fused else 1).map(torch.Tensor.cuda)
        found.append(descent.gradient(batch, head.to("cuda")))
    (losses, gradient), (ours, own) = found
    assert torch.allclose(ours, losses, rtol=near)
    assert (own - gradient).norm() <= near * gradient.norm()


def test_dropout_differs_between_steps_and_not_between_runs(
    gpu_llama: Path, settings: Distill, head: TeacherHead
) -> None:
    """Where the rate is as good as 0, only the masks move the loss."""
    still = settings.model_copy(update={"learning_rate": 1e-30, "epochs": 3})
    matches, states = examples()
    runs = []
    for _ in range(2):
        step = make_step(student(gpu_llama, "bfloat16", 0.3), head, still)
        runs.append([record.loss for record in descend(step, matches[:2], states.__getitem__, still)])
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == len(runs[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_run_gives_the_same_bits_twice_dropout_included(
    gpu_llama: Path, settings: Distill, head: TeacherHead, dtype: str
) -> None:
    (losses, weights), (again, same) = (trained(student(gpu_llama, dtype, 0.1), head, settings) for _ in range(2))
    assert losses == again
    assert torch.equal(weights, same)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_run_from_a_checkpoint_ends_in_the_same_bits(
    gpu_llama: Path, settings: Distill, head: TeacherHead, tmp_path: Path, dtype: str
) -> None:
    matches, states = examples()
    whole: list[checkpoint.Record] = []
    step = make_step(student(gpu_llama, dtype, 0.1), head, settings)
    for record in descend(step, matches, states.__getitem__, settings):
        whole.append(record)
        if record.step == 30:  # in the middle of an epoch: the graphs are recorded in another order
            checkpoint.save(tmp_path, step.descent, whole)
    again = make_step(student(gpu_llama, dtype, 0.1), head, settings)
    curve = checkpoint.load(tmp_path, again.descent)
    curve += descend(again, matches, states.__getitem__, settings, done=30)
    assert curve == whole
    assert torch.equal(again.descent.weights, step.descent.weights)


def test_kd_train_writes_the_same_bytes_twice_and_behind_a_kill(
    gpu_params: dict[str, Any], write_params: Write
) -> None:
    gpu_params["student"]["dtype"] = "bfloat16"
    gpu_params["distill"] |= {"epochs": 60, "cosine_steps": 720, "checkpoint_every": 100, "learning_rate": 0.01}
    write_params(gpu_params)
    for command in (["prepare"], ["head"], ["teacher", "teacher"], ["train", "teacher-kd"]):
        assert main(command) == 0
    whole = contents(ADAPTER)
    shutil.rmtree(ADAPTER)
    process = begin("train", "teacher-kd")
    partial = Path("artifacts/mini/adapters/.partial")
    while not (found := list(partial.glob("*/*/checkpoints/0*"))):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, found
    assert not ADAPTER.exists()
    run("train", "teacher-kd")
    assert contents(ADAPTER) == whole


def test_memory_that_runs_out_is_said_with_the_last_checkpoint(
    gpu_params: dict[str, Any],
    write_params: Write,
    memory_limit: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    gpu_params["distill"] |= {"checkpoint_every": 5, "step": "eager", "batch_rows": 2}
    write_params(gpu_params)
    for command in (["prepare"], ["head"], ["teacher", "teacher"]):
        assert main(command) == 0
    save = checkpoint.save

    def save_and_limit(*arguments: Any) -> None:
        save(*arguments)
        memory_limit(0)

    monkeypatch.setattr(checkpoint, "save", save_and_limit)
    assert main(["train", "teacher-kd"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("kd: train, teacher-kd-1: the GPU's memory ran out (")
    assert "more asked for, " in error
    assert "lower `distill.batch_rows` (2) or `distill.max_tokens` (256)" in error
    assert "the same command goes on from artifacts/mini/adapters/.partial/teacher-kd-1/" in error
    assert error.endswith("/checkpoints/00000005")
    torch.cuda.set_per_process_memory_fraction(1.0)
    monkeypatch.setattr(checkpoint, "save", save)
    assert main(["train", "teacher-kd"]) == 0


def test_memory_that_runs_out_while_a_graph_is_recorded_is_said_too(
    gpu_params: dict[str, Any], write_params: Write, memory_limit: Callable[[int], None], capsys: Any
) -> None:
    write_params(gpu_params)
    for command in (["prepare"], ["head"], ["teacher", "teacher"]):
        assert main(command) == 0
    for more in (0, 2**20, 8 * 2**20, 24 * 2**20, 40 * 2**20):  # from the loading of the model on
        memory_limit(more)
        if main(["train", "teacher-kd"]) == 0:
            break
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("kd: train, teacher-kd-1: the GPU's memory ran out ("), error
        assert "starts over, as there is no checkpoint yet" in error
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert more > 0


def runs(params: dict[str, Any], write_params: Write) -> list[tuple[Config, str]]:
    """Three students of one teacher, two of them with settings of their own."""
    params["distill"] |= {"protocol": "aligned", "epochs": 2, "cosine_steps": 24, "checkpoint_every": 8}
    write_params(params)
    for command in (["prepare"], ["head"], ["teacher", "teacher"]):
        assert main(command) == 0
    found = []
    for name, own in (("plain", {}), ("hot", {"temperature": 2.0}), ("slow", {"learning_rate": 0.001})):
        write_params(params | {"profile": name, "distill": params["distill"] | own})
        Path("artifacts", name).mkdir()
        for shared in ("data", "teacher"):
            Path("artifacts", name, shared).symlink_to(Path("..", "mini", shared))
        found.append((load_config(Path("params.yaml")), "teacher-kd-1"))
    return found


def weights(config: Config) -> torch.Tensor:
    tensors = load_file(config.artifacts / "adapters" / "teacher-kd-1" / "adapter_model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def test_a_cohorts_students_are_those_trained_alone(gpu_params: dict[str, Any], write_params: Write) -> None:
    gpu_params["distill"]["dropout"] = 0.0  # which is drawn for all together
    students = runs(gpu_params, write_params)
    train_cohort(students, Path("artifacts/cohort"))
    together = [weights(config) for config, _ in students]
    for (config, name), ours in zip(students, together, strict=True):
        write_params(as_params(config))
        assert main(["train", name]) == 0
        alone = weights(config)
        assert (ours - alone).norm() <= 1e-4 * alone.norm()


def test_a_cohort_gives_the_same_bits_twice_and_from_a_checkpoint(
    gpu_params: dict[str, Any], write_params: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    students = runs(gpu_params, write_params)
    state = Path("artifacts/cohort")
    save = checkpoint.save
    found = []
    for stop in (False, False, True):
        if stop:

            def save_and_stop(*arguments: Any) -> None:
                save(*arguments)
                raise KeyboardInterrupt

            monkeypatch.setattr(checkpoint, "save", save_and_stop)
            with pytest.raises(KeyboardInterrupt):
                train_cohort(students, state)
            monkeypatch.setattr(checkpoint, "save", save)
        train_cohort(students, state)
        found.append([weights(config) for config, _ in students])
        shutil.rmtree(state)
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, found[0], strict=True))


@pytest.mark.parametrize("together", [1, 3])
def test_a_search_finds_the_same_values_twice(gpu_params: dict[str, Any], write_params: Write, together: int) -> None:
    gpu_params["search"] |= {"trials": 3, "eval_rows": 4, "together": together}
    write_params(gpu_params)
    for command in (["prepare"], ["head"], ["teacher", "teacher"]):
        assert main(command) == 0
    folder = Path("artifacts/mini/search/teacher-kd")
    found = []
    for _ in range(2):
        assert main(["search", "teacher-kd"]) == 0
        found.append((folder / "result/best.json").read_bytes())
        shutil.rmtree(folder)
    assert found[0] == found[1]
