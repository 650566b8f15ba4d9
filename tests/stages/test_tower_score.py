"""Scores through the towers: those of one whole batch by forward mode, by any engine and batch size; wrong input is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from chain import Careful, Counting, Idle, Killed, carry, with_settings
from torch import Tensor

from influencespace.config import load_config
from influencespace.data.artifacts import Manifest
from influencespace.data.raw_media import RawMedia
from influencespace.data.readers import list_shards, read_shard
from influencespace.data.schema import Sample
from influencespace.data.synthetic import WorldConfig, write_world
from influencespace.engine.local import Engine
from influencespace.errors import InputError
from influencespace.estimators.ecif import RoleScorer
from influencespace.estimators.problem import Batch, fitted
from influencespace.pipeline import data_stages
from influencespace.run import Run, carry_out
from influencespace.stages.ingest.fit_encoder import FitEncoder
from influencespace.stages.ingest.split import pair_sets
from influencespace.stages.scoring import towers
from influencespace.stages.scoring.score import ScoreConfig
from influencespace.stages.scoring.scoring import ScoringInputs
from influencespace.stages.scoring.tower_worker import Kind, ThroughTowers, TowerWorker
from influencespace.stages.scoring.towers import KINDS, ScoreThroughTowers, tower_estimator

CONFIG = ScoreConfig(estimator="ecif", space="*layers.0.mlp.fc2.*,*projection*", bucket_size=17)
PROXIES = {"proxy.train.batch_size": 8, "proxy.train.steps": 5, "proxy.train.dimension": 8}
PROXIES |= {"proxy.folds": 2, "proxy.negative_batches": 2, "proxy.choose_steps": False}


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A small world with pictures, embedded by a tiny encoder, and proxies on it."""
    folder = tmp_path_factory.mktemp("towers")
    sizes = {"pretrain": 64, "pool": 40, "target": 16, "test": 16}
    write_world(folder, WorldConfig(seed=1, shard_size=20, **sizes))
    FitEncoder(shards=str(folder / "pretrain"), out=folder / "encoder", steps=3, seed=0)()
    roles = {f"data.{role}": str(folder / role) for role in ("pool", "target", "test")}
    encoder = {"embed.encoder": str(folder / "encoder"), "embed.batch_size": 16}
    run = Run(folder=folder / "run", config=load_config(None, PROXIES | roles | encoder))
    for stage in data_stages(run.config):
        carry_out(stage, run, Careful())
    run = replace(run, sets=pair_sets(run))
    carry(run, "proxies")
    return run


def through(embedded: Run, folder: Path) -> ThroughTowers:
    return ThroughTowers(
        scoring=ScoringInputs.of(embedded), embed=embedded.config.embed, config=CONFIG, folder=folder
    )


def score(
    embedded: Run, out: Path, engine: Engine | None = None, config: ScoreConfig = CONFIG, **embed: Any
) -> tuple[Manifest, Path]:
    """The stage in another folder, by other settings of `embed`; its manifest and folder."""
    out.mkdir(exist_ok=True)
    if not (out / "proxies").exists():
        (out / "proxies").symlink_to(embedded.at("proxies"))
    settings = {f"embed.{name}": value for name, value in embed.items()}
    run, stage = with_settings(replace(embedded, folder=out), settings), ScoreThroughTowers(config)
    return carry_out(stage, run, engine or Careful()), run.at(stage.name)


def scores_of(out: Path) -> np.ndarray:
    scores: np.ndarray = pq.read_table(out / "scores.parquet")["score"].to_numpy()
    return scores


