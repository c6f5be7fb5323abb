"""Which models the linear loss takes: their logits follow from hidden states and head, whatever size they have."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
import transformers
from torch import Tensor, nn

from camkd_fast.integrations import output_head as heads
from camkd_fast.integrations.causal_lm import (
    backbone,
    check_logits,
    hidden_states,
    student_loss,
    teacher_hidden,
    unused_hidden,
)
from camkd_fast.integrations.output_head import output_head
from camkd_fast.integrations.placement import can_move, can_run
from camkd_fast.integrations.teacher_mix import TeacherMix
from tests.support.language_models import KINDS, VOCABULARY, causal_lm, gradients, teacher_logits, token_batch

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 32, "pad_token_id": 0}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
REFUSED = "are not those of its output head and config"


def made(name: str, config: str = "", **settings: Any) -> Any:
    """A model of transformers by its class's name, with the usual small weights."""
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    return kind((getattr(transformers, config) if config else kind.config_class)(**settings))


def error_of(model: Any, others: Any = None) -> float:
    """Of logits by hidden states and head, relative to those of the model, or of another one."""
    batch = token_batch()
    hidden, (expected,) = teacher_hidden(model, batch), teacher_logits([others or model], batch)
    return float((hidden.head.logits(hidden.states) - expected).norm() / expected.norm())


class Scaled(transformers.LlamaForCausalLM):
    """A factor that is in no config."""

    factor = 1.01  # half precision might round that much

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = self.factor * out.logits
        return out


def scaled(factor: float = 1.01) -> Any:
    model = causal_lm()
    model.__class__, model.factor = Scaled, factor
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_head_and_config(kind: str, dtype: torch.dtype) -> None:
    for spread in (0.3, 0.001):
        model = causal_lm(kind, initializer_range=spread).to(dtype)
        frozen = next(module for module in model.modules() if isinstance(module, nn.Embedding)).eval()
        hooks = len(model.get_output_embeddings()._forward_pre_hooks)
        check_logits(model)
        assert model.training and not frozen.training and can_run(model) and can_move(model)
        assert len(model.get_output_embeddings()._forward_pre_hooks) == hooks


def test_a_model_with_logits_of_its_own_is_refused() -> None:
    model = scaled().eval()
    with pytest.raises(ValueError, match=rf"Scaled {REFUSED} \(logit scale 1, softcap None\): norm .* `Teacher`"):
        check_logits(model)
    assert not model.training


def test_other_processes_parts_are_not_run() -> None:
    check_logits(scaled().to("meta"))
    assert not can_run(causal_lm().to("meta"))


# --- sizes of logits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_softcap_of_small_logits_is_seen(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """In both directions, though it changes these logits by a millionth of their size."""
    ignored = causal_lm("llama", initializer_range=0.02, final_logit_softcapping=30.0).to(dtype)
    with pytest.raises(ValueError, match=rf"LlamaForCausalLM {REFUSED} \(logit scale 1, softcap 30.0\)"):
        check_logits(ignored)
    applied = causal_lm("gemma2", initializer_range=0.02, final_logit_softcapping=30.0).to(dtype)
    check_logits(applied)
    monkeypatch.setattr(heads, "SOFTCAPS", ())
    with pytest.raises(ValueError, match=rf"Gemma2ForCausalLM {REFUSED} \(logit scale 1, softcap None\)"):
        check_logits(applied)


def test_a_scale_behind_a_softcap_is_seen() -> None:
    """Where nearly all logits are the softcap or its negative, and the others do not outweigh half precision."""
    model = causal_lm("gemma2", final_logit_softcapping=0.5).to(torch.bfloat16)
    check_logits(model)
    model.config.logit_scale = 2.0
    with pytest.raises(ValueError, match=rf"{REFUSED} \(logit scale 2, softcap 0.5\)"):
        check_logits(model)


def test_softcaps_by_other_names() -> None:
    griffin = made(
        "RecurrentGemmaForCausalLM", **SMALL | {"intermediate_size": 96}, num_hidden_layers=3, num_attention_heads=4,
        lru_width=32, attention_window_size=16,
    )  # fmt: skip
    xlstm = made("xLSTMForCausalLM", vocab_size=VOCABULARY, hidden_size=64, num_heads=4, num_blocks=2)
    for model in (griffin, xlstm):
        check_logits(model)
        assert output_head(model).softcap == 30.0


