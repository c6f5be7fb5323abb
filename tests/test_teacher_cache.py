"""The teacher cache: what it replays, what it refuses, and what a killed or failing writer leaves behind."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

pytest.importorskip("safetensors")

from camkd_fast import models
from camkd_fast.data.augment import Augmentation
from camkd_fast.data.batch import Batch, LoaderConfig
from camkd_fast.data.images import LabelledImages
from camkd_fast.data.resident import ResidentLoader
from camkd_fast.models.protocol import Prediction
from camkd_fast.train import cache_writer, strategies
from camkd_fast.train.cache import CachedTeachers, CacheError, CacheKey, Storage, TeacherCache
from camkd_fast.train.distributed import World
from camkd_fast.train.teachers import LiveTeachers
from camkd_fast.train.truncation import expand, truncate

N, VIEWS, CLASSES = 50, 2, 5
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


class Tiny(nn.Module):
    """A 1x1 convolution, global average pooling, a linear layer, in sums whose order no batch size changes.

    (torch's own convolutions and matrix products may round a sample differently in another batch.)
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.num_features, self.num_classes = channels, CLASSES
        self.mix = nn.Parameter(torch.randn(channels, 3))
        self.fc = nn.Parameter(torch.randn(CLASSES, channels))

    def forward_features(self, x: Tensor) -> Tensor:
        return (x.unsqueeze(1) * self.mix[:, :, None, None]).sum(2).relu()

    def forward_head(self, features: Tensor) -> Tensor:
        return (features.mean((2, 3)).unsqueeze(1) * self.fc).sum(2)


class CountedTeachers(LiveTeachers):
    """Counts the samples it was asked about, and may die on the way."""

    asked = 0
    dies_after = 10**9

    def __call__(self, batch: Batch) -> list[Prediction]:
        self.asked += len(batch.index)
        if self.asked > self.dies_after:
            raise KeyboardInterrupt
        return super().__call__(batch)


class FakeLoader:
    """Images that are a function of view and position; a new order in every epoch; every `world`-th sample."""

    def __init__(self, rank: int = 0, world: int = 1, batch_size: int = 8, views: int = VIEWS, bad: int = -1) -> None:
        self.rank, self.world, self.batch_size, self.views, self.bad = rank, world, batch_size, views, bad
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        order = torch.randperm(N, generator=torch.Generator().manual_seed(self.epoch))
        order = order[order != self.bad][self.rank :: self.world]
        for index in order.split(self.batch_size):
            yield batch_of(index, self.epoch % self.views)


def batch_of(index: Tensor, view: int) -> Batch:
    images = [torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(1000 * view + i)) for i in index.tolist()]
    return Batch(torch.stack(images), index % CLASSES, index, view)


def make_teachers(seed: int = 0) -> CountedTeachers:
    torch.manual_seed(seed)
    return CountedTeachers([Tiny(3), Tiny(4), Tiny(6)], CLASSES)


def make_key(teachers: LiveTeachers, **changes: object) -> CacheKey:
    key = CacheKey(
        data="d" * 64,
        split="train",
        samples=N,
        shape=(3, 4, 4),
        mean=(0.0,),
        std=(1.0,),
        augmentation="Augmentation(kind='crop')",
        seed=0,
        views=VIEWS,
        loader="resident",
        teachers=tuple(teachers.hashes),
        autocast="None",
    )
    return replace(key, **changes)


