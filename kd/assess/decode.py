"""Greedy decoding of many prompts at once by a Llama: one step for all rows, and waiting rows take the place of ended.

On a GPU with Triton the step is that of `kd/assess/ahead.py`; the one here is for every other machine, and what that
one is measured by.

transformers gives the weights, their modules and the prefill. Its `generate` is not used here, because a batch there
has one position for all rows, so none can leave or join; its static cache is written at that one position; and its
attention copies keys and values once per query head of a group. So the decode step below is our own: the same modules
in the same order over a static cache in which each row stands at its own position. Shapes and addresses never change,
so on a GPU the step is a CUDA graph.

On a CPU a row's tokens do not depend on what shares its batch: there a prompt is read alone, a step works on a multiple
of eight rows (MKL's matrix products then gave each row the same bits, whatever their number; with seven they did not)
and attends to the whole cache. On a GPU they may differ where two tokens are nearly equally likely.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from functools import partial
from math import ceil
from types import ModuleType
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812 (the field's own name)

from kd.assess.ahead import PREFILL_TOKENS, AheadDecoder, decode_ahead
from kd.assess.row import NAN_TOKEN, Row, halved, join, lower
from kd.errors import UserError

STRIDE = 128  # positions by which the attended part of the cache grows on a GPU; one CUDA graph each
ALIGNMENT = 16  # positions; attention kernels read their mask in aligned pieces
CPU_ROWS = 8  # rows of a step on a CPU come in multiples of this; the cache has room for them
CACHE_SHARE = 0.8  # of the GPU memory that the weights left free; the rest is for activations and graphs


def decode(
    model: Any,
    rows: Iterable[Row],
    batch_tokens: int,
    length: int,
    ended: Callable[[Row], bool],
    ends: frozenset[int] = frozenset(),
    operations: ModuleType | None = None,
) -> Iterator[list[Row]]:
    """Continue every row until it has `ended` or failed; after each step or round of steps, yield those that did.

    `ends` are tokens with which any row has ended, so that the device need not ask. `operations` are the kernels that
    are there for the model (`ahead.kernels_for`); without them its modules do the work.

    `batch_tokens` bounds the cache: slots times `length`, the most positions a row can need. On a GPU the slots are
    also bounded by what is free, and halved when memory runs out; the rows in them start anew.
    """
    if type(model).__name__ != "LlamaForCausalLM":
        raise UserError(f"{type(model).__name__}: batched decoding knows Llama alone; use `kd assess … --exact`")
    waiting = deque(sorted(rows, key=_longest_first))
    length = ceil(length / ALIGNMENT) * ALIGNMENT
    slots = slot_count(model, len(waiting), batch_tokens, length)
    active: dict[int, Row] = {}
    while waiting:
        if operations is None:
            steps = partial(_by_modules, model, slots, length)
        else:
            steps = partial(_by_kernels, model, slots, length, ends, operations)
        if (yield from _until_out_of_memory(steps, waiting, active, ended)):
            continue
        # Here, not where the error was caught: its traceback kept the cache alive.
        torch.cuda.empty_cache()
        waiting = deque(sorted([*waiting, *active.values()], key=_longest_first))
        active.clear()
        for row in waiting:
            row.new.clear()
        if slots == 1:
            row = waiting.popleft()
            row.failure = "out of GPU memory, alone on it"
            yield [row]
        slots = max(1, slots // 2)


def slot_count(model: Any, rows: int, batch_tokens: int, length: int) -> int:
    """How many of so many rows of `length` positions are continued at a time."""
    length = ceil(length / ALIGNMENT) * ALIGNMENT
    slots = max(1, batch_tokens // length)
    if model.device.type == "cuda":
        slots = max(1, min(slots, rows, _room(model, length)))
    return slots


Steps = Callable[[deque[Row], dict[int, Row], Callable[[Row], bool]], Iterator[list[Row]]]


def _until_out_of_memory(
    steps: Steps, waiting: deque[Row], active: dict[int, Row], ended: Callable[[Row], bool]
) -> Generator[list[Row], None, bool]:
    """Decode all of `waiting`; returns whether memory was enough, with what is unfinished in `waiting` and `active`."""
    try:
        yield from steps(waiting, active, ended)
    except torch.cuda.OutOfMemoryError:
        return False
    return True


def _by_modules(model: Any, slots: int, length: int, *rows: Any) -> Iterator[list[Row]]:
    return _decode(SlotDecoder(model, slots, length), *rows)


def _by_kernels(
    model: Any, slots: int, length: int, ends: frozenset[int], operations: ModuleType, *rows: Any
) -> Iterator[list[Row]]:
    return decode_ahead(AheadDecoder(model, slots, length, ends, operations), *rows)


@torch.inference_mode()
def _decode(
    decoder: SlotDecoder, waiting: deque[Row], active: dict[int, Row], ended: Callable[[Row], bool]
) -> Iterator[list[Row]]:
    while waiting or active:
        if joined := join(waiting, active, decoder.slots):
            chosen = decoder.prefill({slot: row.prompt for slot, row in joined.items()})
        else:
            if not waiting:
                decoder.move_down(active)
            chosen = decoder.step({slot: (row.new[-1], row.position) for slot, row in active.items()})
        for slot, token in chosen.items():
            active[slot].add(token)
        left = {slot: active.pop(slot) for slot in chosen if active[slot].failure or ended(active[slot])}
        for slot, row in left.items():
            if row.failure:
                decoder.clear(slot)
        yield list(left.values())


class SlotDecoder:
    """A Llama with a static cache of `slots` rows by `length` positions.

    The caller says which token of which slot stands where; nothing but keys and values is kept between steps.
    """

    def __init__(self, model: Any, slots: int, length: int) -> None:
        config = model.config
        self.on_gpu = model.device.type == "cuda"
        self.model, self.slots, self.length = model, slots, length
        held = slots if self.on_gpu else ceil(slots / CPU_ROWS) * CPU_ROWS
        self.kv_heads = config.num_key_value_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, held, self.kv_heads, length, self.head_dim)
        self.keys = torch.zeros(shape, dtype=model.dtype, device=model.device)  # masked positions must be finite
        self.values = torch.zeros_like(self.keys)
        self.numbers = torch.arange(held, device=model.device)
        self.positions = torch.arange(length, device=model.device)
        cosines, sines = model.model.rotary_emb(self.keys, self.positions[None])  # [1, length, head_dim]
        self.cosines, self.sines = cosines[0], sines[0]
        self.inputs = torch.zeros(2, held, dtype=torch.long, device=model.device)  # tokens, positions
        self.graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}

    def prefill(self, prompts: Mapping[int, list[int]]) -> dict[int, int]:
        """Read whole prompts, given by slot and longest first; returns each one's first new token."""
        chosen: dict[int, int] = {}
        slots = list(prompts)
        while slots:
            rows = max(1, PREFILL_TOKENS // len(prompts[slots[0]])) if self.on_gpu else 1
            group, slots = slots[:rows], slots[rows:]
            chosen.update(zip(group, self._read(group, [prompts[slot] for slot in group]).tolist(), strict=True))
        return chosen

    def step(self, newest: Mapping[int, tuple[int, int]]) -> dict[int, int]:
        """Read the newest token, at its position, of each slot given; returns each one's next token."""
        rows = self._rows(max(newest) + 1)
        furthest = max(position for _, position in newest.values())
        length = min(self.length, (furthest // STRIDE + 1) * STRIDE)
        idle = (0, 0)
        self.inputs[:, :rows] = torch.tensor([newest.get(slot, idle) for slot in range(rows)]).T
        chosen = self._replay(rows, length) if self.on_gpu else self._step(rows, self.length)
        tokens = chosen.tolist()
        return {slot: tokens[slot] for slot in newest}

    def move_down(self, active: dict[int, Row]) -> None:
        """Move the rows of the highest slots into free lower ones, where steps on fewer rows come of it."""
        rows = self._rows(len(active))
        if rows == self._rows(max(active) + 1):
            return
        moves = lower(active, rows)
        old, new = list(moves), list(moves.values())
        for cache in (*self.keys, *self.values):  # layer by layer, since indexing makes a copy
            cache[new] = cache[old]

    def clear(self, slot: int) -> None:
        """Forget a slot's keys and values: NaN would reach its next row even from masked positions."""
        self.keys[:, slot] = 0
        self.values[:, slot] = 0

    def _rows(self, needed: int) -> int:
        """How many rows a step works on: on a GPU all slots, halved as often as leaves the `needed` ones."""
        if not self.on_gpu:
            return ceil(needed / CPU_ROWS) * CPU_ROWS
        return halved(self.slots, needed)

    def _read(self, slots: list[int], prompts: list[list[int]]) -> torch.Tensor:
        """The model's own forward over whole prompts; what is padded behind them lies where no row looks."""
        from transformers import DynamicCache

        longest = max(map(len, prompts))
        ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=self.keys.device)
        read = self.model.model(ids, past_key_values=DynamicCache(), use_cache=True)
        for layer in range(len(self.keys)):
            self.keys[layer, slots, :, :longest] = read.past_key_values.key_cache[layer]
            self.values[layer, slots, :, :longest] = read.past_key_values.value_cache[layer]
        last = [len(prompt) - 1 for prompt in prompts]
        return self._choose(read.last_hidden_state[list(range(len(prompts))), last])

    def _replay(self, rows: int, length: int) -> torch.Tensor:
        """`_step` as a CUDA graph, captured when first asked for."""
        if (rows, length) not in self.graphs:
            self._step(rows, length)  # libraries set themselves up on first use, which must not be captured
            graph = torch.cuda.CUDAGraph()
            pool = next((known.pool() for known, _ in self.graphs.values()), None)
            with torch.cuda.graph(graph, pool=pool):
                chosen = self._step(rows, length)
            self.graphs[rows, length] = graph, chosen
        graph, chosen = self.graphs[rows, length]
        graph.replay()
        return chosen

    def _step(self, rows: int, length: int) -> torch.Tensor:
        """One token for the first `rows` slots, none of which stands at `length` or beyond; next tokens [rows]."""
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        llama = self.model.model
        tokens, positions = self.inputs[:, :rows]
        cosines, sines = self.cosines[positions], self.sines[positions]
        unseen = self.positions[:length] > positions[:, None]
        mask = torch.zeros_like(unseen, dtype=self.keys.dtype).masked_fill(unseen, -torch.inf)[:, None, None]
        hidden = llama.embed_tokens(tokens)  # [rows, hidden]
        for layer, keys, values in zip(llama.layers, self.keys, self.values, strict=True):
            attention, normed = layer.self_attn, layer.input_layernorm(hidden)
            query, key, value = (
                project(normed).view(rows, -1, self.head_dim)
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            query, key = apply_rotary_pos_emb(query, key, cosines, sines)
            keys[self.numbers[:rows], :, positions] = key
            values[self.numbers[:rows], :, positions] = value
            # The queries that share a key head stand one behind the other, as if they were positions.
            query = query.view(rows, self.kv_heads, -1, self.head_dim)
            read = _attend(query, keys[:rows, :, :length], values[:rows, :, :length], mask)
            hidden = hidden + attention.o_proj(read.reshape(rows, -1))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self._choose(llama.norm(hidden))

    def _choose(self, hidden: torch.Tensor) -> torch.Tensor:
        """The most likely token of each row of final states [rows, hidden], or NAN_TOKEN."""
        best = self.model.lm_head(hidden).max(-1)
        tokens: torch.Tensor = best.indices.masked_fill(best.values.isnan(), NAN_TOKEN)
        return tokens


def _attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Attention of `query` [rows, kv heads, group, head dim] over keys and values [rows, kv heads, length, head dim].

    The group is filled up to a multiple of 4: otherwise the scratch memory of a CPU's second thread is aligned unlike
    the first's, and the last bits depend on the slot.
    """
    group = query.shape[2]
    padded = F.pad(query, (0, 0, 0, -group % 4))
    return F.scaled_dot_product_attention(padded, keys, values, attn_mask=mask)[:, :, :group]


def _longest_first(row: Row) -> tuple[int, int]:
    """Rows of like length share a batch, so little is padding; the longest first, so memory peaks at the start."""
    return -len(row.prompt), row.index


def _room(model: Any, length: int) -> int:
    """How many slots of `length` positions fit into what is free on the GPU."""
    config = model.config
    per_position = 2 * config.num_hidden_layers * config.num_key_value_heads * model.dtype.itemsize
    per_slot: int = per_position * (config.hidden_size // config.num_attention_heads) * length
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(model.device)
    return int(free * CACHE_SHARE) // per_slot
