"""Decoding ahead of the host: on a CPU by the plain operations, in the same rounds as on a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import answers, rows_of
from hypothesis import given, settings
from hypothesis import strategies as st

from kd.assess import plain
from kd.assess.ahead import AheadDecoder
from kd.assess.decode import decode
from kd.assess.generate import Ending, end_ids
from kd.assess.row import NOT_A_NUMBER, Row
from kd.models.load import encode, load_model, load_tokenizer

PROMPTS = ["Tom has 3 apples.", "Why?", "A box holds 6 pens. Maria buys 3 boxes.", "", "Each shelf holds 20.", "Ben"]
LIMIT = 30


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> Any:
    return load_model(tiny_llama, "float32", "cpu")


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return load_tokenizer(tiny_llama)


@pytest.fixture(scope="module")
def alone(llama: Any, tokenizer: Any) -> list[list[int]]:
    """The tokens of each prompt up to LIMIT, none ending early, by the modules."""
    rows = rows_of(tokenizer, PROMPTS, LIMIT)
    list(decode(llama, rows, 10_000, 80, lambda row: len(row.new) == row.limit))
    return [row.new for row in rows]


def ahead(model: Any, rows: list[Row], slots: int, ended: Callable[[Row], bool], ends: frozenset[int]) -> list[Row]:
    length = max(len(row.prompt) + row.limit for row in rows)
    given = [
        row
        for some in decode(model, rows, slots * (length + 16), length, ended, ends, operations=plain)
        for row in some
    ]
    assert Counter(row.index for row in given) == Counter(row.index for row in rows)  # each once
    return rows


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_rows_say_what_the_modules_say(llama: Any, tokenizer: Any, slots: int) -> None:
    for stop in ((), ("e",)):
        expected = answers(llama, tokenizer, PROMPTS, LIMIT, stop=stop)
        ending = Ending(tokenizer, end_ids(llama), stop)
        rows = ahead(llama, rows_of(tokenizer, PROMPTS, LIMIT), slots, ending.reached, ending.end_ids)
        assert [ending.response(row) for row in rows] == expected


@settings(max_examples=12, deadline=None)
@given(
    limits=st.lists(st.integers(1, LIMIT), min_size=len(PROMPTS), max_size=len(PROMPTS)),
    slots=st.integers(1, 5),
    device=st.sets(st.integers(0, 5), max_size=3),
    host=st.sets(st.integers(0, 5), max_size=3),
)
def test_rows_end_where_they_end_whoever_sees_it(
    llama: Any, tokenizer: Any, alone: list[list[int]], limits: list[int], slots: int, device: set[int], host: set[int]
) -> None:
    """Tokens that end rows, some of which the device knows and some only the host."""
    known = frozenset(alone[i][limits[i] // 2] for i in device)
    unknown = {alone[i][limits[i] // 3] for i in host}
    rows = [Row(i, row.prompt, limits[i]) for i, row in enumerate(rows_of(tokenizer, PROMPTS, 1))]
    ahead(llama, rows, slots, lambda row: row.new[-1] in known | unknown or len(row.new) == row.limit, known)
    for row, tokens in zip(rows, alone, strict=True):
        ends = [i for i, token in enumerate(tokens[: row.limit], start=1) if token in known | unknown]
        assert row.new == tokens[: min([*ends, row.limit])]


def test_nan_in_one_row_fails_it_and_does_not_reach_the_next_in_its_slot(tiny_llama: Path, tokenizer: Any) -> None:
    llama = load_model(tiny_llama, "float32", "cpu")
    expected = answers(llama, tokenizer, PROMPTS, 12)
    [tilde] = encode(tokenizer, "~", bos=False)
    with torch.no_grad():
        llama.model.embed_tokens.weight[tilde] = torch.nan
    poisoned = ["Poison ~ here, in a text that is the longest of them all by far.", *PROMPTS]
    ending = Ending(tokenizer, end_ids(llama))
    rows = ahead(llama, rows_of(tokenizer, poisoned, 12), 1, ending.reached, ending.end_ids)
    assert [row.failure for row in rows] == [NOT_A_NUMBER] + [None] * len(PROMPTS)
    assert [ending.response(row) for row in rows[1:]] == expected


def test_the_weights_become_one_tensor_and_no_second_copy(tiny_llama: Path) -> None:
    llama = load_model(tiny_llama, "float32", "cpu")
    before = {name: parameter.clone() for name, parameter in llama.named_parameters()}
    decoder = AheadDecoder(llama, 2, 16, frozenset(), plain)
    assert all(torch.equal(parameter, before[name]) for name, parameter in llama.named_parameters())
    attention, mlp = llama.model.layers[0].self_attn, llama.model.layers[0].mlp
    for joined, linears in (
        (decoder.layers[0].qkv, (attention.q_proj, attention.k_proj, attention.v_proj)),
        (decoder.layers[0].gate_up, (mlp.gate_proj, mlp.up_proj)),
    ):
        assert {linear.weight.untyped_storage().data_ptr() for linear in linears} == {joined.data_ptr()}
