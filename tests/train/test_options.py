"""Every option of a config reaches the object that it is for. No model is trained here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from camkd_fast import models
from camkd_fast.data import LabelledImages, choose
from camkd_fast.data.batch import LoaderConfig
from camkd_fast.data.splits import Splits
from camkd_fast.models.model_file import MODEL, model_bytes
from camkd_fast.train import run, run_images, strategies
from camkd_fast.train.config import DataConfig, DistillConfig, OptimConfig, PrecisionConfig, TeachConfig
from camkd_fast.train.distributed import World
from camkd_fast.train.schedule import learning_rate, peak_rate
from camkd_fast.train.strategies import Strategy
from camkd_fast.train.teachers.runs import load_teachers
from tests.support.strategies import FEATURES, WITH_FEATURES, WITH_TEACHERS, case, live
from tests.support.training import ONE, SmallNet, images, train_step

pytestmark = pytest.mark.usefixtures("one_thread")

K = 3


# --- strategies ------------------------------------------------------------------------------------------------------

# Option of a class -> the config's field, a value that is nobody's default, and where the built object has it.
CARRIED: dict[str, tuple[str, Any, Callable[[Strategy], Any]]] = {
    "beta": ("beta", 7.5, lambda strategy: strategy.beta),
    "teacher_index": ("teacher_index", 2, lambda strategy: int(strategy.weights.argmax())),
    "detach_weights": ("detach", False, lambda strategy: strategy.maps.detach_weights),
    "uniform": ("uniform", "features", lambda strategy: strategy.uniform),
}
TAKEN = [(name, option) for name, kind in strategies.STRATEGIES.items() for option in kind.options]


def configured(name: str, **options: Any) -> Strategy:
    config = DistillConfig(strategy=name, **options)
    return run.make_strategy(config, live(K) if name in WITH_TEACHERS else None, FEATURES)


@pytest.mark.parametrize(("name", "option"), TAKEN)
def test_every_option_of_a_strategy_comes_from_the_config(name: str, option: str) -> None:
    field, value, read = CARRIED[option]
    assert read(configured(name)) != value
    assert read(configured(name, **{field: value})) == value
    created = strategies.create(name, live(K), FEATURES, **{option: value})
    assert read(created) == value


@pytest.mark.parametrize("name", WITH_TEACHERS)
def test_temperature_and_alpha_come_from_the_config(name: str) -> None:
    formula = configured(name, temperature=2.5, alpha=0.3).formula
    assert formula.temperature == 2.5
    assert formula.soft_weight == pytest.approx(0.3 * configured(name).formula.soft_weight)
    assert formula.weighting == strategies.STRATEGIES[name].rule


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("name", WITH_TEACHERS)
def test_the_scale_comes_from_the_config(name: str, official: bool) -> None:
    strategy = configured(name, official_scale=official, alpha=0.8)
    divisor = strategies.STRATEGIES[name].divisor(K, official)
    assert strategy.formula.soft_weight == pytest.approx(0.8 / divisor)
    if name in WITH_FEATURES:
        assert strategy.beta == pytest.approx(strategies.STRATEGIES[name].options["beta"] / divisor)


def test_the_official_scale_is_another_one() -> None:
    assert {n for n, kind in strategies.STRATEGIES.items() if kind.divisor(K, True) != kind.divisor(K, False)} == {
        *("ebkd", "ca-mkd-logits", "ca-mkd")
    }


@pytest.mark.parametrize("name", WITH_FEATURES)
def test_a_feature_loss_of_weight_0_is_0(name: str) -> None:
    batch = case(K)
    strategy = run.make_strategy(DistillConfig(strategy=name, beta=0.0), batch.teachers, FEATURES)
    term = strategy.feature_term(batch.student, batch.outputs, batch.target)
    assert strategy.beta == 0 and term.loss == 0


def test_each_part_of_ca_mkd_may_weigh_all_teachers_alike() -> None:
    batch = case(K)

    def parts(uniform: str) -> tuple[Any, bool]:
        strategy = configured("ca-mkd", uniform=uniform)
        term = strategy.feature_term(batch.student, batch.outputs, batch.target)
        return strategy.weighting(batch.student.logits, batch.outputs, batch.target), term.weights is None

    assert [parts(uniform) for uniform in ("none", "logits", "features")] == [
        *(("confidence", False), ("uniform", False), ("confidence", True))
    ]


# --- loaders ---------------------------------------------------------------------------------------------------------

TWO = World(1, 2, torch.device("cpu"))
# Field of LoaderConfig -> the config that sets it, and the value.
LOADER: dict[str, tuple[dict[str, Any], Any]] = {
    "batch_size": ({"optim": OptimConfig(batch_size=34)}, 17),
    "seed": ({"seed": 5}, 5),
    "augmentation": ({"data": DataConfig(data="fashion-mnist", padding=2, flip=False)}, ("crop", 2, False)),
    "view_seed": ({"data": DataConfig(view_seed=8)}, 8),
    "views": ({"data": DataConfig(views=6)}, 6),
    "rank": ({}, 1),
    "world": ({}, 2),
    "workers": ({"data": DataConfig(workers=7)}, 7),
    "device": ({}, torch.device("cpu")),
    "channels_last": ({"precision": PrecisionConfig(channels_last=True)}, True),
    "skip_bad": ({"data": DataConfig(skip_bad=3)}, 3),
}


def test_every_setting_of_a_loader_is_tested() -> None:
    # known_bad is found by the check of the headers, deferred follows from the step.
    assert set(LOADER) == {field.name for field in fields(LoaderConfig)} - {"known_bad", "deferred"}


@pytest.mark.parametrize("kind", [TeachConfig, DistillConfig])
@pytest.mark.parametrize("name", LOADER)
def test_every_setting_of_a_loader_comes_from_the_config(name: str, kind: type) -> None:
    changes, value = LOADER[name]
    _, settings = run_images.training_set(kind(**changes), images(40), TWO)
    found = getattr(settings, name)
    if name == "augmentation":
        found = found.kind, found.padding, found.flip
    assert found == value


@pytest.mark.parametrize(
    ("processors", "beside", "expected"),
    [(1, 1, 1), (2, 1, 2), (6, 1, 6), (64, 1, 8), (64, 8, 8), (24, 8, 3), (4, 8, 1)],
)
def test_loaders_share_the_processors(
    processors: int, beside: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_images.system, "processors", lambda: processors)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(beside))
    assert run_images.training_set(TeachConfig(), images(40), ONE)[1].workers == expected


@pytest.mark.parametrize("kind", ["none", "crop", "resized-crop"])
def test_rand_augment_and_erasing_come_from_the_config(kind: Any) -> None:
    found = run_images.training_augmentation(DataConfig(augmentation=kind), images(4))
    assert (found.rand_augment, found.erasing) == (None, 0.0)
    data = DataConfig(augmentation=kind, rand_augment=(3, 7), random_erasing=0.25)
    found = run_images.training_augmentation(data, images(4))
    assert (found.rand_augment, found.erasing) == ((3, 7), 0.25)
    with pytest.raises(ValueError, match="rand_augment must be two numbers, got 3"):
        DataConfig(rand_augment=(3,))
    with pytest.raises(ValueError, match=r"random_erasing must lie in \[0, 1\], got 1.5"):
        DataConfig(random_erasing=1.5)


def test_the_images_are_chosen_by_the_split_seed() -> None:
    def chosen(seed: int, count: int | None = 20) -> torch.Tensor:
        config = TeachConfig(data=DataConfig(images=count, split_seed=seed))
        return run_images.training_set(config, images(60), ONE)[0].pixels

    assert len(chosen(0)) == len(chosen(1)) == 20 and len(chosen(0, None)) == 60
    assert torch.equal(chosen(1), chosen(1)) and not torch.equal(chosen(0), chosen(1))


# --- a run -----------------------------------------------------------------------------------------------------------


class _StoppedError(Exception):
    pass


class Seen(dict[str, Any]):
    """Arguments of the objects that a run builds, by name; the run stops where it would start to train."""


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    seen = Seen(loaders=[])
    parts = Splits(images(64), images(30, 1), images(30, 2))

    def load(*arguments: Any, **keywords: Any) -> Splits:
        seen["data"] = arguments, keywords
        return parts

    def loader(data: Any, settings: LoaderConfig, *kind: str) -> Any:
        seen["loaders"].append((data, settings, *kind))
        return _real_loader(data, settings, "resident")

    class Step(run.TrainStep):
        def __init__(self, *arguments: Any) -> None:
            seen["step"] = arguments
            super().__init__(*arguments)

    def trainer(*arguments: Any) -> None:
        seen["trainer"] = arguments
        raise _StoppedError

    _real_loader = choose.loader
    monkeypatch.setattr(run_images.catalogue, "load", load)
    monkeypatch.setattr(run.choose, "loader", loader)
    monkeypatch.setattr(run, "TrainStep", Step)
    monkeypatch.setattr(run, "Trainer", trainer)
    yield seen


def test_a_run_passes_its_config_on(seen: Seen, tmp_path: Path) -> None:
    data = DataConfig(
        data="cifar10", root=tmp_path, split_seed=4, validation=0.3, size=40, loader="torch", views=2, view_seed=9
    )
    optim = OptimConfig(epochs=7, batch_size=16, learning_rate=0.3, momentum=0.5, weight_decay=0.25)
    precision = PrecisionConfig(compile="off", dtype="bfloat16")
    config = TeachConfig("resnet8", seed=3, out=tmp_path / "run", data=data, optim=optim, precision=precision)
    with suppress(_StoppedError):
        run.teach(config)
    arguments, keywords = seen["data"]
    assert arguments == ("cifar10", tmp_path)
    assert keywords == {"split_seed": 4, "validation": 0.3, "size": 40}

    (train, for_training, *kind), (held_out, for_evaluation, *other) = seen["loaders"]
    assert kind == other == ["torch"] and len(train) == 64 and len(held_out) == 30
    assert for_training.augmentation is not None and for_evaluation.augmentation is None
    assert (for_training.views, for_training.view_seed, for_training.seed) == (2, 9, 3)

    _, strategy, _, *rest = seen["step"]
    assert strategy.name == "ce" and rest == [optim, precision, ONE, 16, 3]
    _, _, _, count, trained, peak, log, *_ = seen["trainer"]
    assert (count, trained, peak, log) == (64, optim, 0.3, config.log)


def test_the_students_seed_decides_its_first_weights(seen: Seen, tmp_path: Path) -> None:
    def first(seed: int) -> torch.Tensor:
        with suppress(_StoppedError):
            run.teach(TeachConfig("resnet8", seed=seed, out=tmp_path / "run"))
        return torch.cat([p.detach().flatten() for p in seen["step"][0].parameters()])

    assert torch.equal(first(1), first(1)) and not torch.equal(first(1), first(2))


def test_the_optimiser_has_the_configured_numbers() -> None:
    step = train_step("ca-mkd")
    optim = OptimConfig(momentum=0.5, weight_decay=0.25)
    other = run.TrainStep(SmallNet(), step.strategy, step.teachers, optim, PrecisionConfig(compile="off"), ONE, 32, 0)
    assert len(other.optimizer.param_groups) == 1
    (group,) = other.optimizer.param_groups
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.5, 0.25, True)
    assert {id(p) for p in group["params"]} == {id(p) for p in other.trainable.parameters()}


def test_the_rate_follows_the_config() -> None:
    optim = OptimConfig(epochs=10, milestones=(0.3, 0.5), drop=0.25, learning_rate=0.2)
    assert [learning_rate(optim, 1.0, step, 1) for step in (2, 3, 4, 5, 9)] == [1.0, 0.25, 0.25, 0.0625, 0.0625]
    for model in (*models.names(), "MobileNetV2", "ShuffleV1", "ShuffleV2"):
        assert peak_rate(optim, model) == 0.2
        slow = model.lower().startswith(("mobilenet", "shuffle"))
        assert peak_rate(replace(optim, learning_rate=None), model) == (0.01 if slow else 0.05)


@pytest.mark.parametrize(("setting", "expected"), [("auto", True), ("on", True), ("off", False)])
def test_a_run_on_a_cpu_is_deterministic_unless_it_is_told_not_to_be(setting: str, expected: bool) -> None:
    before = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(False)
        with run._repeatable(PrecisionConfig(deterministic=setting), torch.device("cpu")):
            assert torch.are_deterministic_algorithms_enabled() == expected
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize(("setting", "expected"), [("auto", True), ("on", False), ("off", True)])
def test_cudnn_picks_the_fastest_unless_a_run_is_deterministic(
    setting: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())
    before = torch.are_deterministic_algorithms_enabled()
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    try:
        torch.use_deterministic_algorithms(False)
        with run._repeatable(PrecisionConfig(deterministic=setting), torch.device("cuda")):
            assert torch.backends.cudnn.benchmark == expected
        assert not torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(before)


# --- teachers --------------------------------------------------------------------------------------------------------


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """A run folder with the model of `images()`."""
    data = images(4)
    metadata = {"model": "resnet8", "num_classes": data.num_classes, "in_channels": data.channels}
    metadata |= {"mean": data.mean, "std": data.std}
    (tmp_path / "teacher").mkdir()
    torch.manual_seed(1)
    content = model_bytes(models.create("resnet8", data.num_classes, data.channels), metadata)
    (tmp_path / "teacher" / MODEL).write_bytes(content)
    return tmp_path / "teacher"


def loaded(teacher: Path, data: LabelledImages | None = None, **changes: Any) -> Any:
    config = DistillConfig(teachers=(teacher,), **{"strategy": "ca-mkd", **changes})
    config = replace(config, log=replace(config.log, progress=False))
    data, settings = run_images.training_set(config, images(20) if data is None else data, ONE)
    return load_teachers(config, data, settings, ONE)


def test_teachers_have_the_configured_precision_and_format(teacher: Path) -> None:
    def weight(**precision: Any) -> torch.Tensor:
        (module,) = loaded(teacher, precision=PrecisionConfig(compile="off", **precision))._modules
        return next(p for p in module.parameters() if p.dim() == 4 and p.shape[1] > 1)

    assert weight().dtype == torch.float32 and weight().is_contiguous()
    assert [weight(dtype=name).dtype for name in ("bfloat16", "float16")] == [torch.bfloat16, torch.float16]
    assert weight(channels_last=True).is_contiguous(memory_format=torch.channels_last)


def test_a_cache_has_the_configured_storage(teacher: Path, tmp_path: Path) -> None:
    def storage(name: str, **changes: Any) -> dict[str, Any]:
        views = DataConfig(views=2, loader="resident")
        config = DistillConfig(teachers=(teacher,), data=views, teacher_cache=tmp_path / name, **changes)
        config = replace(config, log=replace(config.log, progress=False))
        data, settings = run_images.training_set(config, images(20), ONE)
        return load_teachers(config, data, settings, ONE).cache._shards[0]

    whole, narrow = storage("whole"), storage("narrow", cache_dtype="bfloat16")
    assert whole["logits"].dtype == whole["features"].dtype == torch.float32 and len(whole["logits"]) == 40
    assert narrow["logits"].dtype == narrow["features"].dtype == torch.bfloat16
    assert storage("top", cache_top_k=3)["values"].shape == (40, 1, 3)
    assert "features" not in storage("logits", strategy="aver")
    # At the temperature of the distillation the bucket's mass is exact, so it is part of what is stored.
    tails = [storage(f"tail-{T}", cache_top_k=3, temperature=T)["tail"] for T in (1.5, 4.0)]
    assert not torch.equal(*tails)


def test_teachers_of_other_images_are_refused(teacher: Path) -> None:
    more = replace(images(20), pixels=images(20).pixels[:, [0, 1, 2, 0]], mean=(127.0,) * 4, std=(50.0,) * 4)
    with pytest.raises(ValueError, match=r"teacher .* of shape \(4, 8, 8\): it takes images of 3 channels, .* have 4"):
        loaded(teacher, more)
    with pytest.raises(ValueError, match="has 10 classes, but the student's images have 11, and its names are unknown"):
        loaded(teacher, replace(images(20), num_classes=11))


def test_the_class_map_comes_from_the_config(teacher: Path, tmp_path: Path) -> None:
    file = tmp_path / "map.json"
    file.write_text(json.dumps({str(i): 9 - i for i in range(10)}))
    batch = torch.randn(2, 3, 8, 8)
    (mapped,), (live,) = loaded(teacher, class_map=file).outputs(batch), loaded(teacher).outputs(batch)
    assert torch.equal(mapped.logits, live.logits.flip(1))
