"""Drawing by weight, as laws: the mean is the weight, an epoch is drawn the same by whoever draws it, indices or streams."""

import random
from collections import Counter
from functools import partial

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset

from influencespace.data.sampler import MAX_UNKNOWN, WeightedSampler, copies_of
from influencespace.errors import InputError

Sample = dict[str, str]
WEIGHTS = [0.0, 0.1, 0.5, 1.0, 1.3, 2.75, 5.0]
UIDS = [f"pair-{i}" for i in range(len(WEIGHTS))]


def many(n: int = 300, seed: int = 0) -> WeightedSampler:
    weights = np.random.default_rng(3).gamma(1.0, 1.0, n)
    weights[::7] = 0
    return WeightedSampler([f"uid {i}" for i in range(n)], weights, seed=seed)


def samples_of(sampler: WeightedSampler) -> list[Sample]:
    return [{"__key__": uid, "txt": f"caption of {uid}"} for uid in sampler.uids]


def test_over_many_epochs_the_mean_copies_are_the_weight() -> None:
    sampler, epochs = WeightedSampler(UIDS, WEIGHTS), 4000
    total = np.zeros(len(UIDS))
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        total += sampler.copies()
    np.testing.assert_allclose(total / epochs, WEIGHTS, atol=4 * 0.5 / epochs**0.5)
    assert total[0] == 0


@given(st.text(), st.floats(0, 100), st.integers(0, 2**40), st.integers(0, 10**6))
def test_copies_are_the_weight_rounded_up_or_down(uid: str, weight: float, seed: int, epoch: int) -> None:
    count = copies_of(uid, weight, seed, epoch)
    assert abs(count - weight) < 1
    assert count == copies_of(uid, weight, seed, epoch)


def test_pairs_are_rounded_independently() -> None:
    """The size of an epoch spreads as that of independent draws, and so does a seed's difference from another's."""
    sampler = WeightedSampler([str(i) for i in range(1000)], np.full(1000, 0.5))
    sizes = []
    for epoch in range(200):
        sampler.set_epoch(epoch)
        sizes.append(len(sampler))
    assert np.mean(sizes) == pytest.approx(500, abs=4 * 250**0.5 / 200**0.5)
    assert 0.7 < np.std(sizes) / 250**0.5 < 1.3
    other = WeightedSampler(sampler.uids, sampler.weights, seed=1)
    other.set_epoch(sampler.epoch)
    assert 0.4 < (other.copies() == sampler.copies()).mean() < 0.6


def test_the_same_epoch_and_seed_draw_the_same_in_another_order_each_epoch() -> None:
    first, second = many(), many()
    assert list(first) == list(first) == list(second)
    assert len(first) == len(list(first)) == first.copies().sum()
    assert Counter(first) == Counter(np.repeat(np.arange(300), first.copies()).tolist())
    second.set_epoch(1)
    assert list(first) != list(second)
    assert list(first) != list(many(seed=1))
    assert list(first) != sorted(first)


def test_an_epoch_is_resumed_where_it_was_left() -> None:
    sampler = many()
    sampler.set_epoch(2)
    whole = list(sampler)
    sampler.set_epoch(2, start=100)
    assert list(sampler) == whole[100:]
    assert len(sampler) == len(whole) - 100


def test_replicas_share_the_draw_of_an_epoch_in_equal_parts() -> None:
    whole = many()
    parts = [WeightedSampler(whole.uids, whole.weights, num_replicas=4, rank=rank) for rank in range(4)]
    drawn = [list(part) for part in parts]
    assert {len(part) for part in drawn} == {len(part) for part in parts} == {len(whole) // 4}
    left = Counter(whole)
    left.subtract(index for part in drawn for index in part)
    assert min(left.values()) >= 0
    assert left.total() < 4


@pytest.mark.parametrize("workers", [1, 3])
def test_a_stream_draws_what_the_indices_are_whatever_the_order_or_the_worker(workers: int) -> None:
    sampler = many()
    sampler.set_epoch(5)
    samples = samples_of(sampler)
    random.Random(workers).shuffle(samples)
    shards = [samples[i::workers] for i in range(workers)]
    drawn = Counter(sample["__key__"] for shard in shards for sample in sampler.stream(shard))
    assert drawn == Counter(sampler.uids[i] for i in sampler)


def test_copies_follow_each_other_and_the_rest_is_left_out() -> None:
    sampler = WeightedSampler(["a", "b", "c"], [2.0, 0.0, 1.0])
    stream = sampler.stream([{"id": name} for name in "cxbaa"], key=lambda sample: sample["id"])
    assert [sample["id"] for sample in stream] == ["c", "a", "a", "a", "a"]


class Streamed(IterableDataset[str]):
    def __init__(self, sampler: WeightedSampler) -> None:
        self.sampler = sampler
        self.stream = partial(sampler.stream, key="__key__")

    def __iter__(self):  # type: ignore[no-untyped-def]
        return (sample["__key__"] for sample in self.stream(samples_of(self.sampler)))


def test_a_worker_that_stays_draws_the_epoch_that_is_set() -> None:
    sampler = many()
    loader = DataLoader(Streamed(sampler), batch_size=None, num_workers=1, persistent_workers=True)
    for epoch in (0, 1, 4):
        sampler.set_epoch(epoch)
        assert Counter(loader) == Counter(sampler.uids[i] for i in sampler)


def test_weights_are_looked_up_by_the_uids_of_a_data_set() -> None:
    table = pa.table({"uid": ["a", "b", "c"], "weight": np.array([2, 0, 1], np.float32)})
    assert Counter(WeightedSampler.of(table)) == {0: 2, 2: 1}
    assert Counter(WeightedSampler.of(table, uids=["c", "new", "a", "b"])) == {0: 1, 2: 2}


def test_what_cannot_be_drawn_by_is_refused() -> None:
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
    with pytest.raises(InputError, match="none of the 2 uids is in the curated table"):
        WeightedSampler.of(pa.table({"uid": ["a"], "weight": [1.0]}), uids=["x", "y"])
    sampler, others = many(), ({"__key__": f"other {i}"} for i in range(2 * MAX_UNKNOWN))
    with pytest.raises(InputError, match=r"none of the first 1000 samples has a weight .*give the `key`"):
        list(sampler.stream(others))
