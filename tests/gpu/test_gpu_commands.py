"""The command line on a GPU: every strategy and loader, a killed run, teacher caches, evaluation, and DDP over NCCL.

Without a GPU the commands are rehearsed on the CPU.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from camkd_fast import cli
from camkd_fast.train import step as step_module
from camkd_fast.train.config import PrecisionConfig
from camkd_fast.train.strategies import names
from camkd_fast.train.teachers.cache import TeacherCache
from tests.gpu.test_gpu_training import on_device, step_on
from tests.support.gpu import CUDA, NO_GPU
from tests.support.loader_data import image_files
from tests.support.training import batch, parameters

ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = f"--data digits --images 300 --epochs 2 --no-progress --no-tensorboard --device {DEVICE}"

pytestmark = [pytest.mark.usefixtures("nondeterministic", "one_thread")]
if DEVICE == "cpu":
    pytestmark.append(pytest.mark.slow)  # the rehearsal


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The arguments that name two teachers."""
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("teachers")
    for seed in (0, 1):
        run(f"teach {SMALL} --model resnet8 --seed {seed} --out {folder / str(seed)}")
    return f"--teachers {folder / '0'} {folder / '1'}"


def run(line: str) -> None:
    """A command, which succeeds."""
    assert cli.main(line.split()) == 0, line


def last(out: Path) -> dict[str, Any]:
    """The last record of a run, which has the test result."""
    record: dict[str, Any] = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["kind"] == "test"
    return record


def accuracy(run_folder: Path, capsys: pytest.CaptureFixture[str], options: str = "") -> float:
    """In percent, as `evaluate` prints it."""
    capsys.readouterr()
    run(f"evaluate {run_folder} {options}")
    return float(capsys.readouterr().out.partition("accuracy ")[2].partition(" %")[0])


@pytest.mark.parametrize("name", names())
def test_distill_by_every_strategy(
    name: str, teachers: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "student"
    graph = "--cuda-graphs on" if DEVICE == "cuda" else ""
    run(f"distill {SMALL} --student resnet8 --strategy {name} {graph} {'' if name == 'ce' else teachers} --out {out}")
    assert not [message for message in caplog.messages if "without a CUDA graph:" in message]
    record = last(out)
    assert record["step"] == 2 * 5 and math.isfinite(record["test_loss"])
    # The CPU evaluates the model of the GPU: a few images may be near a boundary.
    assert abs(accuracy(out, capsys, "--device cpu") - 100 * record["test_accuracy"]) < 1.0


def test_evaluate_on_the_device(teachers: str, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = Path(teachers.split()[1])
    found = accuracy(teacher, capsys, f"--device {DEVICE}")
    assert abs(found - 100 * last(teacher)["test_accuracy"]) < 0.01  # as printed
    assert 0 <= accuracy(teacher, capsys, f"--device {DEVICE} --split validation") <= 100


OPTIONS = [
    *("--cuda-graphs off", "--teacher-ahead off", "--dtype bfloat16 --channels-last", "--dtype float16"),
    *("--loader torch --workers 2", "--augmentation resized-crop", "--batch-size 1 --images 40", "--uniform features"),
]


@pytest.mark.parametrize("options", OPTIONS if DEVICE == "cuda" else OPTIONS[1:])
def test_distill_with(options: str, teachers: str, tmp_path: Path) -> None:
    out = tmp_path / "student"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="batch_size 1 for a process")
        run(f"distill {SMALL} --student resnet8 {teachers} {options} --out {out}")
    assert math.isfinite(last(out)["test_loss"])


def test_distill_from_files(tmp_path: Path) -> None:
    """Decoded by DALI where it is installed, on a GPU by its hardware decoder; then by worker processes."""
    dali = importlib.util.find_spec("nvidia.dali") if importlib.util.find_spec("nvidia") else None
    files = image_files(tmp_path, 60)
    for path, label in zip(files.paths, files.labels.tolist(), strict=True):
        folder = tmp_path / "tree" / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        path.rename(folder / path.name)
    settings = SMALL.replace("--data digits --images 300", f"--data folder --root {tmp_path / 'tree'} --size 32")
    for loader in ("dali", "torch") if dali else ("torch",):
        both = f"{settings} --loader {loader} --workers 2 --batch-size 16 --validation 0.2"
        teacher, student = tmp_path / f"teacher-{loader}", tmp_path / f"student-{loader}"
        run(f"teach {both} --model resnet8 --out {teacher}")
        run(f"distill {both} --student resnet8 --teachers {teacher} --out {student}")
        assert math.isfinite(last(student)["test_loss"])


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("name", ["ca-mkd", "aekd"])
def test_a_teacher_cache_is_written_and_replayed(
    name: str, place: str, teachers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place == "disk":
        monkeypatch.setitem(TeacherCache.build.__kwdefaults__, "memory_limit", 0)
    line = f"distill {SMALL} --student resnet8 {teachers} --views 1 --teacher-cache {tmp_path / 'cache'}"
    for out in ("one", "two"):
        run(f"{line} --strategy {name} --out {tmp_path / out}")
    one, two = (last(tmp_path / out) for out in ("one", "two"))
    assert abs(one["test_accuracy"] - two["test_accuracy"]) < 0.05
    assert list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_killed_run_resumes(teachers: str, tmp_path: Path) -> None:
    """Deterministic, so that the resumed run ends with the bytes of the uninterrupted one."""
    options = f"distill {SMALL} --student resnet8 {teachers} --checkpoint-every 2 --log-every 1 --deterministic on"
    options += " --epochs 12"  # the first of 30 checkpoints is seen long before the end
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}

    def start(out: Path, *more: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "camkd_fast", *options.split(), "--out", str(out), *more]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    uninterrupted = start(whole)
    process = start(killed)
    while not list(killed.glob("checkpoints/*")) and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait(timeout=60) == -signal.SIGKILL and not (killed / "model.safetensors").exists()
    for process in (start(killed, "--resume"), uninterrupted):
        assert process.wait(timeout=300) == 0, process.stdout.read()
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)
@pytest.mark.parametrize("name", ["ca-mkd", "aekd"])
def test_ddp_over_nccl_in_a_world_of_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.parallel import DistributedDataParallel

    precision = PrecisionConfig(compile="off", cuda_graphs="off")

    def steps() -> torch.Tensor:
        step = step_on(CUDA, precision, name)
        for i in range(4):
            step(on_device(batch(32, seed=i), CUDA), 32, 0.01, i)
        return parameters(step)

    expected = steps()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29571")
    dist.init_process_group("nccl", rank=0, world_size=1, device_id=CUDA)
    try:
        monkeypatch.setattr(step_module, "replicate", lambda module, world: DistributedDataParallel(module))
        assert float((steps() - expected).norm() / expected.norm()) < 1e-5
    finally:
        dist.destroy_process_group()
