"""Argument checks of the public functions: one-line errors that name both offending values, raised before any work.

They read only shapes, dtypes and Python numbers, so they need no synchronisation on a GPU and can be traced by
torch.compile. `count_labels` is the only check of tensor values and runs only for CPU tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.contract import MAX_TEACHERS as MAX_TEACHERS
from ..backends.contract import SecondLabels
from ..backends.dispatch import label_counter
from ..backends.memory import are_dense, is_ordinary
from .formula import check_number

REDUCTIONS = ("mean", "sum", "none")


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def check_floating(name: str, tensor: Tensor) -> None:
    check_tensor(name, tensor)
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point, got {_dtype(tensor)}")


def check_classes(name: str, logits: Tensor) -> None:
    check_floating(name, logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"{name} must be (..., C) with C >= 1, got shape {_shape(logits)}")


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}, but {other_name} is on {other.device}")


def as_teacher_list(name: str, teachers: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """K tensors from a sequence of K tensors or one (K, ...) tensor, whose slices are views."""
    if isinstance(teachers, Tensor):
        if teachers.dim() < 2:
            raise ValueError(f"{name} as one tensor must be (K, ..., C), got shape {_shape(teachers)}")
        teachers = list(teachers.unbind(0))
    elif not isinstance(teachers, (list, tuple)):
        raise TypeError(f"{name} must be a sequence of tensors or one tensor, got {type(teachers).__name__}")
    if not 1 <= len(teachers) <= MAX_TEACHERS:
        raise ValueError(f"{name} must hold 1 to {MAX_TEACHERS} teachers, got {len(teachers)}")
    return list(teachers)


def check_frozen(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires grad, but teachers get no gradient: expected a frozen teacher (use .detach())"
        )


def check_same_logits(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Same class count, same leading shape, same device."""
    if tensor.dim() == 0 or tensor.shape[-1] != other.shape[-1]:
        count = tensor.shape[-1] if tensor.dim() else "none"
        raise ValueError(f"{name} has {count} classes, but {other_name} has {other.shape[-1]}")
    if tensor.shape != other.shape:
        raise ValueError(f"{name} has shape {_shape(tensor)}, but {other_name} has {_shape(other)}")
    check_device(name, tensor, other_name, other)


def check_target(target: Tensor, second: SecondLabels | None, logits: Tensor, logits_name: str) -> None:
    """Labels of logits (..., C); `second`: the unchecked arguments `second_target` and `mix`."""
    _check_labels(target, second, logits.shape[:-1], logits, logits_name)


def check_sample_target(target: Tensor, second: SecondLabels | None, maps: Tensor, maps_name: str) -> None:
    """The same of maps (N, ...), with a row per sample."""
    _check_labels(target, second, maps.shape[:1], maps, maps_name)


def _check_labels(
    target: Tensor, second: SecondLabels | None, expected: torch.Size, other: Tensor, other_name: str
) -> None:
    _check_int64("target", target)
    if target.shape != expected:
        raise ValueError(f"target has shape {_shape(target)}, but {other_name} expects {tuple(expected)}")
    check_device("target", target, other_name, other)
    if second is not None:
        _check_second_labels(second, target)


