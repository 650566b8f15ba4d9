"""How many pairs are wrong, judged against pairs that are surely wrong: a check on the choice, never its rule."""

import numpy as np
from numpy.typing import NDArray
from pydantic.dataclasses import dataclass

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Placebo:
    """Mean held-out influences and the share of wrong pairs they imply."""

    influence_top_half: float
    influence_mean: float
    influence_placebo: float | None
    estimated_wrong_share: float | None


def placebo_check(held_out: FloatArray, quality: FloatArray, placebo: FloatArray) -> Placebo:
    """(I_top half - mean) / (I_top half - I_placebo), all held out: influences (n,), quality (n,), placebo (m,).

    A pool without wrong pairs has a mean near that of its better half, a pool of permuted captions has the placebo's.
    The share is None where there is no placebo, or it is no worse than the better half and tells nothing.
    """
    top = float(held_out[quality >= np.median(quality)].mean())
    mean, wrong = float(held_out.mean()), float(placebo.mean()) if len(placebo) else None
    share = float(np.clip((top - mean) / (top - wrong), 0, 1)) if wrong is not None and top > wrong else None
    return Placebo(
        influence_top_half=top, influence_mean=mean, influence_placebo=wrong, estimated_wrong_share=share
    )
