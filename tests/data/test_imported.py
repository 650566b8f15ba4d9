import pickle
import re
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from influencespace.data.imported import (
    EmbeddingBatch,
    ImportOptions,
    files,
    list_chunks,
    read_chunk,
    read_imported_embeddings,
)
from influencespace.data.schema import Rejection
from influencespace.errors import InputError

ROWS, DIMENSION = 10, 6
Arrays = tuple[np.ndarray, np.ndarray]


def vectors(rows: int = ROWS, dimension: int = DIMENSION, seed: int = 0) -> Arrays:
    """Image and text embeddings of unit length."""
    drawn = np.random.default_rng(seed).normal(size=(2, rows, dimension)).astype(np.float32)
    images, texts = drawn / np.linalg.norm(drawn, axis=2, keepdims=True)
    return images, texts


def write_table(path: Path, columns: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=4)
    return path


def metadata(start: int = 0, rows: int = ROWS, uid: str = "uid", caption: str = "caption") -> dict[str, Any]:
    return {
        uid: [f"u{i}" for i in range(start, start + rows)],
        caption: [f"c{i}" for i in range(start, start + rows)],
    }


def write_clip_retrieval(folder: Path, arrays: Arrays, number: str = "0", **columns: Any) -> Path:
    for kind, array in zip(("img", "text"), arrays):
        (folder / f"{kind}_emb").mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{kind}_emb" / f"{kind}_emb_{number}.npy", array)
    write_table(folder / "metadata" / f"metadata_{number}.parquet", columns or metadata())
    return folder


def write_datacomp(folder: Path, arrays: Arrays, towers: Iterable[str] = ("b32", "l14")) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    named = {f"{t}_{kind}": a.astype(np.float16) for t in towers for kind, a in zip(("img", "txt"), arrays)}
    np.savez(folder / "ab12.npz", dedup=np.zeros(len(arrays[0])), **named)
    write_table(folder / "ab12.parquet", metadata(caption="text"))
    return folder


def write_columns(folder: Path, arrays: Arrays, **more: Any) -> Path:
    embeddings = {"image_embedding": list(arrays[0]), "text_embedding": list(arrays[1])}
    write_table(folder / "0.parquet", {**metadata(), **embeddings, **more})
    return folder


WRITERS = {"clip-retrieval": write_clip_retrieval, "datacomp": write_datacomp, "parquet": write_columns}


def read(path: Path | str, **options: Any) -> tuple[list[EmbeddingBatch], list[Rejection]]:
    results = list(read_imported_embeddings(str(path), ImportOptions(**options)))
    batches = [result for result in results if isinstance(result, EmbeddingBatch)]
    return batches, [result for result in results if isinstance(result, Rejection)]


def joined(batches: list[EmbeddingBatch]) -> tuple[list[str], np.ndarray, np.ndarray]:
    uids = [uid for batch in batches for uid in batch.uids]
    return uids, np.concatenate([b.images for b in batches]), np.concatenate([b.texts for b in batches])


@pytest.mark.parametrize("layout", WRITERS)
def test_every_layout_gives_the_same_pairs(layout: str, tmp_path: Path) -> None:
    arrays = vectors()
    batches, rejections = read(WRITERS[layout](tmp_path, arrays), batch_rows=3)
    uids, images, texts = joined(batches)
    tolerance = 1e-3 if layout == "datacomp" else 1e-6  # DataComp stores half precision
    np.testing.assert_allclose(images, arrays[0], atol=tolerance)
    np.testing.assert_allclose(texts, arrays[1], atol=tolerance)
    assert images.dtype == texts.dtype == np.float32
    assert uids == [f"u{i}" for i in range(ROWS)]
    assert [c for batch in batches for c in batch.captions or ()] == [f"c{i}" for i in range(ROWS)]
    assert max(len(batch.uids) for batch in batches) <= 3
    assert not rejections


@pytest.mark.parametrize("layout", WRITERS)
def test_every_layout_is_read_from_an_object_store(layout: str, tmp_path: Path, memory: Any) -> None:
    folder = WRITERS[layout](tmp_path / "here", vectors())
    memory.put(str(folder), "/there", recursive=True)
    here, there = (joined(read(path)[0]) for path in (folder, "memory://there"))
    assert here[0] == there[0]
    assert np.array_equal(here[1], there[1])
    assert np.array_equal(here[2], there[2])


