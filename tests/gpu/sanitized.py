"""`compute-sanitizer python -m tests.gpu.sanitized [BACKEND ...]`: every op on small shapes, for memcheck and similar.

Inputs are made on the host and copied, so that a report of uninitialised memory concerns the kernels of this package.
The shapes are small because the tool slows a kernel down a hundred times. One width per regime: narrow, odd, one block,
a cluster, a cooperative group.
"""

from __future__ import annotations

import sys

import torch

from camkd_fast import camkd_loss, camkd_loss_and_grad, confidence_weights, weighted_feature_loss
from camkd_fast.backends import dispatch

WIDTHS = (10, 100, 1001, 9000, 33000, 129000)
DTYPES = (torch.float32, torch.bfloat16)


def run(backend: str, device: torch.device) -> int:
    """Run all ops on one backend; returns the number of evaluations."""
    generator = torch.Generator().manual_seed(0)

    def random(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(dtype).to(device)

    count = 0
    for i, C in enumerate(WIDTHS):
        # Dtypes alternate, to keep three tools within a minute.
        for K, weighting, dtype in ((1, "uniform", i % 2), (3, "confidence", 1 - i % 2), (3, "entropy", i % 2)):
            student, *teachers = (random(3, C, dtype=DTYPES[dtype]) for _ in range(K + 1))
            target = torch.tensor([0, C - 1, -100]).to(device)
            student.requires_grad_()
            options = {"weighting": weighting, "backend": backend}
            camkd_loss(student, teachers, target, **options).loss.backward()
            camkd_loss_and_grad(student, teachers, target, **options)
            count += 2
        logits = [random(3, C).requires_grad_() for _ in range(2)]
        weights, ce = confidence_weights(logits, torch.tensor([0, C - 1, 1]).to(device), backend=backend)
        features = [random(3, 5, 4, 4).requires_grad_() for _ in range(2)]
        loss = weighted_feature_loss(features, [random(3, 5, 4, 4) for _ in range(2)], weights, backend=backend)
        (loss + ce.mean()).backward()
        count += 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    return count


def main(backends: list[str]) -> None:
    device = torch.device("cuda")
    for backend in backends or ["cuda", "triton"]:
        if dispatch.availability(backend).usable:
            print(f"{backend}: {run(backend, device)} evaluations", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
