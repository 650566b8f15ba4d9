"""The job and the scores as Python functions: what the public API adds to the modules below it."""

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from influencespace import pipeline
from influencespace.config import RunConfig, as_tree, load_config
from influencespace.core.arrays import FloatArray
from influencespace.data.buckets import buckets_of
from influencespace.data.locations import alone_in, folder_of
from influencespace.data.mirror import is_stored, mirror_root, put_folder
from influencespace.engine.local import Engine, LocalEngine
from influencespace.errors import InputError
from influencespace.estimators import problem as contract
from influencespace.estimators.influence import NegativeBatch
from influencespace.estimators.problem import Estimator
from influencespace.estimators.proxy_problem import batch_of, proxy_problem
from influencespace.models.training import HeadsConfig
from influencespace.planning import Plan
from influencespace.planning import plan as planned
from influencespace.planning.cluster import parse_cluster, parse_pairs
from influencespace.run import Run
from influencespace.stages.scoring.scoring import make_estimator

Shards = str | Path | Sequence[str | Path]
Embeddings = ArrayLike | Tensor
AT_ONCE = 4096  # pairs scored at once; no score depends on it
FLAGS = {
    "data": "data.pool",
    "target": "data.target",
    "test": "data.test",
    "encoder": "embed.encoder",
    "embeddings": "data.embeddings",
}
"""What the command line and `curate` call these settings."""


def resolve(
    config: RunConfig | Path | str | None, settings: Mapping[str, Any], flags: Mapping[str, Any]
) -> RunConfig:
    """A config, or a file of one, or the defaults, changed by dotted settings and then by those of FLAGS that are not None.

    Raises InputError for a file, a setting or a value that cannot be used.
    """
    chosen = {FLAGS[name]: _plain(value) for name, value in flags.items() if value is not None}
    if isinstance(config, RunConfig):
        return load_config(None, as_tree(config) | dict(settings) | chosen)
    return load_config(config, dict(settings) | chosen)


def _plain(value: Any) -> Any:
    """Paths as text, alone or in a list."""
    if isinstance(value, str | Path):
        return str(value)
    return [str(one) for one in value]


def curate(
    config: RunConfig | Path | str | None = None,
    *,
    out: Path | str,
    data: Shards | None = None,
    target: Shards | None = None,
    test: Shards | None = None,
    encoder: str | Path | None = None,
    embeddings: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    engine: Literal["ray", "local"] = "ray",
    address: str | None = None,
) -> Run:
    """Curate a pool of image-text pairs into `out`, as `influencespace run` does; the finished Run.

    `data`, `target` and `test` are paths, folders, globs or URLs of shards; `encoder` is a folder or hub id of a dual encoder;
    `embeddings` are those of the pool that exist already; `out` is a folder, or a URL such as s3://bucket/run. `config` is a
    RunConfig or a YAML file, `settings` change it by dotted names. "ray" works on the cluster at `address` (or RAY_ADDRESS) or on
    a new local Ray, "local" in a plain loop in this process, with the same result. The same call continues what is there. Raises
    InputError for data or settings that cannot be used, and where another run works in the folder.

        run = curate(data="pairs", target="target", test="test", encoder="my-clip", out="runs/mine", settings={"seed": 1})
        table = run.curated()
    """
    flags = {"data": data, "target": target, "test": test, "encoder": encoder, "embeddings": embeddings}
    resolved = resolve(config, settings or {}, flags)
    folder = folder_of(out, "--out").expanduser().absolute()
    pipeline.check(resolved)
    with (
        alone_in(folder),
        start(engine, address) as started,
    ):  # what is refused is refused before Ray starts
        try:
            return pipeline.curate(resolved, folder, started)
        finally:
            started.keep_logs(folder / "logs")
            with suppress(OSError, InputError):
                put_folder(folder / "logs")


def plan(
    config: RunConfig | Path | str | None = None,
    *,
    out: Path | str = ".",
    data: Shards | None = None,
    target: Shards | None = None,
    test: Shards | None = None,
    encoder: str | Path | None = None,
    embeddings: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    limit: int | None = None,
    cluster: str | None = None,
    pairs: int | str | None = None,
    engine: Literal["ray", "local"] = "ray",
    address: str | None = None,
) -> Plan:
    """What `curate` with the same arguments will need, before it runs: pairs, bytes, memory and seconds of each stage.

    Slices go through all stages beside the folder `out`, and are removed again; what they took is scaled. The larger has at most
    `limit` pairs: 20,000, or for pools above a million a fiftieth, up to 100,000. Of pictures as many are embedded as twenty
    seconds allow, and the rest is made of their embeddings. With a limit of 0 the data are only counted, without Ray. `pairs`
    plans for so many like those that are there, such as "12.8M"; `cluster` for other machines, such as
    "4x(16 cores, 64 GB, 1xA10G)", whose GPUs are assumed and not measured. Raises InputError for what `curate` would refuse, and
    for files or workers that certainly do not fit.

        needs = plan(data="pairs", target="target", test="test", encoder="my-clip", limit=0)
        seconds = [cost.seconds for cost in needs.costs]
    """
    flags = {"data": data, "target": target, "test": test, "encoder": encoder, "embeddings": embeddings}
    resolved = resolve(config, settings or {}, flags)
    machines = None if cluster is None else parse_cluster(cluster)
    count = None if pairs is None else parse_pairs(str(pairs))
    # what a run in a store keeps here lies in the mirror
    disk = folder_of(out, "--out")
    disk = mirror_root().parent if is_stored(disk) else disk
    with start(
        engine if limit != 0 or address or "RAY_ADDRESS" in os.environ else "local", address
    ) as started:
        return planned(resolved, limit, started, disk, cluster=machines, pairs=count)


