"""Imports point one way: cli -> experiments -> train -> {data, models, losses}, losses -> backends -> {_C, kernels}.

Read from the source, so that an import inside a function counts as well.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "camkd_fast"
KERNELS = sorted((PACKAGE / "kernels").rglob("*.py"))
MODULES = sorted({*PACKAGE.rglob("*.py")} - {*KERNELS})

# What each part of the package may import besides itself: parts, or single modules of a part. The formula and the
# divergence are leaves of `losses` that everybody may import; contract and feature maps are leaves of `backends`.
FORMULA, CONTRACT, MAPS = "losses.formula", "backends.contract", "backends.feature_maps"
DIVERGENCE = "losses.divergence"
PARTS = {
    "kernels": {FORMULA, DIVERGENCE, CONTRACT, MAPS},
    "backends": {FORMULA, DIVERGENCE, "_C", "kernels"},
    "losses": {"backends", "errors"},
    "models": {"errors"},
    "errors": set(),
    "torchrun": set(),
    "data": {"system"},
    "system": set(),
    "report": set(),
    "train": {"models", "data", "losses", "system", "errors", "torchrun", "camkd_fast"},
    "experiments": {"train", "models", "data", "report", "losses", "system", "errors", "torchrun", "camkd_fast"},
    "integrations": {"losses", "camkd_fast"},
    "__init__": {"losses.logit", "losses.linear", "losses.feature", "losses.feature_module", "train.distiller"},
    "__main__": {"cli"},
}
# `losses` and `backends` from the bottom up: a module imports only modules of its part that stand before it.
ORDER = {
    "backends": [
        "contract", "feature_maps", "labels", "divergences", "reference", "row_sums", "compiled", "whole_losses", "cpu",
        "cuda", "memory", "dispatch", "__init__",
    ],
    "losses": [
        "__init__", "divergence", "formula", "autograd", "layout", "scale_plan", "eager", "checks", "output", "entry",
        "logit_op", "confidence_op", "feature_op", "feature_weights", "evaluate", "logit", "feature", "feature_module",
        "min_norm", "cpu_products", "projection", "linear_rows", "vocabulary", "linear_chunks", "linear_checks",
        "linear_op", "linear",
    ],
}  # fmt: skip


def imported(path: Path) -> set[str]:
    """Absolute dotted names of everything that a file imports, from anywhere in it."""
    package = list(path.relative_to(ROOT).with_suffix("").parts)
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = package[: len(package) - node.level] if node.level else []
            origin += node.module.split(".") if node.module else []
            names |= {".".join([*origin, alias.name]) for alias in node.names}
    return names


def is_module(name: str) -> bool:
    path = PACKAGE / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").exists()


def ours(path: Path) -> set[str]:
    """Modules of ours that a file imports, below camkd_fast; "camkd_fast" for the package's public names."""
    found = set()
    for name in imported(path):
        head, _, rest = name.partition(".")
        if head != "camkd_fast":
            continue
        while rest and rest != "_C" and not is_module(rest):
            rest = rest.rpartition(".")[0]
        found.add(rest or "camkd_fast")
    return found


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", [*MODULES, *KERNELS], ids=lambda p: str(p.relative_to(ROOT)))
def test_parts_import_one_way(path):
    part = part_of(path)
    if part == "cli":
        return  # at the top: it may import everything
    assert part in PARTS, f"{part} has no place in the layers: say here what it may import"
    for name in ours(path):
        allowed = any(name == other or name.startswith(f"{other}.") for other in {part, *PARTS[part]})
        assert allowed, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("part", ORDER)
def test_modules_of_losses_and_backends_import_one_way(part):
    order = ORDER[part]
    assert sorted(order) == sorted(path.stem for path in (PACKAGE / part).glob("*.py"))
    for path in (PACKAGE / part).glob("*.py"):
        if path.stem == "__init__" and part == "backends":
            continue  # it exports what the others define
        for name in ours(path):
            head, _, module = name.partition(".")
            if head == part and module and "." not in module:
                # dispatch imports every backend, for the type checker and at run time
                assert order.index(module) < order.index(path.stem), f"{part}.{path.stem} imports {name}"


def test_nothing_imports_the_command_line():
    for path in MODULES:
        if part_of(path) not in ("cli", "__main__"):
            assert not any(name.split(".")[0] == "cli" for name in ours(path))


@pytest.mark.parametrize("path", [*MODULES, *KERNELS], ids=lambda p: str(p.relative_to(ROOT)))
def test_the_package_never_imports_tests_or_benchmarks(path):
    assert not {name.split(".")[0] for name in imported(path)} & {"tests", "benchmarks"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_triton_is_imported_only_by_kernels(path):
    assert "triton" not in {name.split(".")[0] for name in imported(path)}


def test_losses_and_backends_need_only_torch():
    for path in [*MODULES, *KERNELS]:
        if part_of(path) in ("losses", "backends", "kernels", "__init__"):
            heads = {name.split(".")[0] for name in imported(path)}
            third_party = heads - {"torch", "camkd_fast", "triton"} - set(sys.stdlib_module_names)
            assert not third_party, f"{path.name} imports {third_party}"


def test_compiled_kernels_know_nothing_of_torch():
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert sources
    for path in sources:
        includes = [line for line in path.read_text().splitlines() if line.lstrip().startswith("#include")]
        assert not any(word in line for line in includes for word in ("torch", "ATen", "c10")), path
        if path.parent.name != "python" and path.stem != "bindings":
            assert not any("pybind11" in line or "Python.h" in line for line in includes), path


def test_no_module_is_named_like_a_dependency():
    dependencies = {"torch", "triton", "timm", "dali", "nvidia", "numpy", "sklearn", "matplotlib", "tqdm", "PIL"}
    dependencies |= {"yaml", "tyro", "tensorboard", "safetensors", "onnx", "onnxruntime", "onnxscript"}
    assert not dependencies & {path.stem for path in MODULES}


def test_one_name_for_one_thing():
    """No two modules of the package and the benchmarks share a name, but for a data set and its benchmark."""
    shared = {"__init__", "__main__", "fashion_mnist"}
    names: dict[str, Path] = {}
    for path in [*MODULES, *sorted((ROOT / "benchmarks").glob("*.py"))]:
        if path.stem in shared:
            continue
        assert path.stem not in names, f"{path} and {names[path.stem]}"
        names[path.stem] = path
