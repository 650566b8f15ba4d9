"""SemDeDup against its definition."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.methods.alike import semdedup
from influencespace.core.kmeans import unit_rows

seeds = st.integers(0, 10_000)


def rows(n: int, seed: int, d: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return unit_rows(torch.randn(n, d, generator=generator, dtype=torch.float64))


@given(n=st.integers(2, 20), copies=st.integers(1, 3), seed=seeds)
def test_semdedup_keeps_one_of_exact_copies(n: int, copies: int, seed: int) -> None:
    X = rows(n, seed).repeat(copies, 1)
    kept = semdedup(X, np.zeros(len(X), np.int64), threshold=1 - 1e-9)
    assert np.bincount(np.arange(len(X)) % n, weights=kept).tolist() == [1] * n


@given(seed=seeds, threshold=st.floats(0.3, 0.99))
def test_semdedup_is_its_definition(seed: int, threshold: float) -> None:
    """Dropped is who has a near one farther from the centroid; clusters do not meet."""
    X = rows(30, seed)
    cluster = np.random.default_rng(seed).integers(0, 3, 30)
    kept = semdedup(X, cluster, threshold)
    for i in range(30):
        members = X[cluster == cluster[i]]
        centre = unit_rows(members.mean(0, keepdim=True))[0]
        # rows are ordered by closeness to the centroid: one that lies farther out replaces those nearer
        farther = [
            j
            for j in range(30)
            if cluster[j] == cluster[i] and j != i and float(X[j] @ centre) < float(X[i] @ centre)
        ]
        assert kept[i] == (not any(float(X[i] @ X[j]) > threshold for j in farther))
