"""Parquet shards as img2dataset and Hugging Face write them, read a few rows at a time."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shards import read_all, write_parquet

from influencespace.data import row_groups
from influencespace.data.captions import MAX_CAPTION
from influencespace.data.images import open_parquet, read_image_bytes
from influencespace.data.page_headers import pages
from influencespace.data.readers import ReadOptions, parquet
from influencespace.data.row_groups import BATCH_ROWS
from influencespace.errors import InputError


def img2dataset_columns(count: int) -> dict[str, Any]:
    return {
        "key": [f"{i:09d}" for i in range(count)],
        "jpg": [f"image {i}".encode() for i in range(count)],
        "txt": [f"text {i}" for i in range(count)],
        "caption": ["not used"] * count,
        "status": ["success"] * count,
    }


def test_parquet_of_img2dataset(tmp_path: Path) -> None:
    columns = img2dataset_columns(3)
    columns["jpg"][1] = None
    samples, rejections = read_all(write_parquet(tmp_path / "0.parquet", columns))
    assert [(s.image, s.captions, s.uid) for s in samples] == [
        (b"image 0", ("text 0",), None),
        (b"image 2", ("text 2",), None),
    ]
    assert [(r.uid, "missing" in r.reason) for r in rejections] == [("000000001", True)]


@pytest.mark.parametrize("name", ["caption", "captions", "text"])
def test_parquet_of_hugging_face(name: str, tmp_path: Path) -> None:
    columns = {
        "image": [{"bytes": b"0", "path": None}, {"bytes": None, "path": "x.jpg"}, None],
        name: [["a", "b"], ["c", "d"], ["e"]],
        "uid": ["u0", "u1", "u2"],
        "group": [1, 2, 3],
    }
    (sample,), rejections = read_all(write_parquet(tmp_path / "0.parquet", columns))
    assert (sample.captions, sample.uid, sample.group) == (("a", "b"), "u0", "1")
    assert [r.uid for r in rejections] == ["u1#0", "u1#1", "u2"]


def test_the_only_binary_column_is_the_image(tmp_path: Path) -> None:
    (sample,), _ = read_all(write_parquet(tmp_path / "0.parquet", {"photo": [b"0"], "text": ["a"]}))
    assert (sample.image, read_image_bytes(sample.ref)) == (b"0", b"0")


def test_text_that_is_not_utf8_costs_only_its_own_row(tmp_path: Path) -> None:
    texts = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    lists = pa.ListArray.from_arrays([0, 1, 3, 4], pa.array([b"a", b"\xff", b"b", b"c"]).view(pa.string()))
    for name, column, lost, kept in (("txt", texts, "row 1", 2), ("captions", lists, "row 1#0", 3)):
        columns = {"jpg": [b"0", b"1", b"2"], name: column}
        samples, rejections = read_all(write_parquet(tmp_path / "0.parquet", columns))
        assert [r.uid for r in rejections] == [lost]
        assert sum(len(s.captions) for s in samples) == kept


def test_dictionary_columns_are_read(tmp_path: Path) -> None:
    columns = {"jpg": [b"0", b"1"], "txt": pa.array(["a", "a"]).dictionary_encode()}
    samples, _ = read_all(write_parquet(tmp_path / "0.parquet", columns))
    assert [s.captions for s in samples] == [("a",), ("a",)]


def test_wrong_columns_are_explained(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "0.parquet", {"url": ["http://x"], "caption": ["a"]})
    with pytest.raises(InputError, match="no image column among url, caption"):
        read_all(path)
    path = write_parquet(tmp_path / "1.parquet", {"jpg": [b"0"], "title": ["a"]})
    with pytest.raises(InputError, match="no caption column"):
        read_all(path)
    assert read_all(path, ReadOptions(caption_column="title"))[0][0].captions == ("a",)
    with pytest.raises(InputError, match="no column 'id'"):
        read_all(path, ReadOptions(caption_column="title", uid_column="id"))


def test_memory_is_bounded_by_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "0.parquet", img2dataset_columns(1000), row_group_size=1000)
    sizes = []
    original = parquet._raw_samples

    def spy(batch: Any, *rest: Any) -> Any:
        sizes.append(len(batch))
        return original(batch, *rest)

    monkeypatch.setattr(parquet, "_raw_samples", spy)
    assert len(read_all(path)[0]) == 1000
    assert max(sizes) <= BATCH_ROWS


class Counting(io.BytesIO):
    """A file that remembers how much was asked of it at once."""

    largest = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.largest = max(self.largest, len(data))
        return data


def test_a_row_group_is_not_read_at_once() -> None:
    written = Counting()
    images = [bytes([i]) * 100_000 for i in range(100)]
    table = pa.table({"image": [{"bytes": image, "path": None} for image in images]})
    pq.write_table(table, written, write_batch_size=10, use_dictionary=False, compression="none")
    file = open_parquet(written)
    assert file.num_row_groups == 1
    rows = [row for batch in file.iter_batches(10) for row in batch.column(0).to_pylist()]
    assert [row["bytes"] for row in rows] == images
    assert written.largest < 2_000_000


def test_a_damaged_parquet_file_is_a_rejection(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "0.parquet", img2dataset_columns(50))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    samples, rejections = read_all(path)
    assert (samples, len(rejections)) == ([], 1)
    assert "not a readable Parquet file" in rejections[0].reason


def test_a_damaged_row_group_costs_no_other(tmp_path: Path) -> None:
    columns = img2dataset_columns(60)
    path = write_parquet(tmp_path / "0.parquet", columns, row_group_size=20, use_dictionary=False)
    whole = path.read_bytes()
    place = pq.read_metadata(path).row_group(1).column(1).data_page_offset
    path.write_bytes(whole[:place] + b"\xff" * 30 + whole[place + 30 :])
    samples, rejections = read_all(path)
    assert {s.ref.row for s in samples} == {*range(20), *range(40, 60)}
    assert len(rejections) == 1
    assert "rows 20 to 39" in rejections[0].reason


def dictionary_file(path: Path, captions: int, size: int, distinct: bool) -> Path:
    """Captions of `size` characters in the dictionary of a column chunk, which compresses a thousandfold."""
    texts = [(f"{i:04d}" if distinct else "") + size * "x" for i in range(captions)]
    columns = {"jpg": [b"0"] * captions, "txt": texts}
    how = {"dictionary_pagesize_limit": 2**31 - 1, "use_dictionary": ["txt"], "compression": "zstd"}
    return write_parquet(path, columns, **how)


def test_rows_are_fewer_where_each_may_be_a_long_entry_of_a_dictionary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = dictionary_file(tmp_path / "0.parquet", captions=64, size=100_000, distinct=False)
    monkeypatch.setattr(row_groups, "BATCH_BYTES", 1_000_000)
    with path.open("rb") as file, open_parquet(file) as opened:
        sizes = [len(batch) for batch in row_groups.batches(opened, file, 0, ["jpg", "txt"])]
    assert sum(sizes) == 64
    assert max(sizes) == 9
    samples, rejections = read_all(path)
    assert [len(sample.captions[0]) for sample in samples] == [MAX_CAPTION] * 64
    assert not rejections


def test_a_dictionary_that_would_fill_the_memory_is_a_rejection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = dictionary_file(tmp_path / "0.parquet", captions=40, size=50_000, distinct=True)
    monkeypatch.setattr(row_groups, "MAX_TEXT_PAGE", 1_000_000)
    samples, rejections = read_all(path)
    assert not samples
    assert [r.uid for r in rejections] == ["row 0"]
    assert "the dictionary of 'txt' has 2,000,320 bytes, more than 1,000,000" in rejections[0].reason


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("statistics", [False, True])
def test_page_headers_say_all_that_a_column_unpacks_to(
    version: str, statistics: bool, tmp_path: Path
) -> None:
    columns = {
        "txt": [f"{i % 7} " + 300 * "é" for i in range(5000)],
        "captions": [[f"{i}"] * (i % 4) for i in range(5000)],
        "number": [float(i) if i % 3 else None for i in range(5000)],
    }
    how: dict[str, Any] = {
        "data_page_size": 2000,
        "data_page_version": version,
        "write_statistics": statistics,
    }
    path = write_parquet(tmp_path / "0.parquet", columns, use_dictionary=["txt"], write_batch_size=100, **how)
    with path.open("rb") as file, open_parquet(file) as opened:
        for index in range(3):
            column = opened.metadata.row_group(0).column(index)
            found = list(pages(file, column))
            assert [page.dictionary for page in found] == [index == 0] + [False] * (len(found) - 1)
            assert sum(page.values for page in found if not page.dictionary) == column.num_values
            headers = column.total_uncompressed_size - sum(page.unpacked for page in found)
            assert 0 < headers <= (2000 if statistics else 100) * len(found)
            assert len(found) > 2


def test_bytes_that_are_no_page_header_end_the_list(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "0.parquet", {"txt": ["a" * 100] * 100}, use_dictionary=False)
    column = pq.read_metadata(path).row_group(0).column(0)
    whole = path.read_bytes()
    drawn = np.random.default_rng(0)
    for size in (0, 1, 5, 20, 3000):
        noise = drawn.integers(0, 256, size, dtype=np.uint8).tobytes()
        assert list(pages(io.BytesIO(whole[: column.data_page_offset] + noise), column)) == []
    deep = io.BytesIO(
        whole[: column.data_page_offset] + b"\x1c" * 100_000
    )  # a struct in a struct in a struct
    assert list(pages(deep, column)) == []


def test_a_page_that_would_fill_the_memory_is_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = {"jpg": [b"0"] * 64, "txt": [f"{i}" + (20_000 if i >= 40 else 9) * "x" for i in range(64)]}
    how = {"row_group_size": 32, "use_dictionary": False, "compression": "zstd"}
    path = write_parquet(tmp_path / "0.parquet", columns, **how)
    monkeypatch.setattr(row_groups, "MAX_TEXT_PAGE", 100_000)
    samples, rejections = read_all(path)
    assert len(samples) == 32
    (rejection,) = rejections
    assert "rows 32 to 63 are set aside: a page of 'txt' has 480," in rejection.reason
    assert rejection.uid == "row 32"
    monkeypatch.setattr(row_groups, "MAX_TEXT_PAGE", 1_000_000)
    assert len(read_all(path)[0]) == 64


def test_two_columns_of_one_name_are_refused_only_where_they_are_read(tmp_path: Path) -> None:
    for names, refused in ((["jpg", "txt", "txt"], True), (["jpg", "txt", "width", "width"], False)):
        arrays = [pa.array([b"0"]), *(pa.array(["a"]) for _ in names[1:])]
        pq.write_table(pa.Table.from_arrays(arrays, names), tmp_path / "0.parquet")
        if refused:
            with pytest.raises(InputError, match="2 columns are called 'txt'"):
                read_all(tmp_path / "0.parquet")
        else:
            assert len(read_all(tmp_path / "0.parquet")[0]) == 1


def test_a_column_name_that_is_not_utf8_is_explained(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "0.parquet", img2dataset_columns(1) | {"QQQQ": ["x"]}, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"QQQQ", b"\xff\xfe\xfd\xfc"))
    with pytest.raises(InputError, match="the name of a column is not UTF-8"):
        read_all(path)


def test_a_date_that_python_does_not_know_costs_only_its_own_row(tmp_path: Path) -> None:
    uids = pa.array([0, 10**9, None], pa.int32()).cast(pa.date32())
    columns = {"jpg": [b"0", b"1", b"2"], "txt": ["a", "b", "c"], "uid": uids}
    samples, rejections = read_all(write_parquet(tmp_path / "0.parquet", columns))
    assert [sample.captions for sample in samples] == [("c",)]
    assert [r.reason for r in rejections] == [
        "the uid is not text or a number but date",
        "the uid is not text or a number but an unreadable date32[day]",
    ]
