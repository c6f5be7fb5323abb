"""Checkpoints: atomic, verified, bounded in number; a run killed at any point ends with the same result."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from camkd_fast.models import model_file
from camkd_fast.models.model_file import MODEL, CheckpointError, model_bytes, read_model
from camkd_fast.train import atomic
from camkd_fast.train.atomic import write_atomically
from camkd_fast.train.checkpoint import KEEP, MANIFEST, STATE, Checkpoints, read_checkpoint
from camkd_fast.train.config import DataConfig, DistillConfig, LogConfig, OptimConfig, PrecisionConfig, TeachConfig
from camkd_fast.train.journal import METRICS, Journal, NullJournal, read_metrics
from camkd_fast.train.run import distill, teach
from tests.support.training import OPTIM, SmallNet, parameters, train_step, trainer

ROOT = Path(__file__).parents[2]
QUIET = LogConfig(tensorboard=False, progress=False, log_every=1)


pytestmark = pytest.mark.usefixtures("one_thread")


def saved(folder: Path, *steps: int) -> Checkpoints:
    checkpoints = Checkpoints(folder)
    for step in steps:
        checkpoints.save(step, model_bytes(SmallNet(seed=step), {"model": "small"}), {"value": torch.tensor(step)})
    return checkpoints


# --- files -----------------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(limit: int) -> Iterator[None]:
    """Limit files to `limit` bytes, so that writes fail half-way as on a full disk."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_file_is_replaced_in_full_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with small_disk(1000), pytest.raises(OSError, match="File too large"):
        write_atomically(path, bytes(5000))
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    write_atomically(path, bytes(5000))
    assert path.read_bytes() == bytes(5000)


def test_last_two_checkpoints_stay(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path / "c", 5, 10, 15, 100)
    assert [path.name for path in checkpoints.paths()] == ["step-00000100", "step-00000015"]
    assert len(list((tmp_path / "c").iterdir())) == KEEP
    latest = checkpoints.latest()
    assert latest is not None and latest.step == 100 and latest.state["value"] == 100
    assert all(torch.equal(t, latest.model[name]) for name, t in SmallNet(seed=100).state_dict().items())
    assert Checkpoints(tmp_path / "none").latest() is None


@pytest.mark.parametrize("limit", [0, 500, 3000, 4500])
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, limit: int) -> None:
    checkpoints = saved(tmp_path, 5)
    model = model_bytes(SmallNet(), {"model": "small"})
    words = "cannot write checkpoint .*step-00000010: File too large; the last good one is .*step-00000005"
    with small_disk(limit), pytest.raises(OSError, match=words):
        checkpoints.save(10, model, {"value": torch.zeros(2000)})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]
    assert checkpoints.latest().step == 5
    checkpoints.save(10, model, {})
    assert checkpoints.latest().step == 10


