"""State dicts from checkpoint files of other programs. No code in a file is run: files that have any are refused.

Reads what torch.save writes, a zip archive or, before torch 1.6, a series of pickles, with `weights_only=True`, and
safetensors. Besides tensors a checkpoint may have float32, float64 and int64 scalars of numpy (an accuracy) and an
argparse.Namespace (RepDistiller's options). Stand-ins take their places: nothing of numpy or argparse is called.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..errors import first_sentence

_WRAPPERS = ("model", "state_dict")  # keys of a checkpoint that may hold its state dict
# Of names in a model inside DistributedDataParallel or AveragedModel, torch.compile, and a LightningModule.
_PREFIXES = (_MODULE := "module.", "_orig_mod.", "model.")
_AVERAGED = "n_averaged"  # which AveragedModel counts beside its module
_LISTED = 5  # names in an error
_ADVICE = "save the model's state_dict() with torch.save where its code is, and give that file"

_ZIP = b"PK\x03\x04"
# torch.save's old format: this number, the version, the machine's integers, the object and the names of its storages,
# each pickled; then the storages.
_OLD_FORMAT, _OLD_PICKLES = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2), 5


def read(path: Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint by name, on the CPU.

    The state dict is the whole file, or its entry "model" or "state_dict". The prefixes `module.`, `_orig_mod.` and
    `model.` are removed if all names have them. The `n_averaged` of torch's AveragedModel is left out.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is empty, truncated, damaged or of another kind; it is a whole model or names other code; it has
            no state dict; or it needs safetensors, which is not installed. The message is one line with the file's
            name.
    """
    with path.open("rb") as file:
        start = file.read(len(_OLD_FORMAT))
    if start.startswith(_ZIP):
        _check_archive(path)
        loaded = _load_pickled(path)
    elif start == _OLD_FORMAT:
        loaded = _load_pickled(path)
    elif start[8:9] == b"{":  # the header of a safetensors file, after its length
        loaded = _load_safetensors(path)
    elif start:
        what = "is a pickle of another program" if start[:1] == pickle.PROTO else f"begins with {start!r}"
        raise ValueError(f"{path} {what}: expected a checkpoint written by torch.save, or a safetensors file")
    else:
        raise ValueError(f"{path} is empty: expected a checkpoint written by torch.save, or a safetensors file")
    return _without_prefixes(_state_dict(loaded, path))


def _load_safetensors(path: Path) -> object:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{path} needs safetensors, which is not installed (pip install 'camkd-fast[train]')"
        ) from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged: {error}") from error


