"""Drawing by weight, as laws: the mean is the weight, an epoch is drawn the same by whoever draws it, indices or streams."""

import random
import tracemalloc
from collections import Counter
from functools import partial

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset

from influencespace.core.batches import derived_seed
from influencespace.core.hashing import uniform
from influencespace.data import sampler as sampling
from influencespace.data.sampler import WeightedSampler, keys_of
from influencespace.errors import InputError

Sample = dict[str, str]
WEIGHTS = [0.0, 0.1, 0.5, 1.0, 1.3, 2.75, 5.0]
UIDS = [f"pair-{i}" for i in range(len(WEIGHTS))]


def weights_of(n: int) -> np.ndarray:
    weights = np.random.default_rng(3).gamma(1.0, 1.0, n)
    weights[::7] = 0
    return weights


def names(n: int = 300) -> list[str]:
    return [f"uid {i}" for i in range(n)]


def many(n: int = 300, seed: int = 0, **more: int) -> WeightedSampler:
    return WeightedSampler(names(n), weights_of(n), seed=seed, **more)


def samples_of(uids: list[str]) -> list[Sample]:
    return [{"__key__": uid, "txt": f"caption of {uid}"} for uid in uids]


def copies(sampler: WeightedSampler, n: int) -> np.ndarray:
    return np.bincount(list(sampler), minlength=n)


def test_over_many_epochs_the_mean_copies_are_the_weight() -> None:
    sampler, epochs = WeightedSampler(UIDS, WEIGHTS), 4000
    total = np.zeros(len(UIDS))
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        total += copies(sampler, len(UIDS))
    np.testing.assert_allclose(total / epochs, WEIGHTS, atol=4 * 0.5 / epochs**0.5)
    assert total[0] == 0


@given(st.text(), st.floats(0.01, 100), st.integers(0, 2**40), st.integers(0, 10**6))
def test_copies_are_the_weight_rounded_up_or_down(uid: str, weight: float, seed: int, epoch: int) -> None:
    sampler = WeightedSampler([uid], [weight], seed=seed)
    sampler.set_epoch(epoch)
    assert abs(len(sampler) - weight) < 1 + 1e-5  # a weight has four bytes
    assert list(sampler) == [0] * len(sampler)


def test_pairs_are_rounded_independently() -> None:
    """The size of an epoch spreads as that of independent draws, and so does a seed's difference from another's."""
    uids, weights = [str(i) for i in range(1000)], np.full(1000, 0.5)
    sampler, sizes = WeightedSampler(uids, weights), []
    for epoch in range(200):
        sampler.set_epoch(epoch)
        sizes.append(len(sampler))
    assert np.mean(sizes) == pytest.approx(500, abs=4 * 250**0.5 / 200**0.5)
    assert 0.7 < np.std(sizes) / 250**0.5 < 1.3
    other = WeightedSampler(uids, weights, seed=1)
    other.set_epoch(sampler.epoch)
    assert 0.4 < (copies(other, 1000) == copies(sampler, 1000)).mean() < 0.6


@pytest.mark.parametrize(("block", "shuffled"), [(65_536, 10**6), (64, 10**6), (17, 40), (300, 1)])
def test_copies_are_those_of_a_plain_loop_however_large_the_parts(
    block: int, shuffled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "BLOCK", block)
    monkeypatch.setattr(sampling, "SHUFFLED", shuffled)
    sampler = many(seed=3)
    sampler.set_epoch(2)
    slow = []
    for uid, weight in zip(names(), weights_of(300).astype(np.float32), strict=True):
        key, seed = keys_of([uid]).view(np.int64), derived_seed(3, 2)
        slow.append(int(weight) + int(uniform(key, seed)[0] < float(weight) - int(weight)))
    np.testing.assert_array_equal(copies(sampler, 300), slow)
    assert len(sampler) == sum(slow)


@pytest.mark.parametrize("shuffled", [10**6, 10])
def test_any_copy_may_come_at_any_place(shuffled: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over many epochs each pair's mean place is amid the epoch, and its neighbours are all others: as in a plain shuffle."""
    monkeypatch.setattr(sampling, "SHUFFLED", shuffled)
    pairs, epochs = 40, 800
    sampler = WeightedSampler([str(i) for i in range(pairs)], np.ones(pairs))
    place, after = np.zeros(pairs), np.zeros((pairs, pairs))
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert sorted(order) == list(range(pairs))
        place[order] += np.arange(pairs)
        after[order[:-1], order[1:]] += 1
    spread = np.sqrt((pairs**2 - 1) / 12 / epochs)
    np.testing.assert_allclose(place / epochs, (pairs - 1) / 2, atol=5 * spread)
    expected = epochs / pairs
    assert np.abs(after[~np.eye(pairs, dtype=bool)] - expected).max() < 6 * expected**0.5


def test_a_pair_with_weight_takes_seventeen_bytes_and_an_epoch_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sampling, "BLOCK", 1000)
    monkeypatch.setattr(sampling, "SHUFFLED", 2000)

    def held(n: int) -> tuple[int, int]:
        """Bytes of the sampler, and at most more in an epoch."""
        sampler = many(n)
        pairs = sampler.pairs
        assert len(pairs) == np.count_nonzero(weights_of(n))
        tracemalloc.start()
        for _ in sampler:
            pass
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return sum(one.nbytes for one in (pairs.keys, pairs.weights, pairs.items)), peak - len(pairs)

    small, large = held(4000), held(40_000)
    assert large[0] == (8 + 4 + 2) * np.count_nonzero(
        weights_of(40_000)
    )  # the place in 2 bytes: they are few
    assert large[1] < 1.5 * small[1]


