"""What differs between two steps, in memory that stays where it is, so that a CUDA graph can read it.

Inputs on the host, such as labels, crops and cache rows, travel in one record: they are packed into pinned memory,
which one asynchronous copy brings to the device. A copy per input costs more of the host's time than the packing, and
copies from pageable memory are staged by the driver. Images that a loader has pinned are copied from where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes: kernels may load 16 at once
SLOTS = 16  # pinned records; one is written again after its copy has ended, so the host is at most this far ahead


class StepInputs:
    """The inputs of one step on the device.

    Args:
        like: tensors of the number, shapes, dtypes and devices of every step's inputs.

    Attributes:
        tensors: the inputs on the device, in the order of `like`; filled anew, never replaced.
    """

    def __init__(self, like: Sequence[Tensor], device: torch.device) -> None:
        self._packed = [tensor.device.type == "cpu" and not tensor.is_pinned() for tensor in like]
        host = [tensor for tensor, packed in zip(like, self._packed, strict=True) if packed]
        self._record, parts = _record(host, device)
        views = iter(parts)
        self.tensors = [
            next(views) if packed else torch.empty_like(tensor, device=device)
            for tensor, packed in zip(like, self._packed, strict=True)
        ]
        self._slots = [_Slot(host, pinned=device.type == "cuda") for _ in range(SLOTS)]
        self._number = 0

    def fill(self, given: Sequence[Tensor]) -> None:
        """Copy the inputs of a step, in the order of the current stream.

        The caller may change them afterwards, but for pinned tensors, which the device reads later.
        """
        slot = self._slots[self._number % SLOTS]
        self._number += 1
        slot.pack([tensor for tensor, packed in zip(given, self._packed, strict=True) if packed])
        slot.copy_to(self._record)
        for mine, tensor, packed in zip(self.tensors, given, self._packed, strict=True):
            if not packed:
                mine.copy_(tensor, non_blocking=True)


class _Slot:
    """A record on the host."""

    def __init__(self, like: Sequence[Tensor], pinned: bool) -> None:
        self._record, self._parts = _record(like, torch.device("cpu"), pinned)
        self._copied = torch.cuda.Event(blocking=True) if pinned else None  # type: ignore[no-untyped-call]

    def pack(self, given: Sequence[Tensor]) -> None:
        if self._copied is not None:
            self._copied.synchronize()  # returns at once unless the host is SLOTS steps ahead
        for part, tensor in zip(self._parts, given, strict=True):
            part.copy_(tensor)

    def copy_to(self, record: Tensor) -> None:
        record.copy_(self._record, non_blocking=True)
        if self._copied is not None:
            self._copied.record()


def _record(like: Sequence[Tensor], device: torch.device, pinned: bool = False) -> tuple[Tensor, list[Tensor]]:
    """Memory for tensors of these shapes, dtypes and strides: all of it as bytes (R,), and its parts."""
    sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in like]
    ends = list(accumulate(sizes))
    record = torch.empty(ends[-1] if ends else 0, dtype=torch.uint8, device=device, pin_memory=pinned)
    parts = []
    for tensor, size, end in zip(like, sizes, ends, strict=True):
        form = torch.empty_like(tensor, device="meta")  # dense: strides of a slice are not kept
        part = record[end - size : end - size + tensor.nbytes].view(tensor.dtype)
        parts.append(part.as_strided(form.shape, form.stride(), part.storage_offset()))
    return record, parts
