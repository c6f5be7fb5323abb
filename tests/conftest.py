"""Settings of the whole suite: poisoned memory, interpreted Triton without a GPU, fixed threads, tested backends."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

# Set before torch loads OpenMP. Threads that spin between regions make the suite ten times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Set before CUDA starts. Deterministic algorithms refuse cuBLAS without it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

# Set before anything imports triton, which reads it once.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import pytest

from benchmarks import verdict
from tests.support.backends import BACKENDS
from tests.support.systems import SYSTEMS, become

# torch.empty and similar return NaN, so that a kernel that leaves an element unwritten cannot pass by luck.
torch.utils.deterministic.fill_uninitialized_memory = True
torch.use_deterministic_algorithms(True)
torch.set_num_threads(2)

hypothesis.settings.register_profile("camkd", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("camkd")


# A suite started by nohup or in the background inherits ignored signals, and so would the processes that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Record the verdict: measurements are published only for a tree whose tests passed."""
    if not hasattr(session.config, "workerinput"):  # a worker of pytest-xdist has run a part only
        verdict.note(session.config, exitstatus)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Refuse sets of parameters: their order differs by process, and pytest-xdist compares the workers' lists."""
    for mark in metafunc.definition.iter_markers("parametrize"):
        if isinstance(mark.args[1], set | frozenset):
            raise TypeError(f"parametrize({mark.args[0]!r}): expected an ordered sequence, got {mark.args[1]!r}")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Headers of the tests' image files do not stay in the user's cache; processes that tests start inherit it."""
    os.environ["CAMKD_FAST_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20220100)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For small models, where a second thread gains nothing and is slow on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=SYSTEMS)
def other_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the emulated operating systems."""
    become(request.param, monkeypatch)
    return str(request.param)
