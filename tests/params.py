"""Params as tests change them."""

from __future__ import annotations

from typing import Any

from kd.config import Config, Experiment


def keep(params: dict[str, Any], *names: str) -> None:
    """Of the students and of the table's rows leave those called so."""
    params["prompts"] = {prompt: text for prompt, text in params["prompts"].items() if f"{prompt}-kd" in names}
    for key in ("adapters", "experiments"):
        params[key] = {name: one for name, one in params[key].items() if name in names}


def experiments(params: dict[str, Any]) -> dict[str, Experiment]:
    """Every row of the table, those of the prompts' students as well."""
    return Config.model_validate(params).experiments


def as_params(config: Config) -> dict[str, Any]:
    """The params file that says this."""
    params = config.model_dump(mode="json")
    for prompt in config.prompts:
        for key in ("adapters", "experiments"):
            del params[key][f"{prompt}-kd"]
    return params
