"""The code of the benchmarks: timer, contestants, suites. Code for a GPU runs against fakes of torch.cuda."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks import (
    bench_small_batch,
    contestants,
    environment,
    profiler,
    results,
    shapes,
    suite_tables,
    timer,
)
from benchmarks.contestants import ENDS, by_autograd, disagreement
from benchmarks.shapes import Shape
from camkd_fast.backends import dispatch
from camkd_fast.losses.eager import eager_loss

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SMALL = Shape(16, 33, 3, torch.float32)


# --- timer -----------------------------------------------------------------------------------------------------------


class FakeBenchmark:
    """The part of pytest-benchmark's fixture that the timer uses."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def pedantic(self, target: Any, rounds: int) -> None:
        for _ in range(rounds):
            start = timer.CLOCK()
            target()
            self.seconds.append(timer.CLOCK() - start)


def test_rounds_are_interleaved_and_the_watched_subject_is_what_pytest_benchmark_sees() -> None:
    calls: list[str] = []
    subjects = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    benchmark = FakeBenchmark()
    times = timer.interleaved(subjects, CPU, seconds=0.0, rounds=(9, 9), benchmark=benchmark, watch="b")
    assert calls[: 2 * timer.WARM_UP] == ["a"] * timer.WARM_UP + ["b"] * timer.WARM_UP
    assert calls[2 * timer.WARM_UP :] == ["a", "b"] * 10  # nine, after one that measures the duration of a round
    assert len(times["a"]) == 9
    assert benchmark.seconds == pytest.approx(times["b"], abs=1e-9)


def test_ratios_are_taken_within_rounds() -> None:
    assert timer.median_ratio([2.0, 40.0, 6.0], [1.0, 10.0, 3.0]) == 2.0
    found = timer.percentiles([0.001 * i for i in range(1, 10)])
    assert found["p50_ms"] == pytest.approx(5.0) and found["p20_ms"] < 5.0 < found["p80_ms"]


class FakeEvent:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None: ...

    def elapsed_time(self, other: FakeEvent) -> float:
        return 3.0


def test_device_events(monkeypatch: pytest.MonkeyPatch) -> None:
    meta = torch.device("meta")
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1024))
    called: list[int] = []
    assert timer._EventTimer(meta)(lambda: called.append(1), meta) == 0.003
    assert called == [1]


def test_peak_memory_is_beyond_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"memory_allocated": 100, "max_memory_allocated": 164}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device: None)
    assert timer.peak_bytes(lambda: None, torch.device("cuda")) == 64
    assert timer.peak_bytes(lambda: None, CPU) is None


def test_a_call_becomes_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: "replayed"))
    captured: list[object] = []
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: captured.append(stream) or nullcontext())
    called: list[int] = []
    assert bench_small_batch.recorded(lambda: called.append(1), torch.device("cuda"))() == "replayed"
    assert len(called) == timer.WARM_UP + 1
    assert captured == [stream]  # that of the warm-up, where autograd adds gradients


def test_kernels_are_counted() -> None:
    def event(kind: Any, start: float, end: float, name: str = "kernel") -> Any:
        span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
        return SimpleNamespace(device_type=kind, time_range=span, name=name)

    kinds = torch.autograd.DeviceType
    on_host = [event(kinds.CPU, 0, 90, name) for name in ("aten::add", "cudaLaunchKernel", "cudaGraphLaunch")]
    events = [event(kinds.CUDA, 10, 14), *on_host, event(kinds.CUDA, 12, 18), event(kinds.CUDA, 30, 34)]
    assert profiler.read(events, 2) == (7.0, 6.0, 1.5, 1.0)
    assert profiler.profiled(lambda: torch.ones(3).sum(), CPU) == (0.0, 0.0, 0.0, 0.0)


