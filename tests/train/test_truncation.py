"""Top-k truncation of logits: what is exact, and the stated error of the loss."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn

pytest.importorskip("safetensors")

from camkd_fast.train.teachers.truncation import expand, loss_error, truncate


@given(
    C=st.integers(2, 300),
    share=st.floats(0, 1),
    T=st.sampled_from([1.0, 4.0, 20.0]),
    spread=st.floats(0, 30),
    seed=st.integers(0, 2**31),
)
def test_kept_probabilities_and_the_mass_of_the_rest_are_exact(
    C: int, share: float, T: float, spread: float, seed: int
) -> None:
    k = 1 + int(share * (C - 2))
    logits = spread * torch.randn(3, 2, C, generator=torch.Generator().manual_seed(seed))
    rows = truncate(logits, k, T)
    assert rows.ids.shape == rows.values.shape == (3, 2, k) and rows.ids.dtype == torch.int16
    again = expand(rows, C)
    assert again.dtype == torch.float32 and again.shape == logits.shape
    ids = rows.ids.long()
    assert torch.equal(again.gather(-1, ids), logits.gather(-1, ids))
    true, ours = (logits.double() / T).softmax(-1), (again.double() / T).softmax(-1)
    torch.testing.assert_close(ours.gather(-1, ids), true.gather(-1, ids), rtol=1e-4, atol=0)
    rest = torch.ones(3, 2, C).scatter_(-1, ids, 0.0).bool()
    torch.testing.assert_close((ours * rest).sum(-1), (true * rest).sum(-1), rtol=1e-4, atol=0)
    shares = ours[rest].view(3, 2, C - k)
    torch.testing.assert_close(shares, shares[..., :1].expand_as(shares))


def test_all_the_mass_on_the_kept_classes_leaves_none_for_the_rest() -> None:
    logits = torch.tensor([[0.0, float("-inf"), 2.0, float("-inf")]])
    assert torch.equal(expand(truncate(logits, 2, 4.0), 4), logits)


def test_ids_beyond_int16() -> None:
    logits = torch.zeros(1, 40000)
    logits[0, 39999] = 9.0
    rows = truncate(logits, 1, 4.0)
    assert rows.ids.dtype == torch.int32 and rows.ids.item() == 39999


def test_the_stated_error_is_that_of_the_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    teachers = 4 * torch.randn(6, 3, 40, generator=generator)
    target = torch.randint(40, (6,), generator=generator)
    same = loss_error(teachers, teachers, target, 4.0)
    assert all(number == 0.0 for numbers in same.values() for number in numbers.values())
    coarse, fine = (loss_error(teachers, expand(truncate(teachers, k, 4.0), 40), target, 4.0) for k in (4, 30))
    for student in ("untrained", "half way"):
        for what in ("loss mean", "gradient mean"):
            assert 0 < fine[student][what] < coarse[student][what]

    replayed = expand(truncate(teachers, 4, 4.0), 40)
    student = torch.zeros(6, 40, requires_grad=True)
    losses, gradients = [], []
    for logits in (teachers, replayed):
        ce = nn.functional.cross_entropy(logits.reshape(-1, 40), target.repeat_interleave(3), reduction="none")
        weights = (1 - ce.view(6, 3).softmax(1)) / 2
        p, log_q = (logits / 4).softmax(2), (student / 4).log_softmax(1).unsqueeze(1)
        soft = 16 * (weights * (p * (p.log() - log_q)).sum(2)).sum(1)
        losses.append(soft + nn.functional.cross_entropy(student, target, reduction="none"))
        gradients.append(torch.autograd.grad(losses[-1].sum(), student)[0])
    assert coarse["untrained"]["loss max"] == pytest.approx(
        ((losses[1] - losses[0]).abs() / losses[0]).max().item(), rel=1e-3
    )
    assert coarse["untrained"]["gradient max"] == pytest.approx(
        ((gradients[1] - gradients[0]).norm(dim=1) / gradients[0].norm(dim=1)).max().item(), rel=1e-3
    )