def test_the_same_epoch_and_seed_draw_the_same_in_another_order_each_epoch() -> None:
    first, second = many(), many()
    assert list(first) == list(first) == list(second)
    assert len(first) == len(list(first))
    second.set_epoch(1)
    assert list(first) != list(second)
    assert list(first) != list(many(seed=1))
    assert list(first) != sorted(first)


@pytest.mark.parametrize("shuffled", [10**6, 70])
def test_an_epoch_is_resumed_where_it_was_left(shuffled: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "SHUFFLED", shuffled)
    sampler = many()
    sampler.set_epoch(2)
    whole = list(sampler)
    sampler.set_epoch(2, start=100)
    assert list(sampler) == whole[100:]
    assert len(sampler) == len(whole) - 100


@pytest.mark.parametrize("shuffled", [10**6, 70])
def test_replicas_share_the_draw_of_an_epoch_in_equal_parts(
    shuffled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "SHUFFLED", shuffled)
    whole = list(many())
    parts = [many(num_replicas=4, rank=rank) for rank in range(4)]
    for rank, part in enumerate(parts):
        assert list(part) == whole[rank : len(whole) // 4 * 4 : 4]
        assert len(part) == len(whole) // 4


@pytest.mark.parametrize("workers", [1, 3])
def test_a_stream_draws_what_the_indices_are_whatever_the_order_or_the_worker(workers: int) -> None:
    sampler = many()
    sampler.set_epoch(5)
    samples = samples_of(names())
    random.Random(workers).shuffle(samples)
    shards = [samples[i::workers] for i in range(workers)]
    drawn = Counter(sample["__key__"] for shard in shards for sample in sampler.stream(shard))
    assert drawn == Counter(names()[i] for i in sampler)


def test_copies_follow_each_other_and_the_rest_is_left_out() -> None:
    sampler = WeightedSampler(["a", "b", "c"], [2.0, 0.0, 1.0])
    stream = sampler.stream([{"id": name} for name in "cxbaa"], key=lambda sample: sample["id"])
    assert [sample["id"] for sample in stream] == ["c", "a", "a", "a", "a"]


class Streamed(IterableDataset[str]):
    def __init__(self, sampler: WeightedSampler) -> None:
        self.sampler = sampler
        self.stream = partial(sampler.stream, key="__key__")

    def __iter__(self):  # type: ignore[no-untyped-def]
        return (sample["__key__"] for sample in self.stream(samples_of(names())))


def test_a_worker_that_stays_draws_the_epoch_that_is_set() -> None:
    sampler = many()
    loader = DataLoader(Streamed(sampler), batch_size=None, num_workers=1, persistent_workers=True)
    for epoch in (0, 1, 4):
        sampler.set_epoch(epoch)
        assert Counter(loader) == Counter(names()[i] for i in sampler)


def test_weights_are_looked_up_by_the_uids_of_a_data_set() -> None:
    table = pa.table({"uid": ["a", "b", "c"], "weight": np.array([2, 0, 1], np.float32)})
    assert Counter(WeightedSampler.of(table)) == {0: 2, 2: 1}
    assert Counter(WeightedSampler.of(table, uids=["c", "new", "a", "b"])) == {0: 1, 2: 2}
    for size in (1, 2):  # in batches, of which one is in memory
        batches = table.to_batches(max_chunksize=size)
        assert list(WeightedSampler.of(iter(batches))) == list(WeightedSampler.of(table))
        assert Counter(WeightedSampler.of(iter(batches), uids=["c", "a"])) == {0: 1, 1: 2}


def test_what_cannot_be_drawn_by_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for uids, weights, reason in (
        (["a"], [1.0, 2.0], "1 uids, but weights of shape"),
        (["a", "b"], [1.0, -1.0], "finite and not negative"),
        (["a", "b"], [1.0, np.nan], "finite and not negative"),
        (["a", "b"], [0.0, 0.0], "one of them above 0"),
        (["a", "a"], [1.0, 1.0], "a uid occurs twice"),
    ):
        with pytest.raises(InputError, match=reason):
            WeightedSampler(uids, weights)
    with pytest.raises(InputError, match="rank is 2 of 2 replicas"):
        WeightedSampler(["a"], [1.0], num_replicas=2, rank=2)
    with pytest.raises(InputError, match="none of the 2 uids has a weight in the curated table"):
        WeightedSampler.of(pa.table({"uid": ["a"], "weight": [1.0]}), uids=["x", "y"])
    with pytest.raises(InputError, match="the curated table keeps no pair"):
        WeightedSampler.of(pa.table({"uid": ["a"], "weight": [0.0]}))
    monkeypatch.setattr(sampling, "MAX_UNKNOWN", 1000)
    sampler, others = many(), ({"__key__": f"other {i}"} for i in range(2000))
    with pytest.raises(InputError, match=r"none of the first 1000 samples has a weight .*give the `key`"):
        list(sampler.stream(others))