def test_a_softcap_that_a_model_of_text_and_images_ignores() -> None:
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    for softcap in (None, 30.0):
        config = transformers.Gemma3Config(
            text_config={**SMALL, **LAYERS, "head_dim": 8, "final_logit_softcapping": softcap},
            vision_config={**vision, "image_size": 28, "patch_size": 14},
            mm_tokens_per_image=4, image_token_index=55, boi_token_index=56, eoi_token_index=57,
        )  # fmt: skip
        model = transformers.Gemma3ForConditionalGeneration(config)
        if softcap is None:
            check_logits(model)
        else:
            with pytest.raises(ValueError, match=rf"Gemma3ForConditionalGeneration {REFUSED}"):
                check_logits(model)


def test_large_hidden_states_stay_in_the_range_of_half_precision() -> None:
    model = causal_lm().to(torch.float16)
    with torch.no_grad():
        model.model.norm.weight.mul_(3000.0)
        model.lm_head.weight.mul_(1e-4)
    check_logits(model)


def test_logits_of_zero() -> None:
    model = causal_lm()
    nn.init.zeros_(model.lm_head.weight)
    check_logits(model)


class Functional(transformers.LlamaForCausalLM):
    """A head that is not called."""

    factor = 1.0

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        states = self.model(input_ids).last_hidden_state
        return SimpleNamespace(logits=self.factor * nn.functional.linear(states, self.lm_head.weight))


def test_a_head_that_the_model_does_not_call() -> None:
    model = causal_lm()
    model.__class__ = Functional
    check_logits(model)
    model.factor = 1.01
    with pytest.raises(ValueError, match=REFUSED):
        check_logits(model)


@pytest.mark.parametrize("part", ["head", "model"])
@pytest.mark.parametrize("called", [False, True])
def test_compiled_models_are_checked_without_their_code(part: str, called: bool) -> None:
    """Code that was compiled before does not call the check's hook, and code compiled now would go on to."""
    for ignored in (False, True):
        torch._dynamo.reset()
        model = causal_lm(initializer_range=0.02, final_logit_softcapping=30.0 if ignored else None).eval()
        inputs = {"input_ids": torch.arange(4).unsqueeze(0), "use_cache": False}
        with torch.no_grad():
            expected = model(**inputs).logits
            if part == "head":
                model.lm_head = torch.compile(model.lm_head, backend="eager")
            else:
                model.compile(backend="eager")
            if called:
                model(**inputs)
            with pytest.raises(ValueError, match=REFUSED) if ignored else nullcontext():
                check_logits(model)
            assert torch.equal(model(**inputs).logits, expected)


# --- backbones -------------------------------------------------------------------------------------------------------


def llama4_text() -> dict[str, Any]:
    return {**SMALL, **LAYERS, "head_dim": 8, "intermediate_size_mlp": 32, "num_local_experts": 2}


def test_a_backbone_that_has_another_name() -> None:
    model = made("Llama4ForCausalLM", "Llama4TextConfig", **llama4_text()).eval()
    assert backbone(model) is model.model
    check_logits(model)
    assert error_of(model) < 1e-5


