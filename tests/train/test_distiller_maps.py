"""Feature maps of models of others: named modules, what follows them, dtypes and outputs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from camkd_fast import Distiller
from tests.support.tolerance import assert_near
from tests.support.training import CLASSES, SmallNet, batch

transformers = pytest.importorskip("transformers")
ImageClassifierOutput = transformers.modeling_outputs.ImageClassifierOutput

pytestmark = pytest.mark.usefixtures("one_thread")
DATA = batch(33)


class Plain(nn.Module):
    """Without the protocol; what follows `body` may change its output in place."""

    def __init__(self, inplace: bool, seed: int, output: Any = None) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8))
            self.act, self.fc = nn.SiLU(inplace=inplace), nn.Linear(8, CLASSES)
        self.inplace, self.output = inplace, output

    def forward(self, x: Tensor) -> Any:
        x = nn.functional.hardswish(self.act(self.body(x)), inplace=self.inplace)
        logits = self.fc(x.mean((2, 3)))
        return logits if self.output is None else self.output(logits=logits)


LAYERS: dict[str, Any] = {"student_layer": "body", "teacher_layers": ["body"], "example": DATA.images[:1]}


@pytest.mark.parametrize("name", ["fitnet-mkd", "ca-mkd"])
def test_maps_are_outputs_of_their_modules_although_the_next_works_in_place(name: str) -> None:
    found = []
    for inplace in (False, True):
        student = Plain(inplace, 0)
        made = Distiller(student, [Plain(inplace, 1)], name, **LAYERS)
        with torch.no_grad():
            for i, parameter in enumerate(made.strategy.parameters()):
                parameter.fill_(0.1 + 0.01 * i)
        out = made.eval()(DATA.images, DATA.target)
        out.loss.backward()
        found.append((out.loss, out.feature, torch.cat([p.grad.flatten() for p in student.parameters()])))
    for one, two in zip(*found, strict=True):
        assert_near(one, two)


def test_a_head_that_works_in_place_is_refused_where_it_is_not_ours() -> None:
    class InPlace(SmallNet):
        def forward_head(self, features: Tensor) -> Tensor:
            return super().forward_head(features.relu_())

    made = Distiller(SmallNet(), [InPlace(6)], "ca-mkd")
    with pytest.raises(ValueError, match="the head of InPlace changes the feature map in place"):
        made(DATA.images, DATA.target)


@pytest.mark.parametrize("output", [SimpleNamespace, ImageClassifierOutput])
def test_teachers_of_any_dtype_and_output_are_split_and_left_alone(output: Any) -> None:
    teacher = Plain(False, 1, output)
    made = Distiller(Plain(False, 0).bfloat16(), [teacher], "ca-mkd", **LAYERS)
    assert teacher.training and teacher.body.training and made.teachers.num_features == [8]
    assert_near(made.teachers.outputs(DATA.images)[0].logits, teacher.eval()(DATA.images).logits.detach())


def test_tokens_are_no_maps() -> None:
    class Tokens(SmallNet):
        def forward_features(self, x: Tensor) -> Tensor:
            return super().forward_features(x).flatten(2).transpose(1, 2)

        def forward_head(self, features: Tensor) -> Tensor:
            return self.fc(features.mean(1))

    with pytest.raises(ValueError, match=r"ca-mkd needs feature maps \(N, D, h, w\), but that of teacher 0 has shape"):
        Distiller(SmallNet(), [Tokens()], "ca-mkd")(DATA.images, DATA.target)
    Distiller(SmallNet(), [Tokens()], "aver")(DATA.images, DATA.target)
