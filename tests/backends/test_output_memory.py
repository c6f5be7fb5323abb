"""Recycled memory of large outputs: one owner at a time, bounded, safe under threads and fork."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor

from camkd_fast import camkd_loss_and_grad
from tests.support.backends import BACKENDS

if "cpu" not in BACKENDS:
    pytest.skip("a build without the compiled module", allow_module_level=True)

from camkd_fast.backends import cpu as cpu_backend

MB = 2**20


def output(megabytes: float) -> Tensor:
    return cpu_backend.new_output(int(megabytes * MB) // 4, 1, torch.float32)


@pytest.fixture(autouse=True)
def _empty_cache() -> None:
    """Replace the blocks that earlier tests freed by four of a size that no test allocates."""
    blocks = [output(400) for _ in range(4)]
    del blocks


# The system may take back the pages of a freed block of 40 MB, but not those of 8 MB.
@pytest.mark.parametrize("megabytes", [8, 40])
def test_a_freed_block_is_reused(megabytes: int) -> None:
    first = output(megabytes).fill_(7.0)
    address = first.data_ptr()
    del first
    again = output(megabytes)
    assert again.data_ptr() == address
    assert address % (2 * MB) == 0
    assert again.isnan().all()  # poisoned by the suite's settings, without the values of its last owner
    again.fill_(1.0)
    assert float(again.sum(dtype=torch.float64)) == again.numel()


def test_a_block_more_than_twice_too_large_is_not_reused() -> None:
    first = output(40)
    address = first.data_ptr()
    del first
    small = output(8)
    assert small.data_ptr() != address
    fitting = output(21)
    assert fitting.data_ptr() == address
    del fitting
    assert output(41).data_ptr() != address


def test_small_outputs_are_allocated_by_torch() -> None:
    assert output(0.5).untyped_storage().resizable()
    assert not output(1).untyped_storage().resizable()


def test_blocks_in_use_are_not_reused() -> None:
    held = [output(8).fill_(i) for i in range(7)]
    del held[::2]
    held += [output(8).fill_(10 + i) for i in range(6)]
    assert [int(block[-1]) for block in held] == [1, 3, 5, 10, 11, 12, 13, 14, 15]
    for block in held:
        assert bool((block == block[-1]).all())


def test_gradients_kept_by_the_caller_do_not_change() -> None:
    torch.manual_seed(0)
    student, teacher, target = torch.randn(512, 2048), torch.randn(512, 2048), torch.randint(2048, (512,))
    kept, copies = [], []
    for step in range(6):
        _, grad = camkd_loss_and_grad(student * step, [teacher], target, backend="cpu")
        kept.append(grad)
        copies.append(grad.clone())
    for grad, copy in zip(kept, copies, strict=True):
        assert torch.equal(grad, copy)
    assert len({grad.data_ptr() for grad in kept}) == 6


def test_threads() -> None:
    wrong: list[tuple[int, int]] = []

    def work(me: int) -> None:
        for i in range(60):
            block = output(2 + me % 2)
            block.fill_(me)
            sample = block[::997].clone()
            if not bool((sample == me).all()) or int(block[-1]) != me:
                wrong.append((me, i))

    threads = [threading.Thread(target=work, args=(me,)) for me in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def run(script: str) -> list[int]:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    return [int(word) for word in done.stdout.split()]


def test_freed_memory_is_bounded() -> None:
    script = """
import torch
from camkd_fast.backends import cpu as cpu_backend

def resident():
    with open("/proc/self/statm") as numbers:
        return int(numbers.read().split()[1]) * 4096 // 2**20

torch.zeros(10).sum()
before = resident()
blocks = [cpu_backend.new_output(2**22, 1, torch.float32).zero_() for _ in range(12)]
held = resident() - before
del blocks
print(held, resident() - before)
"""
    held, freed = run(script)
    assert held >= 12 * 16
    assert freed <= 4 * 16 + 4


def test_a_child_after_fork() -> None:
    script = """
import os, torch
from camkd_fast.backends import cpu as cpu_backend

torch.set_num_threads(1)
def output(value):
    return cpu_backend.new_output(2**22, 1, torch.float32).fill_(value)

kept = output(1)
freed = output(2)
del freed
child = os.fork()
mine = output(3 if child else 4)
right = bool((mine == (3 if child else 4)).all()) and bool((kept == 1).all())
if not child:
    os._exit(0 if right else 1)
print(int(right), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run(script) == [1, 0]
