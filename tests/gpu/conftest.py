"""Fixtures of the GPU tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.support.gpu import CUDA, PLACES, REAL, Place


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Place:
    return request.param


@pytest.fixture(params=REAL if torch.cuda.is_available() else REAL[:1])
def gpu(request: pytest.FixtureRequest) -> Place:
    return request.param


@pytest.fixture
def device() -> torch.device:
    """For tests that do not depend on a backend."""
    return CUDA if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture
def products_in_float32() -> Iterator[None]:
    """TF32 would round the inputs of float32 products to 10 bits."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture
def nondeterministic() -> None:
    """For models: their pooling has no deterministic backward pass on a GPU."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True)
