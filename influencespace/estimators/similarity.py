"""Scores that need no gradient: CLIP score and negCLIPLoss, the strongest simple filters, and random by uid hash."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FloatArray = NDArray[np.float64]


def clip_score(u: Tensor, t: Tensor) -> FloatArray:
    """Cosine of image and caption: unit u, t (n, d) -> (n,) (Hessel et al. 2021)."""
    return (u * t).sum(-1).double().cpu().numpy()


def neg_clip_loss(
    u: Tensor, t: Tensor, contexts: Sequence[tuple[Tensor, Tensor]], scale: float
) -> FloatArray:
    """Minus a pair's contrastive loss, averaged over recorded contexts: unit u, t (n, d) -> (n,), in units of the loss.

    The normaliser runs over the context alone, so that no pair's own caption counts (Wang et al. 2024, negCLIPLoss).
    """
    own = scale * (u * t).sum(-1)
    normaliser = torch.zeros_like(own, dtype=torch.float64)
    for context_u, context_t in contexts:
        images = (scale * u @ context_t.T).logsumexp(1)
        texts = (scale * t @ context_u.T).logsumexp(1)
        normaliser += (images + texts).double() / 2
    return (own.double() - normaliser / len(contexts)).cpu().numpy()


def random_score(uids: Sequence[str], seed: int = 0) -> FloatArray:
    """Uniform in [0, 1) by a hash of uid and seed: the same for a pair in any set, order or shard."""
    salt = str(seed).encode()
    digests = (hashlib.blake2b(uid.encode(), digest_size=8, salt=salt[:16]).digest() for uid in uids)
    return np.fromiter((int.from_bytes(d, "big") / 2**64 for d in digests), np.float64, len(uids))
