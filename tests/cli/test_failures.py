"""What torch, the disk and signals do to a run is one line: the reason, what to change, how to go on."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from camkd_fast import cli
from camkd_fast.cli import failures
from camkd_fast.cli.options import parse
from camkd_fast.data.torch_loader import ArrayBatches
from camkd_fast.system import Stopped
from camkd_fast.train import folder_lock
from camkd_fast.train.step import TrainStep
from camkd_fast.train.sums import NonFiniteLossError, NonFiniteTeachersError
from tests.support.systems import encoded

pytest.importorskip("sklearn")
pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
TEACH = (
    "teach --data digits --images 40 --batch-size 16 --epochs 2 --model resnet8 --no-progress --no-tensorboard --out r"
)
CPU_MEMORY = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes. Error code 12"
RESUME = "--resume goes on after step 3 with the same settings, --overwrite starts again with others"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(failures.TRACEBACK, raising=False)


def failing(line: str, capsys: pytest.CaptureFixture[str], status: int = 1) -> str:
    capsys.readouterr()
    assert cli.main(line.split()) == status
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and "Traceback" not in printed.err, printed.err
    return printed.err


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, do: Callable[[], Any]) -> None:
    """Call `do` in the run's step `number`, counted from 0."""
    take = TrainStep.__call__

    def step(self: TrainStep, batch: Any, items: int, rate: float, position: int, *rest: Any) -> None:
        if position == number:
            do()
        take(self, batch, items, rate, position, *rest)

    monkeypatch.setattr(TrainStep, "__call__", step)


def gpu_memory() -> None:
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 8 GiB of which 1 GiB is free. "
        "See documentation for Memory Management"
    )


def raising(error: BaseException) -> Callable[[], None]:
    def do() -> None:
        raise error

    return do


def worker_error(kind: type[Exception], text: str) -> Exception:
    """As torch passes on what a process of a DataLoader raised."""
    frames = 'Original Traceback (most recent call last):\n  File "worker.py", line 1, in f\n    g()\n'
    return kind(f"Caught {kind.__name__} in DataLoader worker process 0.\n{frames}{kind.__name__}: {text}\n")


