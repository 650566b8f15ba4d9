"""Memory that workers of the scoring stages take."""

from influencespace.engine.placement import LIBRARY_BYTES
from influencespace.stages.scoring.scoring import ScoringInputs


def scoring_bytes(inputs: ScoringInputs, size: int) -> int:
    """Memory that a worker takes which scores so many pairs at once along directions, in bytes: the bank of every proxy with
    what is computed of it, the target, and the pairs with their products with a batch of the bank."""
    proxy, pairs = inputs.proxy, len(inputs.pool)
    row = 2 * 4 * (2 * inputs.pool.table.dimension + 4 * proxy.train.dimension)
    batch = min(proxy.train.batch_size, pairs)
    bank = min(proxy.negative_batches * proxy.train.batch_size, pairs) * (proxy.fold_count(pairs) + 1)
    return LIBRARY_BYTES + (bank + len(inputs.target) + size) * row + 8 * 8 * size * batch
