"""From a causal language model of transformers to what the linear loss takes: hidden states, and the output head.

A model may be wrapped. DDP and FSDP2 prepare gradients and parameters in hooks of the wrapper's forward, so all work
with a student's tensors is done inside one (`call_inside`). PEFT's adapters lie in the backbone. A model that was
compiled as a whole computes logits, so its code is not used: compile the backbone instead, as the mixin does for
`torch_compile`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..losses.linear import LinearLossOutput, camkd_linear_loss

# Inputs of a model that its backbone does not take.
NOT_FOR_THE_BACKBONE = ("labels", "shift_labels", "num_items_in_batch", "logits_to_keep")
SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")  # the same factor in various configs


class OutputHead(NamedTuple):
    """logits = softcap * tanh(logit_scale * (hidden @ weight^T + bias) / softcap), without a softcap its argument."""

    weight: Tensor  # (C, H)
    bias: Tensor | None = None  # (C,)
    logit_scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., C) of hidden states (..., H)."""
        z = nn.functional.linear(hidden, self.weight, self.bias) * self.logit_scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def detached(self, like: Tensor) -> OutputHead:
        """The head without gradients, on the device of the hidden states `like`."""
        bias = None if self.bias is None else self.bias.detach().to(like.device)
        return self._replace(weight=self.weight.detach().to(like.device), bias=bias)


class Teacher(NamedTuple):
    """A teacher that is not a model of transformers."""

    hidden_states: Callable[..., Tensor]  # (B, S, H) from the batch's inputs as keywords
    head: OutputHead


class Hidden(NamedTuple):
    """The hidden states and the head of one teacher, as the loss takes them."""

    states: Tensor  # (B, S, H)
    head: OutputHead


def unwrapped(model: Any) -> Any:
    """The model inside DDP and torch.compile. FSDP2 changes a model's class and wraps nothing."""
    while (inner := _inside(model)) is not None:
        model = inner
    return model


def _inside(model: Any) -> nn.Module | None:
    children = model._modules
    if "_orig_mod" in children:
        return children["_orig_mod"]  # type: ignore[no-any-return]
    return None if hasattr(model, "get_output_embeddings") else children.get("module")


def call_inside(wrapper: nn.Module, inner: nn.Module, function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments) as the forward of `inner`, called through `wrapper`, so that the hooks of both run."""
    # Compiled code would not see the other forward
    wrapper, inner = (_before_compilation(module) for module in (wrapper, inner))
    own = vars(inner).get("forward")  # accelerate and TRL set one at the instance

    def restore() -> None:
        vars(inner).pop("forward", None)
        if own is not None:
            vars(inner)["forward"] = own

    def forward(*given: Any) -> Any:
        restore()
        return function(*given)

    vars(inner)["forward"] = forward
    try:
        return wrapper(*arguments)
    finally:
        restore()


def _before_compilation(module: nn.Module) -> nn.Module:
    while "_orig_mod" in module._modules:
        module = module._modules["_orig_mod"]  # type: ignore[assignment]
    return module


def backbone(model: Any) -> nn.Module:
    """The part of an unwrapped model that ends with the hidden states that its head takes.

    Raises:
        ValueError: the model has no such part, or adapters outside of it.
    """
    inner = _without_adapters_outside(model)
    _own_head(inner)
    if inner.config.is_encoder_decoder:
        raise ValueError(f"{type(inner).__name__} is an encoder and a decoder: expected a causal language model")
    # `base_model` of a model of text and images takes both; `get_decoder()` would be its text part only.
    found = inner.base_model if inner.base_model is not inner else inner.get_decoder()
    if found is inner:
        raise ValueError(f"{type(inner).__name__} does not name its backbone: base_model is the model itself")
    return found  # type: ignore[no-any-return]


def _without_adapters_outside(model: Any) -> Any:
    """The model of transformers in a PEFT model."""
    configs = getattr(model, "peft_config", None)
    if configs is None or not hasattr(model, "get_base_model"):
        return model
    for config in configs.values():
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(
                f"PEFT's {type(config).__name__} adds virtual tokens outside the backbone, which the linear loss would "
                "not see: expected adapters of weights such as LoRA"
            )
    return model.get_base_model()


def hidden_states(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Hidden states (B, S, H) after the final norm of an unwrapped model.

    Args:
        inputs: of the model; labels and the like are left out.
    """
    taken = {name: value for name, value in inputs.items() if name not in NOT_FOR_THE_BACKBONE}
    states: Tensor = backbone(model)(**{**taken, "use_cache": False}).last_hidden_state
    return states


