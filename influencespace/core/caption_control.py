"""The permuted-caption control: how many pairs are wrong, judged against captions permuted on purpose; a check, never a rule."""

import numpy as np
from pydantic.dataclasses import dataclass

from influencespace.core.arrays import FloatArray


@dataclass(frozen=True, kw_only=True)
class CaptionControl:
    """Mean out-of-fold influences and the share of wrong pairs they imply."""

    influence_top_half: float
    influence_mean: float
    influence_permuted: float | None
    estimated_wrong_share: float | None


def caption_control(out_of_fold: FloatArray, quality: FloatArray, permuted: FloatArray) -> CaptionControl:
    """(I_top half - mean) / (I_top half - I_permuted), all out of fold: influences (n,), quality (n,), permuted pairs' (m,).

    A pool without wrong pairs has a mean near that of its better half; a pool of permuted captions has theirs. The share is
    None where nothing was permuted, or where permuted pairs are no worse than the better half.
    """
    top = float(out_of_fold[quality >= np.median(quality)].mean())
    mean, wrong = float(out_of_fold.mean()), float(permuted.mean()) if len(permuted) else None
    share = float(np.clip((top - mean) / (top - wrong), 0, 1)) if wrong is not None and top > wrong else None
    return CaptionControl(
        influence_top_half=top,
        influence_mean=mean,
        influence_permuted=wrong,
        estimated_wrong_share=share,
    )
