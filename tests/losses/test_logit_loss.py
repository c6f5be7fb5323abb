"""The logit loss against float64 over class counts, dtypes and numbers of teachers."""

import functools

import pytest
import torch

from tests.support.cases import Case, make_case
from tests.support.evaluate import Result, run, run_value_and_grad
from tests.support.tolerance import assert_result
from tests.support.truth import naive, truth

# Thinned from C x K x N x dtype. Each of them has code of its own (tile remainders, teacher count, row blocks, load
# width), and they interact only through what fits on chip. So each C appears with few rows and few K, 4096 rows only
# where R takes under a second, and bfloat16 and float16 at one C of every regime.
SHAPES = [
    # N, C, K
    *[(3, C, 3) for C in (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 65, 127, 129, 255, 257, 1023, 1025)],
    *[(7, 10, K) for K in (1, 2, 3, 5, 16)],
    *[(289, 100, K) for K in (1, 2, 3, 5, 16)],
    *[(7, 1000, K) for K in (1, 2, 5, 16)],
    (1, 1, 1),
    (1, 100, 3),
    (64, 100, 3),
    (4096, 100, 3),
    (1, 1000, 3),
    (289, 1000, 3),
    (289, 1128, 2),
    (7, 21841, 3),
    (1, 32000, 3),
    (33, 32000, 2),
    (2, 65537, 5),
    (3, 128256, 3),
    (1, 151936, 16),
    (2, 262144, 2),
    (70000, 4, 2),
]
NARROW_SHAPES = [(1, 1, 2), (64, 10, 3), (289, 100, 5), (7, 1000, 3), (33, 1128, 3), (3, 32000, 3), (1, 128256, 2)]
NARROW = [torch.bfloat16, torch.float16]


@functools.lru_cache(maxsize=2)  # one R and N for all backends
def measured(N: int, C: int, K: int, dtype: torch.dtype, peaked: bool) -> tuple[Case, Result, Result]:
    case = make_case(N, C, K, dtype, peaked=peaked, ignored=0.1 if N > 5 else 0.0)
    return case, truth(case), naive(case)


@pytest.mark.parametrize("peaked", [False, True], ids=["noise", "peaked"])
@pytest.mark.parametrize(("N", "C", "K"), SHAPES)
def test_float32(N, C, K, peaked, backend):
    case, R, eager = measured(N, C, K, torch.float32, peaked)
    assert_result(run(case, backend), case, R, eager, "camkd_loss")
    assert_result(run_value_and_grad(case, backend), case, R, eager, "camkd_loss_and_grad")


@pytest.mark.parametrize("peaked", [False, True], ids=["noise", "peaked"])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize(("N", "C", "K"), NARROW_SHAPES)
def test_sixteen_bits(N, C, K, dtype, peaked, backend):
    case, R, eager = measured(N, C, K, dtype, peaked)
    ours = run(case, backend)
    assert ours.grad.dtype == dtype and ours.loss.dtype == ours.teacher_ce.dtype == torch.float32
    assert_result(ours, case, R, eager, "camkd_loss")
    assert_result(run_value_and_grad(case, backend), case, R, eager, "camkd_loss_and_grad")
