"""WebDataset tars: any order, any format of tar, and whatever is damaged or hostile costs no other sample."""

from __future__ import annotations

import tarfile
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem
from hypothesis import given
from hypothesis import strategies as st
from shards import Files, content, read_all, read_tar, sample_files, tar_bytes

from influencespace.data.readers import ReadOptions, list_shards, read_shard, webdataset
from influencespace.data.schema import Sample, Shard

# Readers never decode, so any bytes will do where an image is not looked at.
IMAGE = b"\xff\xd8 not looked at by readers"
MAX_BYTES = 100

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


def member(kind: bytes = tarfile.REGTYPE, **pax: str) -> tarfile.TarInfo:
    entry = tarfile.TarInfo("0.jpg")
    entry.type, entry.linkname, entry.pax_headers = kind, "/etc/passwd", pax
    return entry


SPARSE = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "3"}
NO_FILES = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([("0.txt", b"a")], "image is missing"),
        ([("0.json", b'{"uid": "7"}')], "image is missing"),
        ([("0.jpg", IMAGE)], "no caption"),
        ([("0.jpg", b""), ("0.txt", b"a")], "image is empty"),
        ([("0.jpg", bytes(MAX_BYTES + 1)), ("0.txt", b"a")], "more than 100"),
        ([("0.jpg", IMAGE), ("0.txt", b" \n")], "caption is empty"),
        ([("0.jpg", IMAGE), ("0.txt", b"\xff\xfe")], "not UTF-8"),
        ([("0.jpg", IMAGE), ("0.txt", b"a"), ("0.json", b"")], "malformed JSON"),
        ([("0.jpg", IMAGE), ("0.txt", b"a"), ("0.json", b'{"uid": ')], "malformed JSON"),
        ([("0.jpg", IMAGE), ("0.txt", b"a"), ("0.json", b"[1]")], "malformed JSON"),
        ([("0.jpg", IMAGE), ("0.txt", b"a"), ("0.json", b"[" * 100_000)], "malformed JSON"),
        ([("0.jpg", IMAGE), ("0.png", IMAGE), ("0.txt", b"a")], "both the image"),
        ([("../0.jpg", IMAGE), ("../0.txt", b"a")], "leads out of the archive"),
        ([("/0.jpg", IMAGE), ("/0.txt", b"a")], "leads out of the archive"),
        *(([(member(kind), b""), ("0.txt", b"a")], "not a file") for kind in NO_FILES),
        ([(member(**SPARSE), b"1\n0\n3\n".ljust(512, b"\0") + b"abc"), ("0.txt", b"a")], "sparse"),
    ],
)
def test_bad_samples_are_rejected_with_the_reason_and_cost_no_other(
    files: Files, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("influencespace.data.readers.webdataset.MAX_ENCODED_BYTES", MAX_BYTES)
    around = sample_files("a", bytes(MAX_BYTES), text="a"), sample_files("z", b"2", text="z")
    samples, rejections = read_tar(tar_bytes([*around[0], *files, *around[1]]), tmp_path)
    assert [s.captions for s in samples] == [("a",), ("z",)]
    assert len(rejections) == 1
    assert reason in rejections[0].reason
    assert rejections[0].shard == str(tmp_path / "x.tar")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.tar"]


def test_other_files_and_folders_in_a_tar_are_passed_over(tmp_path: Path) -> None:
    folder = tarfile.TarInfo("photos")
    folder.type = tarfile.DIRTYPE
    others = [(folder, b""), ("photos/._0.jpg", b"mac"), ("0.cls", b"3")]
    samples, rejections = read_tar(tar_bytes([*others, *sample_files("photos/0", b"0", text="a")]), tmp_path)
    assert len(samples) == 1
    assert not rejections


def test_an_invalid_sparse_file_ends_the_tar(tmp_path: Path) -> None:
    sparse = tarfile.TarInfo("1.jpg")
    sparse.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    files = [*sample_files("0", b"0", text="a"), *sample_files("x", b"x", text="x"), (sparse, IMAGE)]
    samples, rejections = read_tar(tar_bytes(files), tmp_path)
    assert [s.captions for s in samples] == [("a",)]
    assert len(rejections) == 1


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


@pytest.mark.parametrize("size", ["-512", "-1", "99999999999", "9" * 25, "x", "9" * 5000])
def test_a_lying_size_ends_the_tar(size: str, tmp_path: Path) -> None:
    lying = tarfile.TarInfo("2.jpg")
    lying.pax_headers = {"size": size}
    good = [*sample_files("0", b"0", text="a"), *sample_files("1", b"1", text="b")]
    samples, rejections = read_tar(tar_bytes([*good, (lying, IMAGE)]), tmp_path)
    assert [s.captions for s in samples][:1] == [("a",)]
    assert len(rejections) == 1


def test_an_extended_header_of_any_size_is_not_read(tmp_path: Path) -> None:
    endless = tarfile.TarInfo("pax")
    endless.type, endless.size = tarfile.XHDTYPE, 2**40
    good = [*sample_files("0", b"0", text="a"), *sample_files("1", b"1", text="b")]
    samples, rejections = read_tar(
        tar_bytes(good)[: 1024 * len(good)] + endless.tobuf(tarfile.GNU_FORMAT), tmp_path
    )
    assert [s.captions for s in samples] == [("a",)]
    assert "extended header of 1,099,511,627,776 bytes" in rejections[0].reason


def test_a_tar_is_read_one_sample_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar_bytes(THREE))
    results = read_shard(list_shards(str(tmp_path / "x.tar"))[0])
    assert isinstance(next(results), Sample)


