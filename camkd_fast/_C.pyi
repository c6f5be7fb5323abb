"""Signatures of the compiled module; sizes and strides count elements, pointers are addresses."""

from collections.abc import Sequence

from torch import Tensor

Matrix = tuple[int, int, int, int]  # address, outer row stride, inner row stride, dtype code

RECYCLED_BYTES: int  # outputs of fewer bytes are left to torch

class OutputMemory:
    """`bytes` of uninitialised memory, a writable buffer; its pages are recycled (csrc/cpu/output_memory.h)."""

    def __init__(self, bytes: int, /) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def instruction_set() -> str: ...
def connect_tensors(api: object, tensor: type, parameter: type, /) -> bool:
    """Takes torch's C functions for tensors; False where it offers none, and `mean_loss` declines every call."""

def mean_loss(
    student: Tensor,
    teachers: Tensor | Sequence[Tensor],
    target: Tensor,
    ignore_index: int,
    temperature: float,
    hard_weight: float,
    soft_weight: float,
    weighting: str | Tensor,
    loss_scale: float | Tensor | None,
    grad_enabled: bool,
    threads: int,
    poison: bool,
    /,
) -> tuple[Tensor, Tensor, Tensor | None, tuple[float, float, float], float] | None:
    """Loss, numbers, residual, sums and 1 / valid rows; None where an argument is not plain, or not right."""

def count_labels(target: int, N: int, C: int, ignore_index: int, /) -> tuple[int, bool, int]: ...
def row_loss(
    N: int,
    C: int,
    inner: int,
    student: Matrix,
    teachers: list[Matrix],
    target: int,
    ignore_index: int,
    temperature: float,
    hard_weight: float,
    soft_weight: float,
    weighting: int,
    weights: tuple[int, int, int],
    numbers: int,
    residual: int,
    residual_scale: float,
    threads: int,
    /,
) -> tuple[float, float, float]: ...
def scale_rows(
    N: int, C: int, residual: int, out: int, dtype: int, factor: int, factor_stride: int, threads: int, /
) -> None: ...
def confidence_forward(
    N: int,
    C: int,
    inner: int,
    logits: list[Matrix],
    target: int,
    ignore_index: int,
    weights: int,
    ce: int,
    lse: int,
    threads: int,
    /,
) -> None: ...
def confidence_backward(
    N: int,
    C: int,
    inner: int,
    logits: list[Matrix],
    target: int,
    lse: int,
    grad_ce: int,
    grads: list[int],
    threads: int,
    /,
) -> None: ...
def feature_forward(N: int, M: int, student: Matrix, teacher: Matrix, error: int, threads: int, /) -> None: ...
def feature_backward(
    N: int, M: int, student: Matrix, teacher: Matrix, grad_error: int, grad: int, threads: int, /
) -> None: ...
def cuda_build() -> tuple[bool, str]: ...

# The functions below exist where cuda_build()[0] holds; `stream` is a cudaStream_t on the current device.

def cuda_row_loss(
    N: int,
    C: int,
    inner: int,
    streams: list[Matrix],
    target: int,
    ignore_index: int,
    temperature: float,
    hard_weight: float,
    soft_weight: float,
    weighting: int,
    weights: tuple[int, int, int],
    numbers: int,
    residual: int,
    residual_scale: float,
    residual_factor: int,
    mean: tuple[int, int],
    debug: bool,
    stream: int,
    /,
) -> None: ...
def cuda_scale_rows(
    N: int, C: int, residual: int, out: int, dtype: int, factor: int, factor_stride: int, stream: int, /
) -> None: ...
def cuda_confidence_forward(
    N: int,
    C: int,
    inner: int,
    logits: list[Matrix],
    target: int,
    ignore_index: int,
    weights: int,
    ce: int,
    lse: int,
    debug: bool,
    stream: int,
    /,
) -> None: ...
def cuda_confidence_backward(
    N: int,
    C: int,
    inner: int,
    logits: list[Matrix],
    target: int,
    lse: int,
    grad_ce: int,
    grads: list[int],
    stream: int,
    /,
) -> None: ...
def cuda_feature_forward(
    N: int, M: list[int], student: list[Matrix], teacher: list[Matrix], error: int, stream: int, /
) -> None: ...
def cuda_feature_backward(
    N: int,
    M: list[int],
    student: list[Matrix],
    teacher: list[Matrix],
    grad_error: int,
    grads: list[int],
    stream: int,
    /,
) -> None: ...
