"""Frozen teachers: which batch norms are folded, and that outputs and protocol do not change."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

from camkd_fast import models
from camkd_fast.models.frozen import freeze
from camkd_fast.models.protocol import Prediction, feature_model, predict
from tests.support.models import with_random_norms

ONE_PER_FAMILY = ("resnet8", "wrn-16-2", "vgg8", "mobilenetv2", "shufflenetv1", "shufflenetv2")

pytestmark = pytest.mark.usefixtures("one_thread")


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@torch.no_grad()
def evaluated(model: nn.Module, images: Tensor) -> Prediction:
    return predict(feature_model(model.eval()), images)


def error(got: Prediction, exact: Prediction) -> float:
    """Relative error in norm, the larger one of features and logits."""
    return max(float((g.double() - e).norm() / e.norm()) for g, e in zip(got, exact, strict=True))


@pytest.mark.parametrize("name", models.names())
def test_folding_is_exact_up_to_rounding(name: str) -> None:
    model = with_random_norms(models.create(name, 10)).double()
    images = torch.randn(3, 3, 16, 16).double()
    frozen = models.freeze(model)
    # Wide ResNets fold the norm after each block's first convolution and the one after the stem.
    # That one stays at width 1, where the shortcut reads the stem's output as well.
    remaining = {"wrn-16-1": 7, "wrn-16-2": 6, "wrn-40-1": 19, "wrn-40-2": 18}.get(name, 0)
    assert norms(frozen) == remaining
    exact = evaluated(model, images)
    assert error(evaluated(frozen, images), exact) <= 1e-12
    # In float32 the folded model's error is about that of the original.
    unfolded = evaluated(model.float(), images.float())
    folded = evaluated(models.freeze(model), images.float())
    assert folded.logits.dtype == torch.float32
    assert error(folded, exact) <= 2 * error(unfolded, exact) + torch.finfo(torch.float32).eps


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folded_weights_are_rounded_once(dtype: torch.dtype, bias: bool) -> None:
    """Folding is float64; what is stored is the nearest number of the model's dtype."""
    model = models.create("vgg8" if bias else "resnet8", 10)
    layers = [m for m in with_random_norms(model).modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))][:2]
    conv, norm = (layer.to(dtype) for layer in layers)
    assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
    exact = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    offset = -norm.running_mean.double() if conv.bias is None else conv.bias.double() - norm.running_mean.double()
    frozen = next(module for module in models.freeze(model).modules() if isinstance(module, nn.Conv2d))
    for stored, true in (
        (frozen.weight, conv.weight.double() * exact.view(-1, 1, 1, 1)),
        (frozen.bias, norm.bias.double() + offset * exact),
    ):
        assert stored.dtype == dtype
        half_a_step = torch.finfo(dtype).eps / 2
        assert ((stored.double() - true).abs() <= half_a_step * (1 + 1e-6) * true.abs()).all()


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_the_original_is_not_modified(name: str) -> None:
    model = with_random_norms(models.create(name, 10))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    frozen = models.freeze(model, torch.bfloat16, channels_last=True)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) and after[key].dtype == before[key].dtype for key in before)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    theirs = {parameter.data_ptr() for parameter in model.parameters()}
    assert not any(parameter.data_ptr() in theirs for parameter in frozen.parameters())


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_frozen_means_evaluation_mode_without_parameter_gradients(name: str) -> None:
    frozen = models.freeze(with_random_norms(models.create(name, 10, 1)))
    assert not any(module.training for module in frozen.modules())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert (frozen.num_classes, type(frozen)) == (10, type(models.create(name, 10, 1)))
    assert not frozen(torch.randn(2, 1, 16, 16)).requires_grad
    # The head passes a gradient to its input: the student's projected features are trained through it.
    features = frozen.forward_features(torch.randn(2, 1, 16, 16)).clone().requires_grad_()
    feature_model(frozen).forward_head(features).square().sum().backward()
    assert features.grad is not None and features.grad.abs().max() > 0


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_low_precision_costs_no_more_than_a_cast(name: str) -> None:
    model = with_random_norms(models.create(name, 10))
    images = torch.randn(4, 3, 32, 32)
    exact = evaluated(models.freeze(model, torch.float64), images.double())
    frozen = models.freeze(model, torch.bfloat16, channels_last=True)
    folded = evaluated(frozen, images.bfloat16().to(memory_format=torch.channels_last))
    assert folded.logits.dtype == folded.features.dtype == torch.bfloat16
    assert folded.features.is_contiguous(memory_format=torch.channels_last)
    for module in frozen.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_var.dtype == torch.float32
        if isinstance(module, nn.Conv2d):
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
    unfolded = evaluated(model.bfloat16(), images.bfloat16())
    assert error(folded, exact) <= 1.5 * error(unfolded, exact)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_no_batch_norm_has_statistics_of_half_precision(kind: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 12), kind(12))
    model[2].running_var.fill_(1e5)
    frozen = models.freeze(model, torch.float16)
    assert frozen[2].running_var.dtype == torch.float32 and frozen[2].running_var.eq(1e5).all()
    assert frozen[1].weight.dtype == torch.float16


