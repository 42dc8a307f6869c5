"""`kd data fetch`, against a server that behaves and one that does not."""

from __future__ import annotations

import hashlib
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from commands import unfinished
from conftest import REPOSITORY
from forked import begin, status

from kd.audit import logs
from kd.cli import main

Reply = Callable[[BaseHTTPRequestHandler, bytes], None]


def whole(request: BaseHTTPRequestHandler, body: bytes) -> None:
    request.send_response(200)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)


def cut_short(request: BaseHTTPRequestHandler, body: bytes) -> None:
    request.send_response(200)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body[: len(body) // 2])


def other_bytes(request: BaseHTTPRequestHandler, body: bytes) -> None:
    whole(request, body + b"\n")


def missing(request: BaseHTTPRequestHandler, _: bytes) -> None:
    request.send_error(404)


class Server:
    """Serves `files`; `reply` says how."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.reply: Reply = whole
        self.asked: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.rpartition("/")[2]
                server.asked.append(name)
                server.reply(self, server.files[name])

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/logs"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Seven small files under the published names, with their checksums in the published ones' place."""
    monkeypatch.chdir(tmp_path)
    files = {name: f"{name}\n".encode() * 20_000 for name in logs.SHA256}
    monkeypatch.setattr(logs, "SHA256", {name: hashlib.sha256(body).hexdigest() for name, body in files.items()})
    started = Server(files)
    yield started
    started.http.shutdown()


def there() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in logs.DATA.glob("*") if path.is_file()}


def test_fetch_brings_every_file_once(server: Server) -> None:
    assert main(["data", "fetch", "--source", server.url]) == 0
    assert there() == server.files
    assert len(server.asked) == 7
    assert main(["data", "fetch", "--source", server.url]) == 0
    assert len(server.asked) == 7


@pytest.mark.parametrize("reply", [cut_short, other_bytes, missing])
def test_what_is_not_whole_and_right_is_not_taken(
    server: Server, capsys: pytest.CaptureFixture[str], reply: Reply
) -> None:
    assert main(["data", "fetch", "--source", server.url]) == 0
    (logs.DATA / "base-KD.csv").unlink()
    server.reply = reply
    assert main(["data", "fetch", "--source", server.url]) == 1
    assert "base-KD.csv" in capsys.readouterr().err
    assert there() == {name: body for name, body in server.files.items() if name != "base-KD.csv"}
    assert not unfinished(Path("data"))
    server.reply = whole
    assert main(["data", "fetch", "--source", server.url]) == 0
    assert there() == server.files


def test_a_spoilt_file_is_replaced_only_by_the_right_one(server: Server) -> None:
    assert main(["data", "fetch", "--source", server.url]) == 0
    (logs.DATA / "ai-KD.csv").write_bytes(b"spoilt")
    server.reply = other_bytes
    assert main(["data", "fetch", "--source", server.url]) == 1
    assert there()["ai-KD.csv"] == b"spoilt"
    server.reply = whole
    assert main(["data", "fetch", "--source", server.url]) == 0
    assert there() == server.files


def test_no_network_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", "fetch", "--source", "http://127.0.0.1:9/logs"]) == 1
    error = capsys.readouterr().err
    assert "no connection" in error
    assert "--source" in error
    assert "Traceback" not in error


def test_a_killed_download_leaves_no_file(server: Server) -> None:
    started, ended = threading.Event(), threading.Event()

    def stall(request: BaseHTTPRequestHandler, body: bytes) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body[:100_000])
        request.wfile.flush()
        started.set()
        ended.wait(30)

    server.reply = stall
    process = begin("data", "fetch", "--source", server.url)
    assert started.wait(30)
    process.kill()
    assert status(process) == -signal.SIGKILL
    ended.set()
    assert there() == {}


def test_fetched_data_is_what_dvc_expects(
    published_logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dvc.cli import main as dvc

    monkeypatch.chdir(tmp_path)
    shutil.copy(REPOSITORY / "data.dvc", tmp_path)
    assert dvc(["init", "--quiet", "--no-scm"]) == 0
    before = Path("data.dvc").read_bytes()
    server = Server({name: (published_logs / name).read_bytes() for name in logs.SHA256})
    assert main(["data", "fetch", "--source", server.url]) == 0
    capsys.readouterr()
    assert dvc(["status", "data.dvc"]) == 0
    assert "up to date" in capsys.readouterr().out
    assert Path("data.dvc").read_bytes() == before
    server.http.shutdown()
    Path("data/notes.txt").write_text("mine")
    assert main(["data", "fetch", "--source", server.url]) == 2
