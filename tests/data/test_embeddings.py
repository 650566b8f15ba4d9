"""Chunks, their merge into buckets, and the table that comes of it."""

import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from influencespace.data import bucket_files
from influencespace.data.artifacts import Manifest, write_manifest
from influencespace.data.chunks import (
    ChunkFolder,
    Digests,
    Floats,
    digests_of,
    numbers_of,
    pair_rows,
    read_chunk,
    set_column,
    table_of,
    write_chunk,
)
from influencespace.data.embeddings import TEXT, EmbeddingTable, read_rejected
from influencespace.data.merge import BucketReport, MergeBucket, MergeRun, join_rejected
from influencespace.data.schema import ImageRef, Rejection, Sample
from influencespace.data.uids import digest
from influencespace.errors import InputError

DIMENSION = 5


def sample(image: str, *captions: str, uid: str | None = None, group: str | None = None) -> Sample:
    return Sample(
        image=image.encode(), captions=captions, uid=uid, group=group, ref=ImageRef(path="a.tar", offset=7)
    )


def vectors(digests: Digests) -> Floats:
    """Each digest embedded as a unit vector of its own bytes."""
    rows = np.frombuffer(digests.tobytes(), np.uint8).reshape(-1, 16)[:, :DIMENSION] + np.float32(1)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def chunk(
    path: Path,
    items: Sequence[Sample | Rejection],
    failures: dict[bytes, str] | None = None,
    *,
    alone: bool = True,
) -> Path:
    """A chunk of these items, with embeddings unless they are provided apart (`alone` False)."""
    pairs = table_of(pair_rows(f"{path.name}.tar", items))
    reasons = [
        reason or (failures or {}).get(image)
        for reason, image in zip(pairs["reason"].to_pylist(), pairs["image"].to_pylist(), strict=True)
    ]
    images, texts = (vectors(digests_of(pairs[name])) for name in ("image", "text"))
    width = DIMENSION if alone else 0
    write_chunk(path, set_column(pairs, "reason", reasons), images[:, :width], texts[:, :width])
    return path


def merged(
    folder: Path, chunks: Sequence[Path], provided: Sequence[Path] | None = None, count: int = 1
) -> BucketReport:
    """The artifact of some chunks, in so many buckets."""
    tasks = [
        MergeBucket(folder=folder, number=number, count=count, chunks=chunks, provided=provided)
        for number in range(count)
    ]
    report = sum((task()[1] for task in tasks), BucketReport())
    join_rejected(folder, count)
    details = {"buckets": report.buckets, "groups": report.groups, "dimension": DIMENSION}
    manifest = Manifest(
        stage="embed",
        fingerprint="f",
        rows_in=report.rows_in,
        rows_out=sum(report.buckets),
        rejected=report.rejected,
        details=details,
    )
    write_manifest(folder, manifest)
    return report


def build(
    folder: Path,
    shards: Sequence[Sequence[Sample | Rejection]],
    failures: dict[bytes, str] | None = None,
    count: int = 1,
) -> BucketReport:
    """The artifact of these samples, a chunk for each shard."""
    chunks = [chunk(folder / f"{i}.arrow", items, failures) for i, items in enumerate(shards)]
    return merged(folder, chunks, count=count)


SAMPLES = [
    sample("cat", "a cat", "two cats", uid="u1", group="x"),
    sample("dog", "a dog", uid="u2"),
    sample("cat", "a cat"),
    sample("cat", "a cat"),
    sample("sun", "a dog", uid="u2"),
    Rejection(shard="0.tar", uid="bad", reason="the caption is empty"),
    sample("bus", "a bus", uid="u3"),
]


def test_digests_keep_their_trailing_zeros() -> None:
    names = [bytes(16), b"a" + bytes(15), b"b" * 15 + b"\0", b"c" * 16]
    table = pa.table({"digest": pa.array(names[:0] + names, pa.binary(16))})
    digests = digests_of(pa.concat_tables([table, table.slice(1, 2)])["digest"])
    assert digests.tobytes() == b"".join(names + names[1:3])
    assert list(digests[:4].argsort()) == [0, 1, 2, 3]


@given(st.lists(st.binary(min_size=16, max_size=16), min_size=1))
def test_numbers_are_of_the_content_and_never_negative(contents: list[bytes]) -> None:
    numbers = numbers_of(np.frombuffer(b"".join(contents), "S16"))
    expected = [int.from_bytes(content[:8], "little") & (2**63 - 1) for content in contents]
    assert numbers.tolist() == expected


def test_a_chunk_has_a_row_for_each_pair_and_rejection_in_canonical_order(tmp_path: Path) -> None:
    table = read_chunk(chunk(tmp_path / "a", SAMPLES))
    assert sorted(table["uid"].to_pylist())[-6:] == ["bad", "u1#0", "u1#1", "u2", "u2", "u3"]
    assert [reason for reason in table["reason"].to_pylist() if reason] == ["the caption is empty"]
    keys = digests_of(table["key"])
    assert (keys[1:] >= keys[:-1]).all()
    assert keys.tobytes() == b"".join(digest(uid.encode()) for uid in table["uid"].to_pylist())


