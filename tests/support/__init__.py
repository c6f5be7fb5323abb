"""Shared by the tests: cases, contracts, small models and data."""

import pytest

pytest.register_assert_rewrite(
    *(f"{__name__}.{name}" for name in ("tolerance", "op_contract", "row_contract", "loader_data"))
)
