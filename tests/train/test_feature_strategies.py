"""Feature terms of the strategies: hints, confidence weights of maps, and their gradients."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from camkd_fast.data.batch import Batch
from camkd_fast.models.protocol import Prediction
from camkd_fast.train import strategies
from camkd_fast.train.strategies import Strategy
from camkd_fast.train.teachers.live import LiveTeachers
from tests.support.strategies import (
    FEATURES,
    WITH_FEATURES,
    WITH_TEACHERS,
    Case,
    Tiny,
    case,
    confidence,
    live,
    logit_loss,
)
from tests.support.tensor_kinds import default_dtype

pytestmark = pytest.mark.usefixtures("one_thread")


def regressed(strategy: Strategy, batch: Case) -> list[Tensor]:
    return strategy.maps.regress(batch.student.features, [t.features for t in batch.outputs])


def test_hints_are_the_mean_of_the_squared_errors_and_their_gradient_is_alive() -> None:
    batch = case(3)
    strategy = strategies.create("fitnet-mkd", batch.teachers, FEATURES)
    term = strategy.feature_term(batch.student, batch.outputs, batch.target)
    pairs = zip(regressed(strategy, batch), batch.outputs, strict=True)
    expected = 100 * torch.stack([F.mse_loss(r, t.features) for r, t in pairs]).mean()
    torch.testing.assert_close(term.loss, expected)
    term.loss.backward()
    assert batch.student.features.grad.abs().sum() > 0
    owned = list(strategy.parameters())
    assert len(owned) == 3 * 3  # per teacher: convolution, scale and offset of the batch norm
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in owned)


@pytest.mark.parametrize("name", ["fitnet-mkd", "ca-mkd"])
def test_the_default_dtype_changes_no_bit(name: str) -> None:
    batch = case(3)
    strategy = strategies.create(name, batch.teachers, FEATURES)
    expected = strategy.feature_term(batch.student, batch.outputs, batch.target).loss
    with default_dtype(torch.bfloat16):
        found = strategy.feature_term(batch.student, batch.outputs, batch.target).loss
    assert found.dtype == expected.dtype and torch.equal(found, expected)


@pytest.mark.parametrize("official", [False, True])
def test_ca_mkd_weighs_maps_by_what_the_heads_make_of_them(official: bool) -> None:
    batch = case(3)
    strategy = strategies.create("ca-mkd", batch.teachers, FEATURES, official_scale=official)
    term = strategy.feature_term(batch.student, batch.outputs, batch.target)
    maps = regressed(strategy, batch)
    logits = [head(r) for head, r in zip(batch.teachers.heads, maps, strict=True)]
    weights = confidence(logits, batch.target)
    errors = [(r - t.features).square().mean((1, 2, 3)) for r, t in zip(maps, batch.outputs, strict=True)]
    expected = 50 / (3 if official else 1) * (weights * torch.stack(errors)).sum(0).mean()
    torch.testing.assert_close(term.loss, expected)
    torch.testing.assert_close(term.weights, weights.detach())
    assert not term.weights.requires_grad
    term.loss.backward()
    assert batch.student.features.grad.abs().sum() > 0


def test_either_part_of_ca_mkd_can_weigh_all_teachers_alike() -> None:
    batch = case(3)

    def both(uniform: str) -> tuple[Tensor, Tensor, Tensor | None]:
        torch.manual_seed(1)
        strategy = strategies.create("ca-mkd", batch.teachers, FEATURES, uniform=uniform)
        term = strategy.feature_term(batch.student, batch.outputs, batch.target)
        return logit_loss(strategy, batch).weights, term.loss, term.weights

    torch.manual_seed(1)
    hints = strategies.create("fitnet-mkd", batch.teachers, FEATURES, beta=50.0)
    equal = hints.feature_term(batch.student, batch.outputs, batch.target).loss
    ours, logits, features = both("none"), both("logits"), both("features")
    third = torch.full((3, 7), 1 / 3)
    torch.testing.assert_close(logits[0], third)
    torch.testing.assert_close(logits[1:], ours[1:])
    torch.testing.assert_close(features[0], ours[0])
    torch.testing.assert_close(features[1], equal)
    assert features[2] is None and not torch.allclose(ours[0], third) and not torch.allclose(ours[1], equal)


def test_the_gradient_through_the_feature_weights_is_an_option() -> None:
    gradients = []
    for detach in (True, False):
        torch.manual_seed(1)
        batch = case(2)
        strategy = strategies.create("ca-mkd", batch.teachers, FEATURES, detach_weights=detach)
        term = strategy.feature_term(batch.student, batch.outputs, batch.target)
        term.loss.backward()
        assert not term.weights.requires_grad
        gradients.append(batch.student.features.grad)
    assert (gradients[0] - gradients[1]).norm() > 1e-3 * gradients[0].norm()


@pytest.mark.parametrize("name", WITH_FEATURES)
def test_parts_of_a_batch_add_up_under_num_items(name: str) -> None:
    batch = case(2, N=9)
    batch.target[4] = -100
    strategy = strategies.create(
        name, batch.teachers, FEATURES
    ).eval()  # batch norm in training mode depends on the part

    def term(rows: slice, num_items: float | Tensor | None) -> Tensor:
        student = Prediction(batch.student.features[rows], batch.student.logits[rows])
        outputs = [Prediction(t.features[rows], t.logits[rows]) for t in batch.outputs]
        return strategy.feature_term(student, outputs, batch.target[rows], num_items).loss

    whole = term(slice(None), None)
    parts = term(slice(0, 3), 8) + term(slice(3, 9), torch.tensor(8.0))
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("name", WITH_FEATURES)
def test_feature_terms_are_float32_whatever_precision_surrounds_them(name: str) -> None:
    batch = case(2)
    strategy = strategies.create(name, batch.teachers, FEATURES)
    expected = strategy.feature_term(batch.student, batch.outputs, batch.target)
    half = Prediction(batch.student.features.detach().bfloat16().requires_grad_(), batch.student.logits)
    outputs = [Prediction(t.features.bfloat16(), t.logits) for t in batch.outputs]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        term = strategy.feature_term(half, outputs, batch.target)
    assert term.loss.dtype == torch.float32
    torch.testing.assert_close(term.loss, expected.loss, rtol=2e-2, atol=0)
    term.loss.backward()
    assert half.features.grad.dtype == torch.bfloat16 and half.features.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", WITH_FEATURES)
def test_autocast_changes_no_bit_of_a_feature_term(name: str, dtype: torch.dtype) -> None:
    batch = case(2)
    strategy = strategies.create(name, batch.teachers, FEATURES)

    def term() -> list[torch.Tensor]:
        loss, weights, *_ = strategy.feature_term(batch.student, batch.outputs, batch.target)
        gradients = torch.autograd.grad(loss, [batch.student.features, *strategy.maps.parameters()])
        return [loss, *gradients, *([] if weights is None else [weights])]

    expected = term()
    with torch.autocast("cpu", dtype=dtype):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(term(), expected, strict=True))


def test_heads_of_bfloat16_teachers_take_float32_maps() -> None:
    teachers = LiveTeachers([Tiny(4).to(torch.bfloat16), Tiny(5)], num_classes=5)
    batch = case(2)
    images = torch.randn(7, 3, 8, 8)
    outputs = teachers(Batch(images, batch.target, batch.target, 0))
    assert [t.logits.dtype for t in outputs] == [torch.bfloat16, torch.float32]
    term = strategies.create("ca-mkd", teachers, FEATURES).feature_term(batch.student, outputs, batch.target)
    term.loss.backward()
    assert math.isfinite(term.loss.item()) and batch.student.features.grad.abs().sum() > 0


@pytest.mark.parametrize("name", WITH_FEATURES)
def test_pooled_maps_of_a_teacher_cache_are_regressed_like_any_other(name: str) -> None:
    batch = case(2)
    strategy = strategies.create(name, batch.teachers, FEATURES)
    pooled = [t._replace(features=t.features.mean((2, 3), keepdim=True)) for t in batch.outputs]
    term = strategy.feature_term(batch.student, pooled, batch.target)
    small = batch.student._replace(features=batch.student.features.mean((2, 3), keepdim=True))
    torch.testing.assert_close(term.loss, strategy.feature_term(small, pooled, batch.target).loss)


@pytest.mark.parametrize("name", WITH_TEACHERS)
def test_a_strategy_owns_its_maps_and_nothing_of_the_teachers(name: str) -> None:
    strategy = strategies.create(name, live(2), FEATURES)
    assert len(list(strategy.parameters())) == (2 * 3 if name in WITH_FEATURES else 0)
    assert strategy.needs_features == (name in WITH_FEATURES) and strategy.needs_teachers
