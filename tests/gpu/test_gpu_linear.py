"""The linear loss on a GPU: numbers, chunks, memory, synchronisation, CUDA graphs and 64-bit indexing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from camkd_fast import camkd_linear_loss, confidence_weights
from tests.support.gpu import Place
from tests.support.linear_cases import LinearCase, LinearResult, evaluate, make_linear_case, run, unfused
from tests.support.tolerance import assert_accurate, assert_near, rms, unit

F32, BF16 = torch.float32, torch.bfloat16
DIVERGENCES = ["forward_kl", "reverse_kl", ("jsd", 0.3), ("skew", 0.2)]
pytestmark = pytest.mark.usefixtures("products_in_float32")


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


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("known", [False, True])
def test_ignored_rows_may_hold_anything(place: Place, known: bool, reduction: str) -> None:
    case = make_linear_case(60, 500, (32, 48, 16), ignored=0.5, hard_weight=1.0, reduction=reduction)
    ignored = case.target == -100
    spoiled = case.with_(
        hidden=case.hidden.masked_fill(ignored.unsqueeze(-1), math.nan),
        teacher_hidden=tuple(h.masked_fill(ignored.unsqueeze(-1), math.nan) for h in case.teacher_hidden),
    )
    given = torch.randn(60, device=place.device) if reduction == "none" else None
    keywords = {"backend": place.backend, "chunk_rows": 16, "num_valid": 60 if known else None}
    ours, expected = (back(run(on(c, place.device), given, **keywords)) for c in (spoiled, case))
    assert not ours.grad_hidden[ignored].any() and ours.grad_hidden[~ignored].any()
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    nothing = back(run(on(spoiled.with_(target=torch.full((60,), -100)), place.device), given, **keywords))
    assert not any(value.any() for value in nothing)


def test_heads_and_biases_beyond_the_vocabulary(place: Place) -> None:
    case = make_linear_case(40, 1000, (24, 16, 8), hard_weight=1.0)
    assert case.bias is not None and case.teacher_biases is not None

    def padded(x: Tensor | None) -> Tensor | None:  # a model may have no bias
        return None if x is None else torch.cat([x, torch.full((24, *x.shape[1:]), math.nan)])

    wide = case.with_(
        head=padded(case.head), bias=padded(case.bias), teacher_heads=tuple(map(padded, case.teacher_heads)),
        teacher_biases=tuple(map(padded, case.teacher_biases)), vocab_size=1000,
    )  # fmt: skip
    ours, expected = (back(run(on(c, place.device), backend=place.backend)) for c in (wide, case))
    assert ours.grad_bias is not None and expected.grad_bias is not None
    assert torch.equal(ours.grad_head[:1000], expected.grad_head) and not ours.grad_head[1000:].any()
    assert torch.equal(ours.grad_bias[:1000], expected.grad_bias) and not ours.grad_bias[1000:].any()
    assert torch.equal(ours.loss, expected.loss) and torch.equal(ours.grad_hidden, expected.grad_hidden)
    with pytest.raises(ValueError, match="1000 classes, but the vocabulary has 1001"):
        run(on(case.with_(vocab_size=1001), place.device), backend=place.backend)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_equal_weights_are_the_mean_over_calls_of_each_teacher(place: Place, divergence: Any) -> None:
    case = make_linear_case(60, 500, (32, 48, 16), biased=False, divergence=divergence, weighting="uniform")
    each = [
        case.with_(teacher_hidden=case.teacher_hidden[k : k + 1], teacher_heads=case.teacher_heads[k : k + 1])
        for k in range(2)
    ]
    ours, *of_each = (back(run(on(c, place.device), backend=place.backend)) for c in (case, *each))
    for name in ("loss", "soft", "grad_hidden", "grad_head"):
        first, second = (getattr(result, name) for result in of_each)
        assert_near(getattr(ours, name), (first + second) / 2, 1e-5, name)


def test_confidence_weights_are_those_of_the_logits(place: Place) -> None:
    case = on(make_linear_case(60, 500, (32, 48, 16), biased=False), place.device)
    logits = [h @ w.t() for h, w in zip(case.teacher_hidden, case.teacher_heads, strict=True)]
    assert_near(run(case, backend=place.backend).weights, confidence_weights(logits, case.target)[0], 1e-5)


def test_accumulated_and_scaled(place: Place) -> None:
    """Eight parts with the divisor of the whole batch, and an incoming gradient of 0.37."""
    case = on(make_linear_case(32, 500, (32, 48, 16), biased=False, hard_weight=1.0), place.device)
    whole = run(case, torch.tensor(0.37, device=place.device), backend=place.backend)
    parts = [
        case.with_(hidden=case.hidden[i : i + 4], teacher_hidden=tuple(h[i : i + 4] for h in case.teacher_hidden),
                   target=case.target[i : i + 4], num_items=32)
        for i in range(0, 32, 4)
    ]  # fmt: skip
    found = [run(part, backend=place.backend) for part in parts]
    assert_near(whole.grad_head, 0.37 * torch.stack([part.grad_head for part in found]).sum(0), 1e-6)
    assert_near(whole.grad_hidden, 0.37 * torch.cat([part.grad_hidden for part in found]), 1e-6)


def test_what_is_frozen_gets_no_gradient(place: Place) -> None:
    case = on(make_linear_case(60, 500, (32, 48, 16), biased=False, hard_weight=1.0), place.device)
    expected = run(case, backend=place.backend)
    for frozen in ("hidden", "head"):
        hidden, head = case.hidden.clone(), case.head.clone()
        (head if frozen == "hidden" else hidden).requires_grad_()
        evaluate(case, hidden, head, None, backend=place.backend).loss.backward()
        assert (hidden.grad is None) == (frozen == "hidden") and (head.grad is None) == (frozen == "head")
        grad, other = (head.grad, expected.grad_head) if frozen == "hidden" else (hidden.grad, expected.grad_hidden)
        assert grad is not None and torch.equal(grad, other)
    with torch.no_grad():
        out = evaluate(case, case.hidden.clone().requires_grad_(), case.head, None, backend=place.backend)
    assert not out.loss.requires_grad and torch.equal(out.loss, expected.loss)


def test_autocast(place: Place) -> None:
    case = on(make_linear_case(60, 500, (32, 48, 16), biased=False, hard_weight=1.0), place.device)
    expected = run(case.to(BF16), backend=place.backend)
    with torch.autocast(place.device.type, BF16):
        ours = run(case, backend=place.backend)
    assert ours.grad_head.dtype == ours.grad_hidden.dtype == F32
    for name in ("loss", "grad_hidden", "grad_head"):
        assert_near(getattr(ours, name), getattr(expected, name).float(), 2 * unit(BF16), name)
