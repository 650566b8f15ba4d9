import io
import json
import pickle
import random
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from influencespace.data import readers
from influencespace.data.images import RejectedImage, decode_image, open_parquet, read_image_bytes
from influencespace.data.readers import ReadOptions, list_shards, parquet, read_shard
from influencespace.data.schema import Rejection, Sample, Shard
from influencespace.data.uids import pair_uids
from influencespace.errors import InputError

Encode = Callable[..., bytes]
Files = list[tuple[str, bytes]]
Result = tuple[list[Sample], list[Rejection]]

# Readers never decode, so any bytes will do where an image is not looked at.
IMAGE = b"\xff\xd8 not looked at by readers"


def sample_files(
    key: str, image: bytes, suffix: str = "jpg", text: str | None = None, **fields: Any
) -> Files:
    """The files of a sample: image, .txt and .json."""
    files: Files = [(f"{key}.{suffix}", image)]
    if text is not None:
        files.append((f"{key}.txt", text.encode()))
    if fields:
        files.append((f"{key}.json", json.dumps(fields).encode()))
    return files


def tar_bytes(files: Iterable[tuple[str | tarfile.TarInfo, bytes]], form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for member, data in files:
            entry = tarfile.TarInfo(member) if isinstance(member, str) else member
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def split(results: Iterable[Sample | Rejection]) -> Result:
    samples, rejections = [], []
    for result in results:
        (samples if isinstance(result, Sample) else rejections).append(result)
    return samples, rejections  # type: ignore[return-value]


def read_all(spec: str | Path, options: ReadOptions | None = None, **listing: Any) -> Result:
    """Everything that the shards of `spec` give."""
    return split(r for shard in list_shards(str(spec), **listing) for r in read_shard(shard, options))


def read_tar(data: bytes, folder: Path) -> Result:
    path = folder / "x.tar"
    path.write_bytes(data)
    return read_all(path)


def content(samples: Iterable[Sample]) -> set[tuple[object, ...]]:
    """What samples say, whatever file and place they came from."""
    return {(s.image, s.captions, s.uid, s.group, s.positions) for s in samples}


def all_uids(samples: Iterable[Sample]) -> list[str]:
    return sorted(uid for sample in samples for uid in pair_uids(sample))


THREE = [
    *sample_files("000", b"image 0", text="a dog", uid="u0", caption="not used"),
    *sample_files("001", b"image 1", text="not used", uid="u1", captions=["a cat", "a tom"], group="g"),
    *sample_files("002", b"image 2", text="a cow"),
]
CONTENT = {
    (b"image 0", ("a dog",), "u0", None, None),
    (b"image 1", ("a cat", "a tom"), "u1", "g", None),
    (b"image 2", ("a cow",), None, None, None),
}


# Tars


@given(order=st.permutations(THREE), suffix=st.sampled_from(["jpg", "jpeg", "png", "webp", "JPG"]))
def test_order_of_members_and_kind_of_image_change_nothing(
    order: Files, suffix: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    files = [(name.replace("jpg", suffix), data) for name, data in order]
    samples, rejections = read_tar(tar_bytes(files), tmp_path_factory.getbasetemp())
    assert content(samples) == CONTENT
    assert not rejections


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_format_and_long_names_are_read(form: int, tmp_path: Path) -> None:
    folder = "f" * 90
    long = "n" * (90 if form == tarfile.USTAR_FORMAT else 300)
    files = [*sample_files(f"./{folder}/{long}", b"1", text="a"), *sample_files("é.ü", b"2", text="b")]
    if form == tarfile.PAX_FORMAT:
        files += sample_files("x" * 150, b"3", text="c")
    samples, rejections = read_tar(tar_bytes(files, form), tmp_path)
    assert [(s.image, s.captions) for s in samples] == [(b"1", ("a",)), (b"2", ("b",)), (b"3", ("c",))][
        : len(files) // 2
    ]
    assert not rejections


def test_json_caption_serves_when_there_is_no_text(tmp_path: Path) -> None:
    files = [
        *sample_files("0", b"0", caption="a"),
        *sample_files("1", b"1", text=" ", caption="b", captions=[]),
    ]
    samples, _ = read_tar(tar_bytes(files), tmp_path)
    assert [s.captions for s in samples] == [("a",), ("b",)]


def test_the_key_is_no_uid_and_numbers_are(tmp_path: Path) -> None:
    files = [
        ("0.jpg", b"0"),
        ("0.json", b'{"caption": "a", "key": "0"}'),
        *sample_files("1", b"1", text="b", uid=17),
    ]
    samples, _ = read_tar(tar_bytes(files), tmp_path)
    assert [s.uid for s in samples] == [None, "17"]


def test_the_names_of_fields_can_be_given(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes(sample_files("0", b"0", text="a", id="7", title="b", gender="f")))
    options = ReadOptions(uid_column="id", caption_column="title", group_column="gender")
    (sample,), _ = read_all(path, options)
    assert (sample.uid, sample.captions, sample.group) == ("7", ("b",), "f")


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([("0.txt", b"a")], "image is missing"),
        ([("0.json", b'{"uid": "7"}')], "image is missing"),
        ([("0.jpg", IMAGE)], "no caption"),
        ([("0.jpg", b""), ("0.txt", b"a")], "image is empty"),
        ([("0.jpg", IMAGE), ("0.txt", b" \n")], "caption is empty"),
        ([("0.jpg", IMAGE), ("0.txt", b"\xff\xfe")], "not UTF-8"),
        ([("0.jpg", IMAGE), ("0.txt", b"a"), ("0.json", b'{"uid": ')], "malformed JSON"),
        ([("0.jpg", IMAGE), ("0.txt", b"a"), ("0.json", b"[1]")], "malformed JSON"),
        ([("0.jpg", IMAGE), ("0.txt", b"a"), ("0.json", b"[" * 100_000)], "malformed JSON"),
        ([("0.jpg", IMAGE), ("0.png", IMAGE), ("0.txt", b"a")], "both the image"),
        ([("../0.jpg", IMAGE), ("../0.txt", b"a")], "leads out of the archive"),
        ([("/0.jpg", IMAGE), ("/0.txt", b"a")], "leads out of the archive"),
    ],
)
def test_bad_samples_are_rejected_with_the_reason_and_cost_no_other(
    files: Files, reason: str, tmp_path: Path
) -> None:
    around = sample_files("a", b"1", text="a"), sample_files("z", b"2", text="z")
    samples, rejections = read_tar(tar_bytes([*around[0], *files, *around[1]]), tmp_path)
    assert [s.captions for s in samples] == [("a",), ("z",)]
    assert len(rejections) == 1
    assert reason in rejections[0].reason
    assert rejections[0].shard == str(tmp_path / "x.tar")


