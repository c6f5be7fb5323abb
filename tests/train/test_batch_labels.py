"""Label smoothing and second labels: equal to torch's cross-entropy, in `forward` and in a training step."""

from __future__ import annotations

import copy

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor

from camkd_fast import Distiller, camkd_loss
from camkd_fast.losses.formula import Formula
from camkd_fast.train.batch_labels import Labels
from camkd_fast.train.distiller import Objective
from camkd_fast.train.strategies import find, names
from camkd_fast.train.strategies.base import Setup
from camkd_fast.train.teachers.live import LiveTeachers
from tests.support.training import CLASSES, SmallNet, batch, gradients, relative

pytestmark = pytest.mark.usefixtures("one_thread")
DATA = batch(17)
SECOND = DATA.target.roll(1)
MIX = torch.linspace(0.1, 1.0, 17)
PARTS = {
    "one label": {},
    "two labels": {"second_target": SECOND, "mix": MIX},
}


def soft_target(second: bool, smoothing: float, target: Tensor = DATA.target) -> Tensor:
    """Class probabilities (N, C) float64 as F.cross_entropy takes them."""
    onehot = F.one_hot(target.clamp(min=0), CLASSES).double()
    if second:
        onehot = MIX.double()[:, None] * onehot + (1 - MIX.double())[:, None] * F.one_hot(SECOND, CLASSES)
    return (1 - smoothing) * onehot + smoothing / CLASSES


def distiller(strategy: str, smoothing: float = 0.0, dtype: torch.dtype = torch.float64) -> Distiller:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teachers = [SmallNet(6 + k, seed=10 + k) for k in range(2)]
        return Distiller(SmallNet(), teachers, strategy, label_smoothing=smoothing).to(dtype).eval()


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("num_items", [None, 40])
@pytest.mark.parametrize("name", names())
def test_the_hard_part_is_torchs_cross_entropy(name: str, num_items: int | None, part: str) -> None:
    """And all other parts are those without smoothing. In float64."""
    smooth, hard = distiller(name, 0.2), distiller(name)
    images = DATA.images.double()
    out, without = (made(images, DATA.target, num_items, **PARTS[part]) for made in (smooth, hard))
    logits = smooth.student(images)
    divisor = 17 if num_items is None else num_items
    expected = F.cross_entropy(logits, soft_target(bool(PARTS[part]), 0.2), reduction="sum") / divisor
    unsmoothed = F.cross_entropy(logits, soft_target(bool(PARTS[part]), 0.0), reduction="sum") / divisor
    assert out.hard.item() == pytest.approx(expected.item(), rel=1e-9)
    assert without.hard.item() == pytest.approx(unsmoothed.item(), rel=1e-9)
    assert torch.equal(out.soft, without.soft) and torch.equal(out.feature, without.feature)
    twin = copy.deepcopy(smooth)
    out.loss.backward()
    without.loss.backward()
    logits = twin.student(images)
    parts = (F.cross_entropy(logits, soft_target(bool(PARTS[part]), eps), reduction="sum") for eps in (0.2, 0.0))
    ((next(parts) - next(parts)) / divisor).backward()
    difference = gradients(smooth.student) - gradients(hard.student)
    assert relative(difference, gradients(twin.student)) < 1e-9


def objective(made: Distiller, scale: float, **labels: Tensor) -> tuple[Objective, Tensor]:
    outputs = [] if made.teachers is None else made.teachers.outputs(DATA.images.to(made.student.fc.weight.dtype), [])
    images = DATA.images.to(made.student.fc.weight.dtype)
    out = made.objective(images, DATA.target, outputs, 40, torch.full((1,), scale), **labels)
    torch.autograd.backward(out.roots, out.gradients)
    return out, gradients(made)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", names())
def test_a_step_has_the_gradient_of_forward(name: str, part: str) -> None:
    made = distiller(name, 0.1, torch.float32)
    twin = copy.deepcopy(made)
    out, found = objective(made, 3.0, **PARTS[part])
    expected = twin(DATA.images, DATA.target, 40, **PARTS[part])
    (3.0 * expected.loss).backward()
    assert relative(found, gradients(twin)) < 1e-5
    losses = [expected.loss, expected.hard, expected.soft, expected.feature]
    assert out.numbers[:4].tolist() == pytest.approx([40 * loss.item() for loss in losses], rel=1e-5)


