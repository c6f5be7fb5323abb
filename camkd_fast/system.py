"""What differs between operating systems, behind functions that ask before they use a facility.

The only module of the package that names such facilities; the others import it. Needs only the standard library.
"""

from __future__ import annotations

import errno
import importlib
import os
import platform
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

ASSUMED_MEMORY = 4 << 30  # bytes, if the system does not report its memory
CLOSED_PIPE_STATUS = 128 + 13  # of a process that SIGPIPE ended, as shells report it


def _module(name: str) -> Any:
    """A module of the standard library that some systems lack; None there."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _errors(*names: str) -> set[int]:
    """Numbers of the errors that this system has."""
    return {getattr(errno, name) for name in names if hasattr(errno, name)}


# --- machine ---------------------------------------------------------------------------------------------------------


def available_memory() -> int:
    """Bytes of memory that a process may take without paging; an estimate on systems that do not count them."""
    free = _table("/proc/meminfo").get("MemAvailable:")
    if free is not None:
        return min([free * 1024, *_container_memory()])
    page = _sysconf("SC_PAGE_SIZE")
    if free := page * _sysconf("SC_AVPHYS_PAGES"):
        return free
    if free := _windows_memory():
        return free
    # macOS counts pages, but not the free ones. It keeps files in most of what programs leave.
    return page * _sysconf("SC_PHYS_PAGES") // 2 or ASSUMED_MEMORY


def _table(path: str) -> dict[str, int]:
    """The first number after each name in a file of Linux; empty if it cannot be read."""
    numbers = {}
    with suppress(OSError), open(path, encoding="ascii", errors="replace") as lines:
        for words in map(str.split, lines):
            with suppress(ValueError, IndexError):
                numbers[words[0]] = int(words[-1] if len(words) == 1 else words[1])
    return numbers


# Files of a control group, version 2 and 1: limit, use, and what of the use is cached files that can be dropped.
_CONTROL_GROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def _container_memory() -> list[int]:
    """Bytes that the container may take in addition, for each kind of limit that it has."""
    free = []
    for *files, name in _CONTROL_GROUPS:
        limit, used, statistics = (_table(f"/sys/fs/cgroup/{file}") for file in files)
        if limit and used:  # otherwise there is no container, or no limit
            free.append(max(sum(limit.values()) - sum(used.values()) + statistics.get(name, 0), 0))
    return free


def _sysconf(name: str) -> int:
    """A value of sysconf; 0 if the system does not know it."""
    ask = getattr(os, "sysconf", None)
    if ask is None:
        return 0
    try:
        return max(int(ask(name)), 0)
    except (ValueError, OSError):
        return 0


def _windows_memory() -> int:
    ctypes = _module("ctypes")
    if ctypes is None or not hasattr(ctypes, "windll"):
        return 0
    # struct MEMORYSTATUSEX: its length, the load in percent, then seven sizes; the second one is the free memory.
    status = (ctypes.c_uint64 * 8)()
    status[0] = ctypes.sizeof(status)
    return int(status[2]) if ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)) else 0


def processors() -> int:
    """Processors that this process may use."""
    ask = getattr(os, "sched_getaffinity", None)
    if ask is not None:
        with suppress(OSError):
            return len(ask(0))
    return os.cpu_count() or 1


def load_average() -> float:
    """Processes that ran or waited in the last minute; 0.0 if the system does not count them."""
    ask = getattr(os, "getloadavg", None)
    if ask is not None:
        with suppress(OSError):
            return float(ask()[0])
    return 0.0


def processor_name() -> str:
    """Name of the processor, if the system provides it."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# --- files -----------------------------------------------------------------------------------------------------------

# Folders cannot be opened (Windows), or the file system has no fsync for them (some network file systems).
_NO_FOLDER_SYNC = _errors("EACCES", "EPERM", "EISDIR", "EINVAL", "EBADF", "ENOSYS", "ENOTSUP")


def sync_folder(path: Path) -> None:
    """fsync a folder, after which renames in it are durable; nothing where the system cannot.

    Raises:
        OSError: the disk reports an error or is full.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise


def replace(source: Path, target: Path) -> None:
    """os.replace. Windows refuses it while another process reads the target, which this waits for, 1.5 s at most.

    Raises:
        OSError: as os.replace.
    """
    for pause in (0.1, 0.2, 0.4, 0.8):
        try:
            return os.replace(source, target)
        except PermissionError:
            if _module("fcntl") is not None:
                raise
            time.sleep(pause)
    return os.replace(source, target)


def link_folder(link: Path, target: Path) -> None:
    """Make `link` a symbolic link to a folder; a copy of the folder where links are not allowed."""
    try:
        link.symlink_to(target, target_is_directory=True)
    except (OSError, NotImplementedError):
        shutil.copytree(target, link)


_DEVICES = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?", re.IGNORECASE)


def is_portable_name(name: str) -> bool:
    """Whether every system accepts this name, of letters, digits, dots and dashes, for a folder."""
    return not name.endswith(".") and not _DEVICES.fullmatch(name)


_VARIABLE = re.compile(r"\$(?:(\$)|\{([^}]*)\}|([A-Za-z_]\w*))")


def expand_path(text: str) -> Path:
    """The path with `~`, `~user`, `$NAME` and `${NAME}` replaced; `$$` is a dollar sign.

    Raises:
        ValueError: a variable is not set, or a home folder is not known; the message names it.
    """

    def value(match: re.Match[str]) -> str:
        if match[1]:
            return "$"
        name = match[2] if match[3] is None else match[3]
        if name not in os.environ:
            raise ValueError(f"the environment variable {name or match[0]} of the path {text!r} is not set")
        return os.environ[name]

    home, separator, rest = text, "", ""
    if text.startswith("~"):
        end = min((text.find(mark) for mark in ("/", os.sep) if mark in text), default=len(text))
        home, separator, rest = text[:end], text[end : end + 1], text[end + 1 :]
        expanded = os.path.expanduser(home)
        if expanded == home:
            raise ValueError(f"the home folder {home!r} of the path {text!r} is not known")
        return Path(expanded + separator + _VARIABLE.sub(value, rest))
    return Path(_VARIABLE.sub(value, text))


def utf8_text(path: Path) -> str:
    """A file's text.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not UTF-8; the message has its name.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from error


