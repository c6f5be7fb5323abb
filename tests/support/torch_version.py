"""What older releases of torch lack, and the tests that need it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])

# Without them one call into C++ is not taken, and results are the same.
HAS_C_FUNCTIONS = hasattr(Tensor, "__dlpack_c_exchange_api__")
OLD_TORCH = "torch has C functions for tensors from 2.10 on"
HAS_MUON = hasattr(torch.optim, "Muon")
# From 2.13 on a recording of a model's calls compiles once, and no hook stays on a layer (models/recorded.py).
COMPILATIONS = 1 if TORCH >= (2, 13) else 2  # at most, of a model whose own forward is called
needs_compiled_student = pytest.mark.skipif(TORCH < (2, 11), reason="a compiled student's map is not seen in torch 2.8")
needs_recording = pytest.mark.skipif(TORCH < (2, 13), reason="a hook stays on a named layer before torch 2.13")
needs_muon = pytest.mark.skipif(not HAS_MUON, reason="torch.optim.Muon came with torch 2.9")
needs_dtensor_rules = pytest.mark.skipif(TORCH < (2, 11), reason="DTensor lacks operators of the losses before 2.11")
needs_fsdp_over_gloo = pytest.mark.skipif(TORCH < (2, 10), reason="FSDP2 over gloo has wrong gradients in 2.8")


def skip_before_triton(*version: int) -> None:
    """For a module of tests."""
    if tuple(int(part) for part in pytest.importorskip("triton").__version__.split(".")[:2]) < version:
        pytest.skip(f"of Triton {'.'.join(map(str, version))} and later", allow_module_level=True)
