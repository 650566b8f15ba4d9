"""Weights that serve the worst of several groups, under a cap, floors and a radius."""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq, minimize
from scipy.special import wrightomega

from influencespace.core.arrays import FloatArray, IntArray
from influencespace.errors import InputError

# The dual's search stops where its rounded value moves no more, which can be 1e-5 from a constraint; begun anew, it goes on.
RESTARTS = 3


def minimax_weights(
    loss: FloatArray,
    influence: FloatArray,
    counts: FloatArray | IntArray,
    *,
    temperature: float,
    cap: float = np.inf,
    floor: float = 0.0,
    radius: float = np.inf,
    start: FloatArray | None = None,
) -> FloatArray:
    """Weights of mean 1 that lower the worst group's predicted loss: loss (A,), influence (K, A), counts (K, G) -> (K,).

    argmin_w max_a [ L_a - sum_k p_k (w_k - s_k) I_ka ] + temperature sum_k p_k w_k log(w_k / s_k), over 0 <= w <= cap with
    sum_k p_k w_k = 1, p_k = n_k / N. I_ka > 0 helps: the fall of the target loss of group a when stratum (or pair) k
    gets more weight, in units of that loss. counts are the pool's pairs of each of its groups in each stratum; each keeps at
    least the share `floor` of its weight. Weights stay within `radius` of `start` (ones by default), in root mean square, as
    influence is true near it only. Constraints hold to 1e-6.

    Solved by its dual (group distributionally robust optimisation, Sagawa et al. 2020, over influences): given a distribution
    lambda over the target's groups, prices of the floors and of the radius, weights are a closed form, so only these
    few numbers are searched, by sequential quadratic programming. Raises InputError for constraints that `start` breaks and
    for strata without influence.
    """
    if not temperature > 0:
        raise InputError(f"temperature = {temperature}: it must be above 0; a small one is nearly no entropy")
    n = counts.sum(1)
    if bad := int((~np.isfinite(influence).all(1) | (n <= 0)).sum()):
        raise InputError(
            f"{bad} of {len(n)} strata have no pairs, or an influence that is not finite: leave them out"
        )
    p = n / n.sum()
    # one for all sizes of influence; a constant influence moves nothing
    unit = float(np.sqrt(np.max(p @ (influence - p @ influence) ** 2))) or 1.0
    dual = _Dual(
        loss=loss / unit,
        influence=influence / unit,
        p=p,
        start=np.ones(len(p)) if start is None else start,
        share=counts / n[:, None],
        temperature=temperature / unit,
        cap=cap,
        floor=floor,
        radius=radius,
    )
    return dual.solved()


@dataclass(frozen=True, kw_only=True)
class _Dual:
    """Prices of the groups (A,), of the floors (G,) and of the radius, in this order, and the weights that they make."""

    loss: FloatArray  # (A,)
    influence: FloatArray  # (K, A)
    p: FloatArray  # (K,)
    start: FloatArray  # (K,)
    share: FloatArray  # (K, G) of a stratum's pairs that are of a group
    temperature: float
    cap: float
    floor: float
    radius: float

    def __post_init__(self) -> None:
        """Raises InputError for what has no solution, or none by the dual."""
        if not self.radius > 0:
            raise InputError(f"radius = {self.radius}: no weight may move; give one above 0")
        p, s = self.p, self.start
        if s.min() < 0 or s.max() > self.cap + 1e-6 or abs(p @ s - 1) > 1e-6:
            raise InputError(
                f"weights from {s.min():.3g} to {s.max():.3g} of mean {p @ s:.3g} are no start below the cap {self.cap}: they "
                "must be 0 or more, at most the cap and 1 on average"
            )
        held = ((p * s) @ self.share) / (p @ self.share)
        if held.min() < self.floor - 1e-6:
            raise InputError(
                f"a group holds {held.min():.3g} of its weight at the start, below the floor of {self.floor}: lower the floor, "
                "or start from even weights"
            )

    def solved(self) -> FloatArray:
        """The weights at the best prices."""
        if self.cap <= 1 + 1e-9:  # nothing else has a mean of 1
            return np.ones(len(self.p))
        A, G = len(self.loss), self.share.shape[1]
        floors, radius = 0 if self.floor == 0 else None, None if np.isfinite(self.radius) else 0
        total = {
            "type": "eq",
            "fun": lambda x: x[:A].sum() - 1,
            "jac": lambda x: np.repeat([1.0, 0.0], [A, G + 1]),
        }
        prices = np.append(np.full(A, 1 / A), np.zeros(G + 1))
        for _ in range(RESTARTS):
            prices = minimize(
                self.negative,
                prices,
                jac=True,
                method="SLSQP",
                bounds=[(0, 1)] * A + [(0, floors)] * G + [(0, radius)],
                constraints=total,
                options={"ftol": 1e-14, "maxiter": 500},
            ).x.clip(0)
        return self.weights(prices)

    def weights(self, prices: FloatArray) -> FloatArray:
        A, G = len(self.loss), self.share.shape[1]
        of_groups, of_floors, of_radius = np.split(prices, [A, A + G])
        utility = self.influence @ of_groups + self.share @ of_floors
        return _weights_at(utility, self.p, self.start, self.temperature, float(of_radius[0]), self.cap)

    def negative(self, prices: FloatArray) -> tuple[float, FloatArray]:
        """Minus the dual's value, and its derivative."""
        p, s, w = self.p, self.start, self.weights(prices)
        predicted = self.loss - (p * (w - s)) @ self.influence  # (A,)
        spare = (p * w) @ self.share - self.floor * (p @ self.share)  # (G,)
        squared_radius = self.radius**2 if np.isfinite(self.radius) else 0.0
        slope = np.concatenate([predicted, -spare, [(p @ (w - s) ** 2 - squared_radius) / 2]])
        some = w > 0
        entropy = self.temperature * float((p * w)[some] @ np.log(w[some] / s[some]))
        return -(float(prices @ slope) + entropy), -slope


def _weights_at(
    utility: FloatArray, p: FloatArray, s: FloatArray, tau: float, nu: float, cap: float
) -> FloatArray:
    """argmax_w sum_k p_k [w_k u_k - tau w_k log(w_k / s_k) - nu (w_k - s_k)^2 / 2] with sum p w = 1, w <= cap: (K,).

    At the optimum tau log w + nu w = level_k - eta, one eta for all, so w is Wright's omega function of it.
    """
    alive = s > 0
    level = utility[alive] + tau * np.log(s[alive]) + nu * s[alive]
    p_alive = p[alive]

    def at(eta: float) -> FloatArray:
        with np.errstate(over="ignore"):
            x = (level - eta) / tau
            free = np.exp(x) if nu == 0 else wrightomega(x + np.log(nu / tau)) * (tau / nu)
        return np.minimum(free, cap)

    # with this weight everywhere the mean is 1; each stratum gets just this weight at some eta, and the answer lies among those
    even = 1 / p_alive.sum()
    bounds = level - tau * np.log(even) - nu * even
    low, high = float(bounds.min()), float(bounds.max())
    margin = 1e-9 * (1 + abs(low) + abs(high))
    eta = brentq(lambda x: p_alive @ at(x) - 1, low - margin, high + margin, xtol=1e-14, rtol=1e-14)
    w = np.zeros(len(s))
    w[alive] = at(eta)
    return w
