"""The order of an epoch and its split among ranks: every sample once, the same steps on any number of ranks."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from camkd_fast.data.counter_random import hashes, key, uniforms
from camkd_fast.data.order import epoch_batches, rank_sizes

sizes = st.integers(1, 300)
batch_sizes = st.integers(1, 40)
worlds = st.integers(1, 5)
seeds = st.integers(-(2**70), 2**70)
epochs = st.integers(0, 10**6)


@given(sizes, batch_sizes, worlds, seeds, epochs, st.booleans())
def test_every_sample_once_over_all_ranks(
    N: int, batch_size: int, world: int, seed: int, epoch: int, shuffle: bool
) -> None:
    if shuffle and world > N:
        with pytest.raises(ValueError, match=f"{N} samples cannot be shared by {world} ranks"):
            epoch_batches(N, batch_size, world, 0, seed, epoch, shuffle)
        return
    shards = [epoch_batches(N, batch_size, world, rank, seed, epoch, shuffle) for rank in range(world)]
    everything = torch.cat([batch for shard in shards for batch in shard])
    assert everything.dtype == torch.int64
    assert torch.equal(everything.sort().values, torch.arange(N))
    for rank, shard in enumerate(shards):
        assert [len(batch) for batch in shard] == rank_sizes(N, batch_size, world, rank, shuffle)
        assert all(1 <= len(batch) <= batch_size + 2 for batch in shard)
    if shuffle:
        assert len({len(shard) for shard in shards}) == 1  # no rank waits for another's extra step
        if batch_size > 1 and 2 * world <= N:
            assert min(len(batch) for shard in shards for batch in shard) >= 2  # batch norm's minimum


@given(sizes, st.integers(1, 12), worlds, seeds, epochs, st.booleans())
def test_a_step_has_the_same_samples_on_any_number_of_ranks(
    N: int, batch_size: int, world: int, seed: int, epoch: int, shuffle: bool
) -> None:
    N += world  # enough for every rank
    one = epoch_batches(N, batch_size * world, 1, 0, seed, epoch, shuffle)
    many = [epoch_batches(N, batch_size, world, rank, seed, epoch, shuffle) for rank in range(world)]
    # A last step of 2 to 2 * world - 1 samples is separate on one rank, but merged on many.
    full = min(len(one), *map(len, many)) - 1
    for step in range(full):
        assert torch.equal(one[step], torch.cat([shard[step] for shard in many]))
    if N % (batch_size * world) == 0:
        assert len(one) == len(many[0])
        assert torch.equal(one[-1], torch.cat([shard[-1] for shard in many]))


@given(st.integers(20, 300), batch_sizes, seeds, epochs)
def test_a_new_order_for_every_epoch_and_seed(N: int, batch_size: int, seed: int, epoch: int) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return torch.cat(epoch_batches(N, batch_size, 1, 0, seed, epoch, True)).tolist()

    assert order(seed, epoch) == order(seed, epoch)
    others = [order(seed, epoch + 1), order(seed + 1, epoch), order(epoch, seed + 1), order(seed, 0)]
    assert all(other != order(seed, epoch) for other in others if epoch or other is not others[-1])
    assert sorted(order(seed, epoch)) == list(range(N))


@given(sizes, batch_sizes, seeds, epochs)
def test_evaluation_is_in_index_order(N: int, batch_size: int, seed: int, epoch: int) -> None:
    batches = epoch_batches(N, batch_size, 1, 0, seed, epoch, False)
    assert torch.equal(torch.cat(batches), torch.arange(N))
    assert [len(b) for b in batches[:-1]] == [batch_size] * (len(batches) - 1)


def test_a_short_last_step_is_merged_into_the_previous() -> None:
    assert rank_sizes(65, 32, 1, 0, shuffle=True) == [32, 33]
    assert rank_sizes(66, 32, 1, 0, shuffle=True) == [32, 32, 2]
    assert rank_sizes(67, 16, 2, 0, shuffle=True) == [16, 18] and rank_sizes(67, 16, 2, 1, shuffle=True) == [16, 17]
    assert rank_sizes(65, 16, 2, 0, shuffle=False) == [16, 16, 1]
    assert rank_sizes(65, 16, 2, 1, shuffle=False) == [16, 16]


@pytest.mark.parametrize(
    ("N", "batch_size", "world", "rank", "message"),
    [
        (0, 4, 1, 0, "samples must be at least 1, got 0"),
        (9, 0, 1, 0, "batch_size must be at least 1, got 0"),
        (9, 4, 2, 2, r"rank must lie in \[0, 2\), got 2"),
    ],
)
def test_invalid_settings_are_refused(N: int, batch_size: int, world: int, rank: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        epoch_batches(N, batch_size, world, rank, 0, 0, True)


def test_orders_are_uniform() -> None:
    """Position of sample 0 of 10 over 4000 epochs: chi-square with 9 degrees of freedom, and no autocorrelation."""
    places = [torch.cat(epoch_batches(10, 10, 1, 0, 3, epoch, True)).tolist().index(0) for epoch in range(4000)]
    counts = np.bincount(places, minlength=10)
    assert ((counts - 400) ** 2 / 400).sum() < 33.7  # exceeded with probability 1e-4
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 4 / np.sqrt(4000)


def test_orders_and_random_numbers_are_stable() -> None:
    """Golden values: interrupted runs and teacher caches depend on them across versions."""
    assert torch.cat(epoch_batches(12, 5, 1, 0, 0, 0, True)).tolist() == [8, 3, 5, 10, 11, 4, 1, 6, 0, 9, 2, 7]
    numbers = uniforms(key(1, -2, 3), np.array([0, 5]), 2)
    np.testing.assert_array_equal(
        numbers, [[0.4572323122434463, 0.2316999486031518], [6.5893185884347e-05, 0.3252278656441069]]
    )


@given(seeds, st.lists(st.integers(0, 2**62), unique=True, min_size=2, max_size=50))
def test_hashes_of_different_integers_differ(seed: int, integers: list[int]) -> None:
    assert len(np.unique(hashes(key(seed), np.array(integers)))) == len(integers)
