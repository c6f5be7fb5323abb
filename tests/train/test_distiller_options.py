"""What a `Distiller` refuses before any work, and what it says; instances of strategies; emptied modules."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from camkd_fast import Distiller
from camkd_fast.models.protocol import Source, TrailingChannels, inner_model
from camkd_fast.train.strategies import STRATEGIES, Strategy, create, names, register, unregister
from camkd_fast.train.teachers import given
from tests.support.tolerance import assert_near
from tests.support.training import CLASSES, SmallNet, batch

pytestmark = pytest.mark.usefixtures("one_thread")
DATA = batch(17)


def teachers(count: int = 2) -> list[nn.Module]:
    return [SmallNet(6 + k, seed=10 + k) for k in range(count)]


NUMBER, FLAG = "must be a number, got", "must be True or False, got"
WRONG_TYPES: list[tuple[str, dict[str, Any], str]] = [
    *(("aver", {name: value}, NUMBER) for name in ("alpha", "temperature") for value in (True, "1", [1.0])),
    *(("aver", {"label_smoothing": value}, NUMBER) for value in (True, "0.1", None)),
    *(("ca-mkd", {"beta": value}, NUMBER) for value in (True, "50")),
    *(("ebkd", {"official_scale": value}, FLAG) for value in ("yes", 1)),
    *(("ca-mkd", {"detach_weights": value}, FLAG) for value in ("no", 0)),
    *(("kd", {"teacher_index": value}, "must be an int, got") for value in (1.0, True, "1")),
    ("ca-mkd", {"uniform": 1}, "must be a string, got"),
    ("aver", {"uniform": False}, "must be a string, got"),
    ("aver", {"channels_last": "yes"}, FLAG),
    *(("aver", {"teacher_dtype": value}, "must be a floating-point torch.dtype") for value in ("bfloat16", torch.int8)),
    ("aver", {"preprocessing": ((0.5,), (0.5,), 32)}, "must be a camkd_fast.models.preprocessing.Preprocessing"),
    ("aver", {"class_names": "abc"}, "must be a sequence of names or None, got 'abc'"),
    ("aver", {"student_layer": 3}, "must be a module's name or None, got"),
    ("aver", {"teacher_layers": "abc"}, "must be a sequence of names or None, got"),
]


@pytest.mark.parametrize(("name", "options", "message"), WRONG_TYPES, ids=lambda value: str(value)[:40])
def test_options_of_a_wrong_type_are_refused(
    name: str, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(given, "freeze", None)  # teachers are not copied for it
    ((option, value),) = options.items()
    with pytest.raises(TypeError, match=f"^{option} {message}") as caught:
        Distiller(SmallNet(), teachers(), name, **options)
    assert repr(value) in str(caught.value)


def test_layers_and_examples_of_a_wrong_type_are_refused() -> None:
    with pytest.raises(TypeError, match=r"teacher_layers\[1\] must be a module's name or None, got 5"):
        Distiller(SmallNet(), teachers(), teacher_layers=[None, 5])
    with pytest.raises(TypeError, match="example must be a tensor of images, got list"):
        Distiller(SmallNet(), teachers(), example=[1])


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("option", sorted({option for kind in STRATEGIES.values() for option in kind.options}))
def test_options_of_other_strategies_have_types_too(name: str, option: str) -> None:
    with pytest.raises((TypeError, ValueError), match=option):
        Distiller(SmallNet(), teachers(), name, **{option: object()})


def test_options_of_a_new_strategy_are_checked() -> None:
    class Scaled(Strategy):
        name, label, color = "scaled", "Scaled", "#000000"
        options: ClassVar[dict[str, Any]] = {"factor": 2.0, "times": 3, "way": "up", "anything": None}

    register(Scaled)
    try:
        for option in ("factor", "times", "way"):
            with pytest.raises(TypeError, match=f"{option} must be .*, got bool True"):
                Distiller(SmallNet(), teachers(), "scaled", **{option: True})
        Distiller(SmallNet(), teachers(), "scaled", factor=1, times=2, way="down", anything=True)
    finally:
        unregister("scaled")


@pytest.mark.parametrize("strategy", [None, 3, Strategy, STRATEGIES["aver"]])
def test_a_strategy_is_a_name_or_an_instance(strategy: Any) -> None:
    with pytest.raises(TypeError, match="strategy must be a name or a Strategy, got"):
        Distiller(SmallNet(), teachers(), strategy)


@pytest.mark.parametrize(("name", "error"), [("ca-mdk", ValueError), ("ce", None)])
def test_teachers_are_not_copied_in_vain(
    name: str, error: type[Exception] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(given, "freeze", None)
    if error is None:
        assert Distiller(SmallNet(), teachers(), name).teachers is None
    else:
        with pytest.raises(error, match="no strategy is named"):
            Distiller(SmallNet(), teachers(), name)


# --- instances of strategies -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"temperature": 4.0}, {"alpha": 9}, {"beta": 1.0}, {"uniform": "logits"}, {"nonsense": 3}]
)
def test_options_with_an_instance_are_refused(options: dict[str, Any]) -> None:
    strategy = Distiller(SmallNet(), teachers(), "ca-mkd").strategy
    (option,) = options
    with pytest.raises(TypeError, match=f"strategy is a CAMKD with options of its own, but {option} is given"):
        Distiller(SmallNet(), teachers(), strategy, **options)


@pytest.mark.parametrize(
    ("name", "student", "models", "message"),
    [
        ("ca-mkd", SmallNet(), teachers(1), r"\[8, 6, 7\] channels, but the models have \[8, 6\]"),
        ("fitnet-mkd", SmallNet(), teachers()[::-1], r"\[8, 6, 7\] channels, but the models have \[8, 7, 6\]"),
        ("ca-mkd", SmallNet(5), teachers(), r"\[8, 6, 7\] channels, but the models have \[5, 6, 7\]"),
        ("kd", SmallNet(), teachers(3), "made for 2 teachers, but there are 3"),
        ("aver", SmallNet(), None, "aver learns from teachers, but none were given"),
        ("aver", SmallNet(), [], "aver learns from teachers, but none were given"),
    ],
)
def test_an_instance_of_other_models_is_refused(name: str, student: nn.Module, models: Any, message: str) -> None:
    strategy = Distiller(SmallNet(), teachers(), name).strategy
    with pytest.raises(ValueError, match=message):
        Distiller(student, models, strategy)


@pytest.mark.parametrize("name", names())
def test_a_student_that_only_is_replicated(name: str) -> None:
    """The gradients of the strategy's own parameters would differ between the processes."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        student = nn.parallel.DistributedDataParallel(SmallNet())
        expected = pytest.raises(ValueError, match=f"{name} trains parameters .*wrap the Distiller")
        with expected if STRATEGIES[name].needs_features else nullcontext():
            Distiller(student, teachers(), name, student_layer="module.conv1", example=DATA.images)
    finally:
        del student
        dist.destroy_process_group()