def many(count: int, *kinds: str) -> Files:
    """The files of samples in disorder: all of the first kind, then all of the second."""
    data = {"jpg": IMAGE, "txt": b"a text", "json": b'{"group": "g"}'}
    return [(f"{i:03d}.{kind}", data[kind]) for kind in kinds for i in range(count)]


@pytest.mark.parametrize("kinds", [("jpg", "txt", "json"), ("json", "txt", "jpg"), ("txt", "jpg", "json")])
def test_files_of_a_sample_may_lie_anywhere_in_a_window(
    kinds: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read_tar(tar_bytes(many(40, *kinds)), tmp_path)
    assert len(whole[0]) == 40
    assert {sample.group for sample in whole[0]} == {"g"}
    monkeypatch.setattr(webdataset, "WINDOW_BYTES", 41 * 1024 * 3)
    assert read_tar(tar_bytes(many(40, *kinds)), tmp_path) == whole


def test_what_lacks_a_kind_of_file_waits_for_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the window a sample is whole only if it has all that others have."""
    monkeypatch.setattr(webdataset, "WINDOW_BYTES", 5000)
    first = sample_files("first", b"1", text="x", uid="u")
    samples, rejections = read_tar(tar_bytes([*first, *many(40, "jpg", "txt", "json")]), tmp_path)
    assert len(samples) == 41
    assert not rejections
    assert [sample.group for sample in samples] == [None, *40 * ["g"]]


def test_what_waits_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset, "WINDOW_BYTES", 5000)
    monkeypatch.setattr(webdataset, "MAX_WAITING", 10)
    files = [*sample_files("first", b"1", text="x"), *many(40, "jpg")]
    samples, rejections = read_tar(tar_bytes(files), tmp_path)
    assert len(samples) == 1
    assert sorted(rejection.uid for rejection in rejections) == [f"{i:03d}" for i in range(40)]


class Remote(AbstractFileSystem):
    """An object store that counts what is asked of it."""

    protocol = "counted"
    data: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[tuple[int, int]]] = []

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return {"name": path, "size": len(self.data[path]), "type": "file"}

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **how: Any) -> RemoteFile:
        return RemoteFile(self, path, mode, block_size or "default", **how)


class RemoteFile(AbstractBufferedFile):
    def _fetch_range(self, start: int, end: int) -> bytes:
        Remote.asked.append((start, end))
        return Remote.data[self.path][start:end]


def test_a_tar_of_an_object_store_is_read_once_by_ranges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was copied whole to a temporary file first."""
    fsspec.register_implementation("counted", Remote, clobber=True)
    monkeypatch.setattr(webdataset, "BLOCK_BYTES", 10_000)
    monkeypatch.setattr(webdataset, "WINDOW_BYTES", 50_000)
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda *_: pytest.fail("a temporary file"))
    files = [f for i in range(200) for f in sample_files(f"{i}", bytes(3000), text=f"t{i}", uid=f"u{i}")]
    Remote.data["x.tar"], Remote.asked[:] = tar_bytes(files), []
    shard = Shard(path="counted://x.tar", format="webdataset", index=0)
    results = read_shard(shard)
    first = next(results)
    assert isinstance(first, Sample)
    assert sum(end - start for start, end in Remote.asked) < 100_000
    assert [result.uid for result in results] == [f"u{i}" for i in range(1, 200)]
    blocks = [start for start, end in Remote.asked if end > start]
    assert len(blocks) == len(set(blocks)), "each block once"
    assert max(end - start for start, end in Remote.asked) == 10_000


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@given(
    names=st.lists(st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1)),
    size=st.integers(0, 1500),
)
def test_plain_headers_are_read_as_tarfile_reads_them(
    form: int, names: list[str], size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "plain.tar"
    files = [(f"{'folder/' * (i % 30)}{name[:20]}.jpg", bytes(size + i)) for i, name in enumerate(names)]
    path.write_bytes(tar_bytes(files, form))
    with path.open("rb") as file:
        headers = webdataset.Headers(file)
        found = [(member.name, member.size, member.offset_data) for member in headers]
    with tarfile.open(path, encoding="utf-8") as tar:
        expected = [(member.name, member.size, member.offset_data) for member in tar]
    assert not headers.problem
    assert found == [entry for entry in expected if not entry[0].rpartition("/")[2].startswith(".")]