def test_other_files_and_folders_in_a_tar_are_passed_over(tmp_path: Path) -> None:
    folder = tarfile.TarInfo("photos")
    folder.type = tarfile.DIRTYPE
    files = [
        (folder, b""),
        ("photos/._0.jpg", b"mac"),
        ("0.cls", b"3"),
        *sample_files("photos/0", b"0", text="a"),
    ]
    samples, rejections = read_tar(tar_bytes(files), tmp_path)
    assert len(samples) == 1
    assert not rejections


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_are_refused(kind: bytes, tmp_path: Path) -> None:
    weird = tarfile.TarInfo("0.jpg")
    weird.type, weird.linkname = kind, "/etc/passwd"
    files = [(weird, b""), ("0.txt", b"a"), *sample_files("1", b"1", text="b")]
    samples, rejections = read_tar(tar_bytes(files), tmp_path)
    assert [s.captions for s in samples] == [("b",)]
    assert [(r.uid, "not a file" in r.reason) for r in rejections] == [("0", True)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.tar"]


def test_a_sparse_file_is_refused(tmp_path: Path) -> None:
    sparse = tarfile.TarInfo("0.jpg")
    sparse.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "3"}
    pieces = b"1\n0\n3\n".ljust(512, b"\0") + b"abc"
    files = [(sparse, pieces), ("0.txt", b"a"), *sample_files("1", b"1", text="b")]
    samples, rejections = read_tar(tar_bytes(files), tmp_path)
    assert [s.captions for s in samples] == [("b",)]
    assert "sparse" in rejections[0].reason


