"""The evaluations of `fingerprint.py`, as data: what each calls, on which shapes, with which options."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

WEIGHTINGS = ("confidence", "uniform", "entropy", "given", "given rows")
REDUCTIONS = ("mean", "sum", "none", "mean/number", "mean/tensor")
LAYOUTS = ("contiguous", "padded", "expanded", "3-D", "3-D slice", "transposed", "stacked")
DTYPES = ("float32", "bfloat16", "float16", "mixed")
IGNORED = ("none", "some", "all")
COLUMNS = ("", "-inf", "-inf student", "finfo.min")
TEMPERATURES = (1.0, 2.0, 3.3, 4.0)
GRADIENTS = ("one", "given", "retained")
LOGIT_ENTRIES = ("loss", "no grad", "loss and grad", "module", "backend mean", "backend mean and grad")
COMPILED_ENTRIES = ("compiled loss", "compiled loss and grad")
FEATURE_ENTRIES = ("confidence", "feature", "feature module", "compiled features")
FORMATS = ("contiguous", "channels_last", "flat")


@dataclass(frozen=True)
class Spec:
    """One evaluation. An entry reads the fields that mean something to it."""

    entry: str
    N: int = 5
    C: int = 10
    K: int = 3
    dtype: str = "float32"  # of the student; "mixed": float32 with teachers of all three
    weighting: str = "confidence"
    reduction: str = "mean"  # "/number" and "/tensor": with num_items
    layout: str = "contiguous"
    ignored: str = "none"
    ignore_index: int = -100
    columns: str = ""  # masked columns
    temperature: float = 4.0
    hard_weight: float = 1.0
    soft_weight: float = 1.0
    gradient: str = "one"  # grad_output
    loss_scale: str = "1"
    peaked: bool = False
    format: str = "contiguous"  # memory format of feature maps
    auto: bool = False  # backend="auto" where that means the backend under test
    regime: str = "table"  # of the CUDA kernel on the emulated device
    labels: str = "one"  # of a row; or "two"

    @property
    def name(self) -> str:
        """Entry, sizes and every option that is not the default, without blanks."""
        options = [
            f"{f.name}={getattr(self, f.name)}"
            for f in fields(self)
            if f.name not in ("entry", "N", "C", "K") and getattr(self, f.name) != f.default
        ]
        return ",".join([self.entry, f"N={self.N}", f"C={self.C}", f"K={self.K}", *options]).replace(" ", "_")


def _varied(count: int, seed: str, **choices: Sequence[Any]) -> list[dict[str, Any]]:
    """`count` combinations in which each choice of each option occurs equally often."""
    columns = {}
    for name, options in choices.items():
        values = [options[i % len(options)] for i in range(count)]
        random.Random(f"{seed} {name}").shuffle(values)
        columns[name] = values
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


LOGIT_OPTIONS: dict[str, Sequence[Any]] = {
    "weighting": WEIGHTINGS,
    "reduction": ("mean", "mean", *REDUCTIONS),
    "layout": LAYOUTS,
    "dtype": DTYPES,
    "ignored": ("none", "none", "some", "some", "all"),
    "ignore_index": (-100, -100, -1, 2),
    "columns": ("", "", *COLUMNS),
    "temperature": TEMPERATURES,
    "hard_weight": (1.0, 1.0, 0.3, 0.0),
    "soft_weight": (1.0, 1.0, 0.7, 0.0),
    "gradient": GRADIENTS,
    "loss_scale": ("1", "1024", "tensor"),
    "peaked": (False, True),
    "K": range(1, 17),
}
FEATURE_OPTIONS: dict[str, Sequence[Any]] = {
    "dtype": DTYPES,
    "reduction": ("mean", "sum", "none"),
    "format": FORMATS,
    "layout": ("contiguous", "padded", "stacked", "transposed"),
    "ignored": IGNORED,
    "ignore_index": (-100, 2),
    "columns": COLUMNS,
    "peaked": (False, True),
    "gradient": GRADIENTS,
}


def _specs(count: int, seed: str, sizes: Sequence[tuple[int, int]], **choices: Sequence[Any]) -> list[Spec]:
    """Specs of varied options; `sizes` are pairs (N, C)."""
    specs = []
    for options in _varied(count, seed, size=sizes, **choices):
        N, C = options.pop("size")
        if options["entry"].startswith("backend mean"):
            options["reduction"] = "mean"
        specs.append(Spec(N=N, C=C, **options))
    return specs


def _compiled() -> list[Spec]:
    """A graph each, which takes a second: few."""
    return [
        Spec("compiled loss", 16, 33, gradient="given"),
        Spec("compiled loss", 16, 33, reduction="none", layout="3-D", gradient="given", dtype="bfloat16"),
        Spec("compiled loss", 6, 100, weighting="given rows", reduction="sum", ignored="some"),
        Spec("compiled loss", 6, 100, dtype="float16", reduction="mean/tensor", weighting="entropy", layout="padded"),
        Spec("compiled loss and grad", 16, 33, loss_scale="tensor"),
        Spec("compiled features", 4, 10, K=2),
    ]


def _of_two_labels(count: int, confidence: int, sizes: Sequence[tuple[int, int]], K: Sequence[int]) -> list[Spec]:
    """Logit losses and confidence weights of rows with two labels."""
    two = {"labels": ("two",), "K": K}
    return [
        *_specs(count, "two labels", sizes, entry=LOGIT_ENTRIES, **LOGIT_OPTIONS | two),
        *_specs(confidence, "two labels' weights", sizes, entry=("confidence",), **FEATURE_OPTIONS | two),
    ]


def _unique(specs: list[Spec]) -> list[Spec]:
    return list({spec.name: spec for spec in specs}.values())


def _for_host() -> list[Spec]:
    """`reference` and `cpu`: milliseconds each."""
    widths = (1, 2, 3, 7, 8, 10, 15, 16, 17, 33, 64, 100, 127, 129, 257, 512, 1000, 1001, 1025, 2049, 4096, 5000)
    rows = (0, 1, 2, 3, 5, 8, 17, 33, 64)
    sizes = [(N, C) for N in rows for C in widths if N * C <= 40_000]
    specs = _specs(330, "host", sizes, entry=("loss", *LOGIT_ENTRIES), auto=(False,) * 5 + (True,), **LOGIT_OPTIONS)
    # On `cpu` float64 runs by backend="auto", on the reference.
    specs += [
        replace(spec, dtype="float64", auto=True)
        for spec in _specs(20, "wide", [(5, 10), (3, 100), (7, 33)], entry=LOGIT_ENTRIES, **LOGIT_OPTIONS)
    ]
    common = {"peaked": True, "ignored": "some"}
    for dtype in ("float32", "bfloat16"):
        # Columns in parallel, because rows are few or need much scratch; recycled outputs; streaming stores.
        specs += [
            Spec("loss", 1, 70_000, dtype=dtype, temperature=3.3),
            Spec("loss and grad", 1, 70_000, K=2, dtype=dtype, weighting="entropy", columns="-inf", layout="padded"),
            Spec("loss", 1, 33_333, K=1, dtype=dtype, temperature=2.0, reduction="sum"),
            Spec("loss", 3, 70_001, K=16, dtype=dtype, temperature=1.0, reduction="none"),
            Spec("loss", 64, 12_000, dtype=dtype, gradient="retained", **common),
            Spec("loss", 300, 9_001, K=1, dtype=dtype, gradient="given", **common),
        ]
    specs += _specs(30, "confidence", sizes, entry=("confidence",), K=range(1, 17), **FEATURE_OPTIONS)
    specs += _of_two_labels(24, 6, sizes, range(1, 17))
    small = [(0, 4), (1, 6), (3, 10), (8, 33), (17, 100)]
    specs += _specs(30, "feature", small, entry=("feature",), K=(1, 2, 3, 7), **FEATURE_OPTIONS)
    specs += _specs(8, "module", small[1:], entry=("feature module",), K=(1, 2, 3), ignored=IGNORED)
    return _unique(specs + _compiled())


def _for_triton() -> list[Spec]:
    """The interpreter takes 12 ms per row and operation. More than 6 teachers and wide rows are streamed."""
    sizes = [(1, 1), (2, 10), (3, 17), (1, 100), (2, 129), (0, 5)]
    entries = {"entry": LOGIT_ENTRIES}
    specs = _specs(42, "on chip", sizes, **entries, **LOGIT_OPTIONS | {"K": range(1, 7)})
    specs += _specs(18, "streaming", sizes, **entries, **LOGIT_OPTIONS | {"K": (7, 8, 9, 16)})
    specs += _specs(6, "wide", [(1, 5000), (2, 4097)], **entries, **LOGIT_OPTIONS | {"K": (3, 4)})
    specs += _specs(8, "confidence", sizes, entry=("confidence",), K=(1, 2, 3, 7), **FEATURE_OPTIONS)
    specs += _specs(8, "feature", [(1, 6), (3, 10)], entry=("feature",), K=(1, 2, 3), **FEATURE_OPTIONS)
    specs += _of_two_labels(12, 4, sizes, (1, 2, 3, 7))
    specs += [Spec("feature module", 2, 6, K=2), *_compiled()[::4], _compiled()[-1]]
    return _unique(specs)


def _for_cuda_host() -> list[Spec]:
    """A fiber for every CUDA thread. Kernels for a known number of teachers (1 to 5) and for any number."""
    sizes = [(0, 5), (1, 1), (2, 10), (5, 17), (3, 100), (7, 129), (4, 1000), (2, 2100)]
    entries = {"entry": LOGIT_ENTRIES}
    teachers = (1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 6, 8, 16)
    specs = _specs(78, "table", sizes, **entries, **LOGIT_OPTIONS | {"K": teachers})
    # Widths at which the launch table chooses that regime; `evaluate` checks that it does.
    for regime, count, pairs, K, dtypes in (
        ("cluster", 8, [(2, 1999), (3, 2000)], [1], DTYPES[:3]),
        ("cluster", 24, [(2, 1000), (3, 1001)], [2, 3, 4, 5], DTYPES[:3]),
        ("cluster", 6, [(2, 1000), (3, 1001)], [6, 7], ["bfloat16", "float16"]),
        ("batches", 36, [(3, 1120), (2, 1128)], [1, 2, 3, 4, 5, 7], DTYPES[:3]),
    ):
        options = entries | LOGIT_OPTIONS | {"K": K, "dtype": dtypes}
        specs += [replace(spec, regime=regime) for spec in _specs(count, f"{regime} {K}", pairs, **options)]
    specs += _specs(12, "confidence", sizes, entry=("confidence",), K=(1, 2, 3, 7), **FEATURE_OPTIONS)
    specs += _specs(12, "feature", [(1, 6), (3, 10), (4, 100)], entry=("feature",), K=(1, 2, 3), **FEATURE_OPTIONS)
    specs += _of_two_labels(24, 6, sizes, teachers)
    specs += [Spec("feature module", 3, 6, K=2), *_compiled()]
    return _unique(specs)


def specs_for(backend: str) -> list[Spec]:
    """The evaluations of a backend: `reference`, `cpu-*`, `triton` or `cuda-host`."""
    if backend in ("triton", "cuda-host"):
        return _for_triton() if backend == "triton" else _for_cuda_host()
    specs = _for_host()
    if backend == "reference":
        return specs
    # The compiled CPU code computes no mean of its own: there the host knows the divisor.
    return [spec for spec in specs if not spec.entry.startswith("backend mean") or spec.dtype == "float64"]
