"""Imports point one way (architecture): read from the source, so that a lazy import counts as well."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "camkd_fast"
MODULES = sorted(PACKAGE.rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))

# Who may import whom within the package; a name stands for the module and everything in it. Nothing else may.
BELOW = {
    "reference": set(),
    "native": {"_C", "reference"},
    "cuda_kernels": {"_C", "native", "reference"},
    "dispatch": {"reference"},
    "checks": {"dispatch", "native"},
    "rows": set(),
    "logit_op": {"checks", "dispatch", "reference", "rows"},
    "logit_output": {"reference"},
    "logit_loss": {"checks", "dispatch", "logit_op", "logit_output", "reference", "rows"},
    "feature_op": {"checks", "dispatch", "reference", "rows"},
    "feature_loss": {"checks", "dispatch", "feature_op"},
    "__init__": {"feature_loss", "logit_loss"},
}
LOSSES = {"camkd_fast", "logit_loss", "feature_loss", "reference"}
LAYERS = {
    "baselines": LOSSES,
    "models": {"models"},
    "data": {"data"},
    "train": {"train", "models", "data", *LOSSES},
    "experiments": {"experiments", "train", "models", "data", "baselines", "report", *LOSSES},
    "report": {"report"},
}


def imported(path: Path, top_level_only: bool = False) -> set[str]:
    """Absolute dotted names of everything that a file imports, from anywhere in it or at import time only."""
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree))
    if top_level_only:
        inside = {id(n) for f in nodes if isinstance(f, (ast.FunctionDef, ast.Lambda)) for n in ast.walk(f)}
        nodes = [n for n in nodes if id(n) not in inside]
    package = list(path.relative_to(ROOT).with_suffix("").parts)
    if path.is_relative_to(ROOT / "kernels"):
        package.insert(0, "camkd_fast")
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = package[: len(package) - node.level] if node.level else []
            origin += node.module.split(".") if node.module else []
            names |= {".".join([*origin, alias.name]) for alias in node.names}
    return names


def ours(path: Path) -> set[str]:
    """First component below camkd_fast of each import of ours; "camkd_fast" for the package's own public names."""
    found = set()
    for name in imported(path):
        head, *rest = name.split(".")
        if head == "camkd_fast":
            part = rest[0] if rest else "camkd_fast"
            exists = (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").exists() or part in ("_C", "kernels")
            found.add(part if exists else "camkd_fast")
    return found


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_package_imports_point_one_way(path):
    name = name_of(path)
    if name in ("cli", "__main__"):
        return  # the top: whatever it imports, nothing may import it (below)
    allowed = BELOW.get(name, LAYERS.get(name))
    assert allowed is not None, f"{name} has no place in the layers: say here what it may import"
    assert ours(path) <= allowed, f"{name} imports {sorted(ours(path) - allowed)}"


def test_nothing_imports_the_command_line():
    for path in MODULES:
        if name_of(path) not in ("cli", "__main__"):
            assert "cli" not in ours(path)


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name)
def test_kernels_import_nothing_of_ours_but_kernels(path):
    # `camkd_fast.reference` holds the RowLoss that a backend returns; the package's other modules are above it.
    assert ours(path) <= {"kernels", "reference"}


@pytest.mark.parametrize("path", [*MODULES, *KERNELS], ids=lambda p: str(p.relative_to(ROOT)))
def test_the_package_never_imports_tests_or_benchmarks(path):
    assert not {name.split(".")[0] for name in imported(path)} & {"tests", "benchmarks", "kernels"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_triton_is_imported_by_kernels_alone(path):
    assert "triton" not in {name.split(".")[0] for name in imported(path)}


def test_only_train_needs_more_than_torch():
    light = {"reference", "native", "cuda_kernels", "dispatch", "checks", "rows", "__init__"}
    light |= {"logit_op", "logit_output", "feature_op", "logit_loss", "feature_loss"}
    for path in MODULES:
        if path.parent == PACKAGE and name_of(path) in light:
            heads = {name.split(".")[0] for name in imported(path)}
            third_party = heads - {"torch", "camkd_fast"} - set(__import__("sys").stdlib_module_names)
            assert not third_party, f"{path.name} imports {third_party}"


def test_kernels_of_csrc_know_nothing_of_torch():
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
