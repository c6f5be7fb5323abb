"""The reason in a build log: the first error of a compiler, linker, CMake, Ninja or shell."""

from __future__ import annotations

import re

LONGEST = 400  # characters of a reason: the names of templates have no end

# A message at a place in a source file, as GCC and Clang (a.cpp:1:2:), nvcc and MSVC (a.cu(1):) or ptxas (a.ptx, line
# 1;) write it. MSVC and EDG put a code between "error" and the colon.
_AT_A_LINE = re.compile(
    r".+?(?::\d+(?::\d+)?:|\(\d+(?:,\d+)?\)\s*:|, line \d+;)\s*"
    r"(?:(?:internal compiler|fatal|catastrophic)\s+)?error\s*(?:#?[A-Z]*\d[\w-]*)?\s*:",
    re.IGNORECASE,
)
# A message of the tool itself: "g++: fatal error: Killed ...", "nvcc fatal   : ...", "cl : Command line error D8021 :".
_OF_A_TOOL = re.compile(
    r"(?:(?!CMake)\S*?(?:cc|[cg]\+\+|clang|clang\+\+|cc1|cc1plus|cl|clang-cl|nvcc|cicc|cudafe\+\+|ptxas|nvlink|fatbinary"
    r"|ld|lld|link|as|strip|make|ninja)(?:-?[\d.]+)?(?:\.exe)?|LLVM|LINK|Command-line|<command[ -]line>)\s*:?\s*"
    r"(?:(?:internal compiler|fatal|catastrophic|command line)\s+)?(?:error|fatal|internal error)\s*(?:[A-Z]+\d+)?\s*:",
    re.IGNORECASE,
)
# Linkers that give a reason without the word.
_OF_A_LINKER = re.compile(
    r".*: undefined reference to |Undefined symbols for architecture |.*: multiple definition of "
    r"|\S*ld(?:\.\w+)?(?:\.exe)?: (?!warning|.*: in function|.*: note)"
    r"(?:cannot |library |symbol|framework |unrecogni[sz]ed |final link failed|.*: (?:cannot|file not recognized))"
    r"|.*: undefined symbol: "
)
# What a shell or the system says of a program.
_OF_A_SHELL = re.compile(
    r"(?:/\S*/)?(?:ba|da|z|k)?sh: (?:line )?\d+: |.*: (?:command )?not found$|Killed$|virtual memory exhausted"
    r"|\S*(?:cc1|cc1plus): (?:out of memory|all warnings being treated as errors)"
    r"|'\S+' is not recognized as an internal or external command"
)
_KINDS = (_AT_A_LINE, _OF_A_TOOL, _OF_A_LINKER, _OF_A_SHELL)
# A line of the source that a compiler quotes, and a command that Ninja shows.
_QUOTED = re.compile(r"\d*\s*\||\[\d+/\d+\] ")


def first_error(log: str) -> str:
    """One line, at most LONGEST characters: the first error in the output of a build, or else its last line."""
    lines = _messages(log)
    found = next((line for line in lines if any(kind.match(line) for kind in _KINDS)), None)
    if found and found.startswith("Undefined symbols"):
        found = " ".join(lines[lines.index(found) :][:2])
    reason = found or _of_cmake(log) or (lines[-1] if lines else "no message")
    return reason if len(reason) <= LONGEST else reason[: LONGEST - 3] + "..."


def _messages(log: str) -> list[str]:
    """Stripped lines, without commands and quoted source, in which anything may be written."""
    lines: list[str] = []
    after_failed = False
    for line in map(str.strip, log.splitlines()):
        if (
            line
            and not after_failed
            and not _QUOTED.match(line)
            and not line.startswith(("FAILED:", "Run Build Command"))
        ):
            lines.append(line)
        after_failed = line.startswith("FAILED:")
    return lines


def _of_cmake(log: str) -> str:
    """The first error of CMake itself: the text after the colon, or the indented paragraphs below."""
    lines = log.splitlines()
    for number, line in enumerate(lines):
        if not line.startswith("CMake Error"):
            continue
        of_line = re.match(r"CMake Error(?: at \S.*?:\d+ \(\w+\))?(?: in .*?)?:\s*(.*)", line)
        if of_line and of_line[1]:
            return of_line[1].strip()
        text: list[str] = []
        for below in lines[number + 1 :]:
            if below and not below.startswith(" "):
                break
            if below.strip():
                text.append(below.strip())
            elif text and text[-1].endswith("."):
                break
        return " ".join(text)
    return ""
