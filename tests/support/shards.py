"""The row op of rows whose columns lie in several places, put together in one process."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from camkd_fast.backends.contract import CROSS, SLOPE, RowLossResult, ShardBackend
from camkd_fast.backends.row_sums import is_mixture, merged
from tests.support.row_contract import RowFunction

IGNORED, ELSEWHERE = -7, -8


def in_shards(backend: ShardBackend, bounds: Sequence[int]) -> RowFunction:
    """`Backend.row_loss` by the columns bounds[0] .. bounds[1] - 1, and so on, each by itself. All of them must find
    the same numbers of whole rows."""

    def row_loss(
        student: Tensor, teachers: Sequence[Tensor], target: Tensor, formula: Any, **options: Any
    ) -> RowLossResult:
        ignored, formula = target == formula.ignore_index, formula._replace(ignore_index=IGNORED)
        shards = []
        for begin, end in itertools.pairwise(bounds):
            local = (target - begin).where((target >= begin) & (target < end), ELSEWHERE).masked_fill(ignored, IGNORED)
            shards.append((student[..., begin:end], [z[..., begin:end] for z in teachers], local, formula))
        sums, owners = merged(torch.stack([backend.row_sums(*shard) for shard in shards]), formula)
        C = student.shape[-1]
        assert torch.equal(owners[~ignored], ((target >= 0) & (target < C))[~ignored].long())
        if is_mixture(formula):
            of_mixtures = [backend.row_sums(*shard, sums) for shard in shards]
            for i in (CROSS, SLOPE):
                sums[1:, i] = torch.stack([part[1:, i] for part in of_mixtures]).sum(0)
        found = [backend.row_results(*shard, sums, **options) for shard in shards]
        for one in found[1:]:
            torch.testing.assert_close(one.row_stats, found[0].row_stats, rtol=0, atol=0, equal_nan=True)
        if not options["needs_grad"]:
            return found[0]
        return found[0]._replace(grad_student=torch.cat([one.grad_student for one in found], dim=-1))

    return row_loss
