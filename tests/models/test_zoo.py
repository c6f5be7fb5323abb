"""The zoo: published parameter counts, shapes, protocol, seeds, memory formats, compilation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from camkd_fast import models
from camkd_fast.models.protocol import FeatureModel, feature_model, predict
from tests.support.tolerance import assert_accurate

ONE_PER_FAMILY = ("resnet8", "wrn-16-2", "vgg8", "mobilenetv2", "shufflenetv1", "shufflenetv2")

pytestmark = pytest.mark.usefixtures("one_thread")


# Parameter counts computed from the papers' tables, without a module: 3x32x32 images, 100 classes.
def conv(D_in: int, D: int, kernel: int, groups: int = 1) -> int:
    return D_in // groups * D * kernel**2


def conv_norm(D_in: int, D: int, kernel: int, groups: int = 1) -> int:
    return conv(D_in, D, kernel, groups) + 2 * D


def linear(D: int) -> int:
    return 100 * D + 100


def resnet(depth: int, stem: int, *widths: int) -> int:
    convolutions = (depth - 2) // 3  # in each stage
    total = conv_norm(3, stem, 3)
    for D_in, D in zip((stem, *widths), widths, strict=False):
        total += conv_norm(D_in, D, 3) + (convolutions - 1) * conv_norm(D, D, 3)
        total += conv_norm(D_in, D, 1) if D_in != D else 0
    return total + linear(widths[-1])


def wide_resnet(depth: int, widen: int) -> int:
    """Every convolution except stem and shortcuts has a batch norm on its input; one more ends the body."""
    convolutions = (depth - 4) // 3
    widths = (16 * widen, 32 * widen, 64 * widen)
    total = conv(3, 16, 3)
    for D_in, D in zip((16, *widths), widths, strict=False):
        total += 2 * D_in + conv(D_in, D, 3) + (convolutions - 1) * (2 * D + conv(D, D, 3))
        total += conv(D_in, D, 1) if D_in != D else 0
    return total + 2 * widths[-1] + linear(widths[-1])


def vgg(*widths: int) -> int:
    """With a bias for each convolution."""
    return sum(conv_norm(D_in, D, 3) + D for D_in, D in zip((3, *widths), widths, strict=False)) + linear(widths[-1])


def mobilenet() -> int:
    total, D_in = conv_norm(3, 16, 3), 16
    # Expansion, channels and repeats of arXiv 1801.04381, table 2; channels are halved except in the last layer.
    for expansion, channels, repeats in (
        *((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4)),
        *((6, 96, 3), (6, 160, 3), (6, 320, 1)),
    ):
        for _ in range(repeats):
            hidden, D = expansion * D_in, channels // 2
            total += conv_norm(D_in, hidden, 1) + conv_norm(hidden, hidden, 3, groups=hidden) + conv_norm(hidden, D, 1)
            D_in = D
    return total + conv_norm(D_in, 1280, 1) + linear(1280)


def shufflenet_v1() -> int:
    total, D_in = conv_norm(3, 24, 1), 24
    # arXiv 1707.01083, table 1, 3 groups; in a stage's first unit the pooled shortcut provides D_in channels.
    for channels, repeats in ((240, 4), (480, 8), (960, 4)):
        for repeat in range(repeats):
            D = channels - D_in if repeat == 0 else channels
            groups = 1 if D_in == 24 else 3
            total += conv_norm(D_in, D // 4, 1, groups) + conv_norm(D // 4, D // 4, 3, D // 4)
            total += conv_norm(D // 4, D, 1, 3)
            D_in = channels
    return total + linear(960)


def shufflenet_v2() -> int:
    total, D_in = conv_norm(3, 24, 1), 24
    # arXiv 1807.11164, table 5, 1x.
    for channels, repeats in ((116, 4), (232, 8), (464, 4)):
        half = channels // 2
        down = conv_norm(D_in, D_in, 3, D_in) + conv_norm(D_in, half, 1)  # the shortcut's branch
        down += conv_norm(D_in, half, 1) + conv_norm(half, half, 3, half) + conv_norm(half, half, 1)
        unit = 2 * conv_norm(half, half, 1) + conv_norm(half, half, 3, half)
        total += down + (repeats - 1) * unit
        D_in = channels
    return total + conv_norm(464, 1024, 1) + linear(1024)


def vgg_of(*convolutions: int) -> int:
    """Of that many convolutions in each block."""
    widths = (64, 128, 256, 512, 512)
    return vgg(*(D for D, count in zip(widths, convolutions, strict=True) for _ in range(count)))


# The count computed from the table, the exact number of the distillation benchmark's own model, and the millions
# published with it (arXiv 1910.10699 and its repository; CA-MKD's for resnet20x4).
COUNTS = {
    "resnet8": (resnet(8, 16, 16, 32, 64), 83_892, 0.08),
    "resnet14": (resnet(14, 16, 16, 32, 64), 181_108, 0.18),
    "resnet20": (resnet(20, 16, 16, 32, 64), 278_324, 0.28),
    "resnet32": (resnet(32, 16, 16, 32, 64), 472_756, 0.47),
    "resnet44": (resnet(44, 16, 16, 32, 64), 667_188, 0.67),
    "resnet56": (resnet(56, 16, 16, 32, 64), 861_620, 0.86),
    "resnet110": (resnet(110, 16, 16, 32, 64), 1_736_564, 1.74),
    "resnet8x4": (resnet(8, 32, 64, 128, 256), 1_233_540, 1.23),
    "resnet20x4": (resnet(20, 32, 64, 128, 256), 4_333_700, 4.33),
    "resnet32x4": (resnet(32, 32, 64, 128, 256), 7_433_860, 7.43),
    "wrn-16-1": (wide_resnet(16, 1), 180_916, 0.18),
    "wrn-16-2": (wide_resnet(16, 2), 703_284, 0.70),
    "wrn-40-1": (wide_resnet(40, 1), 569_780, 0.57),
    "wrn-40-2": (wide_resnet(40, 2), 2_255_156, 2.26),
    "vgg8": (vgg_of(1, 1, 1, 1, 1), 3_965_028, 3.97),
    "vgg11": (vgg_of(1, 1, 2, 2, 2), 9_277_284, 9.28),
    "vgg13": (vgg_of(2, 2, 2, 2, 2), 9_462_180, 9.46),
    "vgg16": (vgg_of(2, 2, 3, 3, 3), 14_774_436, 14.77),
    "vgg19": (vgg_of(2, 2, 4, 4, 4), 20_086_692, 20.09),
    "mobilenetv2": (mobilenet(), 812_836, 0.81),
    "shufflenetv1": (shufflenet_v1(), 949_258, 0.95),
    "shufflenetv2": (shufflenet_v2(), 1_355_528, 1.36),
}

# Side of the feature map for images of each side.
SIZES = (8, 11, 28, 32, 64)
MAPS = {
    "resnet": (2, 3, 7, 8, 16),
    "wrn": (2, 3, 7, 8, 16),
    "vgg": (1, 1, 3, 4, 4),
    "mobilenetv2": (1, 1, 2, 2, 4),
    "shufflenet": (1, 2, 4, 4, 8),
}


def map_sides(name: str) -> tuple[int, ...]:
    return next(sides for family, sides in MAPS.items() if name.startswith(family))


def test_the_tables_cover_the_zoo() -> None:
    assert set(COUNTS) == set(models.names())


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    table, exact, millions = COUNTS[name]
    assert table == exact and round(exact / 1e6, 2) == millions
    assert sum(p.numel() for p in models.create(name, 100).parameters()) == exact


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", COUNTS)
def test_shapes_and_protocol(name: str, channels: int) -> None:
    module = models.create(name, 7, channels).eval()
    model = feature_model(module)
    assert module.num_classes == 7
    for size, side in zip(SIZES, map_sides(name), strict=True):
        images = torch.randn(2, channels, size, size)
        with torch.no_grad():
            features, logits = predict(model, images)
            assert features.shape == (2, model.num_features, side, side)
            assert logits.shape == (2, 7)
            assert logits.isfinite().all()
            assert torch.equal(module(images), logits)


@settings(max_examples=40)
@given(
    name=st.sampled_from(ONE_PER_FAMILY),
    height=st.integers(8, 64),
    width=st.integers(8, 64),
    channels=st.sampled_from([1, 3]),
    classes=st.integers(1, 300),
)
def test_any_size_runs(name: str, height: int, width: int, channels: int, classes: int) -> None:
    model = models.create(name, classes, channels)
    features, logits = predict(feature_model(model), torch.randn(2, channels, height, width))
    assert logits.shape == (2, classes) and logits.isfinite().all()
    assert features.shape[:2] == (2, model.num_features) and min(features.shape[2:]) >= 1
    # The map is at most a quarter of the image, rounded up.
    assert features.shape[2] <= (height + 3) // 4 and features.shape[3] <= (width + 3) // 4


@pytest.mark.parametrize("name", COUNTS)
def test_a_gradient_reaches_every_parameter(name: str) -> None:
    # Evaluation mode, because batch statistics would cancel the gradient of VGG's redundant biases. float64, because
    # untrained depthwise stacks shrink the gradient below float32's range.
    model = models.create(name, 5).double().eval()
    model(torch.randn(2, 3, 16, 16).double()).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize("name", COUNTS)
def test_the_seed_determines_every_weight(name: str) -> None:
    def weights(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return models.create(name, 4).state_dict()

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(first[key], again[key]) for key in first)
    random = [key for key in first if first[key].dim() >= 2]  # all but biases and batch norms
    assert random and not any(torch.equal(first[key], other[key]) for key in random)


# The ShuffleNets have the initialisation of PyTorch's layers.
@pytest.mark.parametrize("name", ["resnet8x4", "wrn-16-2", "vgg8", "mobilenetv2"])
def test_initial_weights_have_the_published_spread(name: str) -> None:
    model = models.create(name, 50)
    wide = [module for module in model.modules() if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000]
    assert any(layer.in_channels != layer.out_channels for layer in wide)  # otherwise fan-in and fan-out are equal
    for layer in wide:
        fan_out = layer.out_channels * layer.kernel_size[0] * layer.kernel_size[1]
        assert layer.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.06)
    spread = 0.01 if name in ("vgg8", "mobilenetv2") else (3 * model.num_features) ** -0.5
    assert model.fc.weight.std().item() == pytest.approx(spread, rel=0.06)


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_channels_last_is_kept_and_agrees(name: str) -> None:
    model = models.create(name, 5).eval()
    images = torch.randn(3, 3, 32, 32)
    expected = model(images)
    model.to(memory_format=torch.channels_last)
    formats = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda _, inputs: formats.append(inputs[0]))
    got = model(images.to(memory_format=torch.channels_last))
    assert (got - expected).norm() <= 1e-5 * expected.norm()
    # Only the stride is checked, because half of the channels is not contiguous: channels vary fastest.
    assert formats and all(x.stride(1) == 1 for x in formats)


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_bfloat16_trains(name: str) -> None:
    model = models.create(name, 5)
    with torch.autocast("cpu", torch.bfloat16):
        features, logits = predict(feature_model(model), torch.randn(4, 3, 32, 32))
    assert logits.dtype == torch.bfloat16
    logits.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert features.isfinite().all()


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_one_graph_without_breaks(name: str) -> None:
    model = models.create(name, 5).train()
    images = torch.randn(2, 3, 32, 32)
    torch.compiler.reset()

    # "eager" runs the captured graph; fullgraph raises if there is more than one.
    @torch.compile(fullgraph=True, backend="eager", dynamic=False)
    def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return predict(feature_model(model), x)

    state = {key: value.clone() for key, value in model.state_dict().items()}
    features, logits = both(images)
    model.load_state_dict(state)
    expected = predict(feature_model(model), images)
    assert torch.equal(features, expected.features)
    assert torch.equal(logits, expected.logits)


@pytest.mark.slow
def test_the_compiler_agrees() -> None:
    model = models.create("resnet8", 5).eval()
    images = torch.randn(16, 3, 16, 16)
    with torch.no_grad():
        compiled, eager = torch.compile(model, fullgraph=True)(images), model(images)
        assert_accurate(compiled, model.double()(images.double()), eager)


@pytest.mark.parametrize("name", ["vgg13", "shufflenetv1", "shufflenetv2"])
def test_export_keeps_control_flow_and_shuffles(name: str) -> None:
    model = models.create(name, 5).eval()
    images = torch.randn(2, 3, 32, 32)
    exported = torch.export.export(model, (images,)).module()
    expected = model(images)
    assert (exported(images) - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("resnet21", "resnet20"),
        ("wrn_40_3", "wrn-40-2"),
        ("mobilenet", "mobilenetv2"),
        ("shufflenet_v2", "shufflenetv2"),
    ],
)
def test_unknown_names_list_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"no model is called '{name}'; nearest: .*{nearest}"):
        models.create(name, 10)


@pytest.mark.parametrize(
    ("official", "name"),
    [
        ("wrn_16_1", "wrn-16-1"),
        ("wrn_16_2", "wrn-16-2"),
        ("wrn_40_1", "wrn-40-1"),
        ("wrn_40_2", "wrn-40-2"),
        ("MobileNetV2", "mobilenetv2"),
        ("ShuffleV1", "shufflenetv1"),
        ("ShuffleV2", "shufflenetv2"),
        ("resnet8x4", "resnet8x4"),
    ],
)
def test_official_spellings_name_the_same_models(official: str, name: str) -> None:
    assert models.zoo_name(official) == name
    torch.manual_seed(3)
    ours = models.create(name, 4)
    torch.manual_seed(3)
    theirs = models.create(official, 4)
    assert repr(ours) == repr(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", ["timm:vgg13", "VGG13", "mobilenet_v2", ""])
def test_other_names_are_not_the_zoos(name: str) -> None:
    assert models.zoo_name(name) is None


def test_a_name_without_near_matches_lists_all() -> None:
    with pytest.raises(ValueError, match=", ".join(models.names())):
        models.create("???", 10)


@pytest.mark.parametrize(("num_classes", "in_channels", "bad"), [(0, 3, "num_classes"), (10, 0, "in_channels")])
def test_counts_below_one_are_refused(num_classes: int, in_channels: int, bad: str) -> None:
    with pytest.raises(ValueError, match=f"{bad} must be at least 1, got 0"):
        models.create("resnet8", num_classes, in_channels)


def test_a_module_without_the_protocol_is_refused() -> None:
    assert isinstance(models.create("resnet8", 2), FeatureModel)
    with pytest.raises(TypeError, match=r"Linear can be neither .*: it lacks num_features, forward_features"):
        feature_model(nn.Linear(2, 2))