def test_a_chunk_is_written_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("influencespace.data.chunks.BATCH_ROWS", 3)
    table = read_chunk(chunk(tmp_path / "a", SAMPLES))
    assert len(table) == 8
    assert table["key"].num_chunks == 3


def test_a_cut_chunk_counts_as_absent(tmp_path: Path) -> None:
    folder = ChunkFolder(tmp_path)
    assert not folder.done
    data = chunk(folder.chunk(0), SAMPLES).read_bytes()
    folder.close(1, 8)
    assert folder.done
    for length in (0, 8, len(data) // 2, len(data) - 1):
        folder.chunk(0).write_bytes(data[:length])
        assert not folder.done


def test_the_merge_keeps_or_rejects_every_row(tmp_path: Path) -> None:
    done = build(tmp_path, [SAMPLES], failures={digest(b"bus"): "damaged"})
    assert (done.rows_in, sum(done.buckets), done.rejected) == (8, 5, 3)
    assert done.copies == 1
    assert done.groups == ["x"]
    rejected = {row["uid"]: row["reason"] for row in read_rejected(tmp_path).to_pylist()}
    assert rejected == {"bad": "the caption is empty", "u2": "duplicate uid", "u3": "damaged"}
    uids = EmbeddingTable.open(tmp_path).pairs("uid")["uid"].to_pylist()
    copy = digest(digest(b"cat") + b"a cat").hex()
    assert set(uids) == {"u1#0", "u1#1", "u2", copy, f"{copy}~1"}
    assert uids == sorted(uids, key=lambda uid: (digest(uid.partition("~")[0].encode()), uid))


def test_embeddings_belong_to_their_pairs(tmp_path: Path) -> None:
    build(tmp_path, [SAMPLES[:2], SAMPLES[2:]], count=3)
    table = EmbeddingTable.open(tmp_path)
    images, texts = table.embeddings(slice(None))
    captions = table.pairs("caption")["caption"].to_pylist()
    expected = vectors(np.frombuffer(b"".join(digest(caption.encode()) for caption in captions), "S16"))
    np.testing.assert_array_equal(texts, expected.astype(np.float16).astype(np.float32))
    scores = table.pairs("clip_score")["clip_score"].to_numpy()
    np.testing.assert_allclose(scores, (images * texts).sum(1), rtol=2e-3)


words = st.sampled_from(["cat", "dog", "sun", "bus"])
samples = st.builds(
    lambda image, captions, uid, group: sample(image, *captions, uid=uid, group=group),
    words,
    st.lists(words, min_size=1, max_size=3, unique=True),
    st.none() | st.sampled_from(["u1", "u2", "u3"]),
    st.none() | st.sampled_from(["x", "y"]),
)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(samples, min_size=1, max_size=12),
    st.randoms(use_true_random=False),
    st.integers(1, 5),
    st.integers(1, 4),
)
def test_no_partition_order_or_bucket_changes_the_artifact(
    tmp_path_factory: pytest.TempPathFactory,
    items: list[Sample],
    random: np.random.Generator,
    shards: int,
    count: int,
) -> None:
    one, other = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("other")
    failures = {digest(b"sun"): "damaged"}
    done = build(one, [items], failures)
    shuffled = list(items)
    random.shuffle(shuffled)
    report = build(other, [shuffled[i::shards] for i in range(shards)], failures, count)
    assert (report.rows_in, sum(report.buckets)) == (done.rows_in, sum(done.buckets))
    here, there = EmbeddingTable.open(one), EmbeddingTable.open(other)
    assert here.pairs().equals(there.pairs())
    for left, right in zip(here.embeddings(slice(None)), there.embeddings(slice(None)), strict=True):
        np.testing.assert_array_equal(left, right)
    rejections = [read_rejected(folder).drop_columns("shard").to_pylist() for folder in (one, other)]
    assert sorted(rejections[0], key=str) == sorted(rejections[1], key=str)


def test_runs_of_chunks_give_the_same_buckets(tmp_path: Path) -> None:
    build(tmp_path / "a", [SAMPLES[:2], SAMPLES[2:4], SAMPLES[4:]])
    chunks = [tmp_path / "a" / f"{i}.arrow" for i in range(3)]
    run = MergeRun(chunks=chunks[:2], out=tmp_path / "run.arrow")
    merged(tmp_path / "b", [run(), chunks[2]])
    tables = [EmbeddingTable.open(tmp_path / folder) for folder in "ab"]
    assert tables[0].pairs().equals(tables[1].pairs())
    written = run.out.stat().st_mtime_ns
    assert run().stat().st_mtime_ns == written


def test_a_bucket_that_is_there_is_not_merged_again(tmp_path: Path) -> None:
    path = chunk(tmp_path / "0.arrow", SAMPLES)
    task = MergeBucket(folder=tmp_path, number=0, count=1, chunks=[path])
    first = task()
    path.unlink()
    assert task() == first


