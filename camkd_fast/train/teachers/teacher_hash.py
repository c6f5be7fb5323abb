"""Hashes by which a teacher cache and a run know their teachers.

The hash of a teacher is `WEIGHTS.SETTINGS`, each a sha256 (hex), with `.own` behind it for code that no package has
installed. WEIGHTS covers the module's repr and its state, SETTINGS what else decides its outputs: numbers, strings and
the like that are attributes of its modules, and the source of classes of the user, with the functions and numbers of
the user's files that it names. An edited function or a factor of 2 that became 3 gives another hash.

Caches of earlier versions have WEIGHTS only. They stay valid where code and attributes come from installed packages,
which names and weights decide; of a teacher with the user's code they are refused, as it may have changed since.

It costs one pass over the weights, about a second per GB.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from types import CodeType, FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

_OWN = "own"
# Also if they are installed from a folder of sources.
_PACKAGES = ("camkd_fast", "torch", "torchvision", "timm", "transformers")
_INSTALLED = {"site-packages", "dist-packages"}
_OF_EVERY_MODULE = set(vars(nn.Module()))
# Of `LogitsOnly` a text for errors, with the teacher's path; of transformers the path.
_NOT_READ = {"reason", "name_or_path"}
_PLACES = re.compile(r"(cpu|cuda|mps|xpu|meta)(:\d+)?|.*[/\\].*", re.DOTALL)  # devices and paths
_SIMPLE = (bool, int, float, complex, str, bytes, type(None), torch.dtype)


def state_hash(module: nn.Module) -> str:
    """The hash of a module, see above."""
    weights = hashlib.sha256(repr(module).encode())
    update_by_state(weights, module.state_dict())
    settings = hashlib.sha256()
    seen: set[object] = set()
    for name, part in module.named_modules():
        own = _is_own(type(part))
        for key, text in _attributes(part, own):
            settings.update(f"{name}.{key}={text};".encode())
        for _, value in sorted(vars(part).items()):
            function = getattr(value, "__func__", value)  # of a method that replaces the class's
            if isinstance(function, FunctionType):
                _update_by_code(settings, function, seen)
        if own:
            hidden = {key: part._buffers[key] for key in sorted(part._non_persistent_buffers_set)}
            update_by_state(settings, {key: tensor for key, tensor in hidden.items() if tensor is not None})
            for kind in type(part).__mro__:
                _update_by_code(settings, kind, seen)
    return ".".join([weights.hexdigest(), settings.hexdigest(), *([_OWN] if seen else [])])


def same_teacher(there: str, here: str) -> bool:
    """Whether a hash that was written is that of a teacher; one of an earlier version has no SETTINGS."""
    if "." in there:
        return there == here
    return there == here.partition(".")[0] and not here.endswith(_OWN)


def difference(there: str | None, here: str | None) -> str:
    """The difference between the teachers of two hashes, as the end of a sentence."""
    if there is None or here is None:
        return "is missing there" if there is None else "is missing here"
    if there.partition(".")[0] != here.partition(".")[0]:
        return "has other weights or layers"
    if "." not in there:
        return "has code of its own, which earlier versions did not compare"
    return "has other code or attributes"


def update_by_state(digest: hashlib._Hash, state: Mapping[str, Any]) -> None:
    """Update a hash with every name, dtype, shape and byte of a state dict; of what is no tensor (`get_extra_state`),
    with its simple values."""
    for name, value in state.items():
        if not isinstance(value, Tensor):
            digest.update(f"{name} {_text(value, own=True) or type(value).__name__}".encode())
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        dense = value.dequantize() if value.is_quantized else value
        dense = dense.to_dense() if dense.layout != torch.strided else dense
        data: Any = dense.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(data)


# --- attributes ------------------------------------------------------------------------------------------------------


def _attributes(part: nn.Module, own: bool) -> Iterator[tuple[str, str]]:
    """Name and value of a module's attributes that are simple."""
    for key, value in sorted(vars(part).items()):
        if key not in _OF_EVERY_MODULE and key not in _NOT_READ and (text := _text(value, own)) is not None:
            yield key, text


def _text(value: object, own: bool) -> str | None:
    """A simple value as text that is the same in every process; None for any other.

    Args:
        own: of the user's code, whose dicts, sets, arrays and dataclasses count too. Those of packages have file names
            and what a package derives from its other settings.
    """
    if isinstance(value, str) and _PLACES.fullmatch(value):
        return None  # where a teacher is, not what it is
    if isinstance(value, _SIMPLE):
        return repr(value)
    numpy: Any = sys.modules.get("numpy")  # which torch does not require
    if numpy is not None and isinstance(value, numpy.generic):
        return repr(value.item())
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_text(item, own) or type(item).__name__ for item in value)}]"
    if not own:
        return None
    if is_dataclass(value) or isinstance(value, (Namespace, SimpleNamespace)):
        value = vars(value)
    if isinstance(value, Mapping):
        return f"{{{', '.join(sorted(f'{_text(key, own)}: {_text(item, own)}' for key, item in value.items()))}}}"
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(str(_text(item, own)) for item in value))}}}"
    if isinstance(value, Tensor) or (numpy is not None and isinstance(value, numpy.ndarray)):
        digest = hashlib.sha256()
        update_by_state(digest, {"": torch.as_tensor(value)})
        return digest.hexdigest()
    return None


# --- code ------------------------------------------------------------------------------------------------------------


def _is_own(thing: type | FunctionType) -> bool:
    """Whether a class or function is the user's: its file is that of no installed package."""
    module = thing.__module__ or ""
    package = module.partition(".")[0]
    if package in _PACKAGES or (package in sys.stdlib_module_names and package != "__main__"):
        return False
    file = getattr(sys.modules.get(module), "__file__", None)
    return file is None or _INSTALLED.isdisjoint(Path(file).parts)


def _update_by_code(digest: hashlib._Hash, thing: type | FunctionType, seen: set[object]) -> None:
    """Update a hash with the source of the user's class or function and with what it names in the user's files.

    A class that was defined in an interactive session has no source, but its numbers count.
    """
    if thing in seen or not _is_own(thing):
        return
    seen.add(thing)
    try:
        digest.update(inspect.getsource(thing).encode())
    except (OSError, TypeError):
        digest.update(thing.__qualname__.encode())
    functions = [thing] if isinstance(thing, FunctionType) else []
    for name, value in sorted(vars(thing).items()) if isinstance(thing, type) else ():
        inner = getattr(value, "fget", None) or getattr(value, "__func__", value)
        if isinstance(inner, FunctionType):
            functions.append(inner)
        elif not name.startswith("__") and (text := _text(value, own=False)) is not None:
            digest.update(f"{name}={text};".encode())
    for function in functions:
        for name in sorted(_names(function.__code__)):
            value = function.__globals__.get(name)
            if isinstance(value, (type, FunctionType)):
                _update_by_code(digest, value, seen)
            elif not isinstance(value, str) and value is not None and (text := _text(value, own=False)) is not None:
                digest.update(f"{name}={text};".encode())  # no strings: paths, and names of devices


def _names(code: CodeType) -> set[str]:
    """All names that a function reads besides its own variables, in functions inside it too."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, inner))
