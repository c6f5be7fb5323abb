"""The optimiser of a run: SGD, AdamW or Muon.

All of them take the learning rate as a number or as a tensor on the device, which a CUDA graph reads anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .config import OptimConfig

_RECORDED: dict[str, Any] = {"fused": True, "capturable": True}  # AdamW in a CUDA graph


def create(module: nn.Module, optim: OptimConfig, scaled: bool) -> torch.optim.Optimizer:
    """The configured optimiser of the module's trainable parameters; its learning rate is set in every step.

    Args:
        scaled: whether a loss scaler skips steps.

    Raises:
        ValueError: Muon is asked for with a loss scaler, or from a torch without it.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    if optim.optimizer == "muon":
        if scaled:
            raise ValueError("optimizer muon cannot skip steps on the device, as dtype float16 needs: use bfloat16")
        return Muon(parameters, optim)
    if optim.optimizer == "adamw":
        return torch.optim.AdamW(groups(parameters, optim), lr=1.0, betas=optim.betas, **_RECORDED)
    sgd = torch.optim.SGD(groups(parameters, optim), lr=1.0, momentum=optim.momentum, nesterov=True, fused=True)
    for p in parameters:
        # torch leaves the momentum uninitialised if the scaler skips the first fused step.
        sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return sgd


def groups(parameters: Sequence[Tensor], optim: OptimConfig) -> list[dict[str, Any]]:
    """Parameter groups by weight decay. Norms and biases are the parameters of fewer than two dimensions."""
    if optim.decay_norms:
        return [{"params": list(parameters), "weight_decay": optim.weight_decay}]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


class Muon(torch.optim.AdamW):
    """torch's Muon for weights of two and more dimensions, AdamW for norms and biases.

    A convolution's weight (O, I, kh, kw) is a matrix (O, I kh kw). Updates have the size of AdamW's
    (`match_rms_adamw`, arXiv 2502.16982), so that one learning rate serves both.

    torch.optim.Muon takes matrices only and reads the learning rate on the host. Here it updates zeros at rate 1, which
    gives the direction; the parameters then take their step on the device.

    Raises:
        ValueError: this torch has no Muon.
    """

    def __init__(self, parameters: Sequence[Tensor], optim: OptimConfig) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(f"optimizer muon needs torch.optim.Muon, which torch {torch.__version__} does not have")
        vectors = [p for p in parameters if p.dim() < 2]
        decay = optim.weight_decay if optim.decay_norms else 0.0
        super().__init__([{"params": vectors}], lr=1.0, weight_decay=decay, betas=optim.betas, **_RECORDED)
        self._decay = optim.weight_decay
        self._weights = [p for p in parameters if p.dim() >= 2]
        self._directions = [p.new_zeros(p.shape[0], p[0].numel()) for p in self._weights]
        self._muon = torch.optim.Muon(
            self._directions, lr=1.0, weight_decay=0.0, momentum=optim.momentum, adjust_lr_fn="match_rms_adamw"
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for weight in self._weights:
            weight.grad = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        learning = [pair for pair in zip(self._weights, self._directions, strict=True) if pair[0].grad is not None]
        if not learning:
            return
        weights, directions = map(list, zip(*learning, strict=True))
        for weight, direction in learning:
            direction.zero_()
            assert weight.grad is not None
            direction.grad = weight.grad.reshape(direction.shape)
        self._muon.step()  # type: ignore[no-untyped-call]
        for direction in self._directions:
            direction.grad = None
        rate = self.param_groups[0]["lr"]
        torch._foreach_mul_(weights, 1.0 - rate * self._decay)
        torch._foreach_mul_(directions, rate)
        torch._foreach_add_(weights, [d.view(w.shape) for w, d in learning])

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "muon": self._muon.state_dict()["state"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._muon.load_state_dict({**self._muon.state_dict(), "state": state_dict["muon"]})
