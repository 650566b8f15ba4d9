"""Copies among the pairs of a pool: planted ones are found, others are not, and the decision keeps one of each group."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chain import (
    World,
    assert_equal_results,
    beside,
    carry,
    carry_beside,
    columns,
    quality_of,
    with_sets,
    with_settings,
)
from planted import unit

from influencespace.core.additive import fit_additive
from influencespace.core.select import HARMFUL, KEPT, REDUNDANT
from influencespace.data.artifacts import Manifest, write_manifest
from influencespace.data.bucket_files import write_artifact
from influencespace.data.buckets import buckets_of
from influencespace.data.embeddings import IMAGE, TEXT
from influencespace.data.pair_set import PairSet
from influencespace.run import Run, Workers
from influencespace.stages.selection import captions, redundancy
from influencespace.stages.selection.evidence import KNOTS, PRUNING_AXES, Evidence
from influencespace.stages.selection.pair_evidence import PairEvidence

EXACT, NEAR, OTHER_CAPTION = 20, 15, 10


def with_columns(table: pa.Table, **columns: Any) -> pa.Table:
    """The table with other values in some columns."""
    for name, values in columns.items():
        field = table.schema.field(name)
        table = table.set_column(table.column_names.index(name), field, pa.array(values, field.type))
    return table


def write_pool(folder: Path, pairs: pa.Table, images: np.ndarray, texts: np.ndarray) -> None:
    """An embedding artifact of these pairs."""
    details = write_artifact(folder, pairs, images, texts, 100)
    rows = len(pairs)
    write_manifest(
        folder, Manifest(stage="embed", fingerprint="", rows_in=rows, rows_out=rows, details=details)
    )


@pytest.fixture(scope="module")
def copied(truth: Run, world: World, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The planted world with more pairs at the end of its pool: exact copies, near ones, and old pictures with new captions."""
    out = tmp_path_factory.mktemp("copied")
    pool = truth.pool
    table, (images, texts) = pool.table.pairs(), (X.numpy() for X in pool.inputs(slice(None)))
    generator = np.random.default_rng(5)

    def nearly(rows: np.ndarray) -> np.ndarray:
        return unit(rows + 0.01 * generator.normal(size=rows.shape))

    old = generator.permutation(len(table))[: EXACT + NEAR + OTHER_CAPTION]
    near, new = np.arange(EXACT, EXACT + NEAR), np.arange(EXACT, len(old))
    image, text = (table[name].to_numpy()[old] for name in ("image", "text"))
    image[near], text[new] = 10**6 + near, 10**6 + new
    more_images, more_texts = images[old], texts[old]
    more_images[near], more_texts[near] = nearly(more_images[near]), nearly(more_texts[near])
    more_texts[EXACT + NEAR :] = unit(generator.normal(size=(OTHER_CAPTION, texts.shape[1])))
    more = with_columns(table.take(pa.array(old)), image=image, text=text)
    more = with_columns(more, uid=[f"zz{i:03d}" for i in range(len(old))])
    folder, pairs = out / "pool", pa.concat_tables([table, more])
    write_pool(folder, pairs, np.concatenate([images, more_images]), np.concatenate([texts, more_texts]))
    np.save(folder / "old.npy", old)
    run = with_sets(beside(truth, out), pool=replace(world["pool"], folder=folder, fingerprint="copied"))
    run = with_settings(run, {"selection.weighting": "uniform"})
    carry(run, "proxies", "cluster", "redundancy")
    return run


@pytest.fixture(scope="module")
def decided(copied: Run) -> Run:
    """The same, with the decision."""
    carry(copied, "curvature", "influence", "fairness", "selection")
    return copied


def leaders(run: Run) -> np.ndarray:
    return columns(run, "redundancy/copies")["leader"]


def test_planted_copies_are_found_and_nothing_else(copied: Run) -> None:
    old = np.load(copied.pool.folder / "old.npy")
    leader = leaders(copied)
    new = np.arange(len(leader) - len(old), len(leader))
    np.testing.assert_array_equal(leader[leader], leader)
    same = EXACT + NEAR
    cluster = columns(copied, "cluster/clusters")["cluster"]
    together = cluster[old[:same]] == cluster[new[:same]]
    assert together[:EXACT].all()
    np.testing.assert_array_equal(leader[old[:same]] == leader[new[:same]], together)
    assert (leader[new[same:]] == new[same:]).all()
    copies = np.flatnonzero(leader != np.arange(len(leader)))
    assert set(copies) <= {*old[:same], *new[:same]}
    assert len(copies) == together.sum()
    copies_of = columns(copied, "redundancy/copies")["copies"]
    np.testing.assert_array_equal(copies_of, np.bincount(leader, minlength=len(leader))[leader])
    details = copied.manifest("redundancy").details
    assert details == {"pairs": len(leader), "exact_copies": EXACT, "near_copies": together[EXACT:].sum()}