def quote_path(path: Path) -> str:
    """The text from which `expand_path` gives `path`."""
    text = str(path).replace("$", "$$")
    return f".{os.sep}{text}" if text.startswith("~") else text


# --- locks -----------------------------------------------------------------------------------------------------------

_BUSY = _errors("EACCES", "EAGAIN", "EDEADLK", "EDEADLOCK")
_NO_LOCKS = _errors("ENOSYS", "ENOTSUP", "EOPNOTSUPP", "ENOLCK", "EINVAL", "EBADF")
_LOCKED_BYTE = 1 << 20  # Windows keeps others from reading locked bytes, so lock one behind the content

_inherited: set[int] = set()  # descriptors that forked processes close, or they would hold the parent's locks


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file until it is closed, or until the process ends in any way.

    Returns:
        False if another process or another descriptor holds the lock; None if system or file system has no locks.

    Raises:
        OSError: the file cannot be locked for another reason.
    """
    try:
        if fcntl := _module("fcntl"):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif msvcrt := _module("msvcrt"):
            os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            return None
    except OSError as error:
        if error.errno in _BUSY:
            return False
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def open_lock_file(path: Path, new: bool = False) -> int:
    """Descriptor of a file for reading and writing, created if missing; forked processes do not keep it.

    Raises:
        FileExistsError: `new` is set, and the file exists.
        OSError: it cannot be opened.
    """
    flags = os.O_RDWR | os.O_CREAT | (os.O_EXCL if new else 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags, 0o666)
    _close_in_forks()
    _inherited.add(descriptor)
    return descriptor


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open lock file is the file at `path`, and not one that was removed since."""
    if _module("fcntl") is None:
        return path.exists()  # Windows removes no open files
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def close_lock_file(descriptor: int) -> None:
    _inherited.discard(descriptor)
    os.close(descriptor)


@cache
def _close_in_forks() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_close_inherited)


def _close_inherited() -> None:
    while _inherited:
        with suppress(OSError):
            os.close(_inherited.pop())


def is_running(pid: int) -> bool | None:
    """Whether a process of this machine exists; None if that cannot be asked."""
    if not hasattr(signal, "SIGKILL"):
        return None  # Windows, where os.kill ends the process whatever the signal
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # of another user
    return True


# --- signals and streams ---------------------------------------------------------------------------------------------

_STOPS = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU", "SIGBREAK")  # of schedulers, closed terminals, Windows consoles


class Stopped(BaseException):
    """A signal that ends a process arrived. Like KeyboardInterrupt, no error."""

    def __init__(self, number: int) -> None:
        self.name, self.status = signal.Signals(number).name, 128 + number
        super().__init__(f"stopped by {self.name}")


@contextmanager
def stop_signals() -> Iterator[None]:
    """Raise `Stopped` in the block for signals that would end the process; the second one does end it."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Stopped(number)

    replaced = []
    for number in (getattr(signal, name, None) for name in _STOPS):
        # Others than the default are the caller's, or nohup's.
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:
            with suppress(ValueError, OSError):  # not the main thread, or not a signal that can be handled
                signal.signal(number, stop)
                replaced.append(number)
    try:
        yield
    finally:
        for number in replaced:
            signal.signal(number, signal.SIG_DFL)


def end_on_interrupt() -> None:
    """Let Ctrl-C end this process without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def tolerate_unprintable() -> None:
    """Let stdout and stderr print `?` for characters that their encoding lacks, instead of raising an error."""
    for stream in _streams():
        encoding = (getattr(stream, "encoding", None) or "utf-8").lower().replace("-", "").replace("_", "")
        if encoding != "utf8" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def flush_output() -> None:
    """Flush stdout.

    Raises:
        BrokenPipeError: its reader has closed it.
    """
    if sys.stdout is not None and not sys.stdout.closed:
        try:
            sys.stdout.flush()
        except OSError as error:
            if is_closed_pipe(error):
                raise BrokenPipeError(error.errno, error.strerror) from error
            raise


def is_closed_pipe(error: BaseException) -> bool:
    """Whether a write failed because the reader of stdout or stderr has gone, as `head` does."""
    # Windows says "invalid argument", without the name that such an error of a file has.
    return isinstance(error, BrokenPipeError) or (
        type(error) is OSError and error.errno == errno.EINVAL and error.filename is None and not _has_broken_pipes()
    )


def _has_broken_pipes() -> bool:
    return hasattr(signal, "SIGPIPE")


def discard_output() -> None:
    """Send what stdout and stderr have buffered for a closed pipe nowhere; otherwise Python reports it at its exit."""
    for stream in _streams():
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())


def _streams() -> list[TextIO]:
    return [stream for stream in (sys.stdout, sys.stderr) if stream is not None]
