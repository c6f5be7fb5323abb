"""The implementations that are timed: our backends, eager PyTorch, torch.compile, a loop over teachers and more.

All of them compute the loss of `camkd_fast.losses.eager.eager_loss`. Each is timed at two end points:

- backward: `student.grad` is filled, as after `loss.backward()` in any training loop. Ours is the swap-in,
  `camkd_loss(...).loss.backward()`.
- grad: the loss and its gradient with respect to the logits are returned, without accumulation. Ours is
  `camkd_loss_and_grad`; the others use `torch.autograd.grad`. A training loop then calls `logits.backward(grad)`, which
  starts the autograd engine once more for us (`engine_start_seconds`); the others have paid for it already.
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import timer
from benchmarks.shapes import Batch
from camkd_fast import camkd_loss, camkd_loss_and_grad
from camkd_fast.backends import dispatch
from camkd_fast.losses.eager import eager_loss

Loss = Callable[[Tensor, Sequence[Tensor], Tensor], Tensor]
ENDS = ("backward", "grad")
T = 4.0


class Contestant(NamedTuple):
    """One implementation of the loss, at both end points."""

    backward: Callable[[Batch], object]  # fills student.grad
    grad: Callable[[Batch], tuple[Tensor, Tensor]]  # loss and gradient


def fill_grad(loss: Loss, batch: Batch) -> None:
    batch.student.grad = None
    loss(*batch).backward()


def autograd_grad(loss: Loss, batch: Batch) -> tuple[Tensor, Tensor]:
    value = loss(*batch)
    return value, torch.autograd.grad(value, batch.student)[0]


def by_autograd(loss: Loss) -> Contestant:
    return Contestant(partial(fill_grad, loss), partial(autograd_grad, loss))


# --- ours ------------------------------------------------------------------------------------------------------------


def fused(backend: str) -> Contestant:
    """The public functions on one backend."""

    def loss(student: Tensor, teachers: Sequence[Tensor], target: Tensor) -> Tensor:
        return camkd_loss(student, teachers, target, backend=backend).loss

    def value_and_grad(batch: Batch) -> tuple[Tensor, Tensor]:
        out, grad = camkd_loss_and_grad(*batch, backend=backend)
        return out.loss, grad

    return Contestant(partial(fill_grad, loss), value_and_grad)


def name_of(backend: str) -> str:
    return f"camkd[{backend}]"


def ours(batch: Batch) -> dict[str, Contestant]:
    """Every compiled backend that supports these tensors. The choice of "auto" comes first and runs as "auto"."""
    picked, _ = dispatch.choose("auto", batch[:1])
    contestants = {name_of(picked): fused("auto")}
    for backend in ("cuda", "triton"):
        if batch.student.is_cuda and backend != picked and dispatch.availability(backend).usable:
            contestants[name_of(backend)] = fused(backend)
    return contestants


# --- the same formulas in PyTorch ------------------------------------------------------------------------------------


def confidence(teachers: Sequence[Tensor], target: Tensor) -> Tensor:
    """(K, N) weights, without autograd."""
    with torch.no_grad():
        ce = torch.stack([F.cross_entropy(z, target, reduction="none") for z in teachers])
        return (1.0 - ce.softmax(0)) / (len(teachers) - 1)


def terms(student: Tensor, teachers: Sequence[Tensor], target: Tensor) -> Iterator[Tensor]:
    """The loss as K + 1 separate terms: one F.kl_div per teacher, each with its own softmax of the student."""
    yield F.cross_entropy(student, target)
    for weight, z in zip(confidence(teachers, target), teachers, strict=True):
        divergence = F.kl_div(F.log_softmax(student / T, 1), F.softmax(z / T, 1), reduction="none").sum(1)
        yield T * T * (weight * divergence).mean()


def loop_backward(batch: Batch) -> None:
    batch.student.grad = None
    for term in terms(*batch):
        term.backward()


def loop_grad(batch: Batch) -> tuple[Tensor, Tensor]:
    value, grad = torch.zeros((), device=batch.student.device), torch.zeros_like(batch.student)
    for term in terms(*batch):
        value = value + term.detach()
        grad += torch.autograd.grad(term, batch.student)[0]
    return value, grad


# --- other libraries, through their documented interfaces ------------------------------------------------------------


def liger() -> Contestant:
    """liger-kernel's KL divergence; its cross-entropy is not used because it overwrites the logits."""
    kl = importlib.import_module("liger_kernel.transformers").LigerKLDIVLoss(reduction="none", log_target=True)

    def loss(student: Tensor, teachers: Sequence[Tensor], target: Tensor) -> Tensor:
        log_q = F.log_softmax(student / T, 1)
        soft = torch.zeros(target.shape, device=student.device)
        for weight, z in zip(confidence(teachers, target), teachers, strict=True):
            soft = soft + weight * kl(log_q, F.log_softmax(z / T, 1)).sum(1)
        return F.cross_entropy(student, target) + T * T * soft.mean()

    return by_autograd(loss)