def _own_head(model: Any) -> Any:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output head: expected a causal language model")
    return head


def classes_of_head(model: Any) -> int:
    """Number of classes of the head of a `Teacher` or a causal language model, which may be wrapped."""
    head = model.head if isinstance(model, Teacher) else _own_head(unwrapped(model))
    return int(head.weight.shape[0])


def output_head(model: Any) -> OutputHead:
    """The head of an unwrapped model as its parameters, which may be tied, frozen or a copy that PEFT trains.

    Raises:
        ValueError: there is none, or an adapter changes what the head computes.
    """
    head = _own_head(model)
    tuners = sys.modules.get("peft.tuners.tuners_utils")  # loaded wherever there is such a head
    if tuners is not None and isinstance(head, tuners.BaseTunerLayer):
        if not head.merged:
            raise ValueError(
                f"PEFT adapts the output head with {type(head).__name__}, but the linear loss takes one weight: name "
                "the head in modules_to_save instead of target_modules, or merge_and_unload() a teacher"
            )
        head = head.get_base_layer()
    text = model.config.get_text_config()
    softcap = getattr(text, "final_logit_softcapping", None)
    return OutputHead(whole(head.weight), whole(getattr(head, "bias", None)), logit_scale(text), softcap)


def logit_scale(config: Any) -> float:
    """The factor of the logits by a text model's config, as TRL 1.16 reads it."""
    for name in SCALES:
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    divisor = getattr(config, "logits_scaling", None)
    if divisor is None:
        return 1.0
    return float(divisor if config.model_type == "hyperclovax" else 1.0 / divisor)


def whole(parameter: Any) -> Any:
    """A DTensor gathered, once for all chunks of the loss; anything else as it is."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def is_sharded(teacher: Any) -> bool:
    """Whether other processes wait for this one in the teacher's forward."""
    return isinstance(teacher, nn.Module) and any(isinstance(parameter, DTensor) for parameter in teacher.parameters())


def is_in_place(model: Any) -> bool:
    """Whether a model lies on one device of this process in full, so that it may be moved and run."""
    if getattr(unwrapped(model), "hf_device_map", None) is not None or is_sharded(model):
        return False
    return all(parameter.numel() > 0 and not parameter.is_meta for parameter in model.parameters())


@torch.no_grad()
def check_logits(model: Any) -> None:
    """Two tokens of a model, by its head and config, and by its own forward.

    Raises:
        ValueError: they differ, as where a model does something of its own between backbone and head.
    """
    inner = unwrapped(model)
    training = [module for module in inner.modules() if module.training]
    inner.eval()
    try:
        head = output_head(inner)
        inputs = {"input_ids": torch.arange(2, device=head.weight.device).unsqueeze(0)}
        found = head.logits(hidden_states(inner, inputs)).float()
        expected = inner(**inputs, use_cache=False).logits.float()
    finally:
        for module in training:
            module.training = True
    error, size = float((found - expected).norm()), float(expected.norm())
    if not error <= 0.05 * size:  # half precision rounds
        raise ValueError(
            f"the logits of {type(inner).__name__} are not those of its output head and config: norm {size:.3g}, "
            f"difference {error:.3g}"
        )


