"""Where tests/gpu runs: every backend on the GPU, or the compiled CPU backend on a machine without one.

The CPU run is a rehearsal of the tests, not of the kernels: it executes each test's own code, so that a mistake in it
does not show for the first time on a GPU machine. Tests of the GPU itself use the fixture `gpu` and are skipped.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from camkd_fast.backends import dispatch

CUDA = torch.device("cuda", 0)
NO_GPU = "no CUDA device"
# Compute capabilities, times ten, for which the tests compile the kernels: A100, Hopper, Blackwell, its consumer cards.
ARCHITECTURES = (80, 90, 100, 120)


class Place(NamedTuple):
    """A backend on a device."""

    device: torch.device
    backend: str

    @property
    def real(self) -> bool:
        return self.device.type == "cuda"


def _on_gpu(backend: str) -> object:
    state = dispatch.availability(backend)
    reason = NO_GPU if not torch.cuda.is_available() else f"backend {backend}: {state.reason}"
    skipped = not torch.cuda.is_available() or not state.usable
    return pytest.param(Place(CUDA, backend), id=backend, marks=pytest.mark.skipif(skipped, reason=reason))


REAL = [_on_gpu(backend) for backend in ("cuda", "triton", "reference")]
STAND_IN = Place(torch.device("cpu"), "cpu" if dispatch.availability("cpu").usable else "reference")
# Without a GPU one skipped line is enough for its three backends.
PLACES = REAL if torch.cuda.is_available() else [pytest.param(STAND_IN, id="rehearsal"), REAL[0]]
