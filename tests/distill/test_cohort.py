"""Students trained side by side end where each would have ended alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kd.cli import main
from kd.config import Config, load_config
from kd.distill.cohort import train_cohort

Write = Callable[[dict[str, Any]], None]
STATE = Path("artifacts/cohort")


@pytest.fixture
def params(tiny_params: dict[str, Any], write_params: Write) -> dict[str, Any]:
    """Params of the aligned protocol without dropout, everything before training done."""
    tiny_params["distill"] |= {"protocol": "aligned", "epochs": 2, "cosine_steps": 24, "learning_rate": 0.002}
    for adapter in tiny_params["adapters"].values():
        adapter["dropout"] = 0.0
    write_params(tiny_params)
    for command in (["prepare"], ["head"], ["teacher", "base"], ["teacher", "teacher"]):
        assert main(command) == 0
    return tiny_params


def variant(params: dict[str, Any], write_params: Write, name: str, **distill: Any) -> Config:
    """The params as another profile with the same data and teacher, and some settings of its own."""
    write_params(params | {"profile": name, "seed": distill.pop("seed", 1), "distill": params["distill"] | distill})
    folder = Path("artifacts", name)
    folder.mkdir(parents=True, exist_ok=True)
    for shared in ("data", "teacher"):
        if not (folder / shared).exists():
            (folder / shared).symlink_to(Path("..", "mini", shared))
    return load_config(Path("params.yaml"))


def weights(config: Config, experiment: str) -> torch.Tensor:
    tensors = load_file(config.artifacts / "adapters" / experiment / "adapter_model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def test_a_cohorts_students_are_those_trained_alone(params: dict[str, Any], write_params: Write) -> None:
    plain = variant(params, write_params, "plain")
    hot = variant(params, write_params, "hot", seed=2, temperature=2.0, alpha=0.25, learning_rate=0.001)
    odd = variant(params, write_params, "odd", quirks=["teacher-order", "label-shift"], cosine_steps=12)
    runs = [(plain, "fine-tuning"), (plain, "teacher-kd"), (hot, "base-kd"), (odd, "teacher-kd")]
    train_cohort(runs, STATE)
    together = [weights(config, experiment) for config, experiment in runs]
    for config, distill in ((plain, {}), (hot, {"seed": 2, "temperature": 2.0, "alpha": 0.25, "learning_rate": 0.001})):
        variant(params, write_params, config.profile, **distill)
        for of, experiment in runs:
            if of is config:
                assert main(["train", experiment]) == 0
    variant(params, write_params, "odd", quirks=["teacher-order", "label-shift"], cosine_steps=12)
    assert main(["train", "teacher-kd"]) == 0
    for ours, (config, experiment) in zip(together, runs, strict=True):
        alone = weights(config, experiment)
        assert (ours - alone).norm() / alone.norm() < 1e-5
    assert (together[1] - together[3]).norm() / together[1].norm() > 1e-3
