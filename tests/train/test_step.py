"""The training step: gradients, precisions, compilation, sums, no host synchronisation, rates and random numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from camkd_fast import camkd_loss
from camkd_fast.models.protocol import predict
from camkd_fast.train.config import COMPILED_STEPS, OptimConfig, PrecisionConfig
from camkd_fast.train.schedule import learning_rate, peak_rate
from camkd_fast.train.step import DTYPES, TrainStep
from camkd_fast.train.strategies import names
from camkd_fast.train.sums import NonFiniteLossError
from tests.support.torch_version import COMPILATIONS
from tests.support.training import ONE, SmallNet, batch, parameters, train_step


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.set_num_threads(threads)


def take_steps(step: TrainStep, count: int = 3, rate: float = 0.01, size: int = 32) -> TrainStep:
    for i in range(count):
        step(batch(size, seed=i), size, rate * (1 + i), i)
    return step


def relative(one: Tensor, two: Tensor) -> float:
    return float((one - two).norm() / two.norm())


def gradients(step: TrainStep) -> Tensor:
    return torch.cat([p.grad.flatten() for p in step.trainable.parameters() if p.grad is not None])


# --- the gradient ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names())
def test_gradient_is_that_of_the_differentiable_loss(name: str) -> None:
    data = batch(33)
    step, twin = train_step(name), train_step(name)
    step(data, 33, 0.0, 0)

    prediction = predict(twin.student, data.images)
    if name == "ce":
        loss = F.cross_entropy(prediction.logits, data.target)
    else:
        teacher_outputs = twin.teachers(data)
        weighting = twin.strategy.weighting(prediction.logits.detach(), teacher_outputs, data.target)
        formula = twin.strategy.formula._replace(weighting=weighting)
        loss = camkd_loss(prediction.logits, [t.logits for t in teacher_outputs], data.target, **formula.options()).loss
        term = twin.strategy.feature_term(prediction, teacher_outputs, data.target)
        loss = loss if term is None else loss + term.loss
    loss.backward()
    assert gradients(step).norm() > 0
    assert relative(gradients(step), gradients(twin)) < 1e-6
    totals = step.sums.read(ONE).totals
    assert totals.losses[0] / 33 == pytest.approx(loss.item(), rel=1e-5)


def test_update_is_that_of_torch_sgd() -> None:
    step, twin = train_step(), train_step()
    unfused = torch.optim.SGD(twin.trainable.parameters(), lr=1.0, momentum=0.9, weight_decay=5e-4, nesterov=True)
    twin.optimizer = unfused
    take_steps(step)
    take_steps(twin)
    assert relative(parameters(step), parameters(twin)) < 1e-6


def test_num_items_divides_and_the_rate_of_each_step_is_its_own() -> None:
    whole, half = train_step(), train_step()
    whole(batch(), 32, 0.01, 0)
    half(batch(), 64, 0.02, 0)
    assert relative(gradients(half), gradients(whole) / 2) < 1e-6
    frozen = train_step()
    before = parameters(frozen)
    take_steps(frozen, rate=0.0)
    assert torch.equal(parameters(frozen), before)


def test_teachers_stay_as_they_are_and_the_strategys_own_parameters_learn() -> None:
    step = train_step("ca-mkd")
    hashes = step.teachers.hashes
    before = [p.detach().clone() for p in step.strategy.parameters()]
    take_steps(step)
    assert step.teachers.hashes == hashes
    assert before and all(not torch.equal(a, b) for a, b in zip(before, step.strategy.parameters(), strict=True))


# --- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ce", "ca-mkd-logits", "ca-mkd"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_gradient_is_within_a_few_roundings(name: str, dtype: str) -> None:
    exact, low = train_step(name), train_step(name, precision=PrecisionConfig(compile="off", dtype=dtype))
    if dtype == "float16":
        low.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in (exact, low):
        step(batch(), 32, 0.0, 0)
    assert all(p.dtype == torch.float32 for p in low.trainable.parameters())
    assert relative(gradients(low), gradients(exact)) < 8 * torch.finfo(DTYPES[dtype]).eps


def test_float16_lowers_its_scale_until_steps_count_and_skips_leave_no_trace() -> None:
    step = train_step("ca-mkd", precision=PrecisionConfig(compile="off", dtype="float16"))
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    before = parameters(step)
    step(batch(), 32, 0.01, 0)
    assert torch.equal(parameters(step), before)  # overflow: nothing changes, including momentum
    assert step.scaler.get_scale() == 2.0**23
    momenta = [state["momentum_buffer"] for state in step.optimizer.state.values()]
    assert momenta and all(torch.equal(m, torch.zeros_like(m)) for m in momenta)
    take_steps(step, 20)
    assert parameters(step).isfinite().all() and not torch.equal(parameters(step), before)


def test_channels_last_changes_the_layout_only() -> None:
    step, other = train_step(), train_step(precision=PrecisionConfig(compile="off", channels_last=True))
    assert other.student.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    for i in range(3):
        data = batch(seed=i)
        step(data, 32, 0.01, i)
        other(data._replace(images=data.images.contiguous(memory_format=torch.channels_last)), 32, 0.01, i)
    assert relative(parameters(other), parameters(step)) < 1e-5


def test_synchronised_batch_norm_is_refused_on_a_cpu() -> None:
    with pytest.raises(ValueError, match=r"sync_batchnorm.*cpu"):
        train_step(precision=PrecisionConfig(sync_batchnorm=True))


# --- compilation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names())
def test_student_and_loss_are_one_graph_compiled_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    eager = train_step(name, student=SmallNet(batch_norm=True))
    compiled = train_step(name, student=SmallNet(batch_norm=True), precision=PrecisionConfig(compile="on"))
    for step in (eager, compiled):
        take_steps(step, 3)  # another rate each
        take_steps(step, 1, size=17)  # an epoch's last batch
        take_steps(step, 1)
    assert 1 <= counter.frame_count <= COMPILATIONS  # the models are no models of the zoo
    assert relative(parameters(compiled), parameters(eager)) < 1e-5
    for ours, theirs in zip(compiled.sums.read(ONE).totals.losses, eager.sums.read(ONE).totals.losses, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_generated_code_trains_as_eager_does(dtype: str) -> None:
    eager, compiled = (train_step(precision=PrecisionConfig(compile=c, dtype=dtype)) for c in ("off", "on"))
    take_steps(eager)
    take_steps(compiled)
    assert relative(parameters(compiled), parameters(eager)) < (1e-5 if dtype == "float32" else 1e-2)


def test_compilation_is_for_gpus_unless_asked_for() -> None:
    assert [PrecisionConfig().compiles(device) for device in ("cpu", "cuda")] == [False, True]
    assert PrecisionConfig(compile="on").compiles("cpu") and not PrecisionConfig(compile="off").compiles("cuda")
    teachers = PrecisionConfig(compile="teachers")
    assert teachers.compiles_teachers("cpu") and not teachers.compiles("cuda")
    assert [PrecisionConfig().compiles_teachers(device) for device in ("cpu", "cuda")] == [False, True]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_only_long_runs_on_a_gpu_are_compiled(device: str) -> None:
    for setting in ("on", "off", "teachers"):
        assert PrecisionConfig(compile=setting).for_run(device, 1).compile == setting
    found = [PrecisionConfig(dtype="float16").for_run(device, steps) for steps in (COMPILED_STEPS - 1, COMPILED_STEPS)]
    assert [precision.compile for precision in found] == ["off", "on" if device == "cuda" else "off"]
    assert all(precision.dtype == "float16" for precision in found)


# --- no waiting ------------------------------------------------------------------------------------------------------


def _refuse(*arguments: object) -> None:
    raise AssertionError("a step read a number from the device")


class _NoReads(TorchDispatchMode):
    """Fails if a value is copied to the host, which on a GPU waits for all earlier work."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            _refuse()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", names())
