"""Who multiplies the gradient by loss_scale / divisor."""

from __future__ import annotations

import pytest
import torch

from camkd_fast.losses.scale_plan import inverse_divisor, plan_scales

F32, F16 = torch.float32, torch.float16
CPU, META = torch.device("cpu"), torch.device("meta")
SCALES = [None, 8.0, torch.tensor(8.0), torch.tensor([8.0])]


@pytest.mark.parametrize("tracing", [False, True])
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, F16], ids=str)
@pytest.mark.parametrize("loss_scale", SCALES, ids=["none", "number", "scalar", "vector"])
@pytest.mark.parametrize("inverse", [1.0, 0.25, torch.tensor([0.25])], ids=["one", "number", "tensor"])
def test_the_invariant(inverse, loss_scale, dtype, tracing):
    plan = plan_scales(inverse, loss_scale, dtype, F32, CPU, tracing)
    expected = float(inverse) * (1.0 if loss_scale is None else float(loss_scale))
    assert float(plan.in_kernel) * float(plan.in_backward) == expected
    assert plan.inverse_divisor is inverse
    if loss_scale is not None:
        assert plan.in_backward == 1.0  # the kernel writes the finished gradient
    if isinstance(plan.in_kernel, torch.Tensor):
        assert plan.in_kernel.shape == (1,) and plan.in_kernel.dtype == F32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_scale_of_lower_precision_is_exact(dtype):
    """1 / 7 has to be rounded, 3 has not."""
    plan = plan_scales(1 / 7, torch.tensor(3.0, dtype=dtype), torch.float64, torch.float64, CPU)
    assert float(plan.in_kernel) == 3 * (1 / 7)


@pytest.mark.parametrize("loss_scale", SCALES, ids=["none", "number", "scalar", "vector"])
def test_the_invariant_if_the_kernel_counts(loss_scale):
    plan = plan_scales(None, loss_scale, F32, F32, CPU)
    assert plan.inverse_divisor is None
    assert float(plan.in_kernel) * float(plan.in_backward) == (1.0 if loss_scale is None else float(loss_scale))


@pytest.mark.parametrize("inverse", [None, 0.25, torch.tensor([0.25], device=META)], ids=["kernel", "number", "tensor"])
def test_a_scale_on_another_device_is_moved_to_the_students(inverse):
    """A kernel takes its address."""
    plan = plan_scales(inverse, torch.tensor(8.0), F32, F32, META)
    assert isinstance(plan.in_kernel, torch.Tensor) and plan.in_kernel.device == META


def test_float16_is_divided_in_backward_without_a_loss_scale():
    assert plan_scales(1 / 4096, None, F16, F32, CPU)[:2] == (1.0, 1 / 4096)
    assert plan_scales(1 / 4096, 1.0, F16, F32, CPU)[:2] == (1 / 4096, 1.0)
    assert plan_scales(1 / 4096, None, F32, F32, CPU)[:2] == (1 / 4096, 1.0)


@pytest.mark.parametrize(
    ("num_items", "valid", "expected"),
    [(None, 4, 0.25), (None, 0, 1.0), (None, None, 1 / 3), (5, 4, 0.2), (torch.tensor(5), 4, 0.2)],
    ids=["counted", "no valid row", "on the device", "number", "tensor"],
)
def test_the_divisor(num_items, valid, expected):
    labels = torch.tensor([1, -100, 2, 0])
    inverse = inverse_divisor(num_items, valid, labels, -100, F32)
    assert float(inverse) == float(torch.tensor(expected, dtype=F32)) or inverse == expected
    assert isinstance(inverse, torch.Tensor) == (
        isinstance(num_items, torch.Tensor) or (num_items, valid) == (None, None)
    )
