"""The two paths of a call on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.fixture
def general(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """A switch between one call of C++ and the general path."""
    cpu_backend = pytest.importorskip("camkd_fast.backends.cpu")

    def only_general(yes: bool) -> None:
        monkeypatch.setattr(cpu_backend.whole_losses, "connected", not yes)

    return only_general
