"""timm models, with a fake timm module: names, feature maps from every layout, refusals."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from camkd_fast import models
from camkd_fast.models.protocol import (
    TrailingChannels,
    channels_first,
    feature_model,
    has_trailing_channels,
    predict,
)
from camkd_fast.models.split import LogitsOnly

D, SIZE = 8, 16  # 4x4 patches of a 16x16 image


class Base(nn.Module):
    def __init__(self, num_classes: int, in_chans: int) -> None:
        super().__init__()
        self.num_features, self.num_classes = D, num_classes
        self.pretrained_cfg = {"input_size": (3, SIZE, SIZE)}
        self.stem = nn.Conv2d(in_chans, D, 4, stride=4)
        self.norm = nn.BatchNorm2d(D)
        self.head = nn.Linear(D, num_classes)

    def patches(self, x: Tensor) -> Tensor:
        return self.norm(self.stem(x)).relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class ConvNet(Base):
    def forward_features(self, x: Tensor) -> Tensor:
        return self.patches(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x.mean((2, 3))
        return x if pre_logits else self.head(x)


class Swin(Base):
    def forward_features(self, x: Tensor) -> Tensor:
        return self.patches(x).permute(0, 2, 3, 1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        # Rows have different weights, so that a transposed map changes the logits.
        x = (x * torch.ones_like(x).cumsum(1)).mean((1, 2))
        return x if pre_logits else self.head(x)


class Mixer(Base):
    """Tokens without a class token."""

    def forward_features(self, x: Tensor) -> Tensor:
        return self.patches(x).flatten(2).transpose(1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = (x * torch.ones_like(x).cumsum(1)).mean(1)
        return x if pre_logits else self.head(x)


class ViT(Base):
    num_prefix_tokens = 2  # a class token and a register

    def __init__(self, num_classes: int, in_chans: int, global_pool: str = "token") -> None:
        super().__init__(num_classes, in_chans)
        self.global_pool = global_pool
        self.tokens = nn.Parameter(torch.randn(1, 2, D))

    def forward_features(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        return torch.cat([self.tokens.expand(x.shape[0], -1, -1), tokens], 1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x[:, 2:].mean(1) if self.global_pool == "avg" else x[:, 0]
        return x if pre_logits else self.head(x)


class ViTOfTwoHeads(ViT):
    def __init__(self, num_classes: int, in_chans: int, global_pool: str = "token") -> None:
        assert global_pool == "token"
        super().__init__(num_classes, in_chans)


class ViTReadingRegisters(ViT):
    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x[:, 1:].mean(1))


class Ragged(Mixer):
    """15 tokens, not a square."""

    def forward_features(self, x: Tensor) -> Tensor:
        return super().forward_features(x)[:, 1:]


class Pooled(ConvNet):
    def forward_features(self, x: Tensor) -> Tensor:
        return self.patches(x).mean((2, 3))


class TwoBranches(ConvNet):
    """As CrossViT: the features are those of two resolutions."""

    container: Callable[..., Any] = list

    def forward_features(self, x: Tensor) -> Any:
        x = self.patches(x)
        return self.container([x, x[:, :, ::2, ::2]])

    def forward_head(self, x: Any, pre_logits: bool = False) -> Tensor:
        x = sum(part.mean((2, 3)) for part in x)
        return x if pre_logits else self.head(x)


class TwoBranchesAsTuple(TwoBranches):
    container = tuple


KINDS: dict[str, Callable[..., nn.Module]] = {
    "convnet": ConvNet,
    "swin": Swin,
    "mixer": Mixer,
    "vit": ViT,
    "vit-two-heads": ViTOfTwoHeads,
    "vit-registers": ViTReadingRegisters,
    "ragged": Ragged,
    "pooled": Pooled,
    "vgg13": ConvNet,
    "two-branches": TwoBranches,
    "two-branches-tuple": TwoBranchesAsTuple,
}


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    module: Any = ModuleType("timm")
    module.list_models = lambda: list(KINDS)
    module.is_model = lambda name: name.split(".")[0] in KINDS

    def create_model(name: str, pretrained: bool = True, **settings: Any) -> nn.Module:
        assert not pretrained, "pretrained weights would be downloaded"
        return KINDS[name.split(".")[0]](**settings)

    module.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", module)
    yield module


@pytest.mark.parametrize("name", ["timm:convnet", "convnet", "timm:convnet.tag", "timm:swin", "timm:mixer", "vit"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_layout_gives_a_map_and_the_models_own_logits(timm: ModuleType, name: str, channels: int) -> None:
    module = models.create(name, 5, channels)
    assert module.training
    assert (module.num_classes, module.num_features) == (5, D)
    model = feature_model(module.double().eval())
    images = torch.randn(3, channels, SIZE, SIZE, dtype=torch.float64)
    features, logits = predict(model, images)
    assert features.shape == (3, D, 4, 4) and logits.shape == (3, 5)
    assert torch.equal(module(images), logits)
    own = getattr(module, "model", module)
    # The map has the patches in their positions; the logits are the wrapped model's.
    assert torch.equal(features, own.patches(images))
    expected = own(images)
    assert (logits - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("name", ["convnet", "swin", "mixer", "vit"])
def test_wrapped_models_freeze(timm: ModuleType, name: str) -> None:
    module = models.create(name, 5).double()
    nn.init.uniform_((getattr(module, "model", module)).norm.weight, 0.5, 2)
    images = torch.randn(3, 3, SIZE, SIZE).double()
    frozen = models.freeze(module)
    module.eval()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in frozen.modules())
    for got, expected in zip(
        predict(feature_model(frozen), images), predict(feature_model(module), images), strict=True
    ):
        assert (got - expected).norm() <= 1e-12 * expected.norm()


class ReadsItsStem(Swin):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.stem(x).mean()


@pytest.mark.parametrize("kind", [Swin, ReadsItsStem])
@pytest.mark.filterwarnings("error")
def test_a_wrapped_forward_of_its_own_decides_what_is_folded(kind: type[Swin]) -> None:
    torch.manual_seed(0)
    module = TrailingChannels(kind(5, 3).double())
    nn.init.uniform_(module.model.norm.weight, 0.5, 2)
    frozen, images = models.freeze(module), torch.randn(3, 3, SIZE, SIZE).double()
    assert any(isinstance(part, nn.BatchNorm2d) for part in frozen.modules()) == (kind is ReadsItsStem)
    logits = predict(frozen, images).logits
    assert (logits - module.eval()(images)).norm() <= 1e-12 * logits.norm()


@pytest.mark.parametrize(
    ("features", "trailing"),
    [
        (torch.zeros(2, 4, 5, D), True),
        (torch.zeros(2, D, 4, 5), False),
        (torch.zeros(2, D, 5, D), False),  # either, and the first of both is the protocol's
        (torch.zeros(2, 4, 5, 6), False),
        (torch.zeros(2, 4, D), False),
        ([torch.zeros(2, 4, 5, D)], False),
    ],
)
def test_where_a_map_has_its_channels(features: Any, trailing: bool) -> None:
    assert has_trailing_channels(features, D) == trailing
    moved = channels_first(features)
    assert moved.shape[1] == features.shape[3] if getattr(features, "ndim", 0) == 4 else moved is features


def test_the_zoo_comes_first(timm: ModuleType) -> None:
    assert not isinstance(models.create("vgg13", 5), ConvNet)
    assert isinstance(models.create("timm:vgg13", 5), ConvNet)


@pytest.mark.parametrize(("name", "kind"), [("two-branches", "list"), ("timm:two-branches-tuple", "tuple")])
def test_models_with_several_tensors_as_features_have_logits_only(timm: ModuleType, name: str, kind: str) -> None:
    module = models.create(name, 5)
    assert isinstance(module, LogitsOnly) and module.training and module.num_classes == 5
    assert module.reason.endswith(f"has no feature map: the features of an image are a {kind} of 2 tensors")
    images = torch.randn(3, 3, SIZE, SIZE)
    assert torch.equal(predict(module.eval(), images).logits, module.model(images))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("timm:vit-two-heads", r"vit-two-heads cannot average its patches: its head reads 2 class tokens"),
        ("timm:vit-registers", r"vit-registers has no feature map: its head reads 2 tokens outside the 4x4 map"),
        ("timm:ragged", r"ragged has no feature map: .* features \(1, 15, 8\)"),
        ("timm:pooled", r"pooled has no feature map: .* features \(1, 8\)"),
        ("timm:convnext", r"timm has no model 'convnext'; nearest: convnet"),
        ("timm:???", r"timm has no model '\?\?\?'; nearest: none"),
        ("convmet", r"no model is called 'convmet'; nearest: convnet"),
    ],
)
def test_refusals_give_the_reason(timm: ModuleType, name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        models.create(name, 5)


def test_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)  # makes the import fail, even if timm is installed
    with pytest.raises(ValueError, match="'timm:resnet50' needs timm, which is not installed"):
        models.create("timm:resnet50", 5)
    with pytest.raises(ValueError, match="no model is called 'resnet50'; nearest: resnet"):
        models.create("resnet50", 5)
