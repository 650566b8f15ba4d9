"""Readers: every format gives the same samples, in slices of any size, from any file system; and what is listed."""

import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shards import (
    all_uids,
    coco_captions,
    coco_image,
    content,
    read_all,
    sample_files,
    split,
    tar_bytes,
    write_classes,
    write_coco,
    write_parquet,
)

from influencespace.data import readers
from influencespace.data.images import RejectedImage, decode_image, read_image_bytes
from influencespace.data.readers import ReadOptions, list_shards, parquet, read_shard
from influencespace.data.schema import Sample
from influencespace.errors import InputError

Encode = Callable[..., bytes]

# All formats


@pytest.fixture
def formats(tmp_path: Path, encoded_image: Encode) -> dict[str, Path]:
    """The same six images in every format; with the same captions and uids, but in class folders."""
    images = {str(i): encoded_image(i) for i in range(6)}
    files = [
        file for i, image in images.items() for file in sample_files(i, image, uid=i, captions=[f"c {i}"])
    ]
    (tmp_path / "0.tar").write_bytes(tar_bytes(files))
    columns = {
        "image": [{"bytes": image, "path": "x"} for image in images.values()],
        "uid": list(images),
        "caption": [f"c {i}" for i in images],
    }
    listed = [coco_image(int(i), data=image) for i, image in images.items()]
    annotations = [entry for i in images for entry in coco_captions(int(i), f"c {i}")]
    classes = {name: {f"{i}.jpg": images[str(i)] for i in range(6)[part]} for name, part in HALVES.items()}
    return {
        "tar": tmp_path / "0.tar",
        "parquet": write_parquet(tmp_path / "1.parquet", columns, row_group_size=1),
        "coco": write_coco(tmp_path / "coco", listed, annotations),
        "classes": write_classes(tmp_path / "classes", **classes),
    }


HALVES = {"cat": slice(0, 5), "dog": slice(5, 6)}
FORMATS = ("tar", "parquet", "coco", "classes")


def test_formats_give_the_same_samples(formats: dict[str, Path]) -> None:
    tar, table, coco, classes = (content(read_all(formats[name])[0]) for name in FORMATS)
    assert tar == table == coco
    assert {image for image, *_ in classes} == {image for image, *_ in tar}
    assert len(tar) == len(classes) == 6


@pytest.mark.parametrize("name", FORMATS)
def test_an_image_is_found_again_by_its_reference(name: str, formats: dict[str, Path]) -> None:
    for sample in read_all(formats[name])[0]:
        assert read_image_bytes(sample.ref) == sample.image
        assert decode_image(sample.image).size == (16, 12)


@pytest.mark.parametrize("name", ["tar", "parquet"])
def test_a_reference_to_a_changed_file_is_noticed(name: str, formats: dict[str, Path]) -> None:
    reference = read_all(formats[name])[0][-1].ref
    if name == "tar":
        formats[name].write_bytes(formats[name].read_bytes()[:2000])
    else:
        write_parquet(formats[name], {"image": [b"0"], "caption": ["a"]})
    with pytest.raises(RejectedImage, match="has it changed"):
        read_image_bytes(reference)


@pytest.mark.parametrize(
    ("name", "slices"),
    [
        ("parquet", [(0, 1, 2), (3, 4, 5)]),
        ("coco", [(0, 2), (2, 4), (4, 6)]),
        ("classes", [(0, 2), (2, 4), (4, 5), (0, 1)]),
    ],
)
def test_what_is_big_becomes_several_shards_that_are_the_whole(
    name: str, slices: list[Any], formats: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read_all(formats[name])
    monkeypatch.setattr(readers, "SHARD_IMAGES", 2)
    row_group = pq.read_metadata(formats["parquet"]).row_group(0).total_byte_size
    monkeypatch.setattr(parquet, "SHARD_BYTES", 3.5 * row_group)
    shards = list_shards(str(formats[name]))
    assert [shard.row_groups or shard.rows for shard in shards] == slices
    assert [shard.name for shard in shards][:2] == ["00000", "00001"]
    assert read_all(formats[name]) == whole


@pytest.mark.parametrize("name", FORMATS)
def test_everything_works_on_an_object_store(name: str, formats: dict[str, Path], memory: Any) -> None:
    memory.put(str(formats[name]), f"/data/{formats[name].name}", recursive=name == "classes")
    listing = {"images": "memory://data/val"} if name == "coco" else {}
    if name == "coco":
        memory.put(str(formats[name].parent.parent / "val"), "/data/val", recursive=True)
    samples, rejections = read_all(f"memory://data/{formats[name].name}", **listing)
    assert content(samples) == content(read_all(formats[name])[0])
    assert not rejections
    assert all(sample.ref.path.startswith("memory://") for sample in samples)
    assert all(read_image_bytes(sample.ref) == sample.image for sample in samples)
    if name in ("tar", "parquet"):
        assert len(list_shards(f"memory://data/*.{name}")) == len(list_shards("memory://data")) == 1


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
            columns = {"jpg": images, "txt": texts, "uid": pa.array(uids, pa.string())}
            write_parquet(folder / f"{part}.parquet", columns)
    samples, rejections = read_all(folder)
    assert not rejections
    expected = [Sample(image=i, captions=(t,), uid=u, group=None, ref=samples[0].ref) for i, t, u in rows]
    assert all_uids(samples) == all_uids(expected)


# COCO


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
        coco_image(2, data=None),
        coco_image(3),
        coco_image(1),
        coco_image(4, file_name="../annotations/captions_val.json", data=None),
        {"id": 5},
        coco_image(6, file_name=300 * "x" + ".jpg", data=None),
        coco_image(7, file_name="http://elsewhere/x.jpg", data=None),
        coco_image(8, file_name="x::memory://secret.jpg", data=None),
    ]
    annotations = [
        *coco_captions(1, "a", " ", None),
        *(caption for number in (2, 4, 5, 6, 7, 8, 99) for caption in coco_captions(number, "c")),
    ]
    samples, rejections = read_all(write_coco(tmp_path, images, annotations))
    assert all_uids(samples) == ["1#0"]
    expected = [
        ("1#1", "the caption is empty"),
        ("1#2", "the caption is missing"),
        ("2", "the image file is missing"),  # no name: one reason for all
        ("3", "no caption"),
        ("1", "same id"),
        ("4", "not a path inside"),
        ("5", "not a path inside"),
        ("6", "the image file cannot be read (File name too long)"),
        ("7", "not a path inside"),
        ("8", "not a path inside"),
        ("99", "does not list"),
    ]
    assert [r.uid for r in rejections] == [uid for uid, _ in expected]
    assert all(reason in r.reason for r, (_, reason) in zip(rejections, expected))


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