@pytest.mark.parametrize("layout", WRITERS)
@given(batch_rows=st.integers(1, ROWS + 2))
def test_batches_change_nothing(
    layout: str, batch_rows: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = WRITERS[layout](tmp_path_factory.mktemp("batches"), vectors())
    one, other = (joined(read(folder, batch_rows=rows)[0]) for rows in (batch_rows, 1000))
    assert one[0] == other[0]
    assert np.array_equal(one[1], other[1])
    assert np.array_equal(one[2], other[2])


def test_rows_become_unit_length(tmp_path: Path) -> None:
    images, texts = vectors()
    scaled = images * np.logspace(-30, 30, ROWS, dtype=np.float32)[:, None], texts * 7
    batches, rejections = read(write_clip_retrieval(tmp_path, scaled))
    _, found, _ = joined(batches)
    np.testing.assert_allclose(found, images, atol=1e-6)
    assert not rejections


@pytest.mark.parametrize("layout", ["clip-retrieval", "parquet"])
def test_rows_without_a_direction_are_rejected(layout: str, tmp_path: Path) -> None:
    images, texts = vectors()
    images[1], images[2, 3], texts[4, 0], texts[9] = 0, np.nan, np.inf, -np.inf
    batches, rejections = read(WRITERS[layout](tmp_path, (images, texts)))
    assert joined(batches)[0] == ["u0", "u3", "u5", "u6", "u7", "u8"]
    assert {r.uid: r.reason.split()[1] for r in rejections} == {
        "u1": "image",
        "u2": "image",
        "u4": "text",
        "u9": "text",
    }


def test_rows_of_another_length_are_rejected(tmp_path: Path) -> None:
    images, texts = vectors()
    lists: list[Any] = [list(row) for row in images]
    lists[0], lists[3], lists[5], lists[6] = lists[0][:-1], None, [], [None, *lists[6][1:]]
    batches, rejections = read(write_columns(tmp_path, (lists, texts)))  # type: ignore[arg-type]
    uids, found, _ = joined(batches)
    assert uids == ["u1", "u2", "u4", "u7", "u8", "u9"]
    np.testing.assert_allclose(found, images[[1, 2, 4, 7, 8, 9]], atol=1e-6)
    assert [r.uid for r in rejections] == ["u0", "u3", "u5", "u6"]


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.float16()), pa.large_list(pa.float64()), pa.list_(pa.float32(), DIMENSION)]
)
def test_every_type_of_list_is_read(kind: Any, tmp_path: Path) -> None:
    arrays = vectors()
    columns = {
        "image_embedding": pa.array([*map(list, arrays[0].astype(kind.value_type.to_pandas_dtype()))], kind)
    }
    batches, _ = read(write_columns(tmp_path, arrays, **columns))
    np.testing.assert_allclose(joined(batches)[1], arrays[0], atol=1e-3)


def test_tensor_columns_are_read(tmp_path: Path) -> None:
    arrays = vectors()
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(arrays[0])
    batches, _ = read(write_columns(tmp_path, arrays, image_embedding=tensors))
    np.testing.assert_allclose(joined(batches)[1], arrays[0], atol=1e-6)


def test_a_uid_is_used_once(tmp_path: Path) -> None:
    arrays = vectors()
    uids = ["a", "b", "a", None, "", "c", "d", "e", "f", "b"]
    write_clip_retrieval(tmp_path, arrays, "0", uid=uids, caption=["x"] * ROWS)
    write_clip_retrieval(tmp_path, arrays, "1", uid=[*"abcdefghij"], caption=["x"] * ROWS)
    batches, rejections = read(tmp_path, batch_rows=4)
    found, images, _ = joined(batches)
    assert found == [*"abcdefghij"]
    np.testing.assert_allclose(images[:2], arrays[0][:2], atol=1e-6)
    assert len(rejections) == 2 * ROWS - len(found)
    assert sorted({r.reason for r in rejections}) == [
        "an earlier pair has the same uid",
        "the pair has no uid",
    ]


def test_the_name_of_the_image_serves_as_uid(tmp_path: Path) -> None:
    paths = [f"{i}.jpg" for i in range(ROWS)]
    folder = write_clip_retrieval(tmp_path, vectors(), image_path=paths, id=[*range(ROWS)])
    assert joined(read(folder)[0])[0] == paths
    assert read(folder)[0][0].captions is None
    assert joined(read(folder, uid_column="id")[0])[0] == [str(i) for i in range(ROWS)]
    with pytest.raises(InputError, match="no column hash"):
        read(folder, uid_column="hash")


def test_groups_are_read(tmp_path: Path) -> None:
    folder = write_columns(tmp_path, vectors(), group=["f", None, *"mmmmmmmm"])
    assert read(folder)[0][0].groups == ["f", None, *"mmmmmmmm"]


