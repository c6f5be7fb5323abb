"""Locks of folders: one holder at a time, named; gone with its process; on every kind of file system."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from camkd_fast import system
from camkd_fast.train import folder_lock
from camkd_fast.train.folder_lock import FolderLock, FolderLockedError, Holder, check_free, locked, shared
from tests.support import systems

ROOT = Path(__file__).parents[2]
NO_LOCKS = {
    "kernel": lambda patch: None,
    "no flock": systems.no_file_locks(errno.ENOSYS),
    "nolock": systems.no_file_locks(errno.ENOLCK),
    "no module": systems.no_locks_at_all,
    "msvcrt": systems.windows_locks,
}


@pytest.fixture(params=NO_LOCKS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    NO_LOCKS[request.param](monkeypatch)
    return str(request.param)


def holder_of(folder: Path) -> Path:
    """The file that names the holder."""
    claim = folder / ".lock.claim"
    return claim if claim.exists() else folder / ".lock"


def test_one_holder_at_a_time(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    with locked(folder):
        words = rf"run is being written by process {os.getpid()} on {socket.gethostname()} since 20\d\d-.*: wait until"
        for _ in range(2):  # a refused attempt leaves the lock as it is
            with pytest.raises(FolderLockedError, match=words), locked(folder):
                pass
        with pytest.raises(FolderLockedError):
            check_free(folder)
        with locked(folder, ".other"):  # independent
            pass
    assert list(tmp_path.iterdir()) == []
    check_free(folder)
    with locked(folder):
        (folder / "file").touch()
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_a_lock_is_released_if_the_processes_cannot_agree(kind: str, tmp_path: Path) -> None:
    class Lost:
        is_main = True

        def on_main(self, work: Callable[[], Holder | None]) -> Holder | None:
            assert work() is None  # rank 0 holds the lock
            raise RuntimeError("connection closed by peer")

    with pytest.raises(RuntimeError, match="closed by peer"), shared(tmp_path, world=Lost()):  # type: ignore[arg-type]
        pass
    with locked(tmp_path):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_errors_of_a_lock_leave_no_file_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    before = len(os.listdir("/proc/self/fd"))
    for owner, name in ((system, "try_lock"), (Holder, "read")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fails)
            with pytest.raises(OSError, match="Input/output"):
                FolderLock(tmp_path).acquire()
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_block_may_fail(kind: str, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), locked(tmp_path):
        raise KeyboardInterrupt
    with locked(tmp_path):
        pass


def test_threads_get_the_lock_one_after_the_other(kind: str, tmp_path: Path) -> None:
    inside, seen = [], []

    def work(number: int) -> None:
        with shared(tmp_path):
            inside.append(number)
            seen.append(len(inside))
            time.sleep(0.01)
            inside.remove(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [1, 1, 1, 1] and list(tmp_path.iterdir()) == []


def test_a_folder_that_its_last_holder_removes(kind: str, tmp_path: Path) -> None:
    """Between the creation of a folder and of its lock file, another process may remove the folder."""
    failures = []

    def work() -> None:
        try:
            for _ in range(60):
                with shared(tmp_path / "a" / "b"):
                    pass
        except OSError as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def left_by(folder: Path, holder: Holder, claim: bool) -> None:
    """The files of a holder that was killed."""
    (folder / ".lock").write_text("" if claim else json.dumps(holder.__dict__))
    if claim:
        (folder / ".lock.claim").write_text(json.dumps(holder.__dict__))


def dead_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


ENDED = {
    "dead": lambda: Holder(dead_process(), socket.gethostname(), "then", "t"),
    "same pid": lambda: Holder(os.getpid(), socket.gethostname(), "then", "t"),  # a container that was started again
    "long silent": lambda: Holder(os.getppid(), socket.gethostname(), "then", "t"),  # the pid is in use again
    "other machine": lambda: Holder(4711, "node-7", "then", "t"),
}


@pytest.mark.parametrize("kind", ["kernel", "no flock", "no module"], indirect=True)
@pytest.mark.parametrize("ended", ENDED)
def test_the_lock_of_a_dead_process_is_taken_over(kind: str, ended: str, tmp_path: Path) -> None:
    left_by(tmp_path, ENDED[ended](), claim=kind != "kernel")
    if ended in ("long silent", "other machine"):
        old = time.time() - 2 * folder_lock.SILENCE
        os.utime(holder_of(tmp_path), (old, old))
    with locked(tmp_path):
        assert json.loads(holder_of(tmp_path).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["kernel", "no flock"], indirect=True)
def test_a_living_holder_on_another_machine_is_respected(kind: str, tmp_path: Path) -> None:
    left_by(tmp_path, Holder(4711, "node-7", "2026-01-01", "t"), claim=kind != "kernel")
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    for _ in range(2):
        with (
            pytest.raises(FolderLockedError, match=r"process 4711 on node-7 since 2026-01-01.*120 seconds after"),
            locked(tmp_path),
        ):
            pass
    claimed = holder_of(tmp_path)
    assert (claimed.read_bytes(), claimed.stat().st_mtime_ns) == before[claimed.name]  # no sign of life for it


def test_a_holder_gives_signs_of_life(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "BEAT", 0.01)
    with locked(tmp_path):
        os.utime(holder_of(tmp_path), (1.0, 1.0))
        deadline = time.monotonic() + 20
        while holder_of(tmp_path).stat().st_mtime < 1e9:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_damaged_lock_file_is_no_holder(tmp_path: Path) -> None:
    for content in (b"", b"{", b"[1]", b'{"pid": 1, "colour": 2}', b'{"pid": "x"}', b"\xff\xfe"):
        (tmp_path / ".lock").write_bytes(content)
        with locked(tmp_path):
            pass
    (tmp_path / ".lock").write_bytes(b"{")
    with (tmp_path / ".lock").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(FolderLockedError, match="by another process"), locked(tmp_path):
            pass


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_a_folder_that_nobody_can_write_needs_no_lock(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "open_lock_file", systems.raising(OSError(number, os.strerror(number))))
    with locked(tmp_path), locked(tmp_path):
        assert list(tmp_path.iterdir()) == []
    (tmp_path / ".lock").touch()  # of somebody who can write
    with pytest.raises(OSError, match=os.strerror(number)), locked(tmp_path):
        pass


HOLD = """
import os, sys, time
from pathlib import Path
from camkd_fast.train.folder_lock import locked
with locked(Path(sys.argv[1])):
    if os.fork() == 0:  # as a loader's process, which outlives a killed parent for some seconds
        time.sleep(60)
    print("held", flush=True)
    time.sleep(60)
"""


def test_kill_releases_the_lock_and_forks_do_not_keep_it(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(FolderLockedError, match=f"by process {process.pid} on"), locked(tmp_path):
            pass
        process.kill()
        process.wait()
        lock = FolderLock(tmp_path)
        assert lock.acquire() is None
        lock.release()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
