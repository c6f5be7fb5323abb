"""Models without the protocol: split at a named module, or for their logits only."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camkd_fast import models
from camkd_fast.models.protocol import feature_model, predict
from camkd_fast.models.split import LogitsOnly, split
from tests.support.models import with_random_norms

pytestmark = pytest.mark.usefixtures("one_thread")


def block(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())


class Net(nn.Module):
    """Two blocks, a pooled linear head; images (N, 3, H, W), 4 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.layers = nn.ModuleDict({"one": block(6), "two": block(6)})
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers["one"](self.stem(x))
        x = F.relu(self.norm(self.layers["two"](x)))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class InPlace(Net):
    """A function that changes the output of the norm."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.layers["one"](self.stem(x))), inplace=True)
        return self.head(x.mean((2, 3)))


class Skips(Net):
    """The input is used beside the second block's output."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.head((self.layers["two"](self.layers["one"](y)) + y).mean((2, 3)))


class Twice(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.layers["one"](self.layers["one"](self.stem(x)))
        return self.head(x.mean((2, 3)))


class Branches(Net):
    """Control flow on values, outside and inside of a block."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return super().forward(x) if x.sum() > 0 else self.head(x.mean((2, 3)))


class Opaque(nn.Module):
    """Cannot be traced, but need not be."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if bool(x.sum() > 0) else x


class OpaqueInside(Net):
    def __init__(self) -> None:
        super().__init__()
        self.layers["one"].append(Opaque())
        self.head.append(Opaque())


class Tokens(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.flat(self.stem(x)).mean(2))

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Flatten(2)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Pairs(Net):
    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pair(self.stem(x))[0].mean((2, 3)))


class Maps(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.layers["two"](self.stem(x))


def image(side: int = 8) -> Tensor:
    return torch.randn(1, 3, side, side)


@pytest.mark.parametrize(
    ("kind", "layer", "channels"),
    [
        (Net, "layers.two", 6),
        (Net, "layers.one.0", 6),
        (Net, "norm", 6),
        (Net, "stem", 6),
        (Skips, "stem", 6),
        (InPlace, "norm", 6),
        (OpaqueInside, "layers.two", 6),
    ],
)
@torch.no_grad()
def test_both_parts_together_are_the_model(kind: Callable[[], nn.Module], layer: str, channels: int) -> None:
    model = with_random_norms(kind()).eval()
    captured: list[Tensor] = []
    halves = split(model, layer, image())
    assert not halves.training and (halves.num_features, halves.num_classes) == (channels, 4)
    model.get_submodule(layer).register_forward_hook(lambda _, inputs, output: captured.append(output.clone()))
    images = torch.randn(5, 3, 12, 9)  # another number and size than the checked image
    expected = model(images)
    features, logits = predict(feature_model(halves), images)
    assert torch.equal(logits, expected) and torch.equal(halves(images), expected)
    assert torch.equal(features, captured[0])


def test_weights_are_shared_and_gradients_pass_the_head() -> None:
    model = with_random_norms(Net()).eval()
    halves = split(model, "layers.two", image())
    ours = {p.data_ptr() for p in halves.parameters()}
    assert ours == {p.data_ptr() for p in model.parameters()}
    assert len(list(halves.parameters())) == len(list(model.parameters()))
    features = torch.randn(2, 6, 4, 4, requires_grad=True)
    halves.forward_head(features).square().sum().backward()
    assert features.grad is not None and features.grad.abs().max() > 0


@pytest.mark.parametrize(("layer", "norms"), [("layers.two", 1), ("norm", 1), ("layers.one", 1)])
@torch.no_grad()
def test_a_split_model_freezes(layer: str, norms: int) -> None:
    """All norms are folded but the one after a ReLU."""
    model = with_random_norms(Net()).double().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frozen = models.freeze(split(model, layer, image().double()))
    assert sum(isinstance(m, nn.BatchNorm2d) for m in frozen.modules()) == norms
    images = torch.randn(3, 3, 8, 8).double()
    expected = model(images)
    assert (frozen(images) - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize(
    ("kind", "layer", "reason"),
    [
        (Net, "layer.two", r"^Net has no module 'layer.two'; nearest: layers.two, "),
        (Net, "x", r"^Net has no module 'x'; nearest: stem, layers, norm, head$"),
        (Skips, "layers.two", r"^Skips cannot .* 'layers.two': the logits depend on the images in other ways than"),
        (Net, "layers.one.1", None),
        (Twice, "layers.one", r"^Twice cannot .* 'layers.one': it calls that module 2 times, not once$"),
        (Twice, "layers.two", r"^Twice cannot .* 'layers.two': it calls that module 0 times, not once$"),
        (Net, "layers", r"^Net cannot .* 'layers': it calls that module 0 times, not once$"),
        (Branches, "norm", r"^Branches cannot .* 'norm', torch.fx cannot trace it: symbolically traced variables"),
        (
            Tokens,
            "flat",
            r"^Tokens cannot .* 'flat': its output has shape \(1, 6, 64\), not that of a map \(N, D, h, w\)",
        ),
        (Net, "head", r"^Net cannot .* 'head': its output has shape \(1, 4\), not that of a map"),
        (Pairs, "pair", r"^Pairs cannot .* 'pair': its output has type tuple, not that of a map"),
        (Maps, "stem", r"^Maps cannot .* 'stem': the two parts give other logits than the model$"),
    ],
)
def test_refusals_give_the_reason(kind: Callable[[], nn.Module], layer: str, reason: str | None) -> None:
    model = kind().eval()
    if reason is None:
        split(model, layer, image())
        return
    with pytest.raises(ValueError, match=reason):
        split(model, layer, image())


def test_an_image_that_the_model_cannot_take() -> None:
    with pytest.raises(ValueError, match=r"^Net cannot run an image of shape \(1, 2, 8, 8\): .*channels"):
        split(Net().eval(), "norm", torch.randn(1, 2, 8, 8))


@torch.no_grad()
def test_a_model_for_its_logits_only() -> None:
    model = with_random_norms(Net()).double().eval()
    wrapped = LogitsOnly(model, "because")
    assert (wrapped.num_features, wrapped.reason) == (0, "because") and not hasattr(wrapped, "num_classes")
    images = torch.randn(3, 3, 8, 8).double()
    features, logits = predict(feature_model(wrapped), images)
    assert torch.equal(features, images) and torch.equal(logits, model(images))
    frozen = models.freeze(wrapped)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in frozen.modules()) == 1
    assert (frozen(images) - logits).norm() <= 1e-12 * logits.norm()
    model.num_classes = 4
    assert LogitsOnly(model, "because").num_classes == 4