def test_the_tower_can_be_chosen(tmp_path: Path) -> None:
    large, small = vectors(seed=1), vectors(dimension=3, seed=2)
    write_datacomp(tmp_path, large, ["l14"])
    with np.load(tmp_path / "ab12.npz") as arrays:
        np.savez_compressed(tmp_path / "ab12.npz", **arrays, b32_img=small[0], b32_txt=small[1])
    assert joined(read(tmp_path)[0])[1].shape == (ROWS, DIMENSION)
    assert joined(read(tmp_path, tower="b32")[0])[1].shape == (ROWS, 3)
    with pytest.raises(InputError, match="no g14_img"):
        read(tmp_path, tower="g14")


def test_one_file_may_be_given(tmp_path: Path) -> None:
    write_datacomp(tmp_path, vectors(), ["b32"])
    assert len(joined(read(tmp_path / "ab12.npz")[0])[0]) == ROWS
    assert len(joined(read(str(tmp_path / "*.npz"))[0])[0]) == ROWS


def test_chunks_are_pickled_for_workers(tmp_path: Path) -> None:
    for number in ("00", "01", "02"):
        write_clip_retrieval(tmp_path, vectors(), number)
    chunks = pickle.loads(pickle.dumps(list_chunks(str(tmp_path))))
    assert len(chunks) == 3
    assert all(sum(len(b.uids) for b in read_chunk(chunk)) == ROWS for chunk in chunks)  # type: ignore[union-attr]


