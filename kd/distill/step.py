"""One update: from a batch of matched rows to new adapter weights, launched kernel by kernel or as a CUDA graph.

An update is deterministic: on one machine the same batch, weights and random state give the same bytes, also behind a
kill. On a CPU that is torch's flag. On a GPU the flag alone will not do: under it torch 2.4.0 does a `scatter_add_`,
which adds in any order, by a sort that waits for the host, and a graph cannot hold what waits. So an update is made of
operations whose result depends on no order in the first place: what would be scattered is compared or looked up. The
flag stays on for attention's gradient, whose kernels have an ordered way, and to refuse what has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812

from kd.config import Distill
from kd.distill.fused import FusedLlama, runs_fused, triton_kernels
from kd.distill.lean import LeanLlama, runs_lean
from kd.distill.objective import Teacher, distillation_loss
from kd.errors import UserError
from kd.protocol.alignment import Match

if TYPE_CHECKING:
    from kd.store.head import Head

# Shapes are padded to multiples of this, so that few graphs serve all lengths; a step's time hardly depends on it,
# since up to about 200 tokens it goes into reading the weights.
BUCKET = 32

States = Callable[[str], torch.Tensor]


class Batch(NamedTuple):
    """The examples of one update, as tensors.

    `input_ids` [examples, tokens] are padded on the right; `rows` [n] point into [examples * tokens] and meet `labels`
    [n], the teacher's `states` [n, teacher hidden] (None without a teacher) and `weights` [n]: every example counts
    alike, and its rows alike, as in batches of one; 0 where a row is padding. `places` [examples * tokens] say where in
    `rows` a token stands, n where it does not.
    """

    input_ids: torch.Tensor
    rows: torch.Tensor
    places: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    states: torch.Tensor | None

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """The batch with every tensor changed."""
        *others, states = self
        return Batch._make((*map(change, others), states if states is None else change(states)))

    def present(self) -> list[torch.Tensor]:
        """The tensors it has."""
        return [tensor for tensor in self if tensor is not None]


def make_batch(matches: list[Match], states: States | None, bucket: int = 1) -> Batch:
    """Pad `matches` to multiples of `bucket`, rows by the example; `states` gives the teacher's rows for an id."""
    width = _round_up(max(len(match.input_ids) for match in matches), bucket)
    count = sum(len(match.labels) for match in matches)
    height = _round_up(count, bucket if bucket == 1 else bucket * len(matches))
    input_ids = torch.zeros(len(matches), width, dtype=torch.int64)
    rows, labels = torch.zeros(height, dtype=torch.int64), torch.zeros(height, dtype=torch.int64)
    places = torch.full((input_ids.numel(),), height)
    weights = torch.zeros(height)
    theirs = []
    at = 0
    for i, match in enumerate(matches):
        input_ids[i, : len(match.input_ids)] = torch.tensor(match.input_ids)
        here = slice(at, at + len(match.labels))
        first = i * width + match.first_row
        rows[here] = torch.arange(first, first + len(match.labels))
        places[rows[here]] = torch.arange(at, here.stop)
        labels[here] = torch.tensor(match.labels)
        weights[here] = 1 / (len(matches) * len(match.labels))
        if states and match.teacher_id:
            theirs.append(states(match.teacher_id)[: len(match.labels)])
        at = here.stop
    if not theirs:
        return Batch(input_ids, rows, places, labels, weights, None)
    padding = theirs[0].new_zeros(height - count, theirs[0].shape[1])
    return Batch(input_ids, rows, places, labels, weights, torch.cat([*theirs, padding]))


@contextmanager
def deterministic() -> Iterator[None]:
    """Within it torch takes kernels that give the same bits each time, and refuses what has none."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # A debugging aid that writes every tensor twice.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class _Matched(torch.autograd.Function):
    """Hidden states [examples * tokens, hidden] -> those of a batch's `rows`. Their gradient is looked up by its
    `places`, where `index_select`'s own is sorted and added up."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places)
        return hidden.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return F.pad(gradient, (0, 0, 0, 1)).index_select(0, places), None, None


