"""The linear loss on a GPU: large vocabularies, gradients in float64, tied heads, and models of other libraries.

Tests of transformers, peft and TRL run where they are installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from camkd_fast import camkd_linear_loss
from tests.gpu.test_gpu_linear import back, on
from tests.support.gpu import Place
from tests.support.linear_cases import MAPS, LinearResult, evaluate, make_linear_case, run, unfused
from tests.support.tolerance import assert_accurate, assert_near

F32, BF16 = torch.float32, torch.bfloat16
DIVERGENCES: list[Any] = ["forward_kl", "reverse_kl", ("jsd", 0.3), ("skew", 0.2)]
pytestmark = pytest.mark.usefixtures("products_in_float32")


def need(*packages: str) -> None:
    """Skip the test where one is missing; else transformers is imported, as it must be in this repository."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    importlib.import_module("tests.support.language_models")


@pytest.mark.parametrize("C", [128_256, 151_936, 262_144])
def test_vocabularies_of_language_models(place: Place, C: int) -> None:
    case = make_linear_case(21, C, (65, 3, 130), hard_weight=1.0)
    R, N = unfused(case, torch.float64), unfused(case, F32)
    ours = back(run(on(case, place.device), chunk_rows=10, backend=place.backend))
    for name, a, r, n in zip(LinearResult._fields, ours, R, N, strict=True):
        floor = 8 * torch.finfo(F32).eps * (1 + float(r.abs().max()))
        assert_accurate(a, r, n, name, 0.0 if name.startswith("grad") else floor)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", ["constants", "maps", "all ignored", "one row"])
def test_gradcheck(device: torch.device, kind: str, reduction: str, divergence: Any) -> None:
    options: dict[str, Any] = {"divergence": divergence, "reduction": reduction, "hard_weight": 0.5, "temperature": 1.5}
    options |= {**MAPS, "z_loss_weight": 0.3} if kind == "maps" else {}
    case = make_linear_case(5, 6, (3, 4, 2), torch.float64, ignored=1.0 if kind == "all ignored" else 0.0, **options)
    if kind == "one row":
        case = case.with_(target=case.target.where(torch.arange(5) == 2, -100))
    case = on(case, device)
    parameters = [x.clone().requires_grad_() for x in (case.hidden, case.head, case.bias)]
    assert torch.autograd.gradcheck(lambda *of: evaluate(case, *of, chunk_rows=2).loss, parameters)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_row_that_counts(place: Place, reduction: str) -> None:
    case = make_linear_case(12, 30, ignored=1.0, reduction=reduction, hard_weight=1.0, z_loss_weight=1.0)
    case = on(case.with_(hidden=torch.full_like(case.hidden, math.nan)), place.device)
    for keywords in ({}, {"num_valid": 0}, {"num_valid": 12}):
        grad_output = torch.ones(12, device=place.device) if reduction == "none" else None
        ours = run(case, grad_output, backend=place.backend, **keywords)
        assert not any(x.any() for x in ours) and ours.grad_head.shape == case.head.shape


def test_a_student_near_its_teacher_in_bfloat16(place: Place) -> None:
    """Gradients of nearly equal distributions are differences of nearly equal numbers."""
    case = make_linear_case(64, 8000, (64, 64), BF16, biased=False)
    noise = 0.02 * torch.randn(case.head.shape, generator=torch.Generator().manual_seed(0))
    case = case.with_(
        teacher_hidden=(case.hidden,), teacher_heads=((case.head.float() + noise).bfloat16(),), weighting="uniform"
    )
    R = unfused(case, torch.float64)
    ours = back(run(on(case, place.device), logits_dtype=F32, backend=place.backend))
    for name in ("grad_hidden", "grad_head"):
        error = (getattr(ours, name).double() - getattr(R, name)).norm() / getattr(R, name).norm()
        assert error < 0.003, (name, error)


def test_a_tied_head_adds_up_both_gradients(place: Place) -> None:
    case = on(make_linear_case(40, 30, biased=False, hard_weight=1.0, backend=place.backend), place.device)
    tokens = torch.randint(30, (40,), generator=torch.Generator().manual_seed(0)).to(place.device)
    embedding = case.head.clone().requires_grad_()
    hidden = embedding[tokens]
    evaluate(case, hidden, embedding, None).loss.backward()
    apart = run(case.with_(hidden=hidden.detach()))
    expected = apart.grad_head.index_add(0, tokens, apart.grad_hidden)
    assert_near(embedding.grad, expected, 1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_it_agrees_with_trl(place: Place, beta: float, temperature: float) -> None:
    need("transformers", "trl")
    distillation = importlib.import_module("trl.trainer.distillation_trainer")
    case = on(make_linear_case(42, 70, (16, 24), biased=False, ignored=0.3), place.device)
    mask = (case.target != -100).long()
    results = []
    for fused in (False, True):
        hidden, head = (x.clone().requires_grad_() for x in (case.hidden, case.head))
        if fused:
            loss = camkd_linear_loss(
                hidden, head, case.teacher_hidden, case.teacher_heads, mask.bool(), divergence=("jsd", beta),
                temperature=temperature, scale_by_t2=False, weighting="uniform", backend=place.backend,
            ).loss  # fmt: skip
        else:
            tensors: list[Tensor] = [x.unsqueeze(0) for x in (hidden, case.teacher_hidden[0])]
            loss = distillation._chunked_divergence_loss(
                *tensors, head, case.teacher_heads[0], mask.unsqueeze(0), beta, temperature=temperature
            )[0]
        results.append([loss.detach(), *torch.autograd.grad(loss, (hidden, head))])
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert_near(ours, theirs, 1e-5)


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["q_proj"]], ids=["frozen head", "copy of the head"])
def test_lora(device: torch.device, targets: list[str]) -> None:
    need("transformers", "peft")
    import peft

    from tests.integrations.test_causal_lm import fused, unfused
    from tests.support.language_models import assert_gradients, causal_lm, gradients, teachers, token_batch

    saved = None if len(targets) == 2 else ["lm_head"]
    config = peft.LoraConfig(
        r=4, init_lora_weights=False, task_type="CAUSAL_LM", target_modules=targets, modules_to_save=saved
    )
    model = peft.get_peft_model(causal_lm(), config).to(device)
    others = [teacher.to(device) for teacher in teachers()]
    batch = {name: value.to(device) for name, value in token_batch().items()}
    results = []
    for way in (unfused, fused):
        model.zero_grad()
        loss = way(model, batch, others)
        loss.backward()
        results.append((loss.item(), gradients(model)))
    assert abs(results[1][0] - results[0][0]) <= 1e-4 * abs(results[0][0])
    assert_gradients(results[1][1], results[0][1], 1e-4)
