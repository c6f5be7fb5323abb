"""How a `Distiller` calls models: their hooks, forwards and compiled forms count, and nothing stays on them."""

from __future__ import annotations

import copy
import functools
import pickle
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from camkd_fast import Distiller, models
from camkd_fast.models.preprocessing import Preprocessing
from camkd_fast.models.protocol import Source
from tests.support.torch_version import needs_compiled_student, needs_recording
from tests.support.training import CLASSES, SmallNet, batch, gradients, relative

pytestmark = pytest.mark.usefixtures("one_thread")
DATA = batch(33)


def normalised(x: Tensor) -> Tensor:
    return (x - 0.5) / 0.25


class Normalising(type(models.create("resnet8", CLASSES))):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(normalised(x))


class FeaturesOfTwo(Normalising):
    """The mean over an image and its mirror image."""

    def forward(self, x: Tensor) -> Tensor:
        return (super().forward(x) + super().forward(x.flip(-1))) / 2


class OwnLogits(SmallNet):
    """It does not use its own forward_features."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv1(normalised(x))).mean((2, 3)))


def subclass(seed: int, kind: Callable[..., nn.Module] = Normalising) -> nn.Module:
    torch.manual_seed(seed)
    model = models.create("resnet8", CLASSES)
    model.__class__ = kind
    return model


def zoo(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return models.create("resnet8", CLASSES)


def with_pre_hook(seed: int) -> nn.Module:
    model = zoo(seed)
    model.register_forward_pre_hook(lambda module, inputs: (normalised(inputs[0]),))
    return model


def with_method(seed: int) -> nn.Module:
    model = zoo(seed)
    model.forward = types.MethodType(lambda self, x: type(self).forward(self, normalised(x)), model)
    return model


def with_hook(seed: int) -> nn.Module:
    model = zoo(seed)
    model.register_forward_hook(lambda module, inputs, output: 2 * output)
    return model


def compiled(seed: int) -> nn.Module:
    return torch.compile(with_pre_hook(seed), backend="eager")  # type: ignore[return-value]


def compiled_in_place(seed: int) -> nn.Module:
    model = with_pre_hook(seed)
    model.compile(backend="eager")
    return model


NORMALISE = [subclass, with_pre_hook, with_method, compiled, compiled_in_place]
ALL = [*NORMALISE, with_hook, lambda seed: subclass(seed, FeaturesOfTwo), lambda seed: OwnLogits(seed=seed)]
LABELS = [getattr(make, "__name__", "").replace("<lambda>", "other") for make in ALL]


@pytest.mark.parametrize("make", ALL, ids=LABELS)
def test_logits_are_those_of_a_call(make: Callable[[int], nn.Module]) -> None:
    torch._dynamo.reset()
    student, teacher = make(0), make(1)
    made = Distiller(student, [teacher], "aver").eval()
    expected = teacher.eval()(DATA.images)
    assert relative(made.teachers.outputs(DATA.images)[0].logits, expected) < 1e-5
    assert torch.equal(made(DATA.images, DATA.target).logits, student.eval()(DATA.images))


@pytest.mark.parametrize("make", NORMALISE)
@pytest.mark.parametrize("name", ["fitnet-mkd", "ca-mkd"])
def test_feature_maps_are_those_of_a_call(make: Callable[[int], nn.Module], name: str) -> None:
    """As with models of the package on images that were normalised before."""
    torch._dynamo.reset()
    torch.manual_seed(2)
    made = Distiller(make(0), [make(1)], name)
    torch.manual_seed(2)
    twin = Distiller(zoo(0), [zoo(1)], name)
    twin.load_state_dict({key.replace("_orig_mod.", ""): value for key, value in made.state_dict().items()})
    found, expected = made(DATA.images, DATA.target), twin(normalised(DATA.images), DATA.target)
    found.loss.backward()
    expected.loss.backward()
    assert found.feature > 0 and found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    assert relative(gradients(made), gradients(twin)) < 1e-5


def test_hooks_count_behind_other_images_and_classes() -> None:
    names, same = [f"c{i}" for i in range(CLASSES)], Preprocessing((0.5,) * 3, (0.25,) * 3, (8, 8))
    teacher = with_pre_hook(1)
    source = Source(teacher, (0.4,) * 3, (0.2,) * 3, (8, 8), tuple(reversed(names)))
    made = Distiller(zoo(0), [source], preprocessing=same, class_names=names)
    prepared = (DATA.images * 0.25 + 0.5 - 0.4) / 0.2
    assert relative(made.teachers.outputs(DATA.images)[0].logits, teacher.eval()(prepared).flip(1)) < 1e-5
    assert made(DATA.images, DATA.target).feature > 0


@pytest.mark.parametrize("make", [subclass, with_pre_hook])
def test_compiled_in_one_graph(make: Callable[[int], nn.Module]) -> None:
    torch._dynamo.reset()
    torch.manual_seed(2)
    made = Distiller(make(0), [make(1)]).eval()
    expected = made(DATA.images, DATA.target).loss
    found = torch.compile(made, backend="aot_eager", fullgraph=True)(DATA.images, DATA.target).loss
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


@needs_compiled_student
def test_a_compiled_student_is_compiled_once() -> None:
    torch._dynamo.reset()
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., Any]:
        graphs.append(len(graphs))
        return graph.forward

    for student, layer in ((zoo(0), None), (Bare(), "stage")):
        del graphs[:]
        options: dict[str, Any] = {} if layer is None else {"student_layer": layer, "example": DATA.images[:1]}
        made = Distiller(student, [zoo(1)], **options)
        student.compile(backend=backend)
        student(DATA.images)  # it has a graph before
        for _ in range(3):
            made(DATA.images, DATA.target).loss.backward()
        assert len(graphs) == 2


def test_a_head_that_does_not_make_the_logits_is_refused_where_it_is_needed() -> None:
    with pytest.raises(ValueError, match="the logits of teacher 0 are not forward_head of its feature map"):
        Distiller(zoo(0), [with_hook(1)])(DATA.images, DATA.target)
    assert Distiller(zoo(0), [with_hook(1)], "fitnet-mkd")(DATA.images, DATA.target).feature > 0


@pytest.mark.parametrize("make", ALL[-2:])
def test_a_map_that_is_not_found_in_a_call_is_refused_where_it_is_needed(make: Callable[[int], nn.Module]) -> None:
    message = "needs feature maps, but {} gave none: its forward does not call its forward_features once"
    with pytest.raises(ValueError, match=message.format("the student")):
        Distiller(make(0), [zoo(1)])(DATA.images, DATA.target)
    with pytest.raises(ValueError, match=message.format("teacher 0")):
        Distiller(zoo(0), [make(1)], "fitnet-mkd")(DATA.images, DATA.target)


def test_a_forward_that_would_call_the_original_is_refused() -> None:
    def closure(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: forward(2 * x)

    whole, part, bound = zoo(1), zoo(1), zoo(1)
    bound.forward = functools.partial(lambda forward, x: forward(2 * x), bound.forward)
    whole.forward = lambda x, forward=whole.forward: forward(2 * x)
    part.fc.forward = closure(part.fc.forward)
    for teacher, where in ((whole, "ResNet.forward"), (part, "fc.forward of ResNet"), (bound, "ResNet.forward")):
        with pytest.raises(TypeError, match=f"{where} was replaced by .* would call the original"):
            Distiller(zoo(0), [teacher], "aver")


def test_a_forward_may_refer_to_what_is_not_there_yet() -> None:
    def later() -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            return factor * torch.zeros(len(x), CLASSES)

        teacher.forward = forward
        assert Distiller(zoo(0), [teacher], "aver") is not None
        factor = 2.0
        return forward

    teacher = zoo(1)
    later()


# --- named modules ---------------------------------------------------------------------------------------------------


class Bare(nn.Module):
    """Without the protocol; `after` is called on the output of `stage`."""

    def __init__(self, after: Callable[[Bare, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.stem, self.stage = nn.Conv2d(3, 6, 3), nn.Sequential(nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1))
            self.fc = nn.Linear(8, CLASSES)
        self.drop, self.drop_in_place = nn.Dropout2d(0.5), nn.Dropout2d(0.5, inplace=True)
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage(self.stem(x))
        x = x if self.after is None else self.after(self, x)
        return self.fc(x.mean((2, 3)))


OBSERVED: dict[str, Any] = {"student_layer": "stage", "example": DATA.images[:1]}


def made_of(student: nn.Module, seed: int = 3, name: str = "fitnet-mkd") -> Distiller:
    torch.manual_seed(seed)
    return Distiller(student, [zoo(1)], name, **OBSERVED)


IN_PLACE = {
    "dropout module": (lambda net, x: net.drop(x), lambda net, x: net.drop_in_place(x)),
    "dropout function": (
        lambda net, x: F.dropout(x, 0.5, net.training),
        lambda net, x: F.dropout(x, 0.5, net.training, inplace=True),
    ),
    "noise": (lambda net, x: x + 1 if net.training else x, lambda net, x: x.add_(1) if net.training else x),
    "always": (lambda net, x: x.relu(), lambda net, x: x.relu_()),
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", IN_PLACE)
def test_a_map_is_the_output_of_its_module_whatever_changes_it_later(case: str, mode: str) -> None:
    found = []
    for after in IN_PLACE[case]:
        made = made_of(Bare(after)).train(mode == "train")
        torch.manual_seed(4)
        out = made(DATA.images, DATA.target)
        out.loss.backward()
        found.append((out.loss, out.feature, gradients(made)))
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


class Checkpointed(Bare):
    """The part from `stage` to the mean is recomputed in backward."""

    reentrant = True

    def tail(self, x: Tensor) -> Tensor:
        return self.stage(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(checkpoint(self.tail, self.stem(x), use_reentrant=self.reentrant))


class WithoutGradients(Bare):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.stage(self.stem(x))
        return self.fc(x.mean((2, 3)))


class CheckpointedFeatures(SmallNet):
    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        return self.forward_head(checkpoint(self.forward_features, x, use_reentrant=True))


@pytest.mark.parametrize("kind", [Checkpointed, WithoutGradients, CheckpointedFeatures])
def test_a_map_without_gradients_is_refused(kind: type[nn.Module]) -> None:
    student = kind()
    made = made_of(student) if isinstance(student, Bare) else Distiller(student, [zoo(1)])
    with pytest.raises(ValueError, match=rf"{kind.__name__}\.\w+ runs without gradients.*use_reentrant=False"):
        made(DATA.images.clone(), DATA.target)
    with torch.no_grad():
        assert made(DATA.images, DATA.target).feature > 0


@pytest.mark.parametrize("kind", [Checkpointed, WithoutGradients, CheckpointedFeatures])
def test_a_map_without_gradients_is_nothing_to_strategies_without_maps(kind: type[nn.Module]) -> None:
    student = kind()
    layer: dict[str, Any] = {"student_layer": "stage", "example": DATA.images[:1]} if isinstance(student, Bare) else {}
    made = Distiller(student, [zoo(1)], "aver", **layer)
    made(DATA.images.clone(), DATA.target).loss.backward()
    assert student.fc.weight.grad.any()


@pytest.mark.parametrize("way", ["fake", "make_fx", "vmap"])
def test_the_first_call_may_be_without_values(way: str) -> None:
    """The logits of teachers are compared with those of their heads in the first ordinary call."""
    made = Distiller(SmallNet(), [zoo(1)]).eval()
    if way == "vmap":
        torch.func.vmap(lambda x: made(x, DATA.target).loss)(torch.stack([DATA.images] * 2))
    elif way == "make_fx":
        make_fx(lambda x: made(x, DATA.target).loss)(DATA.images)
    else:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            made(mode.from_tensor(DATA.images), mode.from_tensor(DATA.target))
    assert made(DATA.images, DATA.target).loss.isfinite()


def test_heads_that_are_not_applied_are_not_compared() -> None:
    teacher = zoo(1)
    teacher.register_forward_hook(lambda module, inputs, output: 2 * output)
    made = Distiller(SmallNet(), [teacher], uniform="features")
    assert made(DATA.images, DATA.target).feature > 0
    with pytest.raises(ValueError, match="the logits of teacher 0 are not forward_head of its feature map"):
        Distiller(SmallNet(), [teacher])(DATA.images, DATA.target)


def test_checkpoints_that_keep_gradients_and_frozen_trunks_are_accepted() -> None:
    student, twin = Checkpointed(), Bare()
    student.reentrant = False
    one, two = made_of(student), made_of(twin)
    for made in (one, two):
        made(DATA.images, DATA.target).loss.backward()
    assert relative(gradients(one), gradients(two)) < 1e-6
    twin.requires_grad_(False).fc.requires_grad_(True)
    two(DATA.images, DATA.target).loss.backward()


@needs_recording
@pytest.mark.parametrize("after", [lambda made: made, copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_nothing_stays_on_a_student(after: Callable[[Distiller], Distiller]) -> None:
    made = after(made_of(Bare()))
    made(DATA.images, DATA.target)
    for module in made.student.modules():
        assert not module._forward_hooks and "forward" not in vars(module)
    assert "camkd_fast" not in str(pickle.dumps(made.student))
    script = torch.jit.script(made.student.stage.eval())
    assert torch.equal(script(torch.ones(1, 6, 8, 8)), made.student.stage(torch.ones(1, 6, 8, 8)))


def test_nothing_stays_on_a_student_after_an_error() -> None:
    def fails(net: Bare, x: Tensor) -> Tensor:
        if len(x) > 1:
            raise RuntimeError("of the user")
        return x

    made = made_of(Bare(fails))
    with pytest.raises(RuntimeError, match="of the user"):
        made(DATA.images, DATA.target)
    assert "forward" not in vars(made.student.stage)
    assert made(DATA.images[:1], DATA.target[:1]).feature > 0


@needs_recording
def test_hooks_of_a_named_module_change_its_output() -> None:
    student = Bare()
    made, twin = made_of(student), made_of(Bare(), seed=3)
    student.stage.register_forward_hook(lambda module, inputs, output: output + 1)
    with torch.no_grad():
        twin.student.stage[-1].bias += 1
    assert torch.allclose(made(DATA.images, DATA.target).loss, twin(DATA.images, DATA.target).loss)
    assert len(student.stage._forward_hooks) == 1
    torch._dynamo.reset()
    with pytest.raises(Exception, match="Sequential has forward hooks"):
        torch.compile(made, backend="eager", fullgraph=True)(DATA.images, DATA.target)


@needs_recording
def test_a_module_that_is_replaced_later_is_the_one_that_is_read() -> None:
    made = made_of(Bare())
    made.student.stage = nn.Sequential(nn.Conv2d(6, 8, 5))
    assert made(DATA.images, DATA.target).feature > 0