def _check_archive(path: Path) -> None:
    """Refuse zip archives of other kinds than torch.save writes."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.rpartition("/")[2] for name in archive.namelist()}
    except Exception as error:  # damaged tables can raise almost anything
        raise ValueError(f"{path} is truncated or damaged: {error}") from error
    if "constants.pkl" in members:
        raise ValueError(f"{path} is a TorchScript program, which is code: {_ADVICE}")
    if "data.pkl" not in members:
        raise ValueError(f"{path} is a zip archive, but none that torch.save wrote")


def _load_pickled(path: Path) -> object:
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # and so can damaged opcodes
        raise ValueError(f"{path} {_fault(path, error)}") from error


def _state_dict(loaded: object, path: Path) -> dict[str, Tensor]:
    expected = "expected tensors by name, or a dict of them under 'model' or 'state_dict'"
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} has no state dict: {expected}, got a {type(loaded).__name__}")
    found = next((loaded[key] for key in _WRAPPERS if isinstance(loaded.get(key), Mapping)), loaded)
    if not found:
        raise ValueError(f"{path} has no state dict: {expected}, got an empty one")
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            keys = ", ".join(map(repr, list(found)[:_LISTED])) + ", ..." * (len(found) > _LISTED)
            kind = type(tensor).__name__
            raise ValueError(f"{path} has no state dict: {expected}, got {name!r} of type {kind} among {keys}")
    return {name: tensor.detach() for name, tensor in found.items()}


def _without_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for _ in _PREFIXES:  # in any order
        for prefix in _PREFIXES:
            names = [name for name in tensors if (prefix, name) != (_MODULE, _AVERAGED)]
            if names and all(name.startswith(prefix) for name in names):
                tensors = {name.removeprefix(prefix): tensors[name] for name in names}
    return tensors


# --- stand-ins for what a checkpoint may name ------------------------------------------------------------------------


class _Dtype:
    """numpy.dtype: the code of a type, then its byte order."""

    def __init__(self, code: str, *_: object) -> None:
        self.str = f"<{code}"

    def __setstate__(self, state: tuple[int, str]) -> None:
        self.str = state[1] + self.str[1:]


class _Namespace:
    """argparse.Namespace, whose attributes are of no use here."""

    def __setstate__(self, state: object) -> None:
        pass


_SCALARS = {"f4": "f", "f8": "d", "i8": "q"}  # numpy's code -> struct's


def _scalar(dtype: _Dtype, data: bytes) -> float | int:
    """numpy's function that makes a scalar from its bytes."""
    if dtype.str[1:] not in _SCALARS or dtype.str[0] not in "<>":
        raise pickle.UnpicklingError(f"it has a numpy scalar of type {dtype.str}, not of float32, float64 or int64")
    (value,) = struct.unpack(dtype.str[0] + _SCALARS[dtype.str[1:]], data)
    return value  # type: ignore[no-any-return]


_STAND_INS: list[Any] = [  # torch expects callables, or pairs as here
    (_Dtype, "numpy.dtype"),
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),  # numpy 2
    (_Namespace, "argparse.Namespace"),
]


_HARMLESS = re.compile(
    r"torch\._utils\._rebuild_\w+|torch\.\w*Storage|torch\.(Size|device)|collections\.OrderedDict|_codecs\.encode"
    r"|__builtin__\.set|" + "|".join(re.escape(name) for _, name in _STAND_INS)
)


# --- why a file was refused ------------------------------------------------------------------------------------------


def _fault(path: Path, error: Exception) -> str:
    """What is wrong with a file that torch.load refused. Its opcodes are listed, not executed."""
    # torch wraps the errors of its unpickler in advice to run the code of the file.
    first = error.__context__ if isinstance(error.__context__, pickle.UnpicklingError) else error
    reason = first_sentence(first)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                data = next(name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl")
                code, strings = _named(io.BytesIO(archive.read(data)), pickles=1)
        else:
            with path.open("rb") as file:
                code, strings = _named(file, pickles=_OLD_PICKLES)
    except Exception:  # likewise
        return f"is truncated or damaged: {reason}"
    if {"_parameters", "_modules"} <= strings:  # attributes of every nn.Module
        return f"is a whole pickled model ({code[0]}), which cannot be read without running code: {_ADVICE}"
    if code:
        more = f" and {len(code) - _LISTED} more" if len(code) > _LISTED else ""
        return f"is refused, because it names code ({', '.join(code[:_LISTED])}{more}): {_ADVICE}"
    return f"is {'refused' if isinstance(error, pickle.UnpicklingError) else 'truncated or damaged'}: {reason}"


def _named(file: IO[bytes], pickles: int) -> tuple[list[str], set[str]]:
    """Functions and classes that pickles name, in their order, without those that state dicts need; and all strings.

    Raises:
        ValueError, EOFError: the pickles are damaged.
    """
    code: dict[str, None] = {}
    strings: list[str] = []
    for _ in range(pickles):
        for opcode, value, _ in pickletools.genops(file):
            if opcode.name in ("GLOBAL", "INST"):
                code[str(value).replace(" ", ".")] = None
            elif opcode.name == "STACK_GLOBAL":
                code[".".join(strings[-2:])] = None
            elif isinstance(value, str):
                strings.append(value)
    return [name for name in code if not _HARMLESS.fullmatch(name)], set(strings)
