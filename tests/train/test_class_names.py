"""Teachers that number the classes otherwise: mapped, refused, or warned about, live and from a cache."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from camkd_fast import models
from camkd_fast.data import LabelledImages, LoaderConfig, catalogue
from camkd_fast.data.augment import Augmentation
from camkd_fast.data.batch import Batch
from camkd_fast.experiments import run_report
from camkd_fast.models.model_file import model_bytes, read_model
from camkd_fast.models.protocol import predict
from camkd_fast.train import run, strategies
from camkd_fast.train.class_names import Renumbered, class_order
from camkd_fast.train.config import DataConfig, DistillConfig, LogConfig, OptimConfig, PrecisionConfig, TeachConfig
from camkd_fast.train.teachers.cache import CacheError
from camkd_fast.train.teachers.runs import load_teachers
from camkd_fast.train.teachers.teacher_hash import state_hash
from tests.support.training import ONE

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("ant", "bee", "cat", "dog", "eel")
OURS = ("dog", "ant", "eel", "cat", "bee")
ORDER = [3, 0, 4, 2, 1]  # position of OURS in NAMES
MEAN, STD = (120.0,) * 3, (60.0,) * 3


def data(names: Sequence[str] | None = OURS, N: int = 12) -> LabelledImages:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (N, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return LabelledImages(pixels, torch.arange(N) % 5, 5, MEAN, STD, None if names is None else tuple(names))


def teacher(path: Path, names: Sequence[str] | None = NAMES, seed: int = 1, **metadata: Any) -> Path:
    """A model file with random weights; `names` None: as an earlier version wrote it."""
    torch.manual_seed(seed)
    model = models.create("resnet8", metadata.get("num_classes", 5)).eval()
    known = {} if names is None else {"class_names": list(names)}
    common = {"model": "resnet8", "num_classes": 5, "in_channels": 3, "data": "folder", "mean": MEAN, "std": STD}
    path.write_bytes(model_bytes(model, {**common, "size": [8, 8], **known, **metadata}))
    return path


def loaded(images: LabelledImages, *paths: Path, cache: Path | None = None, strategy: str = "ca-mkd") -> Any:
    config = DistillConfig(
        teachers=paths, strategy=strategy, teacher_cache=cache, data=DataConfig(views=1), log=LogConfig(progress=False)
    )
    settings = LoaderConfig(4, augmentation=Augmentation(padding=0, flip=False), views=1)
    return load_teachers(config, images, settings, ONE)


def batch(images: LabelledImages) -> Batch:
    return Batch(images.normalise(images.pixels), images.labels, torch.arange(len(images)), 0)


def expected(path: Path, images: Tensor, order: Sequence[int]) -> Tensor:
    """Logits of the file's model without the package's mapping, column by column."""
    tensors, metadata = read_model(path)
    model = models.create("resnet8", metadata["num_classes"])
    model.load_state_dict(tensors)
    with torch.no_grad():
        logits = predict(models.freeze(model), images).logits
    return torch.stack([logits[:, place] for place in order], 1)


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "ours", "order"),
    [
        (NAMES, NAMES, None),
        (NAMES, list(NAMES), None),
        (NAMES, OURS, ORDER),
        (NAMES, NAMES[::-1], [4, 3, 2, 1, 0]),
        (None, NAMES, None),
        (NAMES, None, None),
        (None, None, None),
        (("caf\u00e9", "tea"), ("cafe\u0301", "tea"), None),  # composed and decomposed accents
        (("tea", "caf\u00e9"), ("cafe\u0301", "tea"), [1, 0]),
        (("10", "2"), ("2", "10"), [1, 0]),
        (NAMES, NAMES[:3], [0, 1, 2]),  # some of its classes
        (NAMES, ("eel", "bee"), [4, 1]),
        ((*NAMES, "fox", "fox"), OURS, ORDER),
    ],
)
def test_orders(theirs: Any, ours: Any, order: list[int] | None) -> None:
    assert class_order("x", theirs, ours) == order


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        (NAMES, ("x", "y", "z", "v", "w"), "x knows 5 classes, such as 'ant' and 'bee', but .* 5, such as 'x' and 'y'"),
        (NAMES, ("ant", "bee", "cat", "dog", "fox"), "such as 'eel', but the images have 5, such as 'fox'"),
        (
            NAMES,
            ("ant", "ape"),
            "5 classes, such as 'bee' and 'cat', but the images have 2, such as 'ape': give a model",
        ),
        (NAMES[:3], NAMES, "3 classes, such as 'ant' and 'bee', but the images have 5, such as 'dog' and 'eel'"),
        (("Ant", "bee"), ("ant", "bee"), "such as 'Ant', but the images have 2, such as 'ant'"),
        (("a", "a"), ("a", "b"), "2 classes"),
        (
            (*NAMES, "bee"),
            ("ant", "bee"),
            "6 classes, .* 'ant' and 'bee': it has 'bee' 2 times; give a model of the same",
        ),
        (("a", "b"), ("a", "a"), "2 classes"),
        (("a\ud800", "b"), ("a", "b"), r"'a\\ud800'"),  # a folder whose name is not UTF-8
    ],
)
def test_other_sets_are_refused_with_examples_of_both_sides(theirs: Any, ours: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        class_order("x", theirs, ours)


# --- teachers --------------------------------------------------------------------------------------------------------


def test_the_same_order_passes_silently(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images, path = data(NAMES), teacher(tmp_path / "t")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        live = loaded(images, path)
    assert not caplog.records
    assert torch.equal(live(batch(images))[0].logits, expected(path, batch(images).images, range(5)))


@pytest.mark.parametrize("cached", [False, True], ids=["live", "cached"])
def test_logits_are_mapped_to_the_students_order(
    tmp_path: Path, cached: bool, caplog: pytest.LogCaptureFixture
) -> None:
    images = data()
    paths = teacher(tmp_path / "a"), teacher(tmp_path / "b", OURS, seed=2), teacher(tmp_path / "c", NAMES[::-1], seed=3)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        found = loaded(images, *paths, cache=tmp_path / "cache" if cached else None)(batch(images))
    orders = ORDER, range(5), [NAMES[::-1].index(name) for name in OURS]
    for path, order, prediction in zip(paths, orders, found, strict=True):
        truth = expected(path, batch(images).images, order)
        assert (prediction.logits - truth).norm() < 1e-5 * truth.norm()  # batches of another size round otherwise
    assert [str(path) in record.getMessage() for path, record in zip(paths[::2], caplog.records, strict=True)] == [
        True
    ] * 2


def test_heads_are_mapped_too(tmp_path: Path) -> None:
    """The feature loss applies a teacher's head to the student's maps and compares with the student's labels."""
    images, path = data(), teacher(tmp_path / "t")
    mapped, unmapped = loaded(images, path), loaded(data(NAMES), path)
    there = images.labels.clone()
    for ours, theirs in enumerate(ORDER):
        there[images.labels == ours] = theirs
    features = torch.randn(12, mapped.num_features[0], 2, 2)
    assert torch.equal(mapped.heads[0](features), unmapped.heads[0](features)[:, ORDER])
    losses = []
    for teachers, labels in ((mapped, images.labels), (unmapped, there)):
        torch.manual_seed(0)
        strategy = strategies.create("ca-mkd", teachers, 6).eval()
        student = models.protocol.Prediction(torch.linspace(-1, 1, 12 * 6 * 4).view(12, 6, 2, 2), torch.zeros(12, 5))
        term = strategy.feature_term(student, teachers(batch(images)), labels)
        assert term is not None
        losses.append(term.loss)
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)


