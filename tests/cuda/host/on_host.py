"""Fixtures: backend="cuda" on CPU tensors, by the emulated device of this folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType

import pytest

from camkd_fast.backends import cuda as cuda_backend
from camkd_fast.backends import dispatch
from tests.cuda.host import build

THREADS = 64  # of a block: two warps, the fewest that merge


@pytest.fixture(scope="module")
def emulated() -> ModuleType:
    return build.load_module()


@pytest.fixture(autouse=True)
def cuda_on_the_host(emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """backend="cuda" for CPU tensors."""
    refusal = dispatch._refusal
    monkeypatch.setattr(dispatch, "_refusal", lambda name, t: None if name == "cuda" else refusal(name, t))
    monkeypatch.setattr(cuda_backend, "_C", emulated)
    monkeypatch.setattr(cuda_backend, "_device_of", lambda tensor: contextlib.nullcontext())
    monkeypatch.setattr(cuda_backend, "_stream_of", lambda tensor: 0)
    limit(emulated)
    yield


def limit(emulated: ModuleType, shared: int = 160 * 1024, cluster: int = 8, multiprocessors: int = 2) -> None:
    emulated.set_limits(multiprocessors, shared, 3 * (shared + 1024), 1 << 20, cluster, THREADS)
