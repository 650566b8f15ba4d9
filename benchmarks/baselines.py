"""What others would keep of a pool, at a size that is given to them: the simple filters, and choices by likeness."""

from collections.abc import Callable

import numpy as np
import torch
from curation import Curation
from torch import Tensor

from influencespace.core.coreset import d2, diversity, herding
from influencespace.core.kmeans import nearest, seed_centroids, unit_rows
from influencespace.core.select import top_fraction
from influencespace.data.buckets import read_columns
from influencespace.data.pair_set import PairSet
from influencespace.estimators.norm_sim import largest_cosine
from influencespace.estimators.similarity import clip_score, random_score
from influencespace.models.fusion import FusionConfig, fuse
from influencespace.stages.proxies.proxies import train_subset

FloatArray = np.ndarray
EARLY = 50
"""Steps of the early proxy, which has learned no wrong pair by heart yet."""


def baselines(curation: Curation, keep: int) -> dict[str, FloatArray]:
    """Weights (n,) of `keep` pairs by each method that knows how many to keep and nothing else of the truth."""
    pool, target = curation.pool, curation.target
    quality = read_columns(curation.folder / "proxy" / "quality.parquet")
    scores = curation.run()
    single = np.full(len(pool), -np.inf)  # a pair that no context can judge goes first
    single[scores.influence["pair"]] = scores.influence["influence_in"]
    X = fuse(*pool.inputs(slice(None)), FusionConfig(), query=None)
    cluster = scores.strata["cluster"]
    images = torch.from_numpy(np.array(pool.table.images))
    wanted = torch.from_numpy(np.array(target.table.images))[np.unique(target.image)]
    chosen = {
        "random": top_fraction(random_score([str(uid) for uid in pool.column("uid")]), keep),
        "clip_score": top_fraction(pool.clip_score, keep),
        "early_clip_score": top_fraction(early_clip_score(curation), keep),
        "proxy_clip_score": top_fraction(quality["clip_in"], keep),
        "neg_clip_loss": top_fraction(quality["neg_clip_in"], keep),
        "norm_sim": top_fraction(largest_cosine(images, wanted).double().numpy()[pool.image], keep),
        "image_based": top_fraction(image_based(images, wanted)[pool.image], keep),
        "single_pair_influence": top_fraction(single, keep),
        "diversity": within_clusters(lambda rows, size: diversity(X[rows], size), cluster, keep),
        "coreset": within_clusters(lambda rows, size: herding(X[rows], size), cluster, keep),
        "d2": within_clusters(
            lambda rows, size: d2(X[rows], shifted(pool.clip_score[rows]), size), cluster, keep
        ),
        "semdedup": top_fraction(-most_alike(X, cluster), keep),
    }
    return {name: mask.astype(np.float64) for name, mask in chosen.items()}


def early_clip_score(curation: Curation) -> FloatArray:
    """CLIP score by a proxy of a few steps on the whole pool."""
    pool: PairSet = curation.pool
    trained = train_subset(pool, np.ones(len(pool)), curation.config.train, EARLY, 0)
    with torch.no_grad():
        return clip_score(*trained.heads(*pool.inputs(slice(None))))


def image_based(images: Tensor, wanted: Tensor, clusters: int = 100) -> FloatArray:
    """How much more often the target than the pool falls into the cluster of an image (Gadre et al. 2023): (Ni,)."""
    C = seed_centroids(images, min(clusters, len(images)), 0)
    for _ in range(10):
        index = nearest(images, C)[0]
        C = unit_rows(torch.zeros_like(C).index_add_(0, index, images))
    own = nearest(images, C)[0].numpy()
    of_target = np.bincount(nearest(wanted, C)[0].numpy(), minlength=len(C))
    share: FloatArray = of_target / np.maximum(np.bincount(own, minlength=len(C)), 1)
    found: FloatArray = share[own]
    return found


def within_clusters(
    choose: Callable[[np.ndarray, int], np.ndarray], cluster: np.ndarray, keep: int
) -> np.ndarray:
    """The same share of every cluster, chosen within it: these methods compare all pairs of rows."""
    kept = np.zeros(len(cluster), bool)
    for label in np.unique(cluster):
        rows = np.flatnonzero(cluster == label)
        kept[rows[choose(rows, max(1, round(keep / len(cluster) * len(rows))))]] = True
    return kept


def most_alike(X: Tensor, cluster: np.ndarray) -> FloatArray:
    """Cosine with the most alike row of the cluster that lies farther out, as SemDeDup removes at a falling threshold: (n,)."""
    found = np.full(len(X), -1.0)
    for label in np.unique(cluster):
        rows = np.flatnonzero(cluster == label)
        members = X[torch.from_numpy(rows)]
        centroid = unit_rows(members.mean(0, keepdim=True))[0]
        order = torch.argsort(members @ centroid, stable=True)
        S = (members[order] @ members[order].T).triu(1)
        S[torch.tril_indices(len(S), len(S)).unbind()] = -1.0
        found[rows[order.numpy()]] = S.amax(0).double().numpy()
    return found


def shifted(score: FloatArray) -> FloatArray:
    """Scores that are nowhere negative, as D2 pruning wants them."""
    lifted: FloatArray = (score - score.min()).astype(np.float64)
    return lifted
