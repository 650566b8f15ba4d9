"""The decision's files: columns that others read, baselines of the same size, and the same decision from cached scores."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chain import World, beside, carry, carry_beside, columns

from influencespace.core.select import HARMFUL, KEPT, OVER_SIZE, SelectionConfig
from influencespace.core.strata import rank_within
from influencespace.data.buckets import read_columns, write_columns
from influencespace.errors import InputError
from influencespace.estimators.filters import random_score
from influencespace.run import Run
from influencespace.stages.selection.evidence import Evidence, PairEvidence
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


def table(run: Run, name: str = "curated") -> pa.Table:
    return pq.read_table(run.at("selection") / f"{name}.parquet")


def kept_pairs(run: Run) -> np.ndarray:
    return table(run)["kept"].to_numpy()


def test_the_subset_has_a_row_for_every_pair_in_canonical_order(truth: Run, world: World) -> None:
    curated = table(truth)
    assert curated.schema.remove_metadata() == CURATED
    assert curated["uid"].to_pylist() == world["pool"].uids
    assert all(re.fullmatch(r"c\d+/q\d+", stratum) for stratum in curated["stratum"].to_pylist())
    assert set(curated["reason"].to_pylist()) <= {KEPT, HARMFUL}
    kept, weight = curated["kept"].to_numpy(), curated["weight"].to_numpy()
    assert 0 < kept.sum() < len(kept)
    np.testing.assert_array_equal(kept, np.array(curated["reason"].to_pylist()) == KEPT)
    bound = curated["score"].to_numpy() + SelectionConfig().margin_se * curated["score_se"].to_numpy()
    np.testing.assert_array_equal(kept, bound >= 0)
    np.testing.assert_array_equal(weight > 0, kept)
    assert weight[kept].mean() == pytest.approx(1, rel=1e-5)
    assert (curated["score_se"].to_numpy() > 0).all()


def test_the_strata_have_the_columns_of_the_contract(truth: Run) -> None:
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
    scored = columns(truth, "influence/influence")
    assert frame["scored"].sum() == len(scored["pair"])
    labels = curated["stratum"].to_numpy()[scored["pair"]]
    for stratum in np.unique(labels):
        mine = scored["influence"][labels == stratum]
        assert frame["influence"][stratum] == pytest.approx(mine.mean())
    assert (frame["pooled_se"] > 0).all()


def test_the_manifest_reports_the_rule_and_the_caption_control(truth: Run) -> None:
    details = truth.manifest("selection").details
    assert details["rule"].startswith("T + 0.75 SE < 0, or T < 0 as long as at most 5 % of such")
    assert rule_of(SelectionConfig(max_false_discovery=0)) == "T + 0.75 SE < 0"
    assert rule_of(SelectionConfig(margin_se=0)) == "T + 0 SE < 0"
    assert rule_of(SelectionConfig(conservative=True)) == "upper bound of T < 0"
    assert rule_of(SelectionConfig(tau_low=-0.5, max_false_discovery=0)) == "T + 0.75 SE < -0.5 SD"
    assert details["threshold"] == 0
    assert details["margin"] == 0.75
    assert details["kept_fraction"] == pytest.approx(kept_pairs(truth).mean())
    assert sum(details["reasons"].values()) == len(truth.pool)
    assert set(details["caption_control"]) == {
        "estimated_wrong_share",
        "influence_top_half",
        "influence_mean",
        "influence_permuted",
    }
    assert all(isinstance(warning, str) for warning in details["warnings"])
    json.dumps(details)


def test_baselines_keep_as_many_pairs_as_curated(truth: Run, world: World) -> None:
    weights = columns(truth, "selection/weights")
    assert tuple(weights) == METHODS
    kept = int(kept_pairs(truth).sum())
    for name, weight in weights.items():
        assert (weight > 0).sum() == (len(weight) if name == "everything" else kept), name
    quality = columns(truth, "proxies/quality")
    scores = {
        "neg_clip_loss": quality["neg_clip_in"],
        "clip_score": truth.pool.clip_score,
        "random": random_score(world["pool"].uids, 0),
    }
    for name, score in scores.items():
        chosen = weights[name] > 0
        assert score[chosen].min() >= score[~chosen].max(), name


def test_baselines_are_as_large_where_some_weights_vanish(truth: Run, tmp_path: Path) -> None:
    run = carry_beside(truth, tmp_path, "selection", weighting="influence", temperature=0.001)
    weights, kept = columns(run, "selection/weights"), int(kept_pairs(run).sum())
    assert (weights["curated"] > 0).sum() < kept == (weights["random"] > 0).sum()


def test_the_wrong_captions_are_removed(truth: Run, world: World) -> None:
    kept, wrong = kept_pairs(truth), world["pool"].wrong
    assert wrong[~kept].mean() > wrong.mean() + 0.2


@pytest.mark.parametrize(
    "settings",
    [
        {"weighting": "uniform", "tau_low": 0.2},
        {"weighting": "uniform", "conservative": True},
        {"weighting": "uniform", "target_size": 0.5},
        {"weighting": "influence", "temperature": 0.5, "max_weight": 2.0},
    ],
)
def test_written_evidence_gives_the_stages_decision(
    truth: Run, tmp_path: Path, settings: dict[str, object]
) -> None:
    """Of this and of any other run: evidence does not depend on how it is decided."""
    curated = table(carry_beside(truth, tmp_path, "selection", **settings))
    subset = PairEvidence(folder=truth.at("selection")).decide(SelectionConfig(**settings))
    np.testing.assert_array_equal(curated["kept"].to_numpy(), subset.kept)
    np.testing.assert_allclose(curated["weight"].to_numpy(), subset.weight, rtol=1e-6)
    assert curated["reason"].to_pylist() == subset.reason.tolist()
    if "target_size" in settings:
        assert subset.kept.sum() == len(truth.pool) // 2
        assert OVER_SIZE in subset.reason


def test_the_threshold_is_in_standard_deviations_of_single_influences(truth: Run) -> None:
    evidence, pairs = Evidence.of(truth), PairEvidence(folder=truth.at("selection"))
    score, se = evidence.joint_scores
    spread = evidence.influence["influence"].std()  # all pairs are scored here
    assert pairs.unit == evidence.unit == pytest.approx(spread)
    for margin in (0.0, 1.0):
        subset = pairs.decide(SelectionConfig(tau_low=0.3, margin_se=margin, max_false_discovery=0))
        np.testing.assert_array_equal(subset.kept, score + margin * se >= 0.3 * spread)


def test_the_reported_margin_divides_what_is_removed_from_what_stays(truth: Run, tmp_path: Path) -> None:
    """A margin that hardly any pair has, beyond which others are removed too."""
    run = carry_beside(truth, tmp_path, "selection", margin_se=1.5, max_false_discovery=0.4)
    score, se = Evidence.of(truth).joint_scores
    margin = run.manifest("selection").details["margin"]
    harmful = np.array(table(run)["reason"].to_pylist()) == HARMFUL
    assert 0 < margin < 1.5
    assert harmful.sum() > (score + 1.5 * se < 0).sum()
    np.testing.assert_array_equal(harmful, score + margin * se < 1e-12)


def test_that_standard_deviation_is_the_pools_however_unevenly_strata_were_sampled(
    truth: Run, tmp_path: Path
) -> None:
    whole = Evidence.of(truth)
    scored, stratum = dict(whole.influence), whole.stratum[whole.influence["pair"]]
    some = rank_within(stratum, np.zeros(len(stratum))) < np.where(stratum % 2, 3, 9)
    write_columns(tmp_path / "influence.parquet", {name: column[some] for name, column in scored.items()})
    shutil.copy(truth.at("influence") / "strata.parquet", tmp_path)
    inside = [
        (int((stratum == one).sum()), scored["influence"][some & (stratum == one)])
        for one in np.unique(stratum)
    ]
    first, second = (
        sum(size * (values**power).mean() for size, values in inside) / len(stratum) for power in (1, 2)
    )
    assert some.sum() < len(stratum)
    assert Evidence(tmp_path).unit == pytest.approx(np.sqrt(second - first**2))


def test_one_scored_pair_has_no_spread_to_converge_by(truth: Run, tmp_path: Path) -> None:
    scored = Evidence.of(truth).influence
    write_columns(tmp_path / "influence.parquet", {name: column[:1] for name, column in scored.items()})
    shutil.copy(truth.at("influence") / "strata.parquet", tmp_path)
    assert Evidence(tmp_path).convergence == 0


def test_a_threshold_that_keeps_nothing_is_refused(truth: Run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"every pair scores below tau_low = 50\.0"):
        carry_beside(truth, tmp_path, "selection", weighting="uniform", tau_low=50.0)


def test_a_proxy_that_has_not_converged_is_warned_of(truth: Run, tmp_path: Path) -> None:
    """In-sample influences that are far from zero on average."""
    scored = read_columns(truth.at("influence") / "influence.parquet")
    for shift, warned in ((0.0, False), (1.0, True)):
        run = beside(truth, tmp_path / f"{shift}", "selection", settings={"selection.weighting": "uniform"})
        (run.at("influence")).unlink()
        shutil.copytree(truth.at("influence"), run.at("influence"))
        centred = scored["influence_in"] - scored["influence_in"].mean()
        moved = scored | {"influence_in": centred + shift * centred.std()}
        write_columns(run.at("influence") / "influence.parquet", moved)
        warnings = carry(run, "selection").details["warnings"]
        assert any("has not converged" in warning for warning in warnings) == warned


def test_kept_rows_are_the_pool_of_a_next_round(truth: Run, tmp_path: Path) -> None:
    job = KeptRows(truth.pool, truth.at("selection") / "curated.parquet", tmp_path / "kept.npy")
    kept = np.flatnonzero(kept_pairs(truth))
    assert job() == len(kept)
    np.testing.assert_array_equal(np.load(tmp_path / "kept.npy"), kept)