def test_aekd_names_the_teacher_with_other_classes() -> None:
    student, other = (nn.Sequential(nn.Flatten(), nn.Linear(DATA.images[0].numel(), C)) for C in (10, 12))
    made = Distiller(student, [other], "aekd")
    with pytest.raises(ValueError, match=r"teacher_logits\[0\] has 12 classes, but student_logits has 10"):
        made(DATA.images, DATA.target)


def test_an_instance_has_the_heads_of_its_teachers() -> None:
    strategy = Distiller(SmallNet(), teachers(), "ca-mkd").strategy
    others = [SmallNet(6 + k, seed=30 + k) for k in range(2)]
    made, twin = Distiller(SmallNet(), others, strategy), Distiller(SmallNet(), others, "ca-mkd")
    twin.load_state_dict(made.state_dict())
    assert torch.equal(made(DATA.images, DATA.target).loss, twin(DATA.images, DATA.target).loss)


# --- teachers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "kind"), [(None, "NoneType"), (5, "int"), ([SmallNet()], "list"), (lambda x: x, "function")]
)
@pytest.mark.parametrize("name", ["aver", "ce"])
def test_entries_that_are_no_teachers_are_named_by_their_position(name: str, entry: Any, kind: str) -> None:
    with pytest.raises(TypeError, match=rf"teachers\[1\] must be a module, a Source or a string, got {kind}"):
        Distiller(SmallNet(), [SmallNet(), entry], name)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": SmallNet()}, r"must be a list, got dict: list\(teachers.values\(\)\)"),
        (nn.ModuleDict({"a": SmallNet()}), "must be a list, got ModuleDict"),
        (5, "must be a list, got 5"),
    ],
)
def test_teachers_that_are_no_list(value: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"teachers {message}"):
        Distiller(SmallNet(), value, "aver")