@pytest.fixture(scope="module")
def whole(embedded: Run, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """One batch of all pairs, by forward mode, without stages."""
    worker = TowerWorker(through(embedded, tmp_path_factory.mktemp("unused")), "cpu")
    scorer = fitted(tower_estimator(CONFIG).fit(worker.problem(2**30)), lambda fold: None)
    assert isinstance(scorer, RoleScorer)
    rows = np.arange(len(embedded.pool))
    everything = worker.recorded(worker.media, rows)
    return scorer(Batch(uid=rows.astype(str), inputs=everything.inputs, image=everything.image, row=rows))


@pytest.mark.parametrize("size", [5, 64])
def test_scores_are_those_of_one_batch_by_forward_mode(
    embedded: Run, whole: np.ndarray, tmp_path: Path, size: int
) -> None:
    assert np.std(whole) > 1e-4
    manifest, out = score(embedded, tmp_path, batch_size=size)
    np.testing.assert_allclose(scores_of(out), whole, rtol=0, atol=2e-3 * np.std(whole))
    table = pq.read_table(out / "scores.parquet")
    assert table["uid"].to_pylist() == list(embedded.pool.column("uid"))
    assert 0 < manifest.details["disagreement_with_forward_mode"] < 1e-3
    assert manifest.details["parameters"] == 2 * (64 * 128 + 256 * 128 + 128)
    assert {path.name for path in out.iterdir()} == {"manifest.json", "scores.parquet"}, (
        "tangents have served"
    )


@pytest.mark.ray
def test_ray_gives_the_same_scores(
    embedded: Run, whole: np.ndarray, tmp_path: Path, ray_engine: Engine
) -> None:
    _, out = score(embedded, tmp_path, ray_engine, num_actors=2, cpus_per_actor=1)
    np.testing.assert_allclose(scores_of(out), whole, rtol=0, atol=2e-3 * np.std(whole))


def test_a_killed_run_goes_on_where_it_was_and_a_finished_one_is_left(embedded: Run, tmp_path: Path) -> None:
    """Killed after the direction and some buckets."""
    quick, killed = replace(CONFIG, space="*projection*"), tmp_path / "killed"
    with pytest.raises(Killed):
        score(embedded, killed, Counting(limit=5), quick, batch_size=2)
    (working,) = (killed / "scores").glob(".ecif-*")
    assert {path.suffix for path in working.rglob("*")} >= {".safetensors", ".arrow"}
    manifest, out = score(embedded, killed, config=quick, batch_size=2)
    _, expected = score(embedded, tmp_path / "whole", config=quick, batch_size=2)
    np.testing.assert_array_equal(scores_of(out), scores_of(expected))
    assert score(embedded, killed, Idle(), quick, batch_size=2)[0] == manifest


@pytest.mark.parametrize(
    ("config", "embed", "message"),
    [
        (
            ScoreConfig(estimator="trak", space="towers"),
            {},
            "trak cannot score in the space 'towers', only in heads",
        ),
        (ScoreConfig(space="hed"), {}, "there is no space 'hed'"),
        (ScoreConfig(space="towers"), {"encoder": ""}, "no encoder: its embeddings were imported"),
        (
            ScoreConfig(estimator="nystrom", space="towers", options={"curvature": {"rank": 10**6}}),
            {},
            r"a sketch of (\d+,\d+) parameters x rank \d+ takes \d+,\d+\.\d+ GB of memory and there are",
        ),
    ],
)
def test_what_cannot_be_scored_is_refused(
    embedded: Run, tmp_path: Path, config: ScoreConfig, embed: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        score(embedded, tmp_path, config=config, **embed)


def test_raw_media_are_what_the_shards_hold(embedded: Run) -> None:
    pool = embedded.pool
    media = RawMedia(pool)
    held = {
        (sample.image, caption)
        for shard in list_shards(str(embedded.config.data.pool))
        for sample in read_shard(shard)
        if isinstance(sample, Sample)
        for caption in sample.captions
    }
    rows = np.arange(len(pool))[::-1]
    shown = list(zip(media.pictures(rows), media.captions(rows)))
    assert set(shown) == held
    few = np.array([7, 3, 7])
    assert list(zip(media.pictures(few), media.captions(few))) == [shown[len(pool) - 1 - row] for row in few]


@pytest.mark.parametrize("kind", KINDS)
def test_every_image_and_caption_is_embedded_once(
    embedded: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    """Whatever the partitions."""
    inputs: list[Tensor] = []
    tangents = TowerWorker.tangents

    def watched(self: TowerWorker, of: Kind, media: Tensor) -> Any:
        inputs.extend(media if of == kind else [])
        return tangents(self, of, media)

    monkeypatch.setattr(TowerWorker, "tangents", watched)
    monkeypatch.setattr(towers, "IN_PARTITION", 1)
    score(embedded, tmp_path)
    pool = embedded.pool
    bank = sum(map(len, through(embedded, tmp_path).bank))
    number = pool.image if kind == "images" else pool.text
    assert len(inputs) - bank == len(np.unique(number))