@pytest.mark.parametrize("name", ["ca-mkd", "ca-mkd-logits", "aver"])
def test_second_labels_reach_every_part(name: str) -> None:
    made = distiller(name)
    images = DATA.images.double()
    out = made(images, DATA.target, **PARTS["two labels"])
    outputs = made.teachers.outputs(images)
    student = made._observe(made.student, images)
    options = made.strategy.formula._replace(weighting=made.strategy.weighting(student.logits, outputs, None)).options()
    parts = camkd_loss(student.logits, [t.logits for t in outputs], DATA.target, **options, **PARTS["two labels"])
    assert torch.equal(out.weights, parts.weights) and torch.equal(out.soft, parts.soft)
    term = made.strategy.feature_term(student, outputs, DATA.target, **PARTS["two labels"])
    assert out.feature == (0 if term is None else term.loss)
    only = made(images, DATA.target)
    assert torch.equal(only.weights, out.weights) == (name == "aver")
    assert torch.equal(only.feature, out.feature) == (name != "ca-mkd")


@pytest.mark.parametrize("name", ["ce", "ca-mkd"])
@pytest.mark.parametrize("part", PARTS)
def test_images_without_a_label_do_not_count(name: str, part: str) -> None:
    made = distiller(name, 0.3)
    target = DATA.target.clone()
    target[11:] = -100
    images = DATA.images.double()
    some = made(images, target, **PARTS[part])
    first = made(images[:11], DATA.target[:11], **{key: value[:11] for key, value in PARTS[part].items()})
    assert some.loss.item() == pytest.approx(first.loss.item(), rel=1e-6)


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("part", PARTS)
def test_a_batch_without_labels_has_a_loss_of_zero(name: str, part: str) -> None:
    made = distiller(name, 0.3)
    out = made(DATA.images.double(), torch.full_like(DATA.target, -100), **PARTS[part])
    out.loss.backward()
    assert out.loss == 0 and out.hard == 0 and not gradients(made.student).any()


