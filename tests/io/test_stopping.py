from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import environment

# The signal comes while torch's native half loads, which takes some tenths of a second at the least.
WHILE_TORCH_LOADS = """
import os, subprocess, sys, time
from kd.io.stopping import signals_stop

def send(event, arguments):
    if event == "import" and arguments[0] == "torch._C":
        subprocess.Popen(["sh", "-c", f"sleep 0.05; kill -{sys.argv[1]} {os.getpid()}"])

sys.addaudithook(send)
try:
    with signals_stop():
        import torch
        time.sleep(20)
except KeyboardInterrupt as stop:
    print(type(stop).__name__, "torch" in sys.modules)
"""


@pytest.mark.parametrize(("signal", "raised"), [("INT", "KeyboardInterrupt"), ("TERM", "Terminated")])
def test_a_signal_that_comes_while_torch_loads_is_raised_behind_that(signal: str, raised: str) -> None:
    command = [sys.executable, "-c", WHILE_TORCH_LOADS, signal]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{raised} True\n", done.stderr
