"""The command line. `info` needs torch alone; every other command the extra `train`, and `export` that of its name."""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from .info import environment, info

# Module -> package that brings it.
EXTRAS = {
    "train": {
        "matplotlib": "matplotlib",
        "numpy": "numpy",
        "PIL": "pillow",
        "yaml": "pyyaml",
        "safetensors": "safetensors",
        "sklearn": "scikit-learn",
        "tensorboard": "tensorboard",
        "tqdm": "tqdm",
        "tyro": "tyro",
    },
    "export": {"onnx": "onnx", "onnxruntime": "onnxruntime", "onnxscript": "onnxscript"},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 1 with one line of reason, if it could not be done.

    A bad command line exits with 2 (SystemExit).
    """
    argv = list(sys.argv[1:] if arguments is None else arguments)
    if argv == ["info"]:
        return info()
    with _short_warnings():
        for extra in ("train", "export") if argv[:1] == ["export"] else ("train",):
            missing = [name for module, name in EXTRAS[extra].items() if importlib.util.find_spec(module) is None]
            if missing:
                return _fail(f"camkd-fast {argv[0] if argv else ''} needs {', '.join(missing)}", extra)
        from ..train.checkpoint import CheckpointError
        from ..train.export import ExportError
        from ..train.run_folder import RunExistsError
        from ..train.sums import NonFiniteLossError
        from .commands import run
        from .options import parse

        try:
            return run(parse(argv))
        except OSError as error:
            return _fail(f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error))
        except (ValueError, NotImplementedError) as error:
            return _fail(str(error))
        except (CheckpointError, ExportError, NonFiniteLossError, RunExistsError) as error:
            return _fail(str(error))
        except KeyboardInterrupt:
            _fail("interrupted")
            return 130


def _fail(reason: str, extra: str = "") -> int:
    """One line on stderr, which names the process where there are several."""
    process = f"process {_rank()}: " if _rank() else ""
    hint = f": pip install 'camkd-fast[{extra}]'" if extra else ""
    print(f"camkd-fast: {process}{' '.join(reason.split())}{hint}", file=sys.stderr)
    return 1


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Warnings as one line without a place in the source, from rank 0 alone."""
    with warnings.catch_warnings():
        if _rank():
            warnings.simplefilter("ignore")

        def show(message: Warning | str, *place: object, **more: object) -> None:
            print(f"camkd-fast: warning: {' '.join(str(message).split())}", file=sys.stderr)

        warnings.showwarning = show
        yield


__all__ = ["environment", "info", "main"]
