"""Copies among the pairs of a pool: planted ones are found, others are not, and the decision keeps one of each group."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chain import World, beside, carry, carry_beside, columns, with_sets, with_settings

from influencespace.core.additive import fit_additive
from influencespace.core.select import HARMFUL, KEPT, REDUNDANT
from influencespace.run import Run
from influencespace.stages.selection.evidence import KNOTS, PRUNING_AXES, Evidence, PairEvidence

EXACT, NEAR, OTHER_CAPTION = 20, 15, 10


@pytest.fixture(scope="module")
def copied(truth: Run, world: World, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The planted world with more pairs at the end of its pool: exact copies, near ones, and old pictures with new captions."""
    out = tmp_path_factory.mktemp("copied")
    folder = out / "pool"
    folder.mkdir()
    source = truth.pool.folder
    table = pq.read_table(source / "pairs.parquet")
    pairs = table.to_pydict()
    images, texts = np.load(source / "images.npy"), np.load(source / "texts.npy")
    generator = np.random.default_rng(5)

    def nearly(rows: np.ndarray) -> np.ndarray:
        rows = rows + 0.01 * generator.normal(size=rows.shape)
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    old = generator.permutation(len(table))[: EXACT + NEAR + OTHER_CAPTION]
    near = old[EXACT : EXACT + NEAR]
    image, text = (np.array(pairs[name])[old] for name in ("image", "text"))
    image[EXACT : EXACT + NEAR] = len(images) + np.arange(NEAR)
    text[EXACT:] = len(texts) + np.arange(NEAR + OTHER_CAPTION)
    new_texts = generator.normal(size=(OTHER_CAPTION, texts.shape[1]))
    np.save(folder / "images.npy", np.concatenate([images, nearly(images[np.array(pairs["image"])[near]])]))
    np.save(
        folder / "texts.npy",
        np.concatenate(
            [
                texts,
                nearly(texts[np.array(pairs["text"])[near]]),
                (new_texts / np.linalg.norm(new_texts, axis=1, keepdims=True)).astype(np.float32),
            ]
        ),
    )
    more = table.take(pa.array(old))
    for name, values in (("image", image), ("text", text), ("uid", [f"zz{i:03d}" for i in range(len(old))])):
        column = pa.array(values, table.schema.field(name).type)
        more = more.set_column(more.column_names.index(name), table.schema.field(name), column)
    pq.write_table(pa.concat_tables([table, more]), folder / "pairs.parquet")
    (folder / "manifest.json").write_bytes((source / "manifest.json").read_bytes())
    np.save(folder / "old.npy", old)
    run = with_sets(beside(truth, out), pool=replace(world["pool"], folder=folder, fingerprint="copied"))
    run = with_settings(run, {"selection.weighting": "uniform"})
    carry(run, "proxies", "cluster", "redundancy", "curvature", "influence", "fairness", "selection")
    return run


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
    details = copied.manifest("redundancy").details
    assert details == {"pairs": len(leader), "exact_copies": EXACT, "near_copies": together[EXACT:].sum()}


def test_the_leader_is_the_best_of_its_group(copied: Run) -> None:
    quality = columns(copied, "influence/strata", "quality")["quality"]
    leader = leaders(copied)
    assert (quality[leader] >= quality - 1e-9).all()


def test_one_of_each_group_is_kept_unless_it_is_harmful(copied: Run) -> None:
    curated = pq.read_table(copied.at("selection") / "curated.parquet").to_pandas()
    leader = leaders(copied)
    copy = leader != np.arange(len(leader))
    reason = curated["reason"].to_numpy()
    assert set(reason[copy]) <= {REDUNDANT, HARMFUL}
    assert set(reason[~copy]) <= {KEPT, HARMFUL}
    np.testing.assert_array_equal(reason == HARMFUL, (reason == HARMFUL)[leader])
    np.testing.assert_allclose(curated["score"], curated["score"].to_numpy()[leader])
    assert (curated["weight"][copy] == 0).all()
    assert (reason == REDUNDANT).any()
    assert copied.manifest("selection").details["reasons"][REDUNDANT] == (reason == REDUNDANT).sum()
    again = PairEvidence(folder=copied.at("selection")).decide(copied.config.selection)
    assert again.reason.tolist() == reason.tolist()