def test_a_step_reads_nothing_from_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Student and loss are one graph (tests above), which cannot read values; eager CPU kernels may.
    step = take_steps(train_step(name), 1)
    forward = step._forward

    def unwatched(*arguments: object) -> object:
        with _disable_current_modes():
            return forward(*arguments)

    step._forward = unwatched
    data = batch()
    for name in ("tolist", "numpy", "cpu"):  # which bypass the dispatcher on a CPU
        monkeypatch.setattr(torch.Tensor, name, _refuse)
    with _NoReads():
        step(data, 32, 0.01, 1)
    with pytest.raises(AssertionError, match="read a number"):
        step.sums.read(ONE)
    with _NoReads(), pytest.raises(AssertionError, match="read a number"):
        step._scale.item()


# --- sums ------------------------------------------------------------------------------------------------------------


def test_sums_are_over_images_whatever_the_batches() -> None:
    whole, parts = train_step(), train_step()
    data = batch(48)
    whole(data, 48, 0.0, 0)
    for piece in (slice(0, 32), slice(32, 48)):
        part = data._replace(images=data.images[piece], target=data.target[piece], index=data.index[piece])
        parts(part, 48, 0.0, 0)
    one, two = (step.sums.read(ONE).totals for step in (whole, parts))
    assert one.images == two.images == 48
    assert one.correct == two.correct == (whole.student(data.images).argmax(1) == data.target).sum()
    # The maps r_k have batch norms, so only parameters before them have gradients that are sums over images.
    assert one.losses[1:3] == pytest.approx(two.losses[1:3], rel=1e-5)
    assert one.weights == pytest.approx(two.weights, rel=1e-5)
    assert sum(one.weights) == pytest.approx(48, rel=1e-4) and sum(one.feature_weights) == pytest.approx(48, rel=1e-4)
    means = one.means()
    assert means["loss"] == pytest.approx(means["hard"] + means["soft"] + means["feature"], rel=1e-5)


