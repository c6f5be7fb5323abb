"""Builds camkd_fast._C with CMake and Ninja, and installs kernels/ as camkd_fast.kernels.

The module is optional: without a compiler the package still installs, and the reason is kept in
camkd_fast/_build_failure.txt for `camkd-fast info`. CAMKD_FAST_CPU=1 turns a failed build into an error.
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
        configure = [
            *("cmake", "-S", str(ROOT / "csrc"), "-B", str(build), "-G", "Ninja"),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCAMKD_OUTPUT={module}",
        ]
        try:
            for command in (configure, ["cmake", "--build", str(build)]):
                subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        except (OSError, subprocess.CalledProcessError) as error:
            log = getattr(error, "output", None) or str(error)
            lines = [line.strip() for line in log.splitlines() if line.strip()]
            at = next((i for i, line in enumerate(lines) if "error" in line.lower()), 0)
            # A compiler says what is wrong in that line, CMake in the sentence that starts on the next one.
            reason = " ".join(lines[at + 1 : at + 4]) if lines[at].startswith("CMake Error") else lines[at]
            failure.write_text(reason + "\n")
            if os.environ.get("CAMKD_FAST_CPU") == "1":
                raise RuntimeError(f"camkd_fast._C could not be built:\n{log}") from error
            raise CompileError(
                f"camkd_fast._C could not be built ({reason}); the package falls back to PyTorch"
            ) from error


setup(
    package_dir={"camkd_fast.kernels": "kernels"},
    ext_modules=[Extension("camkd_fast._C", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
