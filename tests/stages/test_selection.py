"""The decision's files: columns that others read, baselines of the same size, and the same decision from cached scores."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chain import Chain

from influencespace.core.select import HARMFUL, KEPT, OVER_SIZE, SelectionConfig
from influencespace.core.strata import rank_within
from influencespace.data.artifacts import read_manifest, write_manifest
from influencespace.data.buckets import read_columns, write_columns
from influencespace.errors import InputError
from influencespace.estimators.filters import random_score
from influencespace.stages.selection.evidence import Scores, decide
from influencespace.stages.selection.selection import METHODS, KeptRows, rule_of

CURATED = pa.schema(
    [
        ("uid", pa.string()),
        ("kept", pa.bool_()),
        ("weight", pa.float32()),
        ("score", pa.float32()),
        ("score_se", pa.float32()),
        ("stratum", pa.string()),
        ("reason", pa.string()),
    ]
)
STRATA = {
    "stratum": str,
    "cluster": np.int64,
    "quantile": np.int64,
    "pairs": np.int64,
    "scored": np.int64,
    "quality": np.float64,
    "influence_in": np.float64,
    "influence_out": np.float64,
    "influence": np.float64,
    "influence_se": np.float64,
    "pooled": np.float64,
    "pooled_se": np.float64,
    "p_value": np.float64,
    "harmful": np.bool_,
    "kept": np.float64,
}


def table(chain: Chain, name: str = "curated") -> pa.Table:
    return pq.read_table(chain.out / "curate" / f"{name}.parquet")


def curate_by(truth: Chain, out: Path, **settings: object) -> Chain:
    """The curate stage alone, with other settings."""
    chain = replace(truth, out=out, source_folder=truth.out, select=SelectionConfig(**settings))
    chain.run("curate")
    return chain


def test_the_subset_has_a_row_for_every_pair_in_canonical_order(truth: Chain) -> None:
    curated = table(truth)
    assert curated.schema.remove_metadata() == CURATED
    assert curated["uid"].to_pylist() == truth.world.pool.uids
    assert all(re.fullmatch(r"c\d+/q\d+", stratum) for stratum in curated["stratum"].to_pylist())
    assert set(curated["reason"].to_pylist()) <= {KEPT, HARMFUL}
    kept, weight = curated["kept"].to_numpy(), curated["weight"].to_numpy()
    assert 0 < kept.sum() < len(kept)
    np.testing.assert_array_equal(kept, np.array(curated["reason"].to_pylist()) == KEPT)
    bound = curated["score"].to_numpy() + SelectionConfig().margin * curated["score_se"].to_numpy()
    np.testing.assert_array_equal(kept, bound >= 0)
    np.testing.assert_array_equal(weight > 0, kept)
    assert weight[kept].mean() == pytest.approx(1, rel=1e-5)
    assert (curated["score_se"].to_numpy() > 0).all()


def test_the_strata_have_the_columns_of_the_contract(truth: Chain) -> None:
    strata = table(truth, "strata")
    assert strata.column_names == list(STRATA)
    for name, kind in STRATA.items():
        column = strata[name].to_numpy()
        assert (column.dtype == object) if kind is str else (column.dtype == kind), name
    curated = table(truth).to_pandas()
    frame = strata.to_pandas().set_index("stratum")
    assert frame["pairs"].sum() == len(curated)
    counts = curated.groupby("stratum").size()
    assert (frame["pairs"][counts.index] == counts).all()
    shares = curated.groupby("stratum")["kept"].mean()
    np.testing.assert_allclose(frame["kept"][shares.index], shares)
    scored = read_columns(truth.out / "attribute" / "influence.parquet")
    assert frame["scored"].sum() == len(scored["pair"])
    labels = curated["stratum"].to_numpy()[scored["pair"]]
    for stratum in np.unique(labels):
        mine = scored["influence"][labels == stratum]
        assert frame["influence"][stratum] == pytest.approx(mine.mean())
    assert (frame["pooled_se"] > 0).all()


def test_the_manifest_tells_the_rule_and_the_caption_control(truth: Chain) -> None:
    details = truth.manifest("curate").details
    assert details["rule"].startswith("T + 0.75 SE < 0, or T < 0 as long as at most 5 % of such")
    assert rule_of(SelectionConfig(max_false_discovery=0)) == "T + 0.75 SE < 0"
    assert rule_of(SelectionConfig(margin_se=0)) == "T + 0 SE < 0"
    assert rule_of(SelectionConfig(conservative=True)) == "upper bound of T < 0"
    assert rule_of(SelectionConfig(tau_low=-0.5, max_false_discovery=0)) == "T + 0.75 SE < -0.5 SD"
    assert details["threshold"] == 0
    assert details["margin"] == 0.75
    assert details["kept_fraction"] == pytest.approx(float(table(truth)["kept"].to_numpy().mean()))
    assert sum(details["reasons"].values()) == len(truth.world.pool)
    assert set(details["caption_control"]) == {
        "estimated_wrong_share",
        "influence_top_half",
        "influence_mean",
        "influence_permuted",
    }
    assert all(isinstance(warning, str) for warning in details["warnings"])
    json.dumps(details)


def test_baselines_keep_as_many_pairs_as_curated(truth: Chain) -> None:
    weights = read_columns(truth.out / "curate" / "weights.parquet")
    assert tuple(weights) == METHODS
    kept = int(table(truth)["kept"].to_numpy().sum())
    for name, weight in weights.items():
        assert (weight > 0).sum() == (len(weight) if name == "everything" else kept), name
    quality = read_columns(truth.out / "proxy" / "quality.parquet")
    scores = {
        "neg_clip_loss": quality["neg_clip_in"],
        "clip_score": truth.sets["pool"].clip_score,
        "random": random_score(truth.world.pool.uids, 0),
    }
    for name, score in scores.items():
        chosen = weights[name] > 0
        assert score[chosen].min() >= score[~chosen].max(), name


def test_baselines_are_as_large_where_some_weights_vanish(truth: Chain, tmp_path: Path) -> None:
    chain = curate_by(truth, tmp_path, weighting="influence", temperature=0.001)
    weights = read_columns(tmp_path / "curate" / "weights.parquet")
    kept = int(table(chain)["kept"].to_numpy().sum())
    assert (weights["curated"] > 0).sum() < kept == (weights["random"] > 0).sum()


def test_the_wrong_captions_go(truth: Chain) -> None:
    kept = table(truth)["kept"].to_numpy()
    wrong = truth.world.pool.wrong
    assert wrong[~kept].mean() > wrong.mean() + 0.2


@pytest.mark.parametrize(
    "settings",
    [
        {"weights": "uniform", "tau_low": 0.2},
        {"weights": "uniform", "conservative": True},
        {"weights": "uniform", "target_size": 0.5},
        {"weights": "influence", "temperature": 0.5, "max_weight": 2.0},
    ],
)
def test_cached_scores_give_the_stages_decision(
    truth: Chain, tmp_path: Path, settings: dict[str, object]
) -> None:
    curated = table(curate_by(truth, tmp_path, **settings))
    subset = decide(Scores(truth.out / "attribute", truth.out / "redundancy"), SelectionConfig(**settings))
    np.testing.assert_array_equal(curated["kept"].to_numpy(), subset.kept)
    np.testing.assert_allclose(curated["weight"].to_numpy(), subset.weight, rtol=1e-6)
    assert curated["reason"].to_pylist() == subset.reason.tolist()
    if "target_size" in settings:
        assert subset.kept.sum() == len(truth.world.pool) // 2
        assert OVER_SIZE in subset.reason


def test_the_threshold_is_in_standard_deviations_of_single_influences(truth: Chain) -> None:
    scores = Scores(truth.out / "attribute")
    score, se = scores.pair_scores
    assert scores.unit == pytest.approx(scores.influence["influence"].std())  # all pairs are scored here
    for margin in (0.0, 1.0):
        subset = decide(scores, SelectionConfig(tau_low=0.3, margin_se=margin, max_false_discovery=0))
        np.testing.assert_array_equal(subset.kept, score + margin * se >= 0.3 * scores.unit)


def test_the_margin_that_is_told_parts_what_goes_from_what_stays(truth: Chain, tmp_path: Path) -> None:
    """A margin that hardly any pair has, beyond which others go along."""
    run = curate_by(truth, tmp_path, margin_se=1.5, max_false_discovery=0.4)
    scores = Scores(truth.out / "attribute", truth.out / "redundancy")
    score, se = scores.joint_scores
    manifest = read_manifest(tmp_path / "curate")
    assert manifest is not None
    told = manifest.details["margin"]
    harmful = np.array(table(run)["reason"].to_pylist()) == HARMFUL
    assert 0 < told < 1.5
    assert harmful.sum() > (score + 1.5 * se < 0).sum()
    np.testing.assert_array_equal(harmful, score + told * se < 1e-12)


def test_that_standard_deviation_is_the_pools_however_unevenly_strata_were_sampled(
    truth: Chain, tmp_path: Path
) -> None:
    whole = Scores(truth.out / "attribute")
    columns = dict(whole.influence)
    stratum = (whole.strata["cluster"] * whole.quantiles + whole.strata["quantile"])[columns["pair"]]
    some = rank_within(stratum, np.zeros(len(stratum))) < np.where(stratum % 2, 3, 9)
    write_columns(tmp_path / "influence.parquet", {name: column[some] for name, column in columns.items()})
    shutil.copy(truth.out / "attribute" / "strata.parquet", tmp_path)
    inside = [
        (int((stratum == one).sum()), columns["influence"][some & (stratum == one)])
        for one in np.unique(stratum)
    ]
    first, second = (
        sum(size * (values**power).mean() for size, values in inside) / len(stratum) for power in (1, 2)
    )
    assert some.sum() < len(stratum)
    assert Scores(tmp_path).unit == pytest.approx(np.sqrt(second - first**2))


def test_one_scored_pair_has_no_spread_to_be_at_rest_by(truth: Chain, tmp_path: Path) -> None:
    columns = Scores(truth.out / "attribute").influence
    write_columns(tmp_path / "influence.parquet", {name: column[:1] for name, column in columns.items()})
    shutil.copy(truth.out / "attribute" / "strata.parquet", tmp_path)
    assert Scores(tmp_path).rest == 0


def test_a_threshold_that_keeps_nothing_is_said(truth: Chain, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"every pair scores below tau_low = 50\.0"):
        curate_by(truth, tmp_path, tau_low=50.0)


def test_an_unsettled_proxy_is_warned_of(truth: Chain, tmp_path: Path) -> None:
    """In-training influences that are far from zero on average."""
    source = tmp_path / "source"
    for stage in ("proxy", "redundancy", "attribute", "fairness"):
        (source / stage).mkdir(parents=True)
        for path in (truth.out / stage).iterdir():
            if path.is_file():
                (source / stage / path.name).write_bytes(path.read_bytes())
        write_manifest(source / stage, truth.manifest(stage))
    chain = replace(truth, out=tmp_path, source_folder=source)
    columns = read_columns(source / "attribute" / "influence.parquet")
    for shift, warned in ((0.0, False), (1.0, True)):
        influence = columns["influence_in"] - columns["influence_in"].mean()
        columns["influence_in"] = influence + shift * influence.std()
        write_columns(source / "attribute" / "influence.parquet", columns)
        warnings = replace(chain, out=tmp_path / str(shift)).run("curate").details["warnings"]
        assert any("not at rest" in warning for warning in warnings) == warned


def test_kept_rows_are_the_pool_of_a_next_round(truth: Chain, tmp_path: Path) -> None:
    KeptRows(truth.sets["pool"], truth.out / "curate" / "curated.parquet", tmp_path / "kept.npy")()
    kept = np.load(tmp_path / "kept.npy")
    np.testing.assert_array_equal(kept, np.flatnonzero(table(truth)["kept"].to_numpy()))
