"""What a store is, in a few lines, once every file of it has been compared with its checksum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kd.store.reader import TeacherStore


def inspect(folder: Path) -> dict[str, Any]:
    """Verify the store in `folder` and describe it; a UserError names the file that is not what it should be."""
    opened = TeacherStore(folder)
    opened.verify()
    manifest = opened.manifest
    rows = sum(example.rows for example in manifest.examples)
    size = sum(path.stat().st_size for path in folder.iterdir())
    return {
        **manifest.model_dump(exclude={"shards", "examples"}),
        "examples": len(manifest.examples),
        "rows": rows,
        "shards": len(manifest.shards),
        "bytes": size,
        "bytes_per_row": size / rows,
        "verified": True,
    }


def text(found: dict[str, Any]) -> str:
    """The description for a terminal."""
    model, prompt, tokens = found["model"], found["prompt"], found["tokenization"]
    versions = ", ".join(f"{name} {version}" for name, version in model["versions"].items()) or "versions not known"
    lines = {
        "kind": f"{found['kind']}, {found['dtype']}, {found['width']} numbers a row",
        "model": f"{model['name']} at {model['revision'] or 'no revision'}",
        "captured by": f"{model['backend']}, {model['dtype']}, {versions}, {found['batch_rows']} a forward",
        "prompt": f"{prompt['name']}: {prompt['text']!r}",
        "tokens": f"bos {tokens['bos']}, vocabulary {tokens['vocabulary_sha256'][:12]}",
        "holds": f"{found['examples']} examples, {found['rows']} rows, {found['shards']} shards",
        "size": f"{found['bytes'] / 1e6:.1f} MB"
        + (f", {found['bytes_per_row']:.1f} bytes a row" if found["rows"] else ""),
        "verified": "every file has its checksum",
    }
    return "\n".join(f"{name:<12} {line}" for name, line in lines.items()) + "\n"
