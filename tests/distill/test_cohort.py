"""Students trained side by side end where each would have ended alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kd.cli import main
from kd.config import Config, load_config
from kd.distill import checkpoint, cohort
from kd.distill.cohort import train_cohort
from kd.errors import UserError
from kd.io.files import read_json

Write = Callable[[dict[str, Any]], None]
STATE = Path("artifacts/cohort")


@pytest.fixture
def params(tiny_params: dict[str, Any], write_params: Write) -> dict[str, Any]:
    """Params of the aligned protocol without dropout, everything before training done."""
    tiny_params["distill"] |= {"protocol": "aligned", "epochs": 2, "cosine_steps": 24, "learning_rate": 0.002}
    tiny_params["distill"]["dropout"] = 0.0
    write_params(tiny_params)
    for command in (["prepare"], ["head"], ["teacher", "base"], ["teacher", "teacher"]):
        assert main(command) == 0
    return tiny_params


def variant(params: dict[str, Any], write_params: Write, name: str, **distill: Any) -> Config:
    """The params as another profile with the same data and teacher, and some settings of its own."""
    write_params(params | {"profile": name, "seeds": [distill.pop("seed", 1)], "distill": params["distill"] | distill})
    folder = Path("artifacts", name)
    folder.mkdir(parents=True, exist_ok=True)
    for shared in ("data", "teacher"):
        if not (folder / shared).exists():
            (folder / shared).symlink_to(Path("..", "mini", shared))
    return load_config(Path("params.yaml"))


def weights(config: Config, run: str) -> torch.Tensor:
    tensors = load_file(config.artifacts / "adapters" / run / "adapter_model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def test_a_cohorts_students_are_those_trained_alone(params: dict[str, Any], write_params: Write) -> None:
    plain = variant(params, write_params, "plain")
    hot = variant(params, write_params, "hot", seed=2, temperature=2.0, alpha=0.25, learning_rate=0.001)
    odd = variant(params, write_params, "odd", quirks=["teacher-order", "label-shift"], cosine_steps=12)
    runs = [(plain, "fine-tuning-1"), (plain, "teacher-kd-1"), (hot, "base-kd-2"), (odd, "teacher-kd-1")]
    train_cohort(runs, STATE)
    together = [weights(*run) for run in runs]
    for config, distill in ((plain, {}), (hot, {"seed": 2, "temperature": 2.0, "alpha": 0.25, "learning_rate": 0.001})):
        variant(params, write_params, config.profile, **distill)
        for of, run in runs:
            if of is config:
                assert main(["train", run]) == 0
    variant(params, write_params, "odd", quirks=["teacher-order", "label-shift"], cosine_steps=12)
    assert main(["train", "teacher-kd"]) == 0
    for ours, run in zip(together, runs, strict=True):
        alone = weights(*run)
        assert (ours - alone).norm() / alone.norm() < 1e-5
    assert (together[1] - together[3]).norm() / together[1].norm() > 1e-3


def test_a_killed_cohort_goes_on_and_ends_in_the_same_bytes(
    params: dict[str, Any], write_params: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    params["distill"]["checkpoint_every"] = 8
    runs = [(variant(params, write_params, f"seed-{seed}", seed=seed), f"teacher-kd-{seed}") for seed in (1, 2)]
    train_cohort(runs, STATE)
    whole = [weights(*run) for run in runs]
    shutil.rmtree(STATE)
    real, steps = cohort.descend, []

    def killed(*arguments: Any) -> Iterator[checkpoint.Record]:
        for record in real(*arguments):
            if record.step == 13:
                raise KeyboardInterrupt
            yield record

    monkeypatch.setattr(cohort, "descend", killed)
    with pytest.raises(KeyboardInterrupt):
        train_cohort(runs, STATE)
    assert not STATE.exists()

    def counted(*arguments: Any) -> Iterator[checkpoint.Record]:
        for record in real(*arguments):
            steps.append(record.step)
            yield record

    monkeypatch.setattr(cohort, "descend", counted)
    train_cohort(runs, STATE)
    assert steps[0] == 9
    assert all(torch.equal(weights(*run), bits) for run, bits in zip(runs, whole, strict=True))
    assert not torch.equal(*whole)


def test_runs_that_cannot_share_a_forward_are_refused(params: dict[str, Any], write_params: Write) -> None:
    plain = variant(params, write_params, "plain")
    longer = variant(params, write_params, "longer", epochs=3)
    with pytest.raises(UserError, match="longer/base-kd-1: other settings than the cohort's first run"):
        train_cohort([(plain, "base-kd-1"), (longer, "base-kd-1")], STATE)
    shorter = variant(params, write_params, "shorter", max_tokens=40)
    with pytest.raises(UserError, match="shorter/base-kd-1: other settings"):
        train_cohort([(plain, "base-kd-1"), (shorter, "base-kd-1")], STATE)
    with pytest.raises(UserError, match="a cohort needs a student with a teacher"):
        train_cohort([(plain, "fine-tuning-1")], STATE)


def test_a_student_that_diverges_leaves_the_others_alone(
    params: dict[str, Any], write_params: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = variant(params, write_params, "plain")
    train_cohort([(plain, "base-kd-1"), (plain, "teacher-kd-1")], STATE)
    alone = weights(plain, "base-kd-1")
    shutil.rmtree(STATE)
    wild = variant(params, write_params, "wild", learning_rate=1e30)
    train_cohort([(plain, "base-kd-1"), (wild, "teacher-kd-1")], STATE)
    assert torch.equal(weights(plain, "base-kd-1"), alone)
    assert "wild/adapters/teacher-kd-1: diverged and is left out" in capsys.readouterr().err
    assert not (wild.artifacts / "adapters").exists()
    ended = read_json(STATE / "cohort.json", "a cohort's end")
    assert ended == {"students": ["plain/base-kd-1", "wild/teacher-kd-1"], "diverged": ["wild/teacher-kd-1"]}
