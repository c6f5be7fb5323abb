"""CIFAR-10 and CIFAR-100 from their published Python archives, unpickled without importing or calling anything."""

from __future__ import annotations

import gzip
import io
import math
import pickle
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from .fetch import SOURCES
from .images import LabelledImages, check_labels


@dataclass(frozen=True)
class _Layout:
    """Contents of an archive."""

    name: str  # in `catalogue.NAMES`
    folder: str
    train: tuple[str, ...]
    test: str
    labels: str  # key of the labels in each pickled dict
    meta: str  # file of the class names, which may be missing
    names: str  # key of the class names in it
    num_classes: int
    mean: tuple[float, ...]  # per channel, in pixel levels
    std: tuple[float, ...]


def _levels(*fractions: float) -> tuple[float, ...]:
    return tuple(255 * fraction for fraction in fractions)


CIFAR10 = _Layout(
    "cifar10",
    "cifar-10-batches-py",
    tuple(f"data_batch_{i}" for i in range(1, 6)),
    "test_batch",
    "labels",
    "batches.meta",
    "label_names",
    10,
    _levels(0.4914, 0.4822, 0.4465),
    _levels(0.2470, 0.2435, 0.2616),
)
CIFAR100 = _Layout(
    "cifar100",
    "cifar-100-python",
    ("train",),
    "test",
    "fine_labels",
    "meta",
    "fine_label_names",
    100,
    _levels(0.5071, 0.4867, 0.4408),
    _levels(0.2675, 0.2565, 0.2761),
)


def load_cifar10(root: Path) -> tuple[LabelledImages, LabelledImages]:
    """Load the 50,000 training and 10,000 test images, pixels (N, 3, 32, 32).

    Args:
        root: the archive, the folder that contains it, the extracted folder, or its parent.

    Raises:
        FileNotFoundError: neither the archive nor the extracted files exist.
        ValueError: the archive is truncated, a pickle contains anything but arrays and simple values, or sizes or
            labels are invalid.
    """
    return _load(CIFAR10, root)


def load_cifar100(root: Path) -> tuple[LabelledImages, LabelledImages]:
    """Like `load_cifar10`, with the 100 fine classes."""
    return _load(CIFAR100, root)


def _load(layout: _Layout, root: Path) -> tuple[LabelledImages, LabelledImages]:
    names = (*layout.train, layout.test)
    contents = _find(layout, root, names)
    class_names = _read_names(contents[layout.meta], layout) if layout.meta in contents else None
    parts = [_read_batch(contents[name], layout) for name in names]

    def images(batches: Iterable[tuple[Tensor, Tensor]]) -> LabelledImages:
        pixels, labels = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
        return LabelledImages(pixels, labels, layout.num_classes, layout.mean, layout.std, class_names)

    return images(parts[:-1]), images(parts[-1:])


@dataclass(frozen=True)
class _Content:
    source: str  # for error messages
    data: bytes


def _find(layout: _Layout, root: Path, names: tuple[str, ...]) -> dict[str, _Content]:
    """Read the named files, and the class names if they are there, from the extracted folder, else from the archive."""
    (published,) = SOURCES[layout.name].files
    for folder in (root, root / layout.folder):
        if all((folder / name).is_file() for name in names):
            there = [*names, layout.meta] if (folder / layout.meta).is_file() else names
            return {name: _Content(str(folder / name), (folder / name).read_bytes()) for name in there}
    archive = root if root.is_file() else root / published.name
    if not archive.is_file():
        raise FileNotFoundError(
            f"neither {published.name} nor {layout.folder} is in {root}: "
            f"`camkd-fast data fetch {layout.name}` downloads the archive"
        )
    found = {}
    try:
        # tarfile's own gzip reader would not report a truncated file; gzip.open does.
        with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                wanted = path.name in (*names, layout.meta) and path.parent.name == layout.folder
                file = tar.extractfile(member) if wanted else None
                if file is not None:
                    found[path.name] = _Content(f"{path.name} of {archive}", file.read())
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{archive} is truncated or damaged ({error}): "
            f"{archive.stat().st_size} bytes, the published one has {published.size}"
        ) from error
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"{archive} lacks {', '.join(f'{layout.folder}/{name}' for name in missing)}")
    return found


def _read_batch(content: _Content, layout: _Layout) -> tuple[Tensor, Tensor]:
    """Pixels (n, 3, 32, 32) uint8 and labels (n,) int64 of one pickled dict."""
    fields = _read_fields(content)
    pixels, classes = fields.get("data"), fields.get(layout.labels)
    if not isinstance(pixels, Tensor) or pixels.dim() != 2 or pixels.shape[1] != 3 * 32 * 32:
        found = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
        raise ValueError(f"{content.source}: data must be an array (n, 3072), got {found}")
    if not isinstance(classes, list) or not all(type(label) is int for label in classes):
        raise ValueError(f"{content.source}: {layout.labels} must be a list of int, got {type(classes).__name__}")
    if len(pixels) != len(classes):
        raise ValueError(f"{content.source} holds {len(pixels)} images and {len(classes)} labels")
    labels = torch.tensor(classes, dtype=torch.int64)
    check_labels(labels, layout.num_classes, content.source)
    return pixels.reshape(-1, 3, 32, 32), labels


