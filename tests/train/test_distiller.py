"""`Distiller`: the loss of its parts, its state, models of every kind, precisions, and any loop's habits."""

from __future__ import annotations

import copy
import gc
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camkd_fast import Distiller, camkd_loss, models
from camkd_fast.models.preprocessing import Preprocessing
from camkd_fast.models.protocol import Source
from camkd_fast.train.strategies import Strategy, names
from tests.support.training import CHANNELS, CLASSES, SIDE, SmallNet, batch, gradients, relative, train_step

pytestmark = pytest.mark.usefixtures("one_thread")
DATA = batch(33)


def teachers(count: int = 2) -> list[nn.Module]:
    return [SmallNet(6 + k, batch_norm=True, seed=10 + k) for k in range(count)]


def distiller(
    strategy: str = "ca-mkd", student: nn.Module | None = None, seed: int = 0, **options: object
) -> Distiller:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Distiller(student or SmallNet(), teachers(), strategy, **options)


class Bare(nn.Module):
    """A network without the protocol; its logits are in an object if `wrapped`."""

    def __init__(self, width: int = 8, wrapped: bool = False, seed: int = 0) -> None:
        super().__init__()
        self.inner, self.wrapped = SmallNet(width, seed=seed), wrapped
        self.stage = nn.Sequential(self.inner.conv1, nn.ReLU(), self.inner.conv2, nn.ReLU())
        self.fc = self.inner.fc

    def forward(self, x: Tensor) -> Tensor | SimpleNamespace:
        logits = self.fc(self.stage(x).mean((2, 3)))
        return SimpleNamespace(logits=logits) if self.wrapped else logits


# --- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names())
def test_loss_is_the_sum_of_its_parts(name: str) -> None:
    made = distiller(name, alpha=0.7, temperature=3.0)
    out = made(DATA.images, DATA.target)
    logits = made.student(DATA.images)
    assert torch.equal(out.logits, logits)
    assert out.hard.item() == pytest.approx(F.cross_entropy(logits, DATA.target).item(), rel=1e-5)
    if made.teachers is None:
        assert name == "ce" and out.weights is None and out.soft == 0
        assert out.loss.item() == pytest.approx(out.hard.item(), rel=1e-6)
        return
    outputs = made.teachers.outputs(DATA.images)
    weighting = made.strategy.weighting(logits.detach(), outputs, DATA.target)
    options = made.strategy.formula._replace(weighting=weighting).options()
    assert options["temperature"] == 3.0
    assert options["soft_weight"] == 0.7 / made.strategy.divisor(2, False)
    parts = camkd_loss(logits, [t.logits for t in outputs], DATA.target, **options)
    assert torch.equal(out.weights, parts.weights) and out.weights.shape == (2, 33)
    assert torch.equal(out.soft, parts.soft)
    assert out.loss.item() == pytest.approx((parts.loss + out.feature).item(), rel=1e-6)
    assert (out.feature != 0) == made.strategy.needs_features


@pytest.mark.parametrize("name", names())
def test_gradient_is_that_of_the_training_step(name: str) -> None:
    step = train_step(name)
    made = Distiller(SmallNet(), step.teachers, copy.deepcopy(step.strategy))
    step(DATA, 33, 0.0, 0)
    made(DATA.images, DATA.target).loss.backward()
    assert relative(gradients(made), gradients(step.trainable)) < 1e-6


@pytest.mark.parametrize("name", ["ce", "aver", "ca-mkd-logits", "ca-mkd"])
def test_accumulated_gradients_are_those_of_the_whole_batch(name: str) -> None:
    whole, parts = distiller(name).eval(), distiller(name).eval()  # batch norms of the maps r_k see parts
    whole(DATA.images, DATA.target).loss.backward()
    for part in torch.arange(33).split(10):
        parts(DATA.images[part], DATA.target[part], num_items=33).loss.backward()
    assert relative(gradients(parts), gradients(whole)) < 1e-5


