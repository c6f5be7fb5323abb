"""Targets, vocabularies, biases and errors of the linear loss, and the module."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from camkd_fast import CAMKDLinearLoss, camkd_linear_loss, confidence_weights
from camkd_fast.losses import projection
from tests.support.linear_cases import (
    assert_rule,
    make_linear_case,
    run,
)
from tests.support.tolerance import assert_near


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("weighting", ["uniform", "entropy", torch.rand(2)], ids=["uniform", "entropy", "given"])
def test_a_mask_in_the_place_of_labels(weighting: Any, reduction: str) -> None:
    case = make_linear_case(40, 30, reduction=reduction, weighting=weighting)
    case = case.with_(target=torch.rand(40) < 0.6)
    ours = assert_rule(case, torch.randn(40) if reduction == "none" else None)
    assert ours.hard is None and ours.teacher_ce is None


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_teacher_may_have_a_bias(reduction: str) -> None:
    """To torch a list of tensors only is another thing than one with None."""
    case = make_linear_case(40, 30, reduction=reduction)
    assert case.teacher_biases is not None
    case = case.with_(teacher_biases=(case.teacher_biases[0], torch.randn(30)))
    assert_rule(case, torch.randn(40) if reduction == "none" else None)


def test_padded_vocabularies_are_cut() -> None:
    case = make_linear_case(40, 30, biased=False, hard_weight=1.0)
    wider = tuple(torch.cat([w, torch.full((5, w.shape[1]), math.nan)]) for w in case.teacher_heads)
    assert torch.equal(run(case.with_(teacher_heads=wider)).grad_head, run(case).grad_head)
    padded = case.with_(head=torch.cat([case.head, torch.full((3, 8), math.nan)]), teacher_heads=wider, vocab_size=30)
    ours = run(padded)
    assert torch.equal(ours.grad_head[:30], run(case).grad_head) and not ours.grad_head[30:].any()
    assert torch.equal(ours.loss, run(case).loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_biases_are_cut_with_their_heads(dtype: torch.dtype) -> None:
    case = make_linear_case(40, 30, hard_weight=1.0).to(dtype)
    assert case.bias is not None
    head, bias = (torch.cat([x, torch.full((3, *x.shape[1:]), math.nan, dtype=dtype)]) for x in (case.head, case.bias))
    ours, expected = run(case.with_(head=head, bias=bias, vocab_size=30)), run(case)
    assert torch.equal(ours.loss, expected.loss) and torch.equal(ours.grad_bias[:30], expected.grad_bias)


def test_the_bias_of_every_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that is converted tile by tile."""
    case = make_linear_case(40, 30).to(torch.float16)
    expected = run(case)
    monkeypatch.setattr(projection, "TILE_BYTES", 0)
    monkeypatch.setattr(projection, "TILE_ROWS", 8)
    assert_near(run(case).loss, expected.loss, 1e-5)


