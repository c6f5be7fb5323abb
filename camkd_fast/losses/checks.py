"""Argument checks of the public functions: one-line errors that name both offending values, raised before any work.

They read only shapes, dtypes and Python numbers, so they need no synchronisation on a GPU and can be traced by
torch.compile. `count_labels` is the only check of tensor values and runs only for CPU tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends.contract import MAX_TEACHERS
from ..backends.dispatch import label_counter
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


def check_target(target: Tensor, logits: Tensor, logits_name: str) -> None:
    _check_labels(target, logits.shape[:-1], logits, logits_name)


def check_sample_target(target: Tensor, maps: Tensor, maps_name: str) -> None:
    """One label per sample of maps (N, ...)."""
    _check_labels(target, maps.shape[:1], maps, maps_name)


def _check_labels(target: Tensor, expected: torch.Size, other: Tensor, other_name: str) -> None:
    check_tensor("target", target)
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64, got {_dtype(target)}")
    if target.shape != expected:
        raise ValueError(f"target has shape {_shape(target)}, but {other_name} expects {tuple(expected)}")
    check_device("target", target, other_name, other)


def check_logits(student: Tensor, teachers: Tensor | Sequence[Tensor], target: Tensor) -> list[Tensor]:
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
    check_target(target, student, "student_logits")
    return teacher_list


def check_weighting(weighting: Tensor, K: int, student: Tensor) -> None:
    """Given weights; the name of a weighting is checked by `Formula.checked`."""
    check_floating("weighting", weighting)
    if weighting.shape != (K,) and weighting.shape != (K, *student.shape[:-1]):
        allowed = f"{(K,)} or {(K, *student.shape[:-1])}"
        raise ValueError(f"weighting has shape {_shape(weighting)}, but {K} teachers expect {allowed}")
    check_device("weighting", weighting, "student_logits", student)


def check_num_items(num_items: float | Tensor | None, reduction: str) -> None:
    if num_items is None:
        return
    if reduction != "mean":
        raise ValueError(f"num_items is the divisor of reduction='mean', got reduction={reduction!r}")
    if not isinstance(num_items, Tensor):
        check_number("num_items", num_items, positive=True)
    check_scale("num_items", num_items)


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


def count_labels(target: Tensor, C: int, ignore_index: int) -> int:
    """Number of labels of a CPU `target` (N,) that are not `ignore_index`; raises for labels outside [0, C)."""
    valid, invalid = label_counter().count_labels(target, C, ignore_index)
    if invalid is not None:
        raise ValueError(f"target holds label {invalid}, but there are {C} classes (ignore_index is {ignore_index})")
    return valid