def test_a_cache_of_another_order_is_not_replayed(tmp_path: Path) -> None:
    path = teacher(tmp_path / "t")
    loaded(data(OURS), path, cache=tmp_path / "cache")
    loaded(data(OURS), path, cache=tmp_path / "cache")
    for names in (NAMES, NAMES[::-1]):
        with pytest.raises(CacheError, match="teacher 0 has other weights or layers"):
            loaded(data(names), path, cache=tmp_path / "cache")


def test_a_cache_of_teachers_in_the_same_order_is_known_as_before(tmp_path: Path) -> None:
    """Caches that earlier versions wrote, without attributes and code, stay valid for the teachers of a run."""
    path = teacher(tmp_path / "t")
    model = models.create("resnet8", 5)
    model.load_state_dict(read_model(path)[0])
    (digest,) = loaded(data(NAMES), path, cache=tmp_path / "cache").hashes
    assert digest == state_hash(models.freeze(model))
    manifest = tmp_path / "cache" / "manifest.000.json"
    manifest.write_text(manifest.read_text().replace(digest, digest.partition(".")[0]))
    before = manifest.stat().st_mtime_ns
    assert loaded(data(NAMES), path, cache=tmp_path / "cache").hashes == [digest]
    assert manifest.stat().st_mtime_ns == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mapped_teacher_follows_the_precision(tmp_path: Path, dtype: Any) -> None:
    path = teacher(tmp_path / "t")
    config = DistillConfig(teachers=(path,), precision=PrecisionConfig(dtype=dtype, channels_last=True))
    live = load_teachers(config, data(), LoaderConfig(4), ONE)
    assert live is not None and live(batch(data()))[0].logits.dtype == getattr(torch, dtype)


