"""Products of float32 matrices on a CPU, by either library."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from camkd_fast.losses import cpu_products, projection
from camkd_fast.losses.cpu_products import prefers_onednn, product, product_of_transposed
from tests.support.linear_cases import assert_rule, make_linear_case
from tests.support.tolerance import assert_accurate

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "transposed": lambda x: x.t().contiguous().t(),
    "columns of a wider one": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "rows of a longer one, transposed": lambda x: torch.cat([x.t(), x.t()], dim=1)[:, : x.shape[0]].t(),
}


@pytest.fixture(params=["onednn", "mkl"])
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Tensor, ...]]]:
    """The calls of oneDNN, which is taken whatever the processor is, or never."""
    found: list[tuple[Tensor, ...]] = []
    by_onednn = cpu_products._by_onednn

    def recorded(a: Tensor, b: Tensor) -> Tensor:
        found.append((a, b))
        return by_onednn(a, b)

    monkeypatch.setattr(cpu_products, "prefers_onednn", lambda: request.param == "onednn")
    monkeypatch.setattr(cpu_products, "_by_onednn", recorded)
    yield found
    assert bool(found) == (request.param == "onednn")


@pytest.mark.parametrize("second", LAYOUTS)
@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("sizes", [(7, 33, 5), (1, 1, 1), (64, 1, 300), (3, 129, 1)])
def test_every_layout(calls: list[tuple[Tensor, ...]], first: str, second: str, sizes: tuple[int, int, int]) -> None:
    m, k, n = sizes
    torch.manual_seed(0)
    a, b = LAYOUTS[first](torch.randn(m, k)), LAYOUTS[second](torch.randn(k, n))
    R, bound = a.double() @ b.double(), torch.finfo(torch.float32).eps * float((a.abs() @ b.abs()).max())
    for ours in (product(a, b), product_of_transposed(a.t(), b)):
        assert_accurate(ours, R, a @ b, floor=bound)


def test_a_part_of_a_wider_matrix_is_copied_for_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As its second factor such a matrix takes a thousand times as long."""
    taken = []
    real = torch.ops.mkldnn._linear_pointwise

    class Recorder:
        def _linear_pointwise(self, a: Tensor, b: Tensor, *others: object) -> Tensor:
            taken.append(b)
            return real(a, b, *others)

    monkeypatch.setattr(cpu_products, "prefers_onednn", lambda: True)
    monkeypatch.setattr(torch.ops, "mkldnn", Recorder())
    wide = torch.randn(40, 90)
    for b in (wide[:, 10:60], wide[:, 10:60].t(), wide, wide.t()):
        product(torch.randn(3, b.shape[0]), b)
        product_of_transposed(b, torch.randn(b.shape[0], 3))
    assert len(taken) == 8
    assert all(b.is_contiguous() or b.t().is_contiguous() for b in taken)


@pytest.mark.parametrize("empty", [(0, 4, 5), (3, 0, 5), (3, 4, 0)], ids=str)
def test_empty_matrices(monkeypatch: pytest.MonkeyPatch, empty: tuple[int, int, int]) -> None:
    monkeypatch.setattr(cpu_products, "prefers_onednn", lambda: True)
    m, k, n = empty
    a, b = torch.zeros(m, k), torch.zeros(k, n)
    assert torch.equal(product(a, b), torch.zeros(m, n))
    assert torch.equal(product_of_transposed(a.t(), b), torch.zeros(m, n))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_stay_with_pytorch(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(cpu_products, "prefers_onednn", lambda: True)
    a, b = torch.randn(4, 6).to(dtype), torch.randn(6, 5).to(dtype)
    assert torch.equal(product(a, b), a @ b)
    assert product_of_transposed(a.t(), b).dtype == dtype


@pytest.mark.parametrize("onednn", [True, False], ids=["onednn", "mkl"])
def test_the_linear_loss_by_either_library(monkeypatch: pytest.MonkeyPatch, onednn: bool) -> None:
    for module in (cpu_products, projection):
        monkeypatch.setattr(module, "prefers_onednn", lambda: onednn)
    assert_rule(make_linear_case(60, 1500, (32, 48, 16), hard_weight=1.0), chunk_rows=25)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_f": True, "cpu_name": "AMD EPYC"}, True),
        ({"avx512_f": False, "cpu_name": "AMD EPYC"}, False),
        ({"avx512_f": True, "cpu_name": "Intel(R) Xeon(R)"}, False),
        ({}, False),
    ],
)
def test_processors(monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, object], expected: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert prefers_onednn.__wrapped__() == (expected and torch.backends.mkldnn.is_available())
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not prefers_onednn.__wrapped__()


def test_older_pytorch_has_no_names_of_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not prefers_onednn.__wrapped__()
