"""Drawing pairs by weight, for a map-style data set or a stream: a pair's weight is its expected copies in an epoch."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from hashlib import blake2b
from operator import itemgetter
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Sampler

from influencespace.errors import InputError

T = TypeVar("T")
MAX_UNKNOWN = 1000
"""Samples of a stream, none of which has a weight, after which its keys are taken for wrong ones."""


def copies_of(uid: str, weight: float, seed: int, epoch: int) -> int:
    """How often a pair is drawn in an epoch: the whole part of its weight for sure, and once more with the chance of the rest.

    The chance is decided by a hash of uid, seed and epoch, so that every worker finds the same, in whatever order.
    """
    whole = int(weight)
    rest = weight - whole
    if not rest:
        return whole
    number = blake2b(uid.encode(), digest_size=8, key=f"{seed} {epoch}".encode()).digest()
    return whole + (int.from_bytes(number, "big") < rest * 2**64)


class WeightedSampler(Sampler[int]):
    """Draws pairs by weight: the expected copies of a pair in an epoch are its weight, 0 is never drawn.

    `uids` (n,) name the items of the data set in its order, `weights` (n,) are finite and not negative. Deterministic: the
    draw of an epoch depends on uids, weights, `seed` and the epoch alone. With equal weights of 1 it is a plain shuffle.
    In distributed training each process gives its `rank` among `num_replicas` and draws its part. Raises InputError for
    weights that cannot be used and for a uid that occurs twice. Holds the uids and weights that it is given, some 200 bytes a
    pair: give it those of the kept pairs, as others are never drawn.

    With a map-style data set whose items are named by `uids`:

        from torch.utils.data import DataLoader

        sampler = WeightedSampler.of(run.curated(), uids=uids, seed=0)
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
        super().__init__()
        self.uids = list(map(str, uids))
        self.weights: NDArray[np.float64] = np.asarray(weights, np.float64)
        self.seed, self.num_replicas, self.rank = seed, num_replicas, rank
        self._epoch = torch.zeros(2, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]  # for workers that stay
        self._drawn: tuple[int, NDArray[np.int64]] | None = None
        if self.weights.shape != (len(self.uids),):
            raise InputError(
                f"{len(self.uids)} uids, but weights of shape {self.weights.shape}: give one each"
            )
        if not np.isfinite(self.weights).all() or (self.weights < 0).any() or not self.weights.any():
            raise InputError("weights must be finite and not negative, and one of them above 0")
        if not 0 <= rank < num_replicas:
            raise InputError(
                f"rank is {rank} of {num_replicas} replicas: give one of 0 to {num_replicas - 1}"
            )
        if len(set(self.uids)) < len(self.uids):
            raise InputError("a uid occurs twice: every pair needs a uid of its own")

    @classmethod
    def of(cls, curated: pa.Table, uids: Sequence[str] | None = None, **options: int) -> "WeightedSampler":
        """A sampler by the table of `Run.curated`; `options` are `seed`, `num_replicas` and `rank`.

        `uids` are those of your data set in its order, pairs that the table does not hold have weight 0; without them
        indices are rows of the table. Raises InputError where the table holds none of them.
        """
        names = curated["uid"].to_pylist()
        weights = curated["weight"].to_numpy()
        if uids is None:
            return cls(names, weights, **options)
        weight_of = dict(zip(names, weights.tolist()))
        uids = list(map(str, uids))
        if not any(map(weight_of.__contains__, uids)):
            raise InputError(
                f"none of the {len(uids)} uids is in the curated table (first: {next(iter(uids), 'none given')}, there: "
                f"{next(iter(names), 'none')}): name the items of your data set as the run named its pairs"
            )
        return cls(uids, [weight_of.get(uid, 0.0) for uid in uids], **options)

    @property
    def epoch(self) -> int:
        return int(self._epoch[0])

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Draw for another epoch from now on; `start` indices of it are left out, to resume amid an epoch."""
        self._epoch[0], self._epoch[1] = epoch, start

    def copies(self) -> NDArray[np.int64]:
        """How often each pair is drawn in this epoch (n,)."""
        epoch = self.epoch
        if self._drawn is None or self._drawn[0] != epoch:
            pairs = zip(self.uids, self.weights.tolist())
            counts = [copies_of(uid, weight, self.seed, epoch) for uid, weight in pairs]
            self._drawn = epoch, np.array(counts, np.int64)
        return self._drawn[1]

    def __len__(self) -> int:
        """Indices of this epoch that are left, of this replica."""
        return max(0, int(self.copies().sum()) // self.num_replicas - int(self._epoch[1]))

    def __iter__(self) -> Iterator[int]:
        """The indices of this epoch in a seeded order, or this replica's part of them: all replicas get equally many."""
        drawn = np.repeat(np.arange(len(self.uids)), self.copies())
        order = np.random.default_rng([self.seed, self.epoch]).permutation(drawn)
        equal = len(order) // self.num_replicas * self.num_replicas
        yield from order[self.rank : equal : self.num_replicas][int(self._epoch[1]) :].tolist()

    @cached_property
    def _weight_of(self) -> Mapping[str, float]:
        return dict(zip(self.uids, self.weights.tolist()))

    def stream(self, samples: Iterable[T], key: str | Callable[[T], str] = "__key__") -> Iterator[T]:
        """The samples, each as often as this epoch draws it; copies follow each other, so shuffle after it.

        `key` is the field of a sample that holds its uid, or a function that gives it. Samples without a weight are left out.
        Any worker may take any shard: together they draw what `__iter__` draws. Raises InputError where none of the first
        1,000 samples has a weight.
        """
        uid_of: Callable[[Any], str] = itemgetter(key) if isinstance(key, str) else key
        epoch, unknown, known = self.epoch, 0, False
        for sample in samples:
            uid = uid_of(sample)
            weight = self._weight_of.get(uid)
            if weight is not None:
                known = True
                for _ in range(copies_of(uid, weight, self.seed, epoch)):
                    yield sample
            elif not known and (unknown := unknown + 1) >= MAX_UNKNOWN:
                raise InputError(
                    f"none of the first {unknown} samples has a weight (last: {uid!r}, weights: {self.uids[0]!r}): "
                    "give the `key` that holds the uid of curated.parquet"
                )
