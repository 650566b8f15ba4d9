"""Tasks on a finished run: what is cleaned away, what stands for the rest, what caused an error, and refusals."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from influencespace.cli.arguments import options_of
from influencespace.core.coreset import d2, herding, k_center
from influencespace.core.select import SelectionConfig
from influencespace.data.embeddings import EmbeddingTable
from influencespace.data.images import read_image_bytes
from influencespace.data.pair_set import PairSet
from influencespace.data.schema import ImageRef
from influencespace.engine.local import LocalEngine
from influencespace.errors import InputError
from influencespace.models.fusion import concatenation
from influencespace.pipeline import load_run
from influencespace.run import Run
from influencespace.stages.scoring.trace import TraceConfig
from influencespace.tasks import choose, detect
from influencespace.tasks.choose import Method, clean, coreset
from influencespace.tasks.detect import POOLED, ranking_stage, read_truth
from influencespace.tasks.trace import query_by_picture, query_by_uid, retrieved, trace_run


@pytest.fixture
def run(small_run: Run) -> Run:
    return load_run(small_run)


def columns(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = pq.read_table(path).to_pydict()
    return result


def test_the_score_of_clusters_ranks_no_captions(run: Run) -> None:
    by_cluster = replace(run, config=replace(run.config, selection=SelectionConfig(unit="cluster")))
    with pytest.raises(InputError, match=r"judged whole clusters .* give --estimator"):
        detect.detect_run(by_cluster, None, None, LocalEngine())


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.95])
def test_the_lowest_scores_are_cleaned_away(run: Run, fraction: float) -> None:
    choice = clean(run, fraction)
    result, before = columns(choice.path), columns(run.folder / "curated.parquet")
    assert result["uid"] == before["uid"]
    assert result.keys() == before.keys()
    kept, score = np.array(result["kept"]), np.array(result["score"])
    assert choice.chosen == kept.sum() == 150 - round(fraction * 150)
    assert choice.of == 150
    if fraction:
        assert score[kept].min() >= score[~kept].max()
    assert (np.array(result["weight"]) == kept).all()
    assert {reason for reason, keep in zip(result["reason"], result["kept"]) if not keep} <= {"lowest score"}


def test_auto_is_the_decision_of_the_run(run: Run) -> None:
    choice = clean(run, None)
    result, curated = columns(choice.path), columns(run.folder / "curated.parquet")
    assert result.pop("weight") == [float(keep) for keep in curated["kept"]]
    assert len(set(curated.pop("weight"))) > 2  # the run's own weights follow influence
    assert result == curated
    assert choice.chosen == sum(curated["kept"])


@pytest.mark.parametrize("method", ["d2", "k_center", "herding", "diversity"])
def test_a_coreset_is_of_kept_pairs_and_a_smaller_one_is_its_prefix(run: Run, method: Method) -> None:
    curated = columns(run.folder / "curated.parquet")
    kept = {uid for uid, keep in zip(curated["uid"], curated["kept"]) if keep}
    large, small = coreset(run, 30, method), coreset(run, 0.1, method)
    result = columns(large.path)
    assert (large.chosen, large.of, small.chosen) == (30, 150, 15)
    assert result["rank"] == list(range(1, 31))
    assert len(set(result["uid"])) == 30
    assert set(result["uid"]) <= kept
    assert columns(small.path)["uid"] == result["uid"][:15]
    of_uid = dict(zip(curated["uid"], curated["score"]))
    assert result["score"] == [of_uid[uid] for uid in result["uid"]]


def kept_pairs(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Rows and scores of all kept pairs."""
    curated = columns(run.folder / "curated.parquet")
    rows = np.flatnonzero(curated["kept"])
    return rows, np.array(curated["score"], np.float32).astype(float)[rows]


