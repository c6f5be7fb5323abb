"""The classes of a vocabulary spread over processes: the row loss of a process's own columns of the logits.

Every process has the same rows and the columns of its own classes. It sums up over these, all processes exchange their
sums, and each computes the numbers of whole rows, the same bits everywhere, and the gradient of its own columns. One
collective of 7 (K + 1) numbers a row, and for jsd and skew another one of 2 K.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends.contract import CENTER, CROSS, RowLossResult, ShardBackend
from ..backends.row_sums import is_mixture, merged
from .formula import Formula

_IGNORED, _ELSEWHERE = -1, -2  # labels that are no class of this process
# Ranges of this process that fitted those of the others, by group: on a GPU they are read once, which waits for it.
_fitting: WeakKeyDictionary[dist.ProcessGroup, set[tuple[int, int]]] = WeakKeyDictionary()


class VocabularyShard(NamedTuple):
    """The classes `start` .. `stop` - 1 of this process."""

    group_name: str  # the name of the process group that shares the vocabulary
    start: int
    stop: int
    reduce_input_grad: bool  # whether the gradient of the hidden states is that of all classes

    def row_loss(
        self,
        backend: ShardBackend,
        student: Tensor,
        teachers: Sequence[Tensor],
        labels: Tensor,
        formula: Formula,
        *,
        needs_grad: bool,
        grad_scale: float | Tensor,
        out: Tensor,
    ) -> RowLossResult:
        """`Backend.row_loss` of whole rows, and the gradient of the logits (N, stop - start) that are here.

        Raises:
            ValueError: the ranges of the processes overlap or leave a gap; on a CPU, for a label that is in none.
        """
        ignored = labels == formula.ignore_index
        formula = formula.replaced(ignore_index=_IGNORED)
        own = (labels >= self.start) & (labels < self.stop)
        local = torch.where(own, labels - self.start, _ELSEWHERE).masked_fill(ignored, _IGNORED)
        parts = self._gathered(backend.row_sums(student, teachers, local, formula))
        self._check_ranges(parts)
        sums, owners = merged(parts, formula)
        if labels.is_cpu and (wrong := (owners != 1) & ~ignored).any():
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"label {int(labels[row])} is in the vocab_range of {int(owners[row])} processes, but exactly one must "
                f"have it; that of this process is ({self.start}, {self.stop})"
            )
        if is_mixture(formula):
            here = backend.row_sums(student, teachers, local, formula, sums)
            # One by one: a list of indices would be copied to the device, which waits.
            of_mixtures = torch.stack([here[1:, CROSS], here[1:, CENTER]])
            self.all_reduce(of_mixtures)
            sums[1:, CROSS], sums[1:, CENTER] = of_mixtures.unbind()
        return backend.row_results(
            student, teachers, local, formula, sums, needs_grad=needs_grad, grad_scale=grad_scale, out=out
        )

    def all_reduce(self, tensor: Tensor) -> None:
        """Adds up over the processes, in place."""
        dist.all_reduce(tensor, group=self._group())

    def _gathered(self, sums: Tensor) -> Tensor:
        """(R, K + 1, 7, N) of all processes, in the order of their ranks.

        Their ranges come along in the first row, in two sums that a student has no use for. A collective of their own
        would have to be in the same call on all processes, but a range may change on a few of them.
        """
        sums[0, CROSS, :1].fill_(self.start)
        sums[0, CENTER, :1].fill_(self.stop)
        every = sums.new_empty((dist.get_world_size(self._group()), *sums.shape))
        dist.all_gather(list(every.unbind()), sums, group=self._group())
        return every

    def _check_ranges(self, parts: Tensor) -> None:
        """
        Raises:
            ValueError: as `check_ranges`. On a GPU in the first call with this group and range only.
        """
        fitting = _fitting.setdefault(self._group(), set())
        if parts.is_cuda and ((self.start, self.stop) in fitting or torch.cuda.is_current_stream_capturing()):
            return
        check_ranges([(int(start), int(stop)) for start, stop in parts[:, 0, [CROSS, CENTER], 0].tolist()])
        fitting.add((self.start, self.stop))

    def _group(self) -> dist.ProcessGroup:
        found = dist.distributed_c10d._resolve_process_group(self.group_name)  # type: ignore[attr-defined, arg-type]
        return found


def check_ranges(ranges: Sequence[tuple[int, int]]) -> None:
    """
    Args:
        ranges: (start, stop) of every process.

    Raises:
        ValueError: the ranges are not the classes from 0 on, each of them once.
    """
    order = sorted(range(len(ranges)), key=ranges.__getitem__)
    if ranges[order[0]][0] != 0:
        raise ValueError(f"vocab_range {ranges[order[0]]} of process {order[0]} is the first one and must begin at 0")
    for i, j in itertools.pairwise(order):
        if ranges[i][1] != ranges[j][0]:
            fault = "overlap" if ranges[i][1] > ranges[j][0] else "leave a gap"
            raise ValueError(
                f"vocab_range {ranges[i]} of process {i} and {ranges[j]} of process {j} {fault}: every class must be "
                "in exactly one"
            )
