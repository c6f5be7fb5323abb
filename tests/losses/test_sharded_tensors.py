"""DTensors on two processes, sharded by rows or by classes or replicated: the values and gradients of the whole."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support.torch_version import needs_dtensor_rules

ROOT = Path(__file__).parents[2]

RANK = """
import sys, torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from camkd_fast import camkd_loss, camkd_loss_and_grad, confidence_weights, weighted_feature_loss
from tests.support.processes import leave_group
from tests.support.tolerance import assert_near

rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
student, first, second = torch.randn(3, 8, 10)
target, w = torch.arange(8), torch.rand(2, 8)
other, mix = torch.arange(8).flip(0), torch.linspace(0, 1, 8)
target[5] = -100
def two(y):
    found = {"second_target": other, "mix": mix}
    if isinstance(y, DTensor):
        found = {name: distribute_tensor(value, mesh, y.placements) for name, value in found.items()}
    return found
functions = {
    "mean": lambda s, a, b, y, w: camkd_loss(s, [a, b], y).loss,
    "none": lambda s, a, b, y, w: camkd_loss(s, [a, b], y, weighting="entropy", reduction="none").loss,
    "given weights": lambda s, a, b, y, w: camkd_loss(s, [a, b], y, weighting=w, reduction="sum").loss,
    "gradient": lambda s, a, b, y, w: camkd_loss_and_grad(s, [a, b], y)[1],
    "confidence": lambda s, a, b, y, w: confidence_weights([s, a], y)[0],
    "two labels": lambda s, a, b, y, w: camkd_loss(s, [a, b], y, **two(y)).loss,
    "confidence of two labels": lambda s, a, b, y, w: confidence_weights([s, a], y, **two(y))[0],
    "feature": lambda s, a, b, y, w: weighted_feature_loss([s, s], [a, b], w),
}
for logits, rows in ((Replicate(), Replicate()), (Shard(0), Shard(0)), (Shard(1), Replicate())):
    split = lambda x, placement: distribute_tensor(x, mesh, [placement])
    tensors = split(first, logits), split(second, logits), split(target, rows), split(w, Replicate())
    for name, function in functions.items():
        leaf, shard = student.clone().requires_grad_(), split(student, logits).requires_grad_()
        expected, found = function(leaf, first, second, target, w), function(shard, *tensors)
        assert isinstance(found, DTensor), name
        assert_near(found.full_tensor().detach(), expected.detach(), what=f"{name} {logits}")
        if expected.requires_grad:
            factor = torch.linspace(1, 2, expected.numel()).view(expected.shape)
            (expected * factor).sum().backward()
            (found * split(factor, Replicate())).sum().backward()
            assert_near(shard.grad.full_tensor(), leaf.grad, what=f"gradient of {name} {logits}")
# A kernel that is given one DTensor among other tensors says which.
try:
    camkd_loss(split(student, Replicate()), [first], target)
except TypeError as error:
    assert "student_logits is a DTensor" in str(error), error
else:
    raise AssertionError("mixed tensors were taken")
# Labels that PyTorch's operations cannot flatten: 5 rows of 3 on two processes.
logits, labels = torch.randn(5, 3, 10), distribute_tensor(torch.arange(15).view(5, 3) % 10, mesh, [Shard(0)])
try:
    camkd_loss(distribute_tensor(logits, mesh, [Replicate()]), [distribute_tensor(logits, mesh, [Replicate()])], labels)
except TypeError as error:
    assert "is a DTensor" in str(error) and "PyTorch's own operations fail" in str(error), error
leave_group()
"""


@needs_dtensor_rules
def test_two_processes(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", RANK, str(rank), str(tmp_path / "store")], env=environment
        )
        for rank in range(2)
    ]
    try:
        assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
