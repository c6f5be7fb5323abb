"""The shape of the code: where files may lie, how long a function may be, and the words it uses."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHIPPED = ("camkd_fast", "csrc", "setup.py")
PROSE = ("README.md", "CONTRIBUTING.md", "docs", "benchmarks", "Makefile", "pyproject.toml")
TEXT = {".py", ".pyi", ".h", ".cpp", ".cu", ".cuh", ".cmake", ".txt", ".md", ".yaml", ".yml", ".toml", ""}

# Words that an earlier version used in senses of its own, as whole words or parts of identifiers.
VOCABULARY = (
    "teams?", "stash", "sweeps?", "turns?", "told", "taught", "still", "plain(?:ly)?", "alone", "apart", "unfit",
    "pupils?", "residuals?",
)  # fmt: skip
PRIVATE = re.compile(rf"(?<![a-z])(?:{'|'.join(VOCABULARY)})(?![a-z])", re.IGNORECASE)


def tracked(*roots: str) -> list[Path]:
    """Tracked and new files under these roots."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *roots],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\n")  # fmt: skip
    return [ROOT / name for name in listed if name and (ROOT / name).is_file()]


def files(*roots: str) -> list[Path]:
    """Files of text under these roots; generated results are data."""
    return [p for p in tracked(*roots) if not p.is_symlink() and p.suffix in TEXT and "results" not in p.parts]


