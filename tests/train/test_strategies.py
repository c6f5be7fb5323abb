"""Strategies: weights, strengths and feature terms against the formulas, and their gradients."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camkd_fast import camkd_loss, camkd_loss_and_grad
from camkd_fast.data.batch import Batch
from camkd_fast.models.protocol import Prediction
from camkd_fast.train import strategies
from camkd_fast.train.min_norm import min_norm_weights
from camkd_fast.train.strategies import Strategy
from camkd_fast.train.teachers.live import LiveTeachers

T = 4.0
FEATURES = 6  # channels of the student
WITH_TEACHERS = tuple(name for name in strategies.names() if name != "ce")
WITH_FEATURES = ("fitnet-mkd", "ca-mkd")


pytestmark = pytest.mark.usefixtures("one_thread")


class Tiny(nn.Module):
    """One convolution that halves the image, global average pooling, one linear layer."""

    def __init__(self, channels: int, num_classes: int = 5) -> None:
        super().__init__()
        self.num_features, self.num_classes = channels, num_classes
        self.conv = nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self.fc = nn.Linear(channels, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()

    def forward_head(self, features: Tensor) -> Tensor:
        return self.fc(features.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def live(K: int) -> LiveTeachers:
    return LiveTeachers([Tiny(3 + k) for k in range(K)], num_classes=5)


class Case(NamedTuple):
    """One batch with the outputs of K teachers and of the student, whose tensors are leaves of the graph."""

    teachers: LiveTeachers
    outputs: list[Prediction]
    student: Prediction
    target: Tensor


def case(K: int, N: int = 7, spread: float = 4.0) -> Case:
    teachers = live(K)
    images = torch.randn(N, 3, 8, 8)
    target = torch.randint(5, (N,))
    # Peaked logits, so that confidences and entropies differ.
    outputs = [p._replace(logits=spread * torch.randn(N, 5)) for p in teachers(Batch(images, target, target, 0))]
    student = Prediction(torch.randn(N, FEATURES, 5, 5).relu_().requires_grad_(), torch.randn(N, 5).requires_grad_())
    return Case(teachers, outputs, student, target)


def logit_loss(strategy: Strategy, batch: Case, **keywords: object):
    logits = [t.logits for t in batch.outputs]
    weighting = strategy.weighting(batch.student.logits, batch.outputs, batch.target)
    return camkd_loss(
        batch.student.logits,
        logits,
        batch.target,
        **{**strategy.formula.options(), "weighting": weighting, **keywords},
    )


def soft_losses(batch: Case) -> Tensor:
    """T^2 KL_k as (K, N), with torch functions only."""
    log_q = F.log_softmax(batch.student.logits / T, 1)
    kl = [F.kl_div(log_q, F.softmax(t.logits / T, 1), reduction="none").sum(1) for t in batch.outputs]
    return T**2 * torch.stack(kl)


def confidence(logits: list[Tensor], target: Tensor) -> Tensor:
    ce = torch.stack([F.cross_entropy(z, target, reduction="none") for z in logits])
    return (1 - ce.softmax(0)) / (len(logits) - 1)


# --- strengths -------------------------------------------------------------------------------------------------------


def official_strength(name: str, K: int) -> float:
    """Sum of the weights after the official code's division, for K teachers and alpha 1."""
    if K == 1:
        return 1.0
    return {"ebkd": (K - 1) / K, "ca-mkd-logits": 1 / K, "ca-mkd": 1 / K}.get(name, 1.0)


@pytest.mark.parametrize("K", [1, 2, 3, 5])
@pytest.mark.parametrize("name", WITH_TEACHERS)
def test_equal_alpha_is_equal_strength_unless_the_official_scale_is_asked_for(name: str, K: int) -> None:
    batch = case(K)
    for official, expected in ((False, 1.0), (True, official_strength(name, K))):
        strategy = strategies.create(name, batch.teachers, FEATURES, alpha=0.7, official_scale=official)
        total = strategy.formula.soft_weight * logit_loss(strategy, batch).weights.sum(0)
        torch.testing.assert_close(total, torch.full((7,), 0.7 * expected, dtype=total.dtype))
        if name in WITH_FEATURES:
            divisor = K if official and name == "ca-mkd" else 1
            assert strategy.beta == {"fitnet-mkd": 100.0, "ca-mkd": 50.0}[name] / divisor


