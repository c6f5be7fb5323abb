"""Other operating systems, emulated on Linux: what they lack is taken away, what they refuse raises their errors."""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
import stat
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from camkd_fast import system

Patch = pytest.MonkeyPatch
Facility = Callable[[Patch], None]


def raising(error: BaseException) -> Callable[..., Any]:
    def call(*arguments: Any, **more: Any) -> Any:
        raise error

    return call


# --- machine ---------------------------------------------------------------------------------------------------------


def unknown_free_pages(patch: Patch) -> None:
    """macOS: sysconf has no SC_AVPHYS_PAGES."""
    ask = os.sysconf

    def sysconf(name: str) -> int:
        if name == "SC_AVPHYS_PAGES":
            raise ValueError("unrecognized configuration name")
        return ask(name)

    patch.setattr(os, "sysconf", sysconf)


def sysconf_knows_nothing(patch: Patch) -> None:
    patch.setattr(os, "sysconf", lambda name: -1)


def no_sysconf(patch: Patch) -> None:
    patch.delattr(os, "sysconf")


def no_proc(patch: Patch) -> None:
    def hiding(call: Callable[..., Any]) -> Callable[..., Any]:
        def hidden(path: Any, *arguments: Any, **more: Any) -> Any:
            if isinstance(path, (str, Path)) and str(path).startswith(("/proc", "/sys")):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
            return call(path, *arguments, **more)

        return hidden

    patch.setattr(builtins, "open", hiding(builtins.open))
    patch.setattr(io, "open", hiding(io.open))


def unreadable_proc(patch: Patch) -> None:
    """A hardened container."""
    call = builtins.open

    def guarded(path: Any, *arguments: Any, **more: Any) -> Any:
        if str(path).startswith("/proc"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return call(path, *arguments, **more)

    patch.setattr(builtins, "open", guarded)


def no_affinity(patch: Patch) -> None:
    patch.delattr(os, "sched_getaffinity")


def no_load(patch: Patch) -> None:
    patch.delattr(os, "getloadavg")


def unknown_load(patch: Patch) -> None:
    patch.setattr(os, "getloadavg", raising(OSError("Load averages are unobtainable")))


# --- files and locks -------------------------------------------------------------------------------------------------


def folders_do_not_open(patch: Patch) -> None:
    """Windows."""
    call = os.open

    def guarded(path: Any, flags: int, *arguments: Any, **more: Any) -> int:
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return call(path, flags, *arguments, **more)

    patch.setattr(os, "open", guarded)


def folders_do_not_sync(patch: Patch) -> None:
    """Network file systems."""
    call = os.fsync

    def guarded(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        call(descriptor)

    patch.setattr(os, "fsync", guarded)


def no_links(patch: Patch) -> None:
    """Windows without developer mode."""
    patch.setattr(os, "symlink", raising(OSError(errno.EPERM, "A required privilege is not held by the client")))


def no_fcntl(patch: Patch) -> None:
    patch.setitem(sys.modules, "fcntl", None)


def windows_locks(patch: Patch) -> None:
    """msvcrt.locking in place of fcntl; open lock files can be neither removed nor renamed."""
    no_fcntl(patch)
    locked: dict[tuple[int, int], int] = {}

    def locking(descriptor: int, mode: int, count: int) -> None:
        assert (mode, count) == (2, 1) and os.lseek(descriptor, 0, os.SEEK_CUR) > 4096
        file = os.fstat(descriptor)
        if locked.setdefault((file.st_dev, file.st_ino), descriptor) != descriptor:
            raise PermissionError(errno.EACCES, "Permission denied")

    def close(descriptor: int) -> None:
        for key, holder in list(locked.items()):
            if holder == descriptor:
                del locked[key]
        really_close(descriptor)

    def unlink(path: Any, **more: Any) -> None:
        if any(os.path.samestat(os.fstat(d), os.stat(path)) for d in system._inherited if os.path.exists(path)):
            raise PermissionError(errno.EACCES, "The process cannot access the file", str(path))
        really_unlink(path, **more)

    really_close, really_unlink = os.close, os.unlink
    patch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(locking=locking, LK_NBLCK=2))
    patch.setattr(os, "close", close)
    patch.setattr(os, "unlink", unlink)


def no_file_locks(number: int) -> Facility:
    """A file system without locks: NFS mounted nolock, Lustre, some FUSE ones."""

    def facility(patch: Patch) -> None:
        import fcntl

        patch.setattr(fcntl, "flock", raising(OSError(number, os.strerror(number))))

    return facility


def no_locks_at_all(patch: Patch) -> None:
    no_fcntl(patch)
    patch.setitem(sys.modules, "msvcrt", None)


# --- processes and signals -------------------------------------------------------------------------------------------


def no_fork(patch: Patch) -> None:
    patch.delattr(os, "fork")
    patch.delattr(os, "register_at_fork")
    system._close_in_forks.cache_clear()


def no_unix_signals(patch: Patch) -> None:
    """Windows, where os.kill with any other signal ends the process."""
    for name in ("SIGKILL", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGPIPE", "SIGALRM"):
        patch.delattr(signal, name)
    patch.setattr(os, "kill", raising(AssertionError("os.kill ends processes here")))


# --- streams ---------------------------------------------------------------------------------------------------------


def encoded(encoding: str) -> Facility:
    """stdout that is redirected under another locale."""

    def facility(patch: Patch) -> None:
        patch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))

    return facility


SYSTEMS: dict[str, tuple[Facility, ...]] = {
    "macOS": (unknown_free_pages, no_proc, no_affinity, encoded("ascii")),
    "Windows": (
        no_sysconf, no_proc, no_affinity, no_load, folders_do_not_open, no_links, windows_locks, no_fork,
        no_unix_signals, encoded("cp1252"),
    ),
    "hardened container": (
        sysconf_knows_nothing, unreadable_proc, unknown_load, folders_do_not_sync, encoded("latin-1"),
    ),
    "Lustre": (no_file_locks(errno.ENOSYS), folders_do_not_sync),
    "no locks at all": (no_locks_at_all, no_sysconf, no_proc),
}  # fmt: skip


def become(name: str, patch: Patch) -> None:
    for facility in SYSTEMS[name]:
        facility(patch)