@pytest.mark.parametrize(("method", "most"), [("d2", 10**6), ("d2", 47), ("k_center", 32), ("herding", 47)])
def test_a_coreset_is_chosen_part_by_part(
    run: Run, method: Method, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slow truth holds all: parts take turns to name the next pair, and one part is the whole choice."""
    rows, score = kept_pairs(run)
    parts = np.array_split(np.arange(len(rows)), -(-len(rows) // most))
    assert len(parts) > 1 or most == 10**6
    orders = []
    for part in parts:
        X = concatenation(*run.pool.inputs(rows[part]))
        worth = score[part] - score.min()
        whole = {
            "d2": lambda X=X, worth=worth: d2(X, worth, len(worth), forward=None),
            "k_center": lambda X=X: k_center(X, len(X)),
            "herding": lambda X=X: herding(X, len(X)),
        }[method]()
        orders.append(rows[part][whole])
    turns = [order[turn] for turn in range(len(parts[0])) for order in orders if turn < len(order)]
    read: list[int] = []
    inputs = PairSet.inputs

    def spied(pairs: PairSet, rows: Any, device: str = "cpu") -> Any:
        read.append(len(rows))
        return inputs(pairs, rows, device)

    monkeypatch.setattr(PairSet, "inputs", spied)
    monkeypatch.setattr(choose, "MAX_AT_ONCE", most)
    monkeypatch.setattr(choose, "RANGE", 16)
    result = columns(coreset(run, 40, method).path)
    assert result["uid"] == run.pool.read(np.array(turns[:40]), "uid")["uid"].tolist()
    assert result["rank"] == list(range(1, 41))
    assert max(read) == len(parts[0])


@pytest.mark.parametrize("size", [16, 10**6])
def test_a_ranking_is_the_order_of_all_scores(
    run: Run, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = np.random.default_rng(0).integers(0, 30, 150).astype(float)
    score[::11] = np.nan
    uids = [f"pair {i}" for i in range(150)]
    pq.write_table(pa.table({"uid": uids, "score": score}), tmp_path / "scores.parquet", row_group_size=40)
    monkeypatch.setattr(detect, "RANGE", size)
    assert detect.write_ranking(tmp_path / "scores.parquet", tmp_path / "ranking.parquet") == 150
    order = np.argsort(score, kind="stable")
    ranking = columns(tmp_path / "ranking.parquet")
    assert ranking["uid"] == [uids[i] for i in order]
    assert ranking["rank"] == list(range(1, 151))
    np.testing.assert_array_equal(ranking["score"], score[order])
    assert all(len(table) <= size for table in detect.scored_pairs(tmp_path / "scores.parquet"))
    truth = {uid: i % 3 == 0 for i, uid in enumerate(uids) if i % 2} | {"nobody": True}
    known, wrong = detect.known_scores(tmp_path / "scores.parquet", truth)
    judged = [i for i in range(150) if uids[i] in truth and np.isfinite(score[i])]
    assert known.tolist() == [score[i] for i in judged]
    assert wrong.tolist() == [truth[uids[i]] for i in judged]


def test_d2_prefers_pairs_that_help_more_than_coverage_alone_does(run: Run) -> None:
    means = {name: np.mean(columns(coreset(run, 20, name).path)["score"]) for name in ("d2", "k_center")}
    assert means["d2"] > means["k_center"]


def test_refusals(run: Run, tmp_path: Path) -> None:
    for fraction in (-0.1, 1.0, 7.0):
        with pytest.raises(InputError, match="fraction is"):
            clean(run, fraction)
    for size in (0, -3, 1.5, np.inf, np.nan):
        with pytest.raises(InputError, match="give a share of the pool"):
            coreset(run, size)
    for size in (0.001, 149):
        with pytest.raises(InputError, match="pairs, and the run kept"):
            coreset(run, size)
    summary = (run.folder / "summary.json").read_bytes()
    (run.folder / "summary.json").unlink()
    try:
        with pytest.raises(InputError, match="holds no finished run"):
            coreset(run, 10)
    finally:
        (run.folder / "summary.json").write_bytes(summary)


def test_what_cannot_be_used_is_reported_before_anything_starts(tmp_path: Path) -> None:
    assert options_of(["damping=0.5", "role=[a, b]"]) == {"damping": 0.5, "role": ["a", "b"]}
    with pytest.raises(InputError, match=r"--option role=\[a is not valid YAML"):
        options_of(["role=[a"])
    with pytest.raises(InputError, match="takes no options: leave damping out"):
        ranking_stage(POOLED, {"damping": 1})
    with pytest.raises(InputError, match="there is no estimator 'eciff'"):
        ranking_stage("eciff", {})
    with pytest.raises(InputError, match="is a folder without Parquet files: give a"):
        read_truth(tmp_path)


def test_a_truth_in_csv_keeps_its_uids_and_knows_true_from_false(tmp_path: Path) -> None:
    path = tmp_path / "truth.csv"
    path.write_text("uid,wrong\n000000012,true\n7,0\n")
    assert read_truth(path) == {"000000012": True, "7": False}
    for word in ("yes", "", "2"):
        path.write_text(f"uid,wrong\na,{word}\n")
        with pytest.raises(InputError, match=r"truth\.csv"):
            read_truth(path)


def pairs_of(run: Run, role: str) -> list[dict[str, Any]]:
    result: list[dict[str, Any]] = EmbeddingTable.open(run.folder / "embed" / role).pairs().to_pylist()
    return result


def picture_of(pair: dict[str, Any], folder: Path) -> Path:
    """The picture of a pair as a file of its own."""
    places = {key: pair[f"image_{key}"] for key in ("path", "offset", "length", "row")}
    path = folder / "picture.jpg"
    path.write_bytes(read_image_bytes(ImageRef(**places)))
    return path


def test_a_test_pair_is_traced_back_to_training_pairs(run: Run) -> None:
    uid = pairs_of(run, "test")[7]["uid"]
    (result,) = trace_run(run, [query_by_uid(run, uid)], TraceConfig(top=5), LocalEngine())
    pool = {pair["uid"] for pair in pairs_of(run, "pool")}
    for name, sign in (("harmful", -1), ("helpful", 1)):
        rows = result[name]
        assert [row["rank"] for row in rows] == list(range(1, len(rows) + 1))
        assert 0 < len(rows) <= 5
        assert {row["uid"] for row in rows} <= pool
        assert all(sign * row["score"] > 0 for row in rows)
        assert all(row["score"] == pytest.approx(row["own"] + row["negative"]) for row in rows)
        assert all(row["relative_influence"] >= 0.99 * abs(row["score"]) for row in rows)
    assert json.loads(Path(result["paths"]["trace.json"]).read_text()) == {
        key: value for key, value in result.items() if key != "paths"
    }
    page = Path(result["paths"]["trace.html"]).read_text()
    for row in (*result["harmful"], *result["helpful"]):
        assert row["uid"] in page
    assert page.count("data:image/jpeg;base64,") >= 1 + len(result["harmful"]) + len(result["helpful"])


def test_a_picture_with_its_caption_is_the_pair_that_it_is(run: Run, tmp_path: Path) -> None:
    """The run's own encoder embeds it, so the same training pairs are found, by an index too."""
    pair = pairs_of(run, "test")[3]
    known = query_by_uid(run, pair["uid"])
    outside = query_by_picture(run, picture_of(pair, tmp_path), f" {pair['caption']} ")
    first, second = trace_run(run, [known, outside], TraceConfig(top=5), LocalEngine())
    assert first["caption"] == second["caption"]
    assert [row["uid"] for row in first["harmful"]] == [row["uid"] for row in second["harmful"]]
    assert first["paths"] != second["paths"]
    (third,) = trace_run(run, [known], TraceConfig(top=5, index_dimension=10**6), LocalEngine(), index=True)
    for name in ("harmful", "helpful"):
        assert [row["uid"] for row in third[name]] == [row["uid"] for row in first[name]]
    assert (run.at("trace/index") / "manifest.json").is_file()


def test_the_page_escapes_what_others_wrote(run: Run, tmp_path: Path) -> None:
    path = picture_of(pairs_of(run, "test")[0], tmp_path)
    query = query_by_picture(run, path, "<script>alert(1)</script> & more")
    (result,) = trace_run(run, [query], TraceConfig(top=2), LocalEngine())
    page = Path(result["paths"]["trace.html"]).read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in page


def test_the_rank_of_an_answer() -> None:
    similarity, rows = np.array([0.9, 0.2, 0.5, 0.7]), np.array([10, 11, 12, 13])
    nothing = np.zeros(4, bool)
    assert retrieved(similarity, nothing, 0.6, rows).__dict__ == {"rank": 3, "of": 5, "first": 10}
    assert retrieved(similarity, nothing, 0.95, rows).__dict__ == {"rank": 1, "of": 5, "first": -1}
    right = np.array([True, False, False, False])  # another caption of the same picture
    assert retrieved(similarity, right, 0.1, rows).__dict__ == {"rank": 1, "of": 4, "first": -1}
    right = np.array([False, False, True, False])
    assert retrieved(similarity, right, 0.5, rows).__dict__ == {"rank": 3, "of": 4, "first": 10}


def test_wrong_queries_are_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="uid 'nobody' is in neither the test nor the target set"):
        query_by_uid(run, "nobody")
    with pytest.raises(InputError, match="is in the pool: it is a training pair, not a query"):
        query_by_uid(run, pairs_of(run, "pool")[0]["uid"])
    picture = tmp_path / "picture.png"
    Image.new("RGB", (8, 8), "red").save(picture)
    with pytest.raises(InputError, match=r"the caption of .* is empty"):
        query_by_picture(run, picture, " \n")
    with pytest.raises(InputError, match=r"none.png cannot be read: No such file"):
        query_by_picture(run, tmp_path / "none.png", "a dog")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        query_by_picture(run, tmp_path, "a dog")
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(InputError, match="cannot be used: not a readable image"):
        query_by_picture(run, tmp_path / "text.jpg", "a dog")
    embed = replace(run.config.embed, encoder="")
    imported = replace(run, config=replace(run.config, embed=embed))
    with pytest.raises(InputError, match="was made from embeddings without an encoder"):
        query_by_picture(imported, picture, "a dog")
