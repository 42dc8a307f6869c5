from __future__ import annotations

import os
import select
import signal
import subprocess
import sys

import pytest

from kd.machine.students import _ended_with_us

# As DVC: Ctrl-C comes between its last look for one and the command's first, so that the command has nothing of it.
ENDS_AS_IT_STARTS_A_COMMAND = """
import os, signal, subprocess
signal.signal(signal.SIGINT, lambda *_: (subprocess.Popen(["sleep", "60"]), os._exit(252)))
print("ready", flush=True)
signal.pause()
"""


def test_ctrl_c_leaves_no_command_that_dvc_was_just_starting() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", ENDS_AS_IT_STARTS_A_COMMAND], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(KeyboardInterrupt), _ended_with_us(lambda: [process]):
            raise KeyboardInterrupt
        assert select.select([process.stdout], [], [], 20)[0]  # its end: nobody is left to write there
        assert process.stdout.read() == ""


def test_ctrl_c_again_while_the_first_is_passed_on_leaves_nobody_untold(monkeypatch: pytest.MonkeyPatch) -> None:
    tell = os.killpg

    def interrupted(group: int, number: int) -> None:
        monkeypatch.setattr(os, "killpg", tell)
        os.kill(os.getpid(), signal.SIGINT)
        tell(group, number)

    monkeypatch.setattr(os, "killpg", interrupted)
    running = [subprocess.Popen(["sleep", "60"], start_new_session=True, text=True) for _ in range(2)]
    with pytest.raises(KeyboardInterrupt), _ended_with_us(lambda: running):
        raise KeyboardInterrupt
    assert [process.poll() for process in running] == [-signal.SIGINT] * 2