def test_the_leader_is_the_best_of_its_group(copied: Run) -> None:
    quality = quality_of(copied)
    leader = leaders(copied)
    assert (quality[leader] >= quality - 1e-9).all()


def test_one_of_each_group_is_kept_unless_it_is_harmful(decided: Run) -> None:
    curated = pq.read_table(decided.at("selection") / "curated.parquet").to_pandas()
    leader = leaders(decided)
    copy = leader != np.arange(len(leader))
    reason = curated["reason"].to_numpy()
    assert set(reason[copy]) <= {REDUNDANT, HARMFUL}
    assert set(reason[~copy]) <= {KEPT, HARMFUL}
    np.testing.assert_array_equal(reason == HARMFUL, (reason == HARMFUL)[leader])
    np.testing.assert_allclose(curated["score"], curated["score"].to_numpy()[leader])
    assert (curated["weight"][copy] == 0).all()
    assert (reason == REDUNDANT).any()
    assert decided.manifest("selection").details["reasons"][REDUNDANT] == (reason == REDUNDANT).sum()
    again = PairEvidence(folder=decided.at("selection")).decide(decided.config.selection)
    assert again.reason.tolist() == reason.tolist()


def test_copies_are_one_piece_of_evidence(decided: Run) -> None:
    scores = Evidence.of(decided)
    scored, leader = scores.influence, leaders(decided)
    assert len(np.unique(leader[scored["pair"]])) < len(scored["pair"]) == len(leader)  # every pair is scored
    alone = np.unique(leader)
    influence = np.array([scored["influence"][leader[scored["pair"]] == pair].mean() for pair in alone])
    strata = columns(decided, "influence/strata")
    axes = np.stack([strata[name] for name in PRUNING_AXES], 1)
    first = np.array([np.flatnonzero(leader == pair)[0] for pair in alone])
    expected = fit_additive(axes[first], influence, KNOTS)
    found = scores.carried_over(strata)["score"]
    np.testing.assert_allclose(found, expected.predict(axes)[0], rtol=1e-6)
    together = np.array([found[leader == one].mean() for one in leader])
    np.testing.assert_allclose(columns(decided, "selection/evidence")["score"], together, rtol=1e-9)


def test_five_hundred_copies_of_a_pair_move_no_others_score(decided: Run) -> None:
    """One placeholder on many pages is no reason to know less of all else."""
    once = Evidence.of(decided)
    many = Evidence.of(decided)
    leader = leaders(decided)
    rows = np.append(np.arange(len(leader)), np.full(500, leader[0]))
    many.__dict__["facts"] = once.facts | {"pairs": len(rows)}
    many.__dict__["sample"] = {name: values[rows] for name, values in once.sample.items()}
    again = {name: values[rows] for name, values in once.influence.items()}
    many.__dict__["influence"] = again | {"pair": np.arange(len(rows))}
    many.__dict__["_copies"] = {"leader": leader[rows], "copies": np.bincount(leader[rows])[leader[rows]]}
    many.__dict__["common_variance"] = once.common_variance
    before, after = (one.carried_over(columns(decided, "influence/strata")) for one in (once, many))
    assert np.corrcoef(before["score"], after["score"])[0, 1] > 0.93
    assert np.median(after["score_se"]) == pytest.approx(np.median(before["score_se"]), rel=0.3)


def test_without_looking_nothing_is_a_copy(copied: Run, tmp_path: Path) -> None:
    run = carry_beside(copied, tmp_path, "redundancy", find=False)
    copies = columns(run, "redundancy/copies")
    np.testing.assert_array_equal(copies["leader"], np.arange(len(copied.pool)))
    assert (copies["copies"] == 1).all()
    before, after = (columns(one, "redundancy/captions") for one in (copied, run))
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], values)


def test_threshold_one_finds_exact_copies_only(copied: Run, tmp_path: Path) -> None:
    leader = leaders(carry_beside(copied, tmp_path, "redundancy", image=1, text=1))
    assert (leader != np.arange(len(leader))).sum() == EXACT


def test_few_copies_are_lost_where_few_pairs_are_compared(copied: Run, tmp_path: Path) -> None:
    whole, cut = leaders(copied), leaders(carry_beside(copied, tmp_path, "redundancy", max_compared=40))
    rows = np.arange(len(whole))
    assert ((cut != rows) <= (whole != rows)).all()
    assert (cut != rows).sum() >= 0.95 * (whole != rows).sum()