RAISED = {
    "CPU memory": (lambda: torch.empty(1 << 50), "too little memory (4503599627370496 bytes): use a smaller --batch"),
    "numpy memory": (lambda: np.empty(1 << 50), "too little memory (8.00 PiB): use a smaller"),
    "Python memory": (lambda: bytearray(1 << 60), "the machine has too little memory: use a smaller --batch-size"),
    "nondeterministic": (
        lambda: torch.zeros(5).put_(torch.tensor([0]), torch.ones(1)),
        "put_ has no deterministic form on this device: use --deterministic off",
    ),
    "unpooling": (
        lambda: F.max_unpool2d(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2, dtype=torch.long), 2),
        "max_unpooling2d_forward_out has no deterministic form",
    ),
    "batch norm": (
        lambda: torch.nn.BatchNorm1d(3)(torch.zeros(1, 3)),
        "batch norm cannot train on one value per channel, in a tensor of shape [1, 3]: change --batch-size",
    ),
    "instance norm": (lambda: torch.nn.InstanceNorm2d(3)(torch.zeros(1, 3, 1, 1)), "of shape [1, 3, 1, 1]: change"),
    "small image": (lambda: F.max_pool2d(torch.zeros(1, 1, 1, 1), 2), "images are too small for the model (Output"),
    "small input": (lambda: F.conv2d(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 3, 3)), "use a larger --size"),
    "GPU memory": (gpu_memory, "the GPU has too little memory (2.50 GiB): use a smaller --batch-size, --dtype"),
    "cuBLAS memory": (
        raising(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")),
        "the GPU has too little memory (CUBLAS_STATUS_ALLOC_FAILED)",
    ),
    "shared memory": (
        raising(RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that")),
        "has ended (is killed by signal: Bus error), probably for lack of memory: use --workers 0, or give the",
    ),
    "no shared memory": (
        raising(RuntimeError("unable to write to file </torch_7_8>: No space left on device (28)")),
        "images cannot be passed between processes (unable to write to file </torch_): use --workers 0",
    ),
    "ended loader": (
        raising(RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly")),
        "has ended (exited unexpectedly), probably for lack of memory: use --workers 0",
    ),
    "open files": (raising(OSError(errno.EMFILE, "Too many open files")), "Too many open files: use --workers 0"),
    "worker": (raising(worker_error(OSError, "[Errno 5] Input/output error: 'a.jpg'")), "output error: 'a.jpg'"),
    "memory of a worker": (raising(worker_error(RuntimeError, CPU_MEMORY)), "too little memory (99 bytes): use"),
    "disk": (raising(OSError(errno.ENOSPC, "No space left on device")), "device: free space or choose another folder"),
    "quota": (raising(OSError(errno.EDQUOT, "Disk quota exceeded", "x")), "x: Disk quota exceeded: free space"),
    "permission": (raising(PermissionError(errno.EACCES, "Permission denied", "/x")), "/x: Permission denied: choose"),
    "compiler": (raising(RuntimeError("InvalidCxxCompiler: No working C++ compiler")), "use --compile off"),
    "old GPU": (raising(RuntimeError("CUDA error: no kernel image is available for execution")), "or --device cpu"),
    "peer": (raising(RuntimeError("[gloo/tcp/pair.cc] Connection closed by peer [::1]")), "another process of this"),
}  # fmt: skip


@pytest.mark.parametrize("name", RAISED)
def test_what_torch_raises_says_what_to_change(name: str) -> None:
    do, words = RAISED[name]
    with pytest.raises((RuntimeError, ValueError, MemoryError, OSError)) as caught:
        do()
    reason = failures.reason(caught.value)
    assert reason is not None and words in reason and "\n" not in reason, reason


@pytest.mark.parametrize("name", ["batch norm", "small image", "small input"])
def test_what_makes_images_larger_depends_on_the_data_set(name: str) -> None:
    """Digits take no --size."""
    with pytest.raises((RuntimeError, ValueError)) as caught:
        RAISED[name][0]()
    for line in ("teach --model resnet8", "distill --student resnet8 --teachers t", "compare --teachers t"):
        digits, other = (
            failures.reason(caught.value, parse([*line.split(), "--data", data])) or ""
            for data in ("digits", "cifar10")
        )
        assert "a larger --size" in other and "data set of larger images (digits take no --size)" in digits


@pytest.mark.parametrize("name", ["CPU memory", "nondeterministic", "batch norm", "disk"])
def test_a_run_that_torch_stops_is_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    do, words = RAISED[name]
    at_step(monkeypatch, 4, do)  # in the second epoch
    error = failing(TEACH, capsys)
    assert error.startswith("camkd-fast: ") and words in error
    assert error.rstrip().endswith(f"; {RESUME}")


def test_a_failed_run_goes_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, 2, gpu_memory)
        assert "--resume goes on at the beginning" in failing(TEACH, capsys)
    assert cli.main(f"{TEACH} --resume".split()) == 0
    capsys.readouterr()
    assert cli.main(f"{TEACH.replace('--out r', '--out s')}".split()) == 0
    assert Path("r/model.safetensors").read_bytes() == Path("s/model.safetensors").read_bytes()


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (TypeError("x"), KeyError("x"), RuntimeError("shape mismatch"), AttributeError("x"), AssertionError()):
        with monkeypatch.context() as patch:
            at_step(patch, 0, raising(error))
            with pytest.raises(type(error)):
                cli.main(f"{TEACH} --overwrite".split())


def test_the_traceback_of_a_failure_is_there_on_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(failures.TRACEBACK, "1")
    at_step(monkeypatch, 0, gpu_memory)
    assert cli.main(TEACH.split()) == 1
    error = capsys.readouterr().err
    assert "Traceback (most recent call last)" in error and "in gpu_memory" in error
    assert error.splitlines()[-1].startswith("camkd-fast: the GPU has too little memory")


def test_what_a_loaders_process_raises(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(self: ArrayBatches, key: object) -> None:
        raise MemoryError("Unable to allocate 3.00 GiB for an array")

    monkeypatch.setattr(ArrayBatches, "__getitem__", broken)
    error = failing(f"{TEACH} --loader torch --workers 1", capsys)
    assert "too little memory (3.00 GiB): use a smaller" in error and "--resume goes on at the beginning" in error


@pytest.mark.slow
def test_a_loaders_process_that_is_killed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(ArrayBatches, "__getitem__", lambda self, key: os.kill(os.getpid(), signal.SIGKILL))
    error = failing(f"{TEACH} --loader torch --workers 1", capsys)
    assert "a process that loads images has ended" in error and "use --workers 0" in error


def test_a_teacher_that_is_not_finite_is_to_be_replaced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at_step(monkeypatch, 4, raising(NonFiniteTeachersError("soft nan")))
    error = failing(TEACH, capsys)
    assert "the command `teachers` shows" in error and "--overwrite" in error and "--learning-rate" not in error


@pytest.mark.slow
def test_diverged_and_damaged_runs_say_how_to_start_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, 4, raising(NonFiniteLossError("the loss is nan after step 5")))
        assert "start again with --overwrite and a lower --learning-rate; --resume would end" in failing(TEACH, capsys)
    for name in ("metrics.jsonl", "config.yaml"):
        path = Path("r") / name
        whole = path.read_text()
        path.write_text("{broken: [\n" + whole)
        error = failing(f"{TEACH} --resume", capsys)
        assert f"r/{name}" in error and error.rstrip().endswith("; restore that file, or start again with --overwrite")
        path.write_text(whole)
    for folder in Path("r/checkpoints").iterdir():
        (folder / "state.pt").write_bytes(b"")
    error = failing(f"{TEACH} --resume", capsys)
    assert "is damaged" in error and error.rstrip().endswith("or start again with --overwrite")
    assert cli.main(f"{TEACH} --overwrite".split()) == 0


def test_other_commands_say_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    compare = f"{TEACH.replace('teach', 'compare').replace('--model', '--student')} --strategies ce --seeds 0"
    with monkeypatch.context() as patch:
        at_step(patch, 4, gpu_memory)
        assert "the same command goes on, and keeps what is finished" in failing(compare, capsys)
        assert "the same command without --overwrite goes on" in failing(f"{compare} --overwrite", capsys)
    with monkeypatch.context() as patch:
        at_step(patch, 0, raising(KeyboardInterrupt()))
        assert cli.main(["demo", "--out", "d"]) == 130
        assert capsys.readouterr().err.endswith("\ncamkd-fast: interrupted; the same command starts the demo again\n")
    from camkd_fast.data import fetch

    monkeypatch.setattr(fetch, "fetch", lambda *arguments: raising(KeyboardInterrupt())())
    assert "the same command goes on with the download" in failing("data fetch cifar10", capsys, 130)


@pytest.mark.parametrize(
    "command", ["teach --model", "distill --teachers t --student", "compare --strategies ce --student"]
)
def test_a_folder_whose_name_is_too_long(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor can be asked whether a run is in it."""
    error = failing(f"{command} resnet8 --data digits --no-progress --out {'x' * 300}", capsys)
    assert error.startswith("camkd-fast: x") and "ile name too long" in error and error.count("\n") == 1


def test_a_thread_that_cannot_write_prints_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread of TensorBoard. Its disk is that of the command, which says so."""
    from camkd_fast.cli import _silent_threads

    printed: list[str] = []
    before = lambda arguments: printed.append(str(arguments.exc_value))  # noqa: E731 - compared below
    monkeypatch.setattr(threading, "excepthook", before)
    with _silent_threads():
        for error in (OSError(errno.ENOSPC, "full"), ValueError("a bug")):
            thread = threading.Thread(target=raising(error))
            thread.start()
            thread.join()
    assert printed == ["a bug"] and threading.excepthook is before


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_a_signal_says_how_to_go_on(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    number = getattr(signal, name)
    at_step(monkeypatch, 4, lambda: os.kill(os.getpid(), number))
    error = failing(TEACH, capsys, 128 + number)
    what = "interrupted" if name == "SIGINT" else f"stopped by {name}"
    assert error == f"camkd-fast: {what}; {RESUME}\n"
    assert not Path("r/.lock").exists() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_before_the_first_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from camkd_fast.train import run

    monkeypatch.setattr(run, "load_splits", lambda config: os.kill(os.getpid(), signal.SIGTERM))
    error = failing(TEACH, capsys, 143)
    assert error == "camkd-fast: stopped by SIGTERM; nothing was written yet, the same command starts again\n"
    assert not Path("r").exists()


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (Stopped(signal.SIGTERM), 143)])
def test_a_signal_before_the_command_began(
    error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_run", lambda argv: raising(error)())  # while it imports
    assert failing(TEACH, capsys, status) in ("camkd-fast: interrupted\n", "camkd-fast: stopped by SIGTERM\n")


# --- closed pipes, encodings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    ["teach --help", pytest.param("info", marks=pytest.mark.slow), pytest.param("data list", marks=pytest.mark.slow)],
)
def test_a_closed_pipe_ends_silently(line: str, tmp_path: Path) -> None:
    """The reader has gone before the first byte."""
    program = "import sys, time; time.sleep(0.5); from camkd_fast.cli import main; sys.exit(main())"
    script = f'( "{sys.executable}" -c "$PROGRAM" {line} 2>errors; echo $? >status ) | true'
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PROGRAM": program}
    subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "errors").read_text() == "" and (tmp_path / "status").read_text() == "141\n"


