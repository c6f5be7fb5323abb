"""Peak memory of the linear loss beyond its inputs, measured as the resident set of a process."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from camkd_fast import camkd_linear_loss
from camkd_fast.losses.formula import Formula

ROOT = Path(__file__).parents[2]
MB = 2**20

# Like the script of test_memory.py: the mark of the operating system is reset after the inputs exist and a call of one
# chunk has loaded all libraries, and the buffers that they keep for products of this size.
SCRIPT = """
import json, sys, torch
from camkd_fast import camkd_linear_loss

N, C, H, K, rows = map(int, sys.argv[1:6])
dtype, divergence = getattr(torch, sys.argv[6]), sys.argv[7]
torch.set_num_threads(2)

def resident(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

def inputs(N):
    hidden = [torch.empty(N, H, dtype=dtype).fill_(0.01) for _ in range(K + 1)]
    heads = [torch.empty(C, H, dtype=dtype).fill_(0.01) for _ in range(K + 1)]
    for i, x in enumerate((*hidden, *heads)):
        x[:, 0] = torch.arange(len(x)) % (3 + i)
    return hidden, heads, torch.arange(N) % C

def step(hidden, heads, target):
    student, head = hidden[0].requires_grad_(), heads[0].requires_grad_()
    kind = ("jsd", 0.5) if divergence == "jsd" else divergence
    camkd_linear_loss(
        student, head, hidden[1:], heads[1:], target, chunk_rows=rows, divergence=kind, logits_dtype=torch.float32
    ).loss.backward()

step(*inputs(rows))
arguments = inputs(N)
with open("/proc/self/clear_refs", "w") as reset:
    reset.write("5")
before = resident("VmRSS")
step(*arguments)
print(resident("VmHWM") - before)
"""


def measure(*arguments: object) -> int:
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.parametrize(
    ("dtype", "divergence"), [("float32", "forward_kl"), ("float32", "jsd"), ("bfloat16", "forward_kl")]
)
def test_one_chunk_both_gradients_and_32_mb(dtype: str, divergence: str) -> None:
    N, C, H, K, rows = 2048, 32000, 256, 2, 256
    used = measure(N, C, H, K, rows, dtype, divergence)
    chunk, itemsize = (K + 1) * rows * C * 4, 4 if dtype == "float32" else 2
    # The gradient of the head is added up in float32, and rounded once in backward.
    gradients = N * H * itemsize + C * H * (4 + (0 if dtype == "float32" else itemsize))
    assert used >= chunk / 2, "the measurement sees nothing"
    assert used <= chunk + gradients + 32 * MB, f"{used / MB:.1f} MB"


def test_the_chunks_decide() -> None:
    """Twice the rows take a chunk more; so the measurement would see logits that are held for longer."""

    def least(rows: int) -> int:  # of a few, since the allocator of a library keeps more at times
        return min(measure(2048, 32000, 64, 1, rows, "float32", "forward_kl") for _ in range(3))

    small, large = least(256), least(512)
    chunk = 2 * 256 * 32000 * 4
    assert 0.5 * chunk < large - small < 1.5 * chunk


def zeros_in_backward(loss: torch.Tensor) -> int:
    """Bytes of the tensors of zeros that a backward pass makes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        loss.backward()
    return sum(max(event.cpu_memory_usage, 0) for event in found.events() if event.name == "aten::zeros")


def test_backward_makes_no_zeros_for_other_outputs() -> None:
    """The operators also return gradients and statistics, for which autograd would make gradients of zeros."""
    N, C, H = 64, 4000, 32
    hidden, head = torch.randn(N, H, requires_grad=True), torch.randn(C, H, requires_grad=True)
    target = torch.arange(N)
    for reduction in ("mean", "none"):
        loss = camkd_linear_loss(hidden, head, [torch.randn(N, H)], [torch.randn(C, H)], target, reduction=reduction)
        assert zeros_in_backward(loss.loss.sum()) < 4 * N * H

    student = torch.randn(N, C, requires_grad=True)
    formula = Formula(weighting="uniform")
    row_stats, _ = torch.ops.camkd_fast.row_loss(
        student, [torch.randn(N, C)], target, *(None,) * 4, *formula.constants(), True, "reference"
    )
    assert zeros_in_backward(row_stats[0].sum()) < student.nbytes
