"""Drawing pairs by weight, for a map-style data set or a stream: a pair's weight is its expected copies in an epoch."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from operator import itemgetter
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Sampler

from influencespace.core.arrays import BoolArray, IntArray
from influencespace.core.batches import copies_of, derived_seed
from influencespace.core.hashing import uniform
from influencespace.core.histogram import Keys
from influencespace.data.buckets import buckets_of
from influencespace.errors import InputError

T = TypeVar("T")
MAX_UNKNOWN = 100_000
"""Samples of a stream, none of which has a weight, after which its keys are taken for wrong ones: a whole shard may have none."""
BLOCK = 65_536  # pairs that are looked at at once
SHUFFLED = 1_000_000  # draws of an epoch that are in memory at once
ORDER = 1  # what the order of an epoch derives from, beside its seed
ODD = np.uint64(0x9E3779B97F4A7C15)  # parts the copies of a pair


def keys_of(uids: Iterable[str]) -> Keys:
    """64 bits of the digest of each uid (n,): of ten million pairs two share a key with a chance of 3 in a million."""
    digests = b"".join(blake2b(uid.encode(), digest_size=8).digest() for uid in uids)
    return np.frombuffer(digests, "<u8").astype(np.uint64)


@dataclass(frozen=True)
class KeyedWeights:
    """The pairs that have weight, in the order of their keys: 16 bytes each."""

    keys: Keys  # (m,) rising
    weights: NDArray[np.float32]  # (m,) above 0
    items: NDArray[Any]  # (m,) places in the data set, in 4 bytes if they fit

    @classmethod
    def of(cls, keys: Keys, weights: NDArray[Any], items: NDArray[Any]) -> "KeyedWeights":
        """Of pairs in any order (n,), (n,), (n,); those without weight are left out."""
        (drawn,) = np.nonzero(weights)
        order = drawn[np.argsort(keys[drawn], kind="stable")]
        return cls(keys[order], weights[order].astype(np.float32), items[order])

    @classmethod
    def of_batches(cls, batches: Iterable[pa.RecordBatch]) -> tuple["KeyedWeights", str]:
        """Of the rows of a table that have weight; and the uid of one."""
        keys, weights, rows, first, example = [], [], [], 0, "none"
        for batch in batches:
            weight = batch["weight"].to_numpy(zero_copy_only=False)
            (drawn,) = np.nonzero(weight)
            uids = batch["uid"].take(pa.array(drawn)).to_pylist()
            example = uids[0] if uids else example
            keys.append(keys_of(uids))
            weights.append(weight[drawn])
            rows.append((first + drawn).astype(np.min_scalar_type(first + len(batch))))
            first += len(batch)
        if not keys:
            return cls.of(keys_of(()), np.empty(0), np.empty(0, np.int64)), example
        return cls.of(np.concatenate(keys), np.concatenate(weights), np.concatenate(rows)), example

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, keys: Keys) -> tuple[IntArray, BoolArray]:
        """The place of each key among those held, and whether it is one of them: (n,), (n,)."""
        if not len(self):
            return np.zeros(len(keys), np.int64), np.zeros(len(keys), bool)
        place = np.minimum(np.searchsorted(self.keys, keys), len(self) - 1)
        return place, self.keys[place] == keys

    def of_uids(self, uids: Sequence[str]) -> NDArray[np.float32]:
        """The weight of each uid, 0 where it has none: (n,)."""
        weights = np.zeros(len(uids), np.float32)
        for start, stop in buckets_of(len(uids), BLOCK):
            place, known = self.find(keys_of(str(uids[i]) for i in range(start, stop)))
            weights[start:stop][known] = self.weights[place[known]]
        return weights


class WeightedSampler(Sampler[int]):
    """Draws pairs by weight: the expected copies of a pair in an epoch are its weight, 0 is never drawn.

    `uids` (n,) name the items of the data set in its order, `weights` (n,) are finite and not negative. Deterministic: the
    draw of an epoch depends on uids, weights, `seed` and the epoch alone. With equal weights of 1 it is a plain shuffle.
    In distributed training each process gives its `rank` among `num_replicas` and draws its part. Raises InputError for
    weights that cannot be used and for a uid that occurs twice. Holds 17 bytes for each pair that has weight, and a million
    draws of an epoch: 220 MB for 12.8 million kept pairs.

    With a map-style data set whose items are named by `uids`:

        from torch.utils.data import DataLoader

        sampler = WeightedSampler.of(run.curated_batches("uid", "weight"), uids=uids, seed=0)
        loader = DataLoader(dataset, batch_size=64, sampler=sampler)
        for epoch in range(3):
            sampler.set_epoch(epoch)
            for batch in loader:
                ...

    With WebDataset, whose samples hold their uid (those of `Run.export` do, in their JSON):

        import json
        from functools import partial

        import webdataset as wds

        def uid_of(sample):
            return json.loads(sample["json"])["uid"]

        stream = partial(sampler.stream, key=uid_of)
        samples = wds.WebDataset(shards, shardshuffle=False).compose(stream).shuffle(1000).to_tuple("jpg", "txt")
    """

    def __init__(
        self,
        uids: Sequence[str],
        weights: ArrayLike,
        *,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        given: NDArray[Any] = np.asarray(weights)
        if given.shape != (len(uids),):
            raise InputError(f"{len(uids)} uids, but weights of shape {given.shape}: give one each")
        with np.errstate(over="ignore"):
            finite = np.isfinite(given.astype(np.float32)).all()
        if not finite or (given < 0).any() or not given.any():
            raise InputError("weights must be finite and not negative, and one of them above 0")
        keys = keys_of(map(str, uids))
        _refuse_repeats(uids, keys)
        items = np.arange(len(uids), dtype=np.min_scalar_type(len(uids)))
        self._start(KeyedWeights.of(keys, given, items), str(uids[0]), seed, num_replicas, rank)

    def _start(self, pairs: KeyedWeights, example: str, seed: int, num_replicas: int, rank: int) -> None:
        super().__init__()
        if not 0 <= rank < num_replicas:
            raise InputError(
                f"rank is {rank} of {num_replicas} replicas: give one of 0 to {num_replicas - 1}"
            )
        self.pairs, self.seed, self.num_replicas, self.rank = pairs, seed, num_replicas, rank
        self._example = example
        self._epoch = torch.zeros(2, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]  # for workers that stay
        self._drawn: tuple[int, NDArray[Any]] | None = None

    @classmethod
    def of(
        cls,
        curated: pa.Table | Iterable[pa.RecordBatch],
        uids: Sequence[str] | None = None,
        *,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> "WeightedSampler":
        """A sampler by the table of `Run.curated`, or by the batches of `Run.curated_batches`, of which one is in memory.

        `uids` are those of your data set in its order, pairs that the table does not hold have weight 0; without them
        indices are rows of the table. Raises InputError where none of them has a weight there.
        """
        batches = curated.to_batches() if isinstance(curated, pa.Table) else curated
        pairs, example = KeyedWeights.of_batches(batches)
        if uids is None:
            if not len(pairs):
                raise InputError("the curated table keeps no pair: is it that of a finished run?")
            sampler = cls.__new__(cls)
            sampler._start(pairs, example, seed, num_replicas, rank)
            return sampler
        weights = pairs.of_uids(uids)
        if not weights.any():
            raise InputError(
                f"none of the {len(uids)} uids has a weight in the curated table (first: {next(iter(uids), 'none given')}, "
                f"there: {example}): name the items of your data set as the run named its pairs"
            )
        return cls(uids, weights, seed=seed, num_replicas=num_replicas, rank=rank)

    @property
    def epoch(self) -> int:
        return int(self._epoch[0])

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Draw for another epoch from now on; `start` indices of it are left out, to resume amid an epoch."""
        self._epoch[0], self._epoch[1] = epoch, start

    @property
    def _copies(self) -> NDArray[Any]:
        """How often each pair that has weight is drawn in this epoch (m,)."""
        epoch, pairs = self.epoch, self.pairs
        if self._drawn is None or self._drawn[0] != epoch:
            copies = np.empty(len(pairs), np.min_scalar_type(int(pairs.weights.max()) + 1))
            for start, stop in buckets_of(len(pairs), BLOCK):
                rows = slice(start, stop)
                weights = pairs.weights[rows].astype(np.float64)
                copies[rows] = copies_of(
                    pairs.keys[rows].view(np.int64), weights, derived_seed(self.seed, epoch)
                )
            self._drawn = epoch, copies
        return self._drawn[1]

    @property
    def _total(self) -> int:
        return int(self._copies.sum(dtype=np.int64))

    def __len__(self) -> int:
        """Indices of this epoch that are left, of this replica."""
        return max(0, self._total // self.num_replicas - int(self._epoch[1]))

    def __iter__(self) -> Iterator[int]:
        """The indices of this epoch in a seeded order, or this replica's part of them: all replicas get equally many."""
        equal, start, before = self._total // self.num_replicas, int(self._epoch[1]), 0
        for part in self._shuffled():
            turn, place = np.divmod(np.arange(before, before + len(part)), self.num_replicas)
            mine = (place == self.rank) & (turn >= start) & (turn < equal)
            before += len(part)
            yield from part[mine].tolist()

    def _shuffled(self) -> Iterator[NDArray[Any]]:
        """All indices of this epoch, in parts: a hash says which part a copy is in, and a part is shuffled as a whole."""
        epoch, parts = self.epoch, -(-self._total // SHUFFLED)
        for part in range(parts):
            drawn = [self._drawn_in(part, parts, *span) for span in buckets_of(len(self.pairs), BLOCK)]
            generator = np.random.default_rng([self.seed, epoch, part])
            yield generator.permutation(self.pairs.items[np.concatenate(drawn)])

    def _drawn_in(self, part: int, parts: int, start: int, stop: int) -> IntArray:
        """Places of a range of the pairs, as often as a part of the epoch has them."""
        copies = self._copies[start:stop].astype(np.int64)
        place = start + np.repeat(np.arange(stop - start), copies)
        number = np.arange(len(place)) - np.repeat(np.cumsum(copies) - copies, copies)
        seed = derived_seed(derived_seed(self.seed, self.epoch), ORDER)
        keys = self.pairs.keys[place] + number.astype(np.uint64) * ODD
        of = np.minimum((uniform(keys.view(np.int64), seed) * parts).astype(np.int64), parts - 1)
        here: IntArray = place[of == part]
        return here

    def stream(self, samples: Iterable[T], key: str | Callable[[T], str] = "__key__") -> Iterator[T]:
        """The samples, each as often as this epoch draws it; copies follow each other, so shuffle after it.

        `key` is the field of a sample that holds its uid, or a function that gives it. Samples without a weight are left out.
        Any worker may take any shard: together they draw what `__iter__` draws. Raises InputError where none of the first
        100,000 samples has a weight.
        """
        uid_of: Callable[[Any], str] = itemgetter(key) if isinstance(key, str) else key
        copies, unknown, known = self._copies, 0, False
        for sample in samples:
            uid = uid_of(sample)
            (place,), (found,) = self.pairs.find(keys_of([uid]))
            if found:
                known = True
                for _ in range(int(copies[place])):
                    yield sample
            elif not known and (unknown := unknown + 1) >= MAX_UNKNOWN:
                raise InputError(
                    f"none of the first {unknown} samples has a weight (last: {uid!r}, weights: {self._example!r}): "
                    "give the `key` that holds the uid of curated.parquet"
                )


def _refuse_repeats(uids: Sequence[str], keys: Keys) -> None:
    """Raise InputError for a uid that occurs twice."""
    order = np.argsort(keys, kind="stable")
    for place in np.flatnonzero(keys[order][1:] == keys[order][:-1]):
        if str(uids[int(order[place])]) == str(uids[int(order[place + 1])]):
            raise InputError("a uid occurs twice: every pair needs a uid of its own")
