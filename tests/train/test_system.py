"""`camkd_fast.system`: every function under the systems that lack what it asks for."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from camkd_fast import system
from camkd_fast.experiments.study.spec import Student
from camkd_fast.train.atomic import write_atomically
from tests.support import systems

MEMORY = (
    [systems.unknown_free_pages, systems.no_proc],
    [systems.sysconf_knows_nothing, systems.no_proc],
    [systems.no_sysconf, systems.no_proc],
    [systems.no_sysconf, systems.unreadable_proc],
    [systems.no_sysconf],
    [systems.no_proc],
)


@pytest.mark.parametrize("missing", MEMORY, ids=lambda missing: "+".join(f.__name__ for f in missing))
def test_memory_is_a_number_whatever_the_system_counts(missing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for facility in missing:
        facility(monkeypatch)
    free = system.available_memory()
    assert isinstance(free, int) and 0 < free <= max(total, system.ASSUMED_MEMORY)
    if missing[0] is systems.unknown_free_pages:
        assert free == total // 2
    elif len(missing) == 2:
        assert free == system.ASSUMED_MEMORY


V2 = {"memory.max": "1000\n", "memory.current": "700\n", "memory.stat": "anon 300\ninactive_file 250\n"}
V1 = {
    "memory/memory.limit_in_bytes": "1000\n",
    "memory/memory.usage_in_bytes": "900\n",
    "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 50\n",
}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        (V2, 550),
        (V1, 150),
        ({**V2, "memory.stat": ""}, 300),
        ({**V2, "memory.current": "2000\n"}, 0),
        ({**V2, "memory.max": "max\n"}, 4096),
        ({**V1, "memory/memory.limit_in_bytes": "9223372036854771712\n"}, 4096),
        ({}, 4096),
    ],
)
def test_memory_of_a_container(files: dict[str, str], free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:  4 kB\n"}
    contents |= {f"/sys/fs/cgroup/{name}": text for name, text in files.items()}

    def fake(path: str, **more: Any) -> io.StringIO:
        if path not in contents:
            raise FileNotFoundError(path)
        return io.StringIO(contents[path])

    monkeypatch.setattr("builtins.open", fake)
    assert system.available_memory() == free


def test_memory_of_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    import ctypes
    from types import SimpleNamespace

    def status(pointer: Any) -> int:
        size, total, free = pointer._obj[0], 16 << 30, 5 << 30
        assert size == 64
        pointer._obj[1], pointer._obj[2] = total, free
        return 1

    for facility in (systems.no_sysconf, systems.no_proc):
        facility(monkeypatch)
    kernel = SimpleNamespace(GlobalMemoryStatusEx=status)
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel), raising=False)
    assert system.available_memory() == 5 << 30
    kernel.GlobalMemoryStatusEx = lambda pointer: 0
    assert system.available_memory() == system.ASSUMED_MEMORY


def test_machine(other_system: str) -> None:
    assert system.processors() >= 1 and system.load_average() >= 0.0 and system.processor_name()


def test_files_are_written_atomically(other_system: str, tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "file").write_text("x")
    system.link_folder(tmp_path / "link", tmp_path / "target")
    assert (tmp_path / "link" / "file").read_text() == "x"


@pytest.mark.parametrize("refusals", [0, 1, 4, 5])
def test_windows_replaces_a_file_after_its_readers(
    refusals: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, calls = os.replace, []

    def refusing(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) <= refusals:
            raise PermissionError(errno.EACCES, "The process cannot access the file")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refusing)
    monkeypatch.setattr(system.time, "sleep", lambda seconds: None)
    if refusals:
        with pytest.raises(PermissionError):
            write_atomically(tmp_path / "here", b"x")  # another reason than readers
        assert len(calls) == 1 and list(tmp_path.iterdir()) == []
        calls.clear()
    systems.no_fcntl(monkeypatch)
    if refusals < 5:
        write_atomically(tmp_path / "file", b"x")
        assert (tmp_path / "file").read_bytes() == b"x"
    else:
        with pytest.raises(PermissionError):
            write_atomically(tmp_path / "file", b"x")


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_an_error_of_the_disk_is_no_missing_facility(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", systems.raising(OSError(number, os.strerror(number))))
    with pytest.raises(OSError, match=os.strerror(number)):
        system.sync_folder(tmp_path)


# --- paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("~", "/home/me"),
        ("~/runs/a", "/home/me/runs/a"),
        ("$DATA", "/big disk"),
        ("$DATA/x", "/big disk/x"),
        ("${DATA}x/$NUMBER-$NUMBER", "/big diskx/7-7"),
        ("a~b/~c", "a~b/~c"),
        ("./~", "~"),
        ("cost$5/$", "cost$5/$"),
        ("$$DATA/$${X}", "$DATA/${X}"),
        ("$TILDE/x", "~/x"),  # a value is not expanded again
        ("plain/ümläut", "plain/ümläut"),
        (".", "."),
    ],
)
def test_paths_are_expanded(text: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HOME": "/home/me", "DATA": "/big disk", "NUMBER": "7", "TILDE": "~"}.items():
        monkeypatch.setenv(name, value)
    assert system.expand_path(text) == Path(path)
    assert system.expand_path(system.quote_path(Path(path))) == Path(path)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("$NOT_SET/x", "NOT_SET"),
        ("a/${NOT_SET}", "NOT_SET"),
        ("${}", "variable ${} of"),
        ("${A B}", "A B"),
        ("~no-such-user/x", "~no-such-user"),
    ],
)
def test_what_cannot_be_expanded_is_named(text: str, name: str) -> None:
    with pytest.raises(ValueError, match="is not") as caught:
        system.expand_path(text)
    assert name in str(caught.value) and repr(text) in str(caught.value)


@pytest.mark.parametrize("name", ["con", "aux", "nul.1", "com1", "lpt9.x", "teacher."])
def test_names_that_windows_refuses(name: str) -> None:
    assert not system.is_portable_name(name) and not system.is_portable_name(name.upper())
    with pytest.raises(ValueError, match=f"which Windows refuses for '{name}'"):
        Student(name)
    for other in ("conv", "a.con", "resnet8", "com", "auxiliary", "1.5"):
        Student(other)


# --- signals and streams ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU"])
def test_signals_stop_once_and_handlers_are_restored(name: str) -> None:
    number = getattr(signal, name)
    with pytest.raises(system.Stopped, match=f"stopped by {name}") as caught, system.stop_signals():
        os.kill(os.getpid(), number)
    assert caught.value.status == 128 + number and not isinstance(caught.value, Exception)
    assert signal.getsignal(number) == signal.SIG_DFL


def test_ignored_signals_stay_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with system.stop_signals():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signals_of_other_systems_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    from threading import Thread

    systems.no_unix_signals(monkeypatch)
    with system.stop_signals():
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    entered = []

    def enter() -> None:
        with system.stop_signals():
            entered.append(signal.getsignal(signal.SIGTERM))

    thread = Thread(target=enter)
    thread.start()
    thread.join()
    assert entered == [signal.SIG_DFL] and system.is_running(os.getpid()) is None


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "cp437"])
def test_unprintable_characters_do_not_stop_a_command(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    systems.encoded(encoding)(monkeypatch)
    system.tolerate_unprintable()
    print("├── π ümläut")
    sys.stdout.flush()
    assert b"ml" in sys.stdout.buffer.getvalue()