def _check_int64(name: str, tensor: Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.dtype.is_floating_point:
        two = "; of labels with probabilities, two: target, and second_target with mix"
        raise TypeError(f"{name} must be int64, got {_dtype(tensor)}{two}")
    if tensor.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {_dtype(tensor)}")


def _check_second_labels(second: SecondLabels, target: Tensor) -> None:
    named: tuple[tuple[str, Any], ...] = tuple(zip(("second_target", "mix"), second, strict=True))
    for (name, value), (other_name, other) in (named, named[::-1]):
        if value is None:
            raise ValueError(f"{name} is None, but {other_name} is a {type(other).__name__}; give both or neither")
    _check_int64("second_target", second.target)
    check_floating("mix", second.mix)
    if second.mix.requires_grad and torch.is_grad_enabled():
        raise ValueError("mix requires grad, but labels get no gradient: expected a constant share (use .detach())")
    for name, value in named:
        if value.shape != target.shape:
            raise ValueError(f"{name} has shape {_shape(value)}, but target has {_shape(target)}")
        check_device(name, value, "target", target)


def check_logits(
    student: Tensor, teachers: Tensor | Sequence[Tensor], target: Tensor, second: SecondLabels | None
) -> list[Tensor]:
    """The tensors of the logit loss; returns the K teachers as a list."""
    check_classes("student_logits", student)
    teacher_list = as_teacher_list("teacher_logits", teachers)
    shape, device, gradless = student.shape, student.device, not torch.is_grad_enabled()
    for k, teacher in enumerate(teacher_list):
        if (  # the common case, in one expression; otherwise the checks below find the error
            isinstance(teacher, Tensor)
            and teacher.shape == shape
            and teacher.dtype.is_floating_point
            and teacher.device == device
            and (gradless or not teacher.requires_grad)
        ):
            continue
        name = f"teacher_logits[{k}]"
        check_floating(name, teacher)
        check_same_logits(name, teacher, "student_logits", student)
        check_frozen(name, teacher)
    check_target(target, second, student, "student_logits")
    return teacher_list


def check_weighting(weighting: Tensor, K: int, lead: Sequence[int], other: str, tensor: Tensor) -> None:
    """Weights (K,) or (K, *lead), on the device of `other`. Names of weightings are checked by `Formula.checked`."""
    check_floating("weighting", weighting)
    if weighting.shape != (K,) and weighting.shape != (K, *lead):
        raise ValueError(f"weighting has shape {_shape(weighting)}, but {K} teachers expect {(K,)} or {(K, *lead)}")
    check_device("weighting", weighting, other, tensor)


def check_num_items(num_items: float | Tensor | None, reduction: str) -> None:
    if num_items is None:
        return
    if reduction != "mean":
        raise ValueError(f"num_items is the divisor of reduction='mean', got reduction={reduction!r}")
    if not isinstance(num_items, Tensor):
        check_number("num_items", num_items, positive=True)
    check_scale("num_items", num_items)
    if isinstance(num_items, Tensor) and num_items.dtype in (torch.bfloat16, torch.float16):
        raise TypeError(f"num_items is {_dtype(num_items)}, which rounds counts: expected a number, int64 or float32")
    # 0 divides the sum of no rows, which is 0
    if isinstance(num_items, Tensor) and can_count(num_items) and not 0 <= float(num_items) < math.inf:
        raise ValueError(f"num_items must be at least 0 and finite, got {float(num_items)}")


def check_features(student: Sequence[Tensor], teachers: Sequence[Tensor]) -> None:
    """K pairs (N, ...) of one shape, the student's of one dtype, teachers frozen."""
    if len(student) != len(teachers):
        raise ValueError(f"student_features holds {len(student)} tensors, but teacher_features holds {len(teachers)}")
    first, gradless = student[0], not torch.is_grad_enabled()
    for k, (r, f) in enumerate(zip(student, teachers, strict=True)):
        if (  # the common case, in one expression; otherwise the checks below find the error
            isinstance(r, Tensor)
            and isinstance(f, Tensor)
            and r.shape == f.shape
            and r.dim() >= 2
            and r.shape[0] == first.shape[0]
            and r.dtype == first.dtype
            and r.dtype.is_floating_point
            and f.dtype.is_floating_point
            and r.device == f.device == first.device
            and (gradless or not f.requires_grad)
        ):
            continue
        mine, other = f"student_features[{k}]", f"teacher_features[{k}]"
        check_floating(mine, r)
        check_floating(other, f)
        if r.shape != f.shape or r.dim() < 2:
            raise ValueError(f"{mine} has shape {_shape(r)}, but {other} has {_shape(f)}; expected equal (N, ...)")
        if r.shape[0] != student[0].shape[0]:
            raise ValueError(f"{mine} has {r.shape[0]} samples, but student_features[0] has {student[0].shape[0]}")
        if r.dtype != student[0].dtype:
            raise TypeError(f"{mine} is {_dtype(r)}, but student_features[0] is {_dtype(student[0])}")
        check_device(other, f, mine, r)
        check_device(mine, r, "student_features[0]", student[0])
        check_frozen(other, f)


def check_scale(name: str, scale: float | Tensor) -> None:
    if isinstance(scale, Tensor):
        if scale.numel() != 1:
            raise ValueError(f"{name} must have one element, got shape {_shape(scale)}")
    else:
        check_number(name, scale, positive=False)


def can_count(target: Tensor) -> bool:
    """Whether the host reads these labels: in an ordinary call, in main memory."""
    return not torch.compiler.is_compiling() and target.is_cpu and is_ordinary([target])


def count_if_dense(target: Tensor, C: int, ignore_index: int, second: SecondLabels | None = None) -> int | None:
    """`count_labels` of dense labels (N,) in main memory; None for others, and second labels that are not are not read.

    Raises:
        ValueError: as `count_labels`.
    """
    if not target.is_cpu or not are_dense([target]):
        return None
    return count_labels(target, C, ignore_index, second if second is not None and are_dense(second) else None)


def count_labels(target: Tensor, C: int, ignore_index: int, second: SecondLabels | None = None) -> int:
    """Number of labels of a CPU `target` (N,) that are not `ignore_index`.

    Raises:
        ValueError: a label of a row that counts is outside [0, C), or its share is outside [0, 1].
    """
    valid, row = label_counter().count_labels(target, C, ignore_index, second)
    if row is not None:
        raise ValueError(_invalid_row(row, target, C, ignore_index, second))
    return valid


def _invalid_row(row: int, target: Tensor, C: int, ignore_index: int, second: SecondLabels | None) -> str:
    """What is wrong with the labels of that row."""
    label, there = int(target[row]), f"but there are {C} classes (ignore_index is {ignore_index})"
    if second is None or not 0 <= label < C:
        return f"target holds label {label}, {there}"
    label = int(second.target[row])
    if label == ignore_index or not 0 <= label < C:
        return f"second_target holds label {label} where target holds {int(target[row])}, {there}"
    return f"mix holds {float(second.mix[row])}, but the share of a label is in [0, 1]"
