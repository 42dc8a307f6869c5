"""Numbers in any dress have one spelling, and what is none is refused."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd.data import number
from kd.data.number import equal


@given(
    st.decimals(-(10**9), 10**9, allow_nan=False, places=3),
    st.sampled_from(["", "$", "\u20ac", "\u00a3"]),
    st.sampled_from(["-", "\u2212", "\u2013"]),
    st.sampled_from(["", ".", "%", " "]),
    st.booleans(),
)
def test_every_dress_of_a_number_is_that_number(
    value: Decimal, currency: str, minus: str, tail: str, inner: bool
) -> None:
    sign = minus if value < 0 else "+" if inner else ""
    digits = f"{abs(value):,f}"
    text = f"{currency}{sign}{digits}{tail}" if inner else f"{sign}{currency}{digits}{tail}"
    spelled = number.given(text)
    assert spelled is not None
    assert Decimal(spelled) == value
    assert equal(spelled, number.canonical("-" if value < 0 else "", digits))


@given(st.text(max_size=8) | st.text(alphabet="0123456789,.-+$% \u2212", max_size=8))
def test_any_text_is_a_number_or_none(text: str) -> None:
    spelled = number.given(text)
    assert spelled is None or number.given(spelled) == spelled


@pytest.mark.parametrize("text", ["", ".", "-", "$", "1,23", "1.2.3", "5 apples", "1e3", "--5", "-$-5", "\u0663"])
def test_what_is_no_number_is_none(text: str) -> None:
    assert number.given(text) is None


def test_no_answer_equals_nothing() -> None:
    assert not equal(None, "5")
    assert not equal("18.00", "18")  # lm-evaluation-harness compares text
