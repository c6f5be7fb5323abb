"""The sdist, the wheel, and builds in folders of any name. tests/repo/test_build_failure.py has the failures."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

ROOT = Path(__file__).parents[2]
SETUP: dict[str, Any] = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")

# Names that the shell, CMake, Ninja, Make or a compiler could take for something else.
NAMES = {
    "second download": "camkd-fast (1)",
    "quotes": 'it\'s "mine"',
    "percent and brackets": "100 % [x] {y}",
    "umlauts": "Übungen ß 日本",
    "ampersand and dollar": "R&D $HOME #1",
    "semicolon": "a;b, c",
    "dash": "-B",
    "backslash and wildcards": "a\\b `c` *?!",
    "long": "n" * 200,
}


def checkout(folder: Path) -> Path:
    """The files that git tracks, as they are now."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\n")):
        if (ROOT / name).exists():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    return folder


def run(command: list[Any], cwd: Path, **environment: str) -> str:
    unset = {k: v for k, v in os.environ.items() if not k.startswith("CAMKD_FAST") and k != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=cwd, env=unset | environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def names_in(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


# The folder in which CMake runs, and what it is given


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], Path, dict[str, str]]]:
    """The commands of a build, which find what a build would have made."""
    given: list[tuple[list[str], Path, dict[str, str]]] = []

    def record(command: list[str], cwd: Path, env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        given.append((command, cwd, env))
        (cwd / "build").mkdir(exist_ok=True)
        (cwd / "build" / "_C.so").write_bytes(b"module")
        assert (cwd / "csrc" / "cuda" / "cuda.cmake").exists()
        return subprocess.CompletedProcess(command, 0, b"")

    monkeypatch.setattr(subprocess, "run", record)
    return given


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_cmake_sees_simple_names_only(
    name: str, commands: list[tuple[list[str], Path, dict[str, str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the names of the folders of the module, of Python and of temporary files are."""
    folder = tmp_path / name
    folder.mkdir()
    (folder / "python").symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    SETUP["compile_module"](folder / "_C.so")
    assert (folder / "_C.so").read_bytes() == b"module"
    assert len(commands) == 2
    for command, cwd, environment in commands:
        assert SETUP["is_simple"](cwd) and environment["TMPDIR"] == str(cwd) and environment["LC_ALL"] == "C"
        assert not cwd.exists()
        for argument in command:
            assert SETUP["is_simple"](Path(argument.partition("=")[2] or argument)), argument


@pytest.mark.parametrize("path", ["/usr/lib/python3.11", "C:\\Python\\x", "/a/b-c_d.e+f"])
def test_a_simple_path_is_used_as_it_is(path: str, tmp_path: Path) -> None:
    assert SETUP["simple_path"](Path(path), tmp_path / "link") == Path(path)
    assert not (tmp_path / "link").is_symlink()


# Whole builds


class Built(NamedTuple):
    python: Path  # of an environment without torch
    sdist: Path
    from_sdist: Path
    from_checkout: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """`python -m build` in a clean environment: the sdist, then a wheel from it; and a wheel from a checkout."""
    folder = tmp_path_factory.mktemp("built")
    venv.create(folder / "clean", with_pip=True)
    python = folder / "clean" / "bin" / "python"
    source = checkout(folder / "source")
    run([python, "-m", "pip", "install", "-q", "build"], folder)
    run([python, "-m", "build", "--outdir", folder / "dist", source], folder)
    run([python, "-m", "pip", "wheel", source, "--no-deps", "-w", folder / "wheels"], folder, CAMKD_FAST_CUDA="0")
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    (from_sdist,), (from_checkout,) = (folder / "dist").glob("*.whl"), (folder / "wheels").glob("*.whl")
    return Built(python, sdist, from_sdist, from_checkout)


@pytest.mark.slow
def test_the_sdist_holds_what_a_build_needs_and_the_tests(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    wanted = ("csrc/", "camkd_fast/", "tests/", "docs/", "benchmarks/")
    missing = {name for name in tracked if name.startswith(wanted)} - names
    assert not missing
    assert {"README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", "setup.py", "Makefile", "mkdocs.yml"} <= names
    assert not {name for name in names if name.endswith((".so", ".pyc", "_build_failure.txt"))}


@pytest.mark.slow
def test_wheels_from_the_sdist_and_from_a_checkout_hold_the_same(built: Built) -> None:
    names = names_in(built.from_sdist)
    assert names == names_in(built.from_checkout)
    assert {"camkd_fast/kernels/__init__.py", "camkd_fast/py.typed", "camkd_fast/_C.pyi"} <= names
    assert sum(name.startswith("camkd_fast/_C.") and name.endswith(".so") for name in names) == 1
    assert {name.split("/")[0] for name in names} == {"camkd_fast"}
    assert "camkd_fast/_build_failure.txt" not in names


@pytest.mark.slow
def test_the_module_of_the_wheel_imports_without_torch(built: Built, tmp_path: Path) -> None:
    zipfile.ZipFile(built.from_sdist).extractall(tmp_path)
    code = "import sys; sys.path.insert(0, sys.argv[1]); import _C; print(*_C.cuda_build(), sep='|')"
    has_cuda, architectures = run([built.python, "-c", code, tmp_path / "camkd_fast"], tmp_path).split("|")
    # Each further GPU architecture would double the time to build
    if has_cuda == "True" and not torch.cuda.is_available():
        assert architectures == "90"
    else:
        assert has_cuda == "True" or "nvcc" in architectures


@pytest.fixture
def wheel_of(tmp_path: Path) -> Callable[..., set[str]]:
    """Builds a wheel without CUDA and without optimisation, and returns the names in it."""
    launcher = tmp_path / "without_optimisation"
    launcher.write_text('#!/bin/sh\nexec "$@" -O0\n')
    launcher.chmod(0o755)

    def build(source: Path, python: Path = Path(sys.executable), **environment: str) -> set[str]:
        environment = {"CAMKD_FAST_CUDA": "0", "CMAKE_CXX_COMPILER_LAUNCHER": str(launcher)} | environment
        command = [python, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path / "out"]
        run([*command, "."], source, **environment)  # pip takes a semicolon in a path for a marker
        (wheel,) = (tmp_path / "out").glob("*.whl")
        return names_in(wheel)

    return build


def has_module(names: set[str]) -> bool:
    return any(name.startswith("camkd_fast/_C.") and name.endswith(".so") for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_a_folder_of_any_name_builds(name: str, wheel_of: Callable[..., set[str]], tmp_path: Path) -> None:
    assert has_module(wheel_of(checkout(tmp_path / name)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["my (ü) env & x;y", "it's 100 %"])
def test_environments_and_temporary_folders_of_any_name_build(
    name: str, wheel_of: Callable[..., set[str]], tmp_path: Path
) -> None:
    folder = tmp_path / name
    venv.create(folder / "env")
    packages = os.pathsep.join(path for path in sys.path if path.endswith("site-packages"))
    (folder / "tmp").mkdir()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    python = folder / "env" / "bin" / "python"
    environment = {"PYTHONPATH": packages, "TMPDIR": str(folder / "tmp"), "PATH": path}
    assert has_module(wheel_of(checkout(folder / "src"), python, **environment))


@pytest.mark.slow
def test_a_read_only_home_builds(wheel_of: Callable[..., set[str]], tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    home.chmod(0o500)
    assert has_module(wheel_of(checkout(tmp_path / "src"), HOME=str(home), XDG_CACHE_HOME=str(home / "cache")))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "/nonexistent/c++"}, "/nonexistent/c++"),
        ({"CXXFLAGS": "-DREASON=error -fno-such-option"}, "unrecognized command-line option"),
        ({"CXXFLAGS": "-include missing_error.h"}, "missing_error.h: No such file or directory"),
        ({"LDFLAGS": "-lnosuchlib"}, "cannot find -lnosuchlib"),
    ],
    ids=["no compiler", "bad option", "missing header", "missing library"],
)
def test_a_build_that_fails_keeps_its_reason(
    environment: dict[str, str], reason: str, wheel_of: Callable[..., set[str]], tmp_path: Path
) -> None:
    names = wheel_of(checkout(tmp_path / "src"), **environment)
    assert not has_module(names)
    (wheel,) = (tmp_path / "out").glob("*.whl")
    assert reason in zipfile.ZipFile(wheel).read("camkd_fast/_build_failure.txt").decode()


# What the workflow and the extras promise


def test_the_workflow_pins_what_it_uses_and_covers_every_python() -> None:
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    jobs = yaml.safe_load(text)["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    for step in steps:
        assert "run" in step or re.fullmatch(r"[\w-]+/[\w-]+@v\d+\.\d+\.\d+", step["uses"]), step
    commands = [step["run"] for step in jobs["linux"]["steps"] if "run" in step]
    assert commands == ["make demo PYTHON=python", "make test PYTHON=python"]
    supported = set(re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text()))
    assert supported <= set(jobs["linux"]["strategy"]["matrix"]["python"])
    for name in re.findall(r"tests/[\w/.]+", text):
        assert (ROOT / name).exists(), name


def test_the_extras_for_dali_name_a_cuda_version() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^dali-cuda12 = \["nvidia-dali-cuda120', text, re.MULTILINE)
    assert re.search(r'^dali-cuda13 = \["nvidia-dali-cuda130', text, re.MULTILINE)
    assert re.search(r'^dali = \["camkd-fast\[dali-cuda13\]"\]', text, re.MULTILINE)
