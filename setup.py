"""Build camkd_fast._C with CMake and Ninja, and install kernels/ as camkd_fast.kernels.

The module is optional. If it cannot be built, the package installs without it, and `camkd-fast info` reports the
reason from camkd_fast/_build_failure.txt. CAMKD_FAST_CPU=1 makes a failed build an error. The module's CUDA part is
optional as well (CAMKD_FAST_CUDA=auto|0|1, csrc/cuda/cuda.cmake); the module stores the reason if it is missing.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        package = ROOT / "camkd_fast" if self.inplace or self.editable_mode else module.parent
        failure = package / "_build_failure.txt"
        failure.unlink(missing_ok=True)
        build = Path(self.build_temp).resolve() / "cmake"
        package.mkdir(parents=True, exist_ok=True)
        try:
            try:
                compile_module(build, module)
            except subprocess.CalledProcessError as error:
                # If only nvcc fails, build the CPU kernels without the CUDA ones.
                if "nvcc" not in error.output or os.environ.get("CAMKD_FAST_CUDA", "auto") != "auto":
                    raise
                compile_module(build, module, reason_of(error.output))
        except (OSError, subprocess.CalledProcessError) as error:
            log = getattr(error, "output", None) or str(error)
            reason = reason_of(log)
            failure.write_text(reason + "\n")
            module.unlink(missing_ok=True)  # an outdated module would be used unnoticed
            if os.environ.get("CAMKD_FAST_CPU") == "1" or os.environ.get("CAMKD_FAST_CUDA") == "1":
                raise RuntimeError(f"camkd_fast._C could not be built:\n{log}") from error
            raise CompileError(
                f"camkd_fast._C could not be built ({reason}); the package falls back to PyTorch"
            ) from error


def compile_module(build: Path, module: Path, cuda_failed: str = "") -> None:
    configure = [
        *("cmake", "-S", str(ROOT / "csrc"), "-B", str(build), "-G", "Ninja"),
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCAMKD_OUTPUT={module}",
        f"-DCAMKD_CUDA_FAILED={cuda_failed}",
    ]
    for command in (configure, ["cmake", "--build", str(build)]):
        subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def reason_of(log: str) -> str:
    """The error message in a build log."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    at = next((i for i, line in enumerate(lines) if "error" in line.lower()), 0)
    # Compilers give the message on that line, CMake on the lines after it.
    return " ".join(lines[at + 1 : at + 4]) if lines[at].startswith("CMake Error") else lines[at]


setup(
    package_dir={"camkd_fast.kernels": "kernels"},
    ext_modules=[Extension("camkd_fast._C", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