@pytest.mark.parametrize("gone", ["bucket-00000/pairs.parquet", "bucket-00000/vectors.arrow"])
def test_no_report_stands_for_a_file_that_is_gone(tmp_path: Path, gone: str) -> None:
    task = MergeBucket(folder=tmp_path, number=0, count=1, chunks=[chunk(tmp_path / "0.arrow", SAMPLES)])
    first, before = task(), (tmp_path / gone).read_bytes()
    (tmp_path / gone).unlink()
    assert task() == first
    assert (tmp_path / gone).read_bytes() == before


def test_pairs_without_a_provided_embedding_are_rejected(tmp_path: Path) -> None:
    listed = chunk(tmp_path / "listed.arrow", [*SAMPLES[:2], *SAMPLES[6:]], alone=False)
    given = [
        sample("cat", "a cat", uid="u1#0"),
        Rejection(shard="x", uid="u1#1", reason="the embedding is zero"),
        Rejection(shard="x", uid="row 7", reason="the pair has no uid"),
        sample("bus", "a bus", uid="u3"),
        sample("sun", "a sun", uid="stranger"),
    ]
    done = merged(tmp_path, [listed], [chunk(tmp_path / "given.arrow", given)])
    assert (done.rows_in, sum(done.buckets), done.rejected, done.unmatched) == (5, 2, 3, 1)
    rejected = {row["uid"]: row["reason"] for row in read_rejected(tmp_path).to_pylist()}
    assert rejected == {
        "u1#1": "the embedding is zero",
        "u2": "no embedding given",
        "row 7": "the pair has no uid",
    }
    table = EmbeddingTable.open(tmp_path)
    for row, image in zip(table.pairs().to_pylist(), table.embeddings(slice(None))[0], strict=True):
        name = {"u1#0": b"cat", "u3": b"bus"}[row["uid"]]
        expected = vectors(np.frombuffer(digest(name), "S16"))[0]
        np.testing.assert_allclose(image, expected, atol=1e-3)


def test_nothing_usable_is_an_empty_table(tmp_path: Path) -> None:
    done = build(tmp_path, [[SAMPLES[5]]])
    assert (done.rows_in, sum(done.buckets), done.rejected) == (1, 0, 1)
    table = EmbeddingTable.open(tmp_path)
    assert len(table) == 0
    assert table.rows(0, 10, "uid").num_rows == 0
    assert table.embeddings(slice(None))[0].shape == (0, DIMENSION)


def test_a_column_of_identifiers_is_no_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_files, "MAX_GROUPS", 3)
    items = [sample(f"image {i}", "seen", uid=f"u{i}", group=f"id {i}") for i in range(4)]
    with pytest.raises(InputError, match=r"more than 3 values.*embed\.read\.group_column"):
        build(tmp_path, [items])


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EmbeddingTable:
    """40 pairs in three buckets with row groups of 7."""
    monkeypatch.setattr(bucket_files, "ROW_GROUP", 7)
    items = [sample(f"image {i % 9}", f"caption {i % 13}", uid=f"u{i}") for i in range(40)]
    build(tmp_path, [items], count=3)
    return EmbeddingTable.open(tmp_path)


@pytest.mark.parametrize(("start", "stop"), [(0, 40), (3, 5), (6, 8), (7, 14), (13, 29), (39, 60), (5, 5)])
def test_rows_are_a_slice_of_the_pairs(table: EmbeddingTable, start: int, stop: int) -> None:
    whole = table.pairs("uid", "caption").slice(start, stop - start)
    assert table.rows(start, stop, "uid", "caption").equals(whole)
    everything = table.embeddings(slice(None))
    for part, all_rows in zip(table.embeddings(slice(start, stop)), everything, strict=True):
        np.testing.assert_array_equal(part, all_rows[start:stop])
    np.testing.assert_array_equal(table.stored(slice(start, stop), TEXT), everything[1][start:stop])


@given(rows=st.lists(st.integers(0, 39)))
@settings(suppress_health_check=["function_scoped_fixture"], deadline=None)
def test_any_rows_in_any_order_can_be_taken(table: EmbeddingTable, rows: list[int]) -> None:
    chosen = np.array(rows, np.int64)
    uids = table.pairs("uid")["uid"].to_pylist()
    assert table.take(chosen, "uid")["uid"].to_pylist() == [uids[row] for row in rows]
    for part, all_rows in zip(table.embeddings(chosen), table.embeddings(slice(None)), strict=True):
        np.testing.assert_array_equal(part, all_rows[chosen])
    np.testing.assert_array_equal(table.stored(chosen, TEXT), table.embeddings(slice(None))[1][chosen])


def test_a_table_travels_by_its_name(table: EmbeddingTable) -> None:
    copy = pickle.loads(pickle.dumps(table))
    assert len(pickle.dumps(table)) < 1000
    assert copy == table
    np.testing.assert_array_equal(copy.embeddings(slice(0, 3))[0], table.embeddings(slice(0, 3))[0])


def test_an_unfinished_folder_is_an_error_for_people(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no finished embeddings"):
        EmbeddingTable.open(tmp_path)
