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
from chain import World, assert_equal_results, beside, carry, carry_beside, columns, set_range

from influencespace.core import histogram
from influencespace.core.select import HARMFUL, KEPT, OVER_SIZE, SelectionConfig
from influencespace.core.strata import rank_within
from influencespace.data.artifacts import File, file_digest, write_manifest
from influencespace.data.buckets import read_columns, write_columns
from influencespace.data.pair_set import PairSet
from influencespace.engine.ray_engine import RayEngine
from influencespace.errors import InputError
from influencespace.pipeline import STAGES
from influencespace.run import Run
from influencespace.stages.selection import selection
from influencespace.stages.selection.evidence import Evidence
from influencespace.stages.selection.pair_evidence import PairEvidence
from influencespace.stages.selection.selection import KeptRows
from influencespace.stages.selection.summary import rule_of

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


def joint_scores(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Pooled influence and its standard error, of every pair."""
    evidence = columns(run, "selection/evidence", "score", "score_se")
    return evidence["score"], evidence["score_se"]


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
        {"unit": "cluster", "weighting": "influence", "target_size": 0.5, "tau_low": -1.0, "tau_high": 0.0},
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


def strata_counts(run: Run) -> np.ndarray:
    """How many pairs each cluster has at each quantile."""
    strata, evidence = columns(run, "influence/strata", "cluster", "quantile"), Evidence.of(run)
    count = np.zeros((evidence.clusters, evidence.quantiles), np.int64)
    np.add.at(count, (strata["cluster"], strata["quantile"]), 1)
    return count


def test_clusters_leave_whole_and_the_lowest_first(truth: Run) -> None:
    pairs, evidence = PairEvidence(folder=truth.at("selection")), Evidence.of(truth)
    cluster = columns(truth, "influence/strata", "cluster")["cluster"]
    copies = columns(truth, "redundancy/copies", "leader")["leader"] != np.arange(len(truth.pool))
    influence, se = evidence.of_clusters(strata_counts(truth))
    assert (se > 0).all()
    deviation, order = influence[cluster].std(), np.unique(influence[np.unique(cluster)])
    between = float((order[0] + order[1]) / 2)
    sharp = {"margin_se": 0.0, "max_false_discovery": 0.0}
    subset = pairs.decide(SelectionConfig(unit="cluster", tau_low=between / deviation, **sharp))
    lowest = influence[cluster] == order[0]
    np.testing.assert_array_equal(subset.reason == HARMFUL, lowest)
    np.testing.assert_array_equal(subset.kept, ~lowest & ~copies)
    sized = pairs.decide(SelectionConfig(unit="cluster", tau_low=-1e9, target_size=0.5, **sharp))
    over = influence[cluster][sized.reason == OVER_SIZE]
    assert sized.kept.sum() == len(truth.pool) // 2
    assert over.max() <= influence[cluster][sized.kept].min()
    config = SelectionConfig(
        unit="cluster", tau_low=-1e9, tau_high=between / deviation, weighting="influence", **sharp
    )
    weighed = pairs.decide(config)
    by_cluster = [np.unique(weighed.weight[weighed.kept & (cluster == one)]) for one in np.unique(cluster)]
    assert all(len(one) <= 1 for one in by_cluster)
    followed = np.maximum(influence[cluster] / deviation - between / deviation, 0)[weighed.kept]
    free = weighed.weight[weighed.kept] < config.max_weight
    logs = np.log(weighed.weight[weighed.kept])
    np.testing.assert_allclose((logs - logs[0])[free], (followed - followed[0])[free], atol=1e-9)


def test_the_influence_of_a_cluster_is_the_mean_of_its_pairs_strata(truth: Run) -> None:
    evidence = Evidence.of(truth)
    strata = evidence.sample  # every pair is scored here
    of_pairs = evidence.pooled.mean[strata["cluster"], strata["quantile"]]
    found, _ = evidence.of_clusters(strata_counts(truth))
    for cluster in np.unique(strata["cluster"]):
        assert found[cluster] == pytest.approx(of_pairs[strata["cluster"] == cluster].mean())
    facts = PairEvidence(folder=truth.at("selection")).facts["clusters"]
    assert facts["influence"] == pytest.approx(found)
    assert facts["deviation"] == pytest.approx(found[strata["cluster"]].std())


def test_the_threshold_is_in_standard_deviations_of_single_influences(truth: Run) -> None:
    evidence, pairs = Evidence.of(truth), PairEvidence(folder=truth.at("selection"))
    score, se = joint_scores(truth)
    spread = evidence.influence["influence"].std()  # all pairs are scored here
    assert pairs.deviation == evidence.deviation == pytest.approx(spread)
    for margin in (0.0, 1.0):
        subset = pairs.decide(SelectionConfig(tau_low=0.3, margin_se=margin, max_false_discovery=0))
        np.testing.assert_array_equal(subset.kept, score + margin * se >= 0.3 * spread)


def test_the_reported_margin_divides_what_is_removed_from_what_stays(truth: Run, tmp_path: Path) -> None:
    """A margin that hardly any pair has, beyond which others are removed too."""
    run = carry_beside(truth, tmp_path, "selection", margin_se=1.5, max_false_discovery=0.4)
    score, se = joint_scores(truth)
    margin = run.manifest("selection").details["margin"]
    harmful = np.array(table(run)["reason"].to_pylist()) == HARMFUL
    assert 0 < margin < 1.5
    assert harmful.sum() > (score + 1.5 * se < 0).sum()
    np.testing.assert_array_equal(harmful, score + margin * se < 1e-12)


def test_that_standard_deviation_is_the_pools_however_unevenly_strata_were_sampled(
    truth: Run, tmp_path: Path
) -> None:
    whole = Evidence.of(truth)
    scored, quantile = dict(whole.influence), whole.sample["quantile"]
    some = rank_within(quantile, np.zeros(len(quantile))) < np.where(quantile % 2, 3, 9)
    write_columns(tmp_path / "influence.parquet", {name: column[some] for name, column in scored.items()})
    for name in ("strata.parquet", "strata.json"):
        shutil.copy(truth.at("influence") / name, tmp_path)
    inside = [
        (int((quantile == one).sum()), scored["influence"][some & (quantile == one)])
        for one in np.unique(quantile)
    ]
    first, second = (
        sum(size * (values**power).mean() for size, values in inside) / len(quantile) for power in (1, 2)
    )
    assert some.sum() < len(quantile)
    assert Evidence(tmp_path).deviation == pytest.approx(np.sqrt(second - first**2))


def test_one_scored_pair_has_no_spread_to_converge_by(truth: Run, tmp_path: Path) -> None:
    scored = Evidence.of(truth).influence
    write_columns(tmp_path / "influence.parquet", {name: column[:1] for name, column in scored.items()})
    for name in ("strata.parquet", "strata.json"):
        shutil.copy(truth.at("influence") / name, tmp_path)
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
        path = run.at("influence") / "influence.parquet"
        write_columns(path, moved)
        manifest = run.manifest("influence")
        anew = File(size=path.stat().st_size, digest=file_digest(path))
        write_manifest(path.parent, replace(manifest, files={**manifest.files, path.name: anew}))
        warnings = carry(run, "selection").details["warnings"]
        assert any("has not converged" in warning for warning in warnings) == warned


def test_settings_without_effect_are_warned_of(truth: Run, tmp_path: Path) -> None:
    def warned(name: str, **settings: object) -> str:
        details = carry_beside(truth, tmp_path / name, "selection", **settings).manifest("selection").details
        return " ".join(details["warnings"])

    ignored = "tau_high = 0.5 has no effect"
    assert ignored in warned("uniform", weighting="uniform", tau_high=0.5)
    assert ignored not in warned("influence", weighting="influence", tau_high=0.5)


def test_kept_rows_are_the_pool_of_a_next_round(
    truth: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Range by range; the file is the one of an array that is held whole."""
    kept = np.flatnonzero(kept_pairs(truth))
    np.save(tmp_path / "whole.npy", kept)
    for size in (10**6, 7):
        monkeypatch.setattr(selection, "RANGE", size)
        job = KeptRows(truth.pool, truth.at("selection") / "curated.parquet", tmp_path / "kept.npy")
        assert job() == len(kept)
        assert (tmp_path / "kept.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


DECISIONS = {
    "auto": {},
    "sized": {"selection.weighting": "influence", "selection.target_size": 0.6, "selection.temperature": 0.5},
    "clusters": {
        "selection.unit": "cluster",
        "selection.weighting": "influence",
        "selection.target_size": 0.6,
        "selection.tau_high": 0.0,
        "selection.temperature": 0.1,
    },
    "floors": {"selection.weighting": "uniform", "selection.tau_low": 0.5, "selection.min_group_share": 0.4},
}


@pytest.mark.parametrize("name", DECISIONS)
def test_the_size_of_ranges_changes_nothing(
    truth: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    first = beside(truth, tmp_path / "first", "selection", settings=DECISIONS[name])
    carry(first, "selection")
    for size, collected in ((17, 10**6), (100, 0)):
        set_range(monkeypatch, size)
        monkeypatch.setattr(histogram, "COLLECTED", collected)
        again = beside(truth, tmp_path / f"{size}", "selection", settings=DECISIONS[name])
        carry(again, "selection")
        assert_equal_results(first.at("selection"), again.at("selection"), spreads=1e-5)
        kept, same = kept_pairs(first), kept_pairs(again)
        np.testing.assert_array_equal(kept, same)


@pytest.mark.ray
def test_three_ranges_on_ray_equal_the_plain_loop(
    truth: Run, tmp_path: Path, ray_engine: RayEngine, ranges: None
) -> None:
    here, there = (
        beside(truth, tmp_path / name, "selection", settings=DECISIONS["sized"]) for name in ("a", "b")
    )
    carry(here, "selection")
    carry(there, "selection", engine=RayEngine(2))
    assert_equal_results(here.at("selection"), there.at("selection"))


def test_a_later_round_decides_on_what_is_left_and_leaves_the_others(
    truth: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the ranges: what the first round dropped keeps its row, and weights are of all pairs."""
    settings = {"selection.weighting": "influence", "selection.target_size": 0.6}
    first = truth
    rows = tmp_path / "kept.npy"
    left = KeptRows(truth.pool, truth.at("selection") / "curated.parquet", rows)()
    sets = {**truth.sets, "everything": truth.pool, "pool": PairSet(truth.pool.folder, rows)}
    tables = []
    for size in (1000, 50):
        set_range(monkeypatch, size)
        later = replace(truth, folder=tmp_path / f"{size}", sets=sets, previous=first)
        later = beside(later, later.folder, settings=settings)
        details = carry(later, *(stage.name for stage in STAGES[:7])).details
        assert details["reasons"]["kept"] == round(0.6 * left)
        tables.append(table(later))
    curated, again = tables
    before = kept_pairs(truth)
    assert curated["uid"].to_pylist() == again["uid"].to_pylist() == table(truth)["uid"].to_pylist()
    for one in (curated, again):
        dropped = pa.array(np.flatnonzero(~before))
        assert one.take(dropped).equals(table(truth).take(dropped))
    assert curated["reason"].to_pylist() == again["reason"].to_pylist()
    weights, weights_again = (one["weight"].to_numpy() for one in tables)
    np.testing.assert_allclose(weights, weights_again, atol=1e-6)
    assert (weights > 0).sum() == round(0.6 * left)
