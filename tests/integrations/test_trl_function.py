"""`fused_divergence_loss` against the function of TRL that it replaces, in float32."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")

from trl.trainer.distillation_trainer import _chunked_divergence_loss

from camkd_fast.integrations.trl import divergence_of, fused_divergence_loss

pytestmark = pytest.mark.usefixtures("one_thread")
PARTS = {
    "plain heads": {},
    "biases": {"student_lm_head_bias": (70,), "teacher_lm_head_bias": (70,)},
    "scales": {"student_logit_scale": 0.3, "teacher_logit_scale": 1.7},
    "softcaps": {"student_final_logit_softcapping": 4.0, "teacher_final_logit_softcapping": 6.0},
    "items": {"num_items_in_batch": torch.tensor(37)},
    "an int": {"num_items_in_batch": 12},
    "all": {
        "student_lm_head_bias": (70,), "student_logit_scale": 0.5, "teacher_logit_scale": 2.0,
        "student_final_logit_softcapping": 5.0, "num_items_in_batch": torch.tensor(9.0),
    },
}  # fmt: skip


def evaluated(function: Any, beta: float, temperature: float, part: str, counted: float) -> tuple[Any, ...]:
    """Loss, entropies, number, and the student's gradients."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    student, teacher = normal(3, 7, 16), normal(3, 7, 24)
    heads = normal(70, 16) / 2, normal(70, 24) / 3
    mask = (torch.rand(3, 7, generator=generator) < counted).long()
    given = {name: normal(*x) if isinstance(x, tuple) else x for name, x in PARTS[part].items()}
    wanted = [student, heads[0], *([given["student_lm_head_bias"]] if "student_lm_head_bias" in given else [])]
    for tensor in wanted:
        tensor.requires_grad_()
    loss, entropy, number = function(student, teacher, *heads, mask, beta, temperature=temperature, **given)
    return loss.detach(), entropy, number, *torch.autograd.grad(0.7 * loss, wanted)


@pytest.mark.parametrize(
    ("beta", "temperature", "part"), list(itertools.product((0.0, 0.5, 1.0), (1.0, 2.0), PARTS)), ids=str
)
def test_it_agrees_with_trl(beta: float, temperature: float, part: str) -> None:
    arguments = beta, temperature, part, 0.6
    expected, found = evaluated(_chunked_divergence_loss, *arguments), evaluated(fused_divergence_loss, *arguments)
    assert expected[0] != 0 and expected[3].any()
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape and not ours.requires_grad
        assert (ours - theirs).float().norm() <= 1e-5 * theirs.float().norm()


def test_no_token_counts() -> None:
    for function in (_chunked_divergence_loss, fused_divergence_loss):
        loss, entropy, number, *found = evaluated(function, 0.5, 1.0, "biases", 0.0)
        assert loss == 0 and entropy == 0 and number == 0 and not any(gradient.any() for gradient in found)


def test_the_arguments_are_trls() -> None:
    ours, theirs = (
        inspect.signature(function).parameters for function in (fused_divergence_loss, _chunked_divergence_loss)
    )
    assert [(p.name, p.default, p.kind) for p in ours.values()] == [
        (p.name, p.default, p.kind) for p in theirs.values()
    ]


def test_divergences_of_beta() -> None:
    assert [divergence_of(beta) for beta in (0, 1, 0.25)] == ["forward_kl", "reverse_kl", ("jsd", 0.25)]
