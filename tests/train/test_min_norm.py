"""AEKD's weights: the solver against brute force, against scikit-learn, and against the optimality conditions."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, is_fake

from camkd_fast.backends import dispatch
from camkd_fast.losses import min_norm
from camkd_fast.losses.min_norm import min_norm_weights


@pytest.fixture(params=["torch", pytest.param("triton", marks=pytest.mark.slow)], autouse=True)
def _solver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's operations, and Triton's kernel in the interpreter."""
    if request.param == "triton":
        if not dispatch.interpreting():
            pytest.skip("needs Triton's interpreter")
        kernels = pytest.importorskip("camkd_fast.kernels")
        monkeypatch.setattr(min_norm, "min_norm_solver", lambda gram: None if is_fake(gram) else kernels)


TOLERANCE = 1e-9  # relative to the largest g_k . g_k, from the docstring


def vectors(K: int, D: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(K, D, dtype=torch.float64, generator=generator)


def squared_norm(gram: Tensor, weights: Tensor) -> float:
    return float(weights @ gram @ weights)


def brute_force(gram: Tensor, cap: float) -> float:
    """Minimum of the squared norm over all choices of weights at 0, at the cap and in between."""
    K = gram.shape[0]
    best = float("inf")
    for places in itertools.product(("zero", "free", "cap"), repeat=K):
        free = [k for k in range(K) if places[k] == "free"]
        weights = torch.tensor([cap if place == "cap" else 0.0 for place in places], dtype=torch.float64)
        rest = 1.0 - float(weights.sum())
        if free:
            # Stationary in the free weights, whose sum is the remainder.
            n = len(free)
            system = torch.zeros(n + 1, n + 1, dtype=torch.float64)
            system[:n, :n] = gram[free][:, free]
            system[:n, n] = -1.0
            system[n, :n] = 1.0
            right = torch.cat([-(gram[free] @ weights), torch.tensor([rest], dtype=torch.float64)])
            solution = torch.linalg.lstsq(system, right.unsqueeze(1), driver="gelsd").solution[:n, 0]
            weights[free] = solution
        if weights.min() >= -1e-9 and weights.max() <= cap + 1e-9 and abs(float(weights.sum()) - 1.0) < 1e-9:
            best = min(best, squared_norm(gram, weights))
    return best


def optimality_gap(gram: Tensor, weights: Tensor, cap: float) -> float:
    """Upper bound of the excess of the squared norm: the linear program of its slope at `weights`."""
    slope = 2 * gram @ weights
    least, rest = 0.0, 1.0
    for k in slope.argsort().tolist():
        part = min(cap, rest)
        least += part * float(slope[k])
        rest -= part
    return float(weights @ slope) - least


@pytest.mark.parametrize("cap", [1.0, 0.6, 0.5, 0.35])
@pytest.mark.parametrize(("K", "D"), [(2, 3), (3, 50), (4, 2), (5, 1), (5, 8)])
def test_brute_force_finds_nothing_shorter(K: int, D: int, cap: float) -> None:
    for seed in range(5):
        g = vectors(K, D, seed) + seed * vectors(1, D, 99)  # increasingly similar vectors
        gram = g @ g.T
        cap_k = max(cap, 1 / K)
        weights = min_norm_weights(gram, cap)
        assert weights.min() >= 0 and weights.max() <= cap_k + 1e-12
        assert float(weights.sum()) == pytest.approx(1.0, abs=1e-12)
        excess = squared_norm(gram, weights) - brute_force(gram, cap_k)
        assert -TOLERANCE <= excess / float(gram.diagonal().max()) <= TOLERANCE


@pytest.mark.parametrize(("K", "cap"), [(3, 0.6), (2, 0.6), (5, 0.6), (8, 0.2), (16, 0.1)])
def test_scikit_learn_agrees(K: int, cap: float) -> None:
    """The problem is the dual of a one-class SVM with nu = 1 / (K cap) and coefficients w / cap."""
    svm = pytest.importorskip("sklearn.svm")
    for seed in range(6):
        g = vectors(K, K + 4, seed)
        gram = g @ g.T
        model = svm.OneClassSVM(kernel="precomputed", nu=1 / (K * cap), tol=1e-12).fit(gram.numpy())
        theirs = torch.zeros(K, dtype=torch.float64)
        theirs[model.support_] = torch.from_numpy(model.dual_coef_[0])
        theirs /= theirs.sum()
        # Absolute, since the weights sum to 1 and some are 0.
        torch.testing.assert_close(min_norm_weights(gram, cap), theirs, atol=1e-6, rtol=0)


@given(
    K=st.integers(2, 16),
    D=st.integers(1, 40),
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([0.0, 2.0, 6.0, 12.0]),
    cap=st.sampled_from([1.0, 0.6, 0.5, 0.3, 0.0]),
    shape=st.sampled_from(["free", "twins", "zeros", "one direction", "nearly equal", "float32"]),
)
def test_no_gram_matrix_defeats_it(K: int, D: int, seed: int, spread: float, cap: float, shape: str) -> None:
    g = vectors(K, D, seed) * 10 ** (spread * (torch.rand(K, 1, dtype=torch.float64) - 0.5))
    if shape == "twins":
        g[0] = g[-1]
    elif shape == "zeros":
        g[: K // 2] = 0
    elif shape == "one direction":
        g = g[:, :1] * vectors(1, D, 1)
    elif shape == "nearly equal":
        g = vectors(1, D, 2) + 1e-7 * g / g.abs().max()
    gram = g @ g.T
    if shape == "float32":
        gram = gram.float()
    weights = min_norm_weights(gram, cap)
    cap = max(cap, 1 / K)
    assert weights.dtype == torch.float64 and weights.shape == (K,)
    assert weights.min() >= 0 and weights.max() <= cap + 1e-9
    assert float(weights.sum()) == pytest.approx(1.0, abs=1e-12)
    assert optimality_gap(gram.double(), weights, cap) <= TOLERANCE * float(gram.diagonal().max())


@pytest.mark.parametrize("gram", [torch.zeros(3, 3), torch.ones(3, 3), 1e30 * torch.ones(3, 3), torch.eye(3)])
def test_exchangeable_vectors_weigh_the_same(gram: Tensor) -> None:
    torch.testing.assert_close(min_norm_weights(gram, 0.6), torch.ones(3).double() / 3)


def test_known_answers() -> None:
    # Orthogonal vectors: w_k is proportional to 1 / |g_k|^2, until the cap binds.
    gram = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    torch.testing.assert_close(min_norm_weights(gram), torch.tensor([0.8, 0.2], dtype=torch.float64))
    torch.testing.assert_close(min_norm_weights(gram, 0.6), torch.tensor([0.6, 0.4], dtype=torch.float64))
    assert min_norm_weights(torch.tensor([[7.0]]), 0.6).tolist() == [1.0]


def test_a_gradient_that_is_not_finite_cannot_pass_unnoticed() -> None:
    gram = torch.eye(3)
    gram[1, 1] = float("nan")
    assert min_norm_weights(gram, 0.6).isnan().all()


def test_no_number_is_read_back_from_the_device() -> None:
    """On tensors without data a host synchronisation fails."""
    with FakeTensorMode():
        assert min_norm_weights(torch.ones(3, 3), 0.6).shape == (3,)


def test_it_compiles_into_one_graph_and_records_no_gradient() -> None:
    g = vectors(3, 7, 0).requires_grad_()
    compiled = torch.compile(lambda gram: min_norm_weights(gram, 0.6), fullgraph=True, backend="aot_eager")
    gram = g @ g.T
    weights = compiled(gram)
    assert not weights.requires_grad
    torch.testing.assert_close(weights, min_norm_weights(gram, 0.6), rtol=0, atol=0)
    assert not min_norm_weights(gram, 0.6).requires_grad
    torch.library.opcheck(torch.ops.camkd_fast.min_norm_weights.default, (gram.detach(), 0.6))


@pytest.mark.parametrize("K", [2, 3, 5, pytest.param(16, marks=pytest.mark.slow)])
def test_the_kernel_agrees_with_the_operations(K: int) -> None:
    if not dispatch.interpreting():
        pytest.skip("needs Triton's interpreter")
    kernels = pytest.importorskip("camkd_fast.kernels")
    for seed, cap in enumerate((1.0, 0.6, 1.5 / K)):
        g = vectors(K, K + 2, seed)
        if seed == 1:
            g[0] = g[-1]
        gram = (g @ g.T).float()
        found = kernels.min_norm(gram, cap, min_norm.STEPS, min_norm.FLOOR)
        torch.testing.assert_close(found, min_norm_weights(gram, cap), rtol=1e-6, atol=1e-8)
    gram[0, 1] = float("nan")
    assert kernels.min_norm(gram, 0.6, min_norm.STEPS, min_norm.FLOOR).isnan().all()
    gram[0, 1] = gram[1, 0] = float("inf")
    assert kernels.min_norm(gram, 0.6, min_norm.STEPS, min_norm.FLOOR).isnan().all()


def test_gpus_take_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """In an ordinary call; elsewhere PyTorch's operations."""
    on_gpu = SimpleNamespace(is_cuda=True)
    monkeypatch.setattr(dispatch, "availability", lambda name: SimpleNamespace(usable=name == "triton"))
    monkeypatch.setattr(dispatch, "_module", lambda name: name)
    for ordinary in (True, False):
        monkeypatch.setattr(dispatch.memory, "is_ordinary", lambda tensors: ordinary)  # noqa: B023
        assert dispatch.min_norm_solver(on_gpu) == ("triton" if ordinary else None)
    assert dispatch.min_norm_solver(torch.eye(3)) is None
