"""Parts, their consolidation, and the table that comes of it."""

import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from influencespace.data import merge as module
from influencespace.data.artifacts import Manifest, write_manifest
from influencespace.data.chunks import (
    DIGEST,
    Digests,
    Embedded,
    digests_of,
    find,
    has_fingerprint,
    pair_rows,
    read_embedded,
    read_index,
    read_owned,
    to_digests,
    write_embedded,
    write_index,
    write_owned,
)
from influencespace.data.embeddings import EmbeddingTable, read_rejected
from influencespace.data.merge import MergeReport, ProvidedEmbeddings, merge
from influencespace.data.schema import ImageRef, Rejection, Sample
from influencespace.data.uids import digest
from influencespace.errors import InputError

DIMENSION = 5


def as_digests(contents: Iterable[bytes]) -> Digests:
    return np.frombuffer(b"".join(contents), DIGEST)


def sample(image: str, *captions: str, uid: str | None = None, group: str | None = None) -> Sample:
    return Sample(
        image=image.encode(), captions=captions, uid=uid, group=group, ref=ImageRef(path="a.tar", offset=7)
    )


def embedded(digests: Digests, reasons: dict[bytes, str] | None = None) -> Embedded:
    """Each digest embedded as a unit vector of its own bytes."""
    data = digests.tobytes()
    vectors = np.frombuffer(data, np.uint8).reshape(-1, 16)[:, :DIMENSION] + np.float32(1)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    names = [data[16 * i : 16 * i + 16] for i in range(len(digests))]
    return Embedded(
        digests=digests,
        embeddings=vectors.astype(np.float32),
        truncated=np.array([name[0] % 2 == 0 for name in names], bool),
        reasons=[(reasons or {}).get(name) for name in names],
        sharpness=np.array([name[0] for name in names], np.float32),
    )


def build(
    folder: Path,
    shards: Sequence[Sequence[Sample | Rejection]],
    failures: dict[bytes, str] | None = None,
    provided: ProvidedEmbeddings | None = None,
) -> MergeReport:
    """The artifact of these samples, a part for each shard, as the embed stage would make it."""
    parts = [folder / f"{i}.index.arrow" for i in range(len(shards))]
    for i, items in enumerate(shards):
        write_index(parts[i], "mark", pair_rows(f"{i}.tar", items))
    write_owned(folder / "owned.arrow", parts)
    embeds = [folder / f"{i}.embed.arrow" for i in range(len(shards))]
    for i, path in enumerate(embeds):
        images, texts = read_owned(folder / "owned.arrow", i)
        write_embedded(path, "mark", embedded(images, failures), embedded(texts, failures))
    done = merge(folder, parts, embeds, provided)
    write_manifest(
        folder,
        Manifest(
            stage="embed",
            fingerprint="f",
            rows_in=done.rows_in,
            rows_out=done.rows_out,
            rejected=done.rejected,
        ),
    )
    return done


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
    assert to_digests(digests).to_pylist() == names + names[1:3]
    assert list(digests[:4].argsort()) == [0, 1, 2, 3]


@given(st.lists(st.binary(min_size=16, max_size=16)), st.lists(st.binary(min_size=16, max_size=16)))
def test_find_gives_the_place_or_minus_one(held: list[bytes], wanted: list[bytes]) -> None:
    held = sorted(set(held))
    expected = [held.index(one) if one in held else -1 for one in [*wanted, *held]]
    assert find(as_digests(held), as_digests([*wanted, *held])).tolist() == expected


def test_an_index_chunk_has_a_row_for_each_pair_and_rejection(tmp_path: Path) -> None:
    write_index(tmp_path / "a", "mark", pair_rows("0.tar", SAMPLES))
    table = read_index(tmp_path / "a")
    assert table["uid"].to_pylist()[:3] == ["u1#0", "u1#1", "u2"]
    assert table["reason"].to_pylist() == [None] * 6 + ["the caption is empty", None]
    assert table["image"].to_pylist()[0] == digest(b"cat")
    assert table["image_offset"].to_pylist()[0] == 7
    assert has_fingerprint(tmp_path / "a", "mark")
    assert not has_fingerprint(tmp_path / "a", "another")
    assert not has_fingerprint(tmp_path / "missing", "mark")


