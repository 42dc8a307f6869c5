"""A teacher that transformers runs: any Llama folder, on a CPU or one GPU."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING, Any

from kd import config
from kd.models.load import default_device, load_model, model_folder, pad_right
from kd.store.head import TeacherHead

if TYPE_CHECKING:
    import torch


class TransformersTeacher:
    """One teacher, loaded."""

    def __init__(self, teacher: config.Teacher) -> None:
        self._device = default_device()
        self._model = load_model(model_folder(teacher.model), teacher.dtype, self._device)
        self._norm, self._head = self._model.model.norm, self._model.lm_head

    def states(self, batches: Iterable[list[list[int]]]) -> Generator[list[torch.Tensor], None, None]:
        """Per batch a forward without the head: for each row the final hidden states before the norm."""
        for batch in batches:
            yield self.forward(batch)

    def forward(self, batch: list[list[int]]) -> list[torch.Tensor]:
        """The states of one batch."""
        import torch

        seen: list[torch.Tensor] = []

        def keep(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            seen.append(inputs[0])

        hook = self._norm.register_forward_pre_hook(keep)
        try:
            with torch.inference_mode():
                self._model.model(pad_right(batch).to(self._device), use_cache=False)
        finally:
            hook.remove()
        return [states[: len(token_ids)] for states, token_ids in zip(seen[0], batch, strict=True)]

    def head(self) -> TeacherHead:
        """The final norm and the output head, in the model's dtype."""
        return TeacherHead(self._norm.weight.detach(), self._head.weight.detach(), self._norm.variance_epsilon)