def test_refused_teachers_are_named(tmp_path: Path) -> None:
    good, bad = teacher(tmp_path / "good"), teacher(tmp_path / "bad", ("v", "w", "x", "y", "z"))
    with pytest.raises(ValueError, match=r"teacher .*bad knows 5 classes, such as 'v' and 'w', .*'dog' and 'ant'"):
        loaded(data(), good, bad)
    fewer = teacher(tmp_path / "fewer", NAMES[:4], num_classes=4)
    with pytest.raises(
        ValueError, match=r"fewer knows 4 classes, such as 'ant' and 'bee', but the images have 5, such as 'eel'"
    ):
        loaded(data(), fewer)
    unnamed = teacher(tmp_path / "unnamed", None, num_classes=4)
    with pytest.raises(
        ValueError,
        match=r"unnamed has 4 classes, but the student's images have 5, and its names are unknown: give a mo",
    ):
        loaded(data(), unnamed)
    with pytest.raises(
        ValueError, match=r"fewer has 4 classes, .* have 5, and the images' names are unknown: .*--class"
    ):
        loaded(data(None), fewer)


def test_some_of_a_teachers_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Probabilities are those among the student's classes."""
    names = ("fox", *NAMES, "gnu")
    path = teacher(tmp_path / "t", names, num_classes=7)
    (prediction,) = loaded(data(), path)(batch(data()))
    truth = expected(path, batch(data()).images, [names.index(name) for name in OURS])
    assert prediction.logits.shape == (12, 5) and (prediction.logits - truth).norm() < 1e-5 * truth.norm()
    (record,) = caplog.records
    assert record.getMessage() == f"teacher {path} has 7 classes: the logits of the student's 5 are taken"


def test_unknown_names_warn_once(tmp_path: Path) -> None:
    old = [teacher(tmp_path / f"old{n}", None, seed=n) for n in range(3)]
    with pytest.warns(UserWarning, match=r"no class names are known of .*old0, .*old2: class 0 to 4") as caught:
        live = loaded(data(), *old, teacher(tmp_path / "new", OURS))
    assert len(caught) == 1
    assert torch.equal(live(batch(data()))[1].logits, expected(old[1], batch(data()).images, range(5)))
    with pytest.warns(UserWarning, match="no class names are known of the student's images: class 0 to 4") as caught:
        loaded(data(None), teacher(tmp_path / "t"))
    assert len(caught) == 1


