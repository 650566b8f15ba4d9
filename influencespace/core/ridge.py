"""Ridge regression with its penalty by the largest evidence: values of some rows carried over to all by their features."""

from dataclasses import dataclass

import numpy as np

from influencespace.core.arrays import FloatArray

ROUNDS = 200  # of the evidence's fixed point
SETTLED = 1e-4  # relative change of the prior's variance
MIN_VARIANCE = 1e-9  # of the values' variance: no prior and no noise is narrower


@dataclass(frozen=True, kw_only=True)
class Ridge:
    """The fitted function: offset + (features - centre) . coefficients."""

    centre: FloatArray  # (F,)
    coefficients: FloatArray  # (F,)
    offset: float
    freedom: float
    """Effective degrees of freedom, 0 to F: 0 where features carry no information."""

    def predict(self, features: FloatArray) -> FloatArray:
        """Values of rows by their features (n, F): (n,)."""
        return self.offset + (features - self.centre) @ self.coefficients


def fit_ridge(features: FloatArray, values: FloatArray) -> Ridge:
    """Ridge regression of values (m,) on features (m, F), its penalty by the largest evidence (MacKay 1992).

    Coefficients have one normal prior, so features must be alike in scale, as the entries of an embedding are. Where they carry
    no information, the prior's variance falls to zero and the mean is left. Raises ValueError when a value or a feature is
    not finite, or there are fewer than two rows.
    """
    if len(values) < 2:
        raise ValueError(f"ridge regression needs two rows or more, not {len(values)}")
    if not (np.isfinite(values).all() and np.isfinite(features).all()):
        raise ValueError("ridge regression needs finite features and values")
    centre, offset = features.mean(0), float(values.mean())
    X, y = features - centre, values - offset
    spectrum, V = np.linalg.eigh(X.T @ X)
    spectrum = np.maximum(spectrum, 0)
    z = V.T @ (X.T @ y)
    square, smallest = float(y @ y), MIN_VARIANCE * (float(y.var()) or 1.0)
    noise = max(float(y.var()), smallest)
    # a prior under which features explain as much as noise does, to begin with
    variance = noise * len(y) / max(float(spectrum.sum()), np.finfo(np.float64).eps)
    for _ in range(ROUNDS):
        precision = spectrum / noise + 1 / variance
        coefficients = z / noise / precision
        used = float((spectrum / noise / precision).sum())
        updated = max(float(coefficients @ coefficients) / max(used, 1e-9), smallest / len(spectrum))
        residual = square - 2 * coefficients @ z + spectrum @ coefficients**2
        noise = max(float(residual) / max(len(y) - used - 1, 1.0), smallest)
        change = abs(np.log(updated / variance))
        variance = updated
        if change < SETTLED:
            break
    return Ridge(centre=centre, coefficients=V @ coefficients, offset=offset, freedom=used)
