"""`kd --version`: what is here, for whoever reports a fault or wants to know what made a result."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, environment

from kd.cli import main
from kd.machine import version
from kd.machine.version import Package, read_commit, read_version

HEAVY = {"torch", "transformers", "peft", "numpy", "scipy", "pydantic", "dvc"}


def test_version_says_commit_and_pins_and_imports_none_of_them() -> None:
    code = "import sys; from kd.cli import main; status = main(['--version']); print(*sys.modules); sys.exit(status)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    *lines, modules = done.stdout.splitlines()
    assert re.fullmatch(r"kd \d+\.\d+\.\d+, commit ([0-9a-f]{40}( \+changed)?|unknown \(no Git checkout\))", lines[0])
    assert not HEAVY & set(modules.split())
    rows = {name: rest for name, *rest in map(str.split, lines[2:])}
    assert {"Python", "torch", "transformers", "peft", "exllamav2"} <= rows.keys()
    assert rows["torch"][0] == "2.4.0"
    assert rows["Python"][0] == "3.11.*"
    assert rows["Python"][2] == "met"


@pytest.mark.parametrize(
    ("found", "extra", "said"),
    [
        ("2.4.0", None, "met"),
        ("2.4.0+cu121", None, "met"),  # a build with its own mark
        ("2.11.0", None, "not met"),
        (None, None, "not met"),
        (None, "gpu", "not installed (extra gpu)"),
        ("2.11.0", "gpu", "not met"),
    ],
)
def test_each_pin_is_met_or_not(
    found: str | None,
    extra: str | None,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    here = version.Version("1.2.3", Package("Python", "3.11.*", "3.12.1"), [Package("torch", "2.4.0", found, extra)])
    monkeypatch.setattr(version, "read_version", lambda: here)
    assert main(["--version"]) == 0
    python, torch = capsys.readouterr().out.splitlines()[2:]
    assert python.split() == ["Python", "3.11.*", "3.12.1", "not", "met"]
    assert torch.split(maxsplit=3) == ["torch", "2.4.0", found or "-", said]


def test_pins_are_the_same_read_from_the_checkout_and_from_an_installation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    of_checkout = read_version()
    monkeypatch.setattr(version, "CHECKOUT", tmp_path)  # as in site-packages
    of_installation = read_version()
    assert of_installation.python == of_checkout.python
    assert set(of_installation.packages) == set(of_checkout.packages)


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_the_commit_is_that_of_the_code_and_of_no_project_around_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(version, "CHECKOUT", tmp_path)
    monkeypatch.delenv(version.IMAGE_REVISION, raising=False)
    assert read_commit() == (None, False)
    code = tmp_path / "kd/cli.py"
    code.parent.mkdir()
    code.touch()
    (tmp_path / "mine.txt").touch()
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "mine.txt")
    git(tmp_path, "commit", "--quiet", "--message", "a project that has kd in a folder of its own, which it ignores")
    assert read_commit() == (None, False)
    monkeypatch.setenv(version.IMAGE_REVISION, "0123abc+changed")  # as the image's build says it
    assert read_commit() == ("0123abc", True)
    git(tmp_path, "add", "kd/cli.py")
    git(tmp_path, "commit", "--quiet", "--message", "a checkout")
    commit, changed = read_commit()
    assert commit
    assert re.fullmatch("[0-9a-f]{40}", commit)
    assert not changed
    code.write_text("changed\n")
    assert read_commit() == (commit, True)


def test_a_broken_environment_is_told_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without Git and without any package."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(version, "installed", lambda _: None)
    assert "torch         2.4.0   -          not met" in re.sub(r" +$", "", version.text(), flags=re.MULTILINE)
    assert REPOSITORY.joinpath("pyproject.toml").exists()