# Class folders


def test_class_folders(tmp_path: Path) -> None:
    red = {"b.PNG": b"b", "a.jpg": b"a", ".hidden.jpg": b"h", "notes.txt": b"n"}
    write_classes(tmp_path, red_circle=red, ring={"a.jpg": b"r"})
    (tmp_path / "README.md").touch()
    (tmp_path / ".cache").mkdir()
    samples, rejections = read_all(tmp_path)
    assert not rejections
    assert [(s.uid, s.group, s.captions) for s in samples] == [
        ("red_circle/a.jpg", "red circle", ("a photo of a red circle",)),
        ("red_circle/b.PNG", "red circle", ("a photo of a red circle",)),
        ("ring/a.jpg", "ring", ("a photo of a ring",)),
    ]
    assert read_all(f"{tmp_path}/*")[0] == samples


def test_a_picture_that_is_gone_or_empty_costs_no_other(tmp_path: Path) -> None:
    write_classes(tmp_path, cat={"0.jpg": b"", "2.jpg": b"2"}, dog={"0.jpg": b"0"})
    (tmp_path / "cat" / "1.jpg").symlink_to(tmp_path / "nowhere.jpg")
    samples, rejections = read_all(tmp_path)
    assert [sample.uid for sample in samples] == ["cat/2.jpg", "dog/0.jpg"]
    reasons = [(r.uid, r.reason.split(" ")[-1]) for r in rejections]
    assert reasons == [("cat/0.jpg", "empty"), ("cat/1.jpg", "missing")]


def test_a_pipe_or_an_address_among_pictures_costs_no_other(tmp_path: Path) -> None:
    write_classes(tmp_path, cat={"1.jpg": b"1", "q::p.jpg": b"2"}, dog={"0.jpg": b"0"})
    os.mkfifo(tmp_path / "cat" / "0.jpg")
    samples, rejections = read_all(tmp_path)
    assert [sample.uid for sample in samples] == ["cat/1.jpg", "dog/0.jpg"]
    reasons = {r.uid: r.reason for r in rejections}
    assert reasons["cat/0.jpg"] == "the image file is a pipe or a device"
    assert "read as a URL" in reasons["cat/q::p.jpg"]


@pytest.mark.parametrize("classes", [("images",), ("train", "val", "labels")])
def test_folders_of_pictures_that_are_no_classes_are_refused(
    classes: tuple[str, ...], tmp_path: Path
) -> None:
    """A folder `images` would caption every picture "a photo of a images"."""
    write_classes(tmp_path, **{name: {} if name == "labels" else {"0.jpg": b"0"} for name in classes})
    with pytest.raises(InputError, match="Class folders of pictures are read where"):
        list_shards(str(tmp_path))


# Listing


def test_shards_go_before_class_folders_and_folders_called_like_a_shard_are_none(tmp_path: Path) -> None:
    write_classes(tmp_path, cat={"0.jpg": b"0"}, dog={"0.jpg": b"0"})
    (tmp_path / "unpacked.tar").mkdir()
    (tmp_path / "many.parquet").mkdir()
    (tmp_path / "linked.tar").symlink_to(tmp_path / "unpacked.tar")
    (tmp_path / "0.tar").write_bytes(tar_bytes([]))
    for spec in (tmp_path, tmp_path / "*"):
        assert [Path(shard.path).name for shard in list_shards(str(spec))] == ["0.tar"]


def test_a_folder_lists_its_shards_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    monkeypatch.chdir(tmp_path)
    assert list_shards("00000.tar") == shards[:1], "paths are absolute for the workers"


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/nowhere")])
def test_a_pipe_or_a_link_to_nothing_called_like_a_shard_is_refused(make: Any, tmp_path: Path) -> None:
    """Opened for reading, a pipe that nobody writes to waits for ever."""
    make(tmp_path / "1.tar")
    (tmp_path / "0.tar").write_bytes(tar_bytes([]))
    for spec in (tmp_path, tmp_path / "*.tar"):
        with pytest.raises(InputError, match="a pipe, a device, or a link to nothing"):
            list_shards(str(spec))
    with pytest.raises(InputError, match="no such file"):
        list_shards(str(tmp_path / "1.tar"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere", "no such file or folder"),
        ("*.tar", "no .tar, .parquet, .json file there"),
        ("empty", "Folders within are not searched"),
        ("x.tar.gz", "Unpack it first"),
        ("x.csv", "unknown kind of file"),
        ("", "no data named"),
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


def test_a_store_whose_package_is_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.url_to_fs", missing)
    with pytest.raises(
        InputError, match=r"s3://b/x\.tar: needs a package .* pip install 'influencespace\[s3\]'"
    ):
        list_shards("s3://b/x.tar")


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
