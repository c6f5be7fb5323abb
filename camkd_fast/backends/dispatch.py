"""The only list of backends, and the only place that picks one.

A backend supplies numbers (`contract.Backend`); checks, reductions and autograd exist once, in `losses`. `auto` picks
the fastest backend that can run the tensors, and `explain` says why. A backend requested by name that cannot run raises
with the reason.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from . import memory
from .contract import COMPILED_DTYPES, Backend, LabelCounter, MinNormSolver, ShardBackend
from .whole_losses import WholeLosses

if TYPE_CHECKING:  # holds every backend to the contract
    from .. import kernels
    from . import cpu, cuda, reference, row_sums

    _backends: tuple[Backend, ...] = (cpu, cuda, kernels, reference)
    _shards: tuple[ShardBackend, ...] = (cpu, cuda, kernels, row_sums)
    _label_counters: tuple[LabelCounter, ...] = (cpu, reference)
    _min_norm: MinNormSolver = kernels

BACKENDS = ("cuda", "triton", "cpu", "reference")

_MODULES = {
    "reference": "camkd_fast.backends.reference",
    "cpu": "camkd_fast.backends.cpu",
    "triton": "camkd_fast.kernels",
    "cuda": "camkd_fast.backends.cuda",
}
_OF_SHARDS = {**_MODULES, "reference": "camkd_fast.backends.row_sums"}
_CPU = torch.device("cpu")
_DEVICES = {"cpu": ("cpu",), "triton": ("cuda",), "cuda": ("cuda",)}

# Where `auto` prefers the CUDA C++ kernels to Triton: (compute capability, fewest and most classes). Every entry needs
# a result from that architecture that shows them faster at those widths. From 1000 classes on it is under
# benchmarks/results/; below, the host decides (H200, commit df155c7, 64 x 100: 57 us of the host against 193, 10 us of
# the device against 8).
CUDA_PREFERRED: tuple[tuple[tuple[int, int], int, int], ...] = (((9, 0), 1, 128256),)


class Availability(NamedTuple):
    """Whether a backend can be loaded in this process; `reason` says why not, or what it is."""

    usable: bool
    reason: str


def interpreting() -> bool:
    """True when Triton kernels run on CPU tensors through its interpreter (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def availability(name: str) -> Availability:
    """Whether backend `name` can be loaded here. Imports the backend's module if it can."""
    if name == "reference":
        return Availability(True, "PyTorch operations")
    try:
        module = importlib.import_module("triton" if name == "triton" else _MODULES[name])
    except ImportError as error:
        failure = Path(__file__).parents[1] / "_build_failure.txt"
        if name == "triton" or not failure.exists():
            return Availability(False, str(error))
        return Availability(False, f"{error}; the build said: {failure.read_text('utf-8', 'replace').strip()}")
    if name == "cpu":
        return Availability(True, f"compiled module, {module.instruction_set()} instructions")
    if name == "cuda":
        built, text = module.build()
        if not built:
            return Availability(False, f"this build has no CUDA C++ kernels: {text}")
        if not torch.cuda.is_available():
            return Availability(False, f"CUDA C++ kernels for {text} were built, but there is no GPU")
        return Availability(True, f"CUDA C++ kernels for {text}")
    if not torch.cuda.is_available() and not interpreting():
        return Availability(False, f"triton {module.__version__} is installed, but there is no GPU")
    return Availability(True, f"triton {module.__version__}" + (", interpreted" if interpreting() else ""))


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    """Cached: torch takes 10 us, as long as the kernels of a small batch."""
    return torch.cuda.get_device_capability(device)


def _device_refusal(name: str, device: torch.device) -> str | None:
    """Why compiled backend `name` cannot run tensors on this device, whatever they are; None if it can."""
    state = availability(name)
    if not state.usable:
        return state.reason
    wanted = ("cuda", "cpu") if name == "triton" and interpreting() else _DEVICES[name]
    if device.type not in wanted:
        return f"it takes {' or '.join(wanted)} tensors, got {device.type}"
    if name == "cuda" and not _module(name).built_for(capability := _capability(device)):
        return f"it was built for {_module(name).build()[1]}, got compute capability {capability[0]}.{capability[1]}"
    return None


def _refusal(name: str, tensors: Sequence[Tensor], others: Sequence[Tensor]) -> str | None:
    """Why backend `name` cannot run these tensors; None if it can."""
    if name == "reference":
        return None
    refusal = _device_refusal(name, tensors[0].device)
    if refusal is not None:
        return refusal
    for tensor in tensors:
        if tensor.dtype not in COMPILED_DTYPES:
            return f"it takes float32, bfloat16 and float16, got {str(tensor.dtype).removeprefix('torch.')}"
    if not memory.are_dense([*tensors, *others]):
        kind = next(kind for tensor in (*tensors, *others) if (kind := memory.kind_of(tensor)))
        return f"it takes dense tensors, got {kind.name}"
    if (observer := memory.observer()) is not None:
        return f"{observer} must see PyTorch's operations"
    return None


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"camkd_fast falls back to PyTorch operations, several times slower: {reason}", stacklevel=4)


def _candidates(device: torch.device, C: int, maps: bool) -> tuple[tuple[str, ...], str]:
    """Backends for `auto` to try, best first, and why the first one is."""
    if device.type != "cuda":
        names = ("cpu", "reference") if device.type == "cpu" else ("reference",)
        return names, f"fastest for {device.type} tensors"
    if maps:
        return ("cuda", "triton", "reference"), "it reads maps of any memory format at full width"
    capability = _capability(device)
    measured = any(capability == c and fewest <= C <= most for c, fewest, most in CUDA_PREFERRED)
    where = f"compute capability {capability[0]}.{capability[1]}, {C} classes"
    if measured:
        return ("cuda", "triton", "reference"), f"measured faster than triton: {where}"
    return ("triton", "cuda", "reference"), f"no measurement shows cuda faster: {where}"


