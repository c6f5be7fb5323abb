"""Argument checks of the linear loss: one-line errors that name both offending values, raised before any work."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends import memory
from ..backends.contract import MAX_TEACHERS
from ..backends.dispatch import BACKENDS
from . import checks
from .entry import Way, way_of_call
from .formula import Formula, check_choice, check_flag, check_int, check_number
from .layout import weight_rows
from .linear_chunks import Side
from .vocabulary import VocabularyShard

# Ways out for subclasses of Tensor with operations of their own, by name: importing DTensor takes long.
_REMEDIES = {"a DTensor": "call .full_tensor(), or .to_local() with the group and vocab_range of these classes"}
_REMEDY = "convert it, such as by .dequantize()"


def checked_sides(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    teacher_hidden: Sequence[Tensor],
    teacher_heads: Sequence[Tensor],
    teacher_biases: Sequence[Tensor | None] | None,
    shift: bool,
) -> list[Side]:
    """Student and K teachers as dense tensors."""
    check_flag("shift", shift)
    K = _count("teacher_hidden", teacher_hidden)
    biases = [None] * K if teacher_biases is None else teacher_biases
    for name, values in (("teacher_heads", teacher_heads), ("teacher_biases", biases)):
        if _count(name, values) != K:
            raise ValueError(f"{name} holds {len(values)} entries, but teacher_hidden holds {K}")
    student = _checked_side("student", Side(hidden, head, bias), None)
    if shift and hidden.dim() < 2:
        raise ValueError(f"shift needs hidden states (..., S, H), got shape {tuple(hidden.shape)}")
    teachers = [
        _checked_side(f"teacher[{k}]", Side(*of), student.hidden)
        for k, of in enumerate(zip(teacher_hidden, teacher_heads, biases, strict=True))
    ]
    return [student, *teachers]


def _count(name: str, values: Any) -> int:
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{name} must be a sequence with an entry per teacher, got {type(values).__name__}")
    if not 1 <= len(values) <= MAX_TEACHERS:
        raise ValueError(f"{name} must hold 1 to {MAX_TEACHERS} entries, got {len(values)}")
    return len(values)


def _checked_side(model: str, side: Side, student: Tensor | None) -> Side:
    """`student`: the student's hidden states, for a teacher."""
    names = {"hidden": side.hidden, "head": side.head, "bias": side.bias}
    dense = {field: _dense(f"{model}'s {field}", value) for field, value in names.items() if value is not None}
    hidden, head, bias = dense["hidden"], dense["head"], dense.get("bias")
    for field, tensor in dense.items():
        checks.check_floating(f"{model}'s {field}", tensor)
        if student is not None:
            checks.check_frozen(f"{model}'s {field}", tensor)
        checks.check_device(f"{model}'s {field}", tensor, "student's hidden", hidden if student is None else student)
        if tensor.dtype != hidden.dtype and not autocast_enabled(hidden):
            raise TypeError(f"{model}'s {field} is {tensor.dtype}, but its hidden states are {hidden.dtype}")
    if hidden.dim() == 0 or head.dim() != 2 or head.shape[1] != hidden.shape[-1] or head.shape[0] == 0:
        raise ValueError(
            f"{model}'s hidden states (..., H) have shape {tuple(hidden.shape)}, but its head (C, H) has shape "
            f"{tuple(head.shape)}"
        )
    if bias is not None and bias.shape != head.shape[:1]:
        raise ValueError(f"{model}'s bias has shape {tuple(bias.shape)}, but its head has {head.shape[0]} classes")
    if student is not None and hidden.shape[:-1] != student.shape[:-1]:
        raise ValueError(
            f"{model}'s hidden states have shape {tuple(hidden.shape)}, but the student's have {tuple(student.shape)}"
        )
    return Side(hidden, head, bias)


def autocast_enabled(tensor: Tensor) -> bool:
    """For the device of `tensor`; meta tensors have none."""
    device = tensor.device.type
    # torch.compile before torch 2.11 does not trace is_autocast_available.
    available = device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)
    return available and torch.is_autocast_enabled(device)


def _dense(name: str, tensor: Tensor) -> Tensor:
    checks.check_tensor(name, tensor)
    if torch.compiler.is_compiling():
        return tensor
    tensor, kind = memory.resolve(tensor)
    if kind is None or kind.fake:
        return tensor
    remedy = kind.remedy or _REMEDIES.get(kind.name, _REMEDY)
    raise TypeError(f"{name} must be a dense tensor, got {kind.name}: {remedy}")


def checked_vocabulary(
    sides: Sequence[Side],
    vocab_size: int | None,
    group: Any,
    vocab_range: tuple[int, int] | None,
    reduce_input_grad: bool,
) -> tuple[int, VocabularyShard | None]:
    """How many classes exist here, and which ones they are if a group shares them."""
    own = sides[0].head.shape[0]
    shard = _checked_shard(own, vocab_size, group, vocab_range, reduce_input_grad)
    vocab_size = vocab_size if shard is None else shard.stop - shard.start
    if vocab_size is not None:
        check_int("vocab_size", vocab_size, 1)
    V = own if vocab_size is None else int(vocab_size)
    for i, side in enumerate(sides):
        if side.head.shape[0] < V:
            model = "student's" if i == 0 else f"teacher[{i - 1}]'s"
            raise ValueError(f"{model} head has {side.head.shape[0]} classes, but the vocabulary has {V}")
    return V, shard


