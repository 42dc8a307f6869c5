"""Stages that work at the same time, each in a thread: while one has an item, the next has the one before."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

PLACES = 2  # items a stage: one in work and one that waits


def pipeline(stages: Sequence[Callable[[Any], Any]], items: Iterable[Any]) -> Generator[Any, None, None]:
    """Each of `items` through all `stages`, in order.

    No more than PLACES a stage are on their way at a time: `items` is asked for more, in the caller's thread, as
    results are taken. What a stage raises comes in its item's place, as it was raised. When the iteration ends, by
    whatever (an error, Ctrl-C, `close`), no thread is left: each returns from its call, and begins no other.
    """
    with threads(len(stages)) as own:
        under_way: deque[Future[Any]] = deque()
        for item in items:
            under_way.append(_send(item, stages, own))
            if len(under_way) == PLACES * len(stages):
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


@contextmanager
def threads(count: int) -> Iterator[list[ThreadPoolExecutor]]:
    """So many single threads, each of which does what is submitted to it in order; what none has begun when the block
    ends is never done."""
    own = [ThreadPoolExecutor(1, thread_name_prefix=f"stage {number}") for number in range(count)]
    try:
        yield own
    finally:
        for thread in own:
            thread.shutdown(wait=False, cancel_futures=True)
        for thread in own:
            thread.shutdown()


def _send(item: Any, stages: Sequence[Callable[[Any], Any]], own: Sequence[ThreadPoolExecutor]) -> Future[Any]:
    """What will become of `item`: every stage's thread waits for what the stage before makes of it."""
    result: Future[Any] = Future()
    result.set_result(item)
    for stage, thread in zip(stages, own, strict=True):
        result = thread.submit(_pass_through, stage, result)
    return result


def _pass_through(stage: Callable[[Any], Any], before: Future[Any]) -> Any:
    return stage(before.result())
