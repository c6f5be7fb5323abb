"""Locks of folders that one process writes: run folders, exports, teacher caches, pieces of a study.

The operating system holds the lock, so it ends with its process, however that ends. The file `.lock` names the holder
and is removed with the lock. Two cases need more:

- Without locks of the file system (`.claim`), the file counts as long as its process exists.
- On network file systems locks may end at the machine's border, so a file of another machine counts as long as its
  holder touches it.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from .. import system
from .distributed import ONE, World

LOCK = ".lock"
BEAT = 15.0  # seconds between two signs of life
SILENCE = 120.0  # seconds without a sign of life after which a holder that cannot be asked counts as ended
PATIENCE = 10.0  # seconds in which the worker processes of an ended holder must end too
TRIES = 100  # of making a folder that others remove
_READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS}

_tokens: set[str] = set()  # of the locks that this process took


class FolderLockedError(RuntimeError):
    """Another process writes this folder."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock."""

    pid: int = 0  # 0: it has not written its name yet
    host: str = ""
    since: str = ""
    token: str = ""  # of this one lock

    @classmethod
    def here(cls) -> Holder:
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        return cls(os.getpid(), socket.gethostname(), since, secrets.token_hex(8))

    @classmethod
    def read(cls, descriptor: int) -> Holder | None:
        """The holder that a lock file names; None if it is empty or damaged."""
        os.lseek(descriptor, 0, os.SEEK_SET)
        return cls.parse(os.read(descriptor, 4096))

    @classmethod
    def parse(cls, content: bytes) -> Holder | None:
        try:
            found = cls(**json.loads(content))
        except (ValueError, TypeError):
            return None
        return found if isinstance(found.pid, int) else None

    def write(self, descriptor: int) -> None:
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(asdict(self)).encode())

    @property
    def is_here(self) -> bool:
        return self.host == socket.gethostname()

    @property
    def has_ended(self) -> bool:
        """Whether its process is known to be gone."""
        if not self.pid or not self.is_here:
            return False
        if self.pid == os.getpid():
            return self.token not in _tokens  # of an earlier process, as in a container that was started again
        return system.is_running(self.pid) is False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}" if self.pid else "another process"


