"""NormSim: how near a pair is to the target's pairs, by the pretrained encoder (Wang et al. 2024, NormSim-inf).

score(z) = max over target pairs x of cos(z, x), of images as in the paper, of texts, or the mean of both. Higher is more
like something in the target. It does not measure whether image and text belong together: the paper uses it after a
filter by CLIP score or negCLIPLoss.
"""

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass as options
from torch import Tensor

from influencespace.core.contrastive import contrastive
from influencespace.errors import STRICT
from influencespace.estimators.problem import Batch, Fit, FloatArray, Problem, immediately

Side = Literal["image", "text", "both"]


def largest_cosine(x: Tensor, targets: Tensor, block: int = 4096) -> Tensor:
    """Largest cosine of each row of x (n, D) with a row of unit targets (T, D), `block` of them at a time: (n,)."""
    z = F.normalize(x, dim=-1)
    best = z.new_full((len(z),), -torch.inf)
    for start in range(0, len(targets), block):
        best = torch.maximum(best, (z @ targets[start : start + block].T).amax(1))
    return best


def mean_squared_cosine(x: Tensor, targets: Tensor) -> Tensor:
    """Mean over unit targets (T, D) of the squared cosine with each row of x (n, D): (n,), NormSim-2 squared over T."""
    z = F.normalize(x, dim=-1)
    return ((z @ (targets.T @ targets / len(targets))) * z).sum(1)


def norm_sim(targets: list[tuple[int, Tensor]], batch: Batch) -> FloatArray:
    """Mean over the sides (index into the inputs, unit targets) of the largest cosine: (n,); nan for what is not finite."""
    cosines = torch.stack([largest_cosine(batch.inputs[side], rows) for side, rows in targets]).mean(0)
    return cosines.double().cpu().numpy()


@options(frozen=True, kw_only=True, config=STRICT)
class NormSim:
    """Needs the target's embeddings alone, no proxy."""

    side: Side = "image"

    def fit(self, problem: Problem) -> Fit:
        contrastive(problem.objective, "norm_sim")
        sides = {"image": [0], "text": [1], "both": [0, 1]}[self.side]
        targets = [
            (side, F.normalize(torch.cat([chunk.inputs[side] for chunk in problem.target]), dim=-1))
            for side in sides
        ]
        return immediately(partial(norm_sim, targets))
