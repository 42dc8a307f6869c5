"""More than one machine: a launcher in params, and two hosts that share nothing but a folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import environment

from kd.cli import main

COMMANDS = (["teacher", "teacher"], ["assess", "no-distillation"])
RESULTS = (Path("artifacts/mini/teacher/teacher"), Path("artifacts/mini/logs/no-distillation.csv"))


@pytest.fixture
def expected(tiny_params: dict[str, Any], write_params: Callable[[dict[str, Any]], None]) -> dict[str, bytes]:
    """What one process makes, in a working folder where it is to be made again."""
    tiny_params["dataset"] |= {"train_rows": 40, "test_rows": 12}
    write_params(tiny_params)
    for command in (["prepare"], ["head"], *COMMANDS):
        assert main(command) == 0
    made = contents()
    for path in RESULTS:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return made


def contents() -> dict[str, bytes]:
    """The bytes of all results, by path."""
    files = (path for result in RESULTS for path in ([result] if result.is_file() else result.iterdir()))
    return {str(path): path.read_bytes() for path in files}


def test_a_launcher_stands_before_the_command_and_does_not_shape_the_result(
    tiny_params: dict[str, Any], write_params: Callable[[dict[str, Any]], None]
) -> None:
    write_params(tiny_params)
    command = ["assess", "no-distillation"]
    for arguments in (["prepare"], command):
        assert main(arguments) == 0
    log = Path("artifacts/mini/logs/no-distillation.csv")
    expected = log.read_bytes()
    log.unlink()
    write_params(tiny_params | {"launcher": "env LAUNCHED_BY='a launcher'"})
    done = subprocess.run(["kd", *command], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(f"kd: env 'LAUNCHED_BY=a launcher' {sys.executable} -m kd {' '.join(command)}\n")
    assert log.read_bytes() == expected


@pytest.mark.parametrize(
    ("launcher", "message"),
    [("no-such-launcher -n 2", "launcher: 'no-such-launcher' does not start"), ("srun 'x", "launcher: not a command")],
)
def test_an_unusable_launcher_exits_2(
    launcher: str,
    message: str,
    tiny_params: dict[str, Any],
    write_params: Callable[[dict[str, Any]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny_params["launcher"] = launcher
    write_params(tiny_params)
    assert main(["teacher", "base"]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces, at 10.77.0.1 and 10.77.0.2, joined by a cable and by nothing else."""
    if shutil.which("ip") is None:
        pytest.skip("needs `ip` (iproute2) for two network namespaces")
    names = [f"kd-{uuid.uuid4().hex[:8]}" for _ in range(2)]
    if subprocess.run(["ip", "netns", "add", names[0]], capture_output=True).returncode != 0:
        pytest.skip("this user may not make network namespaces")
    ip("netns", "add", names[1])
    ip("link", "add", "name", "kd0", "netns", names[0], "type", "veth", "peer", "name", "kd0", "netns", names[1])
    for number, name in enumerate(names, start=1):
        ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "kd0")
        for device in ("lo", "kd0"):
            ip("-n", name, "link", "set", device, "up")
    yield names
    for name in names:
        ip("netns", "del", name)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@pytest.mark.hosts
def test_two_hosts_make_the_same_bytes_as_one_process(expected: dict[str, bytes], hosts: list[str]) -> None:
    for command in COMMANDS:
        launchers = [
            f"ip netns exec {host} torchrun --nnodes 2 --node-rank {rank} --nproc-per-node 1 "
            "--master-addr 10.77.0.1 --master-port 29500 --no-python"
            for rank, host in enumerate(hosts)
        ]
        pair = [
            subprocess.Popen(
                [*launcher.split(), sys.executable, "-m", "kd", *command],
                env=environment(),
                stderr=subprocess.PIPE,
                text=True,
            )
            for launcher in launchers
        ]
        ends = [process.communicate(timeout=300)[1] for process in pair]
        assert [process.returncode for process in pair] == [0, 0], "\n".join(ends)
    assert contents() == expected
