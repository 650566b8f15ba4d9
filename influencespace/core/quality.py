"""The quality axis along which influence is pooled."""

import numpy as np
from numpy.typing import NDArray

from influencespace.core.regression import standardised

FloatArray = NDArray[np.float64]


def quality_axis(seen: FloatArray, held_out: FloatArray) -> FloatArray:
    """Mean of two scores in units of their spread: by the student that trained on the pair and by one that did not.

    Either alone has a blind spot: the first has learned some of the wrong pairs, the second lacks the other captions of
    the pair's image. (n,), (n,) -> (n,), mean 0.
    """
    return (standardised(seen) + standardised(held_out)) / 2
