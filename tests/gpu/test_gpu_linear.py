"""The linear loss on a GPU: numbers, chunks, memory, synchronisation, CUDA graphs and 64-bit indexing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from camkd_fast import camkd_linear_loss
from tests.support.gpu import Place
from tests.support.linear_cases import LinearCase, LinearResult, evaluate, make_linear_case, run, unfused
from tests.support.tolerance import assert_accurate, assert_near, rms, unit

F32, BF16 = torch.float32, torch.bfloat16
DIVERGENCES = ["forward_kl", "reverse_kl", ("jsd", 0.3), ("skew", 0.2)]


def on(case: LinearCase, device: torch.device) -> LinearCase:
    def moved(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(moved, x))
        return x.to(device) if isinstance(x, Tensor) else x

    names = [name for name in case.__dataclass_fields__ if name != "options"]
    return case.with_(**{name: moved(getattr(case, name)) for name in names}).with_(
        **{name: moved(value) for name, value in case.options.items() if isinstance(value, Tensor)}
    )


def back(result: LinearResult) -> LinearResult:
    return LinearResult(*(x if x is None else x.cpu() for x in result))


@pytest.fixture(autouse=True)
def _products_in_float32() -> Any:
    """TF32 would round the inputs of float32 products to 10 bits."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("C", [1128, 32000])
def test_float32(place: Place, C: int, divergence: Any) -> None:
    """H is no multiple of 64, N and the chunks none of 8."""
    case = make_linear_case(
        61, C, (40, 72, 24), ignored=0.2, hard_weight=1.0, divergence=divergence, temperature=2.0, z_loss_weight=0.01
    )
    R, N = unfused(case, torch.float64), unfused(case, torch.float32)
    ours = back(run(on(case, place.device), chunk_rows=23, backend=place.backend))
    for name, a, r, n in zip(LinearResult._fields, ours, R, N, strict=True):
        floor = 8 * torch.finfo(F32).eps * (1 + float(r.abs().max()))
        assert_accurate(a, r, n, name, 0.0 if name.startswith("grad") else floor)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("logits_dtype", [F32, BF16])
def test_bfloat16(place: Place, logits_dtype: torch.dtype, entropy: bool) -> None:
    """Models in bfloat16 are about as near to float64 as one rounding of the results, with float32 logits. Without
    entropies CUDA C++ takes the kernel that is specialised to a number of teachers.
    """
    case = make_linear_case(64, 4000, (64, 96, 32), BF16, hard_weight=1.0, ignored=0.1)
    R = unfused(case, torch.float64)
    ours = back(
        run(on(case, place.device), logits_dtype=logits_dtype, chunk_rows=20, entropy=entropy, backend=place.backend)
    )
    for name in ("grad_hidden", "grad_head"):
        a, r = getattr(ours, name).double(), getattr(R, name)
        assert rms(a - r) <= (2 if logits_dtype == F32 else 6) * unit(BF16) * rms(r), name
    assert_near(ours.loss, R.loss.float(), 1e-4 if logits_dtype == F32 else 1e-2)


def test_the_chunks_decide_only_the_order_of_sums(place: Place) -> None:
    case = on(make_linear_case(1024, 500, (32, 48, 16), hard_weight=1.0, ignored=0.1), place.device)
    whole = run(case, chunk_rows=1024, backend=place.backend)
    for rows in (37, 512):
        ours, again = (run(case, chunk_rows=rows, backend=place.backend) for _ in range(2))
        assert_near(ours.loss, whole.loss, 1e-6)
        for name in ("grad_hidden", "grad_head", "grad_bias"):
            assert_near(getattr(ours, name), getattr(whole, name), 1e-5, name)
        assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


def test_routing(place: Place) -> None:
    weights = torch.nn.functional.one_hot(torch.arange(600) % 3, 3).t().float()
    case = make_linear_case(600, 40, (8, 12, 6, 9), hard_weight=1.0, weighting=weights)
    ours, expected = back(run(on(case, place.device), backend=place.backend)), run(case, backend="reference")
    for name, a, b in zip(LinearResult._fields, ours, expected, strict=True):
        assert_near(a, b, 1e-5, name)


@pytest.mark.parametrize("entropy", [False, True])
def test_nothing_waits_for_the_device(gpu: Place, entropy: bool) -> None:
    """With the number of rows that count at hand, forward and backward can be captured in a CUDA graph."""
    case = make_linear_case(256, 500, (32, 48, 16), BF16, hard_weight=1.0, ignored=0.3, biased=False)
    valid = int((case.target != -100).sum())
    case = on(case, gpu.device)
    hidden, head = case.hidden.clone().requires_grad_(), case.head.clone().requires_grad_()

    def step() -> Tensor:
        hidden.grad = head.grad = None
        out = evaluate(case, hidden, head, None, num_valid=valid, chunk_rows=64, entropy=entropy, backend=gpu.backend)
        out.loss.backward()
        return out.loss.detach()

    expected = step().clone()
    grads = hidden.grad.clone(), head.grad.clone()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(loss, expected)
    assert torch.equal(hidden.grad, grads[0]) and torch.equal(head.grad, grads[1])


@pytest.mark.parametrize("rows", [1024, 2048])
def test_memory_of_one_chunk(gpu: Place, rows: int) -> None:
    """llm.md: (K + 1) m C b + C H 4 + N H b + 64 MB beyond the inputs, with bfloat16 logits."""
    if gpu.backend == "reference":
        pytest.skip("PyTorch's operations keep more than a chunk")
    N, C, H, H_t, K = 8192, 128256, 2048, 4096, 2
    hidden, head = torch.randn(N, H, device=gpu.device, dtype=BF16), torch.randn(C, H, device=gpu.device, dtype=BF16)
    teachers = [torch.randn(N, H_t, device=gpu.device, dtype=BF16) for _ in range(K)]
    heads = [torch.randn(C, H_t, device=gpu.device, dtype=BF16) / 64 for _ in range(K)]
    hidden.requires_grad_(), head.mul_(1 / 45).requires_grad_()
    target = torch.arange(N, device=gpu.device) % C

    def step() -> None:
        hidden.grad = head.grad = None
        camkd_linear_loss(
            hidden, head, teachers, heads, target, chunk_rows=rows, logits_dtype=BF16, num_valid=N, backend=gpu.backend
        ).loss.backward()

    step()
    hidden.grad = head.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    used = torch.cuda.max_memory_allocated() - before
    # In backward the gradient of the head is rounded to bfloat16, when the chunks are gone.
    assert used <= (K + 1) * rows * C * 2 + C * H * 4 + N * H * 2 + (64 << 20), f"{used / 1e9:.2f} GB"


@pytest.mark.slow
def test_a_chunk_beyond_2_to_31_elements(gpu: Place) -> None:
    N, C, H = 16640, 131072, 16
    case = make_linear_case(N, C, (H, H), BF16, biased=False, weighting="uniform")
    case = on(case, gpu.device)
    whole = run(case, chunk_rows=N, logits_dtype=BF16, backend=gpu.backend)
    parts = run(case, chunk_rows=1040, logits_dtype=BF16, backend=gpu.backend)
    for name in ("loss", "grad_hidden", "grad_head"):
        assert_near(getattr(whole, name), getattr(parts, name), 1e-2, name)
    assert_near(whole.divergence, parts.divergence, 1e-5)