def test_the_strengths_that_were_published_for_three_teachers() -> None:
    strengths = {name: official_strength(name, 3) for name in ("aver", "ebkd", "ca-mkd")}
    assert {name: round(s, 3) for name, s in strengths.items()} == {"aver": 1.0, "ebkd": 0.667, "ca-mkd": 0.333}


# --- logits ----------------------------------------------------------------------------------------------------------


def test_weights_of_every_strategy_follow_its_formula() -> None:
    batch = case(3)
    p = [t.logits.softmax(1) for t in batch.outputs]
    entropy = torch.stack([-(q * q.log()).sum(1) for q in p])
    s = batch.student.logits
    gradients = [torch.autograd.grad(soft.mean(), s, retain_graph=True)[0].flatten() for soft in soft_losses(batch)]
    gram = torch.stack(gradients) @ torch.stack(gradients).T
    expected = {
        "kd": torch.tensor([1.0, 0.0, 0.0]).unsqueeze(1).expand(3, 7),
        "aver": torch.full((3, 7), 1 / 3),
        "ebkd": (1 - entropy / entropy.sum(0)) / 2,
        "aekd": min_norm_weights(gram, 0.6).float().unsqueeze(1).expand(3, 7),
        "fitnet-mkd": torch.full((3, 7), 1 / 3),
        "ca-mkd-logits": confidence([t.logits for t in batch.outputs], batch.target),
        "ca-mkd": confidence([t.logits for t in batch.outputs], batch.target),
    }
    hard = F.cross_entropy(batch.student.logits, batch.target)
    for name, weights in expected.items():
        strategy = strategies.create(name, batch.teachers, FEATURES, alpha=0.5)
        out = logit_loss(strategy, batch)
        torch.testing.assert_close(strategy.formula.soft_weight / 0.5 * out.weights, weights, rtol=1e-4, atol=0)
        loss = hard + 0.5 * (weights * soft_losses(batch)).sum(0).mean()
        torch.testing.assert_close(out.loss, loss, rtol=1e-4, atol=0)


def test_ce_needs_no_teacher() -> None:
    strategy = strategies.create("ce", None, FEATURES)
    assert not strategy.needs_teachers and not strategy.needs_features and strategy.formula.soft_weight == 0.0
    batch = case(1)
    assert strategy.feature_term(batch.student, [], batch.target) is None
    out = logit_loss(strategy, batch._replace(outputs=[batch.student._replace(logits=batch.student.logits.detach())]))
    torch.testing.assert_close(out.loss, F.cross_entropy(batch.student.logits, batch.target))


def test_one_teacher_may_be_any_of_them() -> None:
    batch = case(3)
    strategy = strategies.create("kd", batch.teachers, FEATURES, teacher_index=2)
    loss = F.cross_entropy(batch.student.logits, batch.target) + soft_losses(batch)[2].mean()
    torch.testing.assert_close(logit_loss(strategy, batch).loss, loss)
    assert not strategy.state_dict()


def test_agreement_is_capped_and_ignores_rows_without_label() -> None:
    batch = case(3)
    # Two equal teachers and a third with a short gradient, whose weight would be nearly 1 without the cap.
    near = batch.student.logits.detach() + 0.1 * torch.randn(7, 5)
    outputs = [
        batch.outputs[0],
        batch.outputs[0],
        Prediction(batch.outputs[2].features, near),
    ]
    strategy = strategies.create("aekd", batch.teachers, FEATURES)
    weights = strategy.weighting(batch.student.logits, outputs, batch.target)
    # How equal teachers share their 0.4 depends on the rounding of the float32 Gram matrix; the mixture does not.
    assert weights.amin() >= 0 and weights.shape == (3,)
    shared = torch.stack([weights[:2].sum(), weights[2]])
    torch.testing.assert_close(shared, torch.tensor([0.4, 0.6], dtype=torch.float64), rtol=1e-5, atol=0)
    assert not weights.requires_grad

    broken = [t.logits.clone() for t in batch.outputs]
    broken[1][3] = float("nan")
    target = batch.target.clone()
    target[3] = -100
    ignoring = strategy.weighting(batch.student.logits, [Prediction(z, z) for z in broken], target)
    kept = [n for n in range(7) if n != 3]
    fewer = strategy.weighting(
        batch.student.logits[kept],
        [Prediction(t.logits[kept], t.logits[kept]) for t in batch.outputs],
        target[kept],
    )
    torch.testing.assert_close(ignoring, fewer, rtol=1e-5, atol=0)


