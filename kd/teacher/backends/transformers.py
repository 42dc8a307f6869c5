"""A teacher that transformers runs: any Llama folder, on a CPU or one GPU."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import TYPE_CHECKING, Any

from kd import config
from kd.models.load import default_device, load_model, model_folder, pad_right
from kd.store.head import TeacherHead

if TYPE_CHECKING:
    import torch

GRAPHS = 256  # lengths recorded at a time; docs/performance.md has what one takes


class TransformersTeacher:
    """One teacher, loaded."""

    def __init__(self, teacher: config.Teacher) -> None:
        self._device = default_device()
        self._model = load_model(model_folder(teacher.model), teacher.dtype, self._device)
        self._norm, self._head = self._model.model.norm, self._model.lm_head
        # Rotation that depends on the length asks for it on the host, which a graph cannot.
        fixed = getattr(self._model.model.rotary_emb, "rope_type", "default") != "dynamic"
        self._one_by_one = ByLength(self._run) if self._device == "cuda" and fixed else None

    def states(self, batches: Iterable[list[list[int]]]) -> Generator[list[torch.Tensor], None, None]:
        """Per batch a forward without the head: for each row the final hidden states before the norm."""
        for batch in batches:
            yield self.forward(batch)

    def forward(self, batch: list[list[int]]) -> list[torch.Tensor]:
        """The states of one batch."""
        import torch

        with torch.inference_mode():
            ids = pad_right(batch)
            run = self._run if self._one_by_one is None or len(batch) > 1 else self._one_by_one
            states = run(ids if self._device == "cpu" else ids.pin_memory().to(self._device, non_blocking=True))
        return [rows[: len(token_ids)] for rows, token_ids in zip(states, batch, strict=True)]

    def head(self) -> TeacherHead:
        """The final norm and the output head, in the model's dtype."""
        return TeacherHead(self._norm.weight.detach(), self._head.weight.detach(), self._norm.variance_epsilon)

    def _run(self, ids: torch.Tensor) -> torch.Tensor:
        """The model's own forward over token ids [rows, tokens]: the states before its final norm."""
        seen: list[torch.Tensor] = []

        def keep(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            seen.append(inputs[0])

        hook = self._norm.register_forward_pre_hook(keep)
        try:
            self._model.model(ids, use_cache=False)
        finally:
            hook.remove()
        return seen[0]


class ByLength:
    """`run` over one row of token ids [1, tokens] as CUDA graphs, one for each length, all in one pool of memory.

    Launched kernel by kernel, a small model's forward is bound by the host. A graph holds the very kernels of its
    length, so the bits are the same; a longer one with padding would have other products, which add in another order.
    The first time that a length occurs, it is launched: that costs no more than recording it, which pays when the
    length comes again, and lets libraries set themselves up. The graph longest unused makes room.
    """

    def __init__(self, run: Callable[[torch.Tensor], torch.Tensor]) -> None:
        import torch

        self._run = run
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        self._launched: set[int] = set()
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]] = {}

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """What `run` gives for `ids`, bit for bit."""
        length = ids.shape[1]
        if length not in self._launched:
            self._launched.add(length)
            return self._run(ids)
        found = self._graphs.pop(length) if length in self._graphs else self._record(ids)
        self._graphs[length] = found  # the last is the one used last
        if len(self._graphs) > GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        graph, held, states = found
        held.copy_(ids)
        graph.replay()
        return states.clone()

    def _record(self, ids: torch.Tensor) -> tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]:
        """The graph of one length, the ids that it reads and the states that it writes."""
        import torch

        graph, held = torch.cuda.CUDAGraph(), ids.clone()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            # Not `torch.cuda.graph`, which collects Python's garbage each time, in many times what this takes. The
            # store's threads copy states meanwhile: only this thread must do nothing that cannot be recorded.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                states = self._run(held)
            finally:
                graph.capture_end()
        return graph, held, states
