"""Which backends the tests run on a CPU."""

from __future__ import annotations

import importlib.util
import os

import pytest

# CAMKD_FAST_CPU=0 declares that there is no compiled module. Without it, tests of a missing module fail.
WITHOUT_MODULE = os.environ.get("CAMKD_FAST_CPU") == "0"
if WITHOUT_MODULE and importlib.util.find_spec("camkd_fast._C") is not None:
    raise pytest.UsageError("CAMKD_FAST_CPU=0, but camkd_fast._C exists, so its tests must run")
BACKENDS = ("reference",) if WITHOUT_MODULE else ("reference", "cpu")