def test_a_frozen_model_compiles_in_one_graph() -> None:
    frozen = models.freeze(with_random_norms(models.create("wrn-16-2", 10)))
    images = torch.randn(2, 3, 16, 16)
    compiled = torch.compile(frozen, fullgraph=True, backend="eager")
    assert torch.equal(compiled(images), frozen(images))


class TwoConvolutions(nn.Module):
    """Two convolutions, each with a batch norm. Subclasses connect them differently. Images (N, 3, H, W), 4 classes."""

    num_features, num_classes = 6, 4

    def __init__(self, **conv: object) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, **conv)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 4)

    def forward_features(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = features.mean((2, 3))
        return pooled if pre_logits else self.fc(pooled)


class OutputUsedTwice(TwoConvolutions):
    def forward_features(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        return self.bn2(self.conv2(F.relu(self.bn1(y) + y)))


class ConvolutionUsedTwice(TwoConvolutions):
    def forward_features(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(self.conv2(y)))


class NormUsedTwice(TwoConvolutions):
    def forward_features(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv2(F.relu(self.bn1(self.conv1(x)))))


class HeadUsesIt(TwoConvolutions):
    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        return super().forward_head(self.conv2(features), pre_logits)


class WeightReadDirectly(TwoConvolutions):
    def forward_features(self, x: Tensor) -> Tensor:
        return super().forward_features(x) * self.conv2.weight.mean()


class ReluBetween(TwoConvolutions):
    def forward_features(self, x: Tensor) -> Tensor:
        return self.bn2(F.relu(self.conv2(self.bn1(F.relu(self.conv1(x))))))


class NormOfFeatures(TwoConvolutions):
    """The feature map is a convolution's output; its norm is part of the head."""

    def forward_features(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.bn1(self.conv1(x))))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        return super().forward_head(self.bn2(features), pre_logits)


class ScaledConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x).square()


class Subclassed(TwoConvolutions):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = ScaledConv(3, 6, 3, padding=1)


class BatchNormAct2d(nn.BatchNorm2d):
    """timm's layer of that name: batch norm, then `drop`, then `act`."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class WithActivation(TwoConvolutions):
    def __init__(self) -> None:
        super().__init__()
        self.bn1 = BatchNormAct2d(6)


class OtherNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sigmoid()


class UnknownNorm(TwoConvolutions):
    def __init__(self) -> None:
        super().__init__()
        self.bn1 = OtherNorm(6)


@pytest.mark.parametrize(
    ("kind", "remaining"),
    [
        *((TwoConvolutions, 0), (OutputUsedTwice, 1), (ConvolutionUsedTwice, 1), (NormUsedTwice, 2), (HeadUsesIt, 1)),
        *((WeightReadDirectly, 1), (ReluBetween, 2), (NormOfFeatures, 1), (Subclassed, 1), (WithActivation, 0)),
        (UnknownNorm, 1),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_convolution_is_folded_only_if_it_feeds_one_norm_and_nothing_else(
    kind: type[TwoConvolutions], remaining: int
) -> None:
    model = with_random_norms(kind()).double()
    images = torch.randn(3, 3, 9, 9).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frozen = models.freeze(model)
    # bn2 of NormUsedTwice is never called, so it has no input to fold into.
    assert norms(frozen) == remaining
    assert error(evaluated(frozen, images), evaluated(model, images)) <= 1e-12


class TiedConvolutions(TwoConvolutions):
    """Images with 6 channels, so that both convolutions can have one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(6, 6, 3, padding=1)
        self.conv2.weight = self.conv1.weight


class TiedToAnUnusedOne(TiedConvolutions):
    def forward_features(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)))


class TiedWithoutNorm(TiedConvolutions):
    def forward_features(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.bn1(self.conv1(x))))