def test_a_second_device_finds_the_same(copied: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of CPUs, the way of a GPU."""
    monkeypatch.setattr(Workers, "device", "cpu:0")
    run = beside(copied, tmp_path, "redundancy", settings={"redundancy.max_compared": 40})
    carry(run, "redundancy")
    monkeypatch.undo()
    whole = carry_beside(copied, tmp_path / "cpu", "redundancy", max_compared=40)
    assert_equal_results(run.at("redundancy"), whole.at("redundancy"))


def test_what_captions_say_is_what_loops_find(copied: Run) -> None:
    table, pool = columns(copied, "redundancy/captions"), copied.pool
    image, text = pool.image, pool.text
    T = pool.inputs(slice(None))[1].double().numpy()
    images = [len(set(image[text == own])) for own in text]
    np.testing.assert_allclose(table["caption_images"], np.log(images))
    for row, found in enumerate(table["caption_agreement"]):
        # a pair that is held twice counts once
        others = {text[i]: T[i] for i in np.flatnonzero(image == image[row])}
        own = others.pop(text[row])
        expected = np.mean([own @ other for other in others.values()]) if others else np.nan
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_many_captions_of_an_image_are_read_in_blocks(
    copied: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captions, "READ", 2)
    again = carry_beside(copied, tmp_path, "redundancy")
    whole, blocks = (columns(run, "redundancy/captions")["caption_agreement"] for run in (copied, again))
    np.testing.assert_allclose(whole, blocks, atol=1e-12)


def test_ranges_and_partitions_change_nothing(
    copied: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (captions, redundancy):
        monkeypatch.setattr(module, "RANGE", 50)
    monkeypatch.setattr(redundancy, "MIN_PARTITION", 20)
    run = beside(copied, tmp_path, "redundancy")
    carry(run, "redundancy")
    assert_equal_results(run.at("redundancy"), copied.at("redundancy"))
    assert {path.name for path in run.at("redundancy").iterdir()} == {
        *("captions.parquet", "copies.parquet", "manifest.json")
    }


def test_columns_are_read_once_for_what_they_are_needed_for(
    copied: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Image and caption numbers by captions twice (by either) and by exact copies; of captions no picture is read."""
    for module in (captions, redundancy):
        monkeypatch.setattr(module, "RANGE", 50)
        monkeypatch.setattr(module, "VECTOR_RANGE", 50)
    ranges: list[tuple[int, int]] = []
    pictures: list[int] = []
    passed_on: list[tuple[int, int, int]] = []
    read, inputs, stored = PairSet.read, PairSet.inputs, PairSet.stored

    def watched(self: PairSet, rows: Any, *names: str) -> Any:
        ranges.append((rows.start, rows.stop))
        return read(self, rows, *names)

    def seen(self: PairSet, pairs: Any, device: str = "cpu") -> Any:
        pictures.append(len(pairs) if isinstance(pairs, np.ndarray) else pairs.stop - pairs.start)
        return inputs(self, pairs, device)

    def passed(self: PairSet, rows: slice, kind: int) -> Any:
        passed_on.append((kind, rows.start, rows.stop))
        return stored(self, rows, kind)

    monkeypatch.setattr(PairSet, "read", watched)
    monkeypatch.setattr(PairSet, "stored", passed)
    monkeypatch.setattr(PairSet, "inputs", seen)
    carry_beside(copied, tmp_path, "redundancy")
    spans = list(buckets_of(len(copied.pool), 50))
    assert sorted(ranges) == sorted(spans * 3)
    assert sum(pictures) == redundancy.MEAN_SAMPLE  # of which the mean is taken
    # front to back: captions to their images, then pictures and captions to their clusters
    assert sorted(passed_on) == sorted((kind, *span) for kind in (TEXT, TEXT, IMAGE) for span in spans)


def test_pictures_of_a_class_with_one_caption_are_no_copies(truth: Run, world: World, tmp_path: Path) -> None:
    table, (images, texts) = truth.pool.table.pairs(), (X.numpy() for X in truth.pool.inputs(slice(None)))
    table, folder = with_columns(table, text=table["image"].to_numpy() % 3), tmp_path / "pool"
    write_pool(folder, table, np.repeat(images[:1], len(images), 0), texts)  # images as alike as can be
    classes = with_sets(truth, pool=replace(world["pool"], folder=folder, fingerprint="classes"))
    classes = carry_beside(classes, tmp_path, "redundancy")
    leader = leaders(classes)
    pairs = np.stack([table["image"].to_numpy(), table["text"].to_numpy()], 1)
    assert len(np.unique(leader)) == len(np.unique(pairs, axis=0))  # exact copies alone have gone
    assert np.isnan(columns(classes, "redundancy/captions")["caption_images"]).all()
