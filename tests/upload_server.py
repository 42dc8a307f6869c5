"""A Hub on this machine that takes uploads: who one is, repositories, large files at another host, commits, tags; and
that gives back what it has, so that libraries load from it."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

ME, MY_TOKEN = "someone", "hf_SecretOfSomeone"
LARGE = (".safetensors", ".png")  # what goes to the other host, by SHA-256
Answer = tuple[int, Any]


@dataclass(frozen=True)
class Asked:
    """A request as it came in: to the Hub or to the host of large files."""

    host: str
    method: str
    path: str
    authorization: str | None
    body: bytes


@dataclass
class Stored:
    """A repository: its files, how often it was committed to, and which commit a tag names."""

    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"* lfs\n"})
    commits: int = 1
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def head(self) -> str:
        return f"{self.commits:040x}"


class UploadHub:
    """Repositories by their path in an address: `owner/name`, and `datasets/owner/name`.

    Whoever has MY_TOKEN is ME and may write under that name alone; any may read. A request of which `breaks` is true
    breaks off before it is answered; `status` may give another status than 200 in place of an answer.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Stored] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[Asked] = []
        self.breaks: Callable[[Asked], bool] = lambda _: False
        self.status: Callable[[Asked], int] = lambda _: 200
        self.hosts = {"hub": self._serve("hub", self._hub), "storage": self._serve("storage", self._storage)}
        self.url = self._address("hub")

    def close(self) -> None:
        for host in self.hosts.values():
            host.shutdown()

    def sent(self, method: str, part: str) -> list[Asked]:
        """The requests of a method in whose path there is a part."""
        return [one for one in self.asked if one.method == method and part in one.path]

    def _address(self, host: str) -> str:
        return f"http://127.0.0.1:{self.hosts[host].server_port}"

    def _serve(self, host: str, answer: Callable[[Asked], Answer]) -> ThreadingHTTPServer:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def _any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                asked = Asked(host, self.command, unquote(self.path), self.headers.get("Authorization"), body)
                hub.asked.append(asked)
                if hub.breaks(asked):
                    self.close_connection = True
                    return
                status = hub.status(asked)
                self._send(asked, *((status, {"error": "as the test wants it"}) if status != 200 else answer(asked)))

            do_GET = do_HEAD = do_POST = do_PUT = _any  # noqa: N815

            def _send(self, asked: Asked, status: int, document: Any) -> None:
                body = document if isinstance(document, bytes) else json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                if "/resolve/" in asked.path:
                    self.send_header("X-Repo-Commit", "1" * 40)
                    self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
                    if status == 404:
                        self.send_header("X-Error-Code", "EntryNotFound")
                self.end_headers()
                if asked.method != "HEAD":
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server

    def _storage(self, asked: Asked) -> Answer:
        sha256 = urlsplit(asked.path).path.strip("/")
        if hashlib.sha256(asked.body).hexdigest() != sha256:
            return 400, {"error": "other bytes"}
        self.large[sha256] = asked.body
        return 200, b""

    def _hub(self, asked: Asked) -> Answer:
        path, known = urlsplit(asked.path).path, asked.authorization == f"Bearer {MY_TOKEN}"
        if asked.authorization and not known:
            return 401, {"error": f"Invalid credentials in Authorization header: {asked.authorization}"}
        if "/resolve/" in path:
            return self._file(path)
        if not known:
            return 401, {"error": "Invalid username or password."}
        if path == "/api/whoami-v2":
            return 200, {"name": ME, "type": "user", "orgs": []}
        if path == "/api/validate-yaml":
            return 200, {"warnings": []}
        if path == "/api/repos/create":
            return self._create(json.loads(asked.body))
        return self._of_repository(asked, path.removeprefix("/"))

    def _create(self, wanted: dict[str, Any]) -> Answer:
        owner, kind = wanted["organization"] or ME, wanted.get("type", "model")
        name = f"{'datasets/' if kind == 'dataset' else ''}{owner}/{wanted['name']}"
        if owner != ME:
            return 403, {"error": f"You don't have the rights to create a {kind} under the namespace {owner!r}"}
        there = name in self.repositories
        self.repositories.setdefault(name, Stored())
        return 409 if there else 200, {"url": f"{self.url}/{name}"}

    def _of_repository(self, asked: Asked, path: str) -> Answer:
        of_api = path.removeprefix("api/").replace("models/", "", 1)
        names = [name for name in self.repositories if f"{of_api}/".startswith((f"{name}/", f"{name}.git/"))]
        if not names:
            return 404, {"error": "Repository not found"}
        name = max(names, key=len)
        repository, action = self.repositories[name], of_api.removeprefix(name).strip("/")
        if asked.method == "GET":
            rows = [self._row(path, body) for path, body in repository.files.items()]
            return 200, {"id": name.removeprefix("datasets/"), "sha": repository.head, "private": False} | {
                "siblings": rows,
                "tags": [],
            }
        if name.removeprefix("datasets/").partition("/")[0] != ME:
            return 403, {"error": "Forbidden: pass `create_pr=1` to open a Pull Request."}
        match action:
            case "preupload/main":
                return 200, {"files": [self._mode(repository, file) for file in json.loads(asked.body)["files"]]}
            case ".git/info/lfs/objects/batch":
                return 200, {"objects": [self._place(one) for one in json.loads(asked.body)["objects"]]}
            case "commit/main":
                return self._commit(repository, [json.loads(line) for line in asked.body.splitlines()])
            case "tag/main":
                tag = json.loads(asked.body)["tag"]
                there = tag in repository.tags
                repository.tags.setdefault(tag, repository.head)
                return 409 if there else 200, {}
        return 404, {"error": action}

    def _file(self, path: str) -> Answer:
        name, _, rest = path.strip("/").partition("/resolve/")
        file = rest.partition("/")[2]
        found = self.repositories[name].files.get(file) if name in self.repositories else None
        return (404, {"error": "Entry not found"}) if found is None else (200, found)

    @staticmethod
    def _row(path: str, body: bytes) -> dict[str, Any]:
        row: dict[str, Any] = {"rfilename": path, "size": len(body), "blobId": git_id(body)}
        if path.endswith(LARGE):
            row["lfs"] = {"sha256": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}
        return row

    @staticmethod
    def _mode(repository: Stored, file: dict[str, Any]) -> dict[str, Any]:
        there = repository.files.get(file["path"])
        mode = "lfs" if file["path"].endswith(LARGE) else "regular"
        return {
            "path": file["path"],
            "uploadMode": mode,
            "shouldIgnore": False,
            "oid": None if there is None else hashlib.sha256(there).hexdigest() if mode == "lfs" else git_id(there),
        }

    def _place(self, one: dict[str, Any]) -> dict[str, Any]:
        where = {"href": f"{self._address('storage')}/{one['oid']}?Signature=signed"}
        return one if one["oid"] in self.large else one | {"actions": {"upload": where}}

    def _commit(self, repository: Stored, lines: list[dict[str, Any]]) -> Answer:
        for line in lines:
            match line["key"], line["value"]:
                case "file", value:
                    repository.files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile", value:
                    repository.files[value["path"]] = self.large[value["oid"]]
        repository.commits += 1
        return 200, {"commitUrl": f"{self.url}/commit", "commitOid": repository.head}


def git_id(body: bytes) -> str:
    """Git's object id of a file."""
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
