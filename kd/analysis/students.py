"""The students of a profile on one copy of the base model: their adapters are swapped, not merged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kd.config import Config
from kd.models.adapters import adapter_folder, with_adapter
from kd.models.load import default_device, load_model, load_tokenizer, model_folder


def student_names(config: Config) -> list[str]:
    """The bare student and every run of a trained one.

    The former is called by one of its rows, the first that asks it the bare question, or else the first: in the
    profiles, where both controls ask it, `no-distillation-matched`.
    """
    rows = {name: one for name, one in config.experiments.items() if one.adapter is None}
    bare = [name for name, one in rows.items() if not one.suffix] or list(rows)
    return [*bare[:1], *config.adapters]


class Students:
    """The base model, loaded once with attention that tells its weights, and the adapters of every student in `names`.

    An adapter stays beside the weights, where the assessment merges it into them: in float32 both compute the same but
    for rounding, in bfloat16 merging loses what the adapter adds below a weight's last bit.
    """

    def __init__(self, config: Config, names: list[str]) -> None:
        found = {name: adapter_folder(config, name) for name in names}  # refused before anything is loaded
        folder, device = model_folder(config.student.model), default_device()
        self.tokenizer = load_tokenizer(folder)
        self._base = load_model(folder, config.student.dtype, device, attention="eager")
        self.layers: int = self._base.config.num_hidden_layers
        self.heads: int = self._base.config.num_attention_heads
        self._adapted = _with_adapters(self._base, {name: path for name, path in found.items() if path})

    @contextmanager
    def student(self, name: str) -> Iterator[Any]:
        """The causal language model that is student `name` within the block."""
        if self._adapted is None:
            yield self._base
        elif name in self._adapted.peft_config:
            self._adapted.set_adapter(name)
            yield self._base
        else:
            with self._adapted.disable_adapter():
                yield self._base


def _with_adapters(base: Any, folders: dict[str, Path]) -> Any | None:
    """PEFT's view of `base`, whose layers it extends in place by one adapter for each student; None for no adapter."""
    adapted = None
    for name, folder in folders.items():
        adapted = with_adapter(base if adapted is None else adapted, folder, name)
    return adapted
