"""From a causal language model of transformers to what the linear loss takes: hidden states, and the output head.

A model may be wrapped. DDP and FSDP2 prepare gradients and parameters in hooks of the wrapper's forward, so all work
with a student's tensors is done inside one (`call_inside`). PEFT's adapters lie in the backbone. A model that was
compiled as a whole computes logits, so its code is not used: compile the backbone instead, as the mixin does for
`torch_compile`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..losses.linear import LinearLossOutput, camkd_linear_loss
from .output_head import OutputHead, head_parameters, output_head, own_head
from .placement import can_run
from .wrappers import before_compilation, call_inside, unwrapped

# Inputs of a model that its backbone does not take.
NOT_FOR_THE_BACKBONE = ("labels", "shift_labels", "num_items_in_batch", "logits_to_keep")
# Largest logits of the tokens of `check_logits`: softcaps show in large ones only, and could hide a scale there. Each
# twice, since the states of a padding token may be 0.
CHECKED_LOGITS = (1.0, 100.0, 1.0, 100.0)


class Teacher(NamedTuple):
    """A teacher that is not a model of transformers."""

    hidden_states: Callable[..., Tensor]  # (B, S, H) from the batch's inputs as keywords
    head: OutputHead


class Hidden(NamedTuple):
    """The hidden states and the head of one teacher, as the loss takes them."""

    states: Tensor  # (B, S, H)
    head: OutputHead


def backbone(model: Any) -> nn.Module:
    """The part of an unwrapped model that ends with the hidden states that its head takes.

    Raises:
        ValueError: the model has no such part, or adapters outside of it.
    """
    inner = _without_adapters_outside(model)
    own_head(inner)
    if inner.config.is_encoder_decoder:
        raise ValueError(f"{type(inner).__name__} is an encoder and a decoder: expected a causal language model")
    # `base_model` of a model of text and images takes both; `get_decoder()` would be its text part only.
    for found in (inner.base_model, inner.get_decoder(), getattr(inner, "model", inner)):
        # The text part of a model of text and images may be a causal language model itself, without the images.
        if getattr(found, "get_output_embeddings", lambda: None)() is None:
            return found  # type: ignore[no-any-return]
    raise ValueError(
        f"{type(inner).__name__} does not name its backbone: base_model, get_decoder() and `model` have output heads"
    )


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
    states: Tensor = backbone(model)(**{**taken, "use_cache": False, "return_dict": True}).last_hidden_state
    return states


def classes_of_head(model: Any) -> int:
    """Number of classes of the head of a `Teacher` or a causal language model, which may be wrapped."""
    weight = model.head.weight if isinstance(model, Teacher) else head_parameters(unwrapped(model))[0]
    return int(weight.shape[0])


@torch.no_grad()
def check_logits(model: Any) -> None:
    """Compare logits of a few tokens by a model's head and config with those of its own forward.

    The head's inputs are scaled for both, so that the result does not depend on the size of the logits. If the model
    does not call its head, they are compared at the size that they have. A model that this process cannot run, since
    other processes have parts of it, is not checked.

    Raises:
        ValueError: they differ, as where a model does something of its own between backbone and head, or the model has
            no backbone or head that the linear loss takes.
    """
    inner = unwrapped(model)
    if not can_run(inner):
        return
    training = [module for module in inner.modules() if module.training]
    inner.eval()
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled code does not see hooks come and go
            _compare_logits(inner)
    finally:
        for module in training:
            module.training = True


def _compare_logits(inner: Any) -> None:
    name = type(inner).__name__
    device = next((p.device for p in inner.parameters() if not p.is_meta), torch.device("cpu"))
    inputs = {"input_ids": torch.arange(len(CHECKED_LOGITS), device=device).unsqueeze(0)}
    states, head = teacher_hidden(inner, inputs)
    if head.weight.shape[1] != states.shape[-1]:
        raise ValueError(
            f"the output head of {name} takes {head.weight.shape[1]} numbers per token, but its backbone returns "
            f"{states.shape[-1]}: expected a head that follows the backbone directly"
        )
    dtypes = [states.dtype, head.weight.dtype]
    head = OutputHead(*_of_one_dtype(states, head.weight, head.bias), *head[2:])
    factors = _factors_of_check(states, head)
    logits, called = _own_logits(inner, inputs, factors)
    found, expected = head.logits(states * factors if called else states).float(), logits.to(states.device).float()
    if found.shape != expected.shape:
        raise ValueError(
            f"the logits of {name} have shape {tuple(expected.shape)}, but by its output head they have "
            f"{tuple(found.shape)}: expected one class per row of the head"
        )
    errors, sizes = (found - expected).norm(dim=-1), expected.norm(dim=-1)
    rounding = max(torch.finfo(dtype).eps for dtype in (*dtypes, logits.dtype))
    if not bool((errors <= max(1e-3, 6 * rounding) * sizes).all()):
        error, size = float(errors.norm()), float(sizes.norm())
        raise ValueError(
            f"the logits of {name} are not those of its output head and config (logit scale {head.logit_scale:g}, "
            f"softcap {head.softcap}): norm {size:.3g}, difference {error:.3g}. Remove a constant from the config that "
            "the model does not apply, or give a teacher as a `Teacher` with hidden states and head"
        )


def _factors_of_check(states: Tensor, head: OutputHead) -> Tensor:
    """Factors (S, 1) of hidden states (1, S, H) with which the logits are as large as `CHECKED_LOGITS`."""
    largest = nn.functional.linear(states[0], head.weight).abs().amax(-1, keepdim=True).float() * abs(head.logit_scale)
    factors = largest.new_tensor(CHECKED_LOGITS).unsqueeze(-1) / largest
    # Room for what a model adds up in half precision
    most = torch.finfo(states.dtype).max / 16 / states[0].abs().amax(-1, keepdim=True).float()
    return torch.where(largest > 0, factors.minimum(most), 1.0).to(states.dtype)


def _own_logits(inner: Any, inputs: Mapping[str, Any], factors: Tensor) -> tuple[Tensor, bool]:
    """Logits of the model's forward with the inputs of its head multiplied, and whether it called its head at all."""
    called = []

    def multiply(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return tuple(map(multiplied, args)), {name: multiplied(value) for name, value in kwargs.items()}

    def multiplied(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape[-2:-1] != (len(factors),):  # heads of other tokens
            return value
        called.append(True)
        return value * factors.to(value)

    head, own = before_compilation(own_head(inner)), inner.config.return_dict
    hook = head.register_forward_pre_hook(multiply, with_kwargs=True)
    # By the config, since transformers 5 does not pass the argument on to the backbone
    inner.config.return_dict = True
    try:
        logits: Tensor = inner(**inputs, use_cache=False).logits
    finally:
        hook.remove()
        inner.config.return_dict = own
    return logits, bool(called)


@torch.no_grad()
def teacher_hidden(teacher: Any, inputs: Mapping[str, Any]) -> Hidden:
    """Hidden states and head of a `Teacher` or a causal language model, which may be wrapped."""
    if isinstance(teacher, Teacher):
        taken = {name: value for name, value in inputs.items() if name not in NOT_FOR_THE_BACKBONE}
        states = teacher.hidden_states(**taken)
        return Hidden(states, teacher.head.detached(states))
    inner = unwrapped(teacher)
    heads: list[OutputHead] = []

    def inside(inputs: Mapping[str, Any]) -> Tensor:
        states = hidden_states(inner, inputs)
        heads.append(_kept_head(inner, states))
        return states

    states = call_inside(teacher, inner, inside, inputs)
    return Hidden(states, heads[0].detached(states))


def _kept_head(model: Any, states: Tensor) -> OutputHead:
    """The head of an unwrapped model, read inside the head's forward, whose hooks gather it or load it."""
    heads: list[OutputHead] = []

    def keep(states: Tensor, head: OutputHead) -> Tensor:
        # FSDP2 takes the memory of a gathered weight when the forward ends; accelerate leaves it to whoever holds it.
        gathered = any(isinstance(module, FSDPModule) for module in (model, own_head(model)))
        heads.append(head.cloned() if gathered else head)
        return states

    at_head(model, states, keep)
    return heads[0]


@torch.no_grad()
def unused_hidden(teacher: Any, inputs: Mapping[str, Any]) -> Hidden:
    """Zeros, which the loss does not read: for a batch without samples of the teacher."""
    ids = inputs["input_ids"]
    weight = teacher.head.weight if isinstance(teacher, Teacher) else head_parameters(unwrapped(teacher))[0]
    states = torch.zeros((*ids.shape, weight.shape[1]), dtype=weight.dtype, device=ids.device)
    head = teacher.head if isinstance(teacher, Teacher) else _kept_head(unwrapped(teacher), states)
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
