"""Scores through the towers: those of one whole batch by forward mode, by any engine and batch size; what is wrong is said."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from chain import Counting, Idle, Killed, proxy_config, times

from influencespace.data.artifacts import Manifest
from influencespace.data.pair_set import PairSet
from influencespace.data.raw_media import RawMedia
from influencespace.data.readers import list_shards, read_shard
from influencespace.data.schema import Sample
from influencespace.data.synthetic import WorldConfig, write_world
from influencespace.engine.local import Engine, LocalEngine
from influencespace.errors import InputError
from influencespace.estimators.ecif import RoleScorer
from influencespace.estimators.problem import Batch, fitted
from influencespace.stages.ingest.embed import embed
from influencespace.stages.ingest.encode import EmbedConfig
from influencespace.stages.ingest.fit_encoder import FitEncoder
from influencespace.stages.proxies.proxies import proxies
from influencespace.stages.scoring.score import ScoreConfig
from influencespace.stages.scoring.tower_score import (
    ThroughTowers,
    TowerWorker,
    check_tower_estimator,
    score_through_towers,
)

BLOCKS = ScoreConfig(estimator="ecif", space="*layers.0.mlp.fc2.*,*projection*", bucket_size=17)
INPUTS = {"proxy": "of these tests"}
PROXYS = proxy_config(batch_size=8, steps=5, folds=2, contexts=2)


@dataclass(frozen=True)
class Embedded:
    """A small world with pictures, embedded by a tiny encoder, and proxies on it."""

    folder: Path

    @property
    def encoder(self) -> EmbedConfig:
        return EmbedConfig(encoder=str(self.folder / "encoder"), batch_size=16)

    def pairs(self, role: str) -> PairSet:
        return PairSet(self.folder / f"embed-{role}")

    def score(self, out: Path, engine: Engine, config: ScoreConfig, **embed: Any) -> Manifest:
        return score_through_towers(
            self.pairs("pool"),
            self.pairs("target"),
            PROXYS,
            self.folder / "proxy",
            replace(self.encoder, **embed),
            INPUTS,
            config,
            out,
            engine,
        )


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Embedded:
    world = Embedded(tmp_path_factory.mktemp("towers"))
    sizes = {"pretrain": 64, "pool": 40, "target": 16, "test": 0}
    write_world(world.folder, WorldConfig(seed=1, shard_size=20, **sizes))
    FitEncoder(shards=str(world.folder / "pretrain"), out=world.folder / "encoder", steps=3, seed=0)()
    for role in ("pool", "target"):
        shards = list_shards(str(world.folder / role))
        embed(shards, world.encoder, world.folder / f"embed-{role}", LocalEngine())
    pool, target = world.pairs("pool"), world.pairs("target")
    proxies(pool, target, INPUTS, PROXYS, world.folder / "proxy", LocalEngine())
    return world


def scores_of(out: Path) -> np.ndarray:
    scores: np.ndarray = pq.read_table(out / "scores.parquet")["score"].to_numpy()
    return scores


@pytest.fixture(scope="module")
def truth(embedded: Embedded) -> np.ndarray:
    """One batch of all pairs, by forward mode, without stages."""
    pool = embedded.pairs("pool")
    given = ThroughTowers(
        pool=pool,
        target=embedded.pairs("target"),
        proxies=PROXYS,
        proxy_folder=embedded.folder / "proxy",
        embed=embedded.encoder,
        config=BLOCKS,
        parts=embedded.folder,
        mark="",
    )
    worker = TowerWorker(given, "cpu")
    estimator = check_tower_estimator(BLOCKS)
    scorer = fitted(estimator.fit(worker.problem(2**30)), lambda fold: None)
    assert isinstance(scorer, RoleScorer)
    rows = np.arange(len(pool))
    everything = worker.recorded(worker.originals, rows)
    return scorer(Batch(uid=rows.astype(str), inputs=everything.inputs, image=everything.image, row=rows))


def test_scores_are_those_of_one_batch_by_forward_mode(
    embedded: Embedded, truth: np.ndarray, tmp_path: Path
) -> None:
    assert np.std(truth) > 1e-4
    for size in (5, 64):
        out = tmp_path / str(size)
        manifest = embedded.score(out, LocalEngine(), BLOCKS, batch_size=size)
        np.testing.assert_allclose(scores_of(out), truth, rtol=0, atol=2e-3 * np.std(truth))
        assert pq.read_table(out / "scores.parquet")["uid"].to_pylist() == list(
            embedded.pairs("pool").column("uid")
        )
        assert 0 < manifest.details["disagreement_with_forward_mode"] < 1e-3
        assert manifest.details["parameters"] == 2 * (64 * 128 + 256 * 128 + 128)
        assert not list(out.glob("parts-*")), "tangents have served"


def test_ray_gives_the_same_scores(
    embedded: Embedded, truth: np.ndarray, tmp_path: Path, ray_engine: Engine
) -> None:
    embedded.score(tmp_path, ray_engine, BLOCKS, num_actors=2, cpus_per_actor=1)
    np.testing.assert_allclose(scores_of(tmp_path), truth, rtol=0, atol=2e-3 * np.std(truth))


def test_a_second_call_does_nothing(embedded: Embedded, tmp_path: Path) -> None:
    first = embedded.score(tmp_path, LocalEngine(), BLOCKS)
    assert embedded.score(tmp_path, Idle(), BLOCKS) == first


def test_a_killed_run_goes_on_where_it_was(embedded: Embedded, tmp_path: Path) -> None:
    """Killed after the direction and two blocks, then after two more."""
    out, quick = tmp_path / "killed", replace(BLOCKS, space="*projection*")
    for most in (4, 6):
        before = times(out) if out.exists() else {}
        with pytest.raises(Killed):
            embedded.score(out, Counting(most=most), quick, batch_size=1)
        after = times(out)
        assert {path: after[path] for path in before} == before
        assert len(after) > len(before)
    embedded.score(out, LocalEngine(), quick, batch_size=1)
    embedded.score(tmp_path / "whole", LocalEngine(), quick, batch_size=1)
    np.testing.assert_array_equal(scores_of(out), scores_of(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("config", "embed", "told"),
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
def test_what_cannot_be_scored_is_told(
    embedded: Embedded, tmp_path: Path, config: ScoreConfig, embed: dict[str, str], told: str
) -> None:
    with pytest.raises(InputError, match=told):
        embedded.score(tmp_path, LocalEngine(), config, **embed)


def test_originals_are_what_the_shards_hold(embedded: Embedded) -> None:
    pool = embedded.pairs("pool")
    originals = RawMedia(pool)
    held = {
        (sample.image, caption)
        for shard in list_shards(str(embedded.folder / "pool"))
        for sample in read_shard(shard)
        if isinstance(sample, Sample)
        for caption in sample.captions
    }
    found = set(zip(originals.pictures(pool.image), originals.captions(pool.text)))
    assert found == held
    assert sorted(originals.images) == sorted(set(pool.image))
    assert sorted(originals.texts) == sorted(set(pool.text))
    lengths = [len(caption) for caption in originals.captions(originals.texts)]
    assert lengths == sorted(lengths)