class TiedNorms(TiedConvolutions):
    def __init__(self) -> None:
        super().__init__()
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.bn2.weight = self.bn1.weight


@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("kind", [TiedConvolutions, TiedToAnUnusedOne, TiedWithoutNorm, TiedNorms])
def test_modules_with_shared_parameters_are_not_folded(kind: type[TwoConvolutions], dtype: torch.dtype | None) -> None:
    model = with_random_norms(kind())
    images = torch.randn(3, 6, 9, 9)
    frozen = models.freeze(model, dtype)
    assert norms(frozen) == 2
    if dtype is None:
        assert torch.equal(evaluated(frozen, images).logits, evaluated(model, images).logits)
    convolutions = [module for module in frozen.modules() if isinstance(module, nn.Conv2d)]
    assert {p.dtype for module in convolutions for p in module.parameters()} == {dtype or torch.float32}


def test_a_hooked_convolution_is_not_folded() -> None:
    model = with_random_norms(TwoConvolutions()).double()
    model.conv1.register_forward_hook(lambda module, inputs, output: 2 * output)
    images = torch.randn(3, 3, 9, 9).double()
    frozen = models.freeze(model)
    assert norms(frozen) == 1
    assert error(evaluated(frozen, images), evaluated(model, images)) <= 1e-12


def test_norms_without_statistics_or_scales() -> None:
    model = with_random_norms(TwoConvolutions())
    model.bn1 = nn.BatchNorm2d(6, track_running_stats=False)
    model.bn2 = nn.BatchNorm2d(6, affine=False)
    images = torch.randn(3, 3, 9, 9).double()
    frozen = models.freeze(model.double())
    assert isinstance(frozen.bn1, nn.BatchNorm2d) and isinstance(frozen.bn2, nn.Identity)
    assert error(evaluated(frozen, images), evaluated(model, images)) <= 1e-12


@settings(max_examples=20)
@given(
    groups=st.sampled_from([1, 3]),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    bias=st.booleans(),
    mode=st.sampled_from(["zeros", "reflect", "circular"]),
)
def test_any_convolution_folds(groups: int, stride: int, dilation: int, bias: bool, mode: str) -> None:
    model = with_random_norms(
        TwoConvolutions(groups=groups, stride=stride, dilation=dilation, bias=bias, padding_mode=mode)
    ).double()
    images = torch.randn(2, 3, 12, 10).double()
    frozen = models.freeze(model)
    assert norms(frozen) == 0
    assert error(evaluated(frozen, images), evaluated(model, images)) <= 1e-12


class Untraceable(TwoConvolutions):
    def forward_features(self, x: Tensor) -> Tensor:
        if x.mean() > 100:
            return x
        return super().forward_features(x)


def pruned() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    prune.l1_unstructured(model[0], "weight", 0.5)
    model(torch.randn(1, 3, 8, 8))
    return model


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (pruned, "Sequential"),
        (lambda: torch.jit.script(nn.Linear(2, 2)), "RecursiveScriptModule"),
        (lambda: torch.jit.freeze(torch.jit.script(nn.Linear(2, 2).eval())), "RecursiveScriptModule"),
    ],
    ids=["pruned", "scripted", "frozen script"],
)
def test_a_model_that_cannot_be_copied_is_refused_by_name(kind: Callable[[], nn.Module], name: str) -> None:
    with pytest.raises(TypeError, match=rf"{name} cannot be copied and frozen: .* prune.remove .*; PyTorch says: \w+"):
        freeze(kind())  # type: ignore[arg-type]


def test_a_model_that_cannot_be_traced_is_frozen_with_its_norms() -> None:
    model = with_random_norms(Untraceable())
    images = torch.randn(3, 3, 9, 9)
    with pytest.warns(UserWarning, match="Untraceable keeps its batch norms, torch.fx cannot trace it: .*control flow"):
        frozen = models.freeze(model)
    assert norms(frozen) == 2 and not frozen.training
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert torch.equal(evaluated(frozen, images).logits, evaluated(model, images).logits)


def test_control_flow_in_modules_without_norms_is_kept() -> None:
    # VGG's last pool branches on the map's size; the frozen model must keep both branches.
    model = with_random_norms(models.create("vgg8", 10)).double()
    frozen = models.freeze(model)
    for size in (32, 64):
        images = torch.randn(2, 3, size, size).double()
        assert error(evaluated(frozen, images), evaluated(model, images)) <= 1e-12