class ClosedPipe:
    """stdout or stderr whose reader has gone."""

    encoding, closed = "utf-8", False

    def __init__(self, error: OSError) -> None:
        self.error = error

    def write(self, text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error

    def fileno(self) -> int:
        return os.open(os.devnull, os.O_WRONLY)


@pytest.mark.parametrize(
    "error", [BrokenPipeError(errno.EPIPE, "Broken pipe"), OSError(errno.EINVAL, "Invalid argument")]
)
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_closed_pipes_of_both_streams_and_systems(error: OSError, stream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not isinstance(error, BrokenPipeError):
        monkeypatch.delattr(signal, "SIGPIPE")  # Windows
    monkeypatch.setattr(sys, stream, ClosedPipe(error))
    assert cli.main(["data", "list"] if stream == "stdout" else ["evaluate", "nowhere"]) == 141


def test_an_invalid_argument_of_a_file_is_no_closed_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at_step(monkeypatch, 0, raising(OSError(errno.EINVAL, "Invalid argument")))
    assert "Invalid argument" in failing(TEACH, capsys)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_every_help_prints_in_every_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in ("", "teach", "distill", "compare", "data", "export"):
        encoded(encoding)(monkeypatch)
        with pytest.raises(SystemExit):
            cli.main([*command.split(), "--help"])
        sys.stdout.flush()
        assert b"camkd-fast" in sys.stdout.buffer.getvalue()


# --- locks -----------------------------------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused_by_every_command_that_writes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(TEACH.split()) == 0
    before = {path: path.read_bytes() for path in Path("r").rglob("*") if path.is_file()}
    distill = TEACH.replace("teach", "distill").replace("--model", "--student")
    words = rf"camkd-fast: (r|r/export|r/ce/seed-0) is being written by process {os.getpid()} on \S+ since 20"
    with folder_lock.locked(Path("r")):
        for line in (
            TEACH, f"{TEACH} --resume", f"{TEACH} --overwrite", f"{TEACH} --resume --epochs 5", distill, "demo --out r",
            f"{distill.replace('distill', 'compare')} --strategies ce --seeds 0", "export r", "export r --out x",
        ):  # fmt: skip
            assert re.match(words, failing(line, capsys)), line
    with folder_lock.locked(Path("x")):
        assert "x is being written by" in failing("export r --out x", capsys)
    assert {path: path.read_bytes() for path in Path("r").rglob("*") if path.is_file()} == before
    assert not Path("x").exists()


def test_a_second_job_at_any_moment_of_the_first_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from camkd_fast.train import run

    refused = []

    def second(*arguments: object) -> None:
        with pytest.raises(folder_lock.FolderLockedError), folder_lock.locked(Path("r")):
            pass
        refused.append(1)

    load = run.load_splits
    monkeypatch.setattr(run, "load_splits", lambda config: second() or load(config))
    at_step(monkeypatch, 0, second)
    at_step(monkeypatch, 5, second)
    evaluate = run.evaluate_model
    monkeypatch.setattr(run, "evaluate_model", lambda *arguments: second() or evaluate(*arguments))
    assert cli.main(TEACH.split()) == 0
    assert len(refused) == 4


def test_bad_input_leaves_no_folder_and_a_read_only_run_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from camkd_fast import system

    failing(TEACH.replace("resnet8", "resnet9"), capsys)
    assert not Path("r").exists()
    assert cli.main(TEACH.split()) == 0
    monkeypatch.setattr(system, "open_lock_file", lambda *a, **m: raising(PermissionError(errno.EACCES, "denied"))())
    from camkd_fast.train.config_file import load
    from camkd_fast.train.run import teach

    assert teach(load(Path("r/config.yaml")), resume=True).test.images == 597
