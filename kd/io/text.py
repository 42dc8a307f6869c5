"""Text that people and other programs leave: every file that is read as text, and every JSON, comes in here.

A file may begin with a byte order mark, and lines may end as on any system. What cannot be read right is a UserError
that names the file and says how to mend it, whatever the file was to hold.
"""

from __future__ import annotations

import codecs
import errno
import json
import re
from collections import deque
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import Any
from unicodedata import category

from kd.errors import UserError

_UNREADABLE = {
    errno.EISDIR: "is a folder; name a file",
    errno.EACCES: "this user may not read it; give the right to (`chmod u+r`), or name another file",
    errno.EPERM: "this user may not read it; give the right to (`chmod u+r`), or name another file",
}
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}
_UTF16 = re.compile(rb"\xff\xfe|\xfe\xff|[^\0]\0[^\0]\0|\0[^\0]\0[^\0]")  # its mark, or two characters of ASCII
_LAYOUT = {ord(character): None for character in "\n\t"}
_HALF = re.compile("[\ud800-\udfff]")


def read_text(path: Path, mend: str = "name another") -> str:
    """The UTF-8 text of a file, with its own line ends and without a byte order mark.

    A UserError where there is no such file (then it says how to `mend` that), a folder, or text of another kind.
    """
    return decode(_read_bytes(path, mend), path)


def decode(content: bytes, path: Path) -> str:
    """The text that UTF-8 `content` is, which `path` stands for in messages, as `read_text`."""
    if _UTF16.match(content):
        raise UserError(f"{path}: UTF-16 text; save it as UTF-8")
    try:
        return content.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        byte, line = error.object[error.start], error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}: not UTF-8 text (byte 0x{byte:02x} in line {line}); save it as UTF-8") from None


def parse_json(text: str) -> Any:
    """The JSON document in `text`; a ValueError where it is none, and where a key stands twice, of which one would be
    lost. NaN and numbers beyond what a float holds are in it: `refuse_no_numbers` names their keys."""
    try:
        return json.loads(text, object_pairs_hook=_mapping)
    except RecursionError:
        raise ValueError("nested too deep") from None


def refuse_no_numbers(document: Any, where: str) -> None:
    """A UserError where a number in a document (mappings, lists, values) is none, or infinite."""
    for key, value in _values(document):
        if isinstance(value, float) and not isfinite(value):
            raise UserError(f"{_at(where, key)}: expected a finite number, found {value}")


def refuse_half_characters(document: Any, where: str) -> None:
    """A UserError where a text in a document holds a lone surrogate: half a character, which no UTF-8 can hold."""
    for key, value in _values(document):
        half = _HALF.search(value) if isinstance(value, str) else None
        if half:
            found = f"\\u{ord(half[0]):04x} is half a character; write the whole character, or leave it out"
            raise UserError(f"{_at(where, key)}: {found}")


def printable(text: str) -> str:
    """Text of a model, a data set or a file as a terminal may show it: control characters, which could rule it, marks
    that turn the direction of writing, what has no width, and lone surrogates as escapes; line ends and tabs stay."""
    if text.translate(_LAYOUT).isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" or category(c) == "Zs" else _escape(c) for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def refuse_folder(path: Path) -> None:
    """A UserError where a folder was given for a file."""
    if path.is_dir():
        raise UserError(f"{path}: {_UNREADABLE[errno.EISDIR]}")


def _read_bytes(path: Path, mend: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        if error.errno in _ABSENT:
            raise UserError(f"{path}: no such file; {mend}") from None
        if error.errno in _UNREADABLE:
            raise UserError(f"{path}: {_UNREADABLE[error.errno]}") from None
        raise
    except ValueError:  # a NUL, of which no path has one
        raise UserError(f"{str(path)!r}: no such file; {mend}") from None


def _at(where: str, key: str) -> str:
    return ": ".join(filter(None, (where, key.encode("utf-8", "backslashreplace").decode())))


def _values(document: Any) -> Iterator[tuple[str, object]]:
    """The values in a document, and the names of its mappings, each with its dotted key. What YAML lets stand in
    several places, or within itself, is looked at once."""
    seen: set[int] = set()
    waiting = deque([("", document)])
    while waiting:
        key, value = waiting.popleft()
        if not isinstance(value, dict | list):
            yield key, value
        elif id(value) not in seen:
            seen.add(id(value))
            for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
                below = f"{key}.{name}".removeprefix(".")
                yield below, name
                waiting.append((below, inner))


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice")
    return document