class Trap:
    """Unpickling this would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    trap = np.array([[Trap(tmp_path / "sprung")] * DIMENSION] * ROWS, dtype=object)
    folder = write_clip_retrieval(tmp_path / "x", (trap, trap))
    with pytest.raises(InputError, match="Pickled objects are never read"):
        read(folder)
    assert not (tmp_path / "sprung").exists()


def write_two_encoders(folder: Path) -> Path:
    write_clip_retrieval(folder, vectors(), "0")
    return write_clip_retrieval(folder, vectors(dimension=3), "1", **metadata(ROWS))


def write_endless_header(folder: Path) -> Path:
    """An array that would fill any memory."""
    header = {"descr": "<f4", "fortran_order": False, "shape": (ROWS, 10**12)}
    with (write_clip_retrieval(folder, vectors()) / "img_emb" / "img_emb_0.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
    return folder


def write_without(folder: Path, name: str) -> Path:
    (write_clip_retrieval(folder, vectors()) / name).unlink()
    return folder


ONES = np.ones((ROWS, DIMENSION), np.float32)
TEXTS = vectors()[1]
REFUSED: list[tuple[str, Callable[[Path], Path]]] = [
    ("not floats", lambda at: write_clip_retrieval(at, (ONES.astype(int), TEXTS))),
    ("expected (rows, dimension", lambda at: write_clip_retrieval(at, (ONES[:, 0], TEXTS))),
    ("expected (rows, dimension", lambda at: write_clip_retrieval(at, (ONES[:, :, None], TEXTS))),
    ("expected (rows, dimension", write_endless_header),
    ("column by column", lambda at: write_clip_retrieval(at, (np.asfortranarray(ONES), TEXTS))),
    ("different runs", lambda at: write_clip_retrieval(at, (np.ones((ROWS + 1, DIMENSION)), TEXTS))),
    ("one dual encoder", lambda at: write_clip_retrieval(at, (np.ones((ROWS, DIMENSION + 1)), TEXTS))),
    ("one dual encoder", lambda at: write_columns(at, (ONES, vectors(dimension=4)[1]))),
    ("no column 'image_embedding'", lambda at: write_table(at / "0.parquet", metadata())),
    ("expected a list of floats", lambda at: write_columns(at, vectors(), image_embedding=["x"] * ROWS)),
    ("one encoder at a time", write_two_encoders),
    ("text_emb/text_emb_0.npy", lambda at: write_without(at, "text_emb/text_emb_0.npy")),
    ("metadata/metadata_0.parquet", lambda at: write_without(at, "metadata/metadata_0.parquet")),
    ("no such file or folder", lambda at: at / "nowhere"),
    ("no .npz, .parquet file there", lambda at: at),
]


@pytest.mark.parametrize(("message", "write"), REFUSED)
def test_what_does_not_fit_is_explained(message: str, write: Callable[[Path], Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        read(write(tmp_path))


@pytest.mark.parametrize("layout", WRITERS)
@given(share=st.floats(0, 1, exclude_max=True), which=st.integers(0, 2))
def test_a_cut_file_gives_what_is_whole(
    layout: str, share: float, which: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = WRITERS[layout](tmp_path_factory.mktemp("cut"), vectors())
    whole = joined(read(folder)[0])
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    victim = files[which % len(files)]
    victim.write_bytes(victim.read_bytes()[: int(share * victim.stat().st_size)])
    batches, rejections = read(folder, batch_rows=4)
    assert len(rejections) == 1
    assert "damaged" in rejections[0].reason
    if batches:
        uids, images, texts = joined(batches)
        assert uids == whole[0][: len(uids)]
        assert np.array_equal(images, whole[1][: len(uids)])
        assert np.array_equal(texts, whole[2][: len(uids)])


def packed(folder: Path, method: int, break_at: float | None = None) -> Path:
    """The arrays in a zip of another method, damaged at a place."""
    write_datacomp(folder, vectors(rows=ROWS), ["b32"])
    with zipfile.ZipFile(folder / "ab12.npz") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(folder / "ab12.npz", "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    if break_at is not None:
        data = bytearray((folder / "ab12.npz").read_bytes())
        with zipfile.ZipFile(folder / "ab12.npz") as archive:
            info = archive.getinfo("b32_img.npy")
        start = info.header_offset + 30 + len(info.filename)
        place = start + int(break_at * info.compress_size)
        data[place : place + 20] = b"\xff" * 20
        (folder / "ab12.npz").write_bytes(bytes(data))
    return folder


def with_header(folder: Path, header: bytes, length: int | None = None) -> Path:
    """Embeddings whose .npy header is this text."""
    write_clip_retrieval(folder, vectors())
    size = (len(header) if length is None else length).to_bytes(4, "little")
    (folder / "img_emb" / "img_emb_0.npy").write_bytes(b"\x93NUMPY\x02\x00" + size + header)
    return folder


DAMAGED: dict[str, Callable[[Path], Path]] = {
    "encrypted": lambda at: flagged(packed(at, zipfile.ZIP_STORED)),
    "unknown method": lambda at: method_of(packed(at, zipfile.ZIP_STORED), 99),
    "broken LZMA": lambda at: packed(at, zipfile.ZIP_LZMA, 0.2),
    "broken bzip2": lambda at: packed(at, zipfile.ZIP_BZIP2, 0.2),
    "broken deflate": lambda at: packed(at, zipfile.ZIP_DEFLATED, 0.2),
    "deep header": lambda at: with_header(at, 5000 * b"(" + b"\n"),
    "deeper header": lambda at: with_header(at, b"{'descr': " + 9000 * b"[" + b"\n"),
    "endless header": lambda at: with_header(at, b"", 2**32 - 1),
    "expression": lambda at: with_header(at, b"__import__('os').system('touch sprung')\n"),
}


def flagged(folder: Path) -> Path:
    """As if its members were encrypted."""
    path = folder / "ab12.npz"
    data = bytearray(path.read_bytes())
    for signature, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = data.find(signature)
        while place >= 0:
            data[place + at] |= 1
            place = data.find(signature, place + 4)
    path.write_bytes(bytes(data))
    return folder


def method_of(folder: Path, method: int) -> Path:
    path = folder / "ab12.npz"
    data = bytearray(path.read_bytes())
    for signature, at in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        place = data.find(signature)
        while place >= 0:
            data[place + at] = method
            place = data.find(signature, place + 4)
    path.write_bytes(bytes(data))
    return folder


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_one_rejection_and_the_next_is_read(kind: str, tmp_path: Path) -> None:
    """Encrypted members, methods that zipfile does not know and deep headers ended the run with a traceback."""
    folder = DAMAGED[kind](tmp_path)
    if (folder / "ab12.npz").exists():
        np.savez(folder / "cd34.npz", **{f"b32_{k}": a for k, a in zip(("img", "txt"), vectors(seed=3))})
        write_table(folder / "cd34.parquet", metadata(start=100))
    else:
        write_clip_retrieval(folder, vectors(seed=3), "1", **metadata(100))
    batches, rejections = read(folder)
    assert len(rejections) == 1
    assert "damaged, the rows from" in rejections[0].reason
    assert joined(batches)[0][-ROWS:] == [f"u{i}" for i in range(100, 100 + ROWS)]


def test_two_columns_of_one_name_and_dates_as_uids(tmp_path: Path) -> None:
    folder = write_columns(tmp_path, vectors(), uid=pa.array(range(ROWS), pa.int32()).cast(pa.date32()))
    table = pq.read_table(folder / "0.parquet")
    batches, rejections = read(folder)
    assert not batches
    assert len(rejections) == ROWS
    pq.write_table(table.append_column("uid", table["caption"]), folder / "0.parquet")
    with pytest.raises(InputError, match="2 columns are called 'uid'"):
        read(folder)


def test_blocks_of_wide_rows_are_shorter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BLOCK_BYTES", 3 * 4 * DIMENSION)
    for layout in ("clip-retrieval", "parquet"):
        batches, _ = read(WRITERS[layout](tmp_path / layout, vectors()))
        assert max(len(batch.uids) for batch in batches) <= 3
        assert len(joined(batches)[0]) == ROWS
