"""Scoring through the towers: one worker solves for the direction, all map tangents over each image and caption once.

What is left for the pairs is the closed form on stored tangents, as cheap as through heads.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from influencespace.core.contrastive import Sigmoid, contrastive, contrastive_loss
from influencespace.data.artifacts import Manifest, atomic_path, fingerprint, reopen, write_json
from influencespace.data.buckets import bucket_path, buckets_of, has_bucket, write_bucket
from influencespace.data.images import RejectedImage, decode_image
from influencespace.data.pair_set import PairSet
from influencespace.data.raw_media import RawMedia
from influencespace.engine.local import Engine, run_once
from influencespace.engine.prefetch import prefetch
from influencespace.engine.progress import progress
from influencespace.errors import InputError
from influencespace.estimators.ecif import RoleScorer
from influencespace.estimators.influence import InfluenceScorer, NegativeBatch
from influencespace.estimators.precomputed_tangents import PrecomputedTangents
from influencespace.estimators.problem import Batch, Estimator, Fold, Problem, fitted
from influencespace.estimators.table import BY_TANGENTS
from influencespace.estimators.tower_problem import tower_problem
from influencespace.models.encoders import load_encoder
from influencespace.models.space import Inputs
from influencespace.models.streamed import StreamedSpace
from influencespace.models.tower_parameters import tower_parameters
from influencespace.models.tower_tangents import TowerTangents, choose_steps
from influencespace.models.towers import TowerModel
from influencespace.stages.finish import finish_stage, finished_stage
from influencespace.stages.ingest.embed import encoder_identity, share
from influencespace.stages.ingest.encode import EmbedConfig
from influencespace.stages.proxies.proxies import ALL, Proxy, ProxyConfig, TargetHalves
from influencespace.stages.scoring.score import (
    JoinScores,
    ScoreConfig,
    ScoreSpan,
    Span,
    Spans,
    batch_of,
    make_estimator,
    score_manifest,
    score_spans,
)

IntArray = NDArray[np.int64]
Kind = Literal["images", "texts"]
CONTEXTS = 2
"""Of the recorded bank, the fewest that an offset can be had of: every product with the curvature passes through all of them."""
SAMPLE = 8
"""Pairs on which central differences are compared with forward mode."""


@dataclass(frozen=True, kw_only=True)
class ThroughTowers:
    """Whose pairs are scored, through which towers, and where what is found on the way lies until the end."""

    pool: PairSet
    target: PairSet
    proxies: ProxyConfig
    proxy_folder: Path
    embed: EmbedConfig
    config: ScoreConfig
    parts: Path
    mark: str

    @property
    def bank(self) -> list[IntArray]:
        """Pairs of the pool in each context."""
        return Proxy(self.proxy_folder, ALL).bank[:CONTEXTS]

    @property
    def direction(self) -> Path:
        return self.parts / "direction.safetensors"

    @property
    def note(self) -> Path:
        return self.parts / "direction.json"

    def tangents(self, kind: Kind) -> Path:
        return self.parts / f"{kind}.npy"

    def batch(self, span: Span) -> Batch:
        return batch_of(self.pool, span, self.stored)

    def stored(self, pairs: IntArray) -> Inputs:
        """Embeddings and derivatives of some pairs: two (n, 2, d)."""
        images, texts = (np.load(self.tangents(kind), mmap_mode="r") for kind in ("images", "texts"))
        return (
            torch.from_numpy(images[self.pool.image[pairs]]),
            torch.from_numpy(texts[self.pool.text[pairs]]),
        )

    def scorer(self) -> RoleScorer:
        """The closed forms on stored tangents."""
        note = json.loads(self.note.read_text(encoding="utf-8"))
        bank = [NegativeBatch(inputs=self.stored(rows), image=self.pool.image[rows]) for rows in self.bank]
        influence = InfluenceScorer(
            PrecomputedTangents(),
            torch.empty(1, 0),
            bank,
            contrastive_loss(note["scale"], note["bias"]),
            self.proxies.train.batch_size,
            note["form"],
        )
        return RoleScorer(influence, note["role"])


@dataclass
class TowerWorker:
    """An actor: its encoder is loaded at the first task that needs one, in float32 whatever it embeds in."""

    given: ThroughTowers
    device: str

    def __call__(self, task: Callable[["TowerWorker"], Any]) -> Any:
        return task(self)

    @cached_property
    def proxy(self) -> TowerModel:
        embed = self.given.embed
        return TowerModel(
            load_encoder(embed.encoder, device=self.device, trust_remote_code=embed.trust_remote_code)
        )

    @cached_property
    def space(self) -> StreamedSpace:
        names = tower_parameters(self.proxy, self.given.config.space, self.given.proxies.seed)
        return StreamedSpace(self.proxy, names, rows=self.given.embed.batch_size)

    @cached_property
    def originals(self) -> RawMedia:
        """Of the pool."""
        return RawMedia(self.given.pool)

    @cached_property
    def differences(self) -> TowerTangents:
        found = load_file(self.given.direction)
        directions = found["directions"].to(self.space.like)
        return TowerTangents(self.space, directions, found["steps"])

    def pixels(self, pictures: Sequence[bytes]) -> Tensor:
        """Encoded pictures, preprocessed: (n, 3, H, W)."""
        try:
            images = [decode_image(data, self.given.embed.max_pixels) for data in pictures]
        except RejectedImage as error:
            raise InputError(
                f"a picture that was embedded is none any more ({error}); embed the data again"
            ) from None
        return self.proxy.encoder.preprocess_images(images)

    def recorded(self, originals: RawMedia, rows: IntArray) -> NegativeBatch:
        """Some pairs of a set, as an estimator is given them."""
        pairs = originals.pairs
        inputs = (
            self.pixels(originals.pictures(pairs.image[rows])),
            self.proxy.tokenize(originals.captions(pairs.text[rows])),
        )
        return NegativeBatch(inputs=inputs, image=pairs.image[rows])

    def problem(self, memory: int) -> Problem:
        given = self.given
        batch_size = given.proxies.train.batch_size
        halves = TargetHalves(given.target, given.proxies.seed)
        target = RawMedia(given.target)
        return tower_problem(
            self.space,
            objective=self.proxy.encoder.objective,
            batch_size=batch_size,
            pool_size=len(given.pool),
            bank=[self.recorded(self.originals, rows) for rows in given.bank],
            target=[self.recorded(target, rows) for rows in halves.contexts(halves.gradient, batch_size)],
            memory=memory,
            seed=given.proxies.seed,
        )


@dataclass(frozen=True, kw_only=True)
class SolveDirection:
    """Task: the direction along which pairs are scored, its steps, and a note of what was found."""

    estimator: Estimator
    memory: int
    name: str = "the direction"

    def __call__(self, worker: TowerWorker) -> None:
        given = worker.given
        if given.note.exists():
            return
        problem = worker.problem(self.memory)
        scorer = fitted(self.estimator.fit(problem), _no_pass)
        assert isinstance(scorer, RoleScorer)
        directions = scorer.influence.directions
        objective = contrastive(problem.objective, "score --space")
        images, texts = problem.bank[0].inputs
        steps, disagreement = choose_steps(worker.space, directions, (images[:SAMPLE], texts[:SAMPLE]))
        with atomic_path(given.direction) as aside:
            save_file({"directions": directions.contiguous().cpu(), "steps": steps}, aside)
        note = {
            "scale": objective.scale,
            "bias": objective.bias if isinstance(objective, Sigmoid) else None,
            "form": scorer.influence.form,
            "role": scorer.role,
            "parameters": worker.space.size,
            "damping": problem.damping,
            "steps": steps.tolist(),
            "disagreement_with_forward_mode": disagreement,
        }
        write_json(given.note, note)


def _no_pass(fold: Fold) -> Any:
    raise AssertionError("an estimator of BY_TANGENTS asks for no pass over the pool")


@dataclass(frozen=True, kw_only=True)
class TangentBlock:
    """Task: embeddings and derivatives of some of the pool's distinct images or captions; how many."""

    kind: Kind
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"tangents of {self.kind} {self.start} to {self.stop}"

    def __call__(self, worker: TowerWorker) -> int:
        given = worker.given
        if not has_bucket(given.parts, self.kind, self.start, given.mark):
            originals = worker.originals
            numbers = (originals.images if self.kind == "images" else originals.texts)[self.start : self.stop]
            found = list(self._tangents(worker, numbers))
            x, dx = (np.concatenate(part) for part in zip(*found))
            columns = {"number": numbers, "embedding": x, "derivative": dx}
            write_bucket(given.parts, self.kind, self.start, given.mark, columns)
        return self.stop - self.start

    def _tangents(
        self, worker: TowerWorker, numbers: IntArray
    ) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Batch after batch, the next one read and decoded meanwhile."""
        size = worker.given.embed.batch_size
        batches = (numbers[i : i + size] for i in range(0, len(numbers), size))
        differences = worker.differences
        for inputs in prefetch(batches, partial(self._inputs, worker), threads=1, ahead=2):
            x, dx = differences.images(inputs) if self.kind == "images" else differences.texts(inputs)
            yield x.cpu().numpy(), dx[0].cpu().numpy()

    def _inputs(self, worker: TowerWorker, numbers: IntArray) -> Tensor:
        if self.kind == "images":
            return worker.pixels(worker.originals.pictures(numbers))
        return worker.proxy.tokenize(worker.originals.captions(numbers))


@dataclass(frozen=True)
class JoinTangents:
    """Task: one array (numbers of the artifact, 2, d) of embeddings and derivatives, from the blocks of a kind."""

    given: ThroughTowers
    kind: Kind
    starts: list[int]

    def __call__(self) -> None:
        table = self.given.pool.table
        rows = len(table.images if self.kind == "images" else table.texts)
        array: Any = None
        with atomic_path(self.given.tangents(self.kind)) as aside:
            for start in self.starts:
                with pa.memory_map(str(bucket_path(self.given.parts, self.kind, start))) as source:
                    block = pa.ipc.open_file(source).read_all().combine_chunks()
                number = block["number"].to_numpy()
                for part, name in enumerate(("embedding", "derivative")):
                    values = block[name].combine_chunks().flatten().to_numpy().reshape(len(number), -1)
                    if array is None:
                        shape = (rows, 2, values.shape[1])
                        array = np.lib.format.open_memmap(aside, "w+", np.float32, shape)
                    array[number, part] = values
            array.flush()


def count_originals(pool: PairSet) -> dict[Kind, int]:
    """How many distinct images and captions a set has."""
    return {"images": len(np.unique(pool.image)), "texts": len(np.unique(pool.text))}


def check_tower_estimator(config: ScoreConfig) -> Estimator:
    """The estimator, without a sketch where none is asked for; raises InputError for one that cannot score through towers."""
    if config.estimator not in BY_TANGENTS:
        raise InputError(
            f"{config.estimator} cannot score in the space {config.space!r}, only in heads; through the towers there are "
            f"{', '.join(BY_TANGENTS)}"
        )
    default = {"solver": "plain"} if config.estimator == "ecif" else {}
    return make_estimator(config.estimator, default | config.options)


def score_through_towers(
    pool: PairSet,
    target: PairSet,
    proxies: ProxyConfig,
    proxy_folder: Path,
    embed: EmbedConfig,
    inputs: dict[str, str],
    config: ScoreConfig,
    out: Path,
    engine: Engine,
) -> Manifest:
    """Score every pair of the pool by its influence through towers; writes scores.parquet (uid, score).

    The proxy is the encoder as it is; bank and target are those of the run's proxies. Higher is more worth keeping.
    Raises InputError where there is no encoder, no such space, or no room for a sketch that was asked for.
    """
    estimator = check_tower_estimator(config)
    if not embed.encoder:
        raise InputError("this run has no encoder: its embeddings were imported, so the only space is heads")
    marked = {
        "stage": "score",
        "config": config,
        "encoder": encoder_identity(embed.encoder),
        "inputs": inputs,
    }
    mark = fingerprint(marked)
    if (done := finished_stage(out, mark)) is not None:
        _remove_parts(out)
        return done
    began = time.monotonic()
    parts = reopen(out) / f"parts-{mark}"  # parts of another config are never taken for these
    given = ThroughTowers(
        pool=pool,
        target=target,
        proxies=proxies,
        proxy_folder=proxy_folder,
        embed=embed,
        config=config,
        parts=parts,
        mark=mark,
    )
    _tangents(given, estimator, engine)
    rows = len(pool)
    spans = list(buckets_of(rows, config.bucket_size))
    with engine.pool(Spans(given), num_actors=min(engine.cores, len(spans))) as workers:
        score_spans(workers, spans, ScoreSpan(given.scorer(), out, mark), config.estimator)
    without = run_once(engine, JoinScores(given, out, [start for start, _ in spans]))
    note = json.loads(given.note.read_text(encoding="utf-8"))
    done = finish_stage(out, score_manifest(config, mark, inputs, rows, without, **note), began)
    _remove_parts(out)
    return done


def _remove_parts(out: Path) -> None:
    """Remove the tangents, those too that a killed run left."""
    for path in out.glob("parts-*"):
        shutil.rmtree(path)


def _tangents(given: ThroughTowers, estimator: Estimator, engine: Engine) -> None:
    """Solve for the direction, then map tangents over the pool's images and captions."""
    counts: dict[Kind, int] = run_once(engine, partial(count_originals, given.pool))
    blocks = [
        TangentBlock(kind=kind, start=start, stop=stop)
        for kind, count in counts.items()
        for start, stop in buckets_of(count, 16 * given.embed.batch_size)
    ]
    one, all_ = share(given.embed, engine, 1), share(given.embed, engine, len(blocks))
    solve = SolveDirection(estimator=estimator, memory=engine.memory)
    list(
        engine.map(
            partial(TowerWorker, given, one.device), [solve], num_cpus=one.num_cpus, num_gpus=one.num_gpus
        )
    )
    with progress(f"tangents ({given.config.space})", sum(counts.values()), "images and captions") as bar:
        for count in engine.map(
            partial(TowerWorker, given, all_.device),
            blocks,
            num_actors=all_.num_actors,
            num_cpus=all_.num_cpus,
            num_gpus=all_.num_gpus,
        ):
            bar.advance(count)
    for kind in counts:
        starts = [block.start for block in blocks if block.kind == kind]
        run_once(engine, JoinTangents(given, kind, starts))
