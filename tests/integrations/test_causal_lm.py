"""Losses and gradients of models of transformers: the linear loss against the formula on all their logits."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from camkd_fast.integrations.causal_lm import (
    Teacher,
    hidden_states,
    linear_loss,
    student_loss,
    teacher_hidden,
)
from camkd_fast.integrations.output_head import OutputHead, logit_scale, output_head, softcap
from camkd_fast.integrations.wrappers import call_inside, unwrapped
from tests.support.language_models import (
    KINDS,
    VOCABULARY,
    assert_gradients,
    causal_lm,
    gradients,
    teacher_logits,
    teachers,
    token_batch,
    unfused_loss,
)

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = {"temperature": 2.0, "hard_weight": 0.5}


@pytest.fixture(scope="module")
def two() -> list[Any]:
    return teachers()


def fused(model: nn.Module, batch: dict[str, Tensor], others: list[Any], **options: Any) -> Tensor:
    hidden = [teacher_hidden(teacher, batch) for teacher in others]

    def compute(states: Tensor, head: OutputHead) -> Tensor:
        return linear_loss(states, head, hidden, batch["labels"], shift=True, **{**OPTIONS, **options}).loss

    return student_loss(model, batch, compute)


def unfused(model: nn.Module, batch: dict[str, Tensor], others: list[Any], **options: Any) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return unfused_loss(logits, teacher_logits(others, batch), batch["labels"], **{**OPTIONS, **options})


def assert_same(model: nn.Module, others: list[Any], tolerance: float = 1e-5, **options: Any) -> None:
    """Loss and the gradient of every parameter that has one."""
    batch = token_batch()
    results = []
    for way in (unfused, fused):
        model.zero_grad()
        loss = way(model, batch, others, **options)
        loss.backward()
        results.append((loss.item(), gradients(model)))
    (expected, wanted), (loss, found) = results
    assert abs(loss - expected) <= tolerance * abs(expected)
    assert_gradients(found, wanted, tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_of_every_kind_of_model(kind: str, two: list[Any]) -> None:
    assert_same(causal_lm(kind), two)


def test_teachers_with_scales_and_a_bias(two: list[Any]) -> None:
    others = [causal_lm(kind, 24, seed=k).eval() for k, kind in enumerate(("cohere", "phi", "granite"))]
    assert_same(causal_lm("gemma2"), others, divergence="reverse_kl", weighting="uniform")


def test_a_padded_student(two: list[Any]) -> None:
    """Classes that do not exist have no part and no gradient."""
    model, batch = causal_lm(classes=VOCABULARY + 9), token_batch()
    fused(model, batch, two, vocab_size=VOCABULARY).backward()
    grad = model.lm_head.weight.grad
    assert grad[:VOCABULARY].any() and not grad[VOCABULARY:].any()
    with pytest.raises(ValueError, match="67 classes, but the vocabulary has 69"):
        fused(model, batch, two)


def test_gradient_checkpointing(two: list[Any]) -> None:
    model = causal_lm()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.is_gradient_checkpointing
    assert_same(model, two)


def test_accumulated_parts_are_the_whole(two: list[Any]) -> None:
    model, batch = causal_lm(), token_batch()
    unfused(model, batch, two).backward()
    expected, items = gradients(model), (batch["labels"][:, 1:] != -100).sum()
    model.zero_grad()
    for rows in (slice(0, 1), slice(1, 4)):
        fused(model, {name: value[rows] for name, value in batch.items()}, two, num_items=items).backward()
    assert_gradients(gradients(model), expected)


def test_autocast(two: list[Any]) -> None:
    model, batch = causal_lm(width=32), token_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fused(model, batch, two)
    loss.backward()
    found = gradients(model)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32} and loss.dtype == torch.float32
    model.zero_grad()
    unfused(model, batch, two).backward()
    assert_gradients(found, gradients(model), 0.1)  # bfloat16 through two layers of weights of this spread


def test_bfloat16_models(two: list[Any]) -> None:
    """A student in float32 of teachers in bfloat16, as they are loaded."""
    others = [causal_lm("llama", 24, VOCABULARY + 7, seed=1).eval().to(torch.bfloat16)]
    assert_same(causal_lm(), others, 0.02)


# --- PEFT ------------------------------------------------------------------------------------------------------------


def adapted(**settings: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **settings)
    return peft.get_peft_model(causal_lm(), config)


def test_lora_with_a_frozen_head(two: list[Any]) -> None:
    model = adapted(target_modules=["q_proj", "down_proj"])
    assert_same(model, two)
    assert all("lora_" in name for name in gradients(model))


def test_lora_with_a_trained_copy_of_the_head(two: list[Any]) -> None:
    model = adapted(target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert_same(model, two)
    assert any("modules_to_save" in name for name in gradients(model))


def test_an_adapted_head_is_refused_and_a_merged_one_is_read() -> None:
    model, batch = adapted(target_modules=["q_proj", "lm_head"]).eval(), token_batch()
    with pytest.raises(ValueError, match=r"PEFT adapts the output head .* modules_to_save instead of target_modules"):
        teacher_hidden(model, batch)
    expected = teacher_logits([model], batch)[0]
    model.merge_adapter()
    hidden = teacher_hidden(model, batch)
    error = (hidden.head.logits(hidden.states) - expected).norm() / expected.norm()
    assert error < 1e-5


def test_virtual_tokens_are_refused() -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(causal_lm(), config)
    with pytest.raises(ValueError, match="PromptTuningConfig adds virtual tokens outside the backbone"):
        hidden_states(model, token_batch())


# --- wrappers --------------------------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """As DDP: the model is its child `module`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, *arguments: Any) -> Any:
        self.calls += 1
        return self.module(*arguments)