def test_a_backbone_with_a_head_is_none() -> None:
    """The text part of a model of text and images, which would not see the images."""
    vision = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    outputs = {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
    config = transformers.Llama4Config(
        text_config=llama4_text(), vision_config={**vision, **outputs, "image_size": 28, "patch_size": 14}
    )
    with pytest.raises(ValueError, match="Llama4ForConditionalGeneration does not name its backbone"):
        check_logits(transformers.Llama4ForConditionalGeneration(config))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_outputs_that_the_config_wants_as_tuples(kind: str) -> None:
    model, expected = causal_lm(kind, return_dict=False), causal_lm(kind)
    check_logits(model)
    assert model.config.return_dict is False
    assert torch.equal(hidden_states(model, token_batch()), hidden_states(expected, token_batch()))


# --- heads -----------------------------------------------------------------------------------------------------------


class LearnedScale(nn.Linear):
    """As DoryForCausalLM has it: at the start it is an nn.Linear."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__(like.in_features, like.out_features, bias=False)
        self.weight, self.scale = like.weight, nn.Parameter(torch.ones(like.out_features))

    def forward(self, states: Tensor) -> Tensor:
        return super().forward(states) * self.scale


def with_head(change: Callable[[Any], Any], **settings: Any) -> Any:
    model = causal_lm(**settings)
    model.lm_head = change(model.lm_head)
    return model


def of_integers(head: nn.Linear) -> nn.Linear:
    head.weight = nn.Parameter(head.weight.to(torch.int8), requires_grad=False)
    return head


class Truncated(transformers.LlamaForCausalLM):
    """As Inkling does: classes that pad the vocabulary have no logits."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits[..., :50]
        return out


def truncated() -> Any:
    model = causal_lm()
    model.__class__ = Truncated
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: with_head(LearnedScale), r"LlamaForCausalLM is a .*LearnedScale with a forward of its own"),
        (
            lambda: torch.ao.quantization.quantize_dynamic(causal_lm(), {nn.Linear}, dtype=torch.qint8),
            r"LlamaForCausalLM is a torch\..*\.Linear with a forward of its own.*out of quantization",
        ),
        (lambda: with_head(of_integers), r"has a weight of dtype torch.int8 and shape \(60, 16\), but expected"),
        (
            lambda: made("ElectraForCausalLM", **SMALL, num_attention_heads=4, num_hidden_layers=1, is_decoder=True),
            "head of ElectraForCausalLM takes 128 numbers per token, but its backbone returns 32",
        ),
        (
            lambda: made("RemBertForCausalLM", **SMALL, num_attention_heads=4, num_hidden_layers=1, is_decoder=True),
            "head of RemBertForCausalLM takes 1664 numbers per token, but its backbone returns 32",
        ),
        (truncated, r"logits of Truncated have shape \(1, 4, 50\), but by its output head they have \(1, 4, 60\)"),
    ],
    ids=["learned scale", "dynamic", "int8", "electra", "rembert", "padded"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_heads_that_are_refused(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_logits(make())


def test_a_head_with_parameters_of_its_own_is_refused_in_a_step_too() -> None:
    """Sharded models are not checked."""
    model = with_head(LearnedScale)
    with pytest.raises(ValueError, match="LearnedScale with a forward of its own"):
        student_loss(model, token_batch(), lambda states, head: states.sum())


def test_a_head_whose_weight_is_computed() -> None:
    """torch's parametrizations change the head's class, and its weight is a function of other parameters."""
    model = with_head(torch.nn.utils.parametrizations.weight_norm)
    check_logits(model)
    student_loss(model, token_batch(), lambda states, head: head.logits(states).square().sum()).backward()
    assert sum("parametrizations" in name for name in gradients(model)) == 2


# --- models that accelerate places -----------------------------------------------------------------------------------

PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")


def dispatched(model: Any, folder: Path, offloaded: tuple[str, ...]) -> Any:
    places = {part: "disk" if part in offloaded else "cpu" for part in PARTS}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder))


PLACED: dict[str, Callable[[Any, Path], Any]] = {
    "one device": lambda model, _: accelerate.dispatch_model(model, {"": "cpu"}),
    "a layer on disk": lambda model, folder: dispatched(model, folder, ("model.layers.0",)),
    "the head on disk": lambda model, folder: dispatched(model, folder, ("lm_head",)),
    "cpu_offload": lambda model, _: accelerate.cpu_offload(model, torch.device("cpu")),
    "disk_offload": lambda model, folder: accelerate.disk_offload(model, str(folder), torch.device("cpu")),
}


def test_quantized_models_stay_where_they_were_placed() -> None:
    model = causal_lm("llama")
    assert can_move(model)
    model.is_quantized = True
    assert can_move(model)
    model.hf_device_map = {"": "cpu"}
    assert can_run(model) and not can_move(model)


@pytest.mark.parametrize("place", PLACED)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2"])  # qwen2 is tied, gemma2 has a softcap
def test_placed_models_are_read_and_checked(kind: str, place: str, tmp_path: Path) -> None:
    expected = causal_lm(kind).eval()
    model = PLACED[place](copy.deepcopy(expected), tmp_path)
    teacher_logits([model], token_batch())  # accelerate leaves a tied weight where it is until the first forward
    at_rest = [parameter.device for parameter in model.parameters()]
    check_logits(model)
    assert can_run(model) and can_move(model) == (place == "one device")  # whose inputs no hook moves
    for _ in range(2):
        assert error_of(model, expected) < 1e-5
    unused = unused_hidden(model, token_batch())
    assert torch.equal(unused.head.weight, expected.get_output_embeddings().weight) and not unused.states.any()
    assert [parameter.device for parameter in model.parameters()] == at_rest


def test_a_bias_is_loaded_too(tmp_path: Path) -> None:
    expected = causal_lm("phi").eval()
    assert error_of(PLACED["disk_offload"](copy.deepcopy(expected), tmp_path), expected) < 1e-5


@pytest.mark.parametrize("place", PLACED)
def test_placed_models_are_refused_as_others(place: str, tmp_path: Path) -> None:
    teacher, student = PLACED[place](scaled(), tmp_path), causal_lm()
    with pytest.raises(ValueError, match=rf"Scaled {REFUSED}"):
        TeacherMix([teacher], None, None).place(torch.device("cpu"), student)
