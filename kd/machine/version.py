"""What of this package is here: its version, the commit of its code, and the versions it pins beside those installed.

All of it is read as text and metadata, and nothing of it imported: `kd --version` is quick, and answers where a package
is missing or broken.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd.errors import UserError

CHECKOUT = Path(__file__).resolve().parents[2]
PIN = re.compile(r"(?P<name>[\w.-]+)(?:\[[^]]*\])?==(?P<version>[^\s;]+)(?:.*extra == [\"'](?P<extra>[\w-]+))?")
IMAGE_REVISION = "KD_REVISION"  # set where the image is built, which holds no Git


@dataclass(frozen=True)
class Package:
    """A package, the version that this one pins, and the one installed. `extra` is the one that asks for it, None where
    all need it."""

    name: str
    pinned: str
    found: str | None
    extra: str | None = None

    @property
    def met(self) -> bool:
        """Whether the pinned version is there; a build may carry its own mark behind it, such as 2.4.0+cu121."""
        return (self.found or "").partition("+")[0] == self.pinned


@dataclass(frozen=True)
class Version:
    """This package's version, and the Python and the packages that it pins beside those that are here."""

    version: str
    python: Package
    packages: Sequence[Package]


def read_version() -> Version:
    """What this package says of itself: in the project file where its code lies in a checkout, which is never older
    than the code; else in the metadata that it was installed with. A UserError where there is neither."""
    project = CHECKOUT / "pyproject.toml"
    if project.is_file():
        table: dict[str, Any] = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        version, python, required = table["version"], table["requires-python"], list(table["dependencies"])
        for extra, lines in table["optional-dependencies"].items():
            required += [f'{line}; extra == "{extra}"' for line in lines]
    else:
        try:
            about = importlib.metadata.metadata("kd")
        except importlib.metadata.PackageNotFoundError:
            raise UserError("kd is not installed as a package; `nox` installs it with all that it needs") from None
        version, python, required = about["Version"], about["Requires-Python"], about.get_all("Requires-Dist", [])
    pins = [match for line in required if (match := PIN.match(line))]
    return Version(
        version,
        Package("Python", python.removeprefix("=="), platform.python_version()),
        [Package(pin["name"], pin["version"], installed(pin["name"]), pin["extra"]) for pin in pins],
    )


def installed(name: str) -> str | None:
    """The installed version of a package, None where there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def read_commit() -> tuple[str | None, bool]:
    """The commit of the code, and whether kd/ differs from it: as Git says of the checkout that the code lies in, or as
    was said when the image was built; (None, False) where nothing knows it."""
    if _git("ls-files", "--error-unmatch", "kd/cli.py") is not None:  # no other project's, whose folder holds this code
        return _git("rev-parse", "HEAD"), bool(_git("status", "--porcelain", "--", "kd"))
    commit, changed, _ = os.environ.get(IMAGE_REVISION, "").partition("+")
    return commit or None, bool(changed)


def text() -> str:
    """Version, commit and pins for a terminal."""
    here, (commit, changed) = read_version(), read_commit()
    rows = [("", "pinned", "installed", "")]
    for package in (here.python, *here.packages):
        rows.append((package.name, package.pinned, package.found or "-", _state(package)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    of = f"commit {commit}{' +changed' if changed else ''}" if commit else "commit unknown (no Git checkout)"
    return "\n".join([f"kd {here.version}, {of}", *table])


def _state(package: Package) -> str:
    """Whether a pin is met."""
    if package.name == "Python":
        return "met" if f"{package.found}.".startswith(package.pinned.removesuffix("*")) else "not met"
    if package.found is None and package.extra:
        return f"not installed (extra {package.extra})"
    return "met" if package.met else "not met"


def _git(*arguments: str) -> str | None:
    """What Git says of the checkout that the code lies in; None where there is none."""
    try:
        found = subprocess.run(["git", "-C", str(CHECKOUT), *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return found.stdout.strip() if found.returncode == 0 else None
