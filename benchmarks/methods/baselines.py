"""What others would keep of a pool, at a size that is given to them: the simple filters, and choices by likeness."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from benchmarks.curation.curation import Curation
from benchmarks.data.distinct import Distinct
from benchmarks.methods.alike import most_alike, within_clusters
from influencespace.core.arrays import FloatArray, IntArray
from influencespace.core.coreset import d2, diversity, herding
from influencespace.core.kmeans import nearest, seed_centroids, unit_rows
from influencespace.core.select import top_fraction
from influencespace.estimators.filters import clip_score
from influencespace.estimators.norm_sim import largest_cosine
from influencespace.models.fusion import FusionConfig, fuse
from influencespace.stages.proxies.train_many import Uniform, train

EARLY = 50
"""Steps of the early proxy, which has learned no wrong pair by heart yet."""


def baselines(curation: Curation, keep: int) -> dict[str, FloatArray]:
    """Weights (n,) of `keep` pairs by each method that knows how many to keep and nothing else of the truth."""
    pool, target = curation.pool, curation.target
    influence, cluster = curation.evidence.influence, curation.strata["cluster"]
    single = np.full(len(pool), -np.inf)  # a pair that no negative batch can judge is removed first
    single[influence["pair"]] = influence["influence_in"]
    X = fuse(*pool.inputs(slice(None)), FusionConfig(), query=None)
    shown = Distinct(pool)
    images, wanted = torch.from_numpy(shown.images), torch.from_numpy(Distinct(target).images)
    shifted = pool.clip_score - pool.clip_score.min()  # nowhere negative, as D2 pruning wants scores
    share = keep / len(pool)
    scores = {
        "early_clip_score": early_clip_score(curation),
        "norm_sim": largest_cosine(images, wanted).double().numpy()[shown.image],
        "image_based": image_based(images, wanted)[shown.image],
        "single_pair_influence": single,
        "semdedup": -most_alike(X, cluster),
    }
    chosen = {name: top_fraction(score, keep) for name, score in scores.items()} | {
        "diversity": within_clusters(lambda rows, size: diversity(X[rows], size), cluster, share),
        "coreset": within_clusters(lambda rows, size: herding(X[rows], size), cluster, share),
        "d2": within_clusters(
            lambda rows, size: d2(X[rows], shifted[rows].astype(np.float64), size), cluster, share
        ),
    }
    return curation.filters(keep) | {name: mask.astype(np.float64) for name, mask in chosen.items()}


def early_clip_score(curation: Curation) -> FloatArray:
    """CLIP score by a proxy of a few steps on the whole pool."""
    early = replace(curation.config.proxy.train, steps=EARLY)
    trained = train(curation.pool, Uniform(), early, 0)
    with torch.no_grad():
        return clip_score(*trained.heads(*curation.pool.inputs(slice(None))))


def image_based(images: Tensor, wanted: Tensor, clusters: int = 100) -> FloatArray:
    """How much more often the target than the pool falls into the cluster of an image (Gadre et al. 2023): (Ni,)."""
    C = seed_centroids(images, min(clusters, len(images)), 0)
    for _ in range(10):
        index = nearest(images, C)[0]
        C = unit_rows(torch.zeros_like(C).index_add_(0, index, images))
    own: IntArray = nearest(images, C)[0].numpy()
    of_target = np.bincount(nearest(wanted, C)[0].numpy(), minlength=len(C))
    share: FloatArray = of_target / np.maximum(np.bincount(own, minlength=len(C)), 1)
    result: FloatArray = share[own]
    return result