def _read_names(content: _Content, layout: _Layout) -> tuple[str, ...]:
    """The class names in the order of the labels."""
    found = _read_fields(content).get(layout.names)
    names = tuple(map(_text, found)) if isinstance(found, list) else ()
    if len(names) != layout.num_classes or not all(isinstance(name, str) for name in names):
        what = f"{len(names)} values" if isinstance(found, list) else type(found).__name__
        raise ValueError(f"{content.source}: {layout.names} must be a list of {layout.num_classes} names, got {what}")
    return names


def _read_fields(content: _Content) -> dict[Any, Any]:
    """The pickled dict of a file, with its keys as str."""
    fields = read_pickle(content.data, content.source)
    if not isinstance(fields, dict):
        raise ValueError(f"{content.source} holds a {type(fields).__name__}, expected a dict")
    return {_text(key): value for key, value in fields.items()}


def _text(value: Any) -> Any:
    """Python 2 strings are read as bytes; a file pickled again by Python 3 has str."""
    return value.decode("latin1") if isinstance(value, bytes) else value


class RefusedPickleError(ValueError):
    """A pickle contains something other than simple values and uint8 arrays."""


def read_pickle(data: bytes, source: str) -> Any:
    """Unpickle simple values and uint8 numpy arrays. An array at the top or as a dict value becomes a uint8 tensor.

    No global that the pickle names is imported or called, not even numpy's; `STAND_INS` replace them.

    Raises:
        RefusedPickleError: the pickle names any other global, or contains an array of another type.
        ValueError: the pickle is damaged.
    """
    try:
        return _unwrapped(_Unpickler(data, source).load())
    except RefusedPickleError:
        raise
    except Exception as error:  # damaged opcodes can raise almost anything
        raise ValueError(f"{source} is not a readable pickle: {error}") from error


class _StandIn:
    """Replaces a global that array pickles name. `__setstate__` keeps the BUILD opcode from setting attributes."""

    def __setstate__(self, state: object) -> None:
        raise RefusedPickleError(f"a pickle gives {type(self).__name__} a state of type {type(state).__name__}")


class _Bytes(_StandIn):
    """Replaces _codecs.encode, which Python 3 uses to write bytes for Python 2."""

    def __new__(cls, text: str, encoding: str) -> bytes:  # type: ignore[misc]
        return text.encode("latin1")


class _NoBytes(_StandIn):
    """Replaces `bytes`, which Python 3 calls for empty bytes in protocol 2."""

    def __new__(cls) -> bytes:  # type: ignore[misc]
        return b""


class _Dtype(_StandIn):
    def __init__(self, code: bytes | str, *_: object) -> None:
        self.code = code.decode("latin1") if isinstance(code, bytes) else code

    def __setstate__(self, state: object) -> None:
        """Ignore byte order and alignment: items are single bytes."""


class _Array(_StandIn):
    tensor: Tensor

    def __init__(self, *_: object) -> None:
        """Ignore the arguments, which describe the empty array that numpy would fill."""

    def __setstate__(self, state: Any) -> None:
        _version, shape, dtype, fortran, content = state
        self.tensor = _levels_of(content, dtype, shape, "F" if fortran else "C")


class _Buffer(_Array):
    """Replaces numpy's function for the arrays of protocol 5, whose content is an argument."""

    def __init__(self, content: Any, dtype: Any, shape: Any, order: str, axes: Any = None) -> None:
        self.tensor = _levels_of(content, dtype, shape, order, axes)

    __setstate__ = _StandIn.__setstate__


def _levels_of(content: Any, dtype: Any, shape: Any, order: str, axes: Any = None) -> Tensor:
    """A tensor of `shape` from an array's bytes: rows first ("C"), columns first ("F") or with permuted axes ("K")."""
    code = dtype.code if isinstance(dtype, _Dtype) else type(dtype).__name__
    if code not in ("u1", "|u1"):
        raise RefusedPickleError(f"the pickle holds an array of type {code!r}, which is refused: expected 'u1'")
    if not isinstance(content, (bytes, bytearray)) or len(content) != math.prod(shape):
        size = f"{len(content)} bytes" if isinstance(content, (bytes, bytearray)) else type(content).__name__
        raise ValueError(f"an array of shape {shape} has {size}")
    if order not in ("C", "F", "K"):
        raise ValueError(f"an array has the order {order!r}")
    if not content:
        return torch.zeros(shape, dtype=torch.uint8)
    tensor = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    if order == "F":
        return tensor.view(shape[::-1]).permute(*reversed(range(len(shape))))
    return tensor.view(shape) if axes is None else tensor.view(shape).permute(*axes)


STAND_INS = {
    ("numpy", "ndarray"): _StandIn,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,  # numpy 2
    ("numpy.core.numeric", "_frombuffer"): _Buffer,  # protocol 5
    ("numpy._core.numeric", "_frombuffer"): _Buffer,
    ("_codecs", "encode"): _Bytes,
    ("__builtin__", "bytes"): _NoBytes,
    ("builtins", "bytes"): _NoBytes,
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, source: str) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")
        self._source = source

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in STAND_INS:
            raise RefusedPickleError(f"{self._source}: the pickle names {module}.{name}, which is refused")
        return STAND_INS[module, name]


def _unwrapped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: item.tensor if isinstance(item, _Array) else item for key, item in value.items()}
    return value.tensor if isinstance(value, _Array) else value
