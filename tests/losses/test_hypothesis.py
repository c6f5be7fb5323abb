"""Random shapes, dtypes, layouts, masks, weightings, temperatures and reductions against float64."""

import pytest
from hypothesis import HealthCheck, given, settings

from tests.support.backends import BACKENDS
from tests.support.random_cases import cases, check

CHECKS = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@pytest.mark.parametrize("backend", BACKENDS)
@settings(CHECKS, max_examples=150)
@given(case=cases())
def test_random_cases(backend, case):
    check(case, backend)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS[1:])
@settings(CHECKS, max_examples=2500)
@given(case=cases())
def test_thousands_of_random_cases(backend, case):
    check(case, backend)
