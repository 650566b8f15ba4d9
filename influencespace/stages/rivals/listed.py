"""Methods that train on a list of the user's own: uids, and perhaps weights."""

from dataclasses import dataclass, replace

from influencespace.core.arrays import FloatArray
from influencespace.data.pair_set import PairSet
from influencespace.data.weight_list import read_weight_list
from influencespace.errors import InputError
from influencespace.stages.passes import RangePasses


@dataclass(frozen=True, kw_only=True)
class Listed:
    """Weights of the pool's pairs by a list; opened where it is used."""

    path: str
    """A file or URL that all machines see."""
    pool: PairSet
    factor: float = 1.0

    def read(self, start: int, stop: int) -> FloatArray:
        """Of a range (n,), zero for pairs that are not listed."""
        uids = self.pool.read(slice(start, stop), "uid")["uid"]
        return self.factor * read_weight_list(self.path).of(uids)


@dataclass(frozen=True)
class CountWeights:
    """Statistic: how many pairs have weight, and its sum."""

    def observe(self, weights: FloatArray) -> tuple[int, float]:
        return int((weights > 0).sum()), float(weights.sum())

    def merge(self, left: tuple[int, float], right: tuple[int, float]) -> tuple[int, float]:
        return left[0] + right[0], left[1] + right[1]


def scaled(listed: Listed, passes: RangePasses, rows: int) -> tuple[Listed, int]:
    """The weights with mean 1 over the pairs that have some, and how many these are.

    Raises InputError where none is of the pool.
    """
    count, total = passes.fold(CountWeights(), listed.read, rows)
    if not count:
        here, there = listed.pool.read(slice(0, 1), "uid")["uid"][0], read_weight_list(listed.path)
        raise InputError(
            f"{listed.path}, a file of train.methods, gives none of the pool's pairs any weight: it lists {len(there):,} such as "
            f"{there.uids[0]}, and the pool has such as {here}. Were the lists made of other data, or by other uids?"
        )
    return replace(listed, factor=count / total), count