def test_copies_are_one_piece_of_evidence(copied: Run) -> None:
    scores = Evidence.of(copied)
    scored, leader = scores.influence, leaders(copied)
    assert len(np.unique(leader[scored["pair"]])) < len(scored["pair"]) == len(leader)  # every pair is scored
    alone = np.unique(leader)
    influence = np.array([scored["influence"][leader[scored["pair"]] == pair].mean() for pair in alone])
    axes = np.stack([scores.strata[name] for name in PRUNING_AXES], 1)
    expected = fit_additive(axes, alone, influence, KNOTS)
    np.testing.assert_allclose(scores.pair_scores[0], expected.predict(axes)[0], rtol=1e-6)


def test_five_hundred_copies_of_a_pair_move_no_others_score(copied: Run) -> None:
    """One placeholder on many pages is no reason to know less of all else."""
    once = Evidence.of(copied)
    many = Evidence.of(copied)
    leader = leaders(copied)
    rows = np.append(np.arange(len(leader)), np.full(500, leader[0]))
    many.__dict__["strata"] = {name: values[rows] for name, values in once.strata.items()}
    again = {name: values[rows] for name, values in once.influence.items()}
    many.__dict__["influence"] = again | {"pair": np.arange(len(rows))}
    many.__dict__["_copies"] = {"leader": leader[rows], "image": once.image[rows]}
    many.__dict__["common_variance"] = once.common_variance
    score, se = (values[: len(leader)] for values in many.pair_scores)
    assert np.corrcoef(score, once.pair_scores[0])[0, 1] > 0.93  # knots lie where pairs are, copies too
    assert np.median(se) == pytest.approx(np.median(once.pair_scores[1]), rel=0.3)


def test_without_looking_nothing_is_a_copy(copied: Run, tmp_path: Path) -> None:
    leader = leaders(carry_beside(copied, tmp_path, "redundancy", find=False))
    np.testing.assert_array_equal(leader, np.arange(len(leader)))


def test_threshold_one_finds_exact_copies_only(copied: Run, tmp_path: Path) -> None:
    leader = leaders(carry_beside(copied, tmp_path, "redundancy", image=1, text=1))
    assert (leader != np.arange(len(leader))).sum() == EXACT


def test_few_copies_are_lost_where_few_pairs_are_compared(copied: Run, tmp_path: Path) -> None:
    whole, cut = leaders(copied), leaders(carry_beside(copied, tmp_path, "redundancy", max_compared=40))
    rows = np.arange(len(whole))
    assert ((cut != rows) <= (whole != rows)).all()
    assert (cut != rows).sum() >= 0.8 * (whole != rows).sum()


def test_pictures_of_a_class_with_one_caption_are_no_copies(truth: Run, world: World, tmp_path: Path) -> None:
    source, folder = truth.pool.folder, tmp_path / "pool"
    shutil.copytree(source, folder)
    table = pq.read_table(source / "pairs.parquet")
    text = pa.array(table["image"].to_numpy() % 3, table.schema.field("text").type)
    table = table.set_column(table.column_names.index("text"), "text", text)
    pq.write_table(table, folder / "pairs.parquet")
    images = np.load(source / "images.npy")
    np.save(folder / "images.npy", np.repeat(images[:1], len(images), 0))  # as alike as can be
    classes = with_sets(truth, pool=replace(world["pool"], folder=folder, fingerprint="classes"))
    leader = leaders(carry_beside(classes, tmp_path, "redundancy"))
    pairs = np.stack([table["image"].to_numpy(), table["text"].to_numpy()], 1)
    assert len(np.unique(leader)) == len(np.unique(pairs, axis=0))  # exact copies alone have gone