def test_sums_start_again_and_take_over_what_a_checkpoint_holds() -> None:
    step = take_steps(train_step("aver"), 2)
    first = step.sums.read(ONE).totals
    step.sums.reset()
    with pytest.raises(RuntimeError, match="no step"):
        step.sums.read(ONE)
    step.sums.base = first
    step(batch(seed=7), 32, 0.01, 2)
    added = step.sums.read(ONE).totals
    assert added.images == 96 and added.plus(first, -1).images == 32
    assert added.losses[0] > first.losses[0]


class _Spoiled(nn.Module):
    """A student whose logits are infinite or NaN on one batch."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.net, self.value, self.calls = SmallNet(), value, 0
        self.num_features = self.net.num_features

    def forward_features(self, x: Tensor) -> Tensor:
        return self.net.forward_features(x)

    def forward_head(self, features: Tensor) -> Tensor:
        self.calls += 1
        return self.net.forward_head(features) * (self.value if self.calls == 3 else 1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["ce", "ca-mkd"])
def test_first_bad_step_and_its_parts_are_named(name: str, value: float) -> None:
    step = train_step(name, student=_Spoiled(value))
    take_steps(step, 6)
    words = r"the loss is not finite at step 3: loss (nan|inf), hard (nan|inf), soft \S+, feature [\d.]+$"
    with pytest.raises(NonFiniteLossError, match=words):
        step.sums.read(ONE)


# --- rates -----------------------------------------------------------------------------------------------------------


def test_paper_schedule_drops_after_150_180_and_210_epochs() -> None:
    optim, steps = OptimConfig(), 7
    rates = [learning_rate(optim, 0.05, epoch * steps + within, steps) for epoch in range(240) for within in (0, 6)]
    expected = [0.05] * 150 + [0.005] * 30 + [0.0005] * 30 + [0.00005] * 30
    assert rates == pytest.approx([rate for rate in expected for _ in range(2)])


def test_short_runs_drop_at_the_same_shares() -> None:
    optim = OptimConfig(epochs=8)
    rates = [learning_rate(optim, 1.0, step, 100) for step in (499, 500, 599, 600, 699, 700, 799)]
    assert rates == pytest.approx([1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_cosine_constant_and_warmup() -> None:
    cosine = OptimConfig(epochs=10, schedule="cosine", warmup=1)
    rates = [learning_rate(cosine, 1.0, step, 10) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0 and rates[55] == pytest.approx(0.5) and 0 < rates[99] < 0.001
    assert sorted(rates[10:], reverse=True) == rates[10:]
    assert learning_rate(cosine, 1.0, 100, 10) == 0.0
    warm = OptimConfig(epochs=2, schedule="cosine", warmup=1.9)  # 5.7 of 6 steps, rounded up
    assert [learning_rate(warm, 1.0, step, 3) for step in (4, 5, 6)] == [5 / 6, 1.0, 1.0]
    constant = OptimConfig(epochs=10, schedule="constant")
    assert {learning_rate(constant, 0.3, step, 10) for step in range(100)} == {0.3}


@pytest.mark.parametrize(
    ("model", "rate"), [("resnet8x4", 0.05), ("vgg8", 0.05), ("mobilenetv2", 0.01), ("shufflenetv1", 0.01)]
)
def test_paper_rates_by_model(model: str, rate: float) -> None:
    assert peak_rate(OptimConfig(), model) == rate
    assert peak_rate(OptimConfig(learning_rate=0.2), model) == 0.2


# --- random numbers --------------------------------------------------------------------------------------------------


def test_each_step_has_random_numbers_of_its_own() -> None:
    def drawn(seed: int, step: int, calls: int = 0) -> Tensor:
        made = train_step("ce", student=SmallNet(dropout=0.5), seed=seed)
        take_steps(made, calls, rate=0.0)
        torch.rand(5)  # other draws must have no effect
        made(batch(), 32, 0.0, step)
        return gradients(made)

    first = drawn(0, 3)
    assert torch.equal(first, drawn(0, 3)) and torch.equal(first, drawn(0, 3, calls=2))
    assert not torch.equal(first, drawn(0, 4)) and not torch.equal(first, drawn(1, 3))
