"""Sessions around the pipeline. `nox -s mini` is the main job, `nox -s tests` the tests; `nox -l` lists all.

Every session shares one environment, .nox/kd (several gigabytes), installed from requirements.lock with
hashes checked. nox itself would make one per session, so the sessions run with `python=False` and `use` it.
"""

from __future__ import annotations

import os
from pathlib import Path

import nox

nox.options.sessions = ["tests"]

ENVIRONMENT = Path(".nox/kd").resolve()
LOCK = "requirements.lock"


def environment(session: nox.Session) -> None:
    """Bring the shared environment to the lock file (a second where nothing changed) and enter it."""
    if not (ENVIRONMENT / "pyvenv.cfg").exists():
        session.run("uv", "venv", "--quiet", "--python", "3.11", str(ENVIRONMENT))
    session.env["VIRTUAL_ENV"] = str(ENVIRONMENT)
    session.env["PATH"] = f"{ENVIRONMENT / 'bin'}{os.pathsep}{os.environ['PATH']}"
    install = ("uv", "pip", "install", "--quiet", "--no-deps")
    session.run(*install, "--require-hashes", "--requirement", LOCK)
    session.run(*install, "--no-build-isolation", "--editable", ".")


@nox.session(python=False)
def lock(session: nox.Session) -> None:
    """Resolve pyproject.toml anew into requirements.lock (hashes, all platforms, no index addresses)."""
    session.run(
        "uv", "pip", "compile", "pyproject.toml", "--all-extras", "--universal", "--python-version", "3.11",
        "--generate-hashes", "--no-emit-index-url", "--no-annotate", "--custom-compile-command", "nox -s lock",
        "--override", "lock-overrides.txt", "--output-file", LOCK, "--quiet", *session.posargs,
    )  # fmt: skip


@nox.session(python=False)
def mini(session: nox.Session) -> None:
    environment(session)
