"""Likeness within clusters: SemDeDup, and any choice of the same share of every cluster."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from influencespace.core.arrays import BoolArray, FloatArray, IntArray
from influencespace.core.kmeans import unit_rows


def semdedup(X: Tensor, cluster: IntArray, threshold: float) -> BoolArray:
    """What is kept when pairs of cosine above `threshold` within a cluster (n,) are one: (n,) (Abbas et al. 2023)."""
    kept: BoolArray = most_alike(X, cluster) <= threshold
    return kept


def most_alike(X: Tensor, cluster: IntArray) -> FloatArray:
    """Cosine with the most alike row of the cluster that lies farther out, as SemDeDup removes at a falling threshold: (n,).

    Rows X (n, d) are of unit length. Of duplicates the row farthest from the centroid has -1, as in the paper. Memory: the
    largest cluster's rows squared.
    """
    result = np.full(len(X), -1.0)
    for label in np.unique(cluster):
        rows = np.flatnonzero(cluster == label)
        members = X[torch.from_numpy(rows).to(X.device)]
        order = torch.argsort(members @ unit_rows(members.mean(0, keepdim=True))[0], stable=True)
        S = members[order] @ members[order].T
        S[
            torch.tril_indices(len(S), len(S)).unbind()
        ] = -1.0  # a row is compared with those that lie farther out
        result[rows[order.cpu().numpy()]] = S.amax(0).double().cpu().numpy()
    return result


def within_clusters(
    choose: Callable[[IntArray, int], IntArray], cluster: IntArray, share: float
) -> BoolArray:
    """The same share of every cluster, chosen within it by (rows, size): for methods that compare all pairs of rows."""
    kept = np.zeros(len(cluster), bool)
    for label in np.unique(cluster):
        rows = np.flatnonzero(cluster == label)
        kept[rows[choose(rows, max(1, round(share * len(rows))))]] = True
    return kept
