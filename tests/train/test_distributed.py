"""Data parallel over gloo: gradients, sample counts and sums equal those of one process; a killed rank; resuming."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from camkd_fast.train import run as run_module
from camkd_fast.train.checkpoint import Checkpoints
from camkd_fast.train.config import DataConfig, OptimConfig, TeachConfig
from camkd_fast.train.distributed import World, processes, share_of_batch
from camkd_fast.train.journal import METRICS, read_metrics
from tests.support.loader_data import fashion_folder
from tests.support.training import ONE
from tests.support.training_worker import LOG, STRATEGIES, gradients, run, seen

ROOT = Path(__file__).parents[2]
TIMEOUT = 100  # seconds


pytestmark = pytest.mark.usefixtures("one_thread")


def start(job: str, folder: Path, *more: int) -> tuple[list[subprocess.Popen[str]], torch.distributed.TCPStore]:
    """Two processes with torchrun's environment variables, and their store, which must outlive them."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    common |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = []
    for rank in ("0", "1"):
        environment = {**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank}
        command = [sys.executable, "-m", "tests.support.training_worker", job, str(folder), *map(str, more)]
        ranks.append(subprocess.Popen(command, text=True, stderr=subprocess.PIPE, cwd=ROOT, env=environment))
    return ranks, store


def complete(job: str, folder: Path) -> None:
    ranks, _store = start(job, folder)
    for process in ranks:
        _, errors = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 0, errors


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of two processes: check.pt, and an uninterrupted run in `whole`."""
    folder = tmp_path_factory.mktemp("two")
    complete("check", folder)
    return folder


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_have_the_gradient_and_the_sums_of_one(two: Path, strategy: str) -> None:
    theirs = torch.load(two / "check.pt", weights_only=True)["gradients"][strategy].double()
    ours = gradients(strategy, ONE).double()
    assert ours.shape == theirs.shape and ours.norm() > 0
    assert (ours - theirs).norm() <= 1e-6 * ours.norm()


def test_compiled_processes_have_the_same_gradient(two: Path) -> None:
    found = torch.load(two / "check.pt", weights_only=True)
    eager, compiled = found["gradients"]["ca-mkd"], found["compiled"]
    assert (eager - compiled).norm() <= 1e-5 * eager.norm()


def test_every_image_is_seen_once_and_every_step_sees_the_same_ones(two: Path) -> None:
    found = torch.load(two / "check.pt", weights_only=True)
    for train in (True, False):
        first, second = found["train" if train else "test"]
        assert sorted(first + second) == list(range(101)) and abs(len(first) - len(second)) <= 5
    (single,) = seen(ONE, train=True)
    first, second = found["train"]
    for step in range(6):  # of 16 images, 8 for each
        assert sorted(first[8 * step : 8 * step + 8] + second[8 * step : 8 * step + 8]) == sorted(
            single[16 * step : 16 * step + 16]
        )


def test_ranks_draw_different_dropout_masks(two: Path) -> None:
    first, second = torch.load(two / "check.pt", weights_only=True)["dropped"]
    for one, other in zip(first, second, strict=True):
        assert one.any() and other.any() and not torch.equal(one, other)
    assert not torch.equal(first[0], first[1])


def test_rank_0_decides(two: Path) -> None:
    found = torch.load(two / "check.pt", weights_only=True)
    assert found["on_main"] == ["of 0", "of 0"]
    assert found["errors"] == [
        ["RunExistsError: taken", "UnreadableError: taken 7"],
        ["RunExistsError: taken", "RuntimeError: UnreadableError in process 0: taken 7"],
    ]
    assert [mine.tolist() for mine in found["sum"]] == [[2, 1]] * 2
    assert [mine.tolist() for mine in found["buffers"]] == [[1, 1, 1]] * 2


def test_the_test_result_is_that_of_the_saved_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without validation images nothing else exchanges the statistics of batch norms, which differ between ranks."""
    calls: list[str] = []
    evaluated = run_module.evaluate_model

    def evaluate(model: nn.Module, loader: Any, world: World) -> Any:
        calls.append("evaluate")
        return evaluated(model, loader, world)

    data = fashion_folder(tmp_path / "data", 60)
    monkeypatch.setattr(World, "copy_buffers", lambda world, module: calls.append("copy"))
    monkeypatch.setattr(run_module, "evaluate_model", evaluate)
    config = TeachConfig("resnet8", out=tmp_path / "run", data=DataConfig("fashion-mnist", data, validation=0.0))
    run_module.teach(replace(config, optim=OptimConfig(epochs=2, batch_size=30), log=LOG))
    assert calls == ["copy", "evaluate"]