def quack() -> Contestant:
    """quack's cross-entropy and softmax; it has no KL divergence, so PyTorch computes that sum."""
    peer = importlib.import_module("quack")

    def loss(student: Tensor, teachers: Sequence[Tensor], target: Tensor) -> Tensor:
        with torch.no_grad():
            ce = torch.stack([peer.cross_entropy(z, target, reduction="none") for z in teachers])
            weights = (1.0 - ce.softmax(0)) / (len(teachers) - 1)
        log_q = F.log_softmax(student / T, 1)
        soft = torch.zeros(target.shape, device=student.device)
        for weight, z in zip(weights, teachers, strict=True):
            soft = soft + weight * F.kl_div(log_q, peer.softmax(z / T), reduction="none").sum(1)
        return peer.cross_entropy(student, target, reduction="none").mean() + T * T * soft.mean()

    return by_autograd(loss)


PEERS = {"liger": ("liger_kernel", liger), "quack": ("quack", quack)}


# --- selection -------------------------------------------------------------------------------------------------------


def others(device: torch.device, max_autotune: bool) -> tuple[dict[str, Contestant], list[str]]:
    """The baselines for a device, and the reason for each library that is missing.

    torch.compile is specialised to the shape, its fastest mode; without CUDA graphs, which would copy all inputs first.
    """
    torch._dynamo.reset()
    contestants = {"eager": by_autograd(eager_loss), "compile": by_autograd(torch.compile(eager_loss, dynamic=False))}
    if max_autotune:
        compiled = torch.compile(eager_loss, dynamic=False, mode="max-autotune-no-cudagraphs")
        contestants["max-autotune"] = by_autograd(compiled)
    contestants["loop"] = Contestant(loop_backward, loop_grad)
    missing = []
    for name, (module, peer) in PEERS.items():
        if device.type != "cuda":
            missing.append(f"{name}: it takes CUDA tensors only")
        elif importlib.util.find_spec(module) is None:
            missing.append(f"{name}: {module} is not installed")
        else:
            try:
                contestants[name] = peer()
            except (ImportError, AttributeError) as error:
                missing.append(f"{name}: {error}")
    return contestants, missing


def disagreement(contestant: Contestant, truth: tuple[Tensor, Tensor], batch: Batch) -> str | None:
    """Why a contestant must not be timed: it fails, or differs from eager PyTorch by more than the dtype allows."""
    try:
        loss, grad = contestant.grad(batch)
        contestant.backward(batch)
    except Exception as error:  # a failure of another library must not end the run
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    assert batch.student.grad is not None
    # Eager arithmetic in 16 bits has errors of several per cent itself.
    allowed = 1e-3 if batch.student.dtype == torch.float32 else 0.1
    for name, value, expected in (
        ("loss", loss, truth[0]),
        ("gradient", grad, truth[1]),
        ("student.grad", batch.student.grad, truth[1]),
    ):
        error = float((value.detach().float() - expected.detach().float()).norm() / expected.detach().float().norm())
        if not error <= allowed:
            return f"its {name} differs from eager PyTorch's by {error:.1e}"
    return None


def engine_start_seconds(device: torch.device) -> float:
    """Host time of `logits.backward(grad)` for a single number, which is the start of the autograd engine."""
    logits, grad = torch.zeros(1, device=device, requires_grad=True), torch.ones(1, device=device)

    def start() -> None:
        logits.grad = None
        logits.backward(grad)

    times = timer.interleaved({"start": start}, device, seconds=0.2, wall=True)["start"]
    return statistics.median(times)