@torch.no_grad()
def teacher_hidden(teacher: Any, inputs: Mapping[str, Any]) -> Hidden:
    """Hidden states and head of a `Teacher` or a causal language model, which may be wrapped."""
    if isinstance(teacher, Teacher):
        taken = {name: value for name, value in inputs.items() if name not in NOT_FOR_THE_BACKBONE}
        states = teacher.hidden_states(**taken)
        return Hidden(states, teacher.head.detached(states))
    inner = unwrapped(teacher)
    found: list[OutputHead] = []

    def inside(inputs: Mapping[str, Any]) -> Tensor:
        states, head = hidden_states(inner, inputs), output_head(inner)
        # FSDP2 takes the memory of a gathered weight when the forward ends.
        found.append(head._replace(weight=head.weight.clone()) if isinstance(inner, FSDPModule) else head)
        return states

    states = call_inside(teacher, inner, inside, inputs)
    return Hidden(states, found[0].detached(states))


@torch.no_grad()
def unused_hidden(teacher: Any, inputs: Mapping[str, Any]) -> Hidden:
    """Zeros, which the loss does not read: for a batch without samples of the teacher."""
    head = teacher.head if isinstance(teacher, Teacher) else output_head(unwrapped(teacher))
    states = head.weight.new_zeros((*inputs["input_ids"].shape, head.weight.shape[1]))
    return Hidden(states, head.detached(states))


def student_loss(
    model: nn.Module, inputs: Mapping[str, Any], compute: Callable[[Tensor, OutputHead], Tensor]
) -> Tensor:
    """compute(hidden states, head) of a student, inside the forwards of its wrapper and of its head.

    Args:
        model: a causal language model, which may be wrapped.
        compute: returns the loss, a tensor of one element.
    """
    inner = unwrapped(model)

    def inside(inputs: Mapping[str, Any]) -> Tensor:
        return at_head(inner, hidden_states(inner, inputs), compute)

    loss: Tensor = call_inside(model, inner, inside, inputs)
    return loss


def at_head(model: Any, states: Tensor, compute: Callable[[Tensor, OutputHead], Tensor]) -> Tensor:
    """compute(hidden states, head) inside the forward of an unwrapped model's head.

    The hooks of a head that is sharded by itself gather its weight, and scatter its gradient.
    """
    head = model.get_output_embeddings()
    loss: Tensor = call_inside(head, head, lambda states: compute(states, output_head(model)), states)
    return loss


def linear_loss(
    states: Tensor, head: OutputHead, teachers: Sequence[Hidden], target: Tensor, **settings: Any
) -> LinearLossOutput:
    """`camkd_linear_loss` of models, on the device of the student's head.

    Args:
        settings: keywords; scales and softcaps are the heads' unless they are among them.
    """
    states = states.to(head.weight.device)
    student = OutputHead(*_of_one_dtype(states, head.weight, head.bias), *head[2:])
    others = []
    for teacher in teachers:
        hidden = teacher.states.to(states.device)
        own = teacher.head.detached(states)
        others.append((hidden, OutputHead(*_of_one_dtype(hidden, own.weight, own.bias), *own[2:])))
    mapped: dict[str, Any] = {}
    if student.logit_scale != 1.0:
        mapped["student_logit_scale"] = student.logit_scale
    if student.softcap is not None:
        mapped["student_softcap"] = student.softcap
    if any(own.logit_scale != 1.0 for _, own in others):
        mapped["teacher_logit_scales"] = [own.logit_scale for _, own in others]
    if any(own.softcap is not None for _, own in others):
        mapped["teacher_softcaps"] = [own.softcap for _, own in others]
    return camkd_linear_loss(
        states,
        student.weight,
        [hidden for hidden, _ in others],
        [own.weight for _, own in others],
        target.to(states.device),
        student_bias=student.bias,
        teacher_biases=[own.bias for _, own in others],
        **{**mapped, **{name: _beside(states, value) for name, value in settings.items()}},
    )


def _beside(states: Tensor, setting: Any) -> Any:
    return setting.to(states.device) if isinstance(setting, Tensor) else setting


def _of_one_dtype(states: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A head in the dtype of its hidden states, which FSDP2's mixed precision may have cast. Autocast casts itself."""
    if torch.is_autocast_enabled(states.device.type):
        return weight, bias
    return weight.to(states.dtype), None if bias is None else bias.to(states.dtype)