def test_images_without_a_label_do_not_count() -> None:
    made = distiller().eval()
    target = DATA.target.clone()
    target[20:] = -100
    some, first = made(DATA.images, target), made(DATA.images[:20], DATA.target[:20])
    assert some.loss.item() == pytest.approx(first.loss.item(), rel=1e-5)
    assert torch.equal(some.weights[:, 20:], torch.zeros(2, 13))


def test_evaluation_records_no_graph() -> None:
    made = distiller().eval()
    with torch.inference_mode():
        out = made(DATA.images, DATA.target)
    assert not out.loss.requires_grad and not out.logits.requires_grad


# --- state -----------------------------------------------------------------------------------------------------------


def test_parameters_and_state_are_those_of_student_and_strategy() -> None:
    made = distiller()
    own = {id(p) for part in (made.student, made.strategy) for p in part.parameters()}
    assert {id(p) for p in made.parameters()} == own
    assert {name.split(".")[0] for name in made.state_dict()} == {"student", "strategy"}
    other = distiller(seed=1)
    other.load_state_dict(made.state_dict())
    made.eval(), other.eval()
    assert torch.equal(made(DATA.images, DATA.target).loss, other(DATA.images, DATA.target).loss)


def test_given_teachers_stay_as_they_are() -> None:
    given = teachers()
    before = [copy.deepcopy(model.state_dict()) for model in given]
    made = Distiller(SmallNet(), given)
    made.train()
    for _ in range(2):
        made(DATA.images, DATA.target).loss.backward()
    for model, state in zip(given, before, strict=True):
        assert all(p.grad is None and p.requires_grad for p in model.parameters()) and model.training
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_given_teachers_stay_as_they_are_after_an_error() -> None:
    given = [Bare(6, seed=1)]
    with pytest.raises(ValueError, match="no module 'nope'"):
        Distiller(SmallNet(), given, teacher_layers=["nope"], example=DATA.images[:1])
    assert all(module.training for module in given[0].modules())


def test_flags_are_flags() -> None:
    with pytest.raises(TypeError, match="detach_weights must be True or False, got str 'no'"):
        Distiller(SmallNet(), teachers(), detach_weights="no")


def copied(made: Distiller) -> Distiller:
    return pickle.loads(pickle.dumps(made))


