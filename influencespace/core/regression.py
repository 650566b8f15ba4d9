"""Influence of every pair from a few scored ones: regression on several quality axes at once.

Strata know one axis, which is enough to tell wrong from right; how much a pair helps also depends on the others, e.g.
on what the given encoder thinks of it.
"""

import numpy as np
from numpy.typing import NDArray

from influencespace.core.strata import means_by, quantile_of, smooth

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def standardised(values: FloatArray) -> FloatArray:
    """Values (n,) in units of their spread around their mean; zeros where they are all alike."""
    spread = values.std()
    result: FloatArray = (values - values.mean()) / (spread if spread > 0 else 1.0)
    return result


def single_index(
    axes: FloatArray, rows: IntArray, influence: FloatArray, pairs: FloatArray, quantiles: int
) -> FloatArray:
    """Influence of all n pairs, fitted on the m scored ones: a smooth curve along one combination of the axes.

    axes (n, A) standardised; rows (m,) the scored pairs with their influence (m,) and how many pairs of the pool each
    stands for (m,) -> (n,) in units of influence. The combination is by weighted least squares, the curve is smoothed over
    `quantiles` of it (a single-index model, Ichimura 1993). Raises ValueError when an influence is not finite.
    """
    if not np.isfinite(influence).all():
        raise ValueError(
            f"{int((~np.isfinite(influence)).sum())} of {len(influence)} influences are not finite"
        )
    design = np.column_stack([axes, np.ones(len(axes))])
    root = np.sqrt(pairs)
    coefficients = np.linalg.lstsq(design[rows] * root[:, None], influence * root, rcond=None)[0]
    index = design @ coefficients
    quantile = quantile_of(index, quantiles)
    scored = means_by(quantile[rows], influence, quantiles)
    filled = scored.count > 0
    curve = smooth(scored.mean[filled], scored.variance[filled]).mean
    centres = means_by(quantile, index, quantiles).mean[filled]
    fitted: FloatArray = np.interp(index, centres, curve)
    return fitted
