"""Places that others choose: a cache, a disk behind a link. What is wrong with one is said before the work begins."""

from __future__ import annotations

import os
from pathlib import Path

from kd.errors import UserError


def unwritable(folder: Path) -> str | None:
    """Why nothing can be written to a folder, which may have to be made first; None where it can."""
    found = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not found.is_dir():
        return f"{found} is no folder"
    return None if os.access(found, os.W_OK | os.X_OK) else f"{found} cannot be written to"


def insist_writable(folder: Path, mend: str) -> None:
    """Refuse a folder that is to be written to and cannot be; the UserError says how to `mend` it."""
    reason = unwritable(folder)
    if reason:
        raise UserError(f"{reason}; {mend}")


def link_out(folder: Path) -> Path | None:
    """The part of `folder`, a path within the working folder, or what lies in it, that is a link out of that; None
    where none is. DVC follows no such link to a folder ("outside of git repository")."""
    parts = [path for path in reversed((folder, *folder.parents)) if path != Path()]
    inner = sorted(folder.iterdir()) if folder.is_dir() else []
    links = (path for path in (*parts, *inner) if path.is_symlink() and not path.is_file())
    return next((path for path in links if not path.resolve().is_relative_to(Path.cwd())), None)


def refuse_results_folder(folder: Path) -> None:
    """Refuse a folder of results that DVC would stop at in the middle of the work, or that cannot be written to."""
    link = link_out(folder)
    if link:
        raise UserError(
            f"{link}: a link out of this checkout (to {link.resolve()}), where DVC does not follow; make it a folder "
            "again, and move the whole checkout to that disk or mount that folder here"
        )
    insist_writable(folder, "results lie there, so let this user write to it")
