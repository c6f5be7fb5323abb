"""Downloads from a local server: complete, interrupted, tampered with, and without support for ranges."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from camkd_fast.data import fetch as module
from camkd_fast.data.fetch import Published, RemoteFile, default_folder, fetch

CONTENT = {name: (name.encode() * 40_000)[: 300_000 + 7 * len(name)] for name in ("first.gz", "second.gz")}


class Server(ThreadingHTTPServer):
    """Serves `files` and records the requests. Its faults are attributes."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = dict(CONTENT)
        self.ranges = True  # answers Range with 206
        self.stop_after: int | None = None  # bytes of a body, then the connection closes
        self.shorter = False  # stop_after is sent as the content length
        self.status = 200
        self.requests: list[tuple[str, str | None]] = []  # path, Range

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/sets/"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def do_GET(self) -> None:
        server, requested = self.server, self.headers["Range"]
        server.requests.append((self.path, requested))
        content = server.files.get(self.path.removeprefix("/sets/"))
        if content is None or server.status != 200:
            self.send_error(404 if content is None else server.status)
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", requested)[1]) if requested and server.ranges else 0
        if start and start >= len(content):
            self.send_error(416)
            return
        body = content[start:]
        sent = body[: server.stop_after]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(sent if server.shorter else body)))
        self.end_headers()
        self.wfile.write(sent)


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def server(running: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server without faults, and a data set "tiny" of two files."""
    running.files, running.ranges, running.stop_after, running.shorter = dict(CONTENT), True, None, False
    running.status, running.requests = 200, []
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    files = tuple(RemoteFile(name, len(body), hashlib.md5(body).hexdigest()) for name, body in CONTENT.items())
    monkeypatch.setitem(module.SOURCES, "tiny", Published(running.url, files))
    return running


def contents(paths: tuple[Path, ...]) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in paths}


def test_files_are_complete_and_not_fetched_again(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    paths = fetch("tiny", tmp_path / "new" / "folder", progress=lambda *now: seen.append(now))
    assert contents(paths) == CONTENT
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == set(CONTENT)
    for name, body in CONTENT.items():
        counts = [now for file, now, size in seen if file == name and size == len(body)]
        assert counts == sorted(set(counts)) and counts[-1] == len(body) and len(counts) > 1
    server.requests.clear()
    assert fetch("tiny", tmp_path / "new" / "folder") == paths
    assert server.requests == []


def test_the_default_folder_and_a_mirror(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMKD_FAST_DATA", str(tmp_path))
    source = module.SOURCES["tiny"]
    monkeypatch.setitem(module.SOURCES, "tiny", Published("http://127.0.0.1:9/gone", source.files))
    paths = fetch("tiny", base_url=server.url.rstrip("/"))
    assert contents(paths) == CONTENT and paths[0].parent == tmp_path / "tiny" == default_folder("tiny")
    monkeypatch.delenv("CAMKD_FAST_DATA")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder("cifar10") == tmp_path / ".cache" / "camkd_fast" / "cifar10"


@pytest.mark.parametrize("shorter", [False, True], ids=["connection closed", "shorter file"])
@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_an_interrupted_download_is_kept_and_resumed(
    server: Server, tmp_path: Path, shorter: bool, ranges: bool
) -> None:
    server.stop_after, server.shorter, server.ranges = 100_000, shorter, ranges
    size = len(CONTENT["first.gz"])
    with pytest.raises(ConnectionError, match=rf"first\.gz ended after 100000 of {size} bytes"):
        fetch("tiny", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["first.gz.part"]
    assert (tmp_path / "first.gz.part").read_bytes() == CONTENT["first.gz"][:100_000]
    with pytest.raises(ConnectionError, match=rf"ended after {200_000 if ranges else 100_000} of {size} bytes"):
        fetch("tiny", tmp_path)
    server.stop_after = None
    server.requests.clear()
    assert contents(fetch("tiny", tmp_path)) == CONTENT
    assert server.requests[0][1] == f"bytes={200_000 if ranges else 100_000}-"
    assert server.requests[1][1] is None
    assert {path.name for path in tmp_path.iterdir()} == set(CONTENT)


@given(have=st.integers(0, len(CONTENT["first.gz"])), ranges=st.booleans())
def test_any_part_of_the_file_is_resumed(
    running: Server, tmp_path_factory: pytest.TempPathFactory, have: int, ranges: bool
) -> None:
    running.files, running.ranges, running.stop_after, running.status = dict(CONTENT), ranges, None, 200
    body = CONTENT["first.gz"]
    folder = tmp_path_factory.mktemp("part")
    (folder / "first.gz.part").write_bytes(body[:have])
    file = RemoteFile("first.gz", len(body), hashlib.md5(body).hexdigest())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "127.0.0.1")
        patch.setitem(module.SOURCES, "one", Published(running.url, (file,)))
        assert contents(fetch("one", folder)) == {"first.gz": body}


def test_a_tampered_file_is_refused_and_removed(server: Server, tmp_path: Path) -> None:
    right = CONTENT["second.gz"]
    wrong = right[:1000] + b"!" + right[1001:]
    server.files["second.gz"] = wrong
    digests = (
        rf"second\.gz has MD5 {hashlib.md5(wrong).hexdigest()}, the published file {hashlib.md5(right).hexdigest()}"
    )
    with pytest.raises(ValueError, match=digests):
        fetch("tiny", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["first.gz"]
    server.files["second.gz"] = right
    assert contents(fetch("tiny", tmp_path)) == CONTENT


def test_a_longer_file_is_refused_and_removed(server: Server, tmp_path: Path) -> None:
    right = CONTENT["first.gz"]
    server.files["first.gz"] = right + b"more"
    with pytest.raises(ValueError, match=rf"sent at least {len(right) + 4} bytes, the published file has {len(right)}"):
        fetch("tiny", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_partial_data_of_another_file_is_removed(server: Server, tmp_path: Path) -> None:
    right = CONTENT["first.gz"]
    part = tmp_path / "first.gz.part"
    part.write_bytes(b"x" * 10)  # resumed, the checksum is wrong
    with pytest.raises(ValueError, match="refused and removed"):
        fetch("tiny", tmp_path)
    assert not part.exists()
    part.write_bytes(b"x" * (len(right) + 1))  # longer than the file
    assert contents(fetch("tiny", tmp_path)) == CONTENT
    (tmp_path / "first.gz").unlink()
    part.write_bytes(right[:-1])  # the server's file is shorter than the partial data
    server.files["first.gz"] = right[:-5]
    with pytest.raises(ConnectionError, match="status 416"):
        fetch("tiny", tmp_path)
    assert not part.exists()


def test_an_existing_file_that_differs_is_not_overwritten(server: Server, tmp_path: Path) -> None:
    (tmp_path / "first.gz").write_bytes(b"mine")
    with pytest.raises(ValueError, match=rf"first\.gz has MD5 {hashlib.md5(b'mine').hexdigest()}, .* move it away"):
        fetch("tiny", tmp_path)
    assert (tmp_path / "first.gz").read_bytes() == b"mine" and server.requests == []


def test_error_status_and_refused_connection_are_one_line(server: Server, tmp_path: Path) -> None:
    server.status = 503
    with pytest.raises(ConnectionError, match=r"first\.gz: status 503"):
        fetch("tiny", tmp_path)
    server.status = 200
    del server.files["first.gz"]
    with pytest.raises(ConnectionError, match=r"first\.gz: status 404 Not Found"):
        fetch("tiny", tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as closed:
        port = closed.server_port
    with pytest.raises(ConnectionError, match=rf"127\.0\.0\.1:{port}/first\.gz: .*refused"):
        fetch("tiny", tmp_path, base_url=f"http://127.0.0.1:{port}")
    assert list(tmp_path.iterdir()) == []


def test_names_and_addresses_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only cifar10, cifar100, fashion-mnist can be fetched, got 'imagenet'"):
        fetch("imagenet", tmp_path)
    with pytest.raises(ValueError, match="must begin with https:// or http://, got file:///etc/"):
        fetch("cifar10", tmp_path, base_url="file:///etc")
    for source in module.SOURCES.values():
        assert source.base_url.startswith("https://") and source.base_url.endswith("/")
        assert all(re.fullmatch(r"[0-9a-f]{32}", file.md5) and file.size > 5000 for file in source.files)
