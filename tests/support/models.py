"""Models in a state that shows errors of evaluation-mode arithmetic, and a comparison of two models."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def with_random_norms(model: nn.Module) -> nn.Module:
    """The model in training mode, with distinct random batch-norm parameters and statistics."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.3, 2.0)
    return model.train()


def same_logits(model: nn.Module, other: nn.Module, images: Tensor) -> bool:
    with torch.no_grad():
        return torch.equal(model(images), other(images))
