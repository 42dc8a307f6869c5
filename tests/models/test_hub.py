"""`kd models fetch`, against a Hub on this machine that behaves and one that does not."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hub_server
import pytest
from conftest import REPOSITORY
from hub_server import FIRST, NAME, REVISION, SECOND, TAKEN, Hub, send
from ruamel.yaml import YAML
from tiny import make_tiny_llama

from kd.cli import main
from kd.config import HubModel
from kd.models import hub

MODEL = HubModel(source="hub", name=NAME, revision=REVISION)
TOKEN = "hf_SecretOfOurs"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub, an empty cache, and a params.yaml in the working folder that names its model twice."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(hub, "PAUSE_S", 0)
    params: dict[str, Any] = YAML(typ="safe").load(REPOSITORY / "profiles" / "mini.yaml")
    params["teacher"]["model"] = params["student"]["model"] = MODEL.model_dump()
    YAML().dump(params, Path("params.yaml"))
    started = Hub()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", started.url)
    yield started
    started.close()


def fetched() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in hub.snapshot(MODEL).glob("*")}


def blobs() -> set[str]:
    return {path.suffix or "whole" for path in hub.repository(MODEL).glob("blobs/*")}


def first_byte(request: BaseHTTPRequestHandler) -> int:
    return int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))


def piece(request: BaseHTTPRequestHandler, body: bytes, *, announced: bool) -> None:
    """300,000 bytes of what is asked for, then nothing; `announced` says first how many there should be."""
    first = first_byte(request)
    request.send_response(206)
    request.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
    if announced:
        request.send_header("Content-Length", str(len(body) - first))
    request.end_headers()
    request.wfile.write(body[first : first + 300_000])


def other_bytes(request: BaseHTTPRequestHandler, body: bytes) -> None:
    send(request, body[::-1])


def too_many_bytes(request: BaseHTTPRequestHandler, body: bytes) -> None:
    send(request, body + b"more")


def without_ranges(request: BaseHTTPRequestHandler, body: bytes) -> None:
    del request.headers["Range"]
    send(request, body)


def broken(request: BaseHTTPRequestHandler, _: bytes) -> None:
    send(request, b"", 503)


def test_fetch_brings_what_is_needed_and_nothing_twice(server: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "fetch"]) == 0
    assert fetched() == TAKEN
    assert blobs() == {"whole"}
    error = capsys.readouterr().err
    assert "models: 100%" in error
    assert f"teacher: {hub.snapshot(MODEL)} (from the Hub)" in error
    assert f"student: {hub.snapshot(MODEL)} (from the Hub)" in error
    asked = len(server.asked)
    assert asked == 1 + len(TAKEN) + 2  # the listing, the files, and the weights once more at the other host
    assert main(["models", "fetch"]) == 0
    assert len(server.asked) == asked


def test_no_pickle_no_code_and_no_second_copy_is_asked_for(server: Hub) -> None:
    assert main(["models", "fetch"]) == 0
    assert not [path for path in server.paths("hub") if path.endswith((".bin", ".py", ".md", "params.json"))]


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_that_ends_early_is_continued_by_range(server: Hub, announced: bool) -> None:
    server.reply = partial(piece, announced=announced)
    assert main(["models", "fetch"]) == 0
    assert fetched() == TAKEN
    first, *later = [asked.range for asked in server.asked if asked.host == "cdn" and FIRST in asked.path]
    assert first is None
    starts = [int(range_.removeprefix("bytes=").removesuffix("-")) for range_ in later]
    assert starts == sorted(set(starts))
    assert starts[0] >= 200_000


def test_a_later_run_goes_on_where_an_earlier_one_failed(server: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    server.reply = broken
    assert main(["models", "fetch"]) == 1
    assert f"{NAME}/{SECOND}: the server answered 503" in capsys.readouterr().err
    assert len(server.paths("cdn")) == 1 + hub.RETRIES
    assert not hub.is_cached(MODEL)
    (part,) = hub.repository(MODEL).glob("blobs/*.part")
    part.write_bytes(server.files[SECOND][:100_000])
    server.reply = send
    assert main(["models", "fetch"]) == 0
    assert fetched() == TAKEN
    assert [asked.range for asked in server.asked if SECOND in asked.path][-1] == "bytes=100000-"


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("name", [FIRST, "config.json", "tokenizer.json"])
def test_a_cut_blob_of_the_cache_is_said_and_the_advice_mends_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "fetch"]) == 0
    blob = (hub.snapshot(MODEL) / name).resolve()
    blob.write_bytes(blob.read_bytes()[:-5])
    assert main(["models", "fetch"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"kd: {hub.snapshot(MODEL) / name}: ")
    assert f"remove {blob} and run `kd models fetch`" in error
    blob.unlink()
    assert main(["models", "fetch"]) == 0
    assert fetched() == TAKEN


def test_a_server_without_ranges_sends_the_file_anew(server: Hub) -> None:
    server.reply = broken
    assert main(["models", "fetch"]) == 1
    (part,) = hub.repository(MODEL).glob("blobs/*.part")
    part.write_bytes(b"?" * 100_000)
    server.reply = without_ranges
    assert main(["models", "fetch"]) == 0
    assert fetched() == TAKEN


@pytest.mark.parametrize("reply", [other_bytes, too_many_bytes])
def test_what_has_another_checksum_is_thrown_away(
    server: Hub, capsys: pytest.CaptureFixture[str], reply: Callable[[BaseHTTPRequestHandler, bytes], None]
) -> None:
    server.reply = reply
    assert main(["models", "fetch"]) == 1
    assert f"{NAME}/{SECOND}: what came does not have the checksum" in capsys.readouterr().err
    assert SECOND not in fetched()
    assert blobs() == {"whole"}
    server.reply = send
    assert main(["models", "fetch"]) == 0
    assert fetched() == TAKEN


def test_a_small_file_with_another_checksum_is_thrown_away(server: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    server.spoil = "config.json"
    assert main(["models", "fetch"]) == 1
    assert f"{NAME}/config.json: what came does not have the checksum" in capsys.readouterr().err
    assert "config.json" not in fetched()
    assert ".part" not in blobs()


@pytest.mark.parametrize(
    ("status", "token", "message"),
    [
        (401, None, "asks who you are (401); set HF_TOKEN"),
        (401, TOKEN, "does not accept the token (401)"),
        (403, TOKEN, "ask for access on its page, with the account whose token HF_TOKEN is"),
        (404, None, "not found at 127.0.0.1 (404); look at `name` and `revision`"),
    ],
)
def test_a_refusal_exits_2_and_says_what_to_do(
    server: Hub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    status: int,
    token: str | None,
    message: str,
) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    server.refuse = status
    assert main(["models", "fetch"]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith(f"kd: {NAME}")
    assert message in error
    assert TOKEN not in error
    assert server.paths("cdn") == []


def test_a_full_disk_is_noticed_before_the_first_byte(
    server: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    assert main(["models", "fetch"]) == 1
    error = capsys.readouterr().err
    assert f"{hub.cache()}: 0.0 GB needed for the models, 0.0 GB free; make room, or set HF_HUB_CACHE" in error
    assert len(server.asked) == 1
    assert not hub.cache().exists()


def test_the_token_goes_to_the_hub_alone(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main(["models", "fetch"]) == 0
    assert {asked.authorization for asked in server.asked if asked.host == "hub"} == {f"Bearer {TOKEN}"}
    assert {asked.authorization for asked in server.asked if asked.host == "cdn"} == {None}
    printed = capfd.readouterr()
    assert TOKEN not in printed.out + printed.err
    assert "Signature" not in printed.out + printed.err
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_the_token_of_the_librarys_own_login_is_used(server: Hub, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    assert main(["models", "fetch"]) == 0
    assert {asked.authorization for asked in server.asked if asked.host == "hub"} == {f"Bearer {TOKEN}"}


def test_a_token_that_cannot_be_one_exits_2_and_is_not_shown(
    server: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}\u2026")
    assert main(["models", "fetch"]) == 2
    error = capsys.readouterr().err
    assert "HF_TOKEN: holds characters that no token has" in error
    assert TOKEN not in error
    assert server.asked == []


def test_offline_exits_2_unless_the_model_is_there(
    server: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["models", "fetch"]) == 2
    assert "HF_HUB_OFFLINE is set; unset it, or set `source: folder`" in capsys.readouterr().err
    assert server.asked == []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert main(["models", "fetch"]) == 0
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["models", "fetch"]) == 0


@pytest.mark.parametrize(
    ("endpoint", "status", "message"),
    [
        ("http://127.0.0.1:9", 1, "no connection; run the same command again"),
        ("not-an-address", 2, "HF_ENDPOINT: not the address of a server"),
    ],
)
@pytest.mark.usefixtures("server")
def test_an_endpoint_that_does_not_answer_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    endpoint: str,
    status: int,
    message: str,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    assert main(["models", "fetch"]) == status
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "status", "message"),
    [
        ({"config.json": b"{}", "tokenizer.json": b"{}", "pytorch_model.bin": b"x"}, 2, "no *.safetensors"),
        ({"config.json": b"{}", "model.safetensors": b"x"}, 2, "no tokenizer.json; a model needs a fast tokenizer"),
        ({"../config.json": b"{}"}, 2, "no config.json"),
    ],
)
def test_a_model_that_cannot_be_used_is_not_fetched(
    server: Hub, capsys: pytest.CaptureFixture[str], files: dict[str, bytes], status: int, message: str
) -> None:
    server.files = files
    assert main(["models", "fetch"]) == status
    assert message in capsys.readouterr().err
    assert len(server.asked) == 1


@pytest.mark.usefixtures("server")
def test_a_listing_that_is_none_exits_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(hub_server, "lists", lambda name, _: {"rfilename": name, "size": 2, "blobId": "../../x"})
    assert main(["models", "fetch"]) == 1
    assert "127.0.0.1 does not list its files as the Hub does" in capsys.readouterr().err


def test_a_model_with_a_shard_missing_is_not_taken_for_whole(server: Hub) -> None:
    assert main(["models", "fetch"]) == 0
    assert hub.is_cached(MODEL)
    (hub.snapshot(MODEL) / FIRST).resolve().unlink()  # the link stays
    assert not hub.is_cached(MODEL)
    server.asked.clear()
    assert main(["models", "fetch"]) == 0
    assert fetched() == TAKEN
    assert len(server.paths("cdn")) == 1


@pytest.mark.usefixtures("server")
def test_the_library_finds_what_was_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["models", "fetch"]) == 0
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    from huggingface_hub import snapshot_download

    assert Path(snapshot_download(NAME, revision=REVISION, cache_dir=hub.cache())) == hub.snapshot(MODEL)


def test_a_folder_needs_no_fetching_and_says_so(server: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    make_tiny_llama(Path("mine"))
    params = YAML(typ="safe").load(Path("params.yaml"))
    params["teacher"]["model"] = params["student"]["model"] = {"source": "folder", "path": "mine"}
    YAML().dump(params, Path("params.yaml"))
    assert main(["models", "fetch"]) == 0
    assert "teacher: mine (a local folder, nothing to fetch)" in capsys.readouterr().err
    assert server.asked == []


def fetch_process(server: Hub, tmp_path: Path) -> subprocess.Popen[str]:
    """`kd models fetch` on its own, told of mirror, cache and token as a user would tell it."""
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "HF_ENDPOINT": server.url,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
    }
    command = [sys.executable, "-m", "kd.cli", "models", "fetch"]
    return subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)


def test_a_killed_fetch_goes_on_where_it_stopped(server: Hub, tmp_path: Path) -> None:
    started, released = threading.Event(), threading.Event()

    def stall(request: BaseHTTPRequestHandler, body: bytes) -> None:
        if FIRST not in request.path:
            send(request, body)
            return
        request.send_response(200)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body[:600_000])
        request.wfile.flush()
        started.set()
        released.wait(30)

    server.reply = stall
    process = fetch_process(server, tmp_path)
    assert started.wait(30)
    (part,) = until(lambda: [p for p in hub.repository(MODEL).glob("blobs/*.part") if p.stat().st_size >= 500_000])
    process.send_signal(signal.SIGKILL)
    process.communicate()
    released.set()
    kept = part.stat().st_size
    assert not hub.is_cached(MODEL)
    assert FIRST not in fetched()

    server.reply = send
    again = fetch_process(server, tmp_path)
    error = again.communicate(timeout=60)[1]
    assert again.returncode == 0, error
    assert fetched() == TAKEN
    assert [asked.range for asked in server.asked if asked.host == "cdn"][-1] == f"bytes={kept}-"
    assert len([path for path in server.paths("cdn") if SECOND in path]) == 1
    assert TOKEN not in error


def test_two_at_once_fetch_each_file_once(server: Hub, tmp_path: Path) -> None:
    processes = [fetch_process(server, tmp_path) for _ in range(2)]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert fetched() == TAKEN
    assert blobs() == {"whole"}
    assert len(server.paths("cdn")) == 2


def until(found: Callable[[], list[Path]]) -> list[Path]:
    """What `found` finds once it finds something."""
    for _ in range(300):
        if paths := found():
            return paths
        time.sleep(0.1)
    raise TimeoutError


def test_a_file_system_without_links_holds_the_files_themselves(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refused)
    server.refuse = 403  # as if killed before the first file
    assert main(["models", "fetch"]) == 2
    server.refuse = None
    assert main(["models", "fetch"]) == 0
    assert fetched() == TAKEN
    assert not any(path.is_symlink() for path in hub.repository(MODEL).rglob("*"))
    assert not blobs()  # there is room for one copy only
    (hub.snapshot(MODEL) / FIRST).unlink()
    server.asked.clear()
    assert main(["models", "fetch"]) == 0
    assert fetched() == TAKEN
    assert len(server.paths("cdn")) == 1
    from huggingface_hub import snapshot_download

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert Path(snapshot_download(NAME, revision=REVISION, cache_dir=hub.cache())) == hub.snapshot(MODEL)


@pytest.mark.usefixtures("server")
def test_a_cache_that_cannot_be_written_says_so_and_its_mend_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").write_text("a file")
    assert main(["models", "fetch"]) == 2
    assert f"{tmp_path / 'cache'} is no folder; set HF_HUB_CACHE to a folder of yours" in capsys.readouterr().err
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "another"))
    assert main(["models", "fetch"]) == 0
