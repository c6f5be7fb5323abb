"""Conditions of the whole suite: poisoned memory, interpreted Triton without a GPU, fixed threads, backends to test."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before torch loads OpenMP: threads that spin between regions make the suite ten times slower on a shared machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Before CUDA starts: cuBLAS is refused under deterministic algorithms without it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

# Before anything imports triton, which reads it once.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import pytest

from benchmarks import verdict
from tests.support.backends import BACKENDS

# torch.empty and its relatives return NaN: a kernel that leaves an element unwritten cannot pass by luck.
torch.utils.deterministic.fill_uninitialized_memory = True
torch.use_deterministic_algorithms(True)
torch.set_num_threads(2)

hypothesis.settings.register_profile("camkd", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("camkd")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Whether this tree is green is what published measurements depend on."""
    if not hasattr(session.config, "workerinput"):  # one of pytest-xdist's processes, which has seen a part of it
        verdict.note(session.config, exitstatus)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20220100)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For models so small that a second thread gains nothing, and costs much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