def test_the_table_of_a_gpus_training_steps() -> None:
    row = {
        "name": "float32, graph",
        "p50_ms": 4.234,
        "images_per_second": 15000.4,
        "speed_up": 7.93,
        "loss_share": 0.002,
        "first_two_steps_seconds": 3.1,
    }
    plain, _ = suite_tables.train_step({"rows": [row]})
    assert [len(cells) for cells in (plain.header, *plain.rows)] == [6, 6] and plain.rows[0][1] == "4"
    seen = {"latency_ms": 5.0, "launches": 9.2, "kernels": 850.0, "gpu_busy": 0.83}
    table, _ = suite_tables.train_step({"rows": [row | seen]})
    assert table.header[-3:] == ["one step, ms", "launches", "GPU busy"]
    assert table.rows[0][1:4] == ["4.23", "15000", "7.9x"] and table.rows[0][-3:] == ["5.00", "9", "83%"]


def test_clocks_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    answer = SimpleNamespace(stdout="1980, 2619, 1980, 2619\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
    found = environment.clocks(torch.device("cuda"))
    assert found == {"sm": 1980.0, "mem": 2619.0, "max.sm": 1980.0, "max.mem": 2619.0}
    answer.stdout = "[N/A]\n"
    assert environment.clocks(torch.device("cuda")) is None


# --- contestants -----------------------------------------------------------------------------------------------------


def test_all_contestants_agree_at_both_ends() -> None:
    batch = SMALL.batch(CPU)
    others, missing = contestants.others(CPU, max_autotune=False)
    assert list(others) == ["eager", "compile", "loop"] and len(missing) == len(contestants.PEERS)
    others.pop("compile")  # compiled in the test of the suite
    truth = others["eager"].grad(batch)
    for name, contestant in (contestants.ours(batch) | others).items():
        assert disagreement(contestant, truth, batch) is None, name


def test_our_first_contestant_is_named_after_the_backend_of_auto() -> None:
    picked, _ = dispatch.choose("auto", [torch.zeros(2, 3)])
    assert list(contestants.ours(SMALL.batch(CPU))) == [f"camkd[{picked}]"]


def test_a_contestant_with_another_loss_is_rejected() -> None:
    batch = SMALL.batch(CPU)
    truth = by_autograd(eager_loss).grad(batch)
    reason = disagreement(by_autograd(lambda *tensors: 1.01 * eager_loss(*tensors)), truth, batch)
    assert reason is not None and "its loss differs" in reason
    reason = disagreement(by_autograd(lambda *tensors: eager_loss(*tensors).missing), truth, batch)
    assert reason is not None and reason.startswith("AttributeError")


class FakeKL(torch.nn.KLDivLoss):
    """The module of liger-kernel has the interface of torch's."""


@pytest.mark.parametrize("name", contestants.PEERS)
def test_peers_through_their_documented_interface(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    liger, quack = ModuleType("liger_kernel.transformers"), ModuleType("quack")
    liger.LigerKLDIVLoss = FakeKL  # type: ignore[attr-defined]
    quack.cross_entropy = F.cross_entropy  # type: ignore[attr-defined]
    quack.softmax = lambda x: x.softmax(-1)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", liger)
    monkeypatch.setitem(sys.modules, "quack", quack)
    batch = SMALL.batch(CPU)
    assert disagreement(contestants.PEERS[name][1](), by_autograd(eager_loss).grad(batch), batch) is None


def test_sizes() -> None:
    assert [(s.N, s.C, s.K) for s in shapes.COMPARED["cpu"][:4]] == [
        (64, 100, 3), (1024, 100, 3), (1024, 1000, 3), (4096, 1000, 5),
    ]  # fmt: skip
    for device in ("cpu", "cuda"):
        quick, full = (shapes.over_classes(device, which) for which in ("quick", "full"))
        assert set(quick) < set(full) and len(full) == 2 * 4 * len(shapes.CLASSES)
        assert all(s.floor_bytes() <= max(shapes.CLASSES_BYTES[device], 8 * s.C * 4) for s in full)
    assert shapes.Shape(4096, 32000, 3, torch.bfloat16).floor_bytes() == 5 * 4096 * 32000 * 2


def test_the_engine_starts_in_microseconds() -> None:
    assert 0 < contestants.engine_start_seconds(CPU) < 0.01


# --- suites ----------------------------------------------------------------------------------------------------------


def run_suites(folder: Path, *words: str) -> str:
    command = [sys.executable, "-m", "benchmarks", *words, "--device", "cpu", "--seconds", "0.02", "--out", str(folder)]
    # A process of pytest-xdist, where pytest-benchmark would measure once
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check_rows(folder: Path, suite: str, keys: Sequence[str]) -> dict[str, Any]:
    result = json.loads((folder / f"{suite}.json").read_text())
    where = result["environment"]
    assert {"commit", "tests", "date", "torch", "device", "processor"} <= set(where) and result["copy_gb_per_s"] > 0
    for row in result["rows"]:
        assert {"clocks_mhz", *keys} <= set(row)
    return result


@pytest.mark.slow
def test_loss_suites(tmp_path: Path) -> None:
    """One size against others, one of the range of C, and the small batch."""
    printed = run_suites(tmp_path, "logit_loss", "small_batch", "-k", "64x100 or 19x262144-K3-float32 or small_batch")
    result = check_rows(tmp_path, "logit_loss", ["floor_bytes", "times", "over", "share_of_copy", "rounds"])
    assert [row["grid"] for row in result["rows"]] == ["compared", "classes"]
    compared, by_classes = result["rows"]
    ours = compared["ours"]
    assert list(compared["times"]) == [ours, "eager", "compile", "loop"] and list(by_classes["times"]) == [ours]
    for end in ENDS:
        assert set(compared["over"][end]) == {"eager", "compile", "loop"}
        entry = compared["times"][ours][end]
        assert entry["p20_ms"] <= entry["p50_ms"] <= entry["p80_ms"] and entry["peak_bytes"] is None
    assert "64 x 100" in printed and "autograd engine" in printed and "left out: liger" in printed
    small = check_rows(tmp_path, "small_batch", ["name", "call_us", "graph_us", "device_us", "launches"])
    assert {row["graph_us"] for row in small["rows"]} == {None} and "need a GPU" in small["notes"][-1]
    assert "64 x 100, loss + backward" in printed


@pytest.mark.slow
def test_the_other_suites(tmp_path: Path) -> None:
    names = "feature_loss", "linear_loss", "loaders", "train_step"
    printed = run_suites(tmp_path, *names)
    linear = check_rows(tmp_path, "linear_loss", ["times", "over", "share_of_products", "tflops", "chunk_rows"])
    assert all({"eager", "chunked"} <= set(row["over"]) and row["share_of_products"] > 0 for row in linear["rows"])
    features = check_rows(tmp_path, "feature_loss", ["floor_bytes", "times", "over", "share_of_copy", "grad"])
    assert [set(row["over"]) for row in features["rows"]] == [{"eager", "compile"}] * 16
    assert all(row["grad"]["floor_bytes"] < row["floor_bytes"] for row in features["rows"])
    assert all(set(row["times"]["camkd"]["grad"]) >= {"p50_ms", "host_us", "peak_bytes"} for row in features["rows"])
    assert "value + gradient over compile" in printed
    assert len(check_rows(tmp_path, "loaders", ["images_per_second", "speed_up"])["rows"]) == 5
    steps = check_rows(tmp_path, "train_step", ["p50_ms", "images_per_second", "speed_up", "loss_share"])
    assert statistics.fmean(row["speed_up"] for row in steps["rows"]) > 1
    assert all(
        f"written to {tmp_path}/{name}.json" in printed
        for name in ("feature_loss", "linear_loss", "loaders", "train_step")
    )


def test_every_suite_has_a_file_and_a_table() -> None:
    assert set(results.SUITES) == set(suite_tables.TABLES)
    assert {path.stem for path in (ROOT / "benchmarks").glob("bench_*.py")} == {f"bench_{s}" for s in results.SUITES}
