"""A Hub on this machine: it lists a model's files, serves them by ranges and, the large ones, from another host."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from tiny import make_tiny_llama

NAME, REVISION = "someone/some-model", "5" * 40
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def model() -> dict[str, bytes]:
    """The files of a small Llama with its weights in two, the first of 1.4 MB and the second of 0.4 MB."""
    with tempfile.TemporaryDirectory() as name:
        folder = make_tiny_llama(Path(name), hidden_size=256, num_hidden_layers=1)
        tensors = load((folder / "model.safetensors").read_bytes())
        (folder / "model.safetensors").unlink()
        head = {"lm_head.weight": tensors.pop("lm_head.weight")}
        shards = {FIRST: tensors, SECOND: head}
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files |= {name: save(tensors, {"format": "pt"}) for name, tensors in shards.items()}
    index = {name: shard for shard, tensors in shards.items() for name in tensors}
    return files | {"model.safetensors.index.json": json.dumps({"weight_map": index}).encode()}


FILES = model() | {
    "pytorch_model.bin": b"a pickle",
    "modeling_llama.py": b"raise SystemExit('remote code')",
    "README.md": b"# A model\n",
    "original/params.json": b"{}",
}
TAKEN = {name: body for name, body in FILES.items() if name.endswith((".json", ".safetensors")) and "/" not in name}


@dataclass(frozen=True)
class Asked:
    """A request as it came in: to the Hub or to the host it redirects to, with what it carried."""

    host: str
    path: str
    range: str | None
    authorization: str | None


Reply = Callable[[BaseHTTPRequestHandler, bytes], None]


def send(request: BaseHTTPRequestHandler, body: bytes, status: int = 200, **headers: str) -> None:
    """Answer with `body`, or the part of it that the request's Range asks for."""
    start = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
    if status == 200 and start:
        status, first, size = 206, int(start[1]), len(body)
        body = body[first:]
        headers["Content-Range"] = f"bytes {first}-{size - 1}/{size}"
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)


def lists(name: str, body: bytes) -> dict[str, Any]:
    """A file in the Hub's listing: weights are LFS files, with a SHA-256; others have Git's object id."""
    pointer = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
    row = {"rfilename": name, "size": len(body), "blobId": pointer}
    if name.endswith((".safetensors", ".bin")):
        row["lfs"] = {"sha256": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}
    return row


class Hub:
    """Serves one model. `reply` says how weights are sent; `refuse` answers every request for a file with a status.

    The file `spoil` is served with other bytes than those listed.
    """

    def __init__(self, files: dict[str, bytes] | None = None) -> None:
        self.files = files or FILES
        self.refuse: int | None = None
        self.spoil: str | None = None
        self.reply: Reply = send
        self.asked: list[Asked] = []
        self.hosts = {"hub": self._serve("hub", self._answer), "cdn": self._serve("cdn", self._weights)}
        self.url = f"http://127.0.0.1:{self.hosts['hub'].server_port}"

    def close(self) -> None:
        for host in self.hosts.values():
            host.shutdown()

    def paths(self, host: str) -> list[str]:
        return [asked.path for asked in self.asked if asked.host == host]

    def _serve(self, host: str, answer: Callable[[BaseHTTPRequestHandler], None]) -> ThreadingHTTPServer:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                headers = self.headers
                hub.asked.append(Asked(host, self.path, headers.get("Range"), headers.get("Authorization")))
                answer(self)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        files = f"/{NAME}/resolve/{REVISION}/"
        if request.path == f"/api/models/{NAME}/revision/{REVISION}?blobs=True":
            rows = [lists(name, body) for name, body in self.files.items()]
            send(request, json.dumps({"id": NAME, "siblings": rows}).encode())
        elif not request.path.startswith(files):
            send(request, b"Not Found", 404)
        elif self.refuse:
            send(request, b"no", self.refuse)
        elif request.path.endswith(".safetensors"):
            cdn = f"http://127.0.0.1:{self.hosts['cdn'].server_port}"
            send(request, b"", 302, Location=f"{cdn}/{request.path.removeprefix(files)}?Signature=signed")
        else:
            name = request.path.removeprefix(files)
            send(request, self.files[name].upper() if name == self.spoil else self.files[name])

    def _weights(self, request: BaseHTTPRequestHandler) -> None:
        self.reply(request, self.files[request.path.strip("/").partition("?")[0]])
