"""Which pairs share a batch: at most one pair an image, drawn from a seed, whatever the order on disk.

A contrastive loss takes the other pairs of a batch as negatives; another caption of the same image would be a false
one. Training batches, negative batches and the batches of the target all follow this one rule.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from influencespace.core.arrays import FloatArray, IntArray


def one_pair_an_image(order: IntArray, images: IntArray, size: int) -> Iterator[IntArray]:
    """Cut a sequence of pair indices into batches of `size` with distinct images; a repeated image waits for a later batch.

    order (n,) pair indices; images (N,) image of each pair. The last batches can be smaller.
    """
    waiting = np.empty(0, np.int64)
    start = 0
    while start < len(order) or len(waiting):
        fresh = order[start : start + size]
        start += len(fresh)
        candidates = np.concatenate([waiting, fresh])
        _, first = np.unique(images[candidates], return_index=True)
        chosen = np.sort(first)[:size]
        left = np.ones(len(candidates), bool)
        left[chosen] = False
        waiting = candidates[left]
        if len(chosen) == size or start >= len(order):
            yield candidates[chosen]
        else:
            # too few distinct images among the candidates yet: keep them all and read on
            waiting = candidates


def weighted_order(weights: FloatArray, generator: np.random.Generator) -> IntArray:
    """One epoch: each pair appears `weight` times in expectation (its whole part always, the rest by chance), shuffled.

    weights (N,) >= 0 -> (about sum of weights,) pair indices.
    """
    whole = np.floor(weights)
    repeats = (whole + (generator.random(len(weights)) < weights - whole)).astype(np.int64)
    order = np.repeat(np.arange(len(weights)), repeats)
    generator.shuffle(order)
    return order


def training_batches(
    weights: FloatArray, images: IntArray, size: int, steps: int, seed: int | Sequence[int]
) -> Iterator[IntArray]:
    """`steps` batches of `size` pairs for a weighted set: epoch after epoch, distinct images in a batch.

    Batches smaller than `size`, at the end of an epoch, are left out. Where an epoch has fewer distinct images than `size`
    in expectation, batches are as large as that: with all images in every batch, weights would mean nothing.
    Raises ValueError when fewer than two images have weight.
    """
    available = len(np.unique(images[weights > 0]))
    if available < 2:
        raise ValueError(f"{available} image(s) have weight; a contrastive batch needs two or more")
    _, image = np.unique(images, return_inverse=True)
    expected = np.minimum(np.bincount(image, weights=weights), 1).sum()
    size = min(size, max(2, int(expected)))
    generator = np.random.default_rng(seed)
    done = 0
    waiting = np.empty(0, np.int64)  # epochs that by chance had too few images for a batch
    while done < steps:
        order = np.concatenate([waiting, weighted_order(weights, generator)])
        waiting = order
        for batch in one_pair_an_image(order, images, size):
            if len(batch) < size:
                break  # the waiting pairs have images that are in this one: all later batches are as small
            waiting = np.empty(0, np.int64)
            yield batch
            done += 1
            if done == steps:
                return


def reweighted_batches(
    weights: FloatArray,
    images: IntArray,
    size: int,
    steps: int,
    seed: int,
    *,
    every: int,
    reweigh: Callable[[], FloatArray],
) -> Iterator[IntArray]:
    """`training_batches` with new weights after each `every` batches, when a new epoch begins.

    `reweigh` is called between two batches, when those before have been used; not after the last.
    """
    for start in range(0, steps, every):
        if start:
            weights = reweigh()
        draws = (seed, start) if start else seed
        yield from training_batches(weights, images, size, min(every, steps - start), draws)


def disjoint_batches(
    images: IntArray, size: int, count: int, seed: int, weights: FloatArray | None = None
) -> list[IntArray]:
    """`count` disjoint batches of `size` pairs, at most one pair an image over all of them, drawn by weight.

    Where the pairs do not suffice, the batches are as large as can be (at least two are made).
    Raises ValueError when there are fewer than four images with weight.
    """
    weights = np.ones(len(images)) if weights is None else weights
    usable = np.flatnonzero(weights > 0)
    available = len(np.unique(images[usable]))
    if available < 4:
        raise ValueError(f"{available} image(s) have weight; two batches of two pairs need four or more")
    generator = np.random.default_rng(seed)
    # Weighted sampling without replacement: sort by exponential clocks (Efraimidis and Spirakis 2006).
    clocks = generator.exponential(size=len(images))[usable] / weights[usable]
    order = usable[np.argsort(clocks, kind="stable")]
    _, first = np.unique(images[order], return_index=True)
    order = order[np.sort(first)]  # over the whole bank, so that batches are independent
    count = max(2, min(count, len(order) // size)) if len(order) >= 2 * size else 2
    size = min(size, len(order) // count)
    return [np.sort(order[k * size : (k + 1) * size]) for k in range(count)]


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
