"""What repeated calls on a CPU leave behind in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.backends import BACKENDS

if "cpu" not in BACKENDS:
    pytest.skip("a build without the compiled module", allow_module_level=True)

RESIDENT = """
import resource, torch
from camkd_fast import (
    camkd_feature_loss_and_grad, camkd_loss, camkd_loss_and_grad, confidence_weights, weighted_feature_loss
)

def resident():
    with open("/proc/self/statm") as numbers:
        return int(numbers.read().split()[1]) * 4 // 1024  # MB
"""


def printed(script: str) -> list[int]:
    """The numbers that a script prints, which has `resident` and the functions of the losses."""
    command = [sys.executable, "-c", RESIDENT + script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return [int(word) for word in done.stdout.split()]


def test_logit_losses() -> None:
    (grown,) = printed("""
student, teacher, target = torch.randn(512, 400), torch.randn(512, 400), torch.randint(400, (512,))
learning = student.clone().requires_grad_()
for step in range(600):
    camkd_loss_and_grad(student, [teacher], target)
    camkd_loss(learning, [teacher], target).loss.backward()
    if step == 100:
        before = resident()
print(resident() - before)
""")
    assert grown < 40  # 500 steps of 0.8 MB and more


def test_feature_losses() -> None:
    (grown,) = printed("""
student, teachers = ([torch.randn(16, 40, 20, 20) for _ in range(2)] for _ in range(2))
logits, target = [torch.randn(16, 1000) for _ in range(2)], torch.arange(16)
leaves = [x.clone().requires_grad_() for x in (*student, *logits)]
for step in range(300):
    camkd_feature_loss_and_grad(student, teachers, logits, target)
    weights, _ = confidence_weights(leaves[2:], target)
    weighted_feature_loss(leaves[:2], teachers, weights).backward()
    for leaf in leaves:
        leaf.grad = None
    if step == 100:
        before = resident()
print(resident() - before)
""")
    assert grown < 40  # 200 steps of 2 MB and more


@pytest.mark.parametrize("options", ["", "temperature=3.3, divergence='reverse_kl'", "divergence=('jsd', 0.5)"])
def test_scratch_of_a_wide_row_is_released(options: str) -> None:
    """128 MiB and more of one thread. A gradient of 32 MiB may be kept for the next call."""
    kept, faults = printed(f"""
torch.set_num_threads(1)

def call(C):
    teachers = torch.randn(1, C).expand(3, 1, C).unbind()
    student, target = torch.randn(1, C), torch.zeros(1, dtype=torch.int64)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    camkd_loss_and_grad(student, teachers, target, {options})
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults

call(1000)
before = resident()
call(2**23)
print(resident() - before)
call(2**17)
print(call(2**17))
""")
    assert kept < 90
    assert faults < 2**17 * 16 // 4096  # the 2 MB of an ordinary row are kept
