"""Download published data sets: resumable, and renamed into place once the published checksum matches."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from ..system import expand_path, replace

TIMEOUT = 60.0  # seconds without a response or data
CHUNK = 1 << 18  # bytes


@dataclass(frozen=True)
class RemoteFile:
    name: str
    size: int  # bytes
    md5: str  # the only checksum published with these data sets


@dataclass(frozen=True)
class Published:
    base_url: str
    files: tuple[RemoteFile, ...]


SOURCES = {
    "cifar10": Published(
        "https://www.cs.toronto.edu/~kriz/",
        (RemoteFile("cifar-10-python.tar.gz", 170498071, "c58f30108f718f92721af3b95e74349a"),),
    ),
    "cifar100": Published(
        "https://www.cs.toronto.edu/~kriz/",
        (RemoteFile("cifar-100-python.tar.gz", 169001437, "eb9058c3a382ffc7106e4002c42a8d85"),),
    ),
    # The authors' repository: the same bytes as their website, which has no https.
    "fashion-mnist": Published(
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        (
            RemoteFile("train-images-idx3-ubyte.gz", 26421880, "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
            RemoteFile("train-labels-idx1-ubyte.gz", 29515, "25c81989df183df01b3e8a0aad5dffbe"),
            RemoteFile("t10k-images-idx3-ubyte.gz", 4422102, "bef4ecab320f06d8554ea6380940ec79"),
            RemoteFile("t10k-labels-idx1-ubyte.gz", 5148, "bb300cfdad3c16e7a12a480ee83cd310"),
        ),
    ),
}

Progress = Callable[[str, int, int], None]  # (file name, bytes received, total bytes)


def default_folder(name: str) -> Path:
    """Default folder of a data set: $CAMKD_FAST_DATA/NAME or ~/.cache/camkd_fast/NAME."""
    base = os.environ.get("CAMKD_FAST_DATA")
    return expand_path(base or "~/.cache/camkd_fast") / name


def fetch(
    name: str, root: Path | None = None, base_url: str | None = None, progress: Progress | None = None
) -> tuple[Path, ...]:
    """Download the files of a data set into the folder `root` and return their paths. Existing files are kept.

    Data goes to FILE.part, which a later call resumes and which becomes FILE once the checksum matches.

    Args:
        name: a key of `SOURCES`.
        root: `default_folder(name)` if None; created if missing.
        base_url: an http or https mirror that has the files under their published names.
        progress: called after every chunk.

    Raises:
        ValueError: the name is unknown, or a downloaded or existing file is not the published one.
        ConnectionError: no response, an error status, or the connection ended early. Received data is kept.
        OSError: a file cannot be written.
    """
    if name not in SOURCES:
        raise ValueError(f"only {', '.join(SOURCES)} can be fetched, got {name!r}")
    source = SOURCES[name]
    url = (base_url or source.base_url).rstrip("/") + "/"
    if not url.startswith(("https://", "http://")):
        raise ValueError(f"the base URL must begin with https:// or http://, got {url}")
    folder = root or default_folder(name)
    folder.mkdir(parents=True, exist_ok=True)
    return tuple(_fetch_file(url + file.name, file, folder / file.name, progress) for file in source.files)


def _fetch_file(url: str, file: RemoteFile, target: Path, progress: Progress | None) -> Path:
    if target.exists():
        found = _md5(target)
        if found != file.md5:
            raise ValueError(f"{target} has MD5 {found}, the published file {file.md5}: move it away and fetch again")
        return target
    part = target.with_name(target.name + ".part")
    if part.exists() and part.stat().st_size > file.size:
        part.unlink()
    if not part.exists() or part.stat().st_size < file.size:
        _receive(url, file, part, progress)
    found = _md5(part)
    if found != file.md5:
        part.unlink()
        raise ValueError(f"{url} has MD5 {found}, the published file {file.md5}: refused and removed")
    replace(part, target)
    return target


def _receive(url: str, file: RemoteFile, part: Path, progress: Progress | None) -> None:
    """Append the missing bytes to `part`, or write it from the start if the server does not support ranges."""
    received = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "camkd-fast", **({"Range": f"bytes={received}-"} if received else {})}
    try:
        response = urlopen(Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        error.close()
        if error.code == 416:  # the server's file is shorter than `part`, which must be of another file
            part.unlink()
        raise ConnectionError(f"{url}: status {error.code} {error.reason}") from error
    except (OSError, HTTPException) as error:
        raise ConnectionError(f"{url}: {getattr(error, 'reason', error)}") from error
    broken: Exception | None = None
    with response, part.open("ab" if response.status == 206 else "wb") as out:
        received = out.tell()
        while received <= file.size:
            try:
                chunk = response.read(CHUNK)
            except (OSError, HTTPException) as error:
                broken = error
                break
            if not chunk:
                break
            out.write(chunk)
            received += len(chunk)
            if progress:
                progress(file.name, received, file.size)
        out.flush()
        os.fsync(out.fileno())  # before the rename: after a crash the renamed file could be empty
    if received > file.size:
        part.unlink()
        raise ValueError(
            f"{url} sent at least {received} bytes, the published file has {file.size}: refused and removed"
        )
    if received < file.size:
        raise ConnectionError(
            f"{url} ended after {received} of {file.size} bytes; the next fetch resumes from {part}"
        ) from broken


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as content:
        while chunk := content.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
