"""What runs a teacher: one module for each value of `teacher.backend`, imported only where it is used."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Protocol

from kd import config, models
from kd.teacher.store import ModelIdentity, TeacherHead

if TYPE_CHECKING:
    import torch

LIBRARIES = {"transformers": ("torch", "transformers"), "exllamav2": ("torch", "exllamav2")}


class LoadedTeacher(Protocol):
    """A teacher in memory."""

    def states(self, batch: list[list[int]]) -> list[torch.Tensor]:
        """One forward over a batch of token ids, without the head: per row the final hidden states before the norm,
        [tokens, hidden]. A row's bits may depend on what it shares a batch with; alone they are the model's own."""

    def head(self) -> TeacherHead:
        """The final norm and the output head, dequantized."""


def load(teacher: config.Teacher, longest: int) -> LoadedTeacher:
    """Load a teacher that will read at most `longest` tokens a row; a UserError where its backend cannot run here."""
    if teacher.backend == "exllamav2":
        from kd.teacher.backends.exllamav2 import ExLlamaV2Teacher

        return ExLlamaV2Teacher(teacher, longest)
    from kd.teacher.backends.transformers import TransformersTeacher

    return TransformersTeacher(teacher)


def identity(teacher: config.Teacher) -> ModelIdentity:
    """Who this teacher is, without loading it; of its libraries those that are installed."""
    return ModelIdentity(
        name=models.model_name(teacher.model),
        revision=getattr(teacher.model, "revision", None),
        dtype=teacher.dtype,
        backend=teacher.backend,
        versions=_versions(LIBRARIES[teacher.backend]),
    )


def _versions(libraries: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for library in libraries:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found