def test_only_rank_0_writes_and_evaluation_counts_all_images(two: Path) -> None:
    whole = two / "whole"
    assert {path.name for path in whole.iterdir()} == {"checkpoints", METRICS, "model.safetensors"}
    records = read_metrics(whole / METRICS)
    assert len([r for r in records if r["kind"] == "epoch"]) == 3
    steps = [record["step"] for record in records]
    assert steps == sorted(set(steps))
    for record in records:
        assert sum(record["weights"]) == pytest.approx(1, rel=1e-4)
        if "validation_accuracy" in record:
            assert (70 * record["validation_accuracy"]) == pytest.approx(round(70 * record["validation_accuracy"]))


def test_resuming_on_another_number_of_processes(two: Path, tmp_path: Path) -> None:
    # Same images in every step, but batch norm and dropout differ between 2 x 8 and 1 x 16: approximately equal.
    shutil.copytree(two / "whole" / "checkpoints", tmp_path / "checkpoints")
    newest = Checkpoints(tmp_path / "checkpoints").paths()[0]
    shutil.rmtree(newest)
    before = Checkpoints(tmp_path / "checkpoints").latest()
    run(tmp_path, ONE)
    (epoch,) = read_metrics(tmp_path / METRICS, "epoch")
    expected = read_metrics(two / "whole" / METRICS, "epoch")[-1]
    assert epoch["step"] == expected["step"] == before.step + 1
    assert epoch["loss"] == pytest.approx(expected["loss"], rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "step"), [(1, 13), *(pytest.param(r, s, marks=pytest.mark.slow) for r in (0, 1) for s in (0, 9, 21))]
)
def test_a_killed_rank_ends_the_others_and_the_run_resumes(two: Path, tmp_path: Path, victim: int, step: int) -> None:
    ranks, _store = start("run", tmp_path, victim, step)
    for rank, process in enumerate(ranks):
        _, errors = process.communicate(timeout=TIMEOUT)
        if rank == victim:
            assert process.returncode == -signal.SIGKILL, errors
        else:
            assert process.returncode != 0 and ("Error" in errors or "Exception" in errors), errors
    latest = Checkpoints(tmp_path / "checkpoints").latest()
    assert (0 if latest is None else latest.step) == step and not (tmp_path / "model.safetensors").exists()
    complete("run", tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (two / "whole" / "model.safetensors").read_bytes()


def test_one_process_needs_no_torchrun() -> None:
    with processes("cpu") as world:
        assert world == World(0, 1, torch.device("cpu")) and world.is_main
        assert not torch.distributed.is_initialized()
        assert torch.equal(world.gather(torch.arange(3)), torch.arange(3)[None]) and world.on_main(lambda: 5) == 5
        world.wait()


def test_invalid_worlds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="batch_size 64 cannot be shared evenly by 3 processes"):
        share_of_batch(64, World(0, 3, torch.device("cpu")))
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="process 3 of this machine needs a GPU of its own, but torch sees 2"):
        processes().__enter__()


TORCHRUN_JOB = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from camkd_fast.train.config import DataConfig, OptimConfig, TeachConfig
from camkd_fast.train.run import teach
out = Path(sys.argv[1])
teach(TeachConfig(model="resnet8", out=out, data=DataConfig(images=120), optim=OptimConfig(epochs=3, batch_size=40)))
"""


WITHOUT_VALIDATION = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from camkd_fast.train.config import DataConfig, LogConfig, OptimConfig, TeachConfig
from camkd_fast.train.run import teach
out, root = Path(sys.argv[1]), Path(sys.argv[2])
data = DataConfig("fashion-mnist", root, validation=0.0)
optim = OptimConfig(epochs=2, batch_size=20, learning_rate=0.1)
teach(TeachConfig("resnet8", out=out, data=data, optim=optim, log=LogConfig(tensorboard=False, progress=False)))
"""


@pytest.mark.slow
def test_two_processes_without_validation(tmp_path: Path) -> None:
    """Every rank tests its half of the images with the model that is saved."""
    root = fashion_folder(tmp_path / "data", 120)
    (tmp_path / "job.py").write_text(WITHOUT_VALIDATION)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(tmp_path / "job.py"), str(tmp_path / "run"), str(root)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, text=True, capture_output=True, env=environment, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    (record,) = read_metrics(tmp_path / "run" / METRICS, "test")
    found = run_module.evaluate(tmp_path / "run")
    assert record["test_images"] == found.images and record["test_accuracy"] == found.accuracy
    assert record["test_loss"] == pytest.approx(found.loss, rel=1e-5)


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    (tmp_path / "job.py").write_text(TORCHRUN_JOB)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(tmp_path / "job.py"), str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, text=True, capture_output=True, env=environment, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    assert "resnet8 on digits: 100%" in done.stderr
    (record,) = read_metrics(tmp_path / "run" / METRICS, "test")
    assert record["test_images"] == 597
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
    failed = subprocess.run(command, text=True, capture_output=True, env=environment, timeout=TIMEOUT)
    assert failed.returncode != 0 and "holds a finished run" in failed.stderr
