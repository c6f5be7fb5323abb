"""Mixup and CutMix: their numbers, the mixed batch, and steps on it, recorded and with teachers that run ahead."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from camkd_fast.train.config import DataConfig, DistillConfig, OptimConfig
from camkd_fast.train.mixing import Mixer, mixed, mixer_for
from camkd_fast.train.step import TrainStep
from camkd_fast.train.step_graph import WARM_UP
from camkd_fast.train.teacher_ahead import with_following
from camkd_fast.train.teachers.live import LiveTeachers
from tests.support.recorded_graph import RecordedGraphs
from tests.support.training import EAGER, ONE, OPTIM, batch, parameters, train_step

pytestmark = pytest.mark.usefixtures("one_thread")
BOTH = replace(OPTIM, mixup=0.4, cutmix=1.0)
MIXUP, CUTMIX = replace(BOTH, cutmix=0.0), replace(BOTH, mixup=0.0)


def drawn(optim: OptimConfig, steps: int, n: int = 8, seed: int = 0, rank: int = 0) -> tuple[Tensor, Tensor]:
    """Partners (steps, n) and numbers (steps, 4)."""
    mixer = Mixer(optim, seed, rank)
    partners, numbers = zip(*(mixer.inputs(n, step) for step in range(steps)), strict=True)
    return torch.stack(partners), torch.stack(numbers)


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_partners_are_permutations_of_their_step() -> None:
    partners, _ = drawn(BOTH, 400)
    assert torch.equal(partners.sort(1).values, torch.arange(8).expand(400, 8))
    counts = torch.stack([(partners == j).sum(0) for j in range(8)])  # (8, 8) of 400 / 8
    assert ((counts - 50.0) ** 2 / 50).sum() < 110  # 49 degrees of freedom, probability 1e-6


def test_one_of_both_by_chance() -> None:
    _, numbers = drawn(BOTH, 1000)
    cuts = numbers[:, 3] > 0
    assert abs(cuts.float().mean() - 0.5) < 0.07
    assert (numbers[cuts, 0] == 1).all() and (numbers[~cuts, 0] < 1).all() and (numbers[~cuts, 1:] == 0).all()
    assert not (drawn(MIXUP, 50)[1][:, 3] > 0).any() and (drawn(CUTMIX, 50)[1][:, 3] > 0).all()


def test_shares_have_the_beta_distribution() -> None:
    """Mean 1/2 and variance 1 / (4 (2 alpha + 1)), of Mixup's weights and of CutMix's areas."""
    n = 1200
    weights = drawn(MIXUP, n)[1][:, 0].double()
    areas = (2 * drawn(CUTMIX, n)[1][:, 3].double()) ** 2
    for values, alpha in ((weights, 0.4), (areas, 1.0)):
        assert abs(values.mean() - 0.5) < 4 * (0.25 / (2 * alpha + 1) / n) ** 0.5
        assert values.var().item() == pytest.approx(0.25 / (2 * alpha + 1), rel=0.15)
    centres = drawn(BOTH, n)[1][:, 1:3]
    centres = centres[centres[:, 0] > 0]
    n = len(centres)
    assert abs(np.corrcoef(centres.T.numpy())[0, 1]) < 4 / n**0.5
    assert centres.mean(0).tolist() == pytest.approx([0.5, 0.5], abs=4 * (1 / 12 / n) ** 0.5)


def test_numbers_depend_on_seed_rank_and_step_only() -> None:
    first = drawn(BOTH, 6)
    torch.rand(3), np.random.rand(3)
    for one, other in zip(first, drawn(BOTH, 6), strict=True):
        assert torch.equal(one, other)
    for other in (drawn(BOTH, 6, seed=1), drawn(BOTH, 6, rank=1)):
        assert not any(torch.equal(one, two) for one, two in zip(first[0], other[0], strict=True))
        assert not any(torch.equal(one, two) for one, two in zip(first[1], other[1], strict=True))


def test_numbers_are_stable() -> None:
    """Golden values: interrupted runs depend on them across versions."""
    (partner, mixup), (_, cutmix) = Mixer(MIXUP, 3, 0).inputs(6, 2), Mixer(CUTMIX, 3, 0).inputs(6, 2)
    assert partner.tolist() == [5, 4, 2, 3, 1, 0]
    assert mixup.tolist() == pytest.approx([0.94935703, 0.0, 0.0, 0.0], rel=1e-6)
    assert cutmix.tolist() == pytest.approx([1.0, 0.67574954, 0.21574306, 0.48541191], rel=1e-6)


# --- the batch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 8), (7, 13)])
@pytest.mark.parametrize("optim", [MIXUP, CUTMIX], ids=["mixup", "cutmix"])
def test_images_and_labels_are_mixed(optim: OptimConfig, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    H, W = shape
    images = torch.randn(6, 3, H, W, generator=generator)
    target = torch.arange(6)
    areas = set()
    for step in range(40):
        partner, numbers = Mixer(optim, 0, 0).inputs(6, step)
        found, second, mix = mixed(images, target, partner, numbers)
        assert torch.equal(second, partner) and mix.shape == (6,) and mix.dtype == torch.float32
        own, row, column, half = numbers.tolist()
        expected = own * images.double() + (1 - own) * images[partner].double()
        if half:
            centre, reach = (int(row * H), int(column * W)), (int(half * H), int(half * W))
            (top, left), (bottom, right) = (
                [max(c - r, 0) for c, r in zip(centre, reach, strict=True)],
                [min(c + r, side) for c, r, side in zip(centre, reach, shape, strict=True)],
            )
            expected[:, :, top:bottom, left:right] = images[partner, :, top:bottom, left:right].double()
            assert torch.equal(found.double(), expected)
            own = 1 - (bottom - top) * (right - left) / (H * W)
            areas.add((bottom - top, right - left))
        assert (found - expected).abs().max() < 1e-6
        assert mix.tolist() == pytest.approx([own] * 6, rel=1e-6)
    assert len(areas) > 8 or optim is MIXUP


def test_the_memory_format_is_kept() -> None:
    images = batch(6).images.contiguous(memory_format=torch.channels_last)
    partner, numbers = Mixer(BOTH, 0, 0).inputs(6, 0)
    found = mixed(images, torch.arange(6), partner, numbers)
    assert found.images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found.images, mixed(images.contiguous(), torch.arange(6), partner, numbers).images)


# --- steps -----------------------------------------------------------------------------------------------------------


def step_with(
    optim: OptimConfig = BOTH, recorder: Any = None, name: str = "ca-mkd", ahead: str = "auto", compile: str = "off"
) -> TrainStep:
    made = train_step(name)
    precision = replace(EAGER, teacher_ahead=ahead, compile=compile)
    return TrainStep(made.student, made.strategy, made.teachers, optim, precision, ONE, 32, 0, recorder)


def take(step: TrainStep, count: int, first: int = 0) -> None:
    batches = [batch(20 if i % 5 == 4 else 32, seed=i) for i in range(first, first + count)]
    for i, (given, following) in enumerate(with_following(batches, step.looks_ahead), first):
        step(given, len(given.target), 0.01, i, following)


def relative(one: Tensor, two: Tensor) -> float:
    return float((one - two).norm() / two.norm())


@pytest.mark.parametrize("name", ["ce", "ca-mkd"])
def test_a_step_learns_the_mixed_batch_and_teachers_see_it(name: str) -> None:
    step, twin = step_with(name=name), step_with(OPTIM, name=name)
    data = batch()
    found = mixed(data.images, data.target, *Mixer(BOTH, 0, 0).inputs(32, 7))
    step(data, 32, 0.01, 7)
    outputs = [] if twin.teachers is None else twin.teachers.outputs(found.images)
    objective = twin.trainable(found.images, data.target, outputs, 32, torch.ones(1), found.second_target, found.mix)
    torch.autograd.backward(objective.roots, objective.gradients)
    for p, q in zip(step.trainable.parameters(), twin.trainable.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    correct = twin.student(found.images).argmax(1) == (data.target if found.mix[0] >= 0.5 else found.second_target)
    assert step.sums.read(ONE).totals.correct == correct.sum()


@pytest.mark.parametrize("ahead", ["off", "on"])
@pytest.mark.parametrize("name", ["ce", "ca-mkd"])
def test_replays_mix_the_batch_of_their_step(name: str, ahead: str) -> None:
    """Also the batch whose teachers run one step early, and batches that run eagerly between replays."""
    recorder = RecordedGraphs()
    step, eager = step_with(recorder=recorder, name=name, ahead=ahead), step_with(name=name)
    for made in (step, eager):
        take(made, 14)
    assert step.looks_ahead == (ahead == "on" and name != "ce")
    assert (recorder.recordings, recorder.replays) == (1, 12 - WARM_UP)
    assert relative(parameters(step), parameters(eager)) < 1e-6
    for mine, other in zip(step.sums.read(ONE).totals[1:], eager.sums.read(ONE).totals[1:], strict=True):
        assert mine == pytest.approx(other, rel=1e-4)
    unmixed = step_with(OPTIM, name=name)
    take(unmixed, 14)
    assert relative(parameters(unmixed), parameters(eager)) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ce", "ca-mkd"])
def test_mixing_and_smoothing_compile_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    optim = replace(BOTH, label_smoothing=0.1)
    eager, compiled = (step_with(optim, name=name, compile=setting) for setting in ("off", "on"))
    for made in (eager, compiled):
        take(made, 6)
    assert counter.frame_count == 1
    assert relative(parameters(compiled), parameters(eager)) < 1e-5
    torch._dynamo.reset()


def test_a_resumed_step_mixes_as_the_first_did() -> None:
    whole, first, second = step_with(), step_with(), step_with()
    take(whole, 6)
    take(first, 3)
    second.student.load_state_dict(first.student.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    take(second, 3, first=3)
    assert torch.equal(parameters(second), parameters(whole))


# --- settings --------------------------------------------------------------------------------------------------------


def test_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mixer_for(OPTIM, 0, 0) is None and mixer_for(MIXUP, 0, 0) is not None is not mixer_for(CUTMIX, 0, 0)
    for name in ("mixup", "cutmix"):
        with pytest.raises(ValueError, match=f"{name} must be at least 0, got -1"):
            OptimConfig(**{name: -1.0})
    cached = {"teacher_cache": Path("cache"), "data": DataConfig(views=2)}
    DistillConfig(**cached)
    with pytest.raises(ValueError, match="cache holds outputs of images that are not mixed, got mixup 0 and cutmix 1"):
        DistillConfig(optim=CUTMIX, **cached)
    made = train_step()
    monkeypatch.setattr(LiveTeachers, "computes", False)
    with pytest.raises(ValueError, match="need teachers that compute: a cache holds outputs of unmixed images"):
        TrainStep(made.student, made.strategy, made.teachers, MIXUP, EAGER, ONE, 32, 0)
