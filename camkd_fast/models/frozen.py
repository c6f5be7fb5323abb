"""Frozen teachers: evaluation mode, no gradients, batch norms folded into the preceding convolutions.

In evaluation mode a batch norm is a scale and an offset per channel, a (x - m) / sqrt(v + eps) + b, which a convolution
can absorb if nothing else reads its output. That saves a pass over each activation map. The data flow comes from a
torch.fx trace, because modules need not be called in the order of their definition.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from contextlib import suppress
from functools import partial
from itertools import chain
from types import FunctionType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..errors import first_line
from .protocol import FeatureModel, composes, inner_model

Model = TypeVar("Model", bound=nn.Module)
_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def freeze(model: Model, dtype: torch.dtype | None = None, channels_last: bool = False) -> Model:
    """A copy of `model` for inference: evaluation mode, no parameter requires a gradient, batch norms folded.

    The protocol is kept (`forward_features`, `forward_head`); outputs agree up to rounding. Folding happens in float64
    before any cast. A batch norm is kept if folding would be wrong: after anything but an nn.Conv2d, or if the
    convolution's output, either module or one of their parameters is also used elsewhere. A model that torch.fx cannot
    trace keeps all of them, with a warning. Parameter names differ from the original's, because folded convolutions
    have a bias.

    Args:
        model: follows the protocol; it is not modified.
        dtype: of the copy's parameters and input images; None keeps the model's.
        channels_last: store convolution weights in that memory format.

    Raises:
        TypeError: the model cannot be copied and changed, or a copy would refer to the original.
    """
    _check_forwards(model)
    try:
        frozen = copy.deepcopy(model).eval().requires_grad_(False)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # PyTorch's, of any type, or the model's own
        kind = type(inner_model(model)).__name__
        raise TypeError(
            f"{kind} cannot be copied and frozen: expected a module that is not scripted, after "
            f"prune.remove and remove_weight_norm where they apply; PyTorch says: {first_line(error)}"
        ) from error
    for module in frozen.modules():
        if getattr(module, "inplace", False) is True:  # a head would change the map that it is given
            module.inplace = False  # type: ignore[assignment]
    for conv, norm in _foldable(frozen):
        _fold(frozen, conv, norm)
    if dtype is not None:
        _cast(frozen, dtype)
    if channels_last:
        frozen.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return frozen.eval()  # includes the modules that replace batch norms


def _check_forwards(model: nn.Module) -> None:
    """
    Raises:
        TypeError: a function that was set as a module's forward refers to a module, which a copy would call as well.
    """
    for name, module in model.named_modules():
        forward = module.__dict__.get("forward")
        if hasattr(module, "_orig_mod"):  # a compiled model copies its own
            continue
        if any(isinstance(getattr(value, "__self__", value), nn.Module) for value in _held(forward)):
            kind = type(inner_model(model)).__name__
            where = f"{name.removeprefix('model.')}.forward of {kind}" if name else f"{kind}.forward"
            raise TypeError(
                f"{where} was replaced by {getattr(forward, '__qualname__', type(forward).__name__)}, in which a copy "
                "of the model would call the original: expected a method (types.MethodType) or a subclass"
            )


def _held(function: object) -> list[object]:
    """The objects that a function or a functools.partial refers to: its defaults, its closure, its arguments."""
    if isinstance(function, partial):
        values = [function.func, *function.args, *function.keywords.values()]
        return [*values, *(inner for value in values for inner in _held(value))]
    if not isinstance(function, FunctionType):
        return []
    held = list(function.__defaults__ or ())
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # an empty cell
            held.append(cell.cell_contents)
    return held


class _Whole(nn.Module):
    """A call of the model, whatever its forward and its hooks do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(x)


