"""How a rehearsal measures: a clock that leaves compilation out, and the memory of the GPUs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

GIB = 2**30


class Clock:
    """Seconds that stand still while Triton compiles a kernel, which it does once a machine and not in every stage."""

    def __init__(self) -> None:
        self.compiled = 0.0

    def __call__(self) -> float:
        return time.perf_counter() - self.compiled

    def leave_out_compiling(self) -> None:
        """From now on, in this process."""
        from kd.kernels import lacking

        if lacking():
            return
        from triton import compiler
        from triton.backends.nvidia import driver

        compiler.compile = self._noted(compiler.compile)
        driver.compile_module_from_src = self._noted(driver.compile_module_from_src)  # kernels' launchers, in C

    def _noted(self, compile_it: Callable[..., Any]) -> Callable[..., Any]:
        """What does the same; its time is added to `compiled`."""

        def noted(*given: Any, **named: Any) -> Any:
            start, before = time.perf_counter(), self.compiled
            try:
                return compile_it(*given, **named)
            finally:
                self.compiled = before + time.perf_counter() - start  # what it asked for in between is in it

        return noted


clock = Clock()


def timed(work: Callable[[], object]) -> float:
    """Seconds of some work."""
    start = clock()
    work()
    return clock() - start


def gpu_use() -> list[float]:
    """GiB in use on each GPU, this process' and all others'."""
    import torch

    found = []
    for gpu in range(torch.cuda.device_count()):
        torch.cuda.synchronize(gpu)
        free, there = torch.cuda.mem_get_info(gpu)
        found.append((there - free) / GIB)
    return found
