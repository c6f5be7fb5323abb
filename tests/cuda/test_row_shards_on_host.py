"""The CUDA kernel of rows of which some of the columns are here, executed on the host (see test_row_loss_on_host.py).

tests/backends/test_row_shards.py has the same for the other backends.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.backends.test_row_shards import BF16, BOUNDS, DIVERGENCES, F16, F32, INF, NAN, WEIGHTINGS
from tests.support.cases import make_case
from tests.support.row_contract import assert_agrees
from tests.support.shards import in_shards

pytest.importorskip("camkd_fast._C")
pytest.importorskip("pybind11")
from camkd_fast.backends import cuda as cuda_backend
from tests.cuda.host.on_host import cuda_on_the_host, emulated

__all__ = ["cuda_on_the_host", "emulated"]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.3])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_every_divergence_weighting_and_temperature(divergence: Any, weighting: str, temperature: float) -> None:
    """A warp per row, and a block per row; both with maps and without."""
    i = WEIGHTINGS.index(weighting)
    peaked, dtype, K = i % 2 == 0 and weighting != "entropy", (F32, BF16, F16, F32, F32)[i], (3, 2, 4, 6, 3)[i]
    for C, bounds in ((40, BOUNDS[40][1]), (5003, (0, 2400, 5003))):
        case = make_case(12 if peaked or C == 40 else 3, C, K, dtype, peaked=peaked, ignored=0.2)
        options: dict[str, Any] = {
            "temperature": temperature, "divergence": divergence, "weighting": weighting, "hard_weight": 0.5,
            "z_loss_weight": 0.1 * (i % 2), "scale_by_t2": i % 3 > 0, "student_softcap": 6.0 if i == 3 else None,
            "teacher_logit_scales": (0.5,) * K if i == 3 else None,
        }  # fmt: skip
        if weighting == "given":
            options["weighting"] = torch.tensor([[0.2], [0.0], [0.9]]).expand(3, case.target.numel())
        shards = in_shards(cuda_backend, bounds)
        assert_agrees(shards, case.student, list(case.teachers), case.target, **options)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_masked_shards(divergence: Any) -> None:
    """Shards without a finite logit of the student, of a teacher or of both; labels there, too."""
    student, *teachers = (torch.randn(9, 40, generator=torch.Generator().manual_seed(k)) for k in range(3))
    student[0, 13:26], teachers[0][1, :13], teachers[1][2, 13:26], teachers[1][8, :13] = -INF, -INF, -INF, -INF
    for z in (student, *teachers):
        z[3, 26:39], z[4, :39], z[5, :13] = -INF, -INF, -1e30
    target = torch.tensor([14, 3, 20, 27, 39, 4, -100, 39, 30])
    shards = in_shards(cuda_backend, BOUNDS[40][2])
    assert_agrees(shards, student, teachers, target, divergence=divergence, temperature=2.0)


def test_labels_of_no_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN where nobody has the label; assertions on labels do not hold for shards."""
    monkeypatch.setattr(cuda_backend, "DEBUG", True)
    student, *teachers = (torch.randn(5, 40, generator=torch.Generator().manual_seed(k)) for k in range(3))
    student[1], teachers[0][1] = NAN, INF
    for ignore_index in (-100, 3, -1):
        target = torch.tensor([40, ignore_index, 7, -5, 39])
        shards = in_shards(cuda_backend, BOUNDS[40][1])
        for weighting in ("confidence", "uniform"):
            assert_agrees(shards, student, teachers, target, ignore_index=ignore_index, weighting=weighting)


def test_gradient_in_place_and_its_scale() -> None:
    case = make_case(6, 40, 2, padded=False)

    def in_place(student: torch.Tensor, *others: Any, **options: Any) -> Any:
        return in_shards(cuda_backend, (0, 40))(copy := student.clone(), *others, out=copy, **options)

    for divergence in DIVERGENCES:
        for scale in (0.25, torch.tensor([0.25])):
            assert_agrees(
                in_place, case.student, list(case.teachers), case.target,
                divergence=divergence, grad_scale=scale, student_softcap=5.0,
            )  # fmt: skip
