"""Stages at work at the same time, with plain functions in the place of a model's modules."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import count
from typing import Any

import pytest
from conftest import environment
from hypothesis import given
from hypothesis import strategies as st

from kd.teacher.pipeline import PLACES, pipeline

INTERRUPTED = """
import sys, threading, time
from kd.teacher.pipeline import pipeline

def slow(item):
    if item == 2:
        print("begun", flush=True)
    time.sleep(0.1)
    return item

try:
    for _ in pipeline([slow] * 3, range(10**9)):
        pass
except KeyboardInterrupt:
    sys.exit(f"interrupted, {threading.active_count()} thread")
"""


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def add(number: int) -> Callable[[list[int]], list[int]]:
    return lambda item: [*item, number]


def failing_at(number: int, error: BaseException) -> Callable[[int], int]:
    def stage(item: int) -> int:
        if item == number:
            raise error
        return item

    return stage


@given(st.integers(1, 5), st.integers(0, 30))
def test_every_item_passes_every_stage_and_all_come_out_in_order(stages: int, items: int) -> None:
    found = list(pipeline([add(number) for number in range(stages)], ([-item] for item in range(items))))
    assert found == [[-item, *range(stages)] for item in range(items)]


def test_order_holds_whatever_takes_longest() -> None:
    def uneven(item: int) -> int:
        time.sleep(0.004 * (item * 7 % 5))
        return item

    assert list(pipeline([uneven] * 3, range(20))) == list(range(20))


def test_stages_work_at_the_same_time() -> None:
    all_three = threading.Barrier(3)  # which nobody passes unless each stage is in a call of its own

    def meet(item: int) -> int:
        all_three.wait(timeout=10)
        return item

    def skip(stage: int) -> Callable[[int], int]:
        """The pipeline fills and drains: only items that all stages can have at once meet."""
        return lambda item: meet(item) if 2 - stage <= item < 22 - stage else item

    assert list(pipeline([skip(0), skip(1), skip(2)], range(22))) == list(range(22))


def test_a_stage_has_one_thread_of_its_own() -> None:
    seen: dict[int, set[int]] = {0: set(), 1: set()}

    def note(stage: int) -> Callable[[int], int]:
        return lambda item: (seen[stage].add(threading.get_ident()), item)[1]

    list(pipeline([note(0), note(1)], range(20)))
    assert [len(idents) for idents in seen.values()] == [1, 1]
    assert not seen[0] & seen[1]


def test_items_are_taken_as_results_are() -> None:
    taken = count()
    stream = pipeline([lambda item: item] * 3, taken)
    with closing(stream):
        for expected in range(5):
            assert next(stream) == expected
            time.sleep(0.02)  # however long the caller is busy
    assert next(taken) == 4 + 3 * PLACES


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt("no"), SystemExit(3)], ids=lambda one: repr(one))
def test_an_error_in_a_stage_comes_in_its_items_place_and_ends_all(stage: int, error: BaseException) -> None:
    stages = [failing_at(5, error) if number == stage else failing_at(-1, error) for number in range(3)]
    seen: list[int] = []
    with pytest.raises(type(error)) as caught:
        seen.extend(pipeline(stages, count()))
    assert caught.value is error
    assert seen == [0, 1, 2, 3, 4]
    assert "raise error" in "".join(traceback.format_exception(caught.value))


def test_the_first_item_that_failed_is_told_of_though_a_later_one_failed_before_it() -> None:
    late = threading.Event()

    def first(item: int) -> int:
        if item == 3:
            late.set()
            raise ValueError(item)
        return item

    def second(item: int) -> int:
        assert late.wait(10)
        if item == 1:
            raise KeyError(item)
        return item

    with pytest.raises(KeyError):
        list(pipeline([first, second], count()))


def test_items_that_cannot_be_had_end_all() -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        raise OSError("the disk")

    with pytest.raises(OSError, match="the disk"):
        list(pipeline([lambda item: item] * 2, items()))


def test_whoever_has_enough_closes_it_and_what_was_not_begun_is_not_done() -> None:
    done: list[Any] = []

    def slow(item: int) -> int:
        time.sleep(0.02)
        done.append(item)
        return item

    with closing(pipeline([slow, slow], count())) as stream:
        assert [next(stream) for _ in range(3)] == [0, 1, 2]
    ended = len(done)
    time.sleep(0.1)
    assert len(done) == ended
    assert ended < 2 * (3 + 2 * PLACES)


def test_no_items_and_no_wait() -> None:
    assert list(pipeline([add(1)], [])) == []


def test_ctrl_c_ends_all_threads() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "begun\n"
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert (process.returncode, said) == (1, "interrupted, 1 thread\n")
