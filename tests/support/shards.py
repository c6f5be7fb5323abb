"""The row op of rows whose columns lie in several places, put together in one process."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from camkd_fast.backends.contract import CENTER, CROSS, RowLossResult, ShardBackend
from camkd_fast.backends.row_sums import is_mixture, merged
from tests.support.cases import make_case
from tests.support.row_contract import RowFunction, assert_agrees

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
INF, NAN = float("inf"), float("nan")
DIVERGENCES: list[Any] = ["forward_kl", "reverse_kl", ("jsd", 0.3), ("skew", 0.1)]
WEIGHTINGS = ("confidence", "uniform", "entropy", "min_ce", "given")
UNEVEN, FOUR = (0, 1, 17, 40), (0, 13, 26, 39, 40)  # bounds of 40 columns
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
            for i in (CROSS, CENTER):
                sums[1:, i] = torch.stack([part[1:, i] for part in of_mixtures]).sum(0)
        found = [backend.row_results(*shard, sums, **options) for shard in shards]
        for one in found[1:]:
            torch.testing.assert_close(one.row_stats, found[0].row_stats, rtol=0, atol=0, equal_nan=True)
        if not options["needs_grad"]:
            return found[0]
        return replace(found[0], grad_student=torch.cat([one.grad_student for one in found], dim=-1))

    return row_loss


def check_formula(
    backend: ShardBackend, bounds: Sequence[int], divergence: Any, weighting: str, temperature: float
) -> None:
    """Of rows as wide as the last bound. Dtypes, numbers of teachers and the other constants go with the weighting."""
    i = WEIGHTINGS.index(weighting)
    peaked, dtype, K = i % 2 == 0 and weighting != "entropy", (F32, BF16, F16, F32, F32)[i], (3, 2, 4, 6, 3)[i]
    case = make_case(12, bounds[-1], K, dtype, peaked=peaked, ignored=0.2)
    options: dict[str, Any] = {
        "temperature": temperature, "divergence": divergence, "weighting": weighting, "hard_weight": 0.5,
        "z_loss_weight": 0.1 * (i % 2), "scale_by_t2": i % 3 > 0, "student_softcap": 6.0 if i == 3 else None,
        "teacher_logit_scales": (0.5,) * K if i == 3 else None,
    }  # fmt: skip
    if weighting == "given":
        options["weighting"] = torch.tensor([[0.2], [0.0], [0.9]]).expand(3, 12)
    assert_agrees(in_shards(backend, bounds), case.student, list(case.teachers), case.target, **options)


def check_masked_shards(backend: ShardBackend, divergence: Any) -> None:
    """Shards without a finite logit of the student, of a teacher or of both; labels there, too."""
    student, *teachers = (torch.randn(9, 40, generator=torch.Generator().manual_seed(k)) for k in range(3))
    student[0, 13:26], teachers[0][1, :13], teachers[1][2, 13:26], teachers[1][8, :13] = -INF, -INF, -INF, -INF
    for z in (student, *teachers):
        z[3, 26:39], z[4, :39], z[5, :13] = -INF, -INF, -1e30
    # A shard of probability 0, where the student has none at all
    teachers[0][7, 13:26], student[7, 14] = -1e5, -INF
    target = torch.tensor([14, 3, 20, 27, 39, 4, -100, 39, 30])
    assert_agrees(in_shards(backend, FOUR), student, teachers, target, divergence=divergence, temperature=2.0)


def check_labels_of_no_shard(backend: ShardBackend) -> None:
    """NaN where nobody has the label, as for whole rows; ignored rows may hold anything."""
    student, *teachers = (torch.randn(5, 40, generator=torch.Generator().manual_seed(k)) for k in range(3))
    student[1], teachers[0][1] = NAN, INF
    for ignore_index in (-100, 3, -1):
        target = torch.tensor([40, ignore_index, 7, -5, 39])
        for weighting in ("confidence", "uniform"):
            assert_agrees(
                in_shards(backend, UNEVEN), student, teachers, target, ignore_index=ignore_index, weighting=weighting
            )


def check_gradient_in_place(backend: ShardBackend) -> None:
    """With a factor that is a number or on the device."""
    case = make_case(6, 40, 2, padded=False)

    def in_place(student: Tensor, *others: Any, **options: Any) -> RowLossResult:
        return in_shards(backend, (0, 40))(copy := student.clone(), *others, out=copy, **options)

    for divergence in DIVERGENCES:
        for scale in (0.25, torch.tensor([0.25])):
            assert_agrees(
                in_place, case.student, list(case.teachers), case.target,
                divergence=divergence, grad_scale=scale, student_softcap=5.0,
            )  # fmt: skip
