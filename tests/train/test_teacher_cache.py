"""The teacher cache: exact replay, and rejected caches."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("safetensors")

from camkd_fast import models
from camkd_fast.data.augment import Augmentation
from camkd_fast.data.batch import LoaderConfig
from camkd_fast.data.images import LabelledImages
from camkd_fast.data.resident import ResidentLoader
from camkd_fast.models.protocol import Prediction
from camkd_fast.train import strategies
from camkd_fast.train.teachers.cache import CachedTeachers, CacheError, CacheKey, Storage, TeacherCache
from camkd_fast.train.teachers.live import LiveTeachers
from camkd_fast.train.teachers.truncation import expand, truncate
from tests.support.cache_parts import CLASSES, VIEWS, FakeLoader, N, Tiny, batch_of, build, make_key, make_teachers
from tests.support.training import CLASSES as SMALL_CLASSES
from tests.support.training import SmallNet

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


# --- replay ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_limit", [1 << 30, 0])
def test_a_view_replays_bit_by_bit_and_no_teacher_runs_again(tmp_path: Path, memory_limit: int) -> None:
    teachers = make_teachers()
    cache = build(tmp_path, teachers, memory_limit=memory_limit, shard_bytes=2000)
    assert teachers.asked == N * VIEWS
    assert len(list(tmp_path.glob("*.safetensors"))) > VIEWS
    assert cache.resident == (memory_limit > 0)
    replayed = CachedTeachers(cache, teachers.heads)
    assert replayed.num_features == [3, 4, 6] and replayed.hashes == teachers.hashes
    loader = FakeLoader(batch_size=13)  # other batches, and later epochs than those of the build
    for epoch in range(4):
        loader.set_epoch(epoch)
        for batch in loader:
            blind = batch._replace(images=torch.full_like(batch.images, float("nan")))
            for ours, live in zip(replayed(blind), LiveTeachers.__call__(teachers, batch), strict=True):
                assert torch.equal(ours.logits, live.logits)
                assert torch.equal(ours.features, live.features.mean((2, 3), keepdim=True))
                assert not ours.logits.requires_grad
    assert teachers.asked == N * VIEWS


def test_real_teachers_and_a_real_loader(tmp_path: Path) -> None:
    """In the epochs that the cache was built from, batches are those of live training: bit-identical. In later
    epochs a live convolution may round a sample differently beside others."""
    torch.manual_seed(0)
    pixels = torch.randint(256, (40, 1, 8, 8), dtype=torch.uint8)
    images = LabelledImages(pixels, torch.arange(40) % 10, 10, (128.0,), (74.0,))
    teachers = LiveTeachers([models.freeze(models.create(name, 10, 1)) for name in ("resnet8", "vgg8")], 10)
    config = LoaderConfig(8, seed=5, augmentation=Augmentation(padding=1), views=2)
    key = CacheKey.of(images, "train", config, "resident", teachers)
    cache = TeacherCache.build(tmp_path, teachers, ResidentLoader(images, config), key)
    replayed = CachedTeachers(cache, teachers.heads)
    loader = ResidentLoader(images, config)
    for epoch in range(3):
        loader.set_epoch(epoch)
        for batch in loader:
            for ours, live in zip(replayed(batch), teachers(batch), strict=True):
                if epoch < 2:
                    assert torch.equal(ours.logits, live.logits)
                else:
                    torch.testing.assert_close(ours.logits, live.logits)


def test_views_differ(tmp_path: Path) -> None:
    cache = build(tmp_path, make_teachers())
    index = torch.arange(N)
    first, second = cache.outputs(0, index), cache.outputs(1, index)
    assert not torch.isclose(first[0].logits, second[0].logits).all(1).any()


def test_a_complete_cache_opens_without_teachers_and_a_second_build_asks_nothing(tmp_path: Path) -> None:
    teachers = make_teachers()
    built = build(tmp_path, teachers)
    opened = TeacherCache.open(tmp_path, make_key(teachers))
    again = build(tmp_path, teachers)
    assert teachers.asked == N * VIEWS
    for cache in (opened, again):
        for ours, theirs in zip(cache.outputs(1, torch.arange(N)), built.outputs(1, torch.arange(N)), strict=True):
            assert torch.equal(ours.logits, theirs.logits)


@pytest.mark.parametrize("name", ["aver", "aekd", "fitnet-mkd", "ca-mkd"])
def test_strategies_learn_from_a_cache(tmp_path: Path, name: str) -> None:
    teachers = make_teachers()
    replayed = CachedTeachers(build(tmp_path, teachers), teachers.heads)
    strategy = strategies.create(name, replayed, 7)
    batch = batch_of(torch.tensor([4, 1, 17]), 1)
    student = Prediction(torch.randn(3, 7, 2, 2, requires_grad=True), torch.randn(3, CLASSES))
    strategy.weighting(student.logits, replayed(batch), batch.target)
    term = strategy.feature_term(student, replayed(batch), batch.target)
    assert (term is not None) == strategy.needs_features
    if term is not None:
        term.loss.backward()
        assert student.features.grad.abs().sum() > 0


def test_without_features_the_feature_strategies_are_refused(tmp_path: Path) -> None:
    teachers = make_teachers()
    replayed = CachedTeachers(build(tmp_path, teachers, Storage(features=False)), teachers.heads)
    assert replayed.num_features == [0, 0, 0]
    (first, *_) = replayed(batch_of(torch.tensor([3, 5]), 0))
    assert first.features.shape == (2, 0, 1, 1) and first.logits.shape == (2, CLASSES)
    with pytest.raises(ValueError, match="ca-mkd needs feature maps"):
        strategies.create("ca-mkd", replayed, 7)
    strategies.create("ca-mkd-logits", replayed, 7)


def test_a_cache_with_features_serves_those_who_ask_for_none(tmp_path: Path) -> None:
    teachers = make_teachers()
    teachers.dies_after = 20
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, teachers, shard_bytes=1)
    teachers.dies_after = 10**9
    cache = build(tmp_path, teachers, Storage(features=False))
    assert cache.channels == [3, 4, 6]
    assert cache.outputs(1, torch.arange(N))[2].features.shape == (N, 6, 1, 1)


def test_bfloat16_halves_the_bytes_and_rounds_once(tmp_path: Path) -> None:
    teachers = make_teachers()
    cache = build(tmp_path, teachers, Storage(dtype="bfloat16"))
    batch = batch_of(torch.arange(10), 1)
    for ours, live in zip(cache.outputs(1, batch.index), teachers(batch), strict=True):
        assert torch.equal(ours.logits, live.logits.bfloat16())
        assert ours.features.dtype == torch.bfloat16
    (error,) = cache.errors
    assert 0 < error["untrained"]["loss max"] < 1e-2


# --- truncation ------------------------------------------------------------------------------------------------------


def test_a_truncated_cache_replays_what_truncation_leaves_and_states_the_error(tmp_path: Path) -> None:
    teachers = make_teachers()
    storage = Storage(top_k=3)
    cache = build(tmp_path, teachers, storage, shard_bytes=1000)
    batch = batch_of(torch.tensor([7, 30, 2]), 1)
    live = torch.stack([t.logits for t in teachers(batch)], 1)
    ours = torch.stack([t.logits for t in cache.outputs(1, batch.index)], 1)
    assert torch.equal(ours, expand(truncate(live, 3, 4.0), CLASSES))
    stated = json.loads((tmp_path / "manifest.000.json").read_text())["error"]
    assert cache.errors == [stated] and stated["rows"] == 8
    assert set(stated) == {"rows", "untrained", "half way"}
    assert 0 < stated["untrained"]["gradient mean"] <= stated["untrained"]["gradient max"] < 1


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": "e" * 64}, r"its images \(files, labels or their order\) have the hash d{12}, those here e{12}:"),
        ({"split": "validation"}, "split is train there, validation here"),
        ({"samples": 49}, "samples is 50 there, 49 here"),
        ({"augmentation": "None"}, r"augmentation is Augmentation\(kind='crop'\) there, None here"),
        ({"seed": 1}, "seed is 0 there, 1 here: --view-seed 0 takes these views, or choose another folder, or remove"),
        (
            {"views": 3},
            "views is 2 there, 3 here: choose another folder, or remove this one, which is then written again",
        ),
        ({"mean": (0.5,)}, r"mean is \(0.0,\) there, \(0.5,\) here"),
        ({"loader": "dali", "seed": 4}, "seed is 0 there, 4 here; loader is resident there, dali here"),
        ({"autocast": "torch.bfloat16"}, "autocast is None there, torch.bfloat16 here"),
    ],
)
def test_a_stale_key_is_refused_with_both_values(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    teachers = make_teachers()
    build(tmp_path, teachers)
    stale = make_key(teachers, **changes)
    with pytest.raises(CacheError, match=words):
        TeacherCache.open(tmp_path, stale)
    with pytest.raises(CacheError, match=words):
        TeacherCache.build(tmp_path, teachers, FakeLoader(), stale)


def test_other_teachers_are_refused_one_by_one(tmp_path: Path) -> None:
    teachers = make_teachers()
    build(tmp_path, teachers)
    torch.manual_seed(0)
    models = [Tiny(3), Tiny(4), Tiny(6)]
    with torch.no_grad():
        models[1].mix[0, 0] += 1e-6
    others = LiveTeachers(models, CLASSES)
    old, new = (digest[:12] for digest in (teachers.hashes[1], others.hashes[1]))
    with pytest.raises(CacheError, match=f"teacher 1 has other weights or layers .hash {old}.* there, {new}") as caught:
        TeacherCache.open(tmp_path, make_key(others))
    assert "teacher 0" not in str(caught.value)
    with pytest.raises(
        CacheError, match=f"teacher 2 is missing here .hash {teachers.hashes[2][:12]}.* there, none here"
    ):
        TeacherCache.open(tmp_path, make_key(LiveTeachers(models[:2], CLASSES)))
    with pytest.raises(ValueError, match=r"2 heads.*3 teachers"):
        CachedTeachers(TeacherCache.open(tmp_path, make_key(teachers)), others.heads[:2])


@pytest.mark.parametrize(
    ("kept", "asked", "words"),
    [
        (Storage(), Storage(top_k=3), "top_k is None there, 3 here"),
        (Storage(top_k=3), Storage(top_k=3, temperature=2.0), "temperature is 4.0 there, 2.0 here"),
        (Storage(), Storage(dtype="bfloat16"), "dtype is float32 there, bfloat16 here"),
        (Storage(features=False), Storage(), "features is False there, True here"),
    ],
)
def test_another_storage_is_refused(tmp_path: Path, kept: Storage, asked: Storage, words: str) -> None:
    teachers = make_teachers()
    build(tmp_path, teachers, kept)
    with pytest.raises(CacheError, match=words):
        TeacherCache.open(tmp_path, make_key(teachers), asked)


def test_the_temperature_of_an_untruncated_cache_does_not_matter(tmp_path: Path) -> None:
    teachers = make_teachers()
    build(tmp_path, teachers, Storage(temperature=4.0))
    TeacherCache.open(tmp_path, make_key(teachers), Storage(temperature=2.0))


@pytest.mark.parametrize("damage", ["truncated", "tampered", "missing"])
def test_a_damaged_shard_is_named(tmp_path: Path, damage: str) -> None:
    teachers = make_teachers()
    build(tmp_path, teachers)
    shard = tmp_path / "000-00001.safetensors"
    data = bytearray(shard.read_bytes())
    if damage == "missing":
        shard.unlink()
    else:
        data[-5] ^= 1
        shard.write_bytes(data if damage == "tampered" else data[: len(data) // 2])
    for attempt in (lambda: TeacherCache.open(tmp_path, make_key(teachers)), lambda: build(tmp_path, teachers)):
        with pytest.raises(CacheError, match=r"shard .*000-00001.safetensors (is damaged|cannot be read)"):
            attempt()


def test_a_missing_or_damaged_manifest_is_named(tmp_path: Path) -> None:
    teachers = make_teachers()
    with pytest.raises(CacheError, match=r"no teacher cache: there is no manifest"):
        TeacherCache.open(tmp_path / "nowhere", make_key(teachers))
    build(tmp_path, teachers)
    manifest = tmp_path / "manifest.000.json"
    text = manifest.read_text()
    for broken in (
        text[:100],
        text.replace('"samples"', '"simples"'),
        text.replace('"classes"', '"glasses"'),
        "[]",
        "null",
        text.replace('"sha256"', '"sha257"'),
        text.replace('"shards": [', '"shards": -1, "x": ['),
        text.replace('"key": {', '"key": null, "x": {'),
        text.replace('"format"', '"formaf"'),
    ):
        manifest.write_text(broken)
        with pytest.raises(CacheError, match=r"manifest.000.json is damaged"):
            TeacherCache.open(tmp_path, make_key(teachers))
    manifest.write_text(text.replace('"format": 1', '"format": 2'))
    with pytest.raises(CacheError, match="format 2, but this version reads format 1"):
        TeacherCache.open(tmp_path, make_key(teachers))


def test_what_cannot_be_asked_is_refused(tmp_path: Path) -> None:
    teachers = make_teachers()
    cache = build(tmp_path, teachers)
    with pytest.raises(CacheError, match=r"holds 2 views, but not view 2"):
        cache.outputs(2, torch.tensor([0]))
    with pytest.raises(ValueError, match=r"top_k must lie in \[1, 5\) for 5 classes, got 5"):
        build(tmp_path / "other", teachers, Storage(top_k=5))
    for fields in ({"dtype": "int8"}, {"top_k": 0}, {"temperature": 0.0}):
        (value,) = fields.values()
        with pytest.raises(ValueError, match=str(value)):
            Storage(**fields)


def test_the_key_of_a_loader() -> None:
    teachers = make_teachers()
    images = LabelledImages(torch.zeros(6, 3, 4, 4, dtype=torch.uint8), torch.arange(6) % 5, 5, (1.0,) * 3, (2.0,) * 3)
    key = CacheKey.of(images, "train", LoaderConfig(2, seed=3, views=4), "resident", teachers)
    assert (key.samples, key.shape, key.seed, key.views) == (6, (3, 4, 4), 3, 4)
    assert CacheKey.of(images, "train", LoaderConfig(2, seed=9, view_seed=3, views=4), "resident", teachers) == key
    assert key.teachers == tuple(teachers.hashes) and key.data == images.fingerprint()
    assert CacheKey.of(images, "train", LoaderConfig(2), "resident", teachers).views == 1  # evaluation has one view


# Field of the key -> other arguments of `CacheKey.of` that change it, and it only unless "also" names more.
KEY_CHANGES: dict[str, dict[str, Any]] = {
    "data": {"pixels": torch.ones(6, 3, 4, 4, dtype=torch.uint8)},
    "split": {"split": "validation"},
    "samples": {"count": 5, "also": {"data"}},
    "shape": {"pixels": torch.zeros(6, 3, 4, 5, dtype=torch.uint8), "also": {"data"}},
    "mean": {"mean": (1.0, 1.0, 2.0), "also": {"data"}},
    "std": {"std": (2.0, 2.0, 1.0), "also": {"data"}},
    "augmentation": {"augmentation": Augmentation(padding=1)},
    "seed": {"seed": 4},
    "views": {"views": 5},
    "loader": {"loader": "torch"},
    "teachers": {"width": 9},
    "autocast": {"autocast": torch.bfloat16},
}


def key_of(**changes: Any) -> CacheKey:
    given = {
        "pixels": torch.zeros(6, 3, 4, 4, dtype=torch.uint8),
        "count": 6,
        "mean": (1.0,) * 3,
        "std": (2.0,) * 3,
        "split": "train",
        "augmentation": Augmentation(padding=2),
        "seed": 3,
        "views": 4,
        "loader": "resident",
        "width": 8,
        "autocast": None,
        **changes,
    }
    count = given["count"]
    images = LabelledImages(given["pixels"][:count], torch.arange(count) % 5, 5, given["mean"], given["std"])
    teachers = LiveTeachers([SmallNet(given["width"])], SMALL_CLASSES, autocast=given["autocast"])
    config = LoaderConfig(2, seed=given["seed"], views=given["views"], augmentation=given["augmentation"])
    return CacheKey.of(images, given["split"], config, given["loader"], teachers)


def test_everything_that_the_outputs_depend_on_is_in_the_key() -> None:
    assert set(KEY_CHANGES) == {field.name for field in dataclasses.fields(CacheKey)}
    first = dataclasses.asdict(key_of())
    assert first == dataclasses.asdict(key_of())
    for name, changes in KEY_CHANGES.items():
        also = changes.get("also", set())
        other = dataclasses.asdict(key_of(**{k: v for k, v in changes.items() if k != "also"}))
        assert {field for field in first if first[field] != other[field]} == {name, *also}
