"""Loaders and the training step on the GPU against the CPU."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from camkd_fast.data import LoaderConfig, choose
from camkd_fast.data.augment import Augmentation
from camkd_fast.data.batch import Batch
from camkd_fast.data.rand_augment import draws, rand_augment
from camkd_fast.losses.min_norm import min_norm_weights
from camkd_fast.models.preprocessing import Preprocessing, adapted
from camkd_fast.train import strategies
from camkd_fast.train.config import OptimConfig, PrecisionConfig
from camkd_fast.train.distributed import World
from camkd_fast.train.step import TrainStep
from camkd_fast.train.step_graph import WARM_UP
from camkd_fast.train.step_inputs import SLOTS, StepInputs
from camkd_fast.train.sums import NonFiniteLossError
from camkd_fast.train.teacher_ahead import with_following
from camkd_fast.train.teachers.live import LiveTeachers
from tests.gpu.test_gpu_runtime import no_synchronisation
from tests.support.gpu import CUDA, NO_GPU
from tests.support.loader_data import CROP, RESIZED, arrays, by_sample, image_files, opened
from tests.support.training import CLASSES, OPTIM, SmallNet, batch, images, parameters

CPU = torch.device("cpu")
GIVEN = Preprocessing((127 / 255,) * 3, (50 / 255,) * 3, (8, 8))  # of `images`


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("augmentation", [None, CROP, RESIZED], ids=["none", "crop", "resized-crop"])
def test_resident_batches_equal_the_cpus(
    device: torch.device, augmentation: Augmentation | None, channels_last: bool
) -> None:
    data = arrays()
    settings = {"augmentation": augmentation, "channels_last": channels_last}
    with opened(data, "resident", **settings) as loader, opened(data, "resident", device=device, **settings) as other:
        for epoch in range(2):
            loader.set_epoch(epoch)
            other.set_epoch(epoch)
            for ours, theirs in zip(other, loader, strict=True):
                assert ours.images.device.type == device.type and torch.equal(ours.index.cpu(), theirs.index)
                assert torch.equal(ours.target.cpu(), theirs.target)
                # Interpolation may round a few values to the neighbouring level.
                close = (ours.images.cpu() - theirs.images).abs() <= (0.02 if augmentation is RESIZED else 1e-5)
                assert close.float().mean() > 0.999


def step_on(
    device: torch.device,
    precision: PrecisionConfig,
    name: str = "ca-mkd",
    dropout: float = 0.0,
    own: Preprocessing | None = None,
    optim: OptimConfig = OPTIM,
) -> TrainStep:
    """`own`: of the teachers."""
    nets = [SmallNet(6 + k, seed=10 + k) for k in range(2)]
    live = LiveTeachers([adapted(net, own or GIVEN, GIVEN).to(device) for net in nets], CLASSES)
    if precision.compiles_teachers(device.type):
        live.compile_for(32)
    given = live if strategies.find(name).needs_teachers else None
    torch.manual_seed(0)
    strategy = strategies.create(name, given, SmallNet().num_features)
    student = SmallNet(dropout=dropout)
    return TrainStep(student, strategy, given, optim, precision, World(0, 1, device), 32, seed=0)


def on_device(host: Batch, device: torch.device) -> Batch:
    return host._replace(images=host.images.to(device), target=host.target.to(device))


def steps_of(
    device: torch.device,
    precision: PrecisionConfig,
    count: int = 3,
    name: str = "ca-mkd",
    dropout: float = 0.0,
    own: Preprocessing | None = None,
) -> torch.Tensor:
    """All parameters after a few steps."""
    step = step_on(device, precision, name, dropout, own)
    take(step, [on_device(batch(32, seed=i), device) for i in range(count)])
    return parameters(step).cpu()


def take(step: TrainStep, batches: Iterable[Batch]) -> None:
    """Steps on full batches, with teachers that run ahead where the step has them."""
    for i, (one, following) in enumerate(with_following(batches, step.looks_ahead)):
        step(one, 32, 0.01, i, following)


@pytest.mark.usefixtures("nondeterministic")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # float16's scaler skips the first steps
def test_training_steps_equal_the_cpus(device: torch.device, dtype: str) -> None:
    before = steps_of(CPU, PrecisionConfig(compile="off"), 0)
    expected = steps_of(CPU, PrecisionConfig(compile="off"))
    actual = steps_of(device, PrecisionConfig(compile="off", dtype=dtype))
    # Relative to the change in three steps: convolutions on a GPU may use TF32, and 16 bits resolve less.
    error = float((actual - expected).norm() / (expected - before).norm())
    assert error < {"float32": 0.03, "bfloat16": 0.1}[dtype], f"{error:.1e}"


@pytest.mark.usefixtures("nondeterministic")
@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)
@pytest.mark.parametrize("graphs", ["off", "on"])
@pytest.mark.parametrize("compiled", ["off", "on"])
def test_compiled_and_replayed_steps_equal_eager_ones(compiled: str, graphs: str) -> None:
    torch._dynamo.reset()
    plain = PrecisionConfig(compile="off", cuda_graphs="off")
    eager = steps_of(CUDA, plain, 8)
    other = steps_of(CUDA, PrecisionConfig(compile=compiled, cuda_graphs=graphs), 8)  # type: ignore[arg-type]
    moved = (eager - steps_of(CUDA, plain, 0)).norm()
    assert float((other - eager).norm() / moved) < 0.01


def refusals(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What this package logged, which says why a step was not recorded. PyTorch's compiler logs too."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("camkd_fast")]


@pytest.mark.usefixtures("nondeterministic")
@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", strategies.names())
def test_every_strategy_is_recorded(name: str, dtype: str, caplog: pytest.LogCaptureFixture) -> None:
    precision = PrecisionConfig(compile="off", cuda_graphs="on", dtype=dtype)  # type: ignore[arg-type]
    eager = replace(precision, cuda_graphs="off")
    replayed, expected = (steps_of(CUDA, p, 10, name, dropout=0.5) for p in (precision, eager))
    assert not refusals(caplog)
    moved = (expected - steps_of(CUDA, eager, 0, name)).norm()
    assert float((replayed - expected).norm() / moved) < {"float32": 0.01}.get(dtype, 0.05)


RECIPE = replace(OPTIM, clip_grad=0.5, ema=0.9, label_smoothing=0.1, mixup=0.4, cutmix=1.0, decay_norms=False)


@pytest.mark.usefixtures("nondeterministic")
@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)
@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    [("sgd", "float32"), ("sgd", "float16"), ("adamw", "float32"), ("adamw", "float16"), ("muon", "bfloat16")],
)
@pytest.mark.parametrize("compiled", ["off", "on"])
def test_recipes_are_recorded(compiled: str, optimizer: str, dtype: str, caplog: pytest.LogCaptureFixture) -> None:
    """Optimiser, clipping, average, smoothing and mixing in one CUDA graph, with teachers that run ahead."""
    torch._dynamo.reset()
    precision = PrecisionConfig(compile=compiled, cuda_graphs="on", dtype=dtype)  # type: ignore[arg-type]
    optim = replace(RECIPE, optimizer=optimizer)  # type: ignore[arg-type]
    found = []
    for setting in (precision, replace(precision, cuda_graphs="off")):
        step = step_on(CUDA, setting, optim=optim)
        start = parameters(step)
        take(step, [on_device(batch(32, seed=i), CUDA) for i in range(12)])
        assert step.average is not None
        average = torch.cat([p.flatten() for p in step.average.module.parameters()])
        found.append((parameters(step), average, parameters(step) - start))
    assert not refusals(caplog)
    for ours, theirs in zip(found[0][:2], found[1][:2], strict=True):
        assert float((ours - theirs).norm() / found[1][2].norm()) < (0.02 if dtype == "float32" else 0.1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)
@pytest.mark.parametrize("magnitude", [5, 30])
def test_augmented_levels_equal_the_cpus(magnitude: int) -> None:
    levels = arrays(70, H=33, W=29).pixels
    drawn = draws(3, 0, 0, np.arange(70))
    difference = (
        rand_augment(levels.to(CUDA), drawn, magnitude).cpu().int() - rand_augment(levels, drawn, magnitude).int()
    )
    assert (difference.abs() > 1).float().mean() < 0.005  # rounding between two pixels or levels
    more = Augmentation(padding=3, rand_augment=(2, magnitude), erasing=0.5)
    for kind in ("resident", "torch"):
        with (
            opened(arrays(), kind, augmentation=more) as cpu,
            opened(arrays(), kind, augmentation=more, device=CUDA) as gpu,
        ):
            for ours, theirs in zip(gpu, cpu, strict=True):
                assert torch.equal(ours.images.cpu() == 0, theirs.images == 0)
                assert ((ours.images.cpu() - theirs.images).abs() > 0.02).float().mean() < 0.01


@pytest.mark.usefixtures("nondeterministic")
@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["ca-mkd", "aekd", "fitnet-mkd"])
def test_teachers_that_run_ahead_change_no_bit(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    ahead = PrecisionConfig(compile="off", cuda_graphs="on", dtype=dtype, teacher_ahead="on")  # type: ignore[arg-type]
    steps = (steps_of(CUDA, p, 12, name, dropout=0.5) for p in (ahead, replace(ahead, teacher_ahead="off")))
    assert torch.equal(*steps)


@pytest.mark.usefixtures("nondeterministic")
@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)
@pytest.mark.parametrize("ahead", ["on", "off"])
@pytest.mark.parametrize("kind", ["resident", "torch", "dali"])
def test_replays_on_a_loaders_batches(kind: str, ahead: str, tmp_path: Path) -> None:
    """Batches of every loader, finished in the graph or before it, over two epochs that end with a smaller one."""
    if kind == "dali":
        pytest.importorskip("nvidia.dali")
    data = image_files(tmp_path, 32 * 4 + 7) if kind == "dali" else images(32 * 4 + 7)

    def trained(precision: PrecisionConfig) -> torch.Tensor:
        step = step_on(CUDA, precision)
        settings = {"augmentation": RESIZED if kind == "dali" else CROP, "device": CUDA, "deferred": step.replays}
        number = 0
        with opened(data, kind, 32, **settings) as loader:
            for epoch in range(3):
                loader.set_epoch(epoch)
                for one, following in with_following(loader, step.looks_ahead):
                    step(one, len(one.target), 0.01, number, following)
                    number += 1
        assert number == 3 * 5
        return parameters(step)

    eager = PrecisionConfig(compile="off", cuda_graphs="off")
    expected = trained(eager)
    actual = trained(replace(eager, cuda_graphs="on", teacher_ahead=ahead))  # type: ignore[arg-type]
    moved = (expected - parameters(step_on(CUDA, eager))).norm()
    assert float((actual - expected).norm() / moved) < 0.01


@pytest.mark.usefixtures("nondeterministic")
@pytest.mark.parametrize("size", [(8, 8), (12, 12), (5, 6)])
def test_teachers_of_other_images_are_recorded(
    size: tuple[int, int], device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    """Their affine and resize are part of the graph, and as on the CPU."""
    own = Preprocessing((0.3, 0.4, 0.5), (0.2, 0.3, 0.4), size)
    recorded, eager = PrecisionConfig(compile="off"), PrecisionConfig(compile="off", cuda_graphs="off")
    replayed, expected = (steps_of(device, p, WARM_UP + 3, own=own) for p in (recorded, eager))
    assert not refusals(caplog)
    moved = (expected - steps_of(device, eager, 0)).norm()
    assert float((replayed - expected).norm() / moved) < 0.01
    on_cpu = steps_of(CPU, eager, WARM_UP + 3, own=own)
    assert float((expected - on_cpu).norm() / moved) < 0.05
    assert float((expected - steps_of(device, eager, WARM_UP + 3)).norm() / moved) > 0.05  # and not the student's own


class Reading(strategies.AVER):
    """A strategy that reads a number on the host, which cannot be recorded."""

    name, label, color = "reading", "Reading", "#000000"

    def weighting(self, student_logits: torch.Tensor, teacher_outputs: object, target: torch.Tensor) -> str:
        assert float(student_logits.sum()) == float(student_logits.sum())
        return "uniform"


@pytest.mark.usefixtures("nondeterministic")
@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)
def test_a_refused_recording_leaves_no_trace(caplog: pytest.LogCaptureFixture) -> None:
    """Neither on the current stream nor on the generator, which dropout needs; and another step can be recorded."""
    strategies.register(Reading)
    try:
        recorded, eager = PrecisionConfig(compile="off"), PrecisionConfig(compile="off", cuda_graphs="off")
        stream = torch.cuda.current_stream()
        actual, expected = (steps_of(CUDA, p, 10, "reading", dropout=0.5) for p in (recorded, eager))
        (refusal,) = refusals(caplog)
        assert "without a CUDA graph: " in refusal
        assert torch.cuda.current_stream() == stream
        moved = (expected - steps_of(CUDA, eager, 0, "reading")).norm()
        assert float((actual - expected).norm() / moved) < 0.01
        caplog.clear()
        steps_of(CUDA, recorded, WARM_UP + 2, "ca-mkd", dropout=0.5)
        assert not refusals(caplog)
    finally:
        strategies.unregister("reading")


@pytest.mark.usefixtures("nondeterministic")
@pytest.mark.parametrize("graphs", ["auto", "off"])
@pytest.mark.parametrize("name", ["ce", "ca-mkd", "aekd"])
def test_steps_never_synchronise(name: str, graphs: str, device: torch.device) -> None:
    """Neither eager nor replayed ones, with labels on the host or on the device."""
    for on_host in (False, True):
        step = step_on(device, PrecisionConfig(compile="off", cuda_graphs=graphs), name)  # type: ignore[arg-type]
        batches = [batch(32, seed=i) for i in range(WARM_UP + 6)]
        batches = [one if on_host else on_device(one, device) for one in batches]
        take(step, batches[: WARM_UP + 2])
        with no_synchronisation(device):
            take(step, batches[WARM_UP + 2 :])
        assert step.sums.read(World(0, 1, device)).totals.images == 32 * len(batches)


@pytest.mark.usefixtures("nondeterministic")
@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)
def test_a_replayed_step_that_diverges_is_found() -> None:
    step = step_on(CUDA, PrecisionConfig(compile="off"))
    batches = [on_device(batch(32, seed=i), CUDA) for i in range(WARM_UP + 4)]
    batches[WARM_UP + 1] = batches[0]._replace(images=batches[0].images * float("nan"))
    take(step, batches)
    with pytest.raises(NonFiniteLossError, match=f"not finite at step {WARM_UP + 2}:"):
        step.sums.read(World(0, 1, CUDA))


def test_a_pinned_record_is_not_written_before_it_was_copied(device: torch.device) -> None:
    """The host is far ahead of a device that is busy for some 10 ms at first."""
    given = [[torch.full((64, 3), i), torch.full((64,), 2.0 * i)] for i in range(3 * SLOTS)]
    inputs = StepInputs(given[0], device)
    total = torch.zeros(2, dtype=torch.float64, device=device)
    if device.type == "cuda":
        torch.cuda._sleep(20_000_000)  # cycles
    for batch_inputs in given:
        inputs.fill(batch_inputs)
        total += torch.stack([tensor.double().mean() for tensor in inputs.tensors])
    assert total.tolist() == [sum(range(3 * SLOTS)), 2.0 * sum(range(3 * SLOTS))]


@pytest.mark.usefixtures("nondeterministic")
def test_aekds_weights_equal_the_cpus(device: torch.device) -> None:
    """Of Gram matrices with and without a unique minimum."""
    for K in (2, 3, 5, 16):
        g = torch.randn(K, K + 3, dtype=torch.float64)
        for vectors in (g, torch.cat([g[:1], g[:-1]])):
            gram = (vectors @ vectors.T).float()
            for cap in (1.0, 0.6, 1.5 / K):
                expected, actual = min_norm_weights(gram, cap), min_norm_weights(gram.to(device), cap).cpu()
                assert float((actual - expected).norm()) < 1e-7, (K, cap)  # weights sum to 1


def test_dali_decodes_on_the_device(device: torch.device, tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    files = image_files(tmp_path)
    config = LoaderConfig(8, augmentation=RESIZED, workers=1, device=device)
    with opened(files, "dali", batch_size=8, augmentation=RESIZED) as on_cpu:
        on_cpu.set_epoch(0)
        index, expected = by_sample(on_cpu)
    loader = choose.loader(files, config, "dali")
    loader.set_epoch(0)
    again, actual = by_sample(loader)
    loader.close()
    assert torch.equal(again.cpu(), index)
    # The JPEG decoder of the GPU differs by a few levels in places; 60 levels are one unit.
    assert (actual.cpu() - expected).abs().mean() < 0.05
