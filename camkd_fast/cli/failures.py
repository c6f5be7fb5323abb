"""What the command line says when a command fails: the reason, what to change, and how to go on, in one line."""

from __future__ import annotations

import errno
import re
from pathlib import Path

from ..experiments.study.conductor import WorkerDiedError
from ..models.model_file import CheckpointError
from ..system import Stopped
from ..train.checkpoint import Checkpoints
from ..train.export import ExportError
from ..train.folder_lock import FolderLockedError
from ..train.initial_weights import ImageSizeError
from ..train.run_folder import CHECKPOINTS, CONFIG, RunExistsError, is_finished
from ..train.sums import NonFiniteLossError, NonFiniteTeachersError
from .options import Command, Compare, Data, Demo, Distill, Fetch, Teach

TRACEBACK = "CAMKD_FAST_TRACEBACK"  # environment variable; if set, failures show where they were raised

_OURS = (
    *(CheckpointError, ExportError, FolderLockedError, ImageSizeError, NonFiniteLossError, RunExistsError),
    WorkerDiedError,
)
_LESS = "use a smaller --batch-size, --dtype bfloat16, or a smaller model"
_NO_GPU_MEMORY = "the GPU has too little memory ({0}): " + _LESS + ", or --loader torch if the images are on the GPU"
_NO_SHARED_MEMORY = "use --workers 0, or give the container more shared memory (docker --shm-size)"

# What messages of torch contain -> what to say instead; {0} is the group of the pattern, {size} from `_larger_images`.
_KNOWN = {
    r"DataLoader worker \(pid.*?\) (is killed by signal: (?:Bus error|Killed|Terminated)|exited unexpectedly)": (
        "a process that loads images has ended ({0}), probably for lack of memory: " + _NO_SHARED_MEMORY
    ),
    r"(unable to \w+ (?:to )?(?:shared memory|file </torch_)|received 0 items of ancdata)": (
        "images cannot be passed between processes ({0}): " + _NO_SHARED_MEMORY
    ),
    r"(?:CUDA|HIP|MPS|XPU)(?: \w+)? out of memory\.?(?:.*?[Tt]ried to allocate ([\d.]+ \w+))?": _NO_GPU_MEMORY,
    r"(CUDA error: out of memory|CU\w+_STATUS_ALLOC_FAILED|cudaErrorMemoryAllocation)": _NO_GPU_MEMORY,
    r"(?:an't allocate memory|not enough memory|nable to allocate|annot allocate memory|paging file is too small)"
    r"(?:.*?([\d.]+ (?:bytes|[KMGTPE]iB)))?": (
        "the machine has too little memory ({0}): " + _LESS + ", fewer --workers, or fewer --images"
    ),
    r"(\S+) does not have a deterministic implementation": (
        "{0} has no deterministic form on this device: use --deterministic off"
    ),
    r"(CUBLAS_WORKSPACE_CONFIG)": (
        "cuBLAS is deterministic only with the environment variable {0}=:4096:8: set it, or use --deterministic off"
    ),
    r"Expected more than 1 (?:value per channel|spatial element) when training.*?(\[[\d, ]*\])": (
        "a batch norm cannot train on one value per channel, in a tensor of shape {0}: change --batch-size or --images "
        "so that no step has a single image, or use {size}"
    ),
    r"(Output size is too small|Kernel size can't be greater than actual input size)": (
        "images are too small for the model ({0}): use {size}, or a model that shrinks images less"
    ),
    r"(InvalidCxxCompiler|CppCompileError|CUDACompileError|TritonMissing|Cannot find a working triton)": (
        "torch.compile does not work here ({0}): use --compile off"
    ),
    r"(no kernel image is available)": (
        "torch was not built for this GPU ({0}): use another build of torch, or --device cpu"
    ),
    r"(busy or unavailable|CUDA driver version is insufficient|Found no NVIDIA driver|NVIDIA driver .*? too old)": (
        "the GPU cannot be used ({0}): free it or update its driver, or use --device cpu"
    ),
    r"(Connection closed by peer|Connection reset by peer|connectFullMesh failed|NCCL error|ncclRemoteError)": (
        "another process of this run has ended or cannot be reached ({0}): its own message says why"
    ),
}
_DISK_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG}
_NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS}