@pytest.mark.parametrize("name", ["ce", "aver", "fitnet-mkd", "ca-mkd"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_a_device_number_of_no_items(name: str, smoothing: float) -> None:
    """A part of a batch without labels, of a step that has none elsewhere either."""
    made = distiller(name, smoothing)
    out = made(DATA.images.double(), torch.full_like(DATA.target, -100), torch.zeros(1))
    out.loss.backward()
    assert out.loss.shape == () and out.loss == 0 and not gradients(made.student).any()


def ignoring(name: str, ignore_index: int, smoothing: float) -> Distiller:
    """With an instance of the strategy whose formula has another ignored label."""
    kind, teachers = find(name), LiveTeachers([SmallNet(6 + k, seed=10 + k).double() for k in range(2)], CLASSES)
    formula = Formula(ignore_index=ignore_index, soft_weight=float(kind.needs_teachers), weighting=kind.rule)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        strategy = kind.build(Setup(formula, teachers, 8, 1, kind.options)).double()
        given = teachers if kind.needs_teachers else None
        return Distiller(SmallNet().double(), given, strategy, label_smoothing=smoothing).eval()


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("num_items", [None, 40])
@pytest.mark.parametrize("name", names())
def test_the_ignored_label_is_that_of_the_strategys_formula(
    name: str, num_items: int | None, smoothing: float, part: str
) -> None:
    made, twin = ignoring(name, 255, smoothing), ignoring(name, -100, smoothing)
    images, ignored = DATA.images.double(), torch.arange(17) % 3 == 0
    target = DATA.target.masked_fill(ignored, 255)
    found = made(images, target, num_items, **PARTS[part])
    expected = twin(images, DATA.target.masked_fill(ignored, -100), num_items, **PARTS[part])
    for one, other in zip(found, expected, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    with pytest.raises(ValueError, match=r"target holds label -100, .*ignore_index is 255"):
        made(images, DATA.target.masked_fill(ignored, -100), num_items, **PARTS[part])


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["ce", "aver", "ca-mkd"])
def test_a_class_may_be_ignored(name: str, part: str) -> None:
    """Its rows do not count in a step either, nor in its accuracy."""
    images, target = DATA.images.double(), DATA.target.clone()
    target[::3] = 9  # the class of these rows only
    target[1::3] %= 9
    target[2::3] %= 9
    labels = {key: value % 9 if key == "second_target" else value for key, value in PARTS[part].items()}
    results = []
    for index in (9, -100):
        made = ignoring(name, index, 0.3)
        with torch.no_grad():
            made.student.fc.bias[9] += 100.0  # so that it is the student's answer everywhere
        outputs = [] if made.teachers is None else made.teachers.outputs(images, [])
        given = target.where(target != 9, torch.tensor(index))
        out = made.objective(images, given, outputs, 40, torch.ones(1), **labels)
        torch.autograd.backward(out.roots, out.gradients)
        results.append((out.numbers, gradients(made)))
    (numbers, found), (expected, gradient) = results
    assert torch.equal(numbers, expected) and torch.equal(found, gradient) and numbers[4] == 0


@pytest.mark.parametrize("name", ["ce", "aver", "ca-mkd"])
def test_labels_are_checked(name: str) -> None:
    made, images, y = distiller(name), DATA.images.double(), DATA.target
    for arguments, words in (
        ({"second_target": SECOND}, "mix is None, but second_target is a Tensor; give both or neither"),
        ({"mix": MIX}, "second_target is None, but mix is a Tensor"),
        ({"second_target": SECOND, "mix": MIX[:, None]}, r"mix has shape \(17, 1\), but target has \(17,\)"),
        ({"second_target": SECOND, "mix": 3 * MIX}, "mix holds"),
        ({"second_target": torch.full_like(y, 999), "mix": MIX}, "second_target holds label 999"),
        ({"target": F.one_hot(y, CLASSES).double()}, "target must be int64, got float64; .* second_target with mix"),
        ({"target": y + CLASSES}, "target holds label"),
        ({"num_items": 0}, "num_items must be finite and > 0, got 0"),
        ({"num_items": torch.ones(2)}, r"num_items must have one element, got shape \(2,\)"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            made(images, **{"target": y, **arguments})


def test_second_labels_of_ignored_rows_are_not_read() -> None:
    target, second = DATA.target.clone(), SECOND.clone()
    target[3], second[3] = -100, 999
    losses = [distiller("ce")(DATA.images.double(), target, second_target=x, mix=MIX).loss for x in (second, SECOND)]
    assert losses[0] == losses[1]


def test_accuracy_counts_the_label_with_the_larger_share() -> None:
    labels = Labels(torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6]), torch.tensor([0.4, 0.5, 1.0]))
    assert labels.largest().tolist() == [4, 2, 3] and Labels(labels.target).largest() is labels.target
    made = distiller("ce", dtype=torch.float32)
    right = made.student(DATA.images).argmax(1)
    out = made.objective(DATA.images, DATA.target, [], 17, torch.ones(1), right, torch.full((17,), 0.3))
    assert out.numbers[4] == 17


@given(st.integers(1, 9), st.integers(2, 12), st.floats(0.0, 1.0), st.booleans(), st.integers(0, 999))
def test_smoothing_in_any_shape(N: int, C: int, smoothing: float, mixed: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(N, C, dtype=torch.float64, generator=generator)).requires_grad_()
    first, second = torch.randint(C, (2, N), generator=generator)
    mix = torch.rand(N, generator=generator)
    labels = Labels(first, second, mix) if mixed else Labels(first)
    expected = mix * F.cross_entropy(logits, first, reduction="none", label_smoothing=smoothing)
    expected = expected + (1 - mix) * F.cross_entropy(logits, second, reduction="none", label_smoothing=smoothing)
    if not mixed:
        expected = F.cross_entropy(logits, first, reduction="none", label_smoothing=smoothing)
    hard = labels.cross_entropy(logits, 0.0, 3)
    in_parts = hard + smoothing * labels.smoothed(logits, 3)
    for found in (labels.cross_entropy(logits, smoothing, 3), in_parts):
        assert found.item() == pytest.approx(expected.sum().item() / 3, rel=1e-9, abs=1e-9)
    (slope,) = torch.autograd.grad(labels.smoothed(logits, 1), logits)
    assert torch.equal(slope, labels.smoothing_slope(logits))


def test_a_label_without_a_share_is_not_read() -> None:
    """Also if its class is infinitely unlikely."""
    logits = torch.zeros(2, 4)
    logits[:, 3] = -torch.inf
    labels = Labels(torch.tensor([0, 3]), torch.tensor([3, 1]), torch.tensor([1.0, 0.0]))
    expected = F.cross_entropy(logits, torch.tensor([0, 1]))
    assert labels.cross_entropy(logits, 0.0, None) == expected


def test_forbidden_classes_are_infinitely_unlikely() -> None:
    """As torch's: every class has a share of a smoothed label."""
    logits = torch.zeros(2, 4)
    logits[0, 3] = -torch.inf
    target = torch.tensor([-100, 1])
    labels = Labels(target)
    assert labels.smoothed(logits, 1).item() == 0.0
    assert Labels(torch.tensor([0, 1])).smoothed(logits, 1) == torch.inf


@pytest.mark.parametrize("smoothing", [-0.1, 1.5])
def test_refused(smoothing: float) -> None:
    with pytest.raises(ValueError, match=rf"label_smoothing must lie in \[0, 1\], got {smoothing}"):
        Distiller(SmallNet(), None, "ce", label_smoothing=smoothing)


@pytest.mark.slow
def test_mixed_labels_compile_in_one_graph() -> None:
    torch._dynamo.reset()
    made = distiller("ca-mkd", 0.1, torch.float32)
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    out, expected = (run(DATA.images, DATA.target, **PARTS["two labels"]) for run in (compiled, made))
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    torch._dynamo.reset()
