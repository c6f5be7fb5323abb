"""Every shipped launch, compiled for the supported GPUs: no spills, wide loads, no needless recompilation.

Nothing is launched, so no GPU is needed; see triton_offline.py. Speed is not measured here.
"""

from __future__ import annotations

import importlib

import pytest

pytest.importorskip("triton")
launch = importlib.import_module("camkd_fast.kernels.launch_table")

from tests.backends.triton_offline import Kernel, Shape, compile_all  # noqa: E402 - after the skip
from tests.support.gpu import ARCHITECTURES  # noqa: E402
from tests.support.torch_version import skip_before_triton  # noqa: E402

skip_before_triton(3, 7)  # registers are those of the compiler that `dev` pins

# Without 120, to save time: Triton generates for it what it generates for 100.
ARCHS = [number for number in ARCHITECTURES if number != 120]

ROWS = ("row_loss", "row_sums", "mixture_sums", "row_results")  # these read student and teachers

# One launch of every kernel, each kind of weighting, temperature, layout and scale once, and both regimes at the K that
# sets their register budgets. A minute on 2 cores; the whole table takes ten times as long.
REPRESENTATIVE = [
    Shape("row_loss", 100, 3, "float32"),
    Shape("row_loss", 100, 3, "bfloat16", mean=True),
    Shape("row_loss", 1000, 5, "float32", layout="3d", scale_on_device=True, mean=True),
    Shape("row_loss", 256, 6, "bfloat16", "entropy", 2.5),
    Shape("row_loss", 4096, 3, "bfloat16", "confidence", layout="sliced"),
    Shape("row_loss", 32000, 3, "bfloat16"),
    Shape("row_loss", 32000, 8, "float32", "entropy", 2.5, N=2049, mean=True),
    Shape("row_loss", 100, 3, "float32", mean=True, two_labels=True),
    Shape("row_loss", 32000, 3, "bfloat16", "entropy", 2.5, mean=True, two_labels=True),
    Shape("row_loss", 100, 3, "float32", divergence="reverse_kl", mean=True),
    Shape("row_loss", 1000, 3, "bfloat16", "min_ce", 2.5, divergence="jsd", everything=True, in_place=True),
    Shape("row_loss", 256, 6, "bfloat16", "entropy", 2.5, divergence="skew", everything=True, two_labels=True),
    Shape("row_loss", 32000, 8, "bfloat16", "entropy", 2.5, divergence="reverse_kl", everything=True, mean=True),
    Shape("row_loss", 32000, 3, "float32", divergence="jsd", everything=True, in_place=True, two_labels=True),
    Shape("row_loss", 128256, 3, "bfloat16", "given", 1.0, divergence="skew", in_place=True),
    Shape("row_sums", 16032, 2, "bfloat16", temperature=1.0),
    Shape("row_sums", 16032, 3, "float32", "entropy", 2.5, divergence="reverse_kl", everything=True),
    Shape("mixture_sums", 16032, 3, "bfloat16", divergence="jsd", everything=True),
    Shape("row_results", 16032, 2, "bfloat16", temperature=1.0, scale_on_device=True),
    Shape("row_results", 16032, 3, "float32", "entropy", 2.5, divergence="jsd", everything=True),
    Shape("confidence_forward", 1000, 3, "bfloat16"),
    Shape("confidence_backward", 1000, 3, "bfloat16"),
    Shape("confidence_forward", 1000, 3, "float32", two_labels=True),
    Shape("confidence_backward", 1000, 3, "float32", two_labels=True),
    Shape("feature_forward", 4096, 1, "float32"),
    Shape("feature_backward", 4096, 3, "float32"),
    Shape("feature_loss", 1000, 3, "bfloat16", scale_on_device=True),
    Shape("feature_loss", 1001, 2, "float32", teacher_dtype="bfloat16"),
    Shape("scale_rows", 1000, 1, "bfloat16"),
    Shape("scale_all", 100, 1, "float16"),
    Shape("batch_count", 100, 1, N=64),
    Shape("batch_mean", 100, 1, N=4096),
    Shape("min_norm", 1, 3),
    Shape("min_norm", 1, 16),
]


