"""A teacher that transformers runs: any Llama folder, on a CPU or one GPU."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd import config, models
from kd.errors import UserError
from kd.teacher.store import ModelIdentity, TeacherHead

if TYPE_CHECKING:
    import torch


class TransformersTeacher:
    """One teacher, loaded."""

    def __init__(self, teacher: config.Teacher) -> None:
        self._folder = models.model_folder(teacher.model)
        self._device = models.default_device()
        self.tokenizer = models.load_tokenizer(self._folder)
        self._model = models.load_model(self._folder, teacher.dtype, self._device)
        self._norm, self._head = final_modules(self._model, self._folder)

    def states(self, token_ids: list[int]) -> torch.Tensor:
        """One forward over [tokens] without the head: the final hidden states before the norm, [tokens, hidden]."""
        import torch

        seen: list[torch.Tensor] = []

        def keep(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            seen.append(inputs[0])

        hook = self._norm.register_forward_pre_hook(keep)
        try:
            with torch.inference_mode():
                self._model.model(torch.tensor([token_ids], device=self._device), use_cache=False)
        finally:
            hook.remove()
        return seen[0][0]

    def head(self) -> TeacherHead:
        """The final norm and the output head, in the model's dtype."""
        return TeacherHead(self._norm.weight.detach(), self._head.weight.detach(), self._norm.variance_epsilon)


def identity(teacher: config.Teacher) -> ModelIdentity:
    """Who this teacher is, without loading it."""
    return ModelIdentity(
        name=models.model_name(teacher.model),
        revision=getattr(teacher.model, "revision", None),
        dtype=teacher.dtype,
        backend="transformers",
        versions={name: version(name) for name in ("torch", "transformers")},
    )


def final_modules(model: Any, folder: Path) -> tuple[Any, Any]:
    """The final RMS norm and the output head of a Llama-shaped model."""
    if type(model).__name__ != "LlamaForCausalLM":
        raise UserError(f"{folder}: a {type(model).__name__}; the transformers backend reads Llama models")
    return model.model.norm, model.lm_head
