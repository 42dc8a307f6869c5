"""Params as tests change them."""

from __future__ import annotations

from typing import Any

from kd.config import Config, Experiment


def keep(params: dict[str, Any], *names: str) -> None:
    """Of the students and of the untrained rows leave those called so."""
    params["prompts"] = {prompt: text for prompt, text in params["prompts"].items() if f"{prompt}-kd" in names}
    params["controls"] = [name for name in params["controls"] if name in names]
    params["untrained"] = {name: one for name, one in params["untrained"].items() if name in names}


def run_of(name: str) -> str:
    """The run that a row of the table shows where `seeds` are as the profiles have them."""
    return name if name.startswith("no-distillation") else f"{name}-1"


def experiments(params: dict[str, Any]) -> dict[str, Experiment]:
    """Every assessment, by its run's name."""
    return Config.model_validate(params).experiments


def as_params(config: Config) -> dict[str, Any]:
    """The params file that says this."""
    return config.model_dump(mode="json")
