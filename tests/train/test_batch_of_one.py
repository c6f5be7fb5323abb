"""Batches of one image: by their size, by what a set leaves, and by what unreadable files leave."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from camkd_fast import models
from camkd_fast.train import run, run_images
from camkd_fast.train.config import DataConfig, DistillConfig, LogConfig, OptimConfig, PrecisionConfig, TeachConfig
from camkd_fast.train.single_values import running_statistics
from camkd_fast.train.step import TrainStep
from camkd_fast.train.strategies import names
from tests.support.training import SmallNet, batch, parameters, train_step

pytestmark = pytest.mark.usefixtures("one_thread")
LOG = LogConfig(tensorboard=False, progress=False)


class Pooled(SmallNet):
    """A net whose batch norm sees one value per channel and image."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(batch_norm=True, seed=seed)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.norm(self.conv2(self.conv1(x)).mean((2, 3), keepdim=True))


# --- batch norm ------------------------------------------------------------------------------------------------------


def trained_norm(norm: nn.Module, *shape: int) -> nn.Module:
    norm.train()(torch.randn(8, *shape))
    return norm


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(5), (5,)),
        (nn.BatchNorm1d(5), (5, 1)),
        (nn.BatchNorm2d(5), (5, 1, 1)),
        (nn.BatchNorm3d(5), (5, 1, 1, 1)),
        (nn.BatchNorm2d(1), (1, 1, 1)),
        (nn.BatchNorm2d(5, affine=False), (5, 1, 1)),
        (nn.LazyBatchNorm2d(), (5, 1, 1)),
    ],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else type(value).__name__,
)
def test_one_value_per_channel_uses_the_running_statistics(norm: nn.Module, shape: tuple[int, ...]) -> None:
    trained_norm(norm, *shape)
    before = copy.deepcopy(norm.state_dict())
    x = torch.randn(1, *shape, requires_grad=True)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        copy.deepcopy(norm)(x)
    with running_statistics(norm):
        y = norm(x)
        assert norm.training
    assert torch.equal(y, copy.deepcopy(norm).eval()(x))
    y.sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


@pytest.mark.parametrize("shape", [(2, 5, 1, 1), (1, 5, 2, 1), (1, 5, 4, 4)])
def test_more_values_are_normalised_as_ever(shape: tuple[int, ...]) -> None:
    norm = nn.BatchNorm2d(5).train()
    twin, x = copy.deepcopy(norm), torch.randn(shape)
    with running_statistics(norm):
        y = norm(x)
    assert torch.equal(y, twin(x)) and torch.equal(norm.running_var, twin.running_var)


def test_a_failed_pass_leaves_no_trace() -> None:
    class Failing(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no")

    inner = nn.BatchNorm2d(3).eval()
    net = nn.Sequential(nn.BatchNorm2d(3), Failing(3), inner).train()
    inner.eval()
    with pytest.raises(RuntimeError, match="no"), running_statistics(net):
        net(torch.randn(1, 3, 1, 1))
    assert [module.training for module in net] == [True, True, False]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net)


