"""The mean over labels on a device: the backend counts the rows and reduces them there.

On a CPU the host counts labels while it checks them. Here that count is disabled, so that CPU tensors follow the path
of GPU tensors.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from camkd_fast import camkd_loss, camkd_loss_and_grad
from camkd_fast.backends import dispatch
from camkd_fast.losses import checks
from tests.support.cases import make_case
from tests.support.evaluate import run, run_value_and_grad
from tests.support.tolerance import assert_accurate, assert_result
from tests.support.truth import naive, truth

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy in the interpreter, on masked lanes

LEARNED = torch.tensor([0.5, 0.3, 0.9])


@pytest.fixture(autouse=True)
def _no_count_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "count_labels", lambda *_: None)


@pytest.fixture(params=["reference", "triton"])
def device_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("weighting", ["confidence", LEARNED], ids=["confidence", "learned"])
@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])
def test_float32(device_backend: str, ignored: float, weighting: str | torch.Tensor) -> None:
    case = make_case(12, 20, 3, ignored=ignored, weighting=weighting)
    R, N = truth(case), naive(case)
    for ours in (run(case, device_backend), run_value_and_grad(case, device_backend)):
        assert_result(ours, case, R, N)


def test_float16_is_divided_in_backward_unless_there_is_a_loss_scale(
    device_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scaling float16 gradients by 1/N in the kernel could underflow, so it is done only under a loss scale."""
    case = make_case(12, 20, 3, torch.float16, ignored=0.3)
    module, in_kernel = dispatch.backend_for(device_backend, [case.student]), []
    original = module.row_loss

    def watch(*tensors: Any, **options: Any) -> Any:
        in_kernel.append(options.get("mean", False))
        return original(*tensors, **options)

    monkeypatch.setattr(module, "row_loss", watch)
    unscaled, scaled = run(case, device_backend), run_value_and_grad(case, device_backend, 64.0)
    assert in_kernel == [False, True]
    R, N = truth(case), naive(case)
    # One unit in the last place, relative to the gradient: the two roundings to float16 in kernel and backward.
    floor = torch.finfo(torch.float16).eps * float(R.grad.square().mean().sqrt())
    assert_accurate(unscaled.grad, R.grad, N.grad, "grad", floor)
    assert_accurate(scaled.grad, 64 * R.grad, 64 * N.grad, "scaled grad", 64 * floor)


@pytest.mark.parametrize("scale", [8.0, torch.tensor(8.0), torch.tensor([8.0])], ids=["number", "scalar", "vector"])
def test_loss_scale(device_backend: str, scale: float | torch.Tensor) -> None:
    case = make_case(12, 20, 3, ignored=0.3)
    factor = torch.tensor(8.0)
    ours, R, N = run_value_and_grad(case, device_backend, scale), truth(case, factor), naive(case, factor)
    assert_result(ours, case, R, N, scale=8.0)


def test_incoming_gradient_and_retained_graph(device_backend: str) -> None:
    case = make_case(12, 20, 3)
    incoming = torch.tensor(-2.5)
    R, N = truth(case, incoming), naive(case, incoming)
    assert_accurate(run(case, device_backend, incoming).grad, R.grad, N.grad, "grad")
    student = case.student.detach().requires_grad_()
    loss = camkd_loss(student, case.teachers, case.target, backend=device_backend).loss
    first, second = (torch.autograd.grad(loss, student, incoming, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_the_loss_may_be_written_to(device_backend: str) -> None:
    """As in loops that accumulate gradients: `loss /= steps`."""
    case = make_case(4, 10, 2)
    student = case.student.detach().requires_grad_()
    loss = camkd_loss(student, case.teachers, case.target, backend=device_backend).loss
    loss /= 2
    loss.backward()
    R, N = truth(case), naive(case)
    assert student.grad is not None
    assert_accurate(student.grad, R.grad / 2, N.grad / 2, "grad")
    out, _ = camkd_loss_and_grad(case.student, case.teachers, case.target, backend=device_backend)
    hard = out.hard.clone()
    out.loss /= 2
    assert torch.equal(out.hard, hard)