def _unknown(requested: object) -> ValueError:
    return ValueError(f"backend must be one of {('auto', *BACKENDS)}, got {requested!r}")


def choose(
    requested: str, tensors: Sequence[Tensor], others: Sequence[Tensor] = (), maps: bool = False
) -> tuple[str, str]:
    """The backend for these tensors and the reason. See `backend_for`.

    Raises:
        ValueError: `requested` is not the name of a backend.
        NotImplementedError: the named backend cannot run these tensors.
    """
    if requested != "auto":
        if requested not in BACKENDS:
            raise _unknown(requested)
        refusal = _refusal(requested, tensors, others)
        if refusal is not None:
            raise NotImplementedError(f"backend {requested!r} cannot run here: {refusal}")
        return requested, "requested"
    names, why = _candidates(*_place(tensors[0]), maps)
    reasons, missing = [], []
    for name in names:
        refusal = _refusal(name, tensors, others)
        if refusal is None:
            break
        reasons.append(f"{name}: {refusal}")
        if not availability(name).usable:
            missing.append(reasons[-1])
    if name == "reference" and missing and len(missing) == len(reasons):
        _warn_once("; ".join(missing))
    return name, "; ".join(reasons) if reasons else why


def explain(student: Tensor, *others: Tensor, backend: str = "auto") -> str:
    """One line: which backend these tensors would use, and why.

    >>> explain(torch.zeros(4, 10, dtype=torch.float64))
    'reference (cpu: it takes float32, bfloat16 and float16, got float64)'

    Args:
        student, others: the tensors of a call, in its order.
        backend: the requested one.

    Raises:
        ValueError, NotImplementedError: there is no such backend, or it cannot run these tensors.
    """
    name, reason = choose(backend, (student, *others))
    return f"{name} ({reason})"


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(_MODULES[name])


def backend_for(
    requested: str, tensors: Sequence[Tensor], others: Sequence[Tensor] = (), maps: bool = False
) -> Backend:
    """The module that runs these tensors; raises as `choose` does.

    Args:
        tensors: of the dtypes that the backend reads.
        others: labels, weights, factors: every other tensor whose address the backend takes.
        maps: the tensors are feature maps, not logits.
    """
    return cast(Backend, _module(_name_for(requested, tensors, others, maps)))


def shard_backend_for(requested: str, tensors: Sequence[Tensor], others: Sequence[Tensor] = ()) -> ShardBackend:
    """The same for logits of some of the classes."""
    name = _name_for(requested, tensors, others)
    return cast(ShardBackend, importlib.import_module(_OF_SHARDS[name]))


def _name_for(requested: str, tensors: Sequence[Tensor], others: Sequence[Tensor], maps: bool = False) -> str:
    if not isinstance(requested, str):
        raise _unknown(requested)
    name = _compiled(requested, *_place(tensors[0]), maps)
    if name is None or not _all_ordinary(tensors, others):
        name = choose(requested, tensors, others, maps)[0]
    return name


def _place(tensor: Tensor) -> tuple[torch.device, int]:
    """Device and number of classes, on which the choice depends; the number only on a GPU."""
    return (_CPU, 0) if tensor.is_cpu else (tensor.device, tensor.shape[-1] if tensor.dim() else 0)


@functools.lru_cache(maxsize=1024)
def _compiled(requested: str, device: torch.device, C: int, maps: bool = False) -> str | None:
    """The compiled backend of ordinary tensors, without building reasons; None if `choose` has to look at them."""
    name = _candidates(device, C, maps)[0][0] if requested == "auto" else requested
    return name if name in _DEVICES and _device_refusal(name, device) is None else None


def _all_ordinary(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    for tensor in tensors:
        if tensor.dtype not in COMPILED_DTYPES:
            return False
    return memory.is_ordinary([*tensors, *others])


def first_of(tensors: object) -> object:
    """The first of a list or tuple; None for anything else."""
    return tensors[0] if isinstance(tensors, (list, tuple)) and tensors else None


def whole_losses(requested: str, tensor: object, maps: bool = False) -> WholeLosses | None:
    """What may compute the loss of these logits or maps, unchecked as they are, in one call."""
    if not isinstance(requested, str):
        raise _unknown(requested)
    if not isinstance(tensor, Tensor):
        return None
    found = _whole_losses_on_cpu(requested) if tensor.is_cpu else _whole_losses_on(requested, *_place(tensor), maps)
    return found if found is not None and found.connected else None


def _whole_losses_on(requested: str, device: torch.device, C: int, maps: bool = False) -> WholeLosses | None:
    name = _compiled(requested, device, 0 if maps else C, maps)
    return cast(WholeLosses, _module(name).whole_losses) if name in ("cpu", "cuda") else None


@functools.lru_cache(maxsize=16)
def _whole_losses_on_cpu(requested: str) -> WholeLosses | None:
    """Cached by itself: a microsecond is 5 % of the smallest batch."""
    return _whole_losses_on(requested, _CPU, 0)


@functools.cache
def label_counter() -> LabelCounter:
    """The backend that counts the labels of CPU targets, whichever backend computes the loss."""
    return cast(LabelCounter, _module("cpu" if availability("cpu").usable else "reference"))


def min_norm_solver(gram: Tensor) -> MinNormSolver | None:
    """The backend that solves for AEKD's weights in one launch; None if PyTorch operations do."""
    usable = gram.is_cuda and availability("triton").usable and memory.is_ordinary([gram])
    return cast(MinNormSolver, _module("triton")) if usable else None
