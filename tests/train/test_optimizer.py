"""Optimisers: updates equal those of torch's own, in a recorded graph and after a resume too."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from camkd_fast.train import optimizer
from camkd_fast.train.config import OptimConfig, PrecisionConfig
from camkd_fast.train.schedule import peak_rate
from camkd_fast.train.step import TrainStep
from camkd_fast.train.step_graph import WARM_UP
from tests.support.recorded_graph import RecordedGraphs
from tests.support.torch_version import HAS_MUON, needs_muon
from tests.support.training import EAGER, OPTIM, SmallNet, batch, parameters, train_step

pytestmark = pytest.mark.usefixtures("one_thread")
RATES = (0.01, 0.003, 0.02)
OPTIMIZERS = ("sgd", "adamw", "muon") if HAS_MUON else ("sgd", "adamw")


def optim(name: str, **settings: Any) -> OptimConfig:
    settings = {"momentum": 0.8, "betas": (0.8, 0.95), "weight_decay": 0.1, **settings}
    return OptimConfig(epochs=3, batch_size=32, optimizer=name, **settings)


def relative(one: Tensor, two: Tensor) -> float:
    return float((one - two).norm() / two.norm())


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def give_gradients(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(memory_format=torch.preserve_format)


def updated(module: nn.Module, made: torch.optim.Optimizer, first: int = 0) -> Tensor:
    for i, rate in enumerate(RATES, first):
        give_gradients(module, i)
        for group in made.param_groups:
            group["lr"] = rate
        made.step()
    return flat(module)


def reference(name: str, module: nn.Module, settings: OptimConfig) -> list[torch.optim.Optimizer]:
    """torch's own, unfused, on flattened weights where it takes matrices only."""
    decay = settings.weight_decay
    weights = [p for p in module.parameters() if p.dim() >= 2]
    others = [p for p in module.parameters() if p.dim() < 2]
    parts = [{"params": others, "weight_decay": decay if settings.decay_norms else 0.0}]
    if name == "muon":
        matrices = [nn.Parameter(p.detach().flatten(1)) for p in weights]  # views
        for matrix, p in zip(matrices, weights, strict=True):
            assert matrix.data_ptr() == p.data_ptr()
        muon = torch.optim.Muon(
            matrices, 1.0, weight_decay=decay, momentum=settings.momentum, adjust_lr_fn="match_rms_adamw"
        )
        return [muon, torch.optim.AdamW(parts, 1.0, settings.betas, foreach=False)]
    parts.append({"params": weights, "weight_decay": decay})
    if name == "adamw":
        return [torch.optim.AdamW(parts, 1.0, settings.betas, foreach=False)]
    return [torch.optim.SGD(parts, 1.0, settings.momentum, nesterov=True, foreach=False)]