def test_an_invalid_sparse_file_ends_the_tar(tmp_path: Path) -> None:
    sparse = tarfile.TarInfo("1.jpg")
    sparse.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    files = [*sample_files("0", b"0", text="a"), *sample_files("x", b"x", text="x"), (sparse, IMAGE)]
    samples, rejections = read_tar(tar_bytes(files), tmp_path)
    assert [s.captions for s in samples] == [("a",)]
    assert len(rejections) == 1


def test_an_image_too_big_to_be_one_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("influencespace.data.readers.webdataset.MAX_ENCODED_BYTES", 100)
    files = [*sample_files("0", bytes(101), text="a"), *sample_files("1", bytes([1]) * 100, text="b")]
    samples, rejections = read_tar(tar_bytes(files), tmp_path)
    assert [s.captions for s in samples] == [("b",)]
    assert "more than 100" in rejections[0].reason


BROKEN = tar_bytes(THREE)


@given(cut=st.integers(0, len(BROKEN) - 1))
def test_a_tar_cut_anywhere_gives_what_is_whole(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    samples, rejections = read_tar(BROKEN[:cut], tmp_path_factory.getbasetemp())
    assert content(samples) <= CONTENT
    assert len(rejections) == (len(samples) < 3)
    # A sample is known to be whole when the header of the next one has been read.
    headers = [
        i * 512 for i in range(len(BROKEN) // 512) if BROKEN[i * 512 :].startswith((b"001.jpg", b"002.jpg"))
    ]
    assert len(samples) >= sum(cut >= header + 512 for header in headers)
    assert all("broken tar" in r.reason for r in rejections)


@given(order=st.permutations(THREE), share=st.floats(0, 1, exclude_max=True))
def test_a_cut_tar_in_disorder_gives_no_half_sample_of_several_runs(
    order: Files, share: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    # Two runs of every key, so that nothing is surely whole: jpg 0, 1, 2, then the rest in any order.
    first = [file for file in THREE if file[0].endswith("jpg")]
    data = tar_bytes([*first, *(file for file in order if file not in first)])
    samples, rejections = read_tar(data[: int(share * len(data))], tmp_path_factory.getbasetemp())
    assert content(samples) <= CONTENT
    assert bool(rejections) == (len(samples) < 3)


@given(place=st.integers(0, len(BROKEN) - 1), value=st.integers(0, 255))
def test_a_damaged_byte_never_raises(
    place: int, value: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = BROKEN[:place] + bytes([value]) + BROKEN[place + 1 :]
    samples, rejections = read_tar(data, tmp_path_factory.getbasetemp())
    assert len(samples) + len(rejections) >= 1


@given(data=st.binary(max_size=2000), zeros=st.integers(0, 3))
def test_garbage_is_one_rejection(data: bytes, zeros: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    samples, rejections = read_tar(b"x" + data + bytes(512 * zeros), tmp_path_factory.getbasetemp())
    assert (samples, len(rejections)) == ([], 1)


def test_an_empty_file_is_broken_and_an_empty_tar_is_not(tmp_path: Path) -> None:
    assert len(read_tar(b"", tmp_path)[1]) == 1
    assert read_tar(tar_bytes([]), tmp_path) == ([], [])


@pytest.mark.parametrize("size", [b"-512", b"99999999999", b"x", b"9" * 5000])
def test_a_lying_size_ends_the_tar(size: bytes, tmp_path: Path) -> None:
    record = b" size=" + size + b"\n"
    length = len(record) + 2
    length += len(str(length)) - 2
    record = str(length).encode() + record
    header = tarfile.TarInfo("pax")
    header.type = tarfile.XHDTYPE
    good = sample_files("0", b"0", text="a")
    data = tar_bytes([*good, *sample_files("1", b"1", text="b"), (header, record), ("2.jpg", IMAGE)])
    samples, rejections = read_tar(data, tmp_path)
    assert [s.captions for s in samples][:1] == [("a",)]
    assert len(rejections) == 1


def test_a_tar_is_read_one_sample_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar_bytes(THREE))
    results = read_shard(list_shards(str(tmp_path / "x.tar"))[0])
    assert isinstance(next(results), Sample)


# Parquet


def write_parquet(path: Path, columns: dict[str, Any], **how: Any) -> Path:
    pq.write_table(pa.table(columns), path, **how)
    return path


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
    for name, column, lost in (("txt", texts, ["row 1"]), ("captions", lists, ["row 1#0"])):
        samples, rejections = read_all(
            write_parquet(tmp_path / "0.parquet", {"jpg": [b"0", b"1", b"2"], name: column})
        )
        assert [r.uid for r in rejections] == lost
        assert (
            sum(len(s.captions) for s in samples)
            == len(column.flatten() if name == "captions" else column) - 1
        )


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


def test_a_big_file_becomes_several_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "0.parquet", img2dataset_columns(100), row_group_size=10)
    assert [shard.row_groups for shard in list_shards(str(path))] == [None]
    whole, _ = read_all(path)
    monkeypatch.setattr(parquet, "SHARD_BYTES", pq.read_metadata(path).row_group(0).total_byte_size * 3)
    shards = list_shards(str(path))
    assert len(shards) >= 4
    assert [group for shard in shards for group in shard.row_groups or ()] == list(range(10))
    assert [shard.name for shard in shards][:2] == ["00000", "00001"]
    assert read_all(path)[0] == whole


def test_memory_is_bounded_by_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "0.parquet", img2dataset_columns(1000), row_group_size=1000)
    sizes = []
    original = parquet._raw_samples

    def spy(batch: Any, *rest: Any) -> Any:
        sizes.append(len(batch))
        return original(batch, *rest)

    monkeypatch.setattr(parquet, "_raw_samples", spy)
    assert len(read_all(path)[0]) == 1000
    assert max(sizes) <= parquet.BATCH_ROWS


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
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
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


# COCO


def write_coco(folder: Path, images: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> Path:
    """A folder in the official layout, with files for the images whose `file` is not False."""
    path = folder / "annotations" / "captions_val.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    (folder / "val").mkdir(exist_ok=True)
    for image in images:
        if image.pop("file", True):
            (folder / "val" / image["file_name"]).write_bytes(f"image {image['id']}".encode())
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


def coco_image(number: int, **more: Any) -> dict[str, Any]:
    return {"id": number, "file_name": f"{number:012d}.jpg", **more}


def coco_captions(number: int, *captions: object) -> list[dict[str, Any]]:
    return [{"image_id": number, "id": i, "caption": caption} for i, caption in enumerate(captions)]


def test_coco(tmp_path: Path) -> None:
    annotations = [*coco_captions(7, "a"), *coco_captions(9, "b"), *coco_captions(7, "c")]
    samples, rejections = read_all(write_coco(tmp_path, [coco_image(7), coco_image(9)], annotations))
    assert [(s.image, s.captions, s.uid) for s in samples] == [
        (b"image 7", ("a", "c"), "7"),
        (b"image 9", ("b",), "9"),
    ]
    assert all_uids(samples) == ["7#0", "7#1", "9"]
    assert not rejections


def test_what_is_wrong_in_coco_is_rejected(tmp_path: Path) -> None:
    images = [
        coco_image(1),
        coco_image(2, file=False),
        coco_image(3),
        coco_image(1),
        {"id": 4, "file_name": "../annotations/captions_val.json", "file": False},
        {"id": 5, "file": False},
    ]
    annotations = [
        *coco_captions(1, "a", " ", None),
        *coco_captions(2, "b"),
        *(caption for number in (4, 5, 99) for caption in coco_captions(number, "c")),
    ]
    samples, rejections = read_all(write_coco(tmp_path, images, annotations))
    assert all_uids(samples) == ["1#0"]
    reasons = {rejection.uid: rejection.reason for rejection in rejections[3:]}
    assert [r.uid for r in rejections[:3]] == ["1#1", "1#2", "2"]
    assert rejections[2].reason == "the image file is missing"  # no name: one reason for all
    assert "no caption" in reasons["3"]
    assert "same id" in reasons["1"]
    assert "not a path inside" in reasons["4"]
    assert "not a path inside" in reasons["5"]
    assert "does not list" in reasons["99"]


def test_a_name_that_no_file_can_have_costs_no_other_pair(tmp_path: Path) -> None:
    images = [coco_image(1), {"id": 2, "file_name": 300 * "x" + ".jpg", "file": False}]
    samples, rejections = read_all(
        write_coco(tmp_path, images, [*coco_captions(1, "a"), *coco_captions(2, "b")])
    )
    assert all_uids(samples) == ["1"]
    assert [(r.uid, r.reason) for r in rejections] == [
        ("2", "the image file cannot be read (File name too long)")
    ]


def test_coco_is_sliced_and_slices_are_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [coco_image(i) for i in range(25)]
    annotations = [entry for i in range(26) for entry in coco_captions(i, f"a {i}", f"b {i}")]
    path = write_coco(tmp_path, images, annotations)
    whole = read_all(path)
    monkeypatch.setattr(readers, "SHARD_IMAGES", 10)
    assert [shard.rows for shard in list_shards(str(path))] == [(0, 10), (10, 20), (20, 25)]
    assert read_all(path) == whole
    assert len(whole[1]) == 1


def test_wrong_coco_files_are_explained(tmp_path: Path) -> None:
    path = write_coco(tmp_path, [coco_image(1)], [{"image_id": 1, "bbox": [0, 0, 1, 1]}])
    with pytest.raises(InputError, match="instances"):
        list_shards(str(path))
    with pytest.raises(InputError, match="no such folder"):
        list_shards(str(path), images=str(tmp_path / "nowhere"))
    path.write_text('{"images": 3}')
    with pytest.raises(InputError, match="not a COCO annotation file"):
        list_shards(str(path))
    elsewhere = tmp_path / "captions.json"
    elsewhere.write_text(json.dumps({"images": [], "annotations": []}))
    with pytest.raises(InputError, match="where are its images"):
        list_shards(str(elsewhere))


# All formats


@pytest.fixture
def three_formats(tmp_path: Path, encoded_image: Encode) -> list[Path]:
    """The same six images and captions as a tar, a Parquet file and a COCO folder."""
    images = [encoded_image(i) for i in range(6)]
    tar = tmp_path / "0.tar"
    files = [
        f
        for i, image in enumerate(images)
        for f in sample_files(str(i), image, uid=str(i), captions=[f"c {i}"])
    ]
    tar.write_bytes(tar_bytes(files))
    columns = {
        "image": [{"bytes": image, "path": "x"} for image in images],
        "uid": [str(i) for i in range(6)],
        "caption": [f"c {i}" for i in range(6)],
    }
    table = write_parquet(tmp_path / "1.parquet", columns, row_group_size=2)
    annotations = [entry for i in range(6) for entry in coco_captions(i, f"c {i}")]
    official = write_coco(tmp_path / "coco", [coco_image(i) for i in range(6)], annotations)
    for i, image in enumerate(images):
        (tmp_path / "coco" / "val" / f"{i:012d}.jpg").write_bytes(image)
    return [tar, table, official]


def test_formats_give_the_same_samples(three_formats: list[Path]) -> None:
    contents = [content(read_all(path)[0]) for path in three_formats]
    assert contents[0] == contents[1] == contents[2]
    assert len(contents[0]) == 6


def test_an_image_is_found_again_by_its_reference(three_formats: list[Path]) -> None:
    for path in three_formats:
        for sample in read_all(path)[0]:
            assert read_image_bytes(sample.ref) == sample.image
            assert decode_image(sample.image).size == (16, 12)


def test_a_reference_to_a_changed_file_is_noticed(three_formats: list[Path]) -> None:
    tar, table, _ = three_formats
    references = [read_all(path)[0][-1].ref for path in (tar, table)]
    tar.write_bytes(tar.read_bytes()[:2000])
    write_parquet(table, {"image": [b"0"], "caption": ["a"]})
    for reference in references:
        with pytest.raises(RejectedImage, match="has it changed"):
            read_image_bytes(reference)


def test_everything_works_on_an_object_store(three_formats: list[Path], memory: Any) -> None:
    for path in three_formats:
        memory.put(str(path), f"/data/{path.name}")
    memory.put(str(three_formats[2].parent.parent / "val"), "/data/val", recursive=True)
    for path in three_formats:
        listing = {"images": "memory://data/val"} if path.suffix == ".json" else {}
        samples, rejections = read_all(f"memory://data/{path.name}", **listing)
        assert content(samples) == content(read_all(path)[0])
        assert not rejections
        assert all(sample.ref.path.startswith("memory://") for sample in samples)
        assert all(read_image_bytes(sample.ref) == sample.image for sample in samples)
    assert len(list_shards("memory://data/*.tar")) == 1
    assert [shard.format for shard in list_shards("memory://data")] == ["webdataset", "parquet"]


@given(seed=st.integers(0, 2**32), parts=st.integers(1, 5), own=st.booleans(), tars=st.booleans())
def test_uids_do_not_depend_on_the_partition(
    seed: int, parts: int, own: bool, tars: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("parts")
    rows = [(f"image {i // 2}".encode(), f"text {i}", f"u{i}" if own else None) for i in range(12)]
    random.Random(seed).shuffle(rows)
    for part in range(parts):
        mine = rows[part::parts]
        if tars:
            files = [f for k, (i, t, u) in enumerate(mine) for f in sample_files(str(k), i, text=t, uid=u)]
            (folder / f"{part}.tar").write_bytes(tar_bytes(files))
        else:
            images, texts, uids = (list(column) for column in zip(*mine))
            write_parquet(
                folder / f"{part}.parquet", {"jpg": images, "txt": texts, "uid": pa.array(uids, pa.string())}
            )
    samples, rejections = read_all(folder)
    assert not rejections
    expected = [Sample(image=i, captions=(t,), uid=u, group=None, ref=samples[0].ref) for i, t, u in rows]
    assert all_uids(samples) == all_uids(expected)


# Class folders


def write_classes(folder: Path, **classes: list[str]) -> Path:
    """A folder of class folders, each with pictures of these names."""
    for name, files in classes.items():
        (folder / name).mkdir(parents=True)
        for file in files:
            (folder / name / file).write_bytes(IMAGE + f"{name}/{file}".encode())
    return folder


def test_class_folders(tmp_path: Path) -> None:
    write_classes(tmp_path, red_circle=["b.PNG", "a.jpg", ".hidden.jpg", "notes.txt"], ring=["a.jpg"])
    (tmp_path / "README.md").touch()
    (tmp_path / ".cache").mkdir()
    samples, rejections = read_all(tmp_path)
    assert not rejections
    assert [(s.uid, s.group, s.captions) for s in samples] == [
        ("red_circle/a.jpg", "red circle", ("a photo of a red circle",)),
        ("red_circle/b.PNG", "red circle", ("a photo of a red circle",)),
        ("ring/a.jpg", "ring", ("a photo of a ring",)),
    ]
    assert all(read_image_bytes(sample.ref) == sample.image for sample in samples)
    assert read_all(f"{tmp_path}/*")[0] == samples


def test_class_folders_on_an_object_store(tmp_path: Path, memory: Any) -> None:
    write_classes(tmp_path / "classes", cat=["0.jpg"], dog=["0.jpg", "1.jpg"])
    memory.put(str(tmp_path / "classes"), "/classes", recursive=True)
    samples, _ = read_all("memory://classes")
    assert content(samples) == content(read_all(tmp_path / "classes")[0])
    assert all(read_image_bytes(sample.ref) == sample.image for sample in samples)


def test_a_large_class_is_several_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_classes(tmp_path, cat=[f"{i}.jpg" for i in range(5)], dog=["0.jpg"])
    whole, _ = read_all(tmp_path)
    monkeypatch.setattr(readers, "SHARD_IMAGES", 2)
    assert [shard.rows for shard in list_shards(str(tmp_path))] == [(0, 2), (2, 4), (4, 5), (0, 1)]
    assert read_all(tmp_path)[0] == whole


def test_a_picture_that_is_gone_or_empty_costs_no_other(tmp_path: Path) -> None:
    write_classes(tmp_path, cat=["0.jpg", "1.jpg", "2.jpg"], dog=["0.jpg"])
    (tmp_path / "cat" / "0.jpg").write_bytes(b"")
    (tmp_path / "cat" / "1.jpg").unlink()
    (tmp_path / "cat" / "1.jpg").symlink_to(tmp_path / "nowhere.jpg")
    samples, rejections = read_all(tmp_path)
    assert [sample.uid for sample in samples] == ["cat/2.jpg", "dog/0.jpg"]
    assert [(r.uid, r.reason.split(" ")[-1]) for r in rejections] == [
        ("cat/0.jpg", "empty"),
        ("cat/1.jpg", "missing"),
    ]


@pytest.mark.parametrize(
    "classes", [{"images": ["0.jpg"]}, {"train": ["0.jpg"], "val": ["0.jpg"], "labels": []}]
)
def test_folders_of_pictures_that_are_no_classes_are_refused(
    classes: dict[str, list[str]], tmp_path: Path
) -> None:
    """A folder `images` would caption every picture "a photo of a images"."""
    write_classes(tmp_path, **classes)
    with pytest.raises(InputError, match="Class folders of pictures are read where"):
        list_shards(str(tmp_path))


def test_a_tar_goes_before_class_folders(tmp_path: Path) -> None:
    write_classes(tmp_path, cat=["0.jpg"], dog=["0.jpg"])
    (tmp_path / "0.tar").write_bytes(tar_bytes([]))
    assert [shard.format for shard in list_shards(str(tmp_path))] == ["webdataset"]


# Listing


def test_a_folder_that_is_called_like_a_shard_is_none(tmp_path: Path, encoded_image: Encode) -> None:
    (tmp_path / "unpacked.tar").mkdir()
    (tmp_path / "many.parquet").mkdir()
    (tmp_path / "linked.tar").symlink_to(tmp_path / "unpacked.tar")
    (tmp_path / "0.tar").write_bytes(tar_bytes([]))
    for spec in (tmp_path, tmp_path / "*"):
        assert [Path(shard.path).name for shard in list_shards(str(spec))] == ["0.tar"]


def test_a_folder_lists_its_shards_in_order(tmp_path: Path) -> None:
    for name in ("00001.tar", "00000.tar", "00000.parquet", "00000_stats.json", "notes.txt"):
        (tmp_path / name).write_bytes(tar_bytes([]))
    shards = list_shards(str(tmp_path))
    assert [(Path(s.path).name, s.index, s.format) for s in shards] == [
        ("00000.tar", 0, "webdataset"),
        ("00001.tar", 1, "webdataset"),
    ]
    for spec in (str(tmp_path / "*"), str(tmp_path / "*.tar"), str(tmp_path / "{00000..00001}.tar")):
        assert list_shards(spec) == shards
    paths = [str(tmp_path / name) for name in ("00001.tar", "00000.tar", "00000.tar")]
    assert list_shards(paths) == list_shards(",".join(paths)) == shards
    assert pickle.loads(pickle.dumps(shards)) == shards


def test_paths_are_absolute_for_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "0.tar").write_bytes(tar_bytes([]))
    monkeypatch.chdir(tmp_path)
    assert list_shards("0.tar")[0].path == str(tmp_path / "0.tar")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere", "no such file or folder"),
        ("*.tar", "no .tar, .parquet, .json file there"),
        ("empty", "Folders within are not searched"),
        ("x.tar.gz", "Unpack it first"),
        ("x.csv", "unknown kind of file"),
        ("", "no data given"),
        ("carrier-pigeon://x", "cannot be reached"),
    ],
)
def test_wrong_specifications_are_explained(
    spec: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.tar.gz").touch()
    (tmp_path / "x.csv").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message.replace(".", "[.]")):
        list_shards(spec)


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="captions"):
        ReadOptions(captions="some")  # type: ignore[arg-type]


# Real data


@pytest.mark.real_data
def test_real_tars(real_data: Path) -> None:
    shard = list_shards(str(real_data / "flickr8k" / "dev"))[0]
    samples, rejections = split(read_shard(shard))
    assert not rejections
    assert all(len(sample.captions) == 5 for sample in samples)
    assert len(set(all_uids(samples))) == 5 * len(samples)
    assert read_image_bytes(samples[-1].ref) == samples[-1].image
    assert decode_image(samples[-1].image).size == (192, 192)


@pytest.mark.real_data
def test_real_coco(real_data: Path) -> None:
    spec = str(real_data / "coco2017-mini" / "annotations" / "captions_*.json")
    shards = list_shards(spec)
    assert [shard.rows for shard in shards] == [(0, 80), (0, 79)]
    samples, rejections = split(r for shard in shards for r in read_shard(shard))
    assert (len(samples), len(rejections)) == (159, 0)
    assert all(len(sample.captions) >= 5 for sample in samples)


def test_a_shard_is_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar_bytes(THREE))
    shard = Shard(path=str(tmp_path / "x.tar"), format="webdataset", index=3)
    assert shard.name == "00003"
    assert content(split(read_shard(pickle.loads(pickle.dumps(shard))))[0]) == CONTENT
