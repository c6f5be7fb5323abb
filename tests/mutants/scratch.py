"""A copy of the tree in which changes are applied, its compiled module, and pytest runs in it."""

from __future__ import annotations

import json
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from . import Change

ROOT = Path(__file__).parents[2]
HUNG = -1000  # exit code of a run that was ended


class BuildError(RuntimeError):
    """The compiled module does not build."""


class Tree:
    """A copy of the tracked and new files of this checkout in `folder`, with a compiled module of its own."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "tree"
        self.log = folder / "pytest.log"
        self._written = 0
        shutil.rmtree(self.root, ignore_errors=True)
        listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines():
            if (ROOT / name).is_file() and not (ROOT / name).is_symlink():
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.root / name)
        self.module = Module(self.root, folder / "objects")
        self.module.build()
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.mutants.server"],
            cwd=self.root,
            # The CUDA kernels for the host compile in less than half the time.
            env={**os.environ, "PYTHONPATH": str(self.root), "CAMKD_FAST_EMULATED_OPTIMISATION": "-O0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )

    @contextmanager
    def changed(self, change: Change) -> Iterator[None]:
        """Apply a change, compile what depends on it, and take it back.

        Raises:
            BuildError: the changed source does not compile.
        """
        path = self.root / change.file
        text, times = path.read_text(), path.stat()
        assert text.count(change.old) == 1, change.title
        path.write_text(text.replace(change.old, change.new))
        # A time that no other version of the file has, because Python compares only size and seconds.
        self._written += 1
        os.utime(path, (times.st_mtime, times.st_mtime + self._written))
        try:
            with self.module.changed(path):
                yield
        finally:
            path.write_text(text)
            os.utime(path, (times.st_atime, times.st_mtime))

    def pytest(self, tests: list[str], limit: float) -> int:
        """Exit code of pytest, or HUNG after `limit` seconds."""
        arguments = ["-x", "-q", "--no-header", "--durations=0", "-p", "no:cacheprovider", *tests]
        server = self._server
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps([str(self.log), *arguments]).encode() + b"\n")
        pid = int(server.stdout.readline())
        ready, _, _ = select.select([server.stdout], [], [], limit)
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # also processes that the tests left
        code = int(server.stdout.readline())
        return code if ready else HUNG

    def last_failure(self) -> str:
        """The first failed test of the last run."""
        failed = [
            line for line in self.log.read_text(errors="replace").splitlines() if line.startswith(("FAILED", "ERROR"))
        ]
        return failed[0].split(" - ")[0] if failed else ""

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()


class Module:
    """`camkd_fast._C` without CUDA, compiled with little optimisation; objects are kept from run to run.

    A change of a header compiles only the kernels of this machine's instruction set again.
    """

    def __init__(self, root: Path, objects: Path) -> None:
        self.root, self.objects = root, objects
        self.path = root / "camkd_fast" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        self.other_kernels: set[str] = set()

    def build(self) -> None:
        """Compile what is missing or older than its sources, and link."""
        self.objects.mkdir(parents=True, exist_ok=True)
        command = ["cmake", "-S", "csrc", "-B", str(self.objects), "-G", "Ninja", "-DCMAKE_EXPORT_COMPILE_COMMANDS=1"]
        self._run([*command, f"-DPython_EXECUTABLE={sys.executable}"], CAMKD_FAST_CUDA="0")
        self.commands = {
            Path(entry["file"]): shlex.split(entry["command"])
            for entry in json.loads((self.objects / "compile_commands.json").read_text())
        }
        self._compile([source for source in self.commands if self._outdated(source)], "")
        self._link("")
        found = subprocess.run(
            [sys.executable, "-c", "from camkd_fast import _C; print(_C.instruction_set())"],
            cwd=self.root, check=True, capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip
        kernels = {source.name for source in self.commands if source.name.startswith("kernels_")}
        self.other_kernels = kernels - {f"kernels_{found}.cpp"}

    @contextmanager
    def changed(self, path: Path) -> Iterator[None]:
        """The module with a changed source; nothing to do if no source depends on it."""
        changed = [source for source in self.commands if path in self._sources(source)]
        changed = [source for source in changed if source.name not in self.other_kernels]
        if not changed:
            yield
            return
        try:
            self._compile(changed, ".changed")
            self._link(".changed", changed)
            yield
        finally:
            self._link("")

    def _object(self, source: Path, suffix: str) -> Path:
        return self.objects / f"{source.stem}{suffix}.o"

    def _sources(self, source: Path) -> set[Path]:
        """The file and all headers that it includes, as g++ -MMD lists them."""
        listed = self._object(source, "").with_suffix(".d").read_text().replace("\\\n", " ").split(":", 1)[1]
        return {Path(name).resolve() for name in shlex.split(listed)}

    def _outdated(self, source: Path) -> bool:
        there = self._object(source, "")
        if not there.exists() or not there.with_suffix(".d").exists():
            return True
        built = there.stat().st_mtime
        return any(not path.exists() or path.stat().st_mtime > built for path in self._sources(source))

    def _compile(self, sources: list[Path], suffix: str) -> None:
        def compile_one(source: Path) -> None:
            target = self._object(source, suffix)
            command = [part for part in self.commands[source] if not part.startswith("-O")]
            at = command.index("-o")
            command[at + 1] = str(target)
            self._run([*command, "-O1", "-w", "-MMD", "-MF", str(target.with_suffix(".d"))])

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(compile_one, sources))

    def _link(self, suffix: str, changed: list[Path] | None = None) -> None:
        """Link into a new file: the server's forks may have the old one loaded."""
        objects = [self._object(source, suffix if source in (changed or ()) else "") for source in self.commands]
        partial = self.path.with_suffix(".partial")
        self._run(["g++", "-shared", "-fopenmp", *map(str, objects), "-o", str(partial)])
        partial.rename(self.path)

    def _run(self, command: list[str], **environment: str) -> None:
        done = subprocess.run(
            command, cwd=self.root, capture_output=True, text=True, env={**os.environ, **environment}, check=False
        )
        if done.returncode:
            raise BuildError((done.stderr or done.stdout)[-2000:])


def seconds_of(start: float) -> float:
    return round(time.perf_counter() - start, 1)
