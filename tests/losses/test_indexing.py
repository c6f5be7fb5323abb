"""Offsets beyond 32 bits: a few rows far apart, and in the slow run whole batches of more than 2^31 elements."""

import numpy
import pytest
import torch

from camkd_fast import camkd_loss_and_grad, confidence_weights, weighted_feature_loss
from tests.support.backends import BACKENDS
from tests.support.cases import Case, make_case
from tests.support.evaluate import run, run_value_and_grad
from tests.support.tolerance import assert_near, assert_result, rms
from tests.support.truth import naive, truth


def untouched(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros that take memory only for pages that are written; torch.zeros might touch them all."""
    return torch.from_numpy(numpy.zeros(elements * dtype.itemsize, dtype=numpy.uint8)).view(dtype)


def far_apart(values: torch.Tensor, stride: int) -> torch.Tensor:
    rows, C = values.shape
    buffer = untouched((rows - 1) * stride + C, values.dtype)
    view = buffer.as_strided((rows, C), (stride, 1))
    view.copy_(values)
    return view


@pytest.mark.parametrize("C", [100, 33000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rows_further_apart_than_2_to_the_31_elements(dtype, C, backend):
    # Two strides exceed 2^31 elements, and one exceeds 2^31 bytes, where an int offset in bytes overflows.
    case = make_case(3, C, 2, dtype, padded=False)
    stride = 2**30 + 2**20 + 7
    far = case.with_(
        student=far_apart(case.student, stride), teachers=tuple(far_apart(z, stride) for z in case.teachers)
    )
    assert (far.student.shape[0] - 1) * stride > 2**31
    R, N = truth(case), naive(case)
    assert_result(run(far, backend), far, R, N)
    assert_result(run_value_and_grad(far, backend), far, R, N)
    weights, ce = confidence_weights(far.teachers, far.target, backend=backend)
    assert_near(weights, R.weights.float())
    assert_near(ce, R.teacher_ce.float())


def test_batches_of_tokens_further_apart_than_2_to_the_31_elements(backend):
    case = make_case(6, 50, 2, torch.bfloat16, lead=(3, 2), padded=False)
    stride = 2**30 + 2**20 + 7

    def far(z: torch.Tensor) -> torch.Tensor:
        view = untouched(2 * stride + 200, z.dtype).as_strided((3, 2, 50), (stride, 61, 1))
        return view.copy_(z)

    spread = case.with_(student=far(case.student), teachers=tuple(far(z) for z in case.teachers))
    assert_result(run(spread, backend), spread, truth(case), naive(case))


def test_features_further_apart_than_2_to_the_31_elements(backend):
    stride = 2**30 + 2**20 + 7
    generator = torch.Generator().manual_seed(2)
    near = [torch.randn(3, 40, generator=generator).bfloat16() for _ in range(2)]
    student, teacher = (far_apart(x, stride).view(3, 40) for x in near)
    loss = weighted_feature_loss([student], [teacher], torch.ones(1, 3), reduction="none", backend=backend)
    expected = (near[0].double() - near[1].double()).square().mean(1)
    assert_near(loss, expected.float())


def test_more_rows_than_16_bits(backend):
    case = make_case(2**16 + 5, 3, 2)
    assert_result(run(case, backend), case, truth(case), naive(case))


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "C"), [(2**31 // 32000 + 9, 32000), (2**31 // 1000 + 9, 1000)])
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_more_than_2_to_the_31_elements(backend, rows, C):
    # The student takes 4.3 GB and the gradient as much; teachers are one row each. Not on the reference, which would
    # hold a dozen float32 copies.
    generator = torch.Generator().manual_seed(4)
    block = torch.randn(64, C, generator=generator).bfloat16()
    student = untouched(rows * C, torch.bfloat16).view(rows, C)
    for first in range(0, rows, 64):
        student[first : first + 64] = block[: rows - first]
    assert student.numel() > 2**31
    teachers = [torch.randn(1, C, generator=generator).bfloat16().expand(rows, C) for _ in range(3)]
    target = torch.randint(C, (64,), generator=generator).repeat(rows // 64 + 1)[:rows]
    out, grad = camkd_loss_and_grad(student, teachers, target, reduction="sum", backend=backend)
    small = Case(block, tuple(z[:64] for z in teachers), target[:64], reduction="sum")
    R = truth(small)
    # All blocks of rows are equal: the last must equal the first bit for bit, and the first must be accurate.
    for first in (0, (rows // 128) * 64, (rows // 64 - 1) * 64):
        assert torch.equal(grad[first : first + 64], grad[:64])
    last = (rows - 1) % 64
    assert torch.equal(grad[-1], grad[last]) and torch.equal(out.weights[:, -1], out.weights[:, last])
    assert rms(grad[:64].double() - R.grad) <= 0.004 * rms(R.grad)
