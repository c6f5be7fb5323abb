"""Which backends the tests run on a CPU."""

from __future__ import annotations

import importlib.util
import os

import pytest

# CAMKD_FAST_CPU=0 says that there is no compiled module, and must be true; otherwise a missing module fails its tests.
WITHOUT_MODULE = os.environ.get("CAMKD_FAST_CPU") == "0"
if WITHOUT_MODULE and importlib.util.find_spec("camkd_fast._C") is not None:
    raise pytest.UsageError("CAMKD_FAST_CPU=0, but the compiled module is there: its tests are not to be left out")
BACKENDS = ("reference",) if WITHOUT_MODULE else ("reference", "cpu")
