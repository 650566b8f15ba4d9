"""Which pairs share a batch: at most one pair an image, drawn from a seed, whatever the order on disk.

A contrastive loss takes the other pairs of a batch as negatives; another caption of the same image would be a false
one. Training batches, negative batches and the batches of the target all follow this one rule.

A set of pairs may be larger than memory: it is read a block of rows at a time. Rows lie in hash order, so that a block is a
random sample of the set.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count as count_from
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from influencespace.core.arrays import FloatArray, IntArray
from influencespace.core.hashing import hashed, uniform

BLOCK = 32_768
"""Rows that are read and shuffled together."""


class Pairs(Protocol):
    """Pairs to draw from, read by ranges of their rows."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> tuple[FloatArray, IntArray]:
        """Weight >= 0 and image of the rows [start, stop): two (m,)."""


@dataclass(frozen=True)
class InMemory:
    """Pairs whose weights (N,) and images (N,) are at hand."""

    weights: FloatArray
    images: IntArray

    def __len__(self) -> int:
        return len(self.images)

    def read(self, start: int, stop: int) -> tuple[FloatArray, IntArray]:
        return self.weights[start:stop], self.images[start:stop]


def blocks_of(rows: int, block: int = BLOCK) -> Iterator[tuple[int, int]]:
    """Ranges [start, stop) of at most `block` rows that cover `rows`."""
    for start in range(0, rows, block):
        yield start, min(start + block, rows)


def derived_seed(seed: int, number: int) -> int:
    """The seed of one of the parts of what `seed` decides."""
    return int(hashed(np.array([number]), seed)[0] >> np.uint64(1))


def copies_of(rows: IntArray, weights: FloatArray, seed: int) -> IntArray:
    """How often each row (m,) appears in an epoch of this seed: its weight in expectation, rounded down or up by a hash (m,)."""
    whole = np.floor(weights)
    return (whole + (uniform(rows, seed) < weights - whole)).astype(np.int64)


def epoch(pairs: Pairs, seed: int, block: int = BLOCK) -> Iterator[tuple[IntArray, IntArray]]:
    """One epoch, a block after another in an order by seed: rows (m,) by weight, shuffled within the block, and their images."""
    blocks = list(blocks_of(len(pairs), block))
    for place in np.random.default_rng(seed).permutation(len(blocks)):
        start, stop = blocks[place]
        weights, images = pairs.read(start, stop)
        rows = np.arange(start, stop)
        drawn = np.repeat(np.arange(stop - start), copies_of(rows, weights, seed))
        np.random.default_rng(derived_seed(seed, start)).shuffle(drawn)
        yield rows[drawn], images[drawn]


class OnePairAnImage:
    """Cuts rows that come piece by piece into batches of `size` with distinct images; a repeated image waits for a later batch.

    No more than `most` rows wait: where the pairs of few images are most of a set, what repeats them most often is left out.
    """

    def __init__(self, size: int, most: int = BLOCK) -> None:
        self.size, self.most = size, max(most, 2 * size)
        self.clear()

    def clear(self) -> None:
        """Leave out what waits."""
        self.rows, self.images = np.empty(0, np.int64), np.empty(0, np.int64)

    def cut(self, rows: IntArray, images: IntArray) -> Iterator[IntArray]:
        """The full batches that waiting and new rows (m,) of these images (m,) make."""
        for start in range(0, len(rows), self.size):
            fresh = slice(start, start + self.size)
            self.rows = np.concatenate([self.rows, rows[fresh]])
            self.images = np.concatenate([self.images, images[fresh]])
            while len(self.rows) >= self.size:
                _, first = np.unique(self.images, return_index=True)
                if len(first) < self.size:
                    break
                chosen = np.sort(first)[: self.size]
                batch, left = self.rows[chosen], np.ones(len(self.rows), bool)
                left[chosen] = False
                self._keep(left)
                yield batch
            if len(self.rows) > self.most:
                self._keep(np.sort(np.argsort(repeats(self.images), kind="stable")[: self.most]))

    def _keep(self, left: NDArray[np.bool_] | IntArray) -> None:
        self.rows, self.images = self.rows[left], self.images[left]


def repeats(images: IntArray) -> IntArray:
    """How often each image has been there before in the sequence (m,): (m,)."""
    order = np.argsort(images, kind="stable")
    ordered = images[order]
    before = np.empty(len(images), np.int64)
    before[order] = np.arange(len(images)) - np.searchsorted(ordered, ordered)
    return before


def expected_images(pairs: Pairs, enough: float, block: int = BLOCK) -> tuple[float, int]:
    """Distinct images of an epoch in expectation, and images with weight: both counted from the first rows, no further than
    `enough` are expected."""
    images, weight, expected = np.empty(0, np.int64), np.empty(0), 0.0
    for start, stop in blocks_of(len(pairs), block):
        weights, fresh = pairs.read(start, stop)
        usable = weights > 0
        images, place = np.unique(np.concatenate([images, fresh[usable]]), return_inverse=True)
        together = np.concatenate([weight, weights[usable]])
        weight = np.bincount(place, together, len(images)).astype(np.float64)
        expected = float(np.minimum(weight, 1).sum())
        if expected >= enough:
            break
    return expected, len(images)


