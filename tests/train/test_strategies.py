"""Strategies: weights and strengths against the formulas. Feature terms: test_feature_strategies.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from camkd_fast import camkd_loss_and_grad
from camkd_fast.losses.min_norm import min_norm_weights
from camkd_fast.models.protocol import Prediction
from camkd_fast.train import strategies
from camkd_fast.train.teachers.live import LiveTeachers
from tests.support.processes import leave_group
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

T = 4.0

pytestmark = pytest.mark.usefixtures("one_thread")


def soft_losses(batch: Case) -> Tensor:
    """T^2 KL_k as (K, N), with torch functions only."""
    log_q = F.log_softmax(batch.student.logits / T, 1)
    kl = [F.kl_div(log_q, F.softmax(t.logits / T, 1), reduction="none").sum(1) for t in batch.outputs]
    return T**2 * torch.stack(kl)


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
    leave_group()


def test_agreement_does_not_depend_on_how_a_batch_is_spread_over_ranks(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_weights_of_a_rank, (str(tmp_path),), nprocs=2)
    torch.manual_seed(0)
    batch = case(3)
    strategy = strategies.create("aekd", batch.teachers, FEATURES)
    whole = strategy.weighting(batch.student.logits, batch.outputs, batch.target)
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), whole, rtol=1e-5, atol=0)


# --- the step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_TEACHERS)
def test_every_strategy_compiles_into_one_graph(name: str) -> None:
    batch = case(3)
    strategy = strategies.create(name, batch.teachers, FEATURES)

    def step(student: Prediction, outputs: list[Prediction], target: Tensor) -> tuple[Tensor, Tensor]:
        logits = student.logits.detach()
        formula = strategy.formula.replaced(weighting=strategy.weighting(logits, outputs, target))
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