def test_no_space_left_on_the_last_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = saved(tmp_path, 5)
    calls = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device; the last good one is") as caught:
        saved(tmp_path, 10)
    assert caught.value.errno == errno.ENOSPC
    assert checkpoints.latest().step == 5 and len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_writer_left_is_no_checkpoint(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 5)
    (tmp_path / ".step-00000010.4711").mkdir()
    (tmp_path / ".step-00000010.4711" / MODEL).write_bytes(b"half")
    assert checkpoints.latest().step == 5
    checkpoints.save(10, model_bytes(SmallNet(), {}), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000005", "step-00000010"]


# --- damage ----------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("name", [MODEL, STATE, MANIFEST])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path: Path, damage: Any, name: str) -> None:
    checkpoints = saved(tmp_path, 5, 10)
    damage(tmp_path / "step-00000010" / name)
    with pytest.raises(CheckpointError, match=r"step-00000010.* is damaged"):
        read_checkpoint(tmp_path / "step-00000010")
    with pytest.warns(UserWarning, match=r"step-00000010.* is damaged.*taking the one before it, .*step-00000005"):
        assert checkpoints.latest().step == 5
    damage(tmp_path / "step-00000005" / name)
    with pytest.raises(CheckpointError, match=r"step-00000010.*step-00000005.*no checkpoint before it is left"):
        checkpoints.latest()


@pytest.mark.parametrize("content", ["[]", "null", "{}", "3"])
def test_a_manifest_of_something_else_is_damaged(tmp_path: Path, content: str) -> None:
    saved(tmp_path, 5)
    (tmp_path / "step-00000005" / MANIFEST).write_text(content)
    with pytest.raises(CheckpointError, match=r"step-00000005.* is damaged"):
        read_checkpoint(tmp_path / "step-00000005")


def test_a_run_passes_a_damaged_checkpoint_and_removes_it(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 5, 10)
    truncate(tmp_path / "step-00000010" / STATE)
    saved(tmp_path, 7)
    assert [path.name for path in checkpoints.paths()] == ["step-00000007", "step-00000005"]


class _Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("false",)


def test_a_pickle_with_a_global_is_refused(tmp_path: Path) -> None:
    import hashlib

    saved(tmp_path, 5)
    folder = tmp_path / "step-00000005"
    torch.save({"step": 5, "loader": _Payload()}, folder / STATE)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest[STATE] = hashlib.sha256((folder / STATE).read_bytes()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"state.pt needs more than weights_only=True and is refused"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}", "has format None, but this version reads format 1"),
        ("[]", "has format None"),
        ("x", "is damaged: its metadata are not JSON"),
        ('{"format": 1}', "is damaged: its metadata lack model, num_classes, in_channels"),
    ],
)
def test_metadata_of_a_model_file_are_checked(tmp_path: Path, content: str, words: str) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    save_file(SmallNet().state_dict(), path, {model_file._METADATA: content})
    with pytest.raises(CheckpointError, match=words):
        model_file.load_model(path)


def test_a_model_file_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    metadata = {"model": "small", "size": [8, 8], "mean": [0.1]}
    path.write_bytes(model_bytes(SmallNet(), metadata))
    tensors, read = read_model(path)
    assert read == {"format": 1, **metadata} and set(tensors) == set(SmallNet().state_dict())
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged"):
        read_model(path)
    from safetensors.torch import save_file

    save_file(SmallNet().state_dict(), path)
    with pytest.raises(CheckpointError, match="is no model of camkd-fast"):
        read_model(path)
    path.write_bytes(model_bytes(SmallNet(), {"format": 2}))
    with pytest.raises(CheckpointError, match="has format 2, but this version reads format 1"):
        read_model(path)


def test_equal_models_give_equal_files_whatever_their_layout() -> None:
    metadata = {letter: letter for letter in "qwertyuiop"}
    model, other = SmallNet(), SmallNet().to(memory_format=torch.channels_last)
    assert model_bytes(model, metadata) == model_bytes(other, dict(reversed(metadata.items())))


# --- resuming --------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Not an Exception, so that no handler of the run catches it."""


class _Kill(NullJournal):
    """Ends the run right after a step's record, like a kill."""

    def __init__(self, journal: Journal, step: int) -> None:
        self.journal, self.step = journal, step

    def write(self, record: Any) -> None:
        self.journal.write(record)
        if record["step"] == self.step:
            raise Killed


def build(out: Path, strategy: str, precision: PrecisionConfig, every: int) -> Any:
    step = train_step(strategy, student=SmallNet(batch_norm=True, dropout=0.3), precision=precision)
    return trainer(out, step, log=replace(QUIET, checkpoint_every=every))


def records(out: Path) -> list[dict[str, Any]]:
    timings = ("images_per_second", "start_seconds")
    return [{k: v for k, v in r.items() if k not in timings} for r in read_metrics(out / METRICS)]


@pytest.mark.parametrize(
    ("strategy", "precision"),
    [
        ("ce", PrecisionConfig(compile="off")),
        ("ca-mkd", PrecisionConfig(compile="off")),
        ("ca-mkd", PrecisionConfig(compile="off", channels_last=True, dtype="bfloat16")),
        ("fitnet-mkd", PrecisionConfig(compile="off", dtype="float16")),
    ],
)
def test_resumed_anywhere_a_run_ends_as_the_uninterrupted_one(
    tmp_path: Path, strategy: str, precision: PrecisionConfig
) -> None:
    whole = build(tmp_path, strategy, precision, every=0)
    journal = Journal(tmp_path, QUIET, 0, 0, "")
    whole.run(journal)
    journal.close()
    out = tmp_path / "killed"
    out.mkdir()
    # 5 steps per epoch: in the middle, before and at its end, right after a checkpoint and between two.
    for kill in (2, 3, 5, 8, 9, 14, None):
        run = build(out, strategy, precision, every=2)
        checkpoint = run.checkpoints.latest()
        if checkpoint is not None:
            run.resume(checkpoint)
        journal = Journal(out, QUIET, 0, run.position, "")
        if kill is None:
            run.run(journal)
        else:
            with pytest.raises(Killed):
                run.run(_Kill(journal, kill))
        journal.close()
    assert model_bytes(run.step.student, {}) == model_bytes(whole.step.student, {})
    assert torch.equal(parameters(run.step), parameters(whole.step))
    assert records(out) == records(tmp_path)


