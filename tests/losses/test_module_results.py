"""Modules that return the result of a loss: DDP and FSDP2 find the loss in it, and pytrees and pickle take it apart."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from camkd_fast import CAMKDFeatureLoss, CAMKDLinearLoss, CAMKDLoss, camkd_loss
from camkd_fast.losses.output import CAMKDOutput
from tests.support.processes import leave_group, run_processes
from tests.support.tolerance import assert_near
from tests.support.torch_version import needs_fsdp_over_gloo

ROWS, CLASSES, WORLD = 8, 10, 2
WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": DistributedDataParallel,
    "ddp, unused parameters": partial(DistributedDataParallel, find_unused_parameters=True),
    "ddp, static graph": partial(DistributedDataParallel, static_graph=True),
    "fsdp2": lambda module: fully_shard(module, mesh=init_device_mesh("cpu", (WORLD,))),
}


class Logits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.loss = nn.Linear(6, 8), nn.Linear(8, CLASSES), CAMKDLoss()

    def forward(self, x: Tensor, teachers: list[Tensor], target: Tensor) -> Any:
        return self.loss(self.head(self.body(x).relu()), teachers, target)


class Linear(Logits):
    def __init__(self) -> None:
        super().__init__()
        self.loss = CAMKDLinearLoss()

    def forward(self, x: Tensor, teachers: list[Tensor], target: Tensor) -> Any:
        heads = [torch.eye(CLASSES)] * 2
        bias = self.head.bias
        return self.loss(self.body(x).relu(), self.head.weight, teachers, heads, target, student_bias=bias)


class Features(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.loss = nn.Linear(6, 8), CAMKDFeatureLoss(8, [CLASSES] * 2).eval()

    def forward(self, x: Tensor, teachers: list[Tensor], target: Tensor) -> Any:
        maps = [t[..., None, None] for t in teachers]
        return self.loss(self.body(x)[..., None, None], maps, [nn.Flatten()] * 2, target)


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind()


def batch(rows: slice) -> tuple[Tensor, list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, *teachers = (torch.randn(ROWS, width, generator=generator) for width in (6, CLASSES, CLASSES))
    return x[rows], [t[rows] for t in teachers], torch.arange(ROWS)[rows]


def gradients(module: nn.Module) -> list[Tensor]:
    found = [p.grad for p in module.parameters() if p.grad is not None]
    return [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in found]


def in_a_process(rank: int, world: int, store: str) -> None:
    """What each process runs."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    for kind in (Logits, Linear, Features):
        single = made(kind)
        single(*batch(slice(None))).loss.backward()
        expected = gradients(single)
        for name, wrap in WAYS.items():
            module = wrap(made(kind))
            for _ in range(2):  # DDP arranges its buckets and its static graph in the first step
                module.zero_grad()
                module(*batch(slice(rank * ROWS // WORLD, (rank + 1) * ROWS // WORLD))).loss.backward()
            found = gradients(module)
            assert len(found) == len(expected) >= 4, (kind, name)
            for ours, theirs in zip(found, expected, strict=True):
                assert_near(ours, theirs, 1e-6, f"{kind.__name__}, {name}")
    leave_group()


@needs_fsdp_over_gloo
def test_gradients_of_two_processes_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    run_processes(__name__, WORLD, tmp_path)


def result(reduction: str) -> CAMKDOutput:
    x, teachers, target = batch(slice(None))
    return camkd_loss(x.new_zeros(ROWS, CLASSES), teachers, target, reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("taken_apart", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), "pytree"])
def test_a_result_is_rebuilt(reduction: str, taken_apart: Any) -> None:
    whole = result(reduction)
    if taken_apart == "pytree":
        leaves, structure = pytree.tree_flatten(whole)
        assert any(leaf is whole.loss for leaf in leaves)
        again = pytree.tree_unflatten(leaves, structure)
    else:
        again = taken_apart(whole)
    assert isinstance(again, CAMKDOutput)
    for name in ("loss", "hard", "soft", "weights", "teacher_ce", "divergence"):
        assert torch.equal(getattr(again, name), getattr(whole, name)), name
    assert again.entropy is whole.entropy is None


def test_a_module_that_returns_a_result_is_exported_and_saved(tmp_path: Path) -> None:
    module, data = made(Logits), batch(slice(None))
    torch.export.save(torch.export.export(module, data), tmp_path / "module.pt2")
    loaded = torch.export.load(tmp_path / "module.pt2").module()(*data)
    assert isinstance(loaded, CAMKDOutput)
    assert_near(loaded.loss.detach(), module(*data).loss.detach(), 1e-6)


def test_a_cast_of_a_result_casts_all_of_it() -> None:
    """What FSDP2's `output_dtype` does."""
    half = pytree.tree_map(lambda leaf: leaf.half() if isinstance(leaf, Tensor) else leaf, result("mean"))
    assert {half.loss.dtype, half.hard.dtype, half.weights.dtype} == {torch.float16}
    assert_near(half.soft.float(), result("mean").soft, 1e-3)