def test_the_forward_of_a_wrapper_runs(two: list[Any]) -> None:
    model, batch = causal_lm(), token_batch()
    seen: list[str] = []
    model.register_forward_pre_hook(lambda *_: seen.append("model"))
    model.lm_head.register_forward_hook(lambda *_: seen.append("head"))
    wrapper = Wrapper(model)
    assert unwrapped(wrapper) is model
    expected = fused(model, batch, two)
    assert fused(wrapper, batch, two).item() == expected.item()
    assert wrapper.calls == 1 and seen == ["model", "head"] * 2
    assert "forward" not in vars(model) and "forward" not in vars(model.lm_head)


def test_a_forward_of_the_instance_is_put_back() -> None:
    model = nn.Linear(2, 2)
    own: Callable[..., Any] = lambda x: x + 1  # noqa: E731
    model.forward = own  # type: ignore[method-assign]
    assert call_inside(model, model, lambda x: x * model.forward(x), 3) == 12
    assert vars(model)["forward"] is own

    def fails() -> None:
        raise OSError

    with pytest.raises(OSError):
        call_inside(model, model, fails)
    assert vars(model)["forward"] is own


def test_a_compiled_model_is_looked_into(two: list[Any]) -> None:
    model, batch = causal_lm(), token_batch()
    expected = fused(model, batch, two).item()
    assert fused(torch.compile(model), batch, two).item() == expected


def test_a_compiled_head_is_looked_into(two: list[Any]) -> None:
    model, batch = causal_lm(), token_batch()
    expected = fused(model, batch, two).item()
    model.lm_head = torch.compile(model.lm_head)
    assert fused(model, batch, two).item() == expected


# --- teachers, heads, errors -----------------------------------------------------------------------------------------


def test_a_teacher_may_be_a_function(two: list[Any]) -> None:
    model, batch = causal_lm(), token_batch()
    given = [
        Teacher(lambda k=k, **inputs: hidden_states(two[k], inputs), output_head(two[k])) for k in range(2)
    ]  # the labels do not reach it
    assert fused(model, batch, given).item() == fused(model, batch, two).item()


def test_teachers_get_no_gradient(two: list[Any]) -> None:
    other = causal_lm("llama", 24, seed=1)
    assert all(parameter.requires_grad for parameter in other.parameters())
    fused(causal_lm(), token_batch(), [other]).backward()
    assert not gradients(other)


def test_a_head_takes_the_dtype_of_its_hidden_states() -> None:
    head, states = OutputHead(torch.randn(5, 4), torch.randn(5)), torch.randn(3, 4, dtype=torch.bfloat16)
    hidden = teacher_hidden(Teacher(lambda **_: states, head), {"input_ids": torch.zeros(3, 1)})
    out = linear_loss(states.float(), head, [hidden], torch.zeros(3, dtype=torch.int64))
    assert out.loss.isfinite()


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({"logit_scale": 0.25, "logits_scaling": 4.0}, 0.25),
        ({"logit_scale": None, "output_multiplier": 3.0}, 3.0),
        ({"lm_head_multiplier": 0.5}, 0.5),
        ({"logits_scaling": 4.0}, 0.25),
        ({"logits_scaling": 4.0, "model_type": "hyperclovax"}, 4.0),
        ({"logits_mup_width_multiplier": 4.0}, 0.25),
        ({}, 1.0),
    ],
)
def test_scales_of_configs(config: dict[str, Any], factor: float) -> None:
    assert logit_scale(SimpleNamespace(**{"model_type": "x", **config})) == factor


@pytest.mark.parametrize("name", ["final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"])
def test_softcaps_of_configs(name: str) -> None:
    assert softcap(SimpleNamespace(**{name: 30})) == 30.0
    assert softcap(SimpleNamespace(**{name: None})) is None


def test_other_models_are_refused() -> None:
    config = causal_lm().config
    with pytest.raises(ValueError, match="LlamaModel has no output head"):
        hidden_states(transformers.LlamaModel(config), token_batch())
    both = transformers.T5Config(vocab_size=9, d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder and a decoder"):
        hidden_states(transformers.T5ForConditionalGeneration(both), token_batch())
