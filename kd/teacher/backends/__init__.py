"""What runs a teacher: one module for each value of `teacher.backend`, imported only where it is used."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING, Protocol

from kd import config
from kd.fingerprint import model_sha256, versions
from kd.models.load import is_here, model_folder, model_name
from kd.store.head import TeacherHead
from kd.store.records import ModelIdentity

if TYPE_CHECKING:
    import torch

LIBRARIES = {"transformers": ("torch", "transformers"), "exllamav2": ("torch", "exllamav2")}


class LoadedTeacher(Protocol):
    """A teacher's layers in memory."""

    def states(self, batches: Iterable[list[list[int]]]) -> Generator[list[torch.Tensor], None, None]:
        """Forwards over batches of token ids, in order, without the head: per batch, for each row, the final hidden
        states before the norm, [tokens, hidden].

        A row's bits may depend on what it shares a batch with; alone they are the model's own. Several batches may be
        at work at once, so `batches` is read ahead; close what is not read to its end.
        """


def load(teacher: config.Teacher, longest: int) -> LoadedTeacher:
    """Load a teacher that will read at most `longest` tokens a row; a UserError where its backend cannot run here."""
    if teacher.backend == "exllamav2":
        from kd.teacher.backends.exllamav2 import ExLlamaV2Teacher

        return ExLlamaV2Teacher(teacher, longest)
    from kd.teacher.backends.transformers import TransformersTeacher

    return TransformersTeacher(teacher)


def read_head(teacher: config.Teacher) -> TeacherHead:
    """The final norm and the output head, dequantized; a UserError where the backend cannot run here."""
    if teacher.backend == "exllamav2":
        from kd.teacher.backends.exllamav2 import read_head

        return read_head(teacher)
    from kd.teacher.backends.transformers import TransformersTeacher

    return TransformersTeacher(teacher).head()


def identity(teacher: config.Teacher) -> ModelIdentity:
    """Who this teacher is, without loading it; of its libraries those that are installed."""
    return ModelIdentity(
        name=model_name(teacher.model),
        revision=getattr(teacher.model, "revision", None),
        weights=weights(teacher.model),
        dtype=teacher.dtype,
        backend=teacher.backend,
        versions=versions(LIBRARIES[teacher.backend]),
    )


def weights(model: config.Model) -> str | None:
    """The checksum of a model that no revision pins, if it is on this machine."""
    if isinstance(model, config.HubModel) or not is_here(model):
        return None
    return model_sha256(model_folder(model))