def split_identifiers(line: str) -> str:
    """`warp_teams` and `WarpTeams` as their words."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", line.replace("_", " "))


# Residual blocks, and a teacher of the study that is named plain.
OTHER_USES = {
    "camkd_fast/models/": r"(?i)residual",
    "benchmarks/study/": r"\bplain\b",
    "docs/strategies.md": r"\bplain\b",
}


def test_the_vocabulary_of_the_field():
    found = []
    for path in files(*SHIPPED, *PROSE):
        name = str(path.relative_to(ROOT))
        others = [pattern for place, pattern in OTHER_USES.items() if name.startswith(place)]
        for number, line in enumerate(path.read_text().splitlines(), 1):
            words = line
            for pattern in others:
                words = re.sub(pattern, "", words)
            if PRIVATE.search(split_identifiers(words)):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("line", ["warp_teams", "WarpTeams", "a stash", "Told.", "kResidual", "takes turns"])
def test_the_vocabulary_test_sees(line):
    assert PRIVATE.search(split_identifiers(line))


@pytest.mark.parametrize("line", ["return x", "steam", "distill", "retold_", "untold stories", "explain(x)"])
def test_the_vocabulary_test_leaves(line):
    assert not PRIVATE.search(split_identifiers(line))


# --- tree ------------------------------------------------------------------------------------------------------------

TREE = {
    ".": {"benchmarks", "camkd_fast", "csrc", "docs", "examples", "tests", ".ci", ".github"},
    "camkd_fast": {
        "backends",
        "cli",
        "data",
        "experiments",
        "integrations",
        "kernels",
        "losses",
        "models",
        "report",
        "train",
    },
    "camkd_fast/experiments": {"study"},
    "camkd_fast/train": {"strategies", "teachers"},
    "csrc": {"cpu", "cuda", "python"},
    "csrc/cuda": {"any_formula", "row_loss"},
    "tests": {
        *("backends", "benchmarks", "cli", "cuda", "data", "experiments"),
        *("gpu", "integrations", "losses", "models", "mutants", "repo", "support", "train"),
    },
}


@pytest.mark.parametrize("folder", TREE)
def test_folders(folder):
    """A new folder is a decision about the layout: say it here and in the map of CONTRIBUTING.md."""
    inside = {path.relative_to(ROOT / folder).parts for path in tracked(folder)}
    assert {parts[0] for parts in inside if len(parts) > 1} == TREE[folder]


# --- length ----------------------------------------------------------------------------------------------------------


def python_functions() -> Iterator[tuple[str, int, bool]]:
    """Name, lines and whether it is a kernel, of every shipped Python function; docstrings do not count."""
    for path in files("camkd_fast", "setup.py"):
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                kernel = any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
                words = (ast.get_docstring(node, clean=False) or "").count("\n")
                assert node.end_lineno is not None
                yield f"{path.relative_to(ROOT)}:{node.name}", node.end_lineno - node.lineno + 1 - words, kernel


def cpp_functions() -> Iterator[tuple[str, int, bool]]:
    """Likewise of C++: from a line that opens a body after a parameter list to the brace that closes it."""
    for path in files("csrc"):
        if path.suffix not in (".h", ".cpp", ".cu", ".cuh"):
            continue
        lines = path.read_text().splitlines()
        for start, line in enumerate(lines):
            if not re.search(r"\)(?: const)?(?: noexcept)? \{$", line) or re.match(
                r"\s*(if|for|while|switch|else|} )", line
            ):
                continue
            indent = len(line) - len(line.lstrip())
            end = next(i for i in range(start, len(lines)) if re.match(rf" {{0,{indent}}}}}", lines[i]))
            signature = start
            while signature > 0 and not re.search(r"[;{}]$|^\s*//|^#|^$|:$", lines[signature - 1]):
                signature -= 1
            yield (
                f"{path.relative_to(ROOT)}:{signature + 1}",
                end - signature + 1,
                any("CAMKD_KERNEL" in text for text in lines[signature : start + 1]),
            )


def test_functions_are_short():
    found = [*python_functions(), *cpp_functions()]
    assert len(found) > 800  # the search finds them
    long = [f"{name}: {lines} lines" for name, lines, kernel in found if lines > (140 if kernel else 60)]
    assert not long, "\n".join(long)


def test_named_tuples_have_methods_rather_than_properties():
    """torch.compile before torch 2.11 does not evaluate the properties of a named tuple."""
    found, properties = 0, []
    for path in files("camkd_fast"):
        for node in ast.walk(ast.parse(path.read_text())) if path.suffix == ".py" else ():
            if isinstance(node, ast.ClassDef) and "NamedTuple" in map(ast.unparse, node.bases):
                found += 1
                decorated = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.decorator_list]
                properties += [
                    f"{path.relative_to(ROOT)}:{part.lineno}: {node.name}.{part.name}"
                    for part in decorated
                    if any("property" in ast.unparse(decorator) for decorator in part.decorator_list)
                ]
    assert found > 40  # the search finds them
    assert not properties, "\n".join(properties)


# --- one carrier of the formula --------------------------------------------------------------------------------------

NUMBERS = ("temperature", "hard_weight", "soft_weight")
FORMULA = {"camkd_fast/losses/formula.py", "csrc/contract.h"}  # the two definitions
PUBLIC = ("camkd_loss", "camkd_loss_and_grad", "CAMKDLoss", "camkd_linear_loss")


def code_only(path: Path) -> list[str]:
    """Lines without comments, docstrings, the public functions, and reads of a Formula (`formula.temperature`)."""
    text = re.sub(r"\bformula\.\w+", "formula", path.read_text())
    if path.suffix == ".py":
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
                value = body[0].value
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    lines[value.lineno - 1 : value.end_lineno] = [""] * (value.end_lineno - value.lineno + 1)
            if path.name in ("logit.py", "linear.py") and getattr(node, "name", None) in PUBLIC:
                lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
        return [line.split("#")[0] for line in lines]
    return [line.split("//")[0] for line in text.splitlines()]


def formula_spellings() -> list[str]:
    """Places where the three numbers stand together: within ten lines of one another, overlapping ones counted once."""
    places = []
    for path in files(*SHIPPED):
        name = str(path.relative_to(ROOT))
        if name in FORMULA or path.suffix not in TEXT - {".md", ".txt", ".cmake"}:
            continue
        lines, last = code_only(path), -10
        for i in range(len(lines)):
            window = "\n".join(lines[i : i + 10])
            if i > last and all(re.search(rf"\b{word}\b", window) for word in NUMBERS):
                places.append(f"{name}:{i + 1}")
                last = i + 10
    return places


def test_the_formula_is_spelled_in_few_places():
    places = formula_spellings()
    assert len(places) <= 5, "\n".join(places)
