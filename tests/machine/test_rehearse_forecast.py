"""`kd rehearse`: its forecast beside the stages themselves, what it refuses, and that it leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from conftest import REPOSITORY, environment

from kd import config
from kd.cli import main
from kd.distill import train
from kd.errors import WorkFailedError
from kd.machine import measure, part_student, part_teacher, rehearse
from kd.machine.disks import COPIES, MODELS, RESULTS, Owed, shortage
from kd.machine.lengths import batch_tokens, gsm8k_lengths, spread
from kd.machine.probe import Disk
from kd.machine.random_exl2 import bits_of
from kd.machine.shapes import EXL2, LLAMA_1B, LLAMA_405B, llama_config, settings_of
from kd.machine.stand_in import write_stand_in
from kd.machine.students import PYTHON
from kd.models import hub
from kd.models.check import check_folder

STAGES = ["weights", "head", "teacher", "train", "assess", "report"]
pytestmark = pytest.mark.usefixtures("on_cpu")


def test_a_stage_takes_about_what_was_forecast(
    tiny_params: dict[str, Any],
    write_params: Callable[[dict[str, Any]], None],
    capsys: pytest.CaptureFixture[str],
    quick: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "executable", str(quick))
    tiny_params["dataset"] |= {"train_rows": 40}
    tiny_params["seeds"] = [1, 2]
    write_params(tiny_params)
    assert main(["rehearse", "--json", "--price", "3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not Path("artifacts").exists()
    assert [stage["stage"] for stage in found["stages"]] == STAGES
    assert [stage["processes"] for stage in found["stages"]] == [1, 1, 4, 10, 12, 5]
    assert found["fits"]
    assert found["disk"]["fits"]
    assert found["seconds"] == pytest.approx(sum(stage["seconds"] for stage in found["stages"]))
    assert found["price"] == round(found["seconds"] / 1200, 2)
    assert "say nothing of results" in found["random_weights"]
    training = next(stage for stage in found["stages"] if stage["stage"] == "train")
    assert training["memory_gib"] > 0.1
    assert training["gpu_gib"] == []
    for command in (["prepare"], ["head"], ["teacher", "base"]):
        assert main(command) == 0
    start = time.perf_counter()
    run("train", "base-kd-2")
    assert 1 / 3 < (time.perf_counter() - start) / training["each"]["base-kd-2"] < 3  # other tests run beside it


def test_what_the_first_check_takes_is_not_reckoned_for_every_row(
    tiny_params: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_params["distill"] |= {"protocol": "published", "quirks": []}
    rehearsal = rehearse.Rehearsal(
        config.Config.model_validate(tiny_params), tmp_path, rehearse.Machine([], memory_gib=4.0)
    )
    monkeypatch.chdir(tmp_path)
    slow, evaluate = iter([2.0]), train.evaluate

    def slow_at_first(*given: Any) -> Any:
        time.sleep(next(slow, 0.0))
        return evaluate(*given)

    monkeypatch.setattr(train, "evaluate", slow_at_first)
    found = part_student.train(config.Config.model_validate(rehearsal.task), {"kinds": {"": "fine-tuning-1"}})
    assert found["test_row_s"] * rehearse.ROWS_CPU < 2


def test_what_the_first_student_takes_beyond_the_others_is_of_no_stage(
    tiny_params: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rehearsal = rehearse.Rehearsal(
        config.Config.model_validate(tiny_params), tmp_path, rehearse.Machine([], memory_gib=4.0)
    )
    monkeypatch.chdir(tmp_path)
    seconds = iter([3.0, 1.0])  # the second student finds the kernels compiled, as a stage does
    monkeypatch.setattr(part_student, "_updates", lambda *_: {"once_s": next(seconds)})
    kinds = {"one": "fine-tuning-1", "another": "fine-tuning-1"}
    found = part_student.train(config.Config.model_validate(rehearsal.task), {"kinds": kinds})
    assert found["once_s"] == 1
    assert list(found["kinds"]) == list(kinds)


def test_libraries_are_read_before_anything_is_measured(
    tiny_params: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
import sys
from kd.machine import parts
for gpus in (1, 0):  # one that is needed and not here, so that nothing will be measured; none
    parts.look({"gpus": gpus})
    print(all(library in sys.modules for library in parts.LIBRARIES))
"""
    hidden = environment() | {"CUDA_VISIBLE_DEVICES": ""}
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=hidden)
    assert said.stdout.split() == ["False", "True"]
    found = {"gpus": [], "whole_s": 9.0, "measured_s": 7.0}
    monkeypatch.setattr(rehearse.Parts, "do", lambda *_: [found])
    machine = rehearse.look_around(config.Config.model_validate(tiny_params), tmp_path)
    assert machine.start_s == 2


