"""The command line. `info` needs only torch, all other commands the extra `train`, and `export` also `export`."""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from .. import system
from ..torchrun import rank
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

    128 + the number of a signal that stopped it, 141 if the reader of its output went away. An invalid command line
    raises SystemExit with status 2. Bugs raise their exception.
    """
    argv = list(sys.argv[1:] if arguments is None else arguments)
    system.tolerate_unprintable()
    try:
        try:
            with _short_warnings(), _silent_threads(), system.stop_signals():
                return info() if argv == ["info"] else _run(argv)
        finally:
            system.flush_output()
    except (KeyboardInterrupt, system.Stopped) as error:  # before the command began
        _fail(str(error) or "interrupted")
        return error.status if isinstance(error, system.Stopped) else 130
    except OSError as error:
        if not system.is_closed_pipe(error):
            raise
        system.discard_output()
        return system.CLOSED_PIPE_STATUS


def _run(argv: list[str]) -> int:
    for extra in ("train", "export") if argv[:1] == ["export"] else ("train",):
        missing = [name for module, name in EXTRAS[extra].items() if importlib.util.find_spec(module) is None]
        if missing:
            return _fail(f"camkd-fast {argv[0] if argv else ''} needs {', '.join(missing)}", extra)
    from . import failures
    from .commands import run
    from .options import parse

    command = None
    try:
        command = parse(argv)
        return run(command)
    except (Exception, KeyboardInterrupt, system.Stopped) as error:
        reason = failures.reason(error, command)
        if reason is None or system.is_closed_pipe(error):
            raise
        if os.environ.get(failures.TRACEBACK):
            traceback.print_exc()
        way = failures.way_on(error, command) if rank() == 0 else ""
        _fail(f"{reason.rstrip('.')}; {way}" if way else reason)
        return failures.status(error)


def _fail(reason: str, extra: str = "") -> int:
    """Print one line on stderr, with the rank if there are several processes; return exit status 1."""
    process = f"process {rank()}: " if rank() else ""
    hint = f": pip install 'camkd-fast[{extra}]'" if extra else ""
    print(f"camkd-fast: {process}{' '.join(reason.split())}{hint}", file=sys.stderr)
    return 1


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Show warnings as one line without source location, from rank 0 only."""
    with warnings.catch_warnings():
        if rank():
            warnings.simplefilter("ignore")

        def show(message: Warning | str, *place: object, **more: object) -> None:
            print(f"camkd-fast: warning: {' '.join(str(message).split())}", file=sys.stderr)

        warnings.showwarning = show
        yield


@contextmanager
def _silent_threads() -> Iterator[None]:
    """Suppress tracebacks of threads that cannot write; on a full disk the command itself reports the error."""
    before = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if not isinstance(arguments.exc_value, OSError):
            before(arguments)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


__all__ = ["environment", "info", "main"]
