"""The measure itself: the tolerance rule rejects what it must, the poison works, the cases are what they claim."""

import pytest
import torch

from tests.support.cases import make_case
from tests.support.evaluate import run
from tests.support.tolerance import assert_accurate
from tests.support.truth import naive, truth

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("peaked", [False, True], ids=["noise", "peaked"])
@pytest.mark.parametrize(("N", "C"), [(64, 100), (7, 32000)])
def test_rule_rejects_a_zero_and_a_slightly_wrong_gradient(N, C, peaked, dtype):
    case = make_case(N, C, dtype=dtype, peaked=peaked)
    R, N_ = truth(case).grad, naive(case).grad
    assert_accurate(R.to(dtype), R, N_)
    for wrong in (torch.zeros_like(R), 1.01 * R, 0.99 * R, R.roll(1, 0), -R):
        with pytest.raises(AssertionError, match="RMS error"):
            assert_accurate(wrong.to(dtype), R, N_)


def test_rule_rejects_nan_and_a_finite_number_for_infinity():
    R = torch.tensor([1.0, float("inf")], dtype=torch.float64)
    assert_accurate(R.float(), R, R)
    for wrong in ([1.0, 1e30], [1.0, float("nan")], [float("nan"), float("inf")]):
        with pytest.raises(AssertionError):
            assert_accurate(torch.tensor(wrong), R, R)


def test_uninitialised_memory_is_poisoned():
    like = torch.ones(5)
    for fresh in (torch.empty(5), torch.empty_like(like), like.new_empty(5), torch.empty_strided((2, 2), (1, 2))):
        assert fresh.isnan().all()
    assert torch.empty(5, dtype=torch.bfloat16).isnan().all()


def test_half_of_the_inputs_is_peaked_and_none_is_trivially_laid_out():
    noise, peaked = make_case(64, 100), make_case(64, 100, peaked=True)
    confidence = [torch.stack(c.teachers).softmax(-1).amax(-1).median() for c in (noise, peaked)]
    assert confidence[0] < 0.2 and confidence[1] > 0.9
    right = (torch.stack(peaked.teachers).argmax(-1) == peaked.target).float().mean(1)
    assert right[0] > right[1] > right[2] > 0.1
    assert not any(z.is_contiguous() for z in (peaked.student, *peaked.teachers))
    assert len({z.stride() for z in (peaked.student, *peaked.teachers)}) > 2


def test_a_run_computes_from_the_view_alone():
    case = make_case(4, 10)
    assert case.student._base is not None and case.student._base.isnan().any()
    assert run(case, "reference").grad.isfinite().all()
