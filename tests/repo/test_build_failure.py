"""The reason that is kept for a failed build: the first error of the tool that failed.

The logs in build_logs/ are what GCC 12, Clang 14, binutils 2.40, nvcc 13.0, CMake and Ninja wrote for small wrong
programs; those of MSVC, of Apple's linker and of nvcc with too new a GCC were written after their documentation.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from camkd_fast.backends import dispatch
from camkd_fast.cli import main

ROOT = Path(__file__).parents[2]
LOGS = Path(__file__).parent / "build_logs"
first_error = runpy.run_path(str(ROOT / "csrc" / "first_error.py"))["first_error"]

REASONS = {
    "apple_ld": 'Undefined symbols for architecture arm64: "camkd::row_loss(int)", referenced from:',
    "as": "asm.cpp:1: Error: no such instruction: `bogus %eax'",
    "clang": "two.cpp:3:27: error: use of undeclared identifier 'undeclared'",
    "clang_include": "inc.cpp:1:10: fatal error: 'missing_error.h' file not found",
    "clang_openmp": "/usr/bin/ld: cannot find -lomp: No such file or directory",
    "clang_option": "clang: error: unknown argument: '-fno-such'",
    "cmake_bad_flags": "c++: error: unrecognized command-line option '-fno-such-option'",
    "cmake_no_compiler": "Could not find compiler set in environment variable CXX: /nonexistent/c++.",
    "cmake_no_ninja": 'CMake was unable to find a build program corresponding to "Ninja".  CMAKE_MAKE_PROGRAM is not '
    "set.  You probably need to select a different build tool.",
    "cmake_package": 'By not providing "FindNope.cmake" in CMAKE_MODULE_PATH this project has asked CMake to find a '
    'package configuration file provided by "Nope", but CMake did not find one.',
    "gcc": "error.cpp:1:21: error: invalid conversion from 'const char*' to 'int' [-fpermissive]",
    "gcc_command_line": "<command-line>: fatal error: missing_error.h: No such file or directory",
    "gcc_include": "inc.cpp:1:10: fatal error: missing_error.h: No such file or directory",
    "gcc_killed": "g++: fatal error: Killed signal terminated program cc1plus",
    "gcc_memory": "virtual memory exhausted: Cannot allocate memory",
    "gcc_old_for_nvcc": "/usr/local/cuda/include/crt/host_config.h:143:2: error: #error -- unsupported GNU version! "
    "gcc versions later than 15 are not supported!",
    "gcc_option": "g++: error: unrecognized command-line option '-fno-such-option'",
    "gcc_warning_first": "two.cpp:3:27: error: 'undeclared' was not declared in this scope",
    "ld_cannot_find": "/usr/bin/ld: cannot find -lnosuchlib: No such file or directory",
    "ld_undefined": "link.cpp:(.text+0x5): undefined reference to `f()'",
    "msvc": r"C:\error\bindings.cpp(31,5): error C2065: 'undeclared': undeclared identifier",
    "ninja": "../two.cpp:3:27: error: 'undeclared' was not declared in this scope",
    "ninja_missing": "ninja: error: '../absent.cpp', needed by 'o.o', missing and no known rule to make it",
    "ninja_shell": '/bin/sh: 1: Syntax error: "(" unexpected',
    "ninja_tool": "/bin/sh: 1: nosuchtool: not found",
    "nvcc": 'a.cu(1): error: identifier "undeclared" is undefined',
    "nvcc_fatal": "nvcc fatal   : Unsupported gpu architecture 'sm_10'",
    "nvcc_include": "b.cu:1:10: fatal error: nothing.h: No such file or directory",
    "nvcc_killed": "Killed",
    "nvcc_option": "nvcc fatal   : Value 'c++99' is not defined for option 'std'",
    "ptxas": "ptxas error   : Entry function '_Z1kPi' uses too much shared data (0x61a80 bytes, 0xc000 max)",
}


def test_every_log_has_its_reason() -> None:
    assert {path.stem for path in LOGS.glob("*.txt")} == set(REASONS)


@pytest.mark.parametrize("name", REASONS)
def test_the_first_error_is_the_reason(name: str) -> None:
    assert first_error((LOGS / f"{name}.txt").read_text()) == REASONS[name]


NO_ERRORS = (
    "-- Performing Test HAS_WERROR - Success",
    "[3/9] Building CXX object CMakeFiles/_C.dir/error.cpp.o",
    "/usr/bin/c++ -Werror '-DREASON=a.cpp:1:2: error: b' -o error.o -c error.cpp",
    "a.cpp:3:2: warning: an error: in a warning [-Wcpp]",
    '   12 | fail("a.cpp:1:2: error: quoted");',
    "a.cpp:3:9: note: the error is explained here",
    "ld: warning: object file (error.o) was built for newer macOS version",
)


@pytest.mark.parametrize("line", NO_ERRORS)
def test_a_line_with_the_word_is_no_error(line: str) -> None:
    true = "b.cpp:9:1: error: expected ';'"
    before = "FAILED: [code=1] error.o\n" if line.startswith("/usr") else ""
    assert first_error(f"{before}{line}\n{true}\nninja: build stopped: subcommand failed.\n") == true


def test_a_log_without_an_error_gives_its_last_line_and_a_long_reason_is_cut() -> None:
    assert first_error("one\n\n  two  \n") == "two"
    assert first_error("") == "no message"
    cut = first_error(f"a.cpp:1:1: error: {'x' * 9000}\n")
    assert len(cut) == 400 and cut.endswith("...")


def test_info_shows_the_reason_of_a_failed_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The text may hold anything that a compiler writes."""
    reason = "a.cpp:1:2: error: 'ü' \"%s\" ${x} @y@ ; \\n"
    (tmp_path / "_build_failure.txt").write_text(reason + "\n", encoding="utf-8")
    monkeypatch.setattr(dispatch, "__file__", str(tmp_path / "backends" / "dispatch.py"))
    monkeypatch.setitem(sys.modules, dispatch._MODULES["cpu"], None)  # as if it could not be imported
    dispatch.availability.cache_clear()
    try:
        assert main(["info"]) == 0
    finally:
        dispatch.availability.cache_clear()
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("  cpu "))
    assert "missing" in line and line.endswith(f"the build said: {reason}")