def _checked_shard(
    rows: int, vocab_size: int | None, group: Any, vocab_range: tuple[int, int] | None, reduce_input_grad: bool
) -> VocabularyShard | None:
    """The classes of this process, if a group shares them; `rows` are those of the student's head."""
    check_flag("reduce_input_grad", reduce_input_grad)
    if group is None:
        if vocab_range is not None:
            raise ValueError(f"vocab_range {vocab_range!r} needs the group that shares the classes, got group=None")
        return None
    if vocab_size is not None:
        raise ValueError(f"vocab_size {vocab_size} and a group exclude each other: vocab_range names the classes here")
    name = getattr(group, "group_name", None)
    if not isinstance(name, str):
        raise TypeError(f"group must be a torch.distributed.ProcessGroup, got {type(group).__name__}")
    if vocab_range is None:
        start = dist.get_rank(group) * rows
        return VocabularyShard(name, start, start + rows, reduce_input_grad)
    integers = isinstance(vocab_range, (tuple, list)) and all(isinstance(x, numbers.Integral) for x in vocab_range)
    if not integers or len(vocab_range) != 2:
        raise TypeError(f"vocab_range must be two ints, (start, stop), got {vocab_range!r}")
    start, stop = map(int, vocab_range)
    if not 0 <= start < stop:
        raise ValueError(f"vocab_range must be (start, stop) with 0 <= start < stop, got ({start}, {stop})")
    return VocabularyShard(name, start, stop, reduce_input_grad)


def check_mode() -> None:
    """
    Raises:
        NotImplementedError: a mode or transform has to see every operation, where only the logits themselves serve.
    """
    if way_of_call() is Way.EXPRESSION:
        mode = "a torch.func transform" if torch.compiler.is_compiling() else memory.observer()
        raise NotImplementedError(f"camkd_linear_loss cannot run in {mode}: make the logits and call camkd_loss")


def check_settings(
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    chunk_rows: int | None = None,
    max_chunk_bytes: float = 1.0,
    num_valid: int | None = None,
    logits_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> None:
    check_choice("reduction", reduction, checks.REDUCTIONS)
    checks.check_num_items(num_items, reduction)
    check_choice("backend", backend, ("auto", *BACKENDS))
    for name, value, least in (("chunk_rows", chunk_rows, 1), ("num_valid", num_valid, 0)):
        if value is not None:
            check_int(name, value, least)
    check_number("max_chunk_bytes", max_chunk_bytes, positive=True)
    if logits_dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"logits_dtype must be torch.float32 or torch.bfloat16, got {logits_dtype}")


def checked_labels(target: Tensor, hidden: Tensor, formula: Formula, shift: bool) -> tuple[Tensor, Formula, bool]:
    """int64 labels in the shape of the hidden states' rows, the formula for them, and whether the target is a mask.

    With `shift` the last position predicts nothing, and every other one the label after it.
    """
    target = _dense("target", target)
    is_mask = target.dtype == torch.bool
    if not is_mask and target.dtype != torch.int64:
        raise TypeError(f"target must be int64 labels or a bool mask, got {target.dtype}")
    if target.shape != hidden.shape[:-1]:
        raise ValueError(
            f"target has shape {tuple(target.shape)}, but the student's hidden states expect {tuple(hidden.shape[:-1])}"
        )
    checks.check_device("target", target, "student's hidden", hidden)
    if is_mask:
        if formula.weighting_name() in ("confidence", "min_ce"):
            raise ValueError(f"weighting {formula.weighting_name()!r} needs labels, but target is a bool mask")
        if formula.hard_weight != 0.0:
            raise ValueError(f"hard_weight {formula.hard_weight} needs labels, but target is a bool mask")
        formula = formula.replaced(ignore_index=-100)
        target = torch.where(target, 0, formula.ignore_index)
    if shift and target.shape[-1] > 0:
        target = torch.nn.functional.pad(target[..., 1:], (0, 1), value=formula.ignore_index)
    return target, formula, is_mask


def weights_as_rows(
    weighting: str | Tensor, K: int, lead: torch.Size, shift: bool, labels: Tensor, dtype: torch.dtype
) -> str | Tensor:
    """Given weights (K,) or (K, ...) as (K, N); a name as it is."""
    if not isinstance(weighting, Tensor):
        return weighting
    weighting = _dense("weighting", weighting)
    if weighting.requires_grad and torch.is_grad_enabled():
        raise ValueError("weighting requires grad, but weights get no gradient here: expected constants (.detach())")
    shift = shift and lead[-1] > 0
    expected = (*lead[:-1], lead[-1] - 1) if shift else tuple(lead)
    checks.check_weighting(weighting, K, expected, "target", labels)
    if shift and weighting.dim() > 1:
        weighting = torch.nn.functional.pad(weighting, (0, 1))
    return weight_rows(weighting, K, labels.numel(), dtype)