def start(engine: Literal["ray", "local"], address: str | None) -> AbstractContextManager[Engine]:
    """The engine of a name; raises InputError for another name."""
    if engine == "local":
        return nullcontext(LocalEngine())
    if engine != "ray":
        raise InputError(f"engine is {engine!r}: give 'ray' or 'local'")
    from influencespace.engine.session import start_ray

    return start_ray(address)


def score(
    images: Embeddings,
    texts: Embeddings,
    target_images: Embeddings,
    target_texts: Embeddings,
    *,
    image_ids: ArrayLike | None = None,
    target_image_ids: ArrayLike | None = None,
    estimator: str | Estimator = "ecif",
    options: Mapping[str, Any] | None = None,
    config: HeadsConfig | None = None,
    seed: int = 0,
) -> FloatArray:
    """Influence of n pairs with stored embeddings on the loss of m target pairs: (n, D), (n, E), (m, D), (m, E) -> (n,).

    A small proxy is trained on the pairs by `config`, and scored by an `estimator` of docs/estimators.md, with its `options`, or
    by an object of the Estimator protocol. Higher is more worth keeping: positive scores predict that the target loss falls where
    the pair gets more weight, negative ones that it rises; nan where no negative batch can judge a pair. Rows are scaled to unit
    length. `image_ids` (n,) say which pairs share an image (without them, none do): they are never negatives of each other.
    Raises InputError for shapes that do not fit, rows that are zero or not finite, fewer than four images, and an estimator
    that there is not.

        worth = score(images, texts, target_images, target_texts)
        best = worth.argsort()[::-1][:1000]

    Source of the default, ECIF: arXiv 2411.11667.
    """
    pool = _pairs(images, texts, image_ids, "")
    target = _pairs(target_images, target_texts, target_image_ids, "target_")
    for kind, mine, theirs in zip(("images", "texts"), pool.inputs, target.inputs):
        if mine.shape[1] != theirs.shape[1]:
            raise InputError(
                f"{kind} have {mine.shape[1]} dimensions and target_{kind} {theirs.shape[1]}: embed both by the same encoder"
            )
    if options and not isinstance(estimator, str):
        raise InputError("options are for an estimator by its name: make the object with them")
    fit: Any = make_estimator(estimator, options or {}) if isinstance(estimator, str) else estimator
    problem = proxy_problem(pool, target, config or HeadsConfig(), seed=seed)
    rows = np.arange(len(pool.image))
    batches = [batch_of(pool, rows[start:stop]) for start, stop in buckets_of(len(rows), AT_ONCE)]
    return contract.scores(fit, problem, batches)


def _pairs(images: Embeddings, texts: Embeddings, image_ids: ArrayLike | None, prefix: str) -> NegativeBatch:
    """Pairs by their embeddings, scaled to unit length, and the number of each pair's image."""
    inputs = _unit(images, f"{prefix}images"), _unit(texts, f"{prefix}texts")
    n = len(inputs[0])
    if len(inputs[1]) != n:
        raise InputError(
            f"{n} {prefix}images, but {len(inputs[1])} {prefix}texts: give one of each for every pair"
        )
    ids = np.arange(n) if image_ids is None else np.asarray(image_ids)
    if ids.shape != (n,):
        raise InputError(f"{prefix}image_ids have shape {ids.shape}: give one for each of the {n} pairs")
    return NegativeBatch(inputs=inputs, image=np.unique(ids, return_inverse=True)[1])


def _unit(rows: Embeddings, name: str) -> Tensor:
    """Rows of unit length (n, D), of floats with 32 bits or more; raises InputError where they cannot be had."""
    array = rows.detach() if isinstance(rows, Tensor) else torch.from_numpy(np.asarray(rows))
    if array.ndim != 2 or not array.shape[0] or not array.shape[1]:
        raise InputError(f"{name} have shape {tuple(array.shape)}: give embeddings (pairs, dimensions)")
    values = array if array.dtype in (torch.float32, torch.float64) else array.float()
    norms = values.norm(dim=1, keepdim=True)
    bad = torch.nonzero(~torch.isfinite(norms[:, 0]) | (norms[:, 0] == 0))
    if len(bad):
        raise InputError(
            f"row {int(bad[0])} of {name} is zero or not finite ({len(bad)} such rows): leave them out"
        )
    unit: Tensor = values / norms
    return unit
