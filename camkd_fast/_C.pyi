"""Signatures of the compiled module; sizes and strides count elements, pointers are addresses."""

from collections.abc import Sequence

from torch import Tensor

from .backends.contract import SecondLabels
from .backends.whole_losses import WholeLoss
from .losses.formula import Formula

Matrix = tuple[int, int, int, int]  # address, outer row stride, inner row stride, dtype code
Shape = tuple[int, int, int]  # N, C, rows per outer stride
Weights = tuple[int, int, int]  # address and strides of (K, N) weights, or zeros
Second = tuple[int, int]  # addresses of second labels (N,) and of the shares of the first ones, or zeros
Shard = tuple[int, int]  # code (csrc/ops.h) and address of the sums, or zeros
Map = tuple[int, int, int, int, int]  # address, strides of n, p and q, dtype code
MapPair = tuple[tuple[int, int], Map, Map]  # (P, Q), student, teacher
Layout = tuple[tuple[int, ...], tuple[int, ...], int]  # shape, strides and offset

MAX_TEACHERS: int
TEMPERATURE_POWERS: tuple[int, ...]  # temperatures T at which e^x is computed as (e^{x/T})^T
FORMULA_FIELDS: tuple[str, ...]  # in order
DTYPES: tuple[str, ...]  # by dtype code
WEIGHTINGS: tuple[str, ...]  # by weighting code
ROW_SUMS: tuple[str, ...]  # of a stream, in order
ROW_STATS: tuple[str, ...]  # rows of row_stats for one teacher, in order
SHARDS: tuple[str, ...]  # what to do with a shard, by code
DIVERGENCES: tuple[str, ...]  # by divergence code
RECYCLED_BYTES: int  # smaller outputs are allocated by torch
FEATURE_PARTS: int  # numbers of scratch after the errors of cuda_features

class OutputMemory:
    """`bytes` of uninitialised memory, a writable buffer; its pages are recycled (csrc/cpu/output_memory.h)."""

    def __init__(self, bytes: int, /) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def instruction_set() -> str: ...
def connect_tensors(api: object, tensor: type, parameter: type, /) -> bool:
    """Connects to torch's C functions for tensors; False if this torch has none, and then `logit_loss` returns None."""

def are_dense(*tensors: Tensor) -> bool:
    """Whether each is a tensor whose memory holds its values as they are (csrc/python/tensors.h, look); False without
    a connection."""

def logit_loss(
    student: Tensor,
    teachers: Tensor | Sequence[Tensor],
    target: Tensor,
    second: SecondLabels | None,
    formula: Formula,
    reduction: str,
    num_items: float | Tensor | None,
    loss_scale: float | Tensor | None,
    grad_enabled: bool,
    threads: int,
    poison: bool,
    /,
) -> WholeLoss | None:
    """None for unsupported or invalid arguments."""

def confidence_weights(
    logits: Tensor | Sequence[Tensor],
    target: Tensor,
    second: SecondLabels | None,
    ignore_index: int,
    grad_enabled: bool,
    threads: int,
    poison: bool,
    /,
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """See camkd_fast.backends.whole_losses.WholeLosses for the results of this function and those below; None for
    unsupported or invalid arguments."""

def confidence_gradients(
    logits: Sequence[Tensor],
    target: Tensor,
    second: SecondLabels | None,
    ignore_index: int,
    kept: Tensor,
    grad_weights: Tensor | None,
    grad_ce: Tensor | None,
    threads: int,
    poison: bool,
    /,
) -> list[Tensor] | None: ...
def whole_feature_loss(
    student: Sequence[Tensor],
    teachers: Sequence[Tensor],
    weights: Tensor,
    reduction: str,
    scale: float | Tensor | None,
    grad_enabled: bool,
    threads: int,
    poison: bool,
    /,
) -> tuple[Tensor, Tensor | None, Tensor | None, list[Layout] | None, float | Tensor] | None: ...
def feature_gradients(
    buffer: Tensor | None,
    error: Tensor | None,
    grad_output: Tensor,
    scale: float | Tensor,
    retained: bool,
    threads: int,
    poison: bool,
    /,
) -> tuple[Tensor | None, Tensor | None] | None: ...
def feature_loss_and_grad(
    student: Sequence[Tensor],
    teachers: Sequence[Tensor],
    logits: Sequence[Tensor],
    target: Tensor,
    second: SecondLabels | None,
    beta: float,
    reduction: str,
    num_items: float | Tensor | None,
    ignore_index: int,
    loss_scale: float | Tensor,
    threads: int,
    poison: bool,
    /,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]] | None: ...
def count_labels(target: int, second: Second, N: int, C: int, ignore_index: int, /) -> tuple[int, int]:
    """Number of rows that are not ignored before the first one with an invalid label or share, and that row or -1."""

