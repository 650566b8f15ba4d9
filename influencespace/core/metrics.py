"""Measures of a result: recall@k, AUROC, average precision, bootstrap intervals over images."""

import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from influencespace.core.arrays import BoolArray, FloatArray, IntArray

MAX_AT_ONCE = 2**24  # similarities: 128 MB
BROKEN = -2.0  # below any cosine
ROUNDING = 1e-12  # of a dot product of unit vectors in float64; what differs in float32 differs by 1e-8


def retrieval_ranks(u: Tensor, t: Tensor, image_of_text: Tensor, block: int = 1024) -> tuple[Tensor, Tensor]:
    """Rank (0 = first) of the best right answer: image to text (n_images,) and text to image (n_texts,).

    u (n_images, d), t (n_texts, d) unit embeddings; image_of_text (n_texts,) row of u that a text describes.
    Equal similarities count against the right answer by half, so a constant encoder scores as chance does: in float64, and
    equal but for its rounding. Similarities that are not finite, of a broken encoder, are equal, and below all others.
    """
    u, t = u.double(), t.double()
    image_ranks = torch.empty(len(u), dtype=torch.float64)
    right = _finite((u[image_of_text] * t).sum(-1))  # similarity of each text with its own image
    best = torch.full((len(u),), -3.0, dtype=u.dtype, device=u.device)
    best.scatter_reduce_(0, image_of_text, right, reduce="amax")
    text_ranks = torch.zeros(len(t), dtype=torch.float64, device=u.device)
    block = max(1, min(block, MAX_AT_ONCE // max(len(t), 1)))
    for start in range(0, len(u), block):
        rows = torch.arange(start, min(start + block, len(u)), device=u.device)
        S = _finite(u[rows] @ t.T)
        S[image_of_text[None, :] == rows[:, None]] = -4.0  # the right answers themselves do not compete
        image_ranks[rows.cpu()] = _ahead(S - best[rows][:, None], 1).cpu()
        text_ranks += _ahead(S - right, 0)
    return image_ranks, text_ranks.cpu()


def _finite(S: Tensor) -> Tensor:
    return S.nan_to_num(nan=BROKEN, posinf=BROKEN, neginf=BROKEN)


def _ahead(lead: Tensor, dim: int) -> Tensor:
    """How many similarities lead along a dimension, those that tie by half."""
    return ((lead > -ROUNDING).sum(dim) + (lead > ROUNDING).sum(dim)).double() / 2


def recall_at(ranks: Tensor, k: int) -> Tensor:
    """Whether each query has a right answer among its first k: ranks (n,) -> (n,) of 0 and 1, in float64."""
    return (ranks < k).double()


RECALL_LEVELS = (1, 5, 10)


def mean_recall_by_image(image_ranks: Tensor, text_ranks: Tensor, image_of_text: Tensor) -> Tensor:
    """Each image's share of the mean recall, in per cent: (n_images,), whose mean is the mean of Recall@1/5/10 both ways."""
    image_side = torch.stack([recall_at(image_ranks, k) for k in RECALL_LEVELS]).mean(0)
    text_side = torch.stack([recall_at(text_ranks, k) for k in RECALL_LEVELS]).mean(0)
    texts_an_image = torch.bincount(image_of_text.cpu(), minlength=len(image_ranks)).double()
    summed = torch.zeros(len(image_ranks), dtype=torch.float64).index_add_(0, image_of_text.cpu(), text_side)
    # every text counts once in the mean over texts, whatever the number of captions of its image
    return 100 * (image_side + summed * len(image_ranks) / texts_an_image.sum()) / 2


def bootstrap_means(values: FloatArray, seed: int = 0, draws: int = 2000) -> FloatArray:
    """Means of values (R, n) over resampled repeats and resampled columns: (draws,).

    Repeats are training seeds and columns are test images, so an interval from these is about other seeds and images.
    Differences between resampled repeats are scaled to the variance of new ones (R / (R - 1)); one repeat has none. Where
    means differ by seed far more than by images, a 95 % interval from three seeds covers the truth in only 85 % of cases.
    Two methods drawn with the same seed get the same resamples: their difference is paired.
    """
    generator = np.random.default_rng(seed)
    repeats, columns = values.shape
    centre, scale = values.mean(0), np.sqrt(repeats / max(repeats - 1, 1))
    means = np.empty(draws)
    for i in range(draws):
        resampled = values[generator.integers(0, repeats, repeats)].mean(0)
        means[i] = (centre + scale * (resampled - centre))[generator.integers(0, columns, columns)].mean()
    return means


def interval(draws: FloatArray, coverage: float = 0.95) -> tuple[float, float]:
    """Percentile interval of bootstrap draws (n,)."""
    tail = (1 - coverage) / 2
    return float(np.quantile(draws, tail)), float(np.quantile(draws, 1 - tail))


def auroc(scores: FloatArray, positive: BoolArray) -> float:
    """Probability that a positive scores above a negative, ties by half; nan when one class is empty."""
    if positive.all() or not positive.any():
        return float("nan")
    return float(roc_auc_score(positive, _ranks(scores)))


def average_precision(scores: FloatArray, positive: BoolArray) -> float:
    """Mean precision at each positive in falling order of score, equal scores taken together; nan without positives."""
    return float(average_precision_score(positive, _ranks(scores))) if positive.any() else float("nan")


def _ranks(scores: FloatArray) -> IntArray:
    """Ranks of scores, equal for equal ones: scikit-learn refuses infinite scores."""
    return np.unique(scores, return_inverse=True)[1]


def precision_recall_at(scores: FloatArray, positive: BoolArray, share: float) -> tuple[float, float]:
    """Precision and recall of the highest-scoring `share` of the rows (one at least), equal scores in their order."""
    cut = max(1, round(share * len(positive)))
    hits = int(positive[np.argsort(-scores, kind="stable")[:cut]].sum())
    return hits / cut, hits / max(int(positive.sum()), 1)