def test_an_index_chunk_is_written_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("influencespace.data.chunks.BATCH_ROWS", 3)
    write_index(tmp_path / "a", "mark", pair_rows("0.tar", SAMPLES))
    assert len(read_index(tmp_path / "a")) == 8
    assert read_index(tmp_path / "a", ["key"])["key"].num_chunks == 3


def test_a_cut_chunk_counts_as_absent(tmp_path: Path) -> None:
    write_index(tmp_path / "a", "mark", pair_rows("0.tar", SAMPLES))
    data = (tmp_path / "a").read_bytes()
    for length in (0, 8, len(data) // 2, len(data) - 1):
        (tmp_path / "a").write_bytes(data[:length])
        assert not has_fingerprint(tmp_path / "a", "mark")


def test_each_image_and_caption_has_one_owner(tmp_path: Path) -> None:
    shards = [[SAMPLES[0]], SAMPLES[1:3], SAMPLES[3:]]
    parts = [tmp_path / str(i) for i in range(3)]
    for i, items in enumerate(shards):
        write_index(parts[i], "mark", pair_rows("x", items))
    write_owned(tmp_path / "owned", parts)
    owned = [read_owned(tmp_path / "owned", i) for i in range(3)]
    names = {digest(word.encode()): word for word in ("cat", "dog", "sun", "bus")}
    assert [{names[name] for name in to_digests(images).to_pylist()} for images, _ in owned] == [
        {"cat"},
        {"dog"},
        {"sun", "bus"},
    ]
    assert [len(texts) for _, texts in owned] == [2, 1, 1]


def test_an_embed_chunk_reads_back(tmp_path: Path) -> None:
    images = embedded(as_digests(sorted(digest(bytes([i])) for i in range(4))))
    nothing = Embedded(
        digests=as_digests([]),
        embeddings=np.zeros((0, 0), np.float32),
        truncated=np.zeros(0, bool),
        reasons=[],
        sharpness=np.zeros(0, np.float32),
    )
    write_embedded(tmp_path / "a", "mark", images, nothing)
    read = read_embedded(tmp_path / "a", 0)
    assert read.digests.tobytes() == images.digests.tobytes()
    np.testing.assert_array_equal(read.embeddings, images.embeddings)
    np.testing.assert_array_equal(read.sharpness, images.sharpness)
    np.testing.assert_array_equal(read.truncated, images.truncated)
    assert read.reasons == [None] * 4
    assert len(read_embedded(tmp_path / "a", 1).digests) == 0
    write_embedded(tmp_path / "b", "mark", nothing, nothing)
    assert read_embedded(tmp_path / "b", 0).embeddings.shape == (0, 0)


def test_the_merge_keeps_or_rejects_every_row(tmp_path: Path) -> None:
    done = build(tmp_path, [SAMPLES], failures={digest(b"bus"): "damaged"})
    assert (done.rows_in, done.rows_out, done.rejected) == (8, 5, 3)
    assert done.details["exact_copies"] == 1
    assert done.details["distinct_images"] == 3
    rejected = {row["uid"]: row["reason"] for row in read_rejected(tmp_path).to_pylist()}
    assert rejected == {"bad": "the caption is empty", "u2": "duplicate uid", "u3": "damaged"}
    table = EmbeddingTable.open(tmp_path)
    uids = table.pairs("uid")["uid"].to_pylist()
    copy = digest(digest(b"cat") + b"a cat").hex()
    assert set(uids) == {"u1#0", "u1#1", "u2", copy, f"{copy}~1"}
    assert uids == sorted(uids, key=lambda uid: digest(uid.encode()))


def test_embeddings_belong_to_their_pairs(tmp_path: Path) -> None:
    build(tmp_path, [SAMPLES[:2], SAMPLES[2:]])
    table = EmbeddingTable.open(tmp_path)
    for row in table.pairs().to_pylist():
        expected = embedded(as_digests([digest(row["caption"].encode())])).embeddings[0]
        np.testing.assert_array_equal(table.texts[row["text"]], expected)
    both = table.images[table.column("image")] * table.texts[table.column("text")]
    np.testing.assert_allclose(table.column("clip_score"), both.sum(1), rtol=1e-6)


words = st.sampled_from(["cat", "dog", "sun", "bus"])
samples = st.builds(
    lambda image, captions, uid, group: sample(image, *captions, uid=uid, group=group),
    words,
    st.lists(words, min_size=1, max_size=3, unique=True),
    st.none() | st.sampled_from(["u1", "u2", "u3"]),
    st.none() | st.sampled_from(["x", "y"]),
)


@settings(max_examples=25, deadline=None)
@given(st.lists(samples, min_size=1, max_size=12), st.randoms(use_true_random=False), st.integers(1, 5))
def test_no_partition_or_order_changes_the_artifact(
    tmp_path_factory: pytest.TempPathFactory, items: list[Sample], random: np.random.Generator, shards: int
) -> None:
    one, other = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("other")
    failures = {digest(b"sun"): "damaged"}
    done = build(one, [items], failures)
    shuffled = list(items)
    random.shuffle(shuffled)
    assert build(other, [shuffled[i::shards] for i in range(shards)], failures) == done
    for name in ("images.npy", "texts.npy"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    assert pq.read_table(one / "pairs.parquet").equals(pq.read_table(other / "pairs.parquet"))
    left, right = (read_rejected(folder).drop_columns("shard").to_pylist() for folder in (one, other))
    assert sorted(left, key=str) == sorted(right, key=str)


def test_small_blocks_give_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "a", [SAMPLES])
    for name in ("BLOCK_PAIRS", "BLOCK_COSINES", "BLOCK_BYTES"):
        monkeypatch.setattr(module, name, 2)
    build(tmp_path / "b", [SAMPLES])
    assert (tmp_path / "a/images.npy").read_bytes() == (tmp_path / "b/images.npy").read_bytes()
    pairs = [pq.read_table(tmp_path / folder / "pairs.parquet") for folder in "ab"]
    assert pairs[0].equals(pairs[1])


def test_pairs_without_a_given_embedding_are_rejected(tmp_path: Path) -> None:
    uids = as_digests(sorted(digest(uid) for uid in (b"u1#0", b"u3")))
    refused = {digest(b"u1#1"): "the embedding is zero"}
    done = build(
        tmp_path, [SAMPLES[:2], SAMPLES[6:]], provided=ProvidedEmbeddings(keys=uids, refused=refused)
    )
    assert (done.rows_in, done.rows_out, done.rejected) == (4, 2, 2)
    rejected = {row["uid"]: row["reason"] for row in read_rejected(tmp_path).to_pylist()}
    assert rejected == {"u1#1": "the embedding is zero", "u2": "no embedding given"}


def test_nothing_usable_is_an_empty_table(tmp_path: Path) -> None:
    done = build(tmp_path, [[SAMPLES[5]]])
    assert (done.rows_in, done.rows_out, done.rejected) == (1, 0, 1)
    table = EmbeddingTable.open(tmp_path)
    assert len(table) == 0
    assert table.rows(0, 10, "uid").num_rows == 0


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EmbeddingTable:
    """40 pairs in row groups of 7."""
    monkeypatch.setattr(module, "BLOCK_PAIRS", 7)
    build(tmp_path, [[sample(f"image {i % 9}", f"caption {i % 13}", uid=f"u{i}") for i in range(40)]])
    return EmbeddingTable.open(tmp_path)


@pytest.mark.parametrize(("start", "stop"), [(0, 40), (3, 5), (6, 8), (7, 14), (13, 29), (39, 60), (5, 5)])
def test_rows_are_a_slice_of_the_pairs(table: EmbeddingTable, start: int, stop: int) -> None:
    assert table.rows(start, stop, "uid", "caption").equals(
        table.pairs("uid", "caption").slice(start, stop - start)
    )


def test_a_table_is_memory_mapped_and_travels_by_its_name(table: EmbeddingTable) -> None:
    assert isinstance(table.images, np.memmap)
    assert table.dimension == DIMENSION
    copy = pickle.loads(pickle.dumps(table))
    assert len(pickle.dumps(table)) < 1000
    assert copy == table
    np.testing.assert_array_equal(copy.images, table.images)


def test_an_unfinished_folder_is_an_error_for_people(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no finished embeddings"):
        EmbeddingTable.open(tmp_path)