def build(folder: Path, teachers: CountedTeachers, storage: Storage = Storage(), **keywords: object) -> TeacherCache:  # noqa: B008
    loader = keywords.pop("loader", None) or FakeLoader()
    return TeacherCache.build(folder, teachers, loader, make_key(teachers), storage, **keywords)


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
    loader = FakeLoader(batch_size=13)  # other batches, and epochs that the build never saw
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
    """In the epochs that the cache was made from, batches are those of live training: equal bit by bit. In later
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
    first, second = cache.answers(0, index), cache.answers(1, index)
    assert not torch.isclose(first[0].logits, second[0].logits).all(1).any()


def test_a_complete_cache_opens_without_teachers_and_a_second_build_asks_nothing(tmp_path: Path) -> None:
    teachers = make_teachers()
    built = build(tmp_path, teachers)
    opened = TeacherCache.open(tmp_path, make_key(teachers))
    again = build(tmp_path, teachers)
    assert teachers.asked == N * VIEWS
    for cache in (opened, again):
        for ours, theirs in zip(cache.answers(1, torch.arange(N)), built.answers(1, torch.arange(N)), strict=True):
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
    assert cache.answers(1, torch.arange(N))[2].features.shape == (N, 6, 1, 1)


def test_bfloat16_halves_the_bytes_and_rounds_once(tmp_path: Path) -> None:
    teachers = make_teachers()
    cache = build(tmp_path, teachers, Storage(dtype="bfloat16"))
    batch = batch_of(torch.arange(10), 1)
    for ours, live in zip(cache.answers(1, batch.index), teachers(batch), strict=True):
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
    ours = torch.stack([t.logits for t in cache.answers(1, batch.index)], 1)
    assert torch.equal(ours, expand(truncate(live, 3, 4.0), CLASSES))
    stated = json.loads((tmp_path / "manifest.000.json").read_text())["error"]
    assert cache.errors == [stated] and stated["rows"] == 8
    assert set(stated) == {"rows", "untrained", "half way"}
    assert 0 < stated["untrained"]["gradient mean"] <= stated["untrained"]["gradient max"] < 1


# --- writers ---------------------------------------------------------------------------------------------------------


@given(dies_after=st.integers(1, N * VIEWS), shard_bytes=st.sampled_from([1, 1500, 1 << 20]))
@settings(max_examples=12)
def test_a_killed_writer_loses_what_it_had_not_listed(
    tmp_path_factory: pytest.TempPathFactory, dies_after: int, shard_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    teachers = make_teachers()
    teachers.dies_after = dies_after
    try:
        build(folder, teachers, shard_bytes=shard_bytes)
    except KeyboardInterrupt:
        with pytest.raises(CacheError, match=r"no teacher cache|not finished"):
            TeacherCache.open(folder, make_key(teachers))
    manifest = folder / "manifest.000.json"
    kept = sum(shard["rows"] for shard in json.loads(manifest.read_text())["shards"]) if manifest.exists() else 0
    before = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    if shard_bytes == 1:
        assert kept >= dies_after - 8  # all but the batch it died on

    second = make_teachers()
    # Another batch size: what counts is which rows are there, not who wrote them.
    cache = build(folder, second, shard_bytes=shard_bytes, loader=FakeLoader(batch_size=8 if dies_after % 2 else 5))
    assert N * VIEWS - kept <= second.asked
    assert all((folder / name).read_bytes() == data for name, data in before.items())
    batch = batch_of(torch.arange(N), 1)
    for ours, live in zip(cache.answers(1, batch.index), LiveTeachers.__call__(second, batch), strict=True):
        assert torch.equal(ours.logits, live.logits)


def test_ranks_write_their_own_shards_and_another_number_of_ranks_goes_on(tmp_path: Path) -> None:
    teachers = make_teachers()
    key = make_key(teachers)

    def write(rank: int, world: int) -> None:
        # size 1 in `World`, so that nobody waits: the ranks write one after the other here
        cache_writer.write_missing(tmp_path, teachers, FakeLoader(rank, world), key, Storage(), World(rank, 1, CPU))

    write(1, 3)
    write(2, 3)
    assert teachers.asked == 2 * (17 + 16)
    with pytest.raises(CacheError, match=r"66 of 100 answers"):
        TeacherCache.open(tmp_path, key)
    write(0, 1)
    cache = TeacherCache.open(tmp_path, key)
    assert {path.name for path in tmp_path.glob("manifest*")} == {f"manifest.00{r}.json" for r in range(3)}
    assert len(cache.errors) == 3
    batch = batch_of(torch.arange(N), 0)
    for ours, live in zip(cache.answers(0, batch.index), LiveTeachers.__call__(teachers, batch), strict=True):
        assert torch.equal(ours.logits, live.logits)


def test_a_full_disk_leaves_the_shards_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teachers = make_teachers()
    write, left = cache_writer.write_atomically, 3

    def full(path: Path, data: bytes) -> None:
        nonlocal left
        left -= path.suffix == ".safetensors"
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    monkeypatch.setattr(cache_writer, "write_atomically", full)
    with pytest.raises(OSError, match=r"cannot write .*000-00003.safetensors: No space left on device; .*are kept"):
        build(tmp_path, teachers, shard_bytes=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f"000-0000{i}.safetensors" for i in range(3)),
        "manifest.000.json",
    ]
    monkeypatch.undo()
    asked = teachers.asked
    build(tmp_path, teachers, shard_bytes=1)
    assert teachers.asked - asked == N * VIEWS - 3 * 8


def test_unreadable_images_may_be_missing_as_far_as_they_were_allowed(tmp_path: Path) -> None:
    teachers = make_teachers()
    with pytest.raises(CacheError, match=r"98 of 100"):
        build(tmp_path, teachers, loader=FakeLoader(bad=7))
    cache = build(tmp_path, teachers, loader=FakeLoader(bad=7), unreadable=1)
    with pytest.raises(CacheError, match="no answer for sample 7 in view 1"):
        cache.answers(1, torch.tensor([3, 7]))
    batch = batch_of(torch.tensor([0, 6, 8]), 1)
    assert torch.equal(cache.answers(1, batch.index)[0].logits, teachers(batch)[0].logits)


def test_a_loader_of_other_views_is_noticed(tmp_path: Path) -> None:
    teachers = make_teachers()
    with pytest.raises(CacheError, match="delivers view 0 in epoch 1, with views 2"):
        build(tmp_path, teachers, loader=FakeLoader(views=1))


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": "e" * 64}, f"data is {'d' * 64} there, {'e' * 64} here"),
        ({"split": "validation"}, "split is train there, validation here"),
        ({"samples": 49}, "samples is 50 there, 49 here"),
        ({"augmentation": "None"}, r"augmentation is Augmentation\(kind='crop'\) there, None here"),
        ({"seed": 1}, "seed is 0 there, 1 here"),
        ({"views": 3}, "views is 2 there, 3 here"),
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
    with pytest.raises(CacheError, match=f"teacher 1 is {teachers.hashes[1]} there, {others.hashes[1]} here") as caught:
        TeacherCache.open(tmp_path, make_key(others))
    assert "teacher 0" not in str(caught.value)
    with pytest.raises(CacheError, match=f"teacher 2 is {teachers.hashes[2]} there, None here"):
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
    for broken in (text[:100], text.replace('"samples"', '"simples"'), text.replace('"classes"', '"glasses"'), "[]"):
        manifest.write_text(broken)
        with pytest.raises(CacheError, match=r"manifest.000.json is damaged"):
            TeacherCache.open(tmp_path, make_key(teachers))
    manifest.write_text(text.replace('"format": 1', '"format": 2'))
    with pytest.raises(CacheError, match="format 2, but this version reads format 1"):
        TeacherCache.open(tmp_path, make_key(teachers))


def test_what_cannot_be_asked_is_refused(tmp_path: Path) -> None:
    teachers = make_teachers()
    cache = build(tmp_path, teachers)
    with pytest.raises(CacheError, match=r"view 2 is asked for, but .* holds 2 views"):
        cache.answers(2, torch.tensor([0]))
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