def test_the_clock_asks_for_checkpoints_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 40  # seconds between two readings of the clock
        return now

    monkeypatch.setattr("camkd_fast.train.trainer.time.monotonic", clock)
    log = replace(QUIET, log_every=2, checkpoint_minutes=1.0)
    run = trainer(tmp_path, train_step("ce"), optim=OptimConfig(epochs=1, batch_size=15), log=log)
    steps = []
    save = run.checkpoints.save
    run.checkpoints.save = lambda step, *rest: steps.append(step) or save(step, *rest)
    run.run(NullJournal())
    assert steps == [4, 8, 10]  # log lines after steps 2, 4, 6, 8; every second one is 60 seconds late


def test_resuming_under_other_settings_of_the_loader_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, train_step("ce"))
    run.run(NullJournal())
    other = trainer(tmp_path, train_step("ce"), optim=replace(OPTIM, batch_size=50))
    with pytest.raises(ValueError, match=r"global batch 32.*50"):
        other.resume(run.checkpoints.latest())


# --- kill -9 ---------------------------------------------------------------------------------------------------------

JOB = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.train.test_checkpoint import job
from camkd_fast.train.run import distill
distill(job(Path(sys.argv[1])), resume=True)
"""


def job(out: Path) -> DistillConfig:
    common = teacher_job(out.parent / "teacher")
    return DistillConfig(
        student="resnet8", teachers=(common.out,), out=out, data=common.data, optim=common.optim, log=common.log
    )


def teacher_job(out: Path) -> TeachConfig:
    data, optim = DataConfig(images=120), OptimConfig(epochs=6, batch_size=40)
    return TeachConfig(model="resnet8", out=out, data=data, optim=optim, log=replace(QUIET, checkpoint_every=1))


def start(out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", JOB, str(out)], text=True, stderr=subprocess.PIPE, cwd=ROOT)


def lines(out: Path) -> int:
    path = out / METRICS
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_after(process: subprocess.Popen[str], out: Path, count: int, generator: random.Random) -> bool:
    """SIGKILL shortly after the run has written `count` lines; False if it finished earlier."""
    while lines(out) < count:
        try:
            process.wait(timeout=0.002)
        except subprocess.TimeoutExpired:
            continue
        assert process.returncode == 0, process.stderr.read()
        return False
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=generator.uniform(0.0, 0.02))
    process.kill()
    return process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_runs_end_byte_identical(tmp_path: Path, kills: int) -> None:
    pytest.importorskip("sklearn")
    teach(teacher_job(tmp_path / "teacher"))
    distill(job(tmp_path / "whole"))
    whole, out = tmp_path / "whole", tmp_path / "killed"
    expected, total = (whole / "model.safetensors").read_bytes(), lines(whole)
    assert total == 18 + 1  # one line per step, and the test result
    generator = random.Random(kills)
    done = 0
    while done < kills:
        process = start(out)
        first = min(lines(out) + 1, total - 1)  # one more line than before, so that the run makes progress
        done += kill_after(process, out, generator.randint(first, min(first + 6, total - 1)), generator)
        if (out / "model.safetensors").exists():  # finished before the last kill: start again
            assert (out / "model.safetensors").read_bytes() == expected
            if done < kills:
                shutil.rmtree(out)
    process = start(out)
    assert process.wait(timeout=120) == 0, process.stderr.read()
    assert (out / "model.safetensors").read_bytes() == expected
    # Except for the seconds in the last record.
    assert records(out)[:-1] == records(whole)[:-1] and len(records(out)) == total
