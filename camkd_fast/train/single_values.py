"""Training on one value per channel: batch norms that would see a single value use their running statistics.

A batch of one image reaches a batch norm with 1x1 maps in small networks, and in the maps r_k with a teacher cache,
which holds averages. The variance of one value is 0, and torch refuses it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def running_statistics(module: nn.Module) -> Iterator[None]:
    """Run batch norms that get one value per channel in evaluation mode in the block; their statistics do not change.

    SyncBatchNorm counts the values of all processes and is left as it is.
    """
    switched: list[nn.Module] = []

    def before(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        values = inputs[0]
        if norm.training and values.numel() == values.shape[1]:
            switched.append(norm.eval())

    def after(norm: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if norm in switched:
            switched.remove(norm.train())

    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and not isinstance(m, nn.SyncBatchNorm)]
    handles = [norm.register_forward_pre_hook(before) for norm in norms]
    handles += [norm.register_forward_hook(after) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for norm in switched:  # the forward pass failed
            norm.train()