class _Passes(_Whole):
    """Features and head in one graph, so that a module used by both is counted twice."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        model = cast(FeatureModel, self.model)
        features = model.forward_features(x)
        return features, model.forward_head(features)


class _Tracer(fx.Tracer):
    """Traces into a module only if something inside can be folded: others may branch on shapes."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        kinds = (nn.Conv2d, *_NORMS)
        return isinstance(m, kinds) or not any(isinstance(inner, kinds) for inner in m.modules())


def _foldable(model: nn.Module) -> list[tuple[str, str]]:
    """Name pairs (convolution, batch norm) in which only the batch norm reads the convolution's output."""
    if not any(isinstance(module, _NORMS) for module in model.modules()):
        return []  # nothing to fold, and transformers often do not trace
    pairs = _pairs(_Passes(model))
    if pairs and not composes(cast(FeatureModel, model)):
        called = set(_pairs(_Whole(model)))
        pairs = [pair for pair in pairs if pair in called]
    return pairs


def _pairs(passes: _Whole) -> list[tuple[str, str]]:
    """`_foldable` in one way to run the model."""
    try:
        graph = _Tracer().trace(passes)
    except Exception as error:  # tracing runs the model's Python code on proxies, which can raise anything
        kept = f"{type(inner_model(passes.model)).__name__} keeps its batch norms"
        warnings.warn(f"{kept}, torch.fx cannot trace it: {first_line(error)}", stacklevel=4)
        return []
    shared = _shared(passes.model)
    # A weight read directly (get_attr) is a use of its module as well.
    uses = Counter(
        str(node.target) if node.op == "call_module" else str(node.target).rpartition(".")[0]
        for node in graph.nodes
        if node.op in ("call_module", "get_attr")
    )

    def called_once(node: fx.Node) -> nn.Module | None:
        if node.op != "call_module" or uses[str(node.target)] != 1:
            return None
        module = passes.get_submodule(str(node.target))
        hooked = module._forward_hooks or module._forward_pre_hooks
        return None if hooked or not shared.isdisjoint(map(id, module.parameters())) else module

    pairs = []
    for norm in graph.nodes:
        if _is_foldable_norm(called_once(norm)):
            (conv,) = norm.all_input_nodes
            # Exactly Conv2d: a subclass may standardise its weights or pad in its own way.
            if type(called_once(conv)) is nn.Conv2d and len(conv.users) == 1:
                pairs.append((str(conv.target).removeprefix("model."), str(norm.target).removeprefix("model.")))
    return pairs


def _shared(model: nn.Module) -> set[int]:
    """Ids of the parameters that several modules have; the folded weight of one is wrong for the others."""
    owned = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    return {number for number, count in owned.items() if count > 1}


def _is_foldable_norm(norm: nn.Module | None) -> bool:
    """True for a batch norm of known arithmetic that has running statistics."""
    known = type(norm) in _NORMS or _has_activation(norm)
    return known and cast(nn.BatchNorm2d, norm).running_mean is not None


def _has_activation(norm: nn.Module | None) -> bool:
    """timm's BatchNormAct2d: a batch norm, then its own `drop` and `act`."""
    return isinstance(norm, nn.BatchNorm2d) and type(norm).__name__ == "BatchNormAct2d"


def _fold(model: nn.Module, conv_name: str, norm_name: str) -> None:
    """Fold the batch norm into the convolution and replace it by its activation or an identity."""
    conv, norm = cast(nn.Conv2d, model.get_submodule(conv_name)), cast(Any, model.get_submodule(norm_name))
    dtype = conv.weight.dtype
    model.set_submodule(conv_name, fuse_conv_bn_eval(conv.double(), norm.double()).to(dtype))
    model.set_submodule(norm_name, nn.Sequential(norm.drop, norm.act) if _has_activation(norm) else nn.Identity())


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast to `dtype`, but no batch norm below float32: its statistics need the range, and their cost is negligible."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and dtype.itemsize < 4:
            continue
        for tensor in chain(module.parameters(recurse=False), module.buffers(recurse=False)):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)