def test_agreement_does_not_lose_precision_under_autocast() -> None:
    batch = case(3)
    strategy = strategies.create("aekd", batch.teachers, FEATURES)
    expected = strategy.weighting(batch.student.logits, batch.outputs, batch.target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(strategy.weighting(batch.student.logits, batch.outputs, batch.target), expected)


def _weights_of_a_rank(rank: int, folder: str) -> None:
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    batch = case(3)
    part = slice(0, 3) if rank == 0 else slice(3, 7)
    outputs = [Prediction(t.features[part], t.logits[part]) for t in batch.outputs]
    strategy = strategies.create("aekd", batch.teachers, FEATURES)
    torch.save(strategy.weighting(batch.student.logits[part], outputs, batch.target[part]), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_agreement_does_not_depend_on_how_a_batch_is_spread_over_ranks(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_weights_of_a_rank, (str(tmp_path),), nprocs=2)
    torch.manual_seed(0)
    batch = case(3)
    strategy = strategies.create("aekd", batch.teachers, FEATURES)
    whole = strategy.weighting(batch.student.logits, batch.outputs, batch.target)
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), whole, rtol=1e-5, atol=0)


# --- feature maps ----------------------------------------------------------------------------------------------------


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


# --- the step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_TEACHERS)
def test_every_strategy_compiles_into_one_graph(name: str) -> None:
    batch = case(3)
    strategy = strategies.create(name, batch.teachers, FEATURES)

    def step(student: Prediction, outputs: list[Prediction], target: Tensor) -> tuple[Tensor, Tensor]:
        logits = student.logits.detach()
        formula = strategy.formula._replace(weighting=strategy.weighting(logits, outputs, target))
        out, grad = camkd_loss_and_grad(logits, [t.logits for t in outputs], target, **formula.options())
        term = strategy.feature_term(student, outputs, target, num_items=7)
        return out.loss if term is None else out.loss + term.loss, grad

    strategy.eval()
    expected = step(batch.student, batch.outputs, batch.target)
    compiled = torch.compile(step, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(batch.student, batch.outputs, batch.target), expected)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_in_words() -> None:
    teachers = live(2)
    with pytest.raises(ValueError, match=r"'ca-mdk'.*ca-mkd"):
        strategies.create("ca-mdk", teachers, FEATURES)
    with pytest.raises(ValueError, match="aver learns from teachers"):
        strategies.create("aver", None, FEATURES)
    with pytest.raises(ValueError, match=r"beta is 3\.0, but aver"):
        strategies.create("aver", teachers, FEATURES, beta=3.0)
    with pytest.raises(ValueError, match=r"\[0, 2\).*got 2"):
        strategies.create("kd", teachers, FEATURES, teacher_index=2)
    with pytest.raises(ValueError, match="uniform is 'logits', but fitnet-mkd has no option uniform: it is for ca"):
        strategies.create("fitnet-mkd", teachers, FEATURES, uniform="logits")
    with pytest.raises(ValueError, match=r"teacher 1 \(Tiny\) has 7 classes, but the data set has 5"):
        LiveTeachers([Tiny(3), Tiny(3, num_classes=7)], num_classes=5)
    with pytest.raises(ValueError, match=r"1 to 16 teachers, got 0"):
        LiveTeachers([], num_classes=5)
