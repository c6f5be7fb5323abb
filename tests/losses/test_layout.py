"""Layouts: transposed, padded, sliced, expanded, several leading dimensions, stride-0 cotangents."""

import pytest
import torch

from camkd_fast import camkd_loss_and_grad, confidence_weights
from tests.support.cases import Case, make_case, poisoned_slice
from tests.support.evaluate import run, run_value_and_grad
from tests.support.tolerance import assert_near, assert_result
from tests.support.truth import naive, truth


def transposed(z: torch.Tensor) -> torch.Tensor:
    return z.transpose(-1, -2).contiguous().transpose(-1, -2)


def every_other_row(z: torch.Tensor) -> torch.Tensor:
    wide = torch.full((2 * z.shape[0], *z.shape[1:]), float("nan"), dtype=z.dtype)
    wide[::2] = z
    return wide[::2]


def every_other_column(z: torch.Tensor) -> torch.Tensor:
    wide = torch.full((*z.shape[:-1], 2 * z.shape[-1]), float("nan"), dtype=z.dtype)
    wide[..., ::2] = z
    return wide[..., ::2]


LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "transposed": transposed,
    "padded": lambda z: poisoned_slice(z, pad=5),
    "unaligned": lambda z: poisoned_slice(z, pad=0, offset=1),
    "every other row": every_other_row,
    "every other column": every_other_column,
    "equal rows, stride 0": lambda z: z[:1].contiguous().expand_as(z),
    "one value, strides 0": lambda z: z[:1, :1].clone().expand_as(z),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("student", LAYOUTS)
@pytest.mark.parametrize("teacher", LAYOUTS)
def test_two_dimensions(teacher, student, dtype, backend):
    case = make_case(9, 67, dtype=dtype, padded=False, ignored=0.2)
    laid_out = case.with_(
        student=LAYOUTS[student](case.student), teachers=tuple(LAYOUTS[teacher](z) for z in case.teachers)
    )
    dense = laid_out.with_(
        student=laid_out.student.clone(memory_format=torch.contiguous_format),
        teachers=tuple(z.clone(memory_format=torch.contiguous_format) for z in laid_out.teachers),
    )
    assert_result(run(laid_out, backend), laid_out, truth(dense), naive(dense))
    # The gradient is contiguous whatever the layout of the inputs.
    _, grad = camkd_loss_and_grad(laid_out.student, laid_out.teachers, laid_out.target, backend=backend)
    assert grad.is_contiguous() and grad.shape == case.student.shape


@pytest.mark.parametrize("lead", [(), (1,), (12,), (3, 4), (2, 3, 2), (2, 1, 3, 2)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_any_number_of_leading_dimensions(reduction, lead, backend):
    N = int(torch.tensor(lead).prod())
    weighting = torch.rand(3, *lead)
    for options in ({}, {"weighting": weighting}):
        case = make_case(N, 33, lead=lead, reduction=reduction, **options)
        grad_output = torch.randn(lead) if reduction == "none" else None
        result = run(case, backend, grad_output)
        assert result.weights.shape == result.teacher_ce.shape == result.divergence.shape == (3, *lead)
        assert result.loss.shape == result.hard.shape == result.soft.shape == (lead if reduction == "none" else ())
        assert result.grad.shape == (*lead, 33)
        assert_result(result, case, truth(case, grad_output), naive(case, grad_output), scale=4.0)


VIEWS = {
    "[:, :-1]": lambda z: z[:, :-1],
    "[:, 1:]": lambda z: z[:, 1:],
    "[:, -1:]": lambda z: z[:, -1:],
    "[::2]": lambda z: z[::2],
    "[:, ::3]": lambda z: z[:, ::3],
    "transpose": lambda z: z.transpose(0, 1),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_slices_of_token_logits(view, backend):
    whole = make_case(24, 33, lead=(4, 6), ignored=0.2)
    case = whole.with_(
        student=view(whole.student), teachers=tuple(view(z) for z in whole.teachers), target=view(whole.target)
    )
    R, N = truth(case), naive(case)
    assert_result(run(case, backend), case, R, N)
    assert_result(run_value_and_grad(case, backend), case, R, N)


def test_teachers_as_one_tensor(backend):
    for lead in ((), (12,), (3, 4)):
        case = make_case(int(torch.tensor(lead).prod()), 33, lead=lead, padded=False)
        stacked = torch.stack(case.teachers)
        split, whole = run(case, backend), run(case.with_(teachers=stacked), backend)
        assert all(torch.equal(a, b) for a, b in zip(whole[:-1], split[:-1], strict=True))
        # K is the first dimension of the shape but the last but one in memory.
        interleaved = torch.stack(case.teachers, dim=-2).movedim(-2, 0)
        assert not lead or not interleaved.is_contiguous()
        for a, b in zip(run(case.with_(teachers=interleaved), backend)[:-1], split[:-1], strict=True):
            assert_near(a, b)


def test_teachers_may_be_one_tensor_and_the_student_too(backend):
    case = make_case(9, 33)
    shared = case.with_(teachers=(case.student,) * 3)
    assert_result(run(shared, backend), shared, truth(shared), naive(shared))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_cotangent_of_stride_zero(dtype, backend):
    case = make_case(9, 33, dtype=dtype, reduction="none")
    for grad_output in (torch.tensor(0.3).expand(9), torch.randn(18)[::2], torch.randn(9).flip(0)):
        R, N = truth(case, grad_output), naive(case, grad_output)
        assert_result(run(case, backend, grad_output), case, R, N, scale=float(grad_output.abs().max()))


def test_labels_of_any_layout(backend):
    case = make_case(12, 33, lead=(3, 4))
    wide = torch.full((3, 9), -1, dtype=torch.int64)
    wide[:, 1:9:2] = case.target
    scattered = case.with_(target=wide[:, 1:9:2])
    swapped = case.with_(target=case.target.t().contiguous().t())
    for other in (scattered, swapped):
        assert not other.target.is_contiguous()
        assert torch.equal(run(other, backend).grad, run(case, backend).grad)
    same = case.with_(target=torch.tensor(5).expand(3, 4))
    assert_result(run(same, backend), same, truth(same), naive(same))


def test_per_row_weights_of_any_layout(backend):
    weights = torch.rand(12, 3)
    case = make_case(12, 33, weighting=weights.t().contiguous())
    for layout in (weights.t(), torch.rand(3, 24)[:, ::2].copy_(weights.t())):
        assert not layout.is_contiguous()
        ours, expected = run(case.with_(weighting=layout), backend), run(case, backend)
        assert torch.equal(ours.grad, expected.grad) and torch.equal(ours.grad_weighting, expected.grad_weighting)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_confidence_weights(layout, backend):
    case = make_case(9, 67, padded=False)
    logits = [LAYOUTS[layout](z) for z in case.teachers]
    dense = Case(case.student, tuple(z.clone(memory_format=torch.contiguous_format) for z in logits), case.target)
    weights, ce = confidence_weights(logits, case.target, backend=backend)
    R = truth(dense)
    assert_near(weights, R.weights.float())
    assert_near(ce, R.teacher_ce.float())
