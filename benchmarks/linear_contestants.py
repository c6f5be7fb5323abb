"""Other ways to the loss from hidden states and heads, for bench_linear_loss.py.

products    the matrix products that are needed, in our chunks, and nothing else: what no implementation can be below
eager       all logits at once, as a PyTorch user would write it
chunked     torch.compile of the loss of a chunk and its gradient, in our chunks, added up in float32
inductor    torch.compile of all of it with PyTorch's own chunking (TORCHINDUCTOR_AUTO_CHUNKER), where torch has it
trl         the loss function of TRL's DistillationTrainer, for one teacher
liger       a loop over Liger-Kernel's fused linear JSD with beta 0, one teacher at a time, on a GPU
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shapes import LinearBatch

Step = Callable[[LinearBatch], Tensor]  # the loss; leaves gradients in batch.hidden and batch.head


def formula(z: Tensor, teachers: list[Tensor], target: Tensor) -> Tensor:
    """sum_k w_k KL_k of every row at T = 1; confidence weights, or 1 for one teacher."""
    log_q = F.log_softmax(z.float(), -1)
    divergence, ce = [], []
    for t in teachers:
        log_p = F.log_softmax(t.float(), -1)
        divergence.append((log_p.exp() * (log_p - log_q)).sum(-1))
        ce.append(-log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1))
    if len(teachers) == 1:
        return divergence[0]
    weights = (1.0 - torch.stack(ce).softmax(0)) / (len(teachers) - 1)
    return (weights * torch.stack(divergence)).sum(0)


def loss_of(hidden: Tensor, head: Tensor, teachers: list[Tensor], heads: list[Tensor], target: Tensor) -> Tensor:
    logits = [F.linear(h, w) for h, w in zip(teachers, heads, strict=True)]
    return formula(F.linear(hidden, head), logits, target).sum()


def forget(batch: LinearBatch) -> None:
    batch.hidden.grad = batch.head.grad = None


def eager(batch: LinearBatch, loss: Callable[..., Tensor] = loss_of) -> Tensor:
    forget(batch)
    value = loss(*batch) / len(batch.target)
    value.backward()
    return value.detach()


def chunked(rows: int) -> Step:
    def of_chunk(hidden: Tensor, head: Tensor, *others: Any) -> Tensor:
        return loss_of(hidden, head, *others)

    compiled = torch.compile(torch.func.grad_and_value(of_chunk, argnums=(0, 1)), dynamic=False)

    def step(batch: LinearBatch) -> Tensor:
        forget(batch)
        N = len(batch.target)
        hidden, head = batch.hidden.detach(), batch.head.detach()
        total = torch.zeros(head.shape, dtype=torch.float32, device=head.device)
        value, parts = torch.zeros((), device=head.device), []
        for begin in range(0, N, rows):
            part = slice(begin, begin + rows)
            teachers = [h[part] for h in batch.teacher_hidden]
            (of_rows, of_head), loss = compiled(hidden[part], head, teachers, batch.teacher_heads, batch.target[part])
            total += of_head
            value += loss
            parts.append(of_rows)
        batch.hidden.grad, batch.head.grad = torch.cat(parts) / N, (total / N).to(head.dtype)
        return value / N

    return step


def inductor() -> Step | None:
    """None if this torch has no chunking of its own."""
    settings = getattr(torch._inductor.config, "auto_chunker", None)
    if settings is None:
        return None
    with torch._inductor.config.patch({"auto_chunker.enable": True}):
        return functools.partial(eager, loss=torch.compile(loss_of, dynamic=False))


def products(rows: int, logits: torch.dtype) -> Step:
    def step(batch: LinearBatch) -> Tensor:
        N, C = len(batch.target), len(batch.head)
        hidden, head = batch.hidden.detach(), batch.head.detach()
        kind = {} if logits == head.dtype else {"out_dtype": logits}
        buffers = [torch.empty(rows, C, dtype=logits, device=head.device) for _ in range(1 + len(batch.teacher_heads))]
        of_rows, total = torch.empty_like(hidden), torch.zeros(head.shape, dtype=head.dtype, device=head.device)
        narrow = torch.zeros(rows, C, dtype=head.dtype, device=head.device)
        for begin in range(0, N, rows):
            part = slice(begin, min(begin + rows, N))
            inputs = [hidden[part], *(h[part] for h in batch.teacher_hidden)]
            for x, w, buffer in zip(inputs, [head, *batch.teacher_heads], buffers, strict=True):
                torch.mm(x, w.t(), out=buffer[: len(x)], **kind)
            grad = buffers[0][: len(inputs[0])] if logits == head.dtype else narrow[: len(inputs[0])]
            torch.mm(grad, head, out=of_rows[part])
            total.addmm_(grad.t(), hidden[part])
        return total[0, 0]

    return step


@contextlib.contextmanager
def _without_root() -> Iterator[None]:
    """transformers, which both import, would take the folder `kernels` at the root for a package of that name."""
    before, root = list(sys.path), Path(__file__).parents[1]
    sys.path[:] = [name for name in before if Path(name or ".").resolve() != root]
    try:
        yield
    finally:
        sys.path[:] = before


def trl() -> Step:
    """Raises ImportError where TRL is missing."""
    with _without_root():
        from trl.trainer.distillation_trainer import _chunked_divergence_loss

    def step(batch: LinearBatch) -> Tensor:
        forget(batch)
        mask = torch.ones_like(batch.target, dtype=torch.bool)
        value, _, _ = _chunked_divergence_loss(
            *(batch.hidden, batch.teacher_hidden[0], batch.head, batch.teacher_heads[0], mask), beta=0.0
        )
        value.backward()
        return value.detach()

    return step


def liger() -> Step:
    """Raises ImportError where Liger-Kernel is missing. Uniform weights: it has none per row."""
    with _without_root():
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    def step(batch: LinearBatch) -> Tensor:
        forget(batch)
        K = len(batch.teacher_heads)
        function = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, chunk_size=1024)
        total = torch.zeros((), device=batch.head.device)
        for hidden, head in zip(batch.teacher_hidden, batch.teacher_heads, strict=True):
            value = function(batch.hidden, batch.head, hidden, head, batch.target) / K
            value.backward()
            total += value.detach()
        return total

    return step
