"""Two processes are one: gradients under DDP and FSDP2, and a run of Trainer under DDP."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]

GRADIENTS = """
import sys, torch
from tests.support import language_models as lm
import torch.distributed as dist
from contextlib import nullcontext
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from camkd_fast.integrations.causal_lm import linear_loss, student_loss, teacher_hidden
from tests.support.processes import leave_group

rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
mesh, whole = init_device_mesh("cpu", (2,)), lm.token_batch(8)
parts = [{name: value[rows] for name, value in whole.items()} for rows in torch.arange(8).chunk(2)[rank].chunk(2)]
items = (whole["labels"][:, 1:] != -100).sum()

def three():
    return [*lm.teachers(), lm.causal_lm("phi", 24, seed=3).eval()]  # a head with a bias

def loss_of(model, batch, teachers, num_items):
    hidden = [teacher_hidden(teacher, batch) for teacher in teachers]
    return student_loss(model, batch, lambda states, head: linear_loss(
        states, head, hidden, batch["labels"], shift=True, hard_weight=0.5, temperature=2.0, num_items=num_items).loss)

def gradients(model):
    found = lm.gradients(model)
    return {name.removeprefix("module."): g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items()}

for kind in ("llama", "qwen2"):
    single = lm.causal_lm(kind)
    loss_of(single, whole, three(), items).backward()
    expected = lm.gradients(single)
    ways = ["ddp", "ddp and sharded teachers", "fsdp2", "fsdp2 of layers"]
    for way in [*ways, "fsdp2 of the head"] if kind == "llama" else ways:
        model, teachers = lm.causal_lm(kind), three()
        if way.startswith("ddp"):
            model = DistributedDataParallel(model)
        else:
            if way != "fsdp2":
                for layer in model.model.layers:
                    fully_shard(layer, mesh=mesh)
            if way == "fsdp2 of the head":
                fully_shard(model.lm_head, mesh=mesh)
            fully_shard(model, mesh=mesh)
        if way != "ddp":
            for teacher in teachers:
                if way == "fsdp2 of the head" and not teacher.config.tie_word_embeddings:
                    fully_shard(teacher.lm_head, mesh=mesh)
                fully_shard(teacher, mesh=mesh)
        for last, part in zip((False, True), parts):
            if not way.startswith("ddp"):
                model.set_requires_gradient_sync(last)
            with model.no_sync() if way.startswith("ddp") and not last else nullcontext():
                loss_of(model, part, teachers, items / 2).backward()
        lm.assert_gradients(gradients(model), expected)
        print(kind, way)
leave_group()
"""

TRAINER = """
import json, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from tests.support import distilled_runs as runs, language_models as lm
from tests.support.processes import leave_group
from transformers import TrainingArguments

settings = {**runs.SETTINGS, "max_steps": 3, "save_strategy": "no", "eval_strategy": "steps", "eval_steps": 3}
data = lm.TokenData(32, teacher_id=[i % 2 for i in range(32)])
trainer = runs.Mixed(
    lm.causal_lm(),
    TrainingArguments(sys.argv[1], **{**settings, "per_device_train_batch_size": int(sys.argv[2])}),
    train_dataset=data, eval_dataset=data, teachers=lm.teachers(), distillation_loss={**runs.LOSS, "entropy": True},
    teacher_column="teacher_id",
)
trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(data)
trainer.train()
Path(sys.argv[3]).write_text(json.dumps(trainer.state.log_history))
if torch.distributed.is_initialized():
    leave_group()
"""


def start(code: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), **environment}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(processes: list[subprocess.Popen[str]]) -> str:
    printed = ""
    for process in processes:
        printed, errors = process.communicate(timeout=500)
        assert process.returncode == 0, errors
    return printed


def test_gradients_of_two_processes(tmp_path: Path) -> None:
    printed = finish([start(GRADIENTS, rank, tmp_path / "store") for rank in range(2)])
    assert len(printed.strip().splitlines()) == 9


def test_a_trainer_in_two_processes(tmp_path: Path) -> None:
    """Losses, and the means over both processes' tokens that are logged."""
    finish([start(TRAINER, tmp_path / "one", 4, tmp_path / "one.json")])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    finish(
        [
            start(
                TRAINER, tmp_path / "two", 2, tmp_path / f"two{rank}.json", MASTER_ADDR="localhost", MASTER_PORT=port,
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
            )
            for rank in range(2)
        ]
    )  # fmt: skip
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two0"))
    assert len(one) == len(two)
    compared = 0
    for ours, theirs in zip(two, one, strict=True):
        for name, value in theirs.items():
            # Not eval_loss, which Trainer averages over batches, whose sizes differ here.
            if name == "loss" or name.removeprefix("eval_").startswith(("hard", "soft", "teacher", "entropy")):
                assert abs(ours[name] - value) <= 1e-4 * max(abs(value), 1e-3), name
                compared += 1
    assert compared == 3 * 8 + 7