@pytest.mark.parametrize("name", ["vgg8", "shufflenetv2"])
def test_models_train_on_one_small_image(name: str) -> None:
    model = models.create(name, 10).train()
    with running_statistics(model):
        model(torch.randn(1, 3, 8, 8)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# --- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:batch_size 1")
@pytest.mark.parametrize("full_batch", [1, 32])
@pytest.mark.parametrize("name", names())
def test_every_strategy_trains_on_one_image(name: str, full_batch: int) -> None:
    step = train_step(name, Pooled(), full_batch=full_batch)
    before = parameters(step)
    for number in range(2):
        step(batch(1, seed=number), 1, 0.01, number)
    after = parameters(step)
    assert after.isfinite().all() and not torch.equal(before, after)


def test_batches_of_one_are_never_compiled() -> None:
    with pytest.warns(UserWarning, match="batch_size 1"):
        step = train_step("ca-mkd", Pooled(), PrecisionConfig(compile="on"), full_batch=1)
    assert step.trainable._compiled_size == -1
    step(batch(1), 1, 0.01, 0)


def test_a_batch_size_of_one_is_said() -> None:
    with pytest.warns(UserWarning, match="batch_size 1 for a process"):
        step = train_step("ce", SmallNet(batch_norm=True), full_batch=1)
    assert isinstance(step, TrainStep)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_step("ce", SmallNet(), full_batch=1)  # has no batch norm
        train_step("ce", SmallNet(batch_norm=True), full_batch=2)


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of digits."""
    out = tmp_path_factory.mktemp("teacher") / "t"
    config = TeachConfig("resnet8", out=out, data=DataConfig(images=20), optim=OptimConfig(1, 10), log=LOG)
    return run.teach(config).out


@pytest.mark.filterwarnings("ignore:batch_size 1")
@pytest.mark.parametrize(
    ("strategy", "count", "batch_size", "cached"),
    [
        ("ca-mkd", 4, 1, True),  # the maps r_k of a cache have one value per channel
        ("aekd", 1, 64, False),  # a single training image
        pytest.param("fitnet-mkd", 3, 1, True, marks=pytest.mark.slow),
        pytest.param("ca-mkd", 3, 1, False, marks=pytest.mark.slow),
        pytest.param("ca-mkd", 1, 1, True, marks=pytest.mark.slow),
        pytest.param("ca-mkd", 5, 4, True, marks=pytest.mark.slow),  # the fifth image joins the batch before
    ],
)
def test_runs_with_batches_of_one_end(
    strategy: str, count: int, batch_size: int, cached: bool, digits: Path, tmp_path: Path
) -> None:
    config = DistillConfig(
        "resnet8",
        (digits,),
        strategy,
        teacher_cache=tmp_path / "cache" if cached else None,
        out=tmp_path / "s",
        data=DataConfig(images=count, views=1),
        optim=OptimConfig(1, batch_size),
        log=LOG,
    )
    result = run.distill(config)
    assert result.test.images == 597 and np.isfinite(result.test.loss)


def folder(root: Path, train: int, val: int) -> Path:
    generator = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for name in ("a", "b"):
            (root / part / name).mkdir(parents=True)
            for n in range(count):
                Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(
                    root / part / name / f"{n}.png"
                )
    return root


@pytest.mark.filterwarnings("ignore:batch_size 1")
@pytest.mark.parametrize(
    ("batch_size", "hidden"),
    [
        (1, False),
        (2, True),  # found while decoding
        *(
            pytest.param(n, hidden, marks=pytest.mark.slow)
            for n, hidden in ((2, False), (3, False), (1, True), (3, True))
        ),
    ],
)
def test_unreadable_files_leave_one_image_of_a_batch(batch_size: int, hidden: bool, tmp_path: Path) -> None:
    """Four training images with two unreadable ones; of three validation images one is left."""
    root = folder(tmp_path / "d", 3, 1)
    whole: dict[str, Any] = {"data": "folder", "root": root, "size": 16, "validation": 0.34, "workers": 0, "views": 1}
    optim = OptimConfig(1, batch_size)
    run.teach(TeachConfig("resnet8", out=tmp_path / "t", data=DataConfig(**whole), optim=optim, log=LOG))
    splits = run_images.load_splits(DataConfig(**whole))
    for path in (splits.train.paths[0], splits.validation.paths[0]):
        content = path.read_bytes()
        path.write_bytes(content[:200] + bytes(60) + content[260:] if hidden else b"")
    config = DistillConfig(
        "resnet8",
        (tmp_path / "t",),
        teacher_cache=tmp_path / "cache",
        out=tmp_path / "s",
        data=DataConfig(**whole, skip_bad=2),
        optim=optim,
        log=LOG,
    )
    assert run.distill(config).test.images == 2