@pytest.mark.parametrize("split", ["student", "teacher"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_compute_the_same(way: str, split: str) -> None:
    student, given = (Bare(), teachers()) if split == "student" else (SmallNet(), [Bare(6, seed=1)])
    layers: dict[str, Any] = {"student_layer": "stage"} if split == "student" else {"teacher_layers": ["stage"]}
    made = Distiller(student, given, example=DATA.images[:1], **layers).eval()
    other = copy.deepcopy(made) if way == "deepcopy" else copied(made)
    expected = made(DATA.images, DATA.target).loss
    with torch.no_grad():
        for p in made.parameters():
            p.zero_()
        for model in made.teachers._modules:
            for p in model.parameters():
                p.zero_()
    assert torch.equal(other(DATA.images, DATA.target).loss, expected)


OBSERVED: dict[str, Any] = {"student_layer": "stage", "example": DATA.images[:1]}


@pytest.mark.parametrize("way", ["itself", "deepcopy", "pickle"])
def test_two_distillers_of_one_student(way: str) -> None:
    student = Bare()
    one, two = Distiller(student, teachers(), **OBSERVED), Distiller(student, teachers(), "fitnet-mkd", **OBSERVED)
    made = one if way == "itself" else copy.deepcopy(one) if way == "deepcopy" else copied(one)
    expected = two(DATA.images, DATA.target).loss
    made(DATA.images, DATA.target)
    del one, made
    gc.collect()
    assert torch.equal(two(DATA.images, DATA.target).loss, expected)


@pytest.mark.parametrize(
    "options",
    [{"student_layer": "fc"}, {"student_layer": "stage", "temperature": -1.0}, {"student_layer": "stage", "beta": "x"}],
)
def test_a_distiller_that_fails_leaves_nothing_on_its_student(options: dict[str, Any]) -> None:
    student = Bare()
    with pytest.raises((ValueError, TypeError)):
        Distiller(student, teachers(), **{**OBSERVED, **options})
    assert not any(module._forward_hooks or "forward" in vars(module) for module in student.modules())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_teachers_follow_to(dtype: torch.dtype) -> None:
    made = distiller().eval()
    expected = made(DATA.images, DATA.target).loss
    found = made.to(dtype)(DATA.images.to(dtype), DATA.target).loss
    assert {p.dtype for model in made.teachers._modules for p in model.parameters()} == {dtype}
    assert found.item() == pytest.approx(expected.item(), rel=1e-6 if dtype == torch.float64 else 0.05)
    assert made.to("meta").teachers._modules[0].conv1.weight.device.type == "meta"


@pytest.mark.parametrize("strategy", ["ca-mkd", "kd"])
@pytest.mark.parametrize(
    "holder",
    [lambda made: made, lambda made: nn.Sequential(made), lambda made: nn.ModuleDict({"d": made}), torch.compile],
    ids=["itself", "Sequential", "ModuleDict", "compiled"],
)
def test_teachers_stay_when_the_student_is_emptied(holder: Any, strategy: str) -> None:
    """A student on meta gets memory, and then its weights from a state dict, in which the teachers are not."""
    made = distiller(strategy).eval()
    weights, expected = made.state_dict(), made(DATA.images, DATA.target).loss
    held = holder(made)
    assert held.to_empty(device="cpu") is held
    assert made.student.conv1.weight.data_ptr() != weights["student.conv1.weight"].data_ptr()
    made.load_state_dict(weights)
    assert torch.equal(made(DATA.images, DATA.target).loss, expected)
    assert made.to_empty(device="meta").teachers._modules[0].conv1.weight.is_meta


def test_emptied_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """device=None of `nn.Module.to_empty` keeps the device of every tensor."""
    devices: list[Any] = []
    monkeypatch.setattr(Strategy, "to_device", lambda self, device: devices.append(device))
    made = distiller()
    made.to_empty(device=None)
    made.to_empty(device="cpu")
    assert devices == [None, torch.device("cpu")]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.float64])
def test_a_cast_is_not_taken_for_emptying(dtype: torch.dtype) -> None:
    made = distiller("aver").to(dtype)
    assert {p.dtype for model in made.teachers._modules for p in model.parameters()} == {dtype}


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_student_without_the_protocol(wrapped: bool) -> None:
    bare = Bare(wrapped=wrapped)
    made = distiller(student=bare, student_layer="stage", example=DATA.images[:1])
    twin = distiller(student=bare.inner)
    assert bare.training and bare.inner.training  # the pass over the example changed nothing
    out = made(DATA.images, DATA.target)
    assert torch.equal(out.loss, twin(DATA.images, DATA.target).loss) and out.feature > 0


def test_logits_are_enough_for_strategies_without_feature_maps() -> None:
    made = Distiller(Bare(), [Bare(6, True, seed=1), SmallNet(7, seed=2)], "ca-mkd-logits")
    twin = Distiller(SmallNet(), [SmallNet(6, seed=1), SmallNet(7, seed=2)], "ca-mkd-logits")
    assert torch.equal(made(DATA.images, DATA.target).loss, twin(DATA.images, DATA.target).loss)


def test_any_sequence_of_teachers() -> None:
    for teachers in (nn.ModuleList([SmallNet(), SmallNet()]), (SmallNet() for _ in range(2))):
        assert len(Distiller(SmallNet(), teachers, "aver").teachers.num_features) == 2
    for single in (SmallNet(), "runs/t0"):
        with pytest.raises(TypeError, match="teachers must be a list, got"):
            Distiller(SmallNet(), single, "aver")
    with pytest.raises(ValueError, match="temperature must be finite and > 0, got 0"):
        Distiller(SmallNet(), [SmallNet()], "aver", temperature=0)
    for beta in (float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"beta must be finite, got {beta}"):
            Distiller(SmallNet(), [SmallNet()], "ca-mkd", beta=beta)


