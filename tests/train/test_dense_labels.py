"""Dense labels: logits (..., C) in every strategy that reads logits only, with label smoothing and mixed labels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camkd_fast import Distiller, camkd_loss
from tests.support.tolerance import assert_near
from tests.support.training import batch

pytestmark = pytest.mark.usefixtures("one_thread")
DATA = batch(17)


class Dense(nn.Module):
    """Logits (N, H, W, C)."""

    def __init__(self, classes: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(3, classes, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).movedim(1, -1)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("name", ["ce", "aver", "ca-mkd-logits", "ebkd", "aekd"])
@pytest.mark.parametrize("classes", [5, 8])  # 8: as many as rows and columns
def test_dense_labels_are_rows(classes: int, name: str, smoothing: float, mixed: bool) -> None:
    """As the same pixels as a batch of rows."""
    shape = (17, 8, 8)
    target, second = torch.randint(classes, shape), torch.randint(classes, shape)
    target[0] = -100
    labels: dict[str, Tensor] = {"second_target": second, "mix": torch.rand(shape)} if mixed else {}
    given = [Dense(classes, 1), Dense(classes, 2)]
    made = Distiller(Dense(classes, 0), given, name, label_smoothing=smoothing)
    out = made(DATA.images, target, **labels)
    out.loss.backward()
    rows = out.logits.detach().reshape(-1, classes).requires_grad_()
    flat = {key: value.flatten() for key, value in labels.items()}
    logits = [model(DATA.images).detach().reshape(-1, classes) for model in given]
    if name == "ce":
        expected = torch.zeros(())
    else:
        assert made.teachers is not None
        outputs = made.teachers.outputs(DATA.images)
        weighting = made.strategy.weighting(out.logits.detach(), outputs, target)
        options = made.strategy.formula._replace(weighting=weighting, hard_weight=0.0).options()
        expected = camkd_loss(rows, logits, target.flatten(), **options, **flat).loss
        assert out.weights is not None and out.weights.shape == (2, *shape)
    shares = [(target, torch.ones(shape))] if not mixed else [(target, labels["mix"]), (second, 1 - labels["mix"])]
    kept = (target != -100).flatten()
    for label, share in shares:
        read = torch.where(kept, label.flatten(), 0)
        each = F.cross_entropy(rows, read, reduction="none", label_smoothing=smoothing)
        expected = expected + (share.flatten() * each)[kept].sum() / kept.sum()
    assert_near(out.loss, expected)
