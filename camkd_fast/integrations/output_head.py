"""The output head of a causal language model as the parameters and constants that the linear loss takes."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .wrappers import before_compilation

# Names of the same constant in various configs.
FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


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

    def cloned(self) -> OutputHead:
        """The head with copies of its parameters."""
        return self._replace(weight=self.weight.clone(), bias=None if self.bias is None else self.bias.clone())


def own_head(model: Any) -> Any:
    """The module of an unwrapped model that computes its logits.

    Raises:
        ValueError: there is none.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output head: expected a causal language model")
    return head


def head_parameters(model: Any) -> tuple[Tensor, Tensor | None]:
    """Weight (C, H) and bias (C,) of an unwrapped model's head, which may be tied, frozen, shards, or on meta.

    Raises:
        ValueError: there is no head, or what it computes is not its weight and bias: an adapter, another class than
            nn.Linear, or quantized numbers.
    """
    head: Any = before_compilation(own_head(model))
    if isinstance(head, _classes_of_peft("tuners.tuners_utils", "BaseTunerLayer")):
        if not head.merged:
            raise ValueError(
                f"PEFT adapts the output head with {type(head).__name__}, but the linear loss takes one weight: name "
                "the head in modules_to_save instead of target_modules, or merge_and_unload() a teacher"
            )
        head = head.get_base_layer()
    # The weight of this one is that of the copy that PEFT trains.
    trained = isinstance(head, _classes_of_peft("utils.other", "AuxiliaryTrainingWrapper"))
    layer = head.original_module if trained else head
    # The class's: an instance's forward is where accelerate puts its hooks.
    if type(layer).forward is not nn.Linear.forward:
        raise ValueError(
            f"the output head of {type(model).__name__} is a {type(layer).__module__}.{type(layer).__qualname__} with "
            "a forward of its own, but the linear loss takes the weight and bias of an nn.Linear: leave the head out "
            "of quantization, or give a `Teacher` with hidden states and head"
        )
    weight = head.weight
    if not weight.is_floating_point() or weight.dim() != 2:
        raise ValueError(
            f"the output head of {type(model).__name__} has a weight of dtype {weight.dtype} and shape "
            f"{tuple(weight.shape)}, but expected are floating-point numbers (C, H): leave the head out of quantization"
        )
    return weight, getattr(head, "bias", None)


def _classes_of_peft(module: str, name: str) -> tuple[Any, ...]:
    """A class of PEFT in a tuple, which is empty where PEFT is not loaded: no model has such a module then."""
    loaded = sys.modules.get(f"peft.{module}")
    return () if loaded is None else (getattr(loaded, name),)


def output_head(model: Any) -> OutputHead:
    """The head of an unwrapped model as its parameters, which may be tied, frozen or a copy that PEFT trains.

    Raises:
        ValueError: as `head_parameters`.
    """
    weight, bias = head_parameters(model)
    text = model.config.get_text_config()
    return OutputHead(whole(weight), whole(bias), logit_scale(text), softcap(text))


def logit_scale(config: Any) -> float:
    """The factor of the logits by a text model's config."""
    factor, divisor = _first(config, FACTORS), _first(config, DIVISORS)
    if factor is not None:
        return factor
    if divisor is None:
        return 1.0
    return divisor if config.model_type == "hyperclovax" else 1.0 / divisor


def softcap(config: Any) -> float | None:
    """The bound of the logits by a text model's config."""
    return _first(config, SOFTCAPS)


def _first(config: Any, names: tuple[str, ...]) -> float | None:
    values = (getattr(config, name, None) for name in names)
    return next((float(value) for value in values if value is not None), None)


def whole(parameter: Any) -> Any:
    """A DTensor gathered, once for all chunks of the loss; anything else as it is."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