def _exhaustive() -> list[Shape]:
    """Every entry of the launch table.

    The options that cost most registers, a mean, "entropy" and a T that is not 1, 2 or 4, come with 1 and 3 teachers
    and with the most that fit on chip and in one pass; the default options with 3. float16 differs from bfloat16 only
    in its conversions and gets the default options only. So it is for what lies beyond the paper's formula.
    """
    shapes = []
    widths = [11, 16, 31, 64, 100, 256, 512, 1000, 2048, 4096, 8192, 32000, 65537]
    for dtype in ("float32", "bfloat16", "float16"):
        for C in widths:
            shapes.append(Shape("row_loss", C, 3, dtype, "confidence", 4.0))
            if dtype != "float16":
                shapes += [
                    Shape("row_loss", C, K, dtype, "entropy", 2.5, mean=True, two_labels=True) for K in (1, 3, 6, 8)
                ]
                shapes += [Shape("row_loss", C, K, dtype, "entropy", 2.5, mean=True) for K in (1, 3, 6, 8)]
                for divergence in ("reverse_kl", "jsd", "skew"):
                    shapes.append(Shape("row_loss", C, 3, dtype, divergence=divergence))
                    shapes += [
                        Shape("row_loss", C, K, dtype, "entropy", 2.5, mean=True, two_labels=True,
                              divergence=divergence, everything=True)
                        for K in (1, 3, 6, 8)
                    ]  # fmt: skip
        for C in (100, 512, 32000):
            for weighting in ("uniform", "given"):
                shapes += [Shape("row_loss", C, 3, dtype, weighting, T, layout="3d") for T in (1.0, 2.0)]
            shapes.append(Shape("row_loss", C, 3, dtype, needs_grad=False))
            shapes.append(Shape("row_loss", C, 3, dtype, teacher_dtype="float32"))
            shapes.append(Shape("row_loss", C, 3, dtype, layout="shifted"))
            shapes.append(Shape("row_loss", C, 16, dtype, "entropy", 2.5, mean=True))
            for divergence in ("forward_kl", "reverse_kl", "jsd"):
                last = ("entropy", 2.5)
                shapes += [
                    Shape(op, C, K, dtype, *last, divergence=divergence, everything=True)
                    for op in ("row_sums", "row_results", *(("mixture_sums",) if divergence == "jsd" else ()))
                    for K in (1, 3, 8)
                ]
            for op in ("confidence_forward", "confidence_backward"):
                shapes += [Shape(op, C, K, dtype, two_labels=two) for K in (1, 3, 16) for two in (False, True)]
            shapes += [Shape(op, C, K, dtype) for op in ("feature_forward", "feature_loss") for K in (1, 3, 16)]
            shapes += [Shape(op, C, 1, dtype) for op in ("feature_backward", "scale_rows")]
    return shapes


def _check(shape: Shape, arch: int, kernel: Kernel) -> None:
    what = f"sm_{arch} {shape}: {kernel}"
    assert kernel.stack == 0, f"spills: {what}"
    assert kernel.registers * kernel.threads <= 65536, f"does not fit on an SM: {what}"
    if shape.op == "min_norm" or shape.op.startswith("batch"):
        return  # a few numbers per row or in all: latency matters, not width
    # Of mixed dtypes the widest sets the number of elements per access.
    bits = 32 if "float32" in (shape.dtype, shape.teacher_dtype) else 16
    # The widest access that the width allows: C = 100 is 4 elements, so 64 bits in 16-bit types.
    aligned = 1 if shape.layout == "shifted" else min(shape.C & -shape.C, 8)
    expected = min(128, aligned * bits)
    tensors = shape.K + 1 if shape.op in ROWS else shape.K if shape.op.startswith("confidence") else 1
    if shape.op.startswith("feature"):
        tensors = 2 * shape.K
    if shape.op == "scale_all" or (shape.op == "scale_rows" and shape.N == 1):
        expected = 128
    if not shape.teacher_dtype:
        assert kernel.loads.get(str(expected), 0) >= tensors, f"narrow loads: {what}"
        if expected == 128:
            # The rest are labels, logits at the label and row statistics: a few per row and thread.
            narrow = sum(count for width, count in kernel.loads.items() if int(width) < 128)
            assert narrow <= 8 * (tensors + 1) * (1 + shape.two_labels), f"narrow loads: {what}"
    if shape.needs_grad and not shape.teacher_dtype and "forward" not in shape.op and not shape.op.endswith("_sums"):
        assert kernel.stores.get(str(expected), 0) >= 1, f"narrow stores: {what}"


