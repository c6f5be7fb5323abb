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
from .contract import COMPILED_DTYPES, Backend, LabelCounter, MeanLossBackend, MinNormSolver

if TYPE_CHECKING:  # holds every backend to the contract
    from .. import kernels
    from . import cpu, cuda, reference

    _backends: tuple[Backend, ...] = (cpu, cuda, kernels, reference)
    _label_counters: tuple[LabelCounter, ...] = (cpu, reference)
    _mean_loss: MeanLossBackend = cpu
    _min_norm: MinNormSolver = kernels

BACKENDS = ("cuda", "triton", "cpu", "reference")

_MODULES = {
    "reference": "camkd_fast.backends.reference",
    "cpu": "camkd_fast.backends.cpu",
    "triton": "camkd_fast.kernels",
    "cuda": "camkd_fast.backends.cuda",
}
_DEVICES = {"cpu": ("cpu",), "triton": ("cuda",), "cuda": ("cuda",)}

# Where `auto` prefers the CUDA C++ kernels to Triton: (compute capability, fewest and most classes). Every entry needs
# a result under benchmarks/results/ from that architecture that shows them faster at those widths.
CUDA_PREFERRED: tuple[tuple[tuple[int, int], int, int], ...] = (((9, 0), 1000, 128256),)


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


def _refusal(name: str, tensors: Sequence[Tensor], others: Sequence[Tensor]) -> str | None:
    """Why backend `name` cannot run these tensors; None if it can."""
    if name == "reference":
        return None
    state = availability(name)
    if not state.usable:
        return state.reason
    device = tensors[0].device.type
    wanted = ("cuda", "cpu") if name == "triton" and interpreting() else _DEVICES[name]
    if device not in wanted:
        return f"it takes {' or '.join(wanted)} tensors, got {device}"
    if name == "cuda" and not _module(name).built_for(capability := _capability(tensors[0].device)):
        return f"it was built for {_module(name).build()[1]}, got compute capability {capability[0]}.{capability[1]}"
    for tensor in tensors:
        if tensor.dtype not in COMPILED_DTYPES:
            return f"it takes float32, bfloat16 and float16, got {str(tensor.dtype).removeprefix('torch.')}"
    if not memory.are_dense([*tensors, *others]):
        sort = next(sort for tensor in (*tensors, *others) if (sort := memory.sort_of(tensor)))
        return f"it takes dense tensors, got {sort.name}"
    if (observer := memory.observer()) is not None:
        return f"{observer} must see PyTorch's operations"
    return None


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"camkd_fast falls back to PyTorch operations, several times slower: {reason}", stacklevel=4)


def _candidates(tensor: Tensor, maps: bool) -> tuple[tuple[str, ...], str]:
    """Backends for `auto` to try, best first, and why the first one is."""
    device = tensor.device.type
    if device != "cuda":
        return ("cpu", "reference") if device == "cpu" else ("reference",), f"fastest for {device} tensors"
    if maps:
        return ("cuda", "triton", "reference"), "it reads maps of any memory format at full width"
    capability, C = _capability(tensor.device), tensor.shape[-1]
    measured = any(capability == c and fewest <= C <= most for c, fewest, most in CUDA_PREFERRED)
    where = f"compute capability {capability[0]}.{capability[1]}, {C} classes"
    if measured:
        return ("cuda", "triton", "reference"), f"measured faster than triton: {where}"
    return ("triton", "cuda", "reference"), f"no measurement shows cuda faster: {where}"


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
            raise ValueError(f"backend must be one of {('auto', *BACKENDS)}, got {requested!r}")
        refusal = _refusal(requested, tensors, others)
        if refusal is not None:
            raise NotImplementedError(f"backend {requested!r} cannot run here: {refusal}")
        return requested, "requested"
    names, why = _candidates(tensors[0], maps)
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


def explain(*tensors: Tensor, backend: str = "auto") -> str:
    """One line: which backend these tensors would use, and why.

    >>> explain(torch.zeros(4, 10, dtype=torch.float64))
    'reference (cpu: it takes float32, bfloat16 and float16, got float64)'
    """
    name, reason = choose(backend, tensors)
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
    if requested == "auto" and tensors[0].device.type == "cpu" and _all_compiled(tensors, others):
        return cast(Backend, _module("cpu"))
    return cast(Backend, _module(choose(requested, tensors, others, maps)[0]))


def _all_compiled(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """The common case of `choose` for CPU tensors, without building its reasons."""
    for tensor in tensors:
        if tensor.dtype not in COMPILED_DTYPES:
            return False
    return availability("cpu").usable and memory.is_ordinary([*tensors, *others])


@functools.cache
def mean_loss_backend(requested: str) -> MeanLossBackend | None:
    """The backend with a fast path for the mean loss, if `requested` allows it."""
    usable = requested in ("auto", "cpu") and availability("cpu").usable
    return cast(MeanLossBackend, _module("cpu")) if usable else None


@functools.cache
def label_counter() -> LabelCounter:
    """The backend that counts the labels of CPU targets, whichever backend computes the loss."""
    return cast(LabelCounter, _module("cpu" if availability("cpu").usable else "reference"))


def min_norm_solver(gram: Tensor) -> MinNormSolver | None:
    """The backend that solves for AEKD's weights in one launch; None if PyTorch operations do."""
    usable = gram.is_cuda and availability("triton").usable and memory.is_ordinary([gram])
    return cast(MinNormSolver, _module("triton")) if usable else None
