"""Forward passes of every family against short functional versions, written from the papers, under the same weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camkd_fast import models
from camkd_fast.models.protocol import Prediction, feature_model, predict
from tests.support.models import with_random_norms

pytestmark = pytest.mark.usefixtures("one_thread")


class Weights:
    """Layers of a model in the order of definition, applied as functions."""

    def __init__(self, model: nn.Module) -> None:
        kinds = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)
        self._layers = [module for module in model.modules() if isinstance(module, kinds)]

    def conv(self, x: Tensor, kernel: int, stride: int = 1, groups: int = 1) -> Tensor:
        layer = self._layers.pop(0)
        assert layer.weight.shape[2:] == (kernel, kernel)
        return F.conv2d(x, layer.weight, layer.bias, stride, padding=kernel // 2, groups=groups)

    def norm(self, x: Tensor) -> Tensor:
        layer = self._layers.pop(0)
        mean, var, weight, bias = (
            v.view(-1, 1, 1) for v in (layer.running_mean, layer.running_var, layer.weight, layer.bias)
        )
        return (x - mean) / (var + layer.eps).sqrt() * weight + bias

    def conv_norm(self, x: Tensor, kernel: int, stride: int = 1, groups: int = 1) -> Tensor:
        return self.norm(self.conv(x, kernel, stride, groups))

    def classify(self, features: Tensor) -> Prediction:
        (layer,) = self._layers
        return Prediction(features, features.mean((2, 3)) @ layer.weight.T + layer.bias)


def resnet(x: Tensor, w: Weights, blocks: int) -> Tensor:
    x = w.conv_norm(x, 3).relu()
    for stage in range(3):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            y = w.conv_norm(w.conv_norm(x, 3, stride).relu(), 3)
            x = (y + (x if y.shape == x.shape else w.conv_norm(x, 1, stride))).relu()
    return x


def wide_resnet(x: Tensor, w: Weights, blocks: int) -> Tensor:
    x = w.conv(x, 3)
    for stage in range(3):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            active = w.norm(x).relu()
            y = w.conv(w.norm(w.conv(active, 3, stride)).relu(), 3)
            x = y + (x if y.shape == x.shape else w.conv(active, 1, stride))
    return w.norm(x).relu()


def vgg(x: Tensor, w: Weights, *convolutions: int) -> Tensor:
    for block, count in enumerate(convolutions):
        if 0 < block < 4 or (block == 4 and min(x.shape[2:]) >= 8):
            x = F.max_pool2d(x, 2)
        for _ in range(count):
            x = w.conv_norm(x, 3).relu()
    return x


def mobilenet_v2(x: Tensor, w: Weights) -> Tensor:
    """arXiv 1801.04381, table 2, with the strides for small images. The projection is linear: no ReLU follows it."""
    x = w.conv_norm(x, 3, 2).relu()
    for repeats, first_stride in ((1, 1), (2, 1), (3, 2), (4, 2), (3, 1), (3, 2), (1, 1)):
        for repeat in range(repeats):
            stride = first_stride if repeat == 0 else 1
            y = w.conv_norm(x, 1).relu()
            y = w.conv_norm(y, 3, stride, groups=y.shape[1]).relu()
            y = w.conv_norm(y, 1)
            x = x + y if y.shape == x.shape else y
    return w.conv_norm(x, 1).relu()


def shuffled(x: Tensor, groups: int) -> Tensor:
    """The first channel of every group, then the second of every group, and so on."""
    size = x.shape[1] // groups
    return x[:, [group * size + channel for channel in range(size) for group in range(groups)]]


def shufflenet_v1(x: Tensor, w: Weights) -> Tensor:
    """arXiv 1707.01083, figure 2 (b) and (c), 3 groups; the first 1x1 convolution after the stem is not grouped."""
    x = w.conv_norm(x, 1).relu()
    for stage, repeats in enumerate((4, 8, 4)):
        for repeat in range(repeats):
            groups = 1 if stage == repeat == 0 else 3
            y = shuffled(w.conv_norm(x, 1, groups=groups).relu(), groups)
            y = w.conv_norm(y, 3, 2 if repeat == 0 else 1, groups=y.shape[1]).relu()
            y = w.conv_norm(y, 1, groups=3)
            x = torch.cat([y, F.avg_pool2d(x, 3, 2, 1)], 1).relu() if repeat == 0 else (x + y).relu()
    return x


def shufflenet_v2(x: Tensor, w: Weights) -> Tensor:
    """arXiv 1807.11164, figure 3 (c) and (d), in the order (d), then (c)."""
    x = w.conv_norm(x, 1).relu()
    for repeats in (4, 8, 4):
        for repeat in range(repeats):
            if repeat == 0:
                first = w.conv_norm(w.conv_norm(x, 3, 2, groups=x.shape[1]), 1).relu()
                y, stride = x, 2
            else:
                (first, y), stride = x.tensor_split(2, 1), 1
            y = w.conv_norm(y, 1).relu()
            y = w.conv_norm(y, 3, stride, groups=y.shape[1])
            x = shuffled(torch.cat([first, w.conv_norm(y, 1).relu()], 1), 2)
    return w.conv_norm(x, 1).relu()


FAMILIES: dict[str, Callable[[Tensor, Weights], Tensor]] = {
    "resnet14": lambda x, w: resnet(x, w, 2),
    "wrn-16-1": lambda x, w: wide_resnet(x, w, 2),
    "wrn-16-2": lambda x, w: wide_resnet(x, w, 2),
    "vgg11": lambda x, w: vgg(x, w, 1, 1, 2, 2, 2),
    "vgg13": lambda x, w: vgg(x, w, 2, 2, 2, 2, 2),
    "vgg19": lambda x, w: vgg(x, w, 2, 2, 4, 4, 4),
    "mobilenetv2": mobilenet_v2,
    "shufflenetv1": shufflenet_v1,
    "shufflenetv2": shufflenet_v2,
}


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_forward_pass_matches_the_paper(name: str, size: int) -> None:
    torch.manual_seed(0)
    model = with_random_norms(models.create(name, 7)).double().eval()
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    weights = Weights(model)
    expected = weights.classify(FAMILIES[name](images, weights))
    for got, value in zip(predict(feature_model(model), images), expected, strict=True):
        assert value.norm() > 0
        assert (got - value).norm() <= 1e-12 * value.norm()
