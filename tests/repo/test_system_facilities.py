"""Facilities that some operating systems lack are named in `camkd_fast/system.py` and nowhere else in the package."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "camkd_fast"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "kernels" not in path.relative_to(PACKAGE).parts)

IMPORTS = {
    "fcntl", "msvcrt", "resource", "signal", "pwd", "grp", "termios", "pty", "tty", "syslog", "winreg", "_winapi",
    "ctypes", "mmap", "posix", "nt", "curses", "readline",
}  # fmt: skip
OS = {
    "sysconf", "sched_getaffinity", "sched_setaffinity", "getloadavg", "fork", "forkpty", "register_at_fork", "kill",
    "killpg", "getuid", "geteuid", "getgid", "getpgid", "setsid", "nice", "uname", "umask", "chown", "chroot", "mkfifo",
    "symlink", "link", "readlink", "open", "replace", "rename", "name",
    "O_DIRECTORY", "O_BINARY", "memfd_create", "sendfile", "statvfs",
    "process_cpu_count", "posix_fadvise", "wait", "waitpid", "SCHED_BATCH", "times", "fchmod", "pread", "pwrite",
}  # fmt: skip
OTHERS = {
    "sys": {"platform", "getwindowsversion"},
    "platform": {"system", "processor", "libc_ver", "win32_ver", "mac_ver"},
    "multiprocessing": {"set_start_method"},
    "path": {"expanduser", "expandvars"},  # os.path
}
METHODS = {"symlink_to", "hardlink_to", "link_to", "expanduser", "owner", "group"}
PATHS = re.compile(r"/(proc|sys|dev)/|^(fork|forkserver)$")


def facilities(source: str) -> list[str]:
    """What a file uses of the lists above, with its lines."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] in IMPORTS]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            used = {"os": OS, **OTHERS}.get(node.module.split(".")[-1], set())
            names = [alias.name for alias in node.names if alias.name in used]
            names += [node.module] * (node.module.split(".")[0] in IMPORTS)
        elif isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else getattr(node.value, "attr", "")
            if node.attr in {"os": OS, **OTHERS}.get(owner, METHODS) or node.attr in METHODS:
                names = [f"{owner}.{node.attr}"]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and PATHS.search(node.value):
            names = [repr(node.value)]
        found += [f"{node.lineno}: {name}" for name in names if hasattr(node, "lineno")]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_facilities_are_asked_for_in_one_module(path: Path) -> None:
    found = facilities(path.read_text())
    if path.name == "system.py":
        assert len(found) > 5
    else:
        assert not found, f"{path.relative_to(PACKAGE)} names {found}: put it behind a function of camkd_fast/system.py"


@pytest.mark.parametrize(
    "line",
    [
        "import fcntl", "from signal import SIGTERM", "import ctypes.util", "os.sysconf('SC_PAGE_SIZE')",
        "os.kill(1, 0)", "from os import fork", "Path('~').expanduser()", "os.path.expandvars(x)",
        "open('/proc/meminfo')", "sys.platform",
        "get_context('fork')", "a.symlink_to(b)", "os.open(folder, os.O_RDONLY)", "'/dev/shm'",
    ],
)  # fmt: skip
def test_the_search_sees(line: str) -> None:
    assert facilities(line)


@pytest.mark.parametrize(
    "line", ["text.replace(a, b)", "os.environ['X']", "path.open()", "get_context('spawn')", "a.kill()"]
)
def test_the_search_leaves(line: str) -> None:
    assert not facilities(line)


def calls_without_encoding(source: str) -> list[int]:
    """Lines that read or write text in the locale's encoding, which is cp1252 on many machines."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            keywords = {keyword.arg for keyword in node.keywords}
            constants = [value.value for value in node.args if isinstance(value, ast.Constant)]
            text = (name == "open" and any(mode in ("r", "w", "a", "x") for mode in constants)) or "text" in keywords
            if (name in ("read_text", "write_text") or text) and "encoding" not in keywords and len(constants) < 2:
                found.append(node.lineno)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_text_files_name_their_encoding(path: Path) -> None:
    found = calls_without_encoding(path.read_text())
    assert not found, f"{path.relative_to(PACKAGE)}, lines {found}"


@pytest.mark.parametrize(
    "line", ["p.read_text()", "p.write_text(x)", "p.open('w')", "open(p, 'r')", "run(x, text=True)"]
)
def test_the_search_for_encodings_sees(line: str) -> None:
    assert calls_without_encoding(line)