def test_teachers_split_at_a_layer() -> None:
    given = [Bare(6, seed=1), SmallNet(7, seed=2)]
    torch.manual_seed(0)
    made = Distiller(SmallNet(), given, teacher_layers=["stage", None], example=DATA.images[:1])
    torch.manual_seed(0)
    twin = Distiller(SmallNet(), [given[0].inner, given[1]])
    assert torch.equal(made(DATA.images, DATA.target).loss, twin(DATA.images, DATA.target).loss)
    assert made(DATA.images, DATA.target).feature > 0


def test_sources_and_strings(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = models.create("resnet8", CLASSES)
    torch.save(model.state_dict(), tmp_path / "resnet8.pth")
    text = f"resnet8@{tmp_path / 'resnet8.pth'}"
    losses = []
    for teacher in (model, Source(model), text):
        torch.manual_seed(0)
        losses.append(Distiller(SmallNet(), [teacher])(DATA.images, DATA.target).loss)
    assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2])


def test_teachers_of_other_images_and_classes() -> None:
    """As the teacher by itself on images prepared for it, its logits sorted by the student's names."""
    ours, theirs = [f"c{i}" for i in range(CLASSES)], [f"c{i}" for i in reversed(range(CLASSES))]
    teacher = SmallNet(6, seed=1)
    given, own = Preprocessing((0.5,) * 3, (0.25,) * 3, (8, 8)), Preprocessing((0.4, 0.5, 0.6), (0.2,) * 3, (12, 12))
    source = Source(teacher, own.mean, own.std, own.size, tuple(theirs))
    made = Distiller(SmallNet(), [source], preprocessing=given, class_names=ours)
    levels = DATA.images * 0.25 + 0.5
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (own.mean, own.std))
    prepared = F.interpolate((levels - mean) / std, (12, 12), mode="bilinear", antialias=True)
    (found,) = made.teachers.outputs(DATA.images)
    expected = teacher(prepared).flip(1)
    assert relative(found.logits, expected) < 1e-5
    assert made(DATA.images, DATA.target).feature > 0
    with pytest.raises(ValueError, match=r"teacher 0 \(SmallNet\) knows 10 classes, such as 'c0'.*'dog'.*a Source"):
        Distiller(SmallNet(), [source], class_names=["dog", *ours[1:]])


class Twice(Bare):
    def forward(self, x: Tensor) -> Tensor | SimpleNamespace:
        return self.fc((self.stage(x) + self.stage(-x)).mean((2, 3)))