class FolderLock:
    """The lock of a folder.

    Args:
        folder: created if missing; removed again on release if it is empty then.
        name: of the lock file; locks of different names are independent.
    """

    def __init__(self, folder: Path, name: str = LOCK) -> None:
        self.folder, self.path = folder, folder / name
        self._claim = self.path.with_name(f"{name}.claim")
        self._held: list[tuple[Path, int]] = []
        self._created: list[Path] = []
        self._ended = threading.Event()

    def acquire(self) -> Holder | None:
        """Take the lock if it is free, and return None; otherwise return its holder, at once.

        A folder that this process may not write is never locked: nothing will be written.

        Raises:
            OSError: the folder cannot be created, or the lock file cannot be opened.
        """
        self._make_folder()
        self._ended = threading.Event()
        try:
            holder = self._acquire()
        except BaseException:
            self.release()
            raise
        if holder is not None:
            self.release()
        elif self._held:
            threading.Thread(target=self._beat, args=(self._ended,), daemon=True).start()
        return holder

    def _acquire(self) -> Holder | None:
        while True:
            try:
                descriptor = system.open_lock_file(self.path)
            except FileNotFoundError:
                self._make_folder()  # its holder removed the folder meanwhile
                continue
            except OSError as error:
                if error.errno in _READ_ONLY and not self.path.exists():
                    return None
                raise
            try:
                locked = system.try_lock(descriptor)
                before = None if locked is None else Holder.read(descriptor)
            except BaseException:
                system.close_lock_file(descriptor)
                raise
            if locked is None:
                self._held.append((self.path, descriptor))
                try:
                    return self._acquire_claim()
                except FileNotFoundError:
                    self._let_go()  # its holder removed the folder meanwhile
                    self._make_folder()
                    continue
            if locked and not system.is_at(descriptor, self.path):
                system.close_lock_file(descriptor)  # its holder removed the file meanwhile
                continue
            if not locked and before is None:
                time.sleep(0.05)  # the holder writes its name right after it took the lock
                before = Holder.read(descriptor)
            if locked and (before is None or before.is_here or self._is_silent(self.path)):
                self._hold(self.path, descriptor, Holder.here())
                return None
            system.close_lock_file(descriptor)
            return before or Holder()

    def _acquire_claim(self) -> Holder | None:
        """Take the lock by creating a file, where the file system has no locks; the holder if another process has it.

        Raises:
            FileNotFoundError: the folder is gone.
        """
        me = Holder.here()
        for _ in range(5):
            try:
                descriptor = system.open_lock_file(self._claim, new=True)
            except FileExistsError:
                before = _holder(self._claim)
                if (before and before.has_ended) or self._is_silent(self._claim):
                    self._remove_claim(before, me.token)
                elif self._claim.exists():
                    return before or Holder()
            else:
                self._hold(self._claim, descriptor, me)
                return None
        return _holder(self._claim) or Holder()

    def _remove_claim(self, ended: Holder | None, token: str) -> None:
        """Remove the claim of an ended process. Renamed first, so that only one of several processes removes it."""
        renamed = self._claim.with_name(f"{self._claim.name}.{token}")
        with suppress(OSError):
            self._claim.rename(renamed)
            if _holder(renamed) == ended:
                renamed.unlink()
            else:  # of a process that was faster
                renamed.rename(self._claim)

    def _hold(self, path: Path, descriptor: int, me: Holder) -> None:
        self._held.append((path, descriptor))
        _tokens.add(me.token)
        me.write(descriptor)

    def _make_folder(self) -> None:
        missing = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        try:
            for _ in range(TRIES):
                with suppress(FileNotFoundError):  # another holder has removed a parent meanwhile
                    self.folder.mkdir(parents=True, exist_ok=True)
                    break
            else:
                self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(error.errno, f"cannot write the folder {self.folder}: {error.strerror}") from error
        self._created = [*missing, *self._created]

    def _is_silent(self, path: Path) -> bool:
        """Whether the file is there and its holder has not touched it for long, by the clock of the file system."""
        probe = path.with_name(f"{path.name}.now.{secrets.token_hex(4)}")
        try:
            probe.touch()
            now = probe.stat().st_mtime
            return now - path.stat().st_mtime > SILENCE
        except FileNotFoundError:
            return False
        finally:
            probe.unlink(missing_ok=True)

    def _beat(self, ended: threading.Event) -> None:
        while not ended.wait(BEAT):
            for path, _ in self._held:
                with suppress(OSError):
                    os.utime(path)

    def release(self) -> None:
        """Give the lock up, and remove its file and the folders that it created and nobody filled."""
        self._ended.set()
        self._let_go()
        for folder in self._created:
            with suppress(OSError):
                folder.rmdir()
        self._created = []

    def _let_go(self) -> None:
        """Remove the files that name this holder, and end its locks."""
        for path, descriptor in reversed(self._held):
            there = system.is_at(descriptor, path)
            with suppress(OSError):
                if there:
                    path.unlink()  # before the lock ends, or it could be the next holder's
                    there = False
            system.close_lock_file(descriptor)
            with suppress(OSError):
                if there:
                    path.unlink()  # Windows removes no open file, neither this process's nor the next holder's
        self._held = []


def _holder(path: Path) -> Holder | None:
    try:
        return Holder.parse(path.read_bytes())
    except OSError:
        return None


@contextmanager
def locked(folder: Path, name: str = LOCK) -> Iterator[None]:
    """Hold the lock of a folder in the block.

    Raises:
        FolderLockedError: another process holds it; the message names process, machine and start.
        OSError: the folder cannot be created.
    """
    lock = FolderLock(folder, name)
    started = time.monotonic()
    while holder := lock.acquire():
        if not holder.has_ended or time.monotonic() - started > PATIENCE:
            raise FolderLockedError(_refusal(folder, holder))
        time.sleep(0.1)  # worker processes end some seconds after their parent was killed
    try:
        yield
    finally:
        lock.release()


def _refusal(folder: Path, holder: Holder) -> str:
    ways = "wait until it ends, or choose another folder"
    if holder.pid and not holder.is_here:
        ways += f"; {SILENCE:.0f} seconds after it was killed the folder is free"
    return f"{folder} is being written by {holder}: {ways}"


def check_free(folder: Path) -> None:
    """Check that nobody holds the lock of a folder.

    Raises:
        FolderLockedError: as `locked`.
    """
    if any(folder.glob(f"{LOCK}*")):
        with locked(folder):
            pass


@contextmanager
def shared(
    folder: Path, name: str = LOCK, *, world: World = ONE, say: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Hold the lock of a folder in the block, after the processes that hold it before.

    Args:
        world: rank 0 takes the lock, the other ranks wait for it.
        say: called once with the reason if the lock is not free.

    Raises:
        OSError: the folder cannot be created.
    """
    lock, pause = FolderLock(folder, name), 0.05
    try:
        # Ranks exchange this several times a minute, or their next exchange would time out.
        while holder := world.on_main(lock.acquire):
            if say is not None and world.is_main and pause == 0.05:
                say(f"waiting for {folder}, which is being written by {holder}")
            time.sleep(pause)
            pause = min(2 * pause, 1.0)
        yield
    finally:
        lock.release()
