"""The workers that score through towers: what they are given, and what each opens once."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from influencespace.core.arrays import IntArray
from influencespace.core.contrastive import contrastive_loss
from influencespace.data.buckets import Columns, read_rows
from influencespace.data.images import RejectedImage, decode_image
from influencespace.data.mirror import here
from influencespace.data.pair_set import PairSet
from influencespace.data.raw_media import RawMedia
from influencespace.errors import InputError
from influencespace.estimators.ecif import RoleScorer
from influencespace.estimators.influence import InfluenceScorer, NegativeBatch
from influencespace.estimators.precomputed_tangents import PrecomputedTangents
from influencespace.estimators.problem import Batch, Problem
from influencespace.estimators.tower_problem import tower_problem
from influencespace.models.encoders import load_encoder
from influencespace.models.streamed import StreamedSpace
from influencespace.models.tower_parameters import tower_parameters
from influencespace.models.tower_tangents import TowerTangents
from influencespace.models.towers import TowerModel
from influencespace.stages.ingest.encode import EmbedConfig
from influencespace.stages.scoring.score import ScoreConfig
from influencespace.stages.scoring.scoring import ScoringInputs, Uids

Kind = Literal["images", "texts"]
BATCHES = 2
"""Of the bank, the fewest that an offset can be had of: every product with the curvature passes through all of them."""


@dataclass(frozen=True, kw_only=True)
class ThroughTowers:
    """Whose pairs are scored, through which towers, and where what is computed on the way lies until the end."""

    scoring: ScoringInputs
    embed: EmbedConfig
    config: ScoreConfig
    folder: Path

    @property
    def pool(self) -> PairSet:
        return self.scoring.pool

    @property
    def bank(self) -> list[IntArray]:
        """Pairs of the pool in each negative batch."""
        return self.scoring.trained().bank[:BATCHES]

    @property
    def direction(self) -> Path:
        return self.folder / ".direction.safetensors"

    @property
    def record(self) -> Path:
        return self.folder / ".direction.json"

    def tangents(self, kind: Kind) -> Path:
        """Embedding and derivative of the image or the caption of every pair of the pool, in its order."""
        return self.folder / f".{kind}.parquet"

    @property
    def of_bank(self) -> Path:
        """The same of the bank's batches."""
        return self.folder / ".bank.safetensors"

    def batch(self, rows: IntArray) -> Batch:
        """A range of pairs."""
        whole = slice(int(rows[0]), int(rows[-1]) + 1)
        images, texts = (_stacked(read_rows(self.tangents(kind), whole)) for kind in ("images", "texts"))
        image = self.pool.read(whole, "image")["image"]
        return Batch(uid=Uids(self.pool, rows), row=rows, inputs=(images, texts), image=image)

    def scorer(self) -> RoleScorer:
        """The closed forms on stored tangents."""
        record = json.loads(here(self.record).read_text(encoding="utf-8"))
        tangents = load_file(here(self.of_bank))
        bank = [
            NegativeBatch(
                inputs=(tangents[f"images{number}"], tangents[f"texts{number}"]),
                image=self.pool.read(rows, "image")["image"],
            )
            for number, rows in enumerate(self.bank)
        ]
        influence = InfluenceScorer(
            PrecomputedTangents(),
            torch.empty(1, 0),
            bank,
            contrastive_loss(record["scale"], record["bias"]),
            self.scoring.proxy.train.batch_size,
            record["form"],
        )
        return RoleScorer(influence, record["role"])


def _stacked(tangents: Columns) -> Tensor:
    """Embeddings and derivatives of some pairs: (n, 2, d)."""
    return torch.from_numpy(np.stack([tangents["embedding"], tangents["derivative"]], 1))


@dataclass
class TowerWorker:
    """An actor: its encoder is loaded at the first task that needs one, in float32 whatever it embeds in."""

    inputs: ThroughTowers
    device: str

    def __call__(self, task: Callable[["TowerWorker"], Any]) -> Any:
        return task(self)

    @cached_property
    def model(self) -> TowerModel:
        embed = self.inputs.embed
        return TowerModel(
            load_encoder(embed.encoder, device=self.device, trust_remote_code=embed.trust_remote_code)
        )

    @cached_property
    def space(self) -> StreamedSpace:
        names = tower_parameters(self.model, self.inputs.config.space, self.inputs.scoring.seed)
        return StreamedSpace(self.model, names, rows=self.inputs.embed.batch_size)

    @cached_property
    def media(self) -> RawMedia:
        """Of the pool."""
        return RawMedia(self.inputs.pool)

    @cached_property
    def differences(self) -> TowerTangents:
        solved = load_file(here(self.inputs.direction))
        directions = solved["directions"].to(self.space.like)
        return TowerTangents(self.space, directions, solved["steps"])

    def tangents(self, kind: Kind, inputs: Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Embeddings and derivatives of some pictures or captions: two (n, d)."""
        differences = self.differences
        x, dx = differences.images(inputs) if kind == "images" else differences.texts(inputs)
        return x.cpu().numpy(), dx[0].cpu().numpy()

    def pixels(self, pictures: Sequence[bytes]) -> Tensor:
        """Encoded pictures, preprocessed: (n, 3, H, W)."""
        try:
            near, limit = self.model.encoder.input_size, self.inputs.embed.max_pixels
            images = [decode_image(data, limit, near) for data in pictures]
        except RejectedImage as error:
            raise InputError(
                f"a picture that was embedded is none any more ({error}); embed the data again"
            ) from None
        return self.model.encoder.preprocess_images(images)

    def recorded(self, media: RawMedia, rows: IntArray) -> NegativeBatch:
        """Some pairs of a set, as an estimator is given them."""
        inputs = self.pixels(media.pictures(rows)), self.model.tokenize(media.captions(rows))
        return NegativeBatch(inputs=inputs, image=media.pairs.read(rows, "image")["image"])

    def problem(self, memory: int) -> Problem:
        scoring = self.inputs.scoring
        batch_size = scoring.proxy.train.batch_size
        target = RawMedia(scoring.target)
        return tower_problem(
            self.space,
            objective=self.model.encoder.objective,
            batch_size=batch_size,
            pool_size=len(scoring.pool),
            bank=[self.recorded(self.media, rows) for rows in self.inputs.bank],
            target=[self.recorded(target, rows) for rows in scoring.target_batches],
            memory=memory,
            seed=scoring.seed,
        )
