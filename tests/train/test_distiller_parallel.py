"""`Distiller` under DDP and FSDP2 in two processes: gradients of the whole batch, with accumulation and autocast."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support.torch_version import needs_fsdp_over_gloo

ROOT = Path(__file__).parents[2]

RANK = """
import sys, torch
import torch.distributed as dist
from contextlib import nullcontext
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from camkd_fast import Distiller
from tests.support.processes import leave_group
from tests.support.training import SmallNet, batch

rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
mesh, data = init_device_mesh("cpu", (2,)), batch(24)
parts = torch.arange(24).chunk(2)[rank].chunk(2)  # two parts of each process

def made(strategy):
    torch.manual_seed(0)
    return Distiller(SmallNet(), [SmallNet(6, seed=1), SmallNet(7, seed=2)], strategy).eval()

def whole(gradient):
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient

def gradients(module):
    return {name.removeprefix("module."): whole(p.grad) for name, p in module.named_parameters()}

def check(found, expected, tolerance, what):
    assert found.keys() == expected.keys(), (what, found.keys())
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / gradient.norm()
        assert gradient.norm() > 0 and error < tolerance, (what, name, error)

for strategy in ("ca-mkd-logits", "ca-mkd"):
    for precise in (True, False):
        cast = nullcontext if precise else lambda: torch.autocast("cpu", dtype=torch.bfloat16)
        tolerance = 1e-5 if precise else 0.02
        single = made(strategy)
        with cast():
            loss = single(data.images, data.target).loss
        loss.backward()
        expected = gradients(single)
        for way in ("ddp", "fsdp2 of blocks", "fsdp2 of the student", "fsdp2 of the student and its methods"):
            module = made(strategy)
            if way == "ddp":
                module = DistributedDataParallel(module)
            else:
                if way == "fsdp2 of blocks":
                    fully_shard([module.student.conv1, module.student.conv2], mesh=mesh)
                else:
                    fully_shard(module.student, mesh=mesh)
                    for method in ("forward_features", "forward_head") if way.endswith("methods") else ():
                        register_fsdp_forward_method(module.student, method)
                fully_shard(module, mesh=mesh)
                assert all(isinstance(p, DTensor) for p in module.parameters())
            for last, part in zip((False, True), parts):
                if way != "ddp":
                    module.set_requires_gradient_sync(last)
                synced = module.no_sync() if way == "ddp" and not last else nullcontext()
                with synced:
                    with cast():
                        loss = module(data.images[part], data.target[part], num_items=24 / 2).loss
                    loss.backward()
            check(gradients(module), expected, tolerance, (strategy, precise, way))

for strategy, joined, refused in (("aekd", True, True), ("aekd", False, False), ("ca-mkd-logits", True, False)):
    module = DistributedDataParallel(made(strategy))
    try:
        with module.join(enable=joined):
            for _ in range(2 if refused or not joined else 1 + rank):
                module(data.images, data.target).loss.backward()
        assert not refused, strategy
    except ValueError as error:
        assert refused and "aekd sums over all processes in every batch, but DDP's join" in str(error), error
    dist.barrier()
leave_group()
"""


@needs_fsdp_over_gloo
def test_two_processes(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "store")],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
