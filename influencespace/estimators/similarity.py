"""Scores that need no gradient: CLIP score and negCLIPLoss, the strongest simple filters, and random by uid hash."""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from influencespace.estimators.problem import mean_of_known

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def clip_score(u: Tensor, t: Tensor) -> FloatArray:
    """Cosine of image and caption: unit u, t (n, d) -> (n,) (Hessel et al. 2021)."""
    return (u * t).sum(-1).double().cpu().numpy()


def neg_clip_loss(
    u: Tensor,
    t: Tensor,
    image: IntArray,
    contexts: Sequence[tuple[Tensor, Tensor, IntArray]],
    scale: float,
) -> FloatArray:
    """Minus a pair's contrastive loss, averaged over recorded contexts: unit u, t (n, d) -> (n,), in units of the loss.

    Contexts are unit embeddings of images and texts (M, d) and their images (M,). The normaliser runs over the context
    alone, and contexts that hold the pair's image are left out, so that no pair's own caption counts; nan where all do.
    It is InfoNCE's, whatever the loss was (Wang et al. 2024, negCLIPLoss).
    """
    own = scale * (u * t).sum(-1)
    found = []
    for context_u, context_t, context_image in contexts:
        images = (scale * u @ context_t.T).logsumexp(1)
        texts = (scale * t @ context_u.T).logsumexp(1)
        loss = (images + texts).double() / 2 - own.double()
        found.append(np.where(np.isin(image, context_image), np.nan, -loss.cpu().numpy()))
    return mean_of_known(np.stack(found, 1))


def random_score(uids: Sequence[str], seed: int = 0) -> FloatArray:
    """Uniform in [0, 1) by a hash of uid and seed: the same for a pair in any set, order or shard."""
    salt = str(seed).encode()
    digests = (hashlib.blake2b(uid.encode(), digest_size=8, salt=salt[:16]).digest() for uid in uids)
    return np.fromiter((int.from_bytes(d, "big") / 2**64 for d in digests), np.float64, len(uids))