def test_weights_are_those_of_confidence_weights() -> None:
    case = make_linear_case(40, 30, biased=False)
    logits = [h @ w.t() for h, w in zip(case.teacher_hidden, case.teacher_heads, strict=True)]
    assert_near(run(case).weights, confidence_weights(logits, case.target)[0])


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"teacher_heads": (torch.zeros(30, 12),)}, ValueError, "teacher_heads holds 1 entries, but teacher_hidden"),
        ({"teacher_hidden": torch.zeros(2, 40, 12)}, TypeError, "teacher_hidden must be a sequence"),
        ({"head": torch.zeros(30, 9)}, ValueError, r"shape \(40, 8\), but its head \(C, H\) has shape \(30, 9\)"),
        ({"head": torch.zeros(30, 8, dtype=torch.bfloat16)}, TypeError, "head is torch.bfloat16, but its hidden"),
        ({"bias": torch.zeros(29)}, ValueError, r"bias has shape \(29,\), but its head has 30 classes"),
        ({"head": torch.zeros(31, 8), "bias": None}, ValueError, r"teacher\[0\]'s head has 30 classes, but the"),
        ({"vocab_size": 31}, ValueError, "student's head has 30 classes, but the vocabulary has 31"),
        ({"vocab_size": 0}, ValueError, "vocab_size must be at least 1, got 0"),
        ({"vocab_size": 2.0}, TypeError, "vocab_size must be an int, got float"),
        ({"target": torch.zeros(40)}, TypeError, "target must be int64 labels or a bool mask, got torch.float32"),
        ({"target": torch.zeros(39, dtype=torch.int64)}, ValueError, r"target has shape \(39,\)"),
        ({"target": torch.full((40,), 30)}, ValueError, "target holds label 30, but there are 30 classes"),
        ({"target": torch.full((40,), 30), "reduction": "sum"}, ValueError, "target holds label 30, but there are"),
        ({"target": torch.ones(40, dtype=torch.bool)}, ValueError, "'confidence' needs labels, but target"),
        ({"target": torch.ones(40, dtype=torch.bool), "weighting": "uniform", "hard_weight": 0.5}, ValueError,
         "hard_weight 0.5 needs labels"),
        ({"weighting": torch.rand(3)}, ValueError, r"weighting has shape \(3,\), but 2 teachers expect \(2,\)"),
        ({"weighting": torch.rand(2, requires_grad=True)}, ValueError, "weighting requires grad"),
        ({"reduction": "sum", "num_items": 3}, ValueError, "num_items is the divisor of reduction='mean'"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows must be at least 1, got 0"),
        ({"num_valid": -1}, ValueError, "num_valid must be at least 0, got -1"),
        ({"max_chunk_bytes": 0.0}, ValueError, "max_chunk_bytes must be finite and > 0, got 0.0"),
        ({"logits_dtype": torch.float16}, ValueError, "logits_dtype must be torch.float32 or torch.bfloat16"),
        ({"shift": True, "hidden": torch.zeros(8)}, ValueError, r"shift needs hidden states \(..., S, H\), got"),
        ({"backend": "tpu"}, ValueError, "got 'tpu'"),
        ({"divergence": "jsd"}, ValueError, "needs its parameter"),
        ({"num_valid": 39}, ValueError, "num_valid is 39, but 40 rows count"),
        ({"shift": "no"}, TypeError, "shift must be True or False, got str"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_errors_name_both_values(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        run(make_linear_case(40, 30).with_(**changes))


def test_teachers_must_be_frozen_and_dense() -> None:
    case = make_linear_case(40, 30)
    with pytest.raises(ValueError, match=r"teacher\[1\]'s head requires grad"):
        run(case.with_(teacher_heads=(case.teacher_heads[0], case.teacher_heads[1].clone().requires_grad_())))
    with pytest.raises(TypeError, match=r"teacher\[0\]'s hidden must be a dense tensor, got a tensor of layout sparse"):
        run(case.with_(teacher_hidden=(case.teacher_hidden[0].to_sparse(), case.teacher_hidden[1])))
    quantised = TwoTensor(case.teacher_heads[0], case.teacher_heads[0])  # as torchao's weights
    with pytest.raises(TypeError, match=r"head must be a dense tensor, got a TwoTensor: .* .dequantize\(\)"):
        run(case.with_(teacher_heads=(quantised, case.teacher_heads[1])))


def test_the_module() -> None:
    case = make_linear_case(40, 30, ignored=0.2)
    settings = {"temperature": 2.0, "hard_weight": 0.5, "divergence": ("jsd", 0.5), "chunk_rows": 8}
    module = CAMKDLinearLoss(weighting="uniform", **settings)
    tensors = case.hidden, case.head, list(case.teacher_hidden), list(case.teacher_heads), case.target
    expected = camkd_linear_loss(*tensors, weighting="uniform", student_bias=case.bias, **settings)
    assert torch.equal(module(*tensors, student_bias=case.bias).loss, expected.loss)
    weights = torch.rand(2, 40)
    expected = camkd_linear_loss(*tensors, weighting=weights, **settings)
    assert torch.equal(module(*tensors, weighting=weights).loss, expected.loss)
    assert "divergence=('jsd', 0.5)" in repr(module) and not list(module.parameters())
    module.divergence, module.weighting = "reverse_kl", "confidence"
    changed = camkd_linear_loss(*tensors, **{**settings, "divergence": "reverse_kl"})
    assert torch.equal(module(*tensors).loss, changed.loss)
    with pytest.raises(ValueError, match="got 'num_valid'"):
        CAMKDLinearLoss(num_valid=3)
    for wrong, words in (
        ({"temperature": 0}, "temperature must be finite and > 0, got 0"),
        ({"reduction": "max"}, "reduction must be one of .*, got 'max'"),
        ({"chunk_rows": 0}, "chunk_rows must be at least 1, got 0"),
        ({"backend": ["cpu"]}, r"backend must be one of .*, got \['cpu'\]"),
        ({"ignore_index": 2**70}, "ignore_index must be an int64, got 1180591620717411303424"),
        ({"weighting": weights}, "weighting must be a name, got Tensor: a tensor is given in the call"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            CAMKDLinearLoss(**wrong)
