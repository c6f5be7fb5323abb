"""Peak memory beyond the inputs, measured as the resident set of a process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.backends import BACKENDS

ROOT = Path(__file__).parents[2]
MB = 2**20

# Reads the high-water mark of the operating system, reset after the inputs exist and a small call has loaded all
# libraries. Inputs are filled in place, because a generator that allocates would raise the mark.
SCRIPT = """
import json, sys, torch
from camkd_fast import camkd_loss, camkd_loss_and_grad

entry, backend, N, C, K, dtype = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6]), getattr(torch, sys.argv[6])
torch.set_num_threads(2)

def resident(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

def step(student, teachers, target):
    if entry == "camkd_loss":
        camkd_loss(student, teachers, target, backend=backend).loss.backward()
        return student.grad
    return camkd_loss_and_grad(student, teachers, target, backend=backend)[1]

def inputs(N):
    student, *teachers = (torch.empty(N, C, dtype=dtype).fill_(0.01) for _ in range(K + 1))
    for z in (student, *teachers):
        z[:, :: max(C // 64, 1)] = torch.randn(N, 1)
    return student.requires_grad_(entry == "camkd_loss"), teachers, torch.arange(N) % C

step(*inputs(8))
arguments = inputs(N)
with open("/proc/self/clear_refs", "w") as reset:
    reset.write("5")
before = resident("VmRSS")
grad = step(*arguments)
print(json.dumps({"beyond": resident("VmHWM") - before, "gradient": grad.numel() * grad.element_size()}))
"""


def measure(entry: str, backend: str, N: int, C: int, K: int, dtype: str) -> dict[str, int]:
    command = [sys.executable, "-c", SCRIPT, entry, backend, str(N), str(C), str(K), dtype]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


# 2048 x 32000, K = 3, float32 is the documented size. The gradients of the others are small and hide less.
@pytest.mark.parametrize("entry", ["camkd_loss", "camkd_loss_and_grad"])
@pytest.mark.parametrize(
    ("N", "C", "K", "dtype"), [(2048, 32000, 3, "float32"), (512, 128256, 3, "bfloat16"), (65536, 100, 5, "float32")]
)
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_one_gradient_and_16_mb(backend, N, C, K, dtype, entry):
    used = measure(entry, backend, N, C, K, dtype)
    row_stats = 4 * (3 + 3 * K) * N
    assert used["beyond"] >= used["gradient"] / 2, "the measurement sees nothing"
    assert used["beyond"] <= used["gradient"] + row_stats + 16 * MB, f"{used['beyond'] / MB:.1f} MB"


def test_the_measurement_sees_a_copy():
    # The reference makes float32 copies of every input.
    used = measure("camkd_loss", "reference", 512, 32000, 3, "float32")
    assert used["beyond"] > 2 * used["gradient"] + 16 * MB