def test_representative_launches() -> None:
    for shape, arch, kernel in compile_all(REPRESENTATIVE, ARCHS):
        _check(shape, arch, kernel)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("arch", ARCHS)
def test_every_launch(arch: int) -> None:
    for shape, _, kernel in compile_all(_exhaustive(), [arch]):
        _check(shape, arch, kernel)


def test_batch_size_and_width_do_not_recompile() -> None:
    """Streamed rows of any width with the same alignment share one kernel, and so do all batch sizes, 1 included."""
    batches = [Shape("row_loss", 1000, 1, N=N, temperature=1.0) for N in (1, 2, 7, 16, 64)]
    widths = [Shape("row_loss", C, 1, temperature=1.0, N=2) for C in (32000, 128256, 65528)]
    odd = [Shape("row_loss", C, 1, temperature=1.0, N=2) for C in (21841, 65537)]
    maps = [Shape("feature_loss", M, 2, N=N) for M, N in ((1000, 1), (1000, 2), (4096, 16), (100352, 64))]
    kernels = compile_all([*batches, *widths, *odd, *maps], [90])
    *keys, a, b, c, d = (kernel.key for _, _, kernel in kernels)
    assert a == b == c == d
    assert len(set(keys[:5])) == 1
    assert len(set(keys[5:8])) == 1
    assert len(set(keys[8:])) == 1
    assert len(set(keys)) == 3


def test_debug_mode_asserts_on_labels() -> None:
    """Only with CAMKD_FAST_DEBUG=1. Compiled, not run: the interpreter ignores device assertions."""
    shapes = [Shape("row_loss", 100, 1, temperature=1.0), Shape("confidence_forward", 100, 1)]
    for debug in (False, True):
        assert [kernel.asserts for _, _, kernel in compile_all(shapes, [90], debug)] == [debug, debug]


def test_a_batch_s_size_chooses_its_launches() -> None:
    """Small batches take one launch, whatever their programs; the table depends on N through its limits only."""
    assert launch.batch_launch(64, 64, 1) == launch.BatchLaunch("here", True, 128)
    for N, programs, num_warps, expected in [
        (2048, 1024, 1, ("here", True)),
        (2048, 2048, 4, ("before", True)),
        (2049, 1, 4, ("before", True)),
        (16384, 16384, 4, ("before", True)),
        (16385, 16385, 4, ("before", False)),
        (65536, 65536, 16, ("before", True)),
    ]:
        assert launch.batch_launch(N, programs, num_warps)[:2] == expected


def test_limits() -> None:
    """No block is wider than 8192 columns, and all block sizes are powers of 2."""
    for C in (1, 2, 10, 100, 1000, 8192, 8193, 262144):
        for K in (1, 3, 8, 16):
            for itemsize in (2, 4):
                for ALIGN in (1, 2, 4, 8):
                    blocks = [launch.onchip_launch(K, C, itemsize, ALIGN)[:2]] if launch.on_chip(K, C) else []
                    blocks.append((1, launch.streaming_launch(K, C, itemsize, ALIGN).BLOCK_C))
                    blocks.append(launch.confidence_launch(K, C, itemsize, ALIGN)[:2])
                    blocks.append(launch.elementwise_launch(C, itemsize)[:2])
                    for BLOCK_N, BLOCK_C in blocks:
                        assert 1 <= BLOCK_C <= 8192 and BLOCK_N >= 1
                        assert BLOCK_N & (BLOCK_N - 1) == 0 and BLOCK_C & (BLOCK_C - 1) == 0