@pytest.mark.parametrize("decay_norms", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_are_torchs(name: str, decay_norms: bool) -> None:
    settings = optim(name, decay_norms=decay_norms)
    module, twin = SmallNet(batch_norm=True), SmallNet(batch_norm=True)
    start = flat(module)
    found = updated(module, optimizer.create(module, settings, scaled=False))
    others = reference(name, twin, settings)
    for i, rate in enumerate(RATES):
        give_gradients(twin, i)
        for other in others:
            for group in other.param_groups:
                group["lr"] = rate
                for p in group["params"]:
                    if HAS_MUON and isinstance(other, torch.optim.Muon):
                        p.grad = next(q for q in twin.parameters() if q.data_ptr() == p.data_ptr()).grad.flatten(1)
            other.step()
    assert relative(found - start, flat(twin) - start) < 1e-5


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_norms_and_biases_keep_their_size_on_request(name: str) -> None:
    for decay_norms in (True, False):
        module = SmallNet(batch_norm=True)
        made = optimizer.create(module, optim(name, decay_norms=decay_norms), scaled=False)
        nn.init.ones_(module.norm.bias)
        before = {key: p.detach().clone() for key, p in module.named_parameters()}
        for p in module.parameters():
            p.grad = torch.zeros_like(p)
        for group in made.param_groups:
            group["lr"] = 0.1
        made.step()
        moved = {key for key, p in module.named_parameters() if not torch.equal(p, before[key])}
        vectors = {key for key, p in module.named_parameters() if p.dim() < 2}
        assert moved == set(before) - (set() if decay_norms else vectors)


@needs_muon
def test_weights_of_any_layout_are_matrices() -> None:
    one, other = SmallNet(), SmallNet().to(memory_format=torch.channels_last)
    assert not other.conv2.weight.is_contiguous()
    made = [optimizer.create(module, optim("muon"), scaled=False) for module in (one, other)]
    assert relative(updated(other, made[1]), updated(one, made[0])) < 1e-6


def test_a_parameter_without_a_gradient_stays() -> None:
    for name in OPTIMIZERS:
        module = SmallNet()
        made = optimizer.create(module, optim(name), scaled=False)
        before = module.conv1.weight.detach().clone()
        updated(module, made)
        made.zero_grad()
        assert all(p.grad is None for p in module.parameters())
        kept, stays = module.conv1.weight.detach().clone(), module.fc.weight.detach().clone()
        module.conv1.weight.grad = torch.ones_like(before)
        made.step()
        assert not torch.equal(module.conv1.weight, kept) and torch.equal(module.fc.weight, stays)


# --- in a step -------------------------------------------------------------------------------------------------------


def step_with(settings: OptimConfig, precision: PrecisionConfig = EAGER, recorder: Any = None) -> TrainStep:
    made = train_step("ca-mkd")  # without a bias before a batch norm, whose gradient is rounding noise
    return TrainStep(made.student, made.strategy, made.teachers, settings, precision, made._world, 32, 0, recorder)


def take(step: TrainStep, count: int, first: int = 0) -> None:
    for i in range(first, first + count):
        step(batch(32, seed=i), 32, 0.002 * (1 + i), i)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("decay_norms", [True, False])
def test_replays_have_the_rate_of_their_step(name: str, decay_norms: bool) -> None:
    recorder = RecordedGraphs()
    settings = optim(name, decay_norms=decay_norms)
    step, eager = step_with(settings, recorder=recorder), step_with(settings)
    start = parameters(eager)
    for made in (step, eager):
        take(made, WARM_UP + 4)
    assert (recorder.recordings, recorder.replays) == (1, 4)
    # bfloat16 iterations of Muon round differently after equal steps that were computed in another order.
    assert relative(parameters(step) - start, parameters(eager) - start) < (5e-3 if name == "muon" else 1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_goes_on_to_the_bit(name: str) -> None:
    whole, first, second = (step_with(optim(name, decay_norms=False)) for _ in range(3))
    take(whole, 6)
    take(first, 3)
    second.student.load_state_dict(first.student.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    take(second, 3, first=3)
    assert torch.equal(parameters(second), parameters(whole))


@pytest.mark.parametrize("name", ["adamw"])
def test_a_skipped_step_leaves_no_trace(name: str) -> None:
    step = step_with(optim(name), PrecisionConfig(compile="off", dtype="float16"))
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    before = parameters(step)
    take(step, 1)
    assert torch.equal(parameters(step), before) and step.scaler.get_scale() == 2.0**23
    for state in step.optimizer.state.values():
        assert state["step"] == 0 and not state["exp_avg"].any() and not state["exp_avg_sq"].any()
    take(step, 20)
    assert parameters(step).isfinite().all() and not torch.equal(parameters(step), before)


# --- clipping --------------------------------------------------------------------------------------------------------


def total_norm(step: TrainStep) -> float:
    return float(torch.stack([p.grad.norm() for p in step.trainable.parameters() if p.grad is not None]).norm())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_gradients_are_clipped_to_the_norm_of_all(dtype: str) -> None:
    precision = PrecisionConfig(compile="off", dtype=dtype)
    free, clipped, wide = (step_with(optim("sgd", clip_grad=clip), precision) for clip in (None, 0.01, 1e6))
    for step in (free, clipped, wide):
        step.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=dtype == "float16")
        step(batch(), 32, 0.01, 0)
    norm = total_norm(free)  # torch's fused step leaves gradients without the loss scale
    assert norm > 0.1 and total_norm(clipped) == pytest.approx(0.01, rel=1e-3)
    assert total_norm(wide) == pytest.approx(norm, rel=1e-5)
    for p, q in zip(free.trainable.parameters(), clipped.trainable.parameters(), strict=True):
        assert relative(q.grad, p.grad * (0.01 / norm)) < 1e-3
    assert relative(parameters(wide), parameters(free)) < 1e-6 < relative(parameters(clipped), parameters(free))
    assert step_with(optim("sgd", clip_grad=0.0))._largest_norm is None


def test_a_recorded_step_clips_its_own_gradients() -> None:
    recorder = RecordedGraphs()
    settings = optim("sgd", clip_grad=0.05)
    step, eager = step_with(settings, recorder=recorder), step_with(settings)
    for made in (step, eager):
        take(made, WARM_UP + 3)
    assert recorder.replays == 3 and relative(parameters(step), parameters(eager)) < 1e-6


def test_a_skipped_step_with_clipping_leaves_no_trace() -> None:
    step = step_with(optim("adamw", clip_grad=0.1), PrecisionConfig(compile="off", dtype="float16"))
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    before = parameters(step)
    take(step, 1)
    assert torch.equal(parameters(step), before) and step.scaler.get_scale() == 2.0**23
    take(step, 15)
    assert parameters(step).isfinite().all() and not torch.equal(parameters(step), before)


# --- settings --------------------------------------------------------------------------------------------------------


def test_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"muon cannot skip steps.*float16.*bfloat16"):
        step_with(optim("muon"), PrecisionConfig(compile="off", dtype="float16"))
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(ValueError, match=r"needs torch.optim.Muon, which torch 2\.\S+ does not"):
        optimizer.create(SmallNet(), optim("muon"), scaled=False)
    with pytest.raises(ValueError, match=r"betas must lie in \[0, 1\), got 1.0"):
        OptimConfig(betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="clip_grad must be at least 0, got -1"):
        OptimConfig(clip_grad=-1.0)
    with pytest.raises(ValueError, match="optimizer must be one of sgd, adamw, muon, got 'lion'"):
        OptimConfig(optimizer="lion")  # type: ignore[arg-type]


def test_adaptive_optimisers_have_a_rate_of_their_own() -> None:
    rates = [peak_rate(optim(name), "mobilenetv2") for name in ("sgd", "adamw", "muon")]
    assert rates == [0.01, 0.001, 0.001]
    assert peak_rate(optim("adamw", learning_rate=0.3), "vgg8") == 0.3
    assert OPTIM.optimizer == "sgd"
