"""`kd measure`: a student's loss on the test answers and its distance from its teacher, beside a plain statement."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from params import run_of
from peft import PeftModel
from tiny import make_tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from kd.cli import main
from kd.data.rows import read_examples
from kd.paper import PROMPTS
from kd.teacher import backends
from kd.teacher.backends.transformers import TransformersTeacher

MEASURES = Path("artifacts/mini/measures")
ADAPTER = Path("artifacts/mini/adapters/teacher-kd-1")


@pytest.fixture
def prepared(tiny_params: dict[str, Any], write_params: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """A working folder with three test rows, and its params; teacher and student are one model."""
    tiny_params["dataset"]["test_rows"] = 3
    write_params(tiny_params)
    assert main(["prepare"]) == 0
    return tiny_params


@pytest.fixture
def measured(capsys: pytest.CaptureFixture[str]) -> Callable[[str], dict[str, Any]]:
    """`kd measure`, run, and what it prints, which is what it writes."""

    def measure(experiment: str) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["measure", experiment, "--json"]) == 0
        printed: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert printed == json.loads((MEASURES / f"{run_of(experiment)}.json").read_text())
        return printed

    return measure


def plain(student: Any, folder: Path) -> tuple[float, float]:
    """The answer loss and the reverse KL at T = 1 from the prompt `teacher`'s teacher, the bare model of `folder`: one
    row at a time, whole logits, transformers' own cross entropy."""
    teacher, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    losses, divergences = [], []
    for row in read_examples(Path("artifacts/mini/data/test.jsonl")):
        question, behind_prompt, answer = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (row.question, PROMPTS["teacher"] + row.question, "\n" + row.target)
        )
        answer.append(tokenizer.eos_token_id)
        ids, primed_ids = ([[tokenizer.bos_token_id, *before, *answer]] for before in (question, behind_prompt))
        labels = [[-100] * (1 + len(question)) + answer]
        with torch.no_grad():
            said = student(torch.tensor(ids), labels=torch.tensor(labels))
            wanted = teacher(torch.tensor(primed_ids)).logits
        log_p, log_q = (logits[0, -len(answer) - 1 : -1].log_softmax(-1) for logits in (said.logits, wanted))
        losses.append(float(said.loss))
        divergences.append(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()))
    assert len(losses) == 3
    return sum(losses) / 3, sum(divergences) / 3


@pytest.mark.usefixtures("prepared")
def test_a_bare_student_that_is_its_own_teacher_is_as_far_from_it_as_the_prompt_takes_it(
    measured: Callable[[str], dict[str, Any]], tiny_llama: Path
) -> None:
    found = measured("no-distillation")
    assert found["rows"] == 3
    assert list(found["divergence"]) == list(PROMPTS)
    assert found["divergence"].pop("base") == pytest.approx(0, abs=1e-5)
    assert min(found["divergence"].values()) > 0.01
    loss, divergence = plain(AutoModelForCausalLM.from_pretrained(tiny_llama), tiny_llama)
    assert found["answer_loss"] == pytest.approx(loss, rel=1e-5)
    assert found["divergence"]["teacher"] == pytest.approx(divergence, rel=1e-4)


def test_a_trained_student_is_measured_with_its_adapter_against_its_own_prompt_alone(
    prepared: dict[str, Any],
    write_params: Callable[[dict[str, Any]], None],
    measured: Callable[[str], dict[str, Any]],
    tiny_llama: Path,
) -> None:
    prepared["distill"] |= {"protocol": "aligned", "learning_rate": 0.01}
    write_params(prepared)
    for command in (["head"], ["teacher", "teacher"], ["train", "teacher-kd"], ["train", "fine-tuning"]):
        assert main(command) == 0
    bare, taught, tuned = (measured(name) for name in ("no-distillation", "teacher-kd", "fine-tuning"))
    assert list(taught["divergence"]) == ["teacher"]
    assert list(tuned["divergence"]) == list(bare["divergence"])  # it has no teacher of its own
    assert len({one["answer_loss"] for one in (bare, taught, tuned)}) == 3
    student = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), ADAPTER)
    loss, divergence = plain(student, tiny_llama)
    assert taught["answer_loss"] == pytest.approx(loss, rel=1e-5)
    assert taught["divergence"]["teacher"] == pytest.approx(divergence, rel=1e-4)


def test_how_the_student_was_trained_does_not_change_what_is_measured(
    prepared: dict[str, Any], write_params: Callable[[dict[str, Any]], None], measured: Callable[[str], dict[str, Any]]
) -> None:
    before = measured("no-distillation")
    prepared["distill"] |= {"protocol": "aligned", "quirks": ["label-shift", "bos", "prompt-offset"]}
    prepared["distill"] |= {"temperature": 2.0, "alpha": 0.1, "max_tokens": 20}
    write_params(prepared)
    assert measured("no-distillation") == before


@pytest.mark.parametrize("batch_rows", [1, 2])
def test_the_teacher_reads_what_it_was_loaded_for(
    prepared: dict[str, Any],
    write_params: Callable[[dict[str, Any]], None],
    measured: Callable[[str], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    batch_rows: int,
) -> None:
    """exllamav2 reserves its memory as it loads: for `teacher.batch_rows` texts of the longest that is named then."""
    named, read = [], []
    load, forward = backends.load, TransformersTeacher.forward
    monkeypatch.setattr(backends, "load", lambda teacher, longest: (named.append(longest), load(teacher, longest))[1])
    monkeypatch.setattr(
        TransformersTeacher, "forward", lambda self, batch: (read.append(batch), forward(self, batch))[1]
    )
    prepared["teacher"]["batch_rows"] = batch_rows
    write_params(prepared)
    measured("no-distillation")
    assert named == [max(len(text) for batch in read for text in batch)]
    assert [len(batch) for batch in read] == 4 * ([2, 1] if batch_rows == 2 else [1, 1, 1])


def test_what_cannot_be_measured_exits_2(
    prepared: dict[str, Any],
    write_params: Callable[[dict[str, Any]], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["measure", "techer-kd"]) == 2
    assert (
        "techer-kd: unknown student, expected one of no-distillation, no-distillation-matched"
        in capsys.readouterr().err
    )
    assert main(["measure", "teacher-kd"]) == 2
    assert f"{ADAPTER}: no such adapter; run `kd train teacher-kd-1`" in capsys.readouterr().err
    other = make_tiny_llama(tmp_path / "other", vocabulary=420)
    prepared["teacher"]["model"] = {"source": "folder", "path": str(other)}
    write_params(prepared)
    assert main(["measure", "no-distillation"]) == 2
    assert f"{other}, " in capsys.readouterr().err
    make_tiny_llama(tmp_path / "wider", vocabulary=408)
    prepared["teacher"]["model"]["path"] = str(tmp_path / "wider")
    write_params(prepared)
    assert main(["measure", "no-distillation"]) == 2
    assert "the teacher has 408 logits, the student 400; choose a teacher" in capsys.readouterr().err
    assert not MEASURES.exists()
