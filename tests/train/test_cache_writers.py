"""Writers of the teacher cache: killed, failing, and several at once."""

from __future__ import annotations

import errno
import json
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

pytest.importorskip("safetensors")

from camkd_fast import system
from camkd_fast.train.distributed import World
from camkd_fast.train.folder_lock import Holder, locked, shared
from camkd_fast.train.teachers import cache_writer
from camkd_fast.train.teachers.cache import CacheError, Storage, TeacherCache
from camkd_fast.train.teachers.live import LiveTeachers
from tests.support.cache_parts import VIEWS, FakeLoader, N, batch_of, build, make_key, make_teachers

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


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
    # Another batch size: rows are identified by their index, whoever wrote them.
    cache = build(folder, second, shard_bytes=shard_bytes, loader=FakeLoader(batch_size=8 if dies_after % 2 else 5))
    assert N * VIEWS - kept <= second.asked
    assert all((folder / name).read_bytes() == data for name, data in before.items())
    batch = batch_of(torch.arange(N), 1)
    for ours, live in zip(cache.outputs(1, batch.index), LiveTeachers.__call__(second, batch), strict=True):
        assert torch.equal(ours.logits, live.logits)


def test_ranks_write_their_own_shards_and_another_number_of_ranks_goes_on(tmp_path: Path) -> None:
    teachers = make_teachers()
    key = make_key(teachers)

    def write(rank: int, world: int) -> None:
        # `World` has size 1, so no rank waits: here the ranks write one after the other
        cache_writer.write_missing(tmp_path, teachers, FakeLoader(rank, world), key, Storage(), World(rank, 1, CPU))

    write(1, 3)
    write(2, 3)
    assert teachers.asked == 2 * (17 + 16)
    with pytest.raises(CacheError, match=r"66 of 100 rows"):
        TeacherCache.open(tmp_path, key)
    write(0, 1)
    cache = TeacherCache.open(tmp_path, key)
    assert {path.name for path in tmp_path.glob("manifest*")} == {f"manifest.00{r}.json" for r in range(3)}
    assert len(cache.errors) == 3
    batch = batch_of(torch.arange(N), 0)
    for ours, live in zip(cache.outputs(0, batch.index), LiveTeachers.__call__(teachers, batch), strict=True):
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
    with pytest.raises(CacheError, match="no outputs for sample 7 in view 1"):
        cache.outputs(1, torch.tensor([3, 7]))
    batch = batch_of(torch.tensor([0, 6, 8]), 1)
    assert torch.equal(cache.outputs(1, batch.index)[0].logits, teachers(batch)[0].logits)


def test_what_lacks_known_unreadable_images_only_is_not_decoded_again(tmp_path: Path) -> None:
    teachers, samples = make_teachers(), []
    for bad in (7, 7, 9):
        samples.append(0)

        def count(n: int) -> None:
            samples[-1] += n

        build(tmp_path, teachers, loader=FakeLoader(bad=bad), unreadable=1, known_bad=(bad,), progress=count)
    assert samples == [VIEWS * (N - 1), 0, VIEWS * (N - 1)]  # 7 can be read at last


def test_a_loader_of_other_views_is_noticed(tmp_path: Path) -> None:
    teachers = make_teachers()
    with pytest.raises(CacheError, match="delivers view 0 in epoch 1, with views 2"):
        build(tmp_path, teachers, loader=FakeLoader(views=1))


def test_of_two_jobs_that_need_a_cache_one_writes_it(tmp_path: Path) -> None:
    jobs, caches = [make_teachers(), make_teachers()], []

    def job(teachers: LiveTeachers) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "waiting for ..."
            caches.append(build(tmp_path, teachers, shard_bytes=500))

    threads = [threading.Thread(target=job, args=(teachers,)) for teachers in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(teachers.asked for teachers in jobs) == [0, N * VIEWS]
    batch = batch_of(torch.arange(N), 1)
    one, two = (cache.outputs(1, batch.index) for cache in caches)
    assert all(torch.equal(a.logits, b.logits) for a, b in zip(one, two, strict=True))
    assert not list(tmp_path.glob(".*lock*"))


def test_a_job_says_for_whom_it_waits(tmp_path: Path) -> None:
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with locked(tmp_path):
            held.set()
            release.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(20)
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        release.set()

    with shared(tmp_path, say=say):
        pass
    thread.join()
    (line,) = said
    assert line.startswith(f"waiting for {tmp_path}, which is being written by process {os.getpid()} on ")


def test_ranks_wait_together(tmp_path: Path) -> None:
    exchanged: list[int] = []

    class Ranks(World):
        def on_main(self, task: Callable[[], Holder | None]) -> Holder | None:
            exchanged.append(len(exchanged))
            if self.is_main:
                return task()
            return Holder() if len(exchanged) < 3 else None  # another job holds the lock twice

    with shared(tmp_path, world=Ranks(1, 2, CPU)):
        assert list(tmp_path.iterdir()) == []  # rank 0 holds the lock
    assert len(exchanged) == 3
    with shared(tmp_path, world=Ranks(0, 2, CPU)):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_complete_cache_is_read_from_a_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path, make_teachers())

    def denied(*arguments: object, **more: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(system, "open_lock_file", denied)
    teachers = make_teachers()
    build(tmp_path, teachers)
    assert teachers.asked == 0
