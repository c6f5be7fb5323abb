"""Shapes of the measurements: those compared with other implementations, and a range of C for the roofline."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

F32, BF16 = torch.float32, torch.bfloat16


class Batch(NamedTuple):
    """The tensors of one evaluation."""

    student: Tensor  # (N, C), requires grad
    teachers: list[Tensor]  # K of (N, C)
    target: Tensor  # (N,) int64

    def with_own_leaf(self) -> Batch:
        """The same values in a new leaf tensor, with a gradient of its own."""
        return self._replace(student=self.student.detach().requires_grad_())


class Shape(NamedTuple):
    N: int
    C: int
    K: int
    dtype: torch.dtype

    def floor_bytes(self) -> int:
        """K+1 inputs read once and one gradient written: (K+2) N C elements."""
        return (self.K + 2) * self.N * self.C * self.dtype.itemsize

    def batch(self, device: torch.device) -> Batch:
        """Random logits, equal for every contestant; generated on the device, where 10 GB take a moment."""
        generator = torch.Generator(device).manual_seed(0)

        def logits() -> Tensor:
            return torch.randn(self.N, self.C, generator=generator, device=device, dtype=self.dtype).mul_(3)

        student, *teachers = (logits() for _ in range(self.K + 1))
        target = torch.randint(self.C, (self.N,), generator=generator, device=device)
        return Batch(student.requires_grad_(), teachers, target)

    def __str__(self) -> str:
        return f"{self.N}x{self.C}-K{self.K}-{str(self.dtype).removeprefix('torch.')}"


# Compared with other implementations. On a GPU: batches of language models, ImageNet and CIFAR.
COMPARED = {
    "cpu": [
        *(Shape(N, C, 3, F32) for N, C in ((64, 100), (1024, 100), (1024, 1000))),
        Shape(4096, 1000, 5, F32),
        *(Shape(N, C, 3, F32) for N, C in ((256, 32000), (128, 128256))),
        *(Shape(N, C, 3, BF16) for N, C in ((1024, 1000), (128, 128256))),
    ],
    "cuda": [Shape(N, C, 3, BF16) for N, C in ((8192, 128256), (4096, 32000), (16384, 1000), (64, 100), (1024, 100))],
}
CLASSES = (100, 1000, 1128, 4096, 21841, 32000, 65537, 128256, 151936, 262144)
# The sizes of COMPARED that the README and its picture show, in the dtype that is usual on the device.
HEADLINE = {
    "cpu": [
        Shape(N, C, K, F32)
        for N, C, K in ((64, 100, 3), (1024, 1000, 3), (4096, 1000, 5), (256, 32000, 3), (128, 128256, 3))
    ],
    "cuda": COMPARED["cuda"],
}
# Larger than every cache, and small enough that 72 sizes take about a minute.
CLASSES_BYTES = {"cpu": 100e6, "cuda": 2e9}


def over_classes(device: str, which: str) -> list[Shape]:
    """Shapes over C for our kernels only. "quick" leaves out K = 1 and 2 and the dtype that is rarer on the device."""
    quick = which == "quick"
    shapes = []
    for dtype in ({"cpu": F32, "cuda": BF16}[device],) if quick else (F32, BF16):
        for K in (3, 5) if quick else (1, 2, 3, 5):
            for C in CLASSES:
                N = max(int(CLASSES_BYTES[device] / ((K + 2) * C * dtype.itemsize)), 1)
                shapes.append(Shape(N, C, K, dtype))
    return shapes


class Features(NamedTuple):
    """K pairs of feature maps (N, channels, side, side), and logits (N, C) for their weights."""

    N: int
    channels: int
    side: int
    C: int
    K: int
    dtype: torch.dtype
    channels_last: bool = False

    def floor_bytes(self, learned_weights: bool = True) -> int:
        """Both maps and the logits read once, the gradients of the student's maps and of the logits written.

        Args:
            learned_weights: without them the logits have no gradient.
        """
        M = self.channels * self.side**2
        return self.K * self.N * (3 * M + (1 + learned_weights) * self.C) * self.dtype.itemsize

    def maps(self, generator: torch.Generator) -> list[Tensor]:
        """K maps in the memory format."""
        size = (self.N, self.channels, self.side, self.side)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        options = {"generator": generator, "device": generator.device, "dtype": self.dtype}
        return [torch.randn(size, **options).contiguous(memory_format=layout) for _ in range(self.K)]

    def __str__(self) -> str:
        name = f"{self.N}x{self.channels}x{self.side}x{self.side}-{str(self.dtype).removeprefix('torch.')}"
        return f"{name}-channels_last" if self.channels_last else name


# Last feature maps for CIFAR and ImageNet; on a CPU of smaller batches.
_FEATURES = {
    "cpu": [(64, 256, 8, 100), (32, 512, 7, 1000), (16, 512, 14, 1000), (32, 2048, 7, 1000)],
    "cuda": [(64, 256, 8, 100), (64, 2048, 7, 1000), (256, 512, 14, 1000), (1024, 2048, 7, 1000)],
}


def features(device: str, which: str) -> list[Features]:
    """Both memory formats in both dtypes; "quick" leaves out channels_last in the dtype that is rarer on the device."""
    found = []
    for N, channels, side, C in _FEATURES[device]:
        for dtype in (F32, BF16):
            usual = dtype == {"cpu": F32, "cuda": BF16}[device]
            for channels_last in (False, True) if usual or which == "full" else (False,):
                found.append(Features(N, channels, side, C, 3, dtype, channels_last))
    return found


class Models(NamedTuple):
    """A student and K teachers before their heads: N tokens, C classes, widths of their hidden states."""

    N: int
    C: int
    student: int
    teacher: int
    K: int
    dtype: torch.dtype

    def operations(self) -> int:
        """Of the products that are needed: three with the student's head and one with each teacher's."""
        return 2 * self.N * self.C * (3 * self.student + self.K * self.teacher)

    def batch(self, device: torch.device) -> LinearBatch:
        generator = torch.Generator(device).manual_seed(0)

        def normal(rows: int, width: int, size: float) -> Tensor:
            return torch.randn(rows, width, generator=generator, device=device).mul_(size).to(self.dtype)

        widths = (self.student, *(self.teacher,) * self.K)
        hidden = [normal(self.N, width, 1.0) for width in widths]
        heads = [normal(self.C, width, 3.0 * width**-0.5) for width in widths]  # logits as wide as Shape's
        target = torch.randint(self.C, (self.N,), generator=generator, device=device)
        return LinearBatch(hidden[0].requires_grad_(), heads[0].requires_grad_(), hidden[1:], heads[1:], target)

    def __str__(self) -> str:
        widths = f"{self.student}-{self.teacher}"
        return f"{self.N}x{self.C}-{widths}-K{self.K}-{str(self.dtype).removeprefix('torch.')}"


class LinearBatch(NamedTuple):
    """The tensors of one evaluation of the linear loss."""

    hidden: Tensor  # (N, H), requires grad
    head: Tensor  # (C, H), requires grad
    teacher_hidden: list[Tensor]  # K of (N, H_k)
    teacher_heads: list[Tensor]  # K of (C, H_k)
    target: Tensor  # (N,) int64


# On a GPU the sizes of language models of 1 to 8 billion parameters.
_MODELS = {
    "cpu": [(1024, 32000, 256, 512, 2), (1024, 32000, 256, 512, 1), (2048, 32000, 256, 256, 3)],
    "cuda": [
        *((8192, 128256, 2048, 4096, K) for K in (1, 2, 3, 5)),
        *((8192, 128256, width, width, 2) for width in (1024, 2048)),
        (8192, 151936, 2048, 4096, 2),
        (4096, 32000, 2048, 4096, 2),
    ],
}


def models(device: str, which: str) -> list[Models]:
    """ "quick" leaves out the dtype that is rarer on the device."""
    usual = {"cpu": F32, "cuda": BF16}[device]
    dtypes = (usual,) if which == "quick" else (F32, BF16)
    return [Models(*sizes, dtype) for sizes in _MODELS[device] for dtype in dtypes]
