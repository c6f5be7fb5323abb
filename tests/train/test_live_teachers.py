"""Live teachers: frozen, in their own precision, identified by hash."""

from __future__ import annotations

import pytest
import torch

from camkd_fast.data.batch import Batch
from camkd_fast.train.teachers.live import LiveTeachers
from tests.support.training import CLASSES, SmallNet

pytestmark = pytest.mark.usefixtures("one_thread")


def test_live_teachers_share_the_batch_and_stay_out_of_the_graph() -> None:
    model = SmallNet(4)
    model.train()
    teachers = LiveTeachers([model], num_classes=CLASSES)
    images = torch.randn(3, 3, 8, 8)
    (prediction,) = teachers(Batch(images, torch.zeros(3), torch.zeros(3), 0))
    assert torch.equal(prediction.logits, model(images).detach())
    assert not prediction.logits.requires_grad and not prediction.features.requires_grad
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_teachers_run_in_the_precision_they_were_given() -> None:
    model = SmallNet(4)
    batch = Batch(torch.randn(3, 3, 8, 8), torch.zeros(3), torch.zeros(3), 0)
    own, half = LiveTeachers([model], CLASSES), LiveTeachers([model], CLASSES, autocast=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert own(batch)[0].logits.dtype == torch.float32
    assert half(batch)[0].logits.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_images_take_the_dtype_of_each_teacher(dtype: torch.dtype) -> None:
    batch = Batch(torch.randn(3, 3, 8, 8), torch.zeros(3), torch.zeros(3), 0)
    outputs = LiveTeachers([SmallNet(4).to(dtype), SmallNet(4)], CLASSES)(batch)
    assert [p.logits.dtype for p in outputs] == [p.features.dtype for p in outputs] == [dtype, torch.float32]
    assert (outputs[0].logits.double() - outputs[1].logits.double()).norm() < 0.05 * outputs[1].logits.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_heads_keep_their_own_precision_under_autocast(dtype: torch.dtype) -> None:
    (head,) = LiveTeachers([SmallNet(4)], CLASSES).heads
    features = torch.randn(3, 4, 4, 4)
    with torch.autocast("cpu", dtype=dtype):
        under = head(features)
    assert under.dtype == torch.float32 and torch.equal(under, head(features))


def test_hashes_depend_on_weights_layers_and_precision() -> None:
    model = SmallNet(4)
    (first,) = LiveTeachers([model], CLASSES).hashes
    assert LiveTeachers([model], CLASSES).hashes == [first] and len(first.partition(".")[0]) == 64
    strided = SmallNet(4)
    strided.load_state_dict(model.state_dict())
    strided.conv2.stride = (1, 1)
    changed = SmallNet(4)
    changed.load_state_dict(model.state_dict())
    with torch.no_grad():
        changed.fc.bias[0] += 1e-6
    half = SmallNet(4)
    half.load_state_dict(model.state_dict())
    others = LiveTeachers([strided, changed, half.bfloat16()], CLASSES).hashes
    assert len({first, *others}) == 4
