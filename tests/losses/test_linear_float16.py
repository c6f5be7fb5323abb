"""The linear loss in float16 as it is trained: divided by the number of tokens, and scaled against underflow."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from tests.support.linear_cases import LinearCase, evaluate, make_linear_case, unfused
from tests.support.tolerance import rms

TOKENS = 2.0**20  # of an accumulated batch: a logit's gradient is then below the least float16
SCALE = 65536.0  # of torch.amp.GradScaler


def case_of(**options: Any) -> LinearCase:
    return make_linear_case(300, 2000, (16, 24), hard_weight=1.0, temperature=4.0, **options)


def relative_errors(case: LinearCase, autocast: bool, scale: float) -> list[float]:
    """Of the gradients of hidden states, head and bias, scaled back in float64."""
    mode = torch.autocast("cpu", torch.float16) if autocast else contextlib.nullcontext()
    parameters = [x.clone().requires_grad_() for x in (case.hidden, case.head, case.bias)]
    with mode:
        loss = evaluate(case, *parameters).loss
    found = torch.autograd.grad(loss.sum(), parameters, torch.tensor(scale))
    R = unfused(case, torch.float64)
    truths = (R.grad_hidden, R.grad_head, R.grad_bias)
    return [rms(g.double() / scale - r) / rms(r) for g, r in zip(found, truths, strict=True)]


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "float16 model"])
@pytest.mark.parametrize("num_items", [None, TOKENS, torch.tensor(TOKENS)], ids=["rows", "number", "tensor"])
def test_a_mean_over_many_tokens_does_not_underflow(num_items: Any, autocast: bool) -> None:
    case = case_of()
    case = (case if autocast else case.to(torch.float16)).with_(num_items=num_items)
    assert max(relative_errors(case, autocast, SCALE)) < 2e-3  # two units of float16


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "float16 model"])
def test_factors_beyond_the_range_of_float16(autocast: bool) -> None:
    case = case_of(reduction="sum").with_(hard_weight=0.02, soft_weight=0.0)
    case = case if autocast else case.to(torch.float16)
    assert max(relative_errors(case, autocast, 2 * SCALE)) < 2e-3


def test_a_loss_per_row_is_scaled_before_it_is_rounded() -> None:
    case = case_of(reduction="none").to(torch.float16)
    whole = case.with_(reduction="mean", num_items=TOKENS)
    parameters = [x.clone().requires_grad_() for x in (case.hidden, case.head)]
    loss = evaluate(case, *parameters, case.bias).loss
    found = torch.autograd.grad((loss * (SCALE / TOKENS)).sum(), parameters)
    R = unfused(whole, torch.float64)
    for g, r in zip(found, (R.grad_hidden, R.grad_head), strict=True):
        assert rms(g.double() / SCALE - r) < 2e-3 * rms(r)
