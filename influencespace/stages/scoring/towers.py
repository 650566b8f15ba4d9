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
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from influencespace.core.arrays import IntArray
from influencespace.core.contrastive import Sigmoid, contrastive
from influencespace.data.artifacts import atomic_path, write_json
from influencespace.data.buckets import Columns, buckets_of
from influencespace.data.mirror import here, is_file
from influencespace.data.pair_set import PairSet
from influencespace.data.raw_media import in_order_of_files, pictures_at, refs_of
from influencespace.data.schema import PLACE
from influencespace.engine.prefetch import prefetch
from influencespace.errors import InputError
from influencespace.estimators.ecif import RoleScorer
from influencespace.estimators.problem import Estimator, Fold, Problem, fitted
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
IN_PARTITION = 16
"""Batches of pictures or captions in one task, about."""
MAX_PARTITIONS = 4096
"""From so many tasks on each has more."""
RANGE = 65_536
"""Pairs of a task that reads where media lie."""
KINDS: tuple[Kind, ...] = ("images", "texts")


@dataclass(frozen=True, kw_only=True)
class SolveDirection:
    """Task: the direction along which pairs are scored, its steps, and a record of it."""

    estimator: Estimator
    memory: int
    name: str = "the direction"

    def __call__(self, worker: TowerWorker) -> None:
        inputs = worker.inputs
        if is_file(inputs.record):
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
        with atomic_path(inputs.of_bank) as aside:
            save_file(dict(self._of_bank(worker, problem)), aside)
        write_json(inputs.record, record)

    def _of_bank(self, worker: TowerWorker, problem: Problem) -> Iterator[tuple[str, Tensor]]:
        """Embeddings and derivatives of the bank's batches."""
        for number, batch in enumerate(problem.bank):
            for kind, media in zip(KINDS, batch.inputs):
                x, dx = worker.tangents(kind, media)
                yield f"{kind}{number}", torch.from_numpy(np.stack([x, dx], 1))


def _no_pass(fold: Fold) -> Any:
    raise AssertionError("an estimator of BY_TANGENTS asks for no pass over the pool")


@dataclass(frozen=True)
class WhereMediaLie:
    """Columns: the number of each pair's image or caption in a range of the pool, and where the picture lies or the caption."""

    pool: PairSet
    kind: Kind

    def __call__(self, start: int, stop: int) -> Columns:
        names = ("image", *PLACE) if self.kind == "images" else ("text", "caption")
        return self.pool.read(slice(start, stop), *names)


@dataclass(frozen=True)
class Tangents:
    """Of whole groups of one image or caption: its embedding and derivative, computed once and given to all its pairs.

    In memory 8 d bytes a pair of the largest group.
    """

    inputs: ThroughTowers
    kind: Kind
    device: str

    def __call__(self, columns: Columns) -> Columns:
        number = columns["image" if self.kind == "images" else "text"]
        _, first, place = np.unique(number, return_index=True, return_inverse=True)
        first = first[self._order({name: values[first] for name, values in columns.items()})]
        media = {name: values[first] for name, values in columns.items()}
        x, dx = (np.concatenate(part) for part in zip(*self._tangents(media)))
        order = np.argsort(number[first])  # numbers are sorted: the order of `place`
        return {"embedding": x[order][place], "derivative": dx[order][place]}

    def _order(self, media: Columns) -> IntArray:
        """Pictures as they lie in their files; short captions first, so that little of a batch is padded."""
        if self.kind == "images":
            return np.array(in_order_of_files(refs_of(media)))
        return np.argsort([len(caption) for caption in media["caption"]], kind="stable")

    def _tangents(self, media: Columns) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Batch after batch, the next one read and decoded meanwhile."""
        worker, size = opened(self.inputs, self.device), self.inputs.embed.batch_size
        spans = buckets_of(len(media["row"]), size)
        batches = ({name: values[a:b] for name, values in media.items()} for a, b in spans)
        for inputs in prefetch(batches, partial(self._inputs, worker), threads=1, ahead=2):
            yield worker.tangents(self.kind, inputs)

    def _inputs(self, worker: TowerWorker, media: Columns) -> Tensor:
        if self.kind == "images":
            return worker.pixels(pictures_at(media))
        return worker.model.tokenize(media["caption"].tolist())


_HELD: list[TowerWorker] = []


def opened(inputs: ThroughTowers, device: str) -> TowerWorker:
    """A worker that keeps its encoder for all tasks of its process."""
    worker = TowerWorker(inputs, device)
    if [worker] != _HELD:
        _HELD[:] = [worker]
    return _HELD[0]


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
        record = json.loads(here(inputs.record).read_text(encoding="utf-8"))
        return Details(rows_in=rows, rows_out=rows, details=self.config.details(without) | record)

    def _map_tangents(self, inputs: ThroughTowers, workers: Workers) -> None:
        """Solve for the direction, then map tangents over the pool's images and captions, each once."""
        engine, rows = workers.engine, len(inputs.pool)
        at_once = IN_PARTITION * inputs.embed.batch_size
        one, every = (embed_share(inputs.embed, engine, count) for count in (1, -(-rows // at_once)))
        # a sketch lies on one machine
        memory = max(machine.memory for machine in engine.machines)
        solve = SolveDirection(estimator=tower_estimator(self.config), memory=memory)
        list(engine.map(partial(TowerWorker, inputs, one.device), [solve], resources=one.resources))
        for kind in KINDS:
            workers.group_by(
                inputs.tangents(kind).stem,
                WhereMediaLie(inputs.pool, kind),
                "image" if kind == "images" else "text",
                Tangents(inputs, kind, every.device),
                *(rows, RANGE),
                resources=every.resources,
                partition_rows=max(at_once, rows // MAX_PARTITIONS),
            )
