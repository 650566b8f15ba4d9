"""Names of the types of numpy arrays."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
Labels = NDArray[Any]
"""Of any kind that sorts."""
