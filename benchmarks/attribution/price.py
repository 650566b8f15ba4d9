"""The part `speed` of attribution: what a score costs beside per-sample gradients and beside embedding."""

from dataclasses import replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from benchmarks import wanted
from benchmarks.attribution.attribution_setup import Study
from benchmarks.bench import Bench, quickest
from benchmarks.data.datasets import Dataset
from influencespace.core.contrastive import added_loss, contrastive
from influencespace.data.images import decode_image
from influencespace.data.readers import list_shards, read_shard
from influencespace.data.schema import Sample
from influencespace.estimators.grad_dot import GradDot
from influencespace.estimators.problem import fitted, per_sample_gradients
from influencespace.estimators.proxy_problem import batch_of
from influencespace.models.encoders import load_encoder
from influencespace.models.projected import reduced_space
from influencespace.models.training import HeadsConfig

SCORING, EMBEDDING = "scoring, tangents through the heads", "embedding by the pretrained towers"
LOOP = "per-sample gradients, a loop"
DEV = "flickr8k/dev/00000.tar"


def speed(bench: Bench) -> None:
    """Seconds a pair of scoring through heads, beside per-sample gradients by a loop, by vmap, and embedding by the towers.

    All score along the target gradient against the same two negative batches.
    """
    dataset = Dataset.of(bench)
    study = Study(dataset=dataset, pairs=None, wrong=0.3, config=HeadsConfig(steps=10))
    whole = study.problem(0)
    problem = replace(whole, bank=whole.bank[:2])
    scorer = fitted(GradDot().fit(problem), lambda statistic: None)
    pool, count = batch_of(study.pool), bench.pick(256, 64)
    inside = np.concatenate([batch.image for batch in problem.bank])
    few = batch_of(study.pool, np.setdiff1d(np.arange(study.size), inside)[:count])
    v, space = problem.space.unflatten(problem.target_gradient), problem.space
    objective = contrastive(problem.objective, "a bank")

    def added(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        u, t = functional_call(space.proxy, parameters, (x[None], y[None]))
        among = [functional_call(space.proxy, parameters, batch.inputs) for batch in problem.bank]
        return torch.stack(
            [added_loss(objective, u, t, bu, bt, problem.batch_size)[0] for bu, bt in among]
        ).mean()

    def one(x: Tensor, y: Tensor) -> Tensor:
        tree = grad(added)(space.parameters, x, y)
        return torch.stack([(tree[name] * v[name]).sum() for name in v]).sum()

    def loop() -> None:
        for x, y in zip(*few.inputs):
            one(x, y)

    projected = per_sample_gradients(problem, reduced_space(space, 256, 0).space)
    seconds = {
        SCORING: quickest(lambda: scorer(pool), 3) / len(pool),
        LOOP: quickest(loop, 2) / count,
        "per-sample gradients, vmap": quickest(lambda: vmap(one, chunk_size=16)(*few.inputs), 2) / count,
        "projected per-sample gradients, by hand (`models/gradients.py`)": quickest(
            lambda: projected(few.inputs, few.image), 2
        )
        / count,
        EMBEDDING: embedding_seconds(dataset, bench.pick(128, 16)),
    }
    for name, value in seconds.items():
        bench.row(what=name, milliseconds_a_pair=1000 * value)
    share = seconds[SCORING] / seconds[EMBEDDING]
    bench.target(
        "scoring through heads over stored embeddings, as a share of embedding", wanted.at_most(0.1), share
    )
    routes = [name for name in seconds if "per-sample" in name and "loop" not in name]
    best = min(routes, key=lambda name: seconds[name])
    for what, bound in ((LOOP, 8.0), (best, 1.5)):
        ratio = seconds[what] / seconds[SCORING]
        bench.target(f"time of {what} over that of scoring", wanted.at_least(bound), ratio)


def embedding_seconds(dataset: Dataset, pairs: int) -> float:
    """Seconds a pair of the pretrained towers over pictures and captions that are decoded already."""
    encoder = load_encoder(dataset.encoder)
    (shard, *_) = list_shards(str(dataset.data / DEV))
    samples = [sample for sample in islice(read_shard(shard), pairs) if isinstance(sample, Sample)]
    images = encoder.preprocess_images([decode_image(sample.image) for sample in samples])
    tokens = encoder.tokenize([sample.captions[0] for sample in samples])[0]

    def work() -> None:
        for part in torch.split(images, 32):
            encoder.encode_image(part)
        encoder.encode_text(tokens)

    return quickest(work, 2) / len(samples)