class Bare(nn.Module):
    num_classes = 7

    def __init__(self) -> None:
        super().__init__()
        self.net = SmallNet(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_messages_name_the_callers_models() -> None:
    ours, theirs = [f"c{i}" for i in range(CLASSES)], tuple(f"c{i}" for i in reversed(range(CLASSES)))
    for source, options, message in (
        (Bare(), {}, r"^teacher 1 \(Bare\) has 7 classes, but the student has 10$"),
        (
            Source(Bare(), classes=theirs),
            {"class_names": ["dog", *ours[1:]]},
            r"^teacher 1 \(Bare\) knows.*a Source whose",
        ),
        (Bare(), {"strategy": "ca-mkd"}, r"teacher 1 \(Bare\) has none: teacher_layers names no module of Bare"),
        (torch.jit.script(nn.Linear(2, 2)), {}, "^RecursiveScriptModule cannot be copied"),
    ):
        with pytest.raises((ValueError, TypeError), match=message) as caught:
            Distiller(SmallNet(), [SmallNet(), source], **{"strategy": "aver", **options})
        for private in ("LogitsOnly", "Renumbered", "class-map"):
            assert private not in str(caught.value)


class ChannelsLast(SmallNet):
    """As timm's Swin, which says so in `output_fmt`."""

    def forward_features(self, x: Tensor) -> Tensor:
        return super().forward_features(x).permute(0, 2, 3, 1)

    def forward_head(self, features: Tensor) -> Tensor:
        return super().forward_head(features.permute(0, 3, 1, 2))


class SaysSo(ChannelsLast):
    output_fmt = "NHWC"


@pytest.mark.parametrize("name", ["fitnet-mkd", "ca-mkd"])
def test_maps_with_the_channels_last(name: str) -> None:
    losses = []
    for student, teacher in ((SmallNet(), SmallNet(6, seed=1)), (ChannelsLast(), SaysSo(6, seed=1))):
        torch.manual_seed(0)
        losses.append(Distiller(student, [teacher], name)(DATA.images, DATA.target).loss)
    assert_near(losses[0], losses[1])
    with pytest.raises(
        ValueError, match=r"maps \(N, D, h, w\) with D = 6 of teacher 0, but that has shape \(17, 4, 4, 6\)"
    ):
        Distiller(SmallNet(), [ChannelsLast(6, seed=1)], name)(DATA.images, DATA.target)


def doubled(_: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return 2 * output


@pytest.mark.parametrize("place", ["wrapper", "model", "compiled"])
def test_hooks_count_of_a_wrapper_and_of_the_model_in_it(place: str) -> None:
    """As of `models.create` for timm's Swin."""
    student: nn.Module = TrailingChannels(ChannelsLast())
    (student.model if place == "model" else student).register_forward_hook(doubled)
    if place == "compiled":
        student = torch.compile(student, backend="eager")
    made, expected = (Distiller(s, [SmallNet(6)], "fitnet-mkd") for s in (student, TrailingChannels(ChannelsLast())))
    expected.strategy.load_state_dict(made.strategy.state_dict())
    out, other = made(DATA.images, DATA.target), expected(DATA.images, DATA.target)
    assert_near(out.logits, 2 * other.logits)
    assert torch.equal(out.feature, other.feature) and out.feature > 0
    assert_near(made.student(DATA.images), 2 * expected.student(DATA.images))


class HasAModel(SmallNet):
    """Not a wrapper of this package, though it has a module of that name."""

    def __init__(self) -> None:
        super().__init__()
        self.num_features = 0
        self.model = nn.Identity()
        self.model.reason = "it is an identity"


def test_only_this_packages_wrappers_are_looked_into() -> None:
    with pytest.raises(ValueError, match=r"teacher 0 \(HasAModel\) has none: num_features of HasAModel is 0"):
        Distiller(SmallNet(), [HasAModel()], "ca-mkd")
    assert inner_model(TrailingChannels(TrailingChannels(HasAModel()))).num_features == 0


class ListOfMaps(SmallNet):
    """As timm's CrossViT."""

    def forward_features(self, x: Tensor) -> Any:
        return [super().forward_features(x)]

    def forward_head(self, features: Any) -> Tensor:
        return super().forward_head(features[0])


def test_lists_of_maps_serve_strategies_that_read_logits() -> None:
    one, other = Distiller(ListOfMaps(), [ListOfMaps(6)], "aver"), Distiller(SmallNet(), [SmallNet(6)], "aver")
    assert torch.equal(one(DATA.images, DATA.target).loss, other(DATA.images, DATA.target).loss)
    last = ListOfMaps()
    last.output_fmt = "NHWC"
    for student, teacher, who in (
        (ListOfMaps(), SmallNet(), "the student"),
        (SmallNet(), ListOfMaps(), "teacher 0"),
        (SmallNet(), last, "teacher 0"),
    ):
        with pytest.raises(ValueError, match=f"needs feature maps .*, but that of {who} is a list"):
            Distiller(student, [teacher])(DATA.images, DATA.target)


# --- emptied modules -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("where", ["student", "all"])
def test_a_student_on_meta_needs_its_own_weights_only(name: str, where: str) -> None:
    weights = SmallNet().state_dict()
    with torch.device("meta"):
        student = SmallNet()
    torch.manual_seed(5)
    made = Distiller(student, teachers(), name)
    before = {key: value.clone() for key, value in made.strategy.state_dict().items()}
    if where == "all":
        made.strategy.to("meta")
    torch.manual_seed(5)
    made.to_empty(device="cpu")
    made.student.load_state_dict(weights)
    assert all(torch.equal(value, before[key]) for key, value in made.strategy.state_dict().items())
    torch.manual_seed(5)
    twin = Distiller(SmallNet(), teachers(), name)
    assert torch.equal(made(DATA.images, DATA.target).loss, twin(DATA.images, DATA.target).loss)


def test_a_strategy_that_cannot_be_initialised_is_named() -> None:
    class Learned(Strategy):
        name, label, color = "learned", "Learned", "#000000"

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.scale = nn.Parameter(torch.ones(1))

    register(Learned)
    try:
        made = Distiller(SmallNet(), teachers(), "learned")
        assert made.to_empty(device="cpu").strategy.scale == 1
        made.to("meta")
        with pytest.raises(ValueError, match="tensors of learned on meta: Learned has no reset_parameters"):
            made.to_empty(device="cpu")
    finally:
        unregister("learned")


def test_create_takes_none_for_a_default() -> None:
    strategy = create("aver", Distiller(SmallNet(), teachers(), "aver").teachers, 8, alpha=None, temperature=None)
    assert (strategy.formula.temperature, strategy.formula.soft_weight) == (4.0, 1.0)
