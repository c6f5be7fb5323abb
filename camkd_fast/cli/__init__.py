"""The command line. `info` needs only torch, all other commands the extra `train`, and `export` also `export`."""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from .info import environment, info

# Module -> package on PyPI.
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
    """Run one command and return the exit status: 1, with one line on stderr, if the command fails.

    An invalid command line raises SystemExit with status 2.
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
    """Print one line on stderr, with the rank if there are several processes; return exit status 1."""
    process = f"process {_rank()}: " if _rank() else ""
    hint = f": pip install 'camkd-fast[{extra}]'" if extra else ""
    print(f"camkd-fast: {process}{' '.join(reason.split())}{hint}", file=sys.stderr)
    return 1


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Show warnings as one line without source location, from rank 0 only."""
    with warnings.catch_warnings():
        if _rank():
            warnings.simplefilter("ignore")

        def show(message: Warning | str, *place: object, **more: object) -> None:
            print(f"camkd-fast: warning: {' '.join(str(message).split())}", file=sys.stderr)

        warnings.showwarning = show
        yield


__all__ = ["environment", "info", "main"]
