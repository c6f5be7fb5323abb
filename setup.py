"""Build camkd_fast._C with CMake and Ninja.

The module is optional. If it cannot be built, the package installs without it, and `camkd-fast info` reports the
reason from camkd_fast/_build_failure.txt. CAMKD_FAST_CPU=1 makes a failed build an error. The module's CUDA part is
optional as well (CAMKD_FAST_CUDA=auto|0|1, csrc/cuda/cuda.cmake); the module stores the reason if it is missing.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "csrc"))

from first_error import first_error  # noqa: E402


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        package = ROOT / "camkd_fast" if self.inplace or self.editable_mode else module.parent
        failure = package / "_build_failure.txt"
        failure.unlink(missing_ok=True)
        package.mkdir(parents=True, exist_ok=True)
        try:
            try:
                compile_module(module)
            except subprocess.CalledProcessError as error:
                # If only nvcc fails, build the CPU kernels without the CUDA ones.
                if "CUDA kernels: trying" not in error.output or os.environ.get("CAMKD_FAST_CUDA", "auto") != "auto":
                    raise
                compile_module(module, first_error(error.output))
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            log = getattr(error, "output", None)
            reason = first_error(log) if log else str(error)
            failure.write_text(reason + "\n", encoding="utf-8")
            module.unlink(missing_ok=True)  # an outdated module would be used unnoticed
            if os.environ.get("CAMKD_FAST_CPU") == "1" or os.environ.get("CAMKD_FAST_CUDA") == "1":
                raise RuntimeError(f"camkd_fast._C could not be built:\n{log or reason}") from error
            raise CompileError(
                f"camkd_fast._C could not be built ({reason}); the package falls back to PyTorch"
            ) from error


def compile_module(module: Path, cuda_failed: str = "") -> None:
    """Compile csrc/ and put the result at `module`. `cuda_failed`: build without CUDA kernels, for this reason."""
    import pybind11  # a requirement of the build

    with simple_folder() as work:
        shutil.copytree(ROOT / "csrc", work / "csrc", ignore=shutil.ignore_patterns("__pycache__"))
        (work / "csrc" / "cuda_failed.txt").write_text(cuda_failed, encoding="utf-8")
        configure = [
            *("cmake", "-S", "csrc", "-B", "build", "-G", "Ninja"),
            f"-DPython_EXECUTABLE={simple_path(Path(sys.executable), work / 'python')}",
            f"-Dpybind11_DIR={simple_path(Path(pybind11.get_cmake_dir()), work / 'pybind11')}",
        ]
        # Compilers translate their messages, and nvcc fails where its temporary folder has a space in its name.
        environment = {**os.environ, "LC_ALL": "C", "TMPDIR": str(work)}
        for command in (configure, ["cmake", "--build", "build"]):
            done = subprocess.run(command, cwd=work, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            output = done.stdout.decode("utf-8", "replace").replace(f"{work}{os.sep}", "")
            if done.returncode != 0:
                raise subprocess.CalledProcessError(done.returncode, command, output)
        (built,) = (path for path in (work / "build").glob("_C*") if path.suffix in (".so", ".pyd"))
        module.parent.mkdir(parents=True, exist_ok=True)  # of an editable install nobody has made it yet
        shutil.copyfile(built, module)
        shutil.copymode(built, module)


def is_simple(path: Path) -> bool:
    """True if compilers, CMake, Ninja and the shell take the path as it is, without quotes."""
    return re.fullmatch(r"[\w./\\:+-]+", str(path), re.ASCII) is not None


@contextmanager
def simple_folder() -> Iterator[Path]:
    """A temporary folder with a simple path, where there is one: sources and builds may lie in a folder of any name."""
    candidates = [Path(tempfile.gettempdir()), Path("/var/tmp"), Path("/dev/shm")]
    parent = next(
        (path for path in candidates if is_simple(path) and os.access(path, os.W_OK | os.X_OK)), candidates[0]
    )
    with tempfile.TemporaryDirectory(prefix="camkd_fast-", dir=parent) as folder:
        yield Path(folder).resolve()


def simple_path(path: Path, link: Path) -> Path:
    """`path` itself, or a symbolic link to it if its name needs quotes; CMake takes a semicolon for the end of one."""
    if is_simple(path):
        return path
    try:
        link.symlink_to(path)
    except OSError:  # Windows allows links to administrators only
        return path
    return link


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("camkd_fast._C", sources=[], optional=True)],
        cmdclass={"build_ext": CMakeBuild},
    )