def row_loss(
    shape: Shape,
    streams: list[Matrix],
    target: int,
    second: Second,
    formula: Formula,
    weights: Weights,
    row_stats: int,
    grad_student: int,
    grad_scale: float,
    shard: Shard,
    threads: int,
    /,
) -> tuple[float, float, float]: ...
def scale_rows(
    N: int, C: int, grad: int, out: int, dtype: int, factor: int, factor_stride: int, threads: int, /
) -> None: ...
def confidence_forward(
    shape: Shape,
    logits: list[Matrix],
    target: int,
    second: Second,
    ignore_index: int,
    weights: int,
    ce: int,
    lse: int,
    threads: int,
    /,
) -> None: ...
def confidence_backward(
    shape: Shape,
    logits: list[Matrix],
    target: int,
    second: Second,
    lse: int,
    grad_ce: int,
    grads: list[int],
    threads: int,
    /,
) -> None: ...
def features(
    N: int,
    pairs: list[MapPair],
    weights: Weights,
    error: int,
    loss: int,
    grads: list[int],
    scale: float,
    grad_scale: float,
    threads: int,
    /,
) -> None: ...
def cuda_build() -> tuple[bool, str]: ...

# The functions below exist if cuda_build()[0] is true; `stream` is a cudaStream_t of the current device.

def cuda_logit_loss(
    student: Tensor,
    teachers: Tensor | Sequence[Tensor],
    target: Tensor,
    second: SecondLabels | None,
    formula: Formula,
    reduction: str,
    num_items: float | Tensor | None,
    loss_scale: float | Tensor | None,
    grad_enabled: bool,
    debug: bool,
    /,
) -> WholeLoss | None:
    """None for unsupported or invalid arguments."""

# As the functions for CPU tensors, on the current stream.
def cuda_confidence_weights(
    logits: Tensor | Sequence[Tensor],
    target: Tensor,
    second: SecondLabels | None,
    ignore_index: int,
    grad_enabled: bool,
    debug: bool,
    /,
) -> tuple[Tensor, Tensor, Tensor | None] | None: ...
def cuda_confidence_gradients(
    logits: Sequence[Tensor],
    target: Tensor,
    second: SecondLabels | None,
    ignore_index: int,
    kept: Tensor,
    grad_weights: Tensor | None,
    grad_ce: Tensor | None,
    debug: bool,
    /,
) -> list[Tensor] | None: ...
def cuda_whole_feature_loss(
    student: Sequence[Tensor],
    teachers: Sequence[Tensor],
    weights: Tensor,
    reduction: str,
    scale: float | Tensor | None,
    grad_enabled: bool,
    debug: bool,
    /,
) -> tuple[Tensor, Tensor | None, Tensor | None, list[Layout] | None, float | Tensor] | None: ...
def cuda_feature_gradients(
    buffer: Tensor | None,
    error: Tensor | None,
    grad_output: Tensor,
    scale: float | Tensor,
    retained: bool,
    debug: bool,
    /,
) -> tuple[Tensor | None, Tensor | None] | None: ...
def cuda_feature_loss_and_grad(
    student: Sequence[Tensor],
    teachers: Sequence[Tensor],
    logits: Sequence[Tensor],
    target: Tensor,
    second: SecondLabels | None,
    beta: float,
    reduction: str,
    num_items: float | Tensor | None,
    ignore_index: int,
    loss_scale: float | Tensor,
    debug: bool,
    /,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]] | None: ...
def cuda_scale(grad: Tensor, factor: Tensor, out: Tensor, /) -> bool:
    """`cuda_scale_rows` by tensors; False, with nothing done, for any that it does not take."""

def cuda_batch_floats(N: int, /) -> int:
    """Elements of `others` in `cuda_row_loss` for N rows on the current device."""

def cuda_row_loss(
    shape: Shape,
    streams: list[Matrix],
    target: int,
    second: Second,
    formula: Formula,
    weights: Weights,
    row_stats: int,
    grad_student: int,
    grad_scale: float,
    grad_scale_device: int,
    mean: tuple[int, int],  # loss (), and `others`: hard, soft, 1 / valid rows, then the kernel's own numbers
    shard: Shard,
    debug: bool,
    stream: int,
    /,
) -> None: ...
def cuda_try_geometry(warps: int, slots: int, rows: int, gradients: int, /) -> None:
    """How row kernels run from now on, where it fits (RowTrial of csrc/cuda/launch_table.h); 0: as that table says."""

def cuda_tried_geometry() -> tuple[bool, bool, int, int, int, int, int]:
    """Of the last trial: a warp per row, pipelined, warps of a block, vectors of a thread's buffer, blocks of a row,
    rows in flight, gradients."""

def cuda_scale_rows(
    N: int, C: int, grad: int, out: int, dtype: int, factor: int, factor_stride: int, stream: int, /
) -> None: ...
def cuda_confidence_forward(
    shape: Shape,
    logits: list[Matrix],
    target: int,
    second: Second,
    ignore_index: int,
    weights: int,
    ce: int,
    lse: int,
    inverse_valid: int,
    debug: bool,
    stream: int,
    /,
) -> None: ...
def cuda_confidence_backward(
    shape: Shape,
    logits: list[Matrix],
    target: int,
    second: Second,
    lse: int,
    grad_ce: int,
    grads: list[int],
    stream: int,
    /,
) -> None: ...
def cuda_features(
    N: int,
    pairs: list[MapPair],
    weights: Weights,
    error: int,
    loss: int,
    grads: list[int],
    scale: tuple[float, int],
    grad_scale: tuple[float, int],
    stream: int,
    /,
) -> None: ...