REFUSED = {
    "no feature map of the student": (lambda: Distiller(Bare(), teachers()), r"ca-mkd needs.*Bare.*student_layer"),
    "no feature map of a teacher": (lambda: Distiller(SmallNet(), [Bare()]), r"0 \(Bare\) has none: teacher_layers"),
    "an unknown layer": (lambda: Distiller(Bare(), teachers(), student_layer="stagge"), r"no module 'stagge'.*stage"),
    "no example": (lambda: Distiller(Bare(), teachers(), student_layer="stage"), r"student_layer 'stage'.*example"),
    "no map": (
        lambda: Distiller(Bare(), teachers(), student_layer="fc", example=DATA.images[:1]),
        r"Bare.fc gives shape \(1, 10\), not one map",
    ),
    "two maps": (
        lambda: Distiller(Twice(), teachers(), student_layer="stage", example=DATA.images[:1]),
        r"Twice.stage gives 2 outputs, not one map",
    ),
    "layers of other teachers": (lambda: Distiller(SmallNet(), teachers(), teacher_layers=["a"]), r"holds 1.*2 teach"),
    "no teachers": (lambda: Distiller(SmallNet(), []), "ca-mkd learns from teachers, but none were given"),
    "too many teachers": (lambda: Distiller(SmallNet(), teachers() * 9), "1 to 16 teachers, got 18"),
    "other classes": (
        lambda: Distiller(models.create("resnet8", 7), teachers()),
        r"teacher 0 \(SmallNet\) has 10 classes, but the student has 7",
    ),
    "an unknown strategy": (lambda: Distiller(SmallNet(), teachers(), "ca-mdk"), r"no strategy is named 'ca-mdk'"),
    "an option without this value": (lambda: Distiller(SmallNet(), teachers(), uniform="logit"), "uniform.*'logit'"),
    "an option of another strategy": (lambda: Distiller(SmallNet(), teachers(), "aver", beta=1.0), "beta"),
    "a file that is not there": (lambda: Distiller(SmallNet(), ["resnet8@nowhere.pth"]), "nowhere.pth"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises((ValueError, OSError), match=message):
        make()


def test_a_model_that_returns_something_else_is_named() -> None:
    class Pair(Bare):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x), x

    with pytest.raises(TypeError, match=r"logits.*tuple"):
        Distiller(Pair(), teachers(), "aver")(DATA.images, DATA.target)


# --- precision and compilation ---------------------------------------------------------------------------------------


def test_autocast_reaches_the_student_only() -> None:
    made = distiller("ca-mkd-logits")
    exact = made(DATA.images, DATA.target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = made(DATA.images, DATA.target)
    assert out.logits.dtype == torch.bfloat16 and out.loss.dtype == torch.float32
    assert torch.equal(out.weights, exact.weights)  # of the teachers' float32 logits
    out.loss.backward()
    low = gradients(made)
    made.zero_grad()
    exact.loss.backward()
    assert relative(low, gradients(made)) < 8 * torch.finfo(torch.bfloat16).eps


def test_half_precision_teachers() -> None:
    made = distiller(teacher_dtype=torch.bfloat16)
    assert made.teachers.outputs(DATA.images)[0].logits.dtype == torch.bfloat16
    exact, out = distiller()(DATA.images, DATA.target), made(DATA.images, DATA.target)
    assert out.loss.dtype == torch.float32
    assert out.loss.item() == pytest.approx(exact.loss.item(), rel=0.05)


def test_a_scaled_loss_has_scaled_gradients() -> None:
    one, scaled = distiller(), distiller()
    one(DATA.images, DATA.target).loss.backward()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(scaled(DATA.images, DATA.target).loss).backward()
    assert relative(gradients(scaled), 1024.0 * gradients(one)) < 1e-6


def test_channels_last_changes_the_layout_only() -> None:
    one, other = distiller(), distiller(channels_last=True)
    for module in (other.student, *other.teachers._modules):
        assert module.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    found, expected = other(DATA.images, DATA.target), one(DATA.images, DATA.target)
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["ca-mkd", "aekd"])
def test_compiled_in_one_graph(name: str) -> None:
    torch._dynamo.reset()
    options = {"student": Bare(), "student_layer": "stage", "example": DATA.images[:1]}
    eager, made = distiller(name, **options), distiller(name, **(options | {"student": Bare()}))
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    out, expected = compiled(DATA.images, DATA.target), eager(DATA.images, DATA.target)
    out.loss.backward()
    expected.loss.backward()
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    assert relative(gradients(made), gradients(eager)) < 1e-5


def test_it_learns() -> None:
    torch.manual_seed(0)
    made = distiller()
    optimizer = torch.optim.SGD(made.parameters(), lr=0.05, momentum=0.9)
    first = last = 0.0
    for number in range(30):
        optimizer.zero_grad()
        loss = made(DATA.images, DATA.target).loss
        loss.backward()
        optimizer.step()
        first, last = first or loss.item(), loss.item() if number == 29 else 0.0
    assert last < 0.8 * first
    assert DATA.images.shape[1:] == (CHANNELS, SIDE, SIDE)