def test_students_side_by_side_have_a_gpu_and_a_share_of_the_cores_each(
    tiny_params: dict[str, Any], tmp_path: Path, quick: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `kd students` starts them: two processes that want all cores wait for each other."""
    begun: dict[str, dict[str, str]] = {}
    start = subprocess.Popen

    def noted(command: list[str], **named: Any) -> Any:
        begun[Path(command[-1]).stem] = named.get("env", {})
        return start(command, **named)

    monkeypatch.setattr(sys, "executable", str(quick))
    monkeypatch.setattr(rehearse.subprocess, "Popen", noted)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")  # which are not here: all is done on the CPU
    gpus = [{"name": "a GPU", "gib": 80.0}] * 2
    rehearse.Rehearsal(config.Config.model_validate(tiny_params), tmp_path, rehearse.Machine(gpus, 4.0)).stages()
    share = str(max(1, len(os.sched_getaffinity(0)) // 2))
    for part, gpu in (("train", "3"), ("assess", "5")):
        assert (begun[part]["CUDA_VISIBLE_DEVICES"], begun[part]["OMP_NUM_THREADS"]) == (gpu, share)
    assert begun["teacher"].get("OMP_NUM_THREADS") == os.environ.get("OMP_NUM_THREADS")  # it has the machine to itself
    assert begun["teacher"]["CUDA_VISIBLE_DEVICES"] == "3,5,7"


class Recorder:
    """A teacher that launches a length's first forward, records the second and then plays it; its own clock, which
    nothing else moves."""

    TAKES = (30.0, 50.0)
    PLAYED = 5.0

    def __init__(self, width: int) -> None:
        self.width = width
        self.seen: dict[int, int] = {}
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def states(self, batches: Iterable[list[list[int]]]) -> Generator[list[torch.Tensor], None, None]:
        for batch in batches:
            length = len(batch[0])
            seen = self.seen.get(length, 0)
            self.seen[length] = seen + 1
            self.now += self.TAKES[seen] if seen < len(self.TAKES) else self.PLAYED
            yield [torch.zeros(len(row), self.width, dtype=torch.float16) for row in batch]


def test_a_teacher_that_records_forwards_is_reckoned_by_how_often_lengths_come(
    tiny_params: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_params["dataset"] |= {"train_rows": 60}
    rehearsal = rehearse.Rehearsal(
        config.Config.model_validate(tiny_params), tmp_path, rehearse.Machine([], memory_gib=4.0)
    )
    monkeypatch.chdir(tmp_path)
    params = config.Config.model_validate(rehearsal.task)
    part_teacher.head(params, {})
    monkeypatch.setattr(part_teacher, "_is_ahead", lambda _: True)
    recorder = Recorder(rehearsal.documents["teacher"]["hidden_size"])
    monkeypatch.setattr("kd.teacher.backends.load", lambda *_: recorder)
    monkeypatch.setattr(part_teacher, "clock", recorder)
    found = part_teacher.teacher(params, {"prompt": "base"})
    assert found["first_s"] == pytest.approx(25)
    assert found["second_s"] == pytest.approx(45)
    assert [seconds for _, seconds in found["forwards"]] == pytest.approx([5] * len(found["forwards"]))
    assert found["keep_s"] == pytest.approx(0)
    assert not list((params.artifacts / "teacher").glob("base.*"))
    found |= {
        "whole_s": found["measured_s"] + found["made_up_s"] + 2,
        "host_gib": 0.0,
        "settle_s": 0.5,
        "keep_s": 1.0,
        "compiled_s": 0.0,
    }
    kept = {"whole_s": 1.0, "made_up_s": 0.0, "host_gib": 0.0}
    monkeypatch.setattr(rehearsal.parts, "do", lambda tasks, _: [{"head": kept, "teacher": found}[tasks[0][0]]])
    teacher = rehearse.Stage("teacher", 4)
    rehearsal._capture(rehearse.Stage("head", 1), teacher)
    seen = Counter(found["lengths"]["base"])
    extra = len(seen) * found["first_s"] + sum(count > 1 for count in seen.values()) * found["second_s"]
    forwards = rehearse.reckoned(found["forwards"], list(found["lengths"]["base"]))
    assert teacher.each["base"] == pytest.approx(2 + forwards + extra + 60 * 1.5)


def test_the_clock_stands_still_while_triton_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = pytest.importorskip("triton.compiler", reason="Triton is not installed")
    driver = pytest.importorskip("triton.backends.nvidia.driver")
    seconds = [100]

    def take(some: int) -> None:
        seconds[0] += some

    monkeypatch.setattr("kd.kernels.lacking", lambda: None)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: seconds[0])
    monkeypatch.setattr(driver, "compile_module_from_src", lambda: take(1))
    monkeypatch.setattr(compiler, "compile", lambda: (take(10), driver.compile_module_from_src()))
    clock = measure.Clock()
    clock.leave_out_compiling()
    compiler.compile()
    driver.compile_module_from_src()
    take(1000)
    assert clock.compiled == 12
    assert clock() == 1100


def test_each_second_of_a_student_is_counted_once(
    tiny_params: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = config.Config.model_validate(tiny_params)
    rehearsal = rehearse.Rehearsal(params, tmp_path, rehearse.Machine([], memory_gib=4.0))
    kind = {"updates": [(10, 0.5)], "all": [10] * 4, "recording_s": 2.0, "recordings": 3}
    process = {"whole_s": 20.0, "made_up_s": 3.0, "compiled_s": 4.0, "measured_s": 5.0, "host_gib": 0.0}  # 8 s are left
    trained = process | {"once_s": 1.0, "test_row_s": 0.25, "checkpoint_s": 0.0, "log_s": 0.0}
    trained["kinds"] = {"": kind, rehearsal.prompt[0]: kind}
    tests = params.dataset.test_rows
    full, last = {"seconds": 3.0, "again_s": 2.0, "row_s": 0.5}, {"seconds": 1.0, "again_s": 1.0, "row_s": 9.0}
    found = {"train": trained, "assess": process | {"ways": [{"slots": tests - 1, "full": full, "last": last}] * 2}}
    monkeypatch.setattr(rehearsal.parts, "do", lambda tasks, _: [found[tasks[0][0]]])
    train, assess = rehearse.Stage("train", 5), rehearse.Stage("assess", 7)
    rehearsal._students(train, assess, {"lengths": {key: [0] for key in params.prompts}, "store_bytes": 0})
    one = 8 + 4 * params.distill.epochs * 0.5 + 1 + 3 * 2 + 0.25 * tests
    assert list(train.each.values()) == pytest.approx([one] * 5)
    assert train.seconds == pytest.approx(5 * one + 4)  # compiled once
    one = 8 + 3 + 1 + 0.5 * tests
    assert list(assess.each.values()) == pytest.approx([one] * len(assess.each))
    assert assess.seconds == pytest.approx(len(assess.each) * one + 4)


def test_what_does_not_fit_exits_1_and_says_what_to_change(
    tiny_params: dict[str, Any],
    write_params: Callable[[dict[str, Any]], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rehearse, "look_around", lambda *_: rehearse.Machine([], memory_gib=1e-6))
    write_params(tiny_params)
    assert main(["rehearse"]) == 1
    said = capsys.readouterr()
    assert "unknown" in said.out
    assert "train: its weights take 0.0 GiB, and memory has 0.0; take a machine with more" in said.err
    assert not Path("artifacts").exists()


def test_the_paper_without_a_gpu_exits_1_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["rehearse", "--params", str(REPOSITORY / "profiles" / "paper.yaml")]) == 1
    assert "kd: no GPU is visible, and paper needs 4 of 78 GiB; rehearse it where they are" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_lies_on_one_disk_has_to_fit_it_together(monkeypatch: pytest.MonkeyPatch) -> None:
    paper = config.load_config(REPOSITORY / "profiles/paper.yaml")
    results = Owed(RESULTS, 30.0, Disk(Path("artifacts"), free=320 * 2**30, held=0, device=1))
    models = Owed(MODELS, 302.9, Disk(Path("hub"), free=320 * 2**30, held=0, device=1))
    said = shortage(paper, [results, models])
    assert said is not None
    assert "30.0 GiB of results and 302.9 GiB of models are to lie on the disk of artifacts, which has 320.0" in said
    assert "make room, or move this whole checkout to a larger disk, or set HF_HUB_CACHE to" in said
    apart = replace(models, disk=replace(models.disk, device=2))
    assert shortage(paper, [results, apart]) is None
    assert "disk of hub" in (shortage(paper, [results, replace(apart, gib=320.1)]) or "")
    monkeypatch.setenv("KD_ENVIRONMENT", "/kd/environment")
    copies = replace(results, name=COPIES)
    said = shortage(paper, [results, copies, models])
    assert said is not None
    assert said.endswith("mount a volume of a larger disk at /kd/artifacts, or mount a larger disk at /models")


def test_students_that_the_hosts_memory_does_not_load_at_once_are_not_side_by_side(
    tiny_params: dict[str, Any], tmp_path: Path
) -> None:
    params, gpus = config.Config.model_validate(tiny_params), [{"name": "GPU", "gib": 80.0}] * 4
    memory = 2.5 * PYTHON / rehearse.GIB
    rehearsal = rehearse.Rehearsal(params, tmp_path, rehearse.Machine(gpus, memory))
    assert rehearsal.places == 2
    assert "side by side on 2 GPUs; 2 more stay idle" in rehearsal._notes()[0]


def test_questions_of_one_forward_are_reckoned_by_the_longest(tiny_params: dict[str, Any], tmp_path: Path) -> None:
    tiny_params["teacher"]["batch_rows"] = tiny_params["dataset"]["train_rows"] = 8
    params = config.Config.model_validate(tiny_params)
    rehearsal = rehearse.Rehearsal(params, tmp_path, rehearse.Machine([], memory_gib=4.0))
    head, teacher = rehearse.Stage("head", 1), rehearse.Stage("teacher", 4)
    data = rehearsal._artifacts("data") / "train.jsonl"
    data.write_text("".join(data.read_text().splitlines(keepends=True)[:8]))
    assert rehearsal._capture(head, teacher)
    assert min(teacher.each.values()) > 0


def test_a_part_that_the_system_kills_lacks_the_hosts_memory(
    tiny_params: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nkill -9 $$\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    params = config.Config.model_validate(tiny_params)
    with pytest.raises(WorkFailedError, match="killed by the system, mostly for lack of the host's memory"):
        rehearse.look_around(params, tmp_path)
    rehearsal = rehearse.Rehearsal(params, tmp_path, rehearse.Machine([], memory_gib=4.0))
    head, teacher = rehearse.Stage("head", 1), rehearse.Stage("teacher", 4)
    assert rehearsal._capture(head, teacher) is None
    assert head.why == rehearse.KILLED


def test_kill_9_ends_its_processes_too(
    tiny_params: dict[str, Any], write_params: Callable[[dict[str, Any]], None]
) -> None:
    write_params(tiny_params)
    process, folder = begun_rehearsal()
    until = time.monotonic() + 60
    while not any("libtorch" in maps for maps in maps_in(folder)):  # it has begun its part
        assert time.monotonic() < until
        time.sleep(0.02)
    process.kill()
    process.wait()
    while str(folder.absolute()) in working_folders():
        assert time.monotonic() < until
        time.sleep(0.1)
    assert not (folder / "head.found").exists()


def test_ctrl_c_ends_its_processes_and_leaves_nothing(
    tiny_params: dict[str, Any], write_params: Callable[[dict[str, Any]], None]
) -> None:
    write_params(tiny_params)
    process, folder = begun_rehearsal()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert not Path("artifacts").exists()
    assert str(folder.absolute()) not in working_folders()


def begun_rehearsal() -> tuple[subprocess.Popen[str], Path]:
    """`kd rehearse` that has begun its head's part, and the folder it works in."""
    command = [sys.executable, "-m", "kd.cli", "rehearse"]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    assert process.stderr
    assert any("rehearse: head" in line for line in process.stderr)
    (folder,) = Path("artifacts").glob(".rehearse-*")
    return process, folder


def working_folders() -> set[str]:
    """Those of all processes."""
    return {link for pid in filter(str.isdecimal, os.listdir("/proc")) if (link := working_folder(pid))}  # noqa: PTH208


def maps_in(folder: Path) -> Iterator[str]:
    """What is mapped into the memory of each process that works in the folder."""
    for pid in filter(str.isdecimal, os.listdir("/proc")):  # noqa: PTH208
        if working_folder(pid) == str(folder.absolute()):
            yield Path("/proc", pid, "maps").read_text()


def working_folder(pid: str) -> str | None:
    try:
        return str(Path("/proc", pid, "cwd").readlink()).removesuffix(" (deleted)")
    except OSError:
        return None


@pytest.mark.parametrize("price", ["much", "-1", "inf"])
def test_a_price_that_is_none_exits_2(price: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(["rehearse", "--price", price])
    assert end.value.code == 2


@pytest.mark.parametrize("profile", ["mini", "mini-published", "single-gpu", "paper"])
def test_every_profiles_models_are_known_and_stand_in_for_themselves(
    profile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "_get", lambda *_, **__: pytest.fail("nothing is to be fetched"))
    params = config.load_config(REPOSITORY / "profiles" / f"{profile}.yaml")
    for role in ("teacher", "student"):
        folder = tmp_path / role
        document = settings_of(getattr(params, role).model)
        size = write_stand_in(folder, document)
        settings, _, quantized = check_folder(folder)
        assert settings.vocab_size == document["vocab_size"]
        assert quantized == (getattr(params, role).backend == "exllamav2" if role == "teacher" else False)
        assert sum(path.stat().st_blocks * 512 for path in folder.glob("*.safetensors")) < size / 10


def test_a_model_of_unknown_shape_without_a_network_is_asked_for_in_one_sentence(
    tiny_params: dict[str, Any],
    write_params: Callable[[dict[str, Any]], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(rehearse, "look_around", lambda *_: rehearse.Machine([], memory_gib=8))
    model = {"source": "hub", "name": "some/model", "revision": "0" * 40}
    tiny_params["student"]["model"] = model
    write_params(tiny_params)
    assert main(["rehearse"]) == 2
    path = hub.snapshot(config.HubModel.model_validate(model)) / "config.json"
    assert f"or put its config.json at {path}" in capsys.readouterr().err
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(llama_config(LLAMA_1B, "bfloat16")))
    assert settings_of(config.HubModel.model_validate(model))["num_hidden_layers"] == 16


def test_bits_are_those_of_the_models_own_settings() -> None:
    assert bits_of(llama_config(LLAMA_405B, "float16", EXL2)) == (6, 8)
    assert bits_of(llama_config(LLAMA_405B, "float16", EXL2 | {"bits": 4.25, "head_bits": 6})) == (5, 6)


def test_a_whole_is_reckoned_by_the_lengths_of_all_rows() -> None:
    points = [(size, 2 + 0.5 * size) for size in (4, 8, 20)]
    assert rehearse.reckoned(points, [10, 30]) == pytest.approx(4 + 20)
    assert rehearse.reckoned([*points, (8, 900.0)], [10, 30]) == pytest.approx(4 + 20)  # something else's doing
    assert rehearse.reckoned([(10, 2.0)], [10, 30]) == pytest.approx(4)
    assert rehearse.reckoned([(10, 3.0), (20, 2.0)], [10, 30]) == pytest.approx(5)


def test_what_runs_side_by_side_takes_as_long_as_the_fullest_place() -> None:
    assert rehearse.side_by_side([2.0] * 5, 4) == 4
    assert rehearse.side_by_side([2.0] * 5, 1) == 10
    assert rehearse.side_by_side([3.0, 1.0, 1.0, 1.0], 2) == 3


def test_a_sample_has_the_lengths_of_all_rows_and_the_longest() -> None:
    lengths = gsm8k_lengths(2638, "main")
    chosen = spread(lengths, 64)
    assert max(map(sum, chosen)) == max(map(sum, lengths))
    # Of GSM8K's 2638 rows, as `kd prepare` has them, in SmolLM2's tokens.
    questions, answers = zip(*lengths, strict=True)
    assert sum(questions) / 2638 == pytest.approx(60.0, rel=0.01)
    assert sum(answers) / 2638 == pytest.approx(122.4, rel=0.015)
    assert len(set(questions)) == pytest.approx(133, rel=0.1)
    means = [sum(map(sum, rows)) / len(rows) for rows in (lengths, chosen)]
    assert means[0] == pytest.approx(means[1], rel=0.03)
    assert batch_tokens([5, 9, 7, 2, 3], shard=3, rows=2) == [18, 5, 6]