def stream_batches(pairs: Pairs, size: int, steps: int, seed: int, block: int = BLOCK) -> Iterator[IntArray]:
    """`steps` batches of `size` rows for a weighted set: epoch after epoch, distinct images in a batch.

    Batches smaller than `size`, at the end of an epoch, are left out. Where an epoch has fewer distinct images than `size`
    in expectation, batches are as large as that: with all images in every batch, weights would mean nothing.
    Raises ValueError when fewer than two images have weight.
    """
    expected, available = expected_images(pairs, size, block)
    if available < 2:
        raise ValueError(f"{available} image(s) have weight; a contrastive batch needs two or more")
    cutter = OnePairAnImage(min(size, max(2, int(expected))), block)
    done = 0
    for number in count_from():
        before = done
        for rows, images in epoch(pairs, derived_seed(seed, number), block):
            for batch in cutter.cut(rows, images):
                yield batch
                done += 1
                if done == steps:
                    return
        if (
            done > before
        ):  # else the epoch by chance had too few images for a batch, and waits for the next one
            cutter.clear()


def training_batches(
    weights: FloatArray, images: IntArray, size: int, steps: int, seed: int
) -> Iterator[IntArray]:
    """`stream_batches` of pairs in memory: weights (N,), images (N,)."""
    return stream_batches(InMemory(weights, images), size, steps, seed)


def reweighted_batches(
    pairs: Pairs, size: int, steps: int, seed: int, *, every: int, reweigh: Callable[[], Pairs]
) -> Iterator[IntArray]:
    """`stream_batches` with new weights after each `every` batches, when a new epoch begins.

    `reweigh` is called between two batches, when those before have been used; not after the last.
    """
    for start in range(0, steps, every):
        if start:
            pairs = reweigh()
        draws = derived_seed(seed, start) if start else seed
        yield from stream_batches(pairs, size, min(every, steps - start), draws)


def disjoint_batches(pairs: Pairs, size: int, count: int, seed: int, block: int = BLOCK) -> list[IntArray]:
    """`count` disjoint batches of `size` rows, at most one pair an image over all of them, drawn by weight from the first rows.

    Where the pairs do not suffice, the batches are as large as can be (at least two are made).
    Raises ValueError when there are fewer than four images with weight.
    """
    chosen, seen = np.empty(0, np.int64), np.empty(0, np.int64)
    for start, stop in blocks_of(len(pairs), block):
        weights, images = pairs.read(start, stop)
        usable = np.flatnonzero((weights > 0) & ~np.isin(images, seen))
        # Weighted sampling without replacement: sort by exponential clocks (Efraimidis and Spirakis 2006).
        clocks = -np.log1p(-uniform(start + usable, seed)) / weights[usable]
        order = usable[np.argsort(clocks, kind="stable")]
        _, first = np.unique(images[order], return_index=True)
        order = order[np.sort(first)]  # over the whole bank, so that batches are independent
        chosen = np.concatenate([chosen, start + order])
        seen = np.concatenate([seen, images[order]])
        if len(chosen) >= size * count:
            break
    if len(chosen) < 4:
        raise ValueError(f"{len(chosen)} image(s) have weight; two batches of two pairs need four or more")
    count = max(2, min(count, len(chosen) // size)) if len(chosen) >= 2 * size else 2
    size = min(size, len(chosen) // count)
    return [np.sort(chosen[k * size : (k + 1) * size]) for k in range(count)]


def covering_batches(images: IntArray, size: int, seed: int) -> list[IntArray]:
    """All pairs, each in one batch of at most `size` pairs with distinct images; batches of one round are of similar size.

    Round r holds one pair, by seed, of every image that has more than r pairs. A lone pair is left out: a batch of one
    has no loss.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(images))
    by_image = order[np.argsort(images[order], kind="stable")]
    ordered = images[by_image]
    rounds = np.arange(len(ordered)) - np.searchsorted(ordered, ordered)
    batches = []
    for r in range(int(rounds.max(initial=-1)) + 1):
        pairs = generator.permutation(by_image[rounds == r])
        batches += np.array_split(pairs, -(-len(pairs) // size))
    return [np.sort(batch) for batch in batches if len(batch) > 1]


def folds_by_image(images: IntArray, count: int, seed: int) -> IntArray:
    """Fold 0 .. count-1 of each pair (N,); all pairs of an image share one, and folds have equally many images (+-1)."""
    distinct, inverse = np.unique(images, return_inverse=True)
    fold = np.random.default_rng(seed).permutation(len(distinct)) % count
    return fold[inverse].astype(np.int64)