def status(error: BaseException) -> int:
    """Exit status: 1, or 128 + the number of the signal that stopped the command."""
    if isinstance(error, Stopped):
        return error.status
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def reason(error: BaseException, command: Command | None = None) -> str | None:
    """Why the command failed and what to change; None for an unexpected error, which is a bug."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, Stopped):
        return str(error)
    message = _message(error)
    if isinstance(error, (RuntimeError, ValueError, MemoryError, OSError)) and not isinstance(error, _OURS):
        for pattern, text in _KNOWN.items():
            if found := re.search(pattern, message):
                return text.format(found[1] or "an allocation failed", size=_larger_images(command))
    if isinstance(error, MemoryError):
        return f"the machine has too little memory: {_LESS}, or fewer --images"
    if isinstance(error, OSError):
        return message + _remedy(error)
    return message if isinstance(error, (ValueError, NotImplementedError, *_OURS)) else None


def _larger_images(command: Command | None) -> str:
    """Advice that makes the images larger; it depends on the data set of the command."""
    data = command.settings.data.data if isinstance(command, (Teach, Distill, Compare)) else None
    return "a data set of larger images (digits take no --size)" if data == "digits" else "a larger --size"


def _message(error: BaseException) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    # A loader's process sends its traceback as text; the last line is the error.
    if "Original Traceback (most recent call last)" in text:
        text = text.strip().splitlines()[-1]
    return " ".join(text.split())


def _remedy(error: OSError) -> str:
    if error.errno in _DISK_FULL:
        return ": free space or choose another folder"
    if error.errno in _NOT_ALLOWED:
        return ": choose a folder that you may read and write"
    if error.errno == errno.EMFILE:
        return ": use --workers 0, or allow more open files (ulimit -n)"
    return ""


def way_on(error: BaseException, command: Command | None) -> str:
    """How to go on after a command failed; empty if it left nothing behind, or that cannot be seen."""
    try:
        return _way_on(error, command)
    except OSError:
        return ""


def _way_on(error: BaseException, command: Command | None) -> str:
    stopped = isinstance(error, (KeyboardInterrupt, Stopped))
    match command:
        case Teach() | Distill():
            return _way_on_with_run(error, command.settings.out)
        case Compare() if command.settings.out.exists() and not isinstance(error, (RunExistsError, FolderLockedError)):
            return f"the same command {'without --overwrite ' * command.overwrite}goes on, and keeps what is finished"
        case Data(action=Fetch()) if stopped:
            return "the same command goes on with the download"
        case Demo() if stopped:
            return "the same command starts the demo again"
    return ""


def _way_on_with_run(error: BaseException, out: Path) -> str:
    if isinstance(error, (KeyboardInterrupt, Stopped)) and not (out / CONFIG).exists():
        return "nothing was written yet, the same command starts again"
    if isinstance(error, (RunExistsError, FolderLockedError)) or not (out / CONFIG).exists() or is_finished(out):
        return ""
    if isinstance(error, NonFiniteTeachersError):
        return "the command `teachers` shows their accuracies: replace the bad one and start again with --overwrite"
    if isinstance(error, NonFiniteLossError):
        return "start again with --overwrite and a lower --learning-rate; --resume would end the same way"
    file_of_the_run = rf"(?:^|[\s'\"]){re.escape(str(out / 'x')[:-1])}"
    if isinstance(error, (CheckpointError, ValueError)) and re.search(file_of_the_run, str(error)):
        return "restore that file, or start again with --overwrite"
    last = next(iter(Checkpoints(out / CHECKPOINTS).paths()), None)
    where = "at the beginning" if last is None else f"after step {int(last.name.removeprefix('step-'))}"
    return f"--resume goes on {where} with the same settings, --overwrite starts again with others"
