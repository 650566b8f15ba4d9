"""How true the estimators are to retraining, on a proxy over real pairs: every line of the table, in one run.

Parts: exact leave-one-out, the linear datamodeling score over half subsets, detection of planted wrong captions,
deletion, and the price of a score. Truth is always a proxy that was really trained again. Needs the real data; see
docs/benchmarks.md.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from common import ESTIMATING, TRAINING, Benchmark, cached
from deletion import deletion_part
from detection import detection_part, measured, synthetic_detection_part
from scipy.stats import spearmanr
from study import (
    BLIND,
    IN_UNITS,
    OURS,
    RATES,
    FloatArray,
    Study,
    table,
    target_loss,
    tuned,
)
from torch import Tensor
from torch.func import functional_call, grad, vmap
from world import World, measure_on_real_pairs

from influencespace.core.batches import training_batches
from influencespace.core.contrastive import added_loss, contrastive
from influencespace.core.metrics import interval
from influencespace.data.images import decode_image
from influencespace.data.readers import list_shards, read_shard
from influencespace.data.schema import Sample
from influencespace.estimators.grad_dot import GradDot
from influencespace.estimators.influence import NegativeBatch
from influencespace.estimators.problem import fitted, per_sample_gradients
from influencespace.estimators.proxy_problem import batch_of, rows_of
from influencespace.estimators.table import TABLE
from influencespace.models.encoders import load_encoder
from influencespace.models.heads import Heads, initial_heads
from influencespace.models.projected import reduced_space
from influencespace.models.training import HeadsConfig, train_heads


def leave_one_out(study: Study, seed: int) -> dict[str, Any]:
    """Change of the target loss when each pair is left out of its batches and the proxy trained again."""
    problem = study.problem(seed)
    path = problem.trajectory
    assert path is not None
    whole = target_loss(problem, path)
    truth = [
        target_loss(problem, replace(path, batches=[rows[rows != pair] for rows in path.batches])) - whole
        for pair in range(problem.pool_size)
    ]
    return {"truth": truth, "target_loss": whole}


def all_scores(study: Study, seed: int) -> dict[str, Any]:
    """Of every pair by every estimator, other forms included."""
    problem = study.problem(seed)
    return {name: score(problem).tolist() for name, score in table().items()}


def leave_one_out_part(bench: Benchmark, world: World, quick: bool) -> None:
    """Pearson and slope with exact leave-one-out retraining, SGD and AdamW, single proxies and their ensemble."""
    config = HeadsConfig(dimension=64, steps=20 if quick else 60, batch_size=32)
    for rule in RATES:
        study = tuned(
            Study(
                world=world,
                pairs=40 if quick else 200,
                wrong=0.3,
                config=config,
                rule=rule,
                dtype=torch.float64,
            )
        )
        rate = study.config.learning_rate
        truths = np.array(
            [
                cached(world.cache, ["loo", study.key, seed], partial(leave_one_out, study, seed), TRAINING)[
                    "truth"
                ]
                for seed in bench.seeds
            ]
        )
        runs = [
            cached(world.cache, ["all scores", study.key, seed], partial(all_scores, study, seed), ESTIMATING)
            for seed in bench.seeds
        ]
        bench.row(
            estimator="(retraining, from seed to seed)",
            rule=f"{rule}, {rate:g}",
            pearson=reliability(truths),
            lowest=None,
            ensemble=None,
            slope=None,
        )
        for name in runs[0]:
            found = np.array([run[name] for run in runs])
            single = [float(np.corrcoef(a, b)[0, 1]) for a, b in zip(found, truths)]
            # a pair's weight in the mean over the pool is 1 / N
            predicted = found / study.size if name == "ecif, early stopping" else found
            slope = float(np.polyfit(predicted.mean(0), truths.mean(0), 1)[0]) if name in IN_UNITS else None
            ensemble = float(np.corrcoef(found.mean(0), truths.mean(0))[0, 1])
            bench.row(
                estimator=name,
                rule=f"{rule}, {rate:g}",
                pearson=float(np.mean(single)),
                lowest=min(single),
                ensemble=ensemble,
                slope=slope,
            )
            if name in ("ecif", "ecif, early stopping", "unrolled", "unrolled, whole"):
                bench.target(
                    name=f"leave-one-out, {rule}, Pearson of `{name}` (ensemble; lowest and highest of single proxies)",
                    target="at least 0.97",
                    measured=ensemble,
                    interval=(min(single), max(single)),
                    reached=ensemble >= 0.97,
                )
            if slope is not None:
                bench.target(
                    name=f"leave-one-out, {rule}, slope of the truth over `{name}`",
                    target="0.8 to 1.2",
                    measured=slope,
                    reached=0.8 <= slope <= 1.2,
                )


def reliability(repeats: FloatArray) -> float:
    """Mean Pearson between two repeats (R, n); nan for one."""
    pairs = [np.corrcoef(repeats[i], repeats[j])[0, 1] for i in range(len(repeats)) for j in range(i)]
    return float(np.mean(pairs)) if pairs else float("nan")


GROUPS = 4  # of the target's images, each an output whose rise and fall is to be foretold
CHUNK = 10  # subsets that are one cached result


def half_subsets(pairs: int, count: int) -> FloatArray:
    """Random halves (count, N) of 0 and 1."""
    generator = np.random.default_rng(2024)
    return np.stack([generator.permutation(pairs) < pairs // 2 for _ in range(count)]).astype(np.float64)


def subset_losses(study: Study, subsets: FloatArray, seed: int) -> dict[str, Any]:
    """Loss of each target group of a proxy trained on each subset, with batches of its own: (S, G)."""
    images, texts = study.pool.inputs
    config = study.config
    groups = [study.target_group(g, GROUPS) for g in range(GROUPS)]
    found = []
    for weights in subsets:
        heads = initial_heads(images.shape[1], texts.shape[1], config.dimension, seed)
        batches = training_batches(weights, study.pool.image, config.batch_size, config.steps, seed)
        trained = train_heads(partial(rows_of, study.pool.inputs), batches, heads, config).heads
        found.append([group_loss(trained, group, config) for group in groups])
    return {"losses": found}


@torch.no_grad()
def group_loss(heads: Heads, group: NegativeBatch, config: HeadsConfig) -> float:
    u, t = heads(*group.inputs)
    return float(config.objective.terms(u, t).mean())


def group_scores(study: Study, seed: int, group: int) -> dict[str, Any]:
    """Scores of the pool for one group of the target; the blind ones once."""
    problem = study.problem(seed, study.target_group(group, GROUPS))
    names = [name for name in measured() if group == 0 or name not in BLIND]
    return {name: table()[name](problem).tolist() for name in names}


def lds_part(bench: Benchmark, world: World, quick: bool) -> None:
    """Rank correlation, over random halves of the pool, of the sum of scores with the loss of proxies trained on them."""
    config = HeadsConfig(batch_size=64, steps=20 if quick else 100)
    study = tuned(Study(world=world, pairs=200 if quick else 400, wrong=0.3, config=config))
    subsets = half_subsets(study.size, 20 if quick else 120)
    parts = [
        [
            cached(
                world.cache,
                ["subsets", study.key, len(subsets), start, seed],
                partial(subset_losses, study, subsets[start : start + CHUNK], seed),
                TRAINING,
            )["losses"]
            for start in range(0, len(subsets), CHUNK)
        ]
        for seed in bench.seeds
    ]
    losses = np.array([np.concatenate(part) for part in parts])  # (seeds, subsets, groups)
    found = [
        [
            cached(
                world.cache,
                ["scores", study.key, seed, g, GROUPS],
                partial(group_scores, study, seed, g),
                ESTIMATING,
            )
            for g in range(GROUPS)
        ]
        for seed in bench.seeds
    ]
    truth = -losses.mean(0)
    others = [-np.delete(losses, seed, 0).mean(0) for seed in range(len(losses))]
    bench.row(
        estimator="(one seed's proxies against the others')",
        lds=float(np.mean([lds(-one, rest) for one, rest in zip(losses, others)])),
        interval=None,
        single_proxy=None,
    )
    resampled = [np.random.default_rng(d).integers(0, len(subsets), len(subsets)) for d in range(500)]
    results: dict[str, tuple[float, FloatArray]] = {}
    for name in measured():
        by_seed = np.array(
            [[run[0 if name in BLIND else g][name] for g in range(GROUPS)] for run in found]
        )  # (seeds, groups, N)
        ensemble = subsets @ np.nan_to_num(by_seed.mean(0)).T  # (subsets, groups)
        value = lds(ensemble, truth)
        singles = [lds(subsets @ np.nan_to_num(one).T, truth) for one in by_seed]
        draws = np.array([lds(ensemble[rows], truth[rows]) for rows in resampled])
        results[name] = value, draws
        bench.row(
            estimator=name,
            lds=value,
            interval=list(interval(draws)),
            single_proxy=float(np.mean(singles)),
        )
    best = max((name for name in TABLE if name not in OURS), key=lambda name: results[name][0])
    low, high = interval(results["ecif"][1] - results[best][1])
    bench.target(
        name=f"LDS of ecif minus that of the best peer method, {best}",
        target="surely above 0",
        measured=results["ecif"][0] - results[best][0],
        interval=(low, high),
        reached=low > 0,
    )


def lds(predicted: FloatArray, truth: FloatArray) -> float:
    """Spearman over subsets, mean over outputs: two (S, G)."""
    return float(np.mean([spearmanr(predicted[:, g], truth[:, g]).statistic for g in range(truth.shape[1])]))


def speed_part(bench: Benchmark, world: World, quick: bool) -> None:
    """Seconds a pair of scoring through heads, beside per-sample gradients by a loop, by vmap, and embedding by the towers.

    All score along the target gradient against the same two contexts.
    """
    study = Study(world=world, pairs=None, wrong=0.3, config=HeadsConfig(steps=10))
    whole = study.problem(0)
    problem = replace(whole, bank=whole.bank[:2])
    scorer = fitted(GradDot().fit(problem), lambda statistic: None)
    pool = batch_of(study.pool)
    count = 64 if quick else 256
    inside = np.concatenate([context.image for context in problem.bank])
    few = batch_of(study.pool, np.setdiff1d(np.arange(study.size), inside)[:count])
    v = problem.space.unflatten(problem.target_gradient)

    objective = contrastive(problem.objective, "a bank")

    def added(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        u, t = functional_call(problem.space.proxy, parameters, (x[None], y[None]))
        parts = []
        for context in problem.bank:
            cu, ct = functional_call(problem.space.proxy, parameters, context.inputs)
            parts.append(added_loss(objective, u, t, cu, ct, problem.batch_size)[0])
        return torch.stack(parts).mean()

    def one(x: Tensor, y: Tensor) -> Tensor:
        tree = grad(added)(problem.space.parameters, x, y)
        return torch.stack([(tree[name] * v[name]).sum() for name in v]).sum()

    def loop() -> None:
        for x, y in zip(*few.inputs):
            one(x, y)

    projected = per_sample_gradients(problem, reduced_space(problem.space, 256, 0).space)
    seconds = {
        "scoring, tangents through the heads": best_of(lambda: scorer(pool), 3) / len(pool),
        "per-sample gradients, a loop": best_of(loop, 2) / count,
        "per-sample gradients, vmap": best_of(lambda: vmap(one, chunk_size=16)(*few.inputs), 2) / count,
        "projected per-sample gradients, by hand (`models/gradients.py`)": best_of(
            lambda: projected(few.inputs, few.image), 2
        )
        / count,
        "embedding by the given towers": embedding_seconds(world, 16 if quick else 128),
    }
    for name, value in seconds.items():
        bench.row(what=name, milliseconds_a_pair=1000 * value)
    scoring = seconds["scoring, tangents through the heads"]
    share = scoring / seconds["embedding by the given towers"]
    bench.target(
        name="scoring through heads over stored embeddings, as a share of embedding",
        target="at most 0.1",
        measured=share,
        reached=share <= 0.1,
    )
    routes = [name for name in seconds if "per-sample" in name and "loop" not in name]
    quickest = min(routes, key=lambda name: seconds[name])
    for what, least in (("per-sample gradients, a loop", 8.0), (quickest, 1.5)):
        ratio = seconds[what] / scoring
        bench.target(
            name=f"time of {what} over that of scoring",
            target=f"at least {least}",
            measured=ratio,
            reached=ratio >= least,
        )


def best_of(work: Callable[[], Any], times: int) -> float:
    """Seconds of the quickest of some calls, the first to warm up."""
    work()
    found = []
    for _ in range(times):
        began = time.monotonic()
        work()
        found.append(time.monotonic() - began)
    return min(found)


def embedding_seconds(world: World, pairs: int) -> float:
    """Seconds a pair of the given towers over pictures and captions that are decoded already."""
    encoder = load_encoder(str(world.data.parent / "models" / "mobilenetv2-minilm"))
    (shard, *_) = list_shards(str(world.data / "flickr8k" / "dev" / "00000.tar"))
    samples = [sample for sample in islice(read_shard(shard), pairs) if isinstance(sample, Sample)]
    images = encoder.preprocess_images([decode_image(sample.image) for sample in samples])
    tokens = encoder.tokenize([sample.captions[0] for sample in samples])[0]

    def work() -> None:
        for part in torch.split(images, 32):
            encoder.encode_image(part)
        encoder.encode_text(tokens)

    return best_of(work, 2) / len(samples)


PARTS = {
    "leave_one_out": leave_one_out_part,
    "lds": lds_part,
    "detection": detection_part,
    "synthetic_detection": synthetic_detection_part,
    "deletion": deletion_part,
    "speed": speed_part,
}


if __name__ == "__main__":
    sys.exit(measure_on_real_pairs(__doc__ or "", "attribution", ((0, 1), (0, 1, 2)), PARTS))
