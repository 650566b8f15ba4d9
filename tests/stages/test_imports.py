"""Embeddings that are there already: alone or joined with shards by uid, and nothing disappears."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedding import POOL, provided, run, sample, write_tar
from PIL import Image

from influencespace.data.embeddings import EmbeddingTable, read_rejected, rejected_reasons
from influencespace.engine.local import LocalEngine
from influencespace.errors import InputError


def write_imported(path: Path, uids: Sequence[str | None], seed: int = 0) -> None:
    """Embeddings as our own Parquet holds them."""
    images, texts = np.random.default_rng(seed).normal(size=(2, len(uids), 8)).astype(np.float32)
    columns = {"uid": list(uids), "image_embedding": images.tolist(), "text_embedding": texts.tolist()}
    columns["caption"] = [f"about {uid}" for uid in uids]
    pq.write_table(pa.table(columns), path)


@pytest.mark.parametrize("kind", ["local", pytest.param("ray", marks=pytest.mark.ray)])
def test_imported_embeddings_alone_make_the_artifact(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    engine = LocalEngine() if kind == "local" else request.getfixturevalue("ray_engine")
    write_imported(tmp_path / "a.parquet", ["x", "y", "z", "y"])
    manifest = provided(tmp_path / "a.parquet", tmp_path / POOL, engine)
    assert (manifest.rows_in, manifest.rows_out, manifest.rejected) == (4, 3, 1)
    table = EmbeddingTable.open(tmp_path / POOL)
    assert dict(
        zip(table.pairs("uid")["uid"].to_pylist(), table.pairs("caption")["caption"].to_pylist())
    ) == {uid: f"about {uid}" for uid in "xyz"}
    images, texts = table.embeddings(slice(None))
    scores = table.pairs("clip_score")["clip_score"].to_numpy()
    np.testing.assert_allclose(scores, (images * texts).sum(1), atol=1e-3)
    assert provided(tmp_path / "a.parquet", tmp_path / POOL, engine) == manifest


def test_imported_embeddings_are_joined_by_uid_and_the_missing_are_listed(tmp_path: Path) -> None:
    samples = [sample(i, uid=f"own-{i}", captions=1) for i in range(4)] + [sample(0, uid="again", captions=1)]
    write_tar(tmp_path / "data" / "0.tar", samples)
    write_imported(tmp_path / "a.parquet", ["own-3", "own-0", "stranger", "own-1"])
    manifest = provided(tmp_path / "a.parquet", tmp_path / POOL, data=str(tmp_path / "data"))
    assert (manifest.rows_in, manifest.rows_out, manifest.rejected) == (5, 3, 2)
    assert manifest.details["unmatched_embeddings"] == 1
    rejected = read_rejected(tmp_path / POOL).to_pylist()
    assert {row["uid"]: row["reason"] for row in rejected} == {
        "own-2": "no embedding given",
        "again": "no embedding given",
    }
    table = EmbeddingTable.open(tmp_path / POOL)
    given = {row["uid"]: row["image_embedding"] for row in pq.read_table(tmp_path / "a.parquet").to_pylist()}
    for stored, row in zip(table.embeddings(slice(None))[0], table.pairs().to_pylist(), strict=True):
        expected = np.array(given[row["uid"]]) / np.linalg.norm(given[row["uid"]])
        np.testing.assert_allclose(stored, expected, atol=1e-3)
        assert row["caption"].startswith("picture")
        assert row["image_path"].endswith("0.tar")


def test_joined_rows_that_name_no_pair_are_listed_too(tmp_path: Path) -> None:
    write_tar(tmp_path / "data" / "0.tar", [sample(i, uid=f"own-{i}", captions=1) for i in range(2)])
    write_imported(tmp_path / "a.parquet", ["own-0", None, "own-1", None])
    manifest = provided(tmp_path / "a.parquet", tmp_path / POOL, data=str(tmp_path / "data"))
    assert (manifest.rows_in, manifest.rows_out, manifest.rejected) == (4, 2, 2)
    assert rejected_reasons(tmp_path / POOL) == {"the pair has no uid": 2}


def test_pictures_that_arrive_later_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "val2017"
    folder.mkdir()
    entries = [{"id": i, "file_name": f"{i}.png"} for i in range(2)]
    captions = [{"image_id": i, "caption": f"picture {i}"} for i in range(2)]
    (tmp_path / "annotations").mkdir()
    document = tmp_path / "annotations" / "captions_val2017.json"
    document.write_text(json.dumps({"images": entries, "annotations": captions}))
    for i in range(2):
        Image.new("RGB", (8, 8), (90 * i, 10, 10)).save(folder / f"{i}.png")
        manifest = run(str(document), tmp_path / POOL)
        assert manifest.rows_out == i + 1


def test_the_column_that_identifies_imported_pairs_can_be_named(tmp_path: Path) -> None:
    write_imported(tmp_path / "a.parquet", ["x", "y"])
    table = pq.read_table(tmp_path / "a.parquet")
    pq.write_table(table.rename_columns({"uid": "name"}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"no column uid .* as embed\.read\.uid_column"):
        provided(tmp_path / "a.parquet", tmp_path / POOL)
    provided(tmp_path / "a.parquet", tmp_path / POOL, uid_column="name")
    assert EmbeddingTable.open(tmp_path / POOL).pairs("uid")["uid"].to_pylist() == ["x", "y"]
