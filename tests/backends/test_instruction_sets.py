"""Every instruction set of this processor gives an accurate loss; the others are refused by name."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# Widths around the vector width of each set, several column blocks, and a row shared by all threads.
SCRIPT = """
import torch
from camkd_fast import camkd_loss_and_grad, confidence_weights, weighted_feature_loss
from camkd_fast.backends import cpu as cpu_backend

torch.set_num_threads(2)
torch.manual_seed(0)
eps = {torch.float32: 2.0**-21, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

def close(actual, truth, tolerance):
    error = (actual.double() - truth.double()).square().mean().sqrt()
    assert error <= tolerance * truth.double().square().mean().sqrt(), (actual, truth)

for dtype in eps:
    for N, C in [(9, 1), (9, 3), (5, 8), (4, 15), (4, 17), (3, 100), (2, 2049), (1, 40000)]:
        for temperature in (1.0, 2.0, 4.0, 2.5):
            student, *teachers = ((3 * torch.randn(N, C)).to(dtype) for _ in range(4))
            if C > 8:
                for z in (student, *teachers):
                    z[:, 5:7] = -torch.inf
            target = torch.randint(min(C, 5), (N,))
            wide = [z.double() for z in (student, *teachers)]
            out, grad = camkd_loss_and_grad(student, teachers, target, temperature=temperature, backend="cpu")
            truth, truth_grad = camkd_loss_and_grad(wide[0], wide[1:], target, temperature=temperature)
            close(out.loss, truth.loss, 2.0**-19)
            close(out.weights, truth.weights, 2.0**-19)
            if C > 1:
                close(grad, truth_grad, eps[dtype])
    weights, ce = confidence_weights(teachers, target, backend="cpu")
    close(ce, confidence_weights(wide[1:], target)[1], 2.0**-20)
    r, f = torch.randn(2, 3, 37).to(dtype)
    w = torch.rand(1, 3)
    actual = weighted_feature_loss([r], [f], w, backend="cpu")
    close(actual, weighted_feature_loss([r.double()], [f.double()], w.double()), 2.0**-20)
print(cpu_backend.instruction_set())
"""


def run(name: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"CAMKD_FAST_ISA": name}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
def test_accurate(name: str) -> None:
    done = run(name)
    if done.returncode == 0:
        assert done.stdout.split()[-1] == name
    else:
        assert f"CAMKD_FAST_ISA={name} does not run on this processor" in done.stderr, done.stderr
        assert name != "baseline"


def test_unknown_name() -> None:
    done = run("sse9")
    assert done.returncode != 0
    assert "CAMKD_FAST_ISA must be baseline, avx2 or avx512, got sse9" in done.stderr