def test_a_mapped_model_keeps_the_protocol_and_its_gradients() -> None:
    torch.manual_seed(0)
    model = models.create("resnet8", 5).eval()
    mapped, images = Renumbered(model, ORDER).eval(), torch.randn(3, 3, 8, 8)
    assert (mapped.num_features, mapped.num_classes) == (model.num_features, 5)
    assert torch.equal(mapped(images), model(images)[:, ORDER])
    features = model.forward_features(images).detach().requires_grad_()
    mapped.forward_head(features)[:, 0].sum().backward()
    (direct,) = torch.autograd.grad(model.forward_head(features)[:, ORDER[0]].sum(), features)
    assert torch.equal(features.grad, direct)


# --- runs ------------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "data": DataConfig(images=40, validation=0.1),
    "optim": OptimConfig(epochs=1, batch_size=20),
    "log": LogConfig(tensorboard=False, progress=False),
}


def renumber(source: Path, target: Path, order: Sequence[int], names: Sequence[str]) -> Path:
    """A copy of a run whose model has its classes in another order: weights, and names if there are any."""
    target.mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        (target / name).write_bytes((source / name).read_bytes())
    tensors, metadata = read_model(source / "model.safetensors")
    model = models.create(metadata["model"], metadata["num_classes"], metadata["in_channels"])
    model.load_state_dict(tensors)
    with torch.no_grad():
        for parameter in model.fc.parameters():
            parameter.copy_(parameter[list(order)])
    metadata = {name: value for name, value in metadata.items() if name not in ("class_names", "format")}
    (target / "model.safetensors").write_bytes(model_bytes(model, {**metadata, "class_names": list(names)}))
    return target


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher of digits in t, and one of the same weights in another order of the classes in r."""
    folder = tmp_path_factory.mktemp("digits")
    run.teach(TeachConfig("resnet8", out=folder / "t", **SMALL))
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0)).tolist()
    renumber(folder / "t", folder / "r", order, [str(digit) for digit in order])
    return folder


def test_runs_and_checkpoints_store_the_names(digits: Path) -> None:
    (checkpoint,) = (digits / "t" / "checkpoints").glob("step-*/model.safetensors")
    for path in (digits / "t" / "model.safetensors", checkpoint):
        assert read_model(path)[1]["class_names"] == list("0123456789")


def test_a_run_with_a_renumbered_teacher_is_the_same_run(digits: Path, tmp_path: Path) -> None:
    """Training, evaluation and the report's accuracies do not depend on how the teacher numbers its classes."""
    results, tables = [], []
    for name in ("t", "r"):
        config = DistillConfig("resnet8", (digits / name,), out=tmp_path / name, **SMALL)
        results.append(run.distill(config).test)
        tables.append([row[3:] for row in run_report._Models(config.out, config).table([1.0]).rows])
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    assert tables[0] == tables[1]
    assert run.evaluate(digits / "t") == pytest.approx(run.evaluate(digits / "r"), rel=1e-5)


def test_evaluation_on_other_classes_is_refused(digits: Path, tmp_path: Path) -> None:
    other = renumber(digits / "t", tmp_path / "x", range(10), [f"class {n}" for n in range(10)])
    with pytest.raises(
        ValueError, match=r"the model of .*x knows 10 classes, such as 'class 0' and 'class 1', .*'0' and '1'"
    ):
        run.evaluate(other)


def test_every_named_set_has_names_by_label() -> None:
    splits = catalogue.load("digits")
    for part in splits:
        assert part.class_names == tuple("0123456789") and part.take(torch.arange(3)).class_names == part.class_names
        assert isinstance(part, LabelledImages) and part.padded(12).class_names == part.class_names
        assert replace(part, class_names=None).fingerprint() == part.fingerprint()  # caches stay valid