class Descent:
    """The student's trained weights and their momenta, end to end, and how one update changes them (SGD with momentum
    and weight decay, as `torch.optim.SGD` does it). The modules' own parameters become views of `weights`.

    `lean` computes by the forward of `kd.distill.lean`, else by the modules' own. With `operations`
    (`kd.distill.kernels` or `kd.distill.plain`), forward, backward and objective are made of them instead, by
    `kd.distill.fused`.
    """

    rates: tuple[int, ...] = ()  # the shape of a learning rate that is a tensor

    def __init__(self, student: Any, settings: Distill, *, lean: bool, operations: ModuleType | None = None) -> None:
        self._parameters = {name: p for name, p in student.named_parameters() if p.requires_grad}
        self.weights = torch.cat([p.detach().flatten() for p in self._parameters.values()])
        self.momenta = torch.zeros_like(self.weights)
        for name, piece in self._pieces(self.weights).items():
            self._parameters[name].data = piece
        self._model = student.get_base_model()
        self._lean = LeanLlama(student) if lean and not operations else None
        self._fused = FusedLlama(student, operations) if operations else None
        self.operations = operations
        self._settings = settings

    def gradient(self, batch: Batch, head: Head | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss, cross entropy and divergence [3] of a batch on the student's device, and the weights' gradient."""
        matched, leaves = self._forward(batch)
        teacher = Teacher(head, batch.states) if head and batch.states is not None else None
        output = self._model.lm_head.weight
        loss = distillation_loss(matched, output, batch.labels, batch.weights, teacher, self._settings, self.operations)
        gradients = torch.autograd.grad(loss.total, leaves)
        return torch.stack(loss).detach(), torch.cat([gradient.flatten() for gradient in gradients])

    @torch.no_grad()
    def apply(self, gradient: torch.Tensor, learning_rate: torch.Tensor | float) -> None:
        """Descend along `gradient`, which is overwritten; a graph reads `learning_rate` from a scalar tensor."""
        gradient.add_(self.weights, alpha=self._settings.weight_decay)
        self.momenta.mul_(self._settings.momentum).add_(gradient)
        self.weights.sub_(self.momenta * learning_rate)

    def is_finite(self) -> bool:
        """Whether every trained weight is a finite number."""
        return bool(self.weights.isfinite().all())

    def _forward(self, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Final hidden states of the batch's rows [n, hidden], and the tensors that make up the weights."""
        if self._fused:
            leaves = [self.weights.detach().requires_grad_()]
            pieces = self._pieces(leaves[0])
            hidden = self._fused(batch.input_ids, torch.cat([pieces[name].flatten() for name in self._fused.order]))
        elif self._lean is None:
            hidden = self._model.model(batch.input_ids, use_cache=False).last_hidden_state
            leaves = list(self._parameters.values())
        else:
            leaves = [self.weights.detach().requires_grad_()]
            hidden = self._lean(batch.input_ids, self._pieces(leaves[0].to(self._model.dtype)))
        matched: torch.Tensor = _Matched.apply(hidden.flatten(0, 1), batch.rows, batch.places)  # type: ignore[no-untyped-call]
        return matched, leaves

    def _pieces(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Tensors end to end in the last dimension, as views by name and in shape."""
        pieces = flat.split([p.numel() for p in self._parameters.values()], dim=-1)
        named = zip(self._parameters.items(), pieces, strict=True)
        return {name: piece.unflatten(-1, p.shape) for (name, p), piece in named}


class EagerStep:
    """The reference: kernel by kernel, batches as they come, on any device."""

    bucket = 1

    def __init__(self, descent: Descent, head: Head | None, device: torch.device) -> None:
        self.descent = descent
        self.device = device
        self._head = head

    def __call__(self, batch: Batch, learning_rate: torch.Tensor | float) -> torch.Tensor:
        """One update; the losses before it."""
        with deterministic():
            losses, gradient = self.descent.gradient(batch, self._head)
            self.descent.apply(gradient, learning_rate)
        return losses


class GraphStep:
    """Forward, backward and update as one CUDA graph for each padded shape, all in one pool of memory."""

    bucket = BUCKET

    def __init__(self, descent: Descent, head: Head | None, device: torch.device) -> None:
        self.descent = descent
        self.device = device
        self._head = head
        self._graphs: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, Batch, torch.Tensor]] = {}
        self._learning_rate = torch.zeros(descent.rates, device=device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, batch: Batch, learning_rate: torch.Tensor | float) -> torch.Tensor:
        """One update; the losses before it, which the next call overwrites."""
        shape = (*batch.input_ids.shape, *batch.rows.shape)
        if shape not in self._graphs:
            with deterministic():
                self._graphs[shape] = self._capture(batch)
        graph, inputs, losses = self._graphs[shape]
        for held, given in zip(inputs.present(), batch.present(), strict=True):
            held.copy_(given)
        if isinstance(learning_rate, float):
            self._learning_rate.fill_(learning_rate)
        else:
            self._learning_rate.copy_(learning_rate)
        graph.replay()
        return losses

    def _capture(self, batch: Batch) -> tuple[torch.cuda.CUDAGraph, Batch, torch.Tensor]:
        """Record an update without doing it: weights, momenta and the random state are as before."""
        inputs = batch.map(torch.clone)
        random_state = torch.cuda.get_rng_state()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.descent.gradient(inputs, self._head)  # libraries allocate their workspaces now, outside the graph
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            losses, gradient = self.descent.gradient(inputs, self._head)
            self.descent.apply(gradient, self._learning_rate)
        torch.cuda.set_rng_state(random_state)
        return graph, inputs, losses


def make_step(student: Any, head: Head | None, settings: Distill) -> EagerStep | GraphStep:
    """The step that `distill.step` asks for; `head` is the teacher's, None to train on labels alone."""
    able = student.device.type == "cuda" and runs_lean(student)
    if settings.step == "graph" and not able:
        raise UserError(
            "distill.step: graph needs a CUDA device and a Llama student without biases; use `auto` or `eager`"
        )
    graph = able and settings.step != "eager"
    kind = GraphStep if graph else EagerStep
    operations = triton_kernels() if graph and runs_fused(student) else None
    descent = Descent(student, settings, lean=graph, operations=operations)
    return kind(descent, head.to(str(student.device)) if head else None, student.device)


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on `device`. On a GPU each is copied on a stream of its own while the one before it is used."""
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream()
    ahead: tuple[Batch, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(stream):
            copied = batch.map(lambda tensor: tensor.pin_memory().to(device, non_blocking=True))
            event = stream.record_event()
        if ahead:
            yield _arrived(*ahead)
        ahead = copied, event
    if ahead:
        yield _arrived(*ahead)


def _arrived(batch: Batch, event: torch.cuda.Event) -> Batch:
    """Let the current stream wait for the copies, and the allocator know that it uses them."""
    stream = torch.cuda.current_stream()
    stream.wait_event(event)
    for tensor in batch.present():
        tensor.record_stream(stream)
    return batch


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
