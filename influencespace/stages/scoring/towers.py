"""Scoring through the towers: one worker solves for the direction, all map tangents over each image and caption once.

What is left for the pairs is the closed form on stored tangents, as cheap as through heads.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from influencespace.core.arrays import IntArray
from influencespace.core.contrastive import Sigmoid, contrastive
from influencespace.data.artifacts import atomic_path, write_json
from influencespace.data.buckets import Columns, WriteBucket, buckets_of, read_bucket
from influencespace.data.pair_set import PairSet
from influencespace.engine.prefetch import prefetch
from influencespace.errors import InputError
from influencespace.estimators.ecif import RoleScorer
from influencespace.estimators.problem import Estimator, Fold, fitted
from influencespace.estimators.table import BY_TANGENTS
from influencespace.models.tower_tangents import choose_steps
from influencespace.run import Details, Run, Stage, Workers
from influencespace.stages.ingest.embed import embed_share, encoder_identity
from influencespace.stages.scoring.score import JoinScores, ScoreConfig
from influencespace.stages.scoring.scoring import (
    ScoreColumn,
    ScoringInputs,
    make_estimator,
    scoring_pass,
)
from influencespace.stages.scoring.tower_worker import Kind, ThroughTowers, TowerWorker

SAMPLE = 8
"""Pairs on which central differences are compared with forward mode."""
IN_BUCKET = 16
"""Batches of pictures or captions in one task."""


@dataclass(frozen=True, kw_only=True)
class SolveDirection:
    """Task: the direction along which pairs are scored, its steps, and a record of it."""

    estimator: Estimator
    memory: int
    name: str = "the direction"

    def __call__(self, worker: TowerWorker) -> None:
        inputs = worker.inputs
        if inputs.record.exists():
            return
        problem = worker.problem(self.memory)
        scorer = fitted(self.estimator.fit(problem), _no_pass)
        assert isinstance(scorer, RoleScorer)
        directions = scorer.influence.directions
        objective = contrastive(problem.objective, "score --space")
        images, texts = problem.bank[0].inputs
        steps, disagreement = choose_steps(worker.space, directions, (images[:SAMPLE], texts[:SAMPLE]))
        with atomic_path(inputs.direction) as aside:
            save_file({"directions": directions.contiguous().cpu(), "steps": steps}, aside)
        record = {
            "scale": objective.scale,
            "bias": objective.bias if isinstance(objective, Sigmoid) else None,
            "form": scorer.influence.form,
            "role": scorer.role,
            "parameters": worker.space.size,
            "damping": problem.damping,
            "steps": steps.tolist(),
            "disagreement_with_forward_mode": disagreement,
        }
        write_json(inputs.record, record)


def _no_pass(fold: Fold) -> Any:
    raise AssertionError("an estimator of BY_TANGENTS asks for no pass over the pool")


@dataclass(frozen=True, kw_only=True)
class TangentBucket:
    """Task: embeddings and derivatives of some of the pool's distinct images or captions, unless they are there; how many."""

    kind: Kind
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"tangents of {self.kind} {self.start} to {self.stop}"

    def __call__(self, worker: TowerWorker) -> int:
        return WriteBucket(
            folder=worker.inputs.folder,
            table=self.kind,
            start=self.start,
            stop=self.stop,
            compute=partial(self._columns, worker),
        )()

    def _columns(self, worker: TowerWorker, start: int, stop: int) -> Columns:
        media = worker.media
        numbers = (media.images if self.kind == "images" else media.texts)[start:stop]
        parts = list(self._tangents(worker, numbers))
        x, dx = (np.concatenate(part) for part in zip(*parts))
        return {"number": numbers, "embedding": x, "derivative": dx}

    def _tangents(
        self, worker: TowerWorker, numbers: IntArray
    ) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Batch after batch, the next one read and decoded meanwhile."""
        size = worker.inputs.embed.batch_size
        batches = (numbers[i : i + size] for i in range(0, len(numbers), size))
        differences = worker.differences
        for inputs in prefetch(batches, partial(self._inputs, worker), threads=1, ahead=2):
            x, dx = differences.images(inputs) if self.kind == "images" else differences.texts(inputs)
            yield x.cpu().numpy(), dx[0].cpu().numpy()

    def _inputs(self, worker: TowerWorker, numbers: IntArray) -> Tensor:
        if self.kind == "images":
            return worker.pixels(worker.media.pictures(numbers))
        return worker.model.tokenize(worker.media.captions(numbers))


@dataclass(frozen=True)
class JoinTangents:
    """Task: one array (numbers of the artifact, 2, d) of embeddings and derivatives, from the buckets of a kind."""

    inputs: ThroughTowers
    kind: Kind
    starts: list[int]

    def __call__(self) -> None:
        table = self.inputs.pool.table
        rows = len(table.images if self.kind == "images" else table.texts)
        array: Any = None
        with atomic_path(self.inputs.tangents(self.kind)) as aside:
            for start in self.starts:
                names = ("number", "embedding", "derivative")
                columns = read_bucket(self.inputs.folder, self.kind, start, *names)
                if array is None:
                    shape = (rows, 2, columns["embedding"].shape[1])
                    array = np.lib.format.open_memmap(aside, "w+", np.float32, shape)
                for part, name in enumerate(names[1:]):
                    array[columns["number"], part] = columns[name]
            array.flush()


def count_media(pool: PairSet) -> dict[Kind, int]:
    """How many distinct images and captions a set has."""
    return {"images": len(np.unique(pool.image)), "texts": len(np.unique(pool.text))}


def tower_estimator(config: ScoreConfig) -> Estimator:
    """The estimator, without a sketch where none is asked for; raises InputError for one that cannot score through towers."""
    if config.estimator not in BY_TANGENTS:
        raise InputError(
            f"{config.estimator} cannot score in the space {config.space!r}, only in heads; through the towers there are "
            f"{', '.join(BY_TANGENTS)}"
        )
    default = {"solver": "plain"} if config.estimator == "ecif" else {}
    estimator: Estimator = make_estimator(config.estimator, default | config.options)
    return estimator


@dataclass(frozen=True)
class ScoreThroughTowers(Stage):
    """Scores every pair of a finished run's pool by its influence through towers; writes scores.parquet (uid, score).

    The model is the encoder as it is; bank and target are those of the run's proxies. Higher is more worth keeping.
    Raises InputError where there is no encoder, no such space, or no room for a sketch that was asked for.
    """

    config: ScoreConfig
    needs = ("proxies",)

    @property
    def name(self) -> str:  # type: ignore[override]
        space = re.sub(r"[^A-Za-z0-9]+", "-", self.config.space).strip("-")
        return f"scores/{self.config.estimator}-{space}"

    def settings(self, config: Any) -> Any:
        return self.config, config.seed, config.embed.batch_size

    def inputs(self, run: Run) -> Mapping[str, str]:
        if not run.config.embed.encoder:
            raise InputError(
                "this run has no encoder: its embeddings were imported, so the only space is heads"
            )
        return {"encoder": encoder_identity(run.config.embed.encoder)}

    def work(self, run: Run, workers: Workers) -> Details:
        inputs = ThroughTowers(
            scoring=ScoringInputs.of(run), embed=run.config.embed, config=self.config, folder=workers.folder
        )
        self._map_tangents(inputs, workers)
        rows, size = len(run.pool), self.config.bucket_size
        with scoring_pass(workers, inputs, size, rows) as scoring:
            starts = scoring.write("score", ScoreColumn(inputs.scorer()), range(rows))
        without = workers.once(JoinScores(run.pool, workers.folder, starts))
        record = json.loads(inputs.record.read_text(encoding="utf-8"))
        return Details(rows_in=rows, rows_out=rows, details=self.config.details(without) | record)

    def _map_tangents(self, inputs: ThroughTowers, workers: Workers) -> None:
        """Solve for the direction, then map tangents over the pool's images and captions."""
        counts: dict[Kind, int] = workers.once(partial(count_media, inputs.pool))
        tasks = [
            TangentBucket(kind=kind, start=start, stop=stop)
            for kind, count in counts.items()
            for start, stop in buckets_of(count, IN_BUCKET * inputs.embed.batch_size)
        ]
        engine = workers.engine
        one, every = (embed_share(inputs.embed, engine, count) for count in (1, len(tasks)))
        # a sketch lies on one machine
        memory = max(machine.memory for machine in engine.machines)
        solve = SolveDirection(estimator=tower_estimator(self.config), memory=memory)
        list(engine.map(partial(TowerWorker, inputs, one.device), [solve], resources=one.resources))
        with workers.progress(sum(counts.values()), "images and captions", self.config.space) as bar:
            for count in engine.map(
                partial(TowerWorker, inputs, every.device),
                tasks,
                workers=every.workers,
                resources=every.resources,
            ):
                bar.advance(count)
        for kind in counts:
            starts = [task.start for task in tasks if task.kind == kind]
            workers.once(JoinTangents(inputs, kind, starts))
