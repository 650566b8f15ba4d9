"""Runs as far as exports read them, of data in every format."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from shards import coco_captions, coco_image, read_all, sample_files, tar_bytes, write_coco, write_parquet

from influencespace.data.bucket_files import PAIRS_SCHEMA
from influencespace.data.uids import digest, pair_uids
from tests.planted import write_pairs

Encode = Callable[..., bytes]

HEX = "139e4a9b22a614771f06c700a8ebe150"


def write_tar(path: Path, samples: Sequence[tuple[bytes, str, dict[str, Any]]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [
        file
        for key, (image, suffix, fields) in enumerate(samples)
        for file in sample_files(f"{key:05d}", image, suffix, **fields)
    ]
    path.write_bytes(tar_bytes(files))


def write_tars(data: Path, encode: Encode) -> str:
    """Uids of all kinds, several captions an image, several formats of pictures, hostile captions."""
    first = [
        (encode(0), "jpg", {"uid": HEX, "caption": "one caption", "group": "a"}),
        (encode(1), "jpg", {"uid": "many", "captions": ["three", "captions", "here"]}),
        (encode(2, kind="PNG"), "png", {"captions": ["no uid", "no uid, again"]}),
    ]
    second = [
        (encode(3, kind="WEBP"), "webp", {"caption": "<script>alert('ü')</script>\n\"two\" lines"}),
        (encode(2, kind="PNG"), "png", {"caption": "no uid"}),
        (encode(4, kind="GIF"), "jpg", {"uid": "mislabelled", "caption": "a gif called jpg", "group": "b"}),
        *((encode(10 + i), "jpg", {"uid": f"plain-{i}", "caption": f"plain {i}"}) for i in range(5)),
    ]
    write_tar(data / "1.tar", first)
    write_tar(data / "0.tar", second)
    return str(data)


def write_tables(data: Path, encode: Encode) -> str:
    data.mkdir()
    columns: dict[str, list[Any]] = {
        "jpg": [encode(i, kind="GIF" if i == 7 else "JPEG") for i in range(90)],
        "captions": [[f"row {i}", f"again {i}"] for i in range(90)],
        "uid": [f"u{i}" for i in range(90)],
    }
    for name, rows in (("a", slice(0, 80)), ("b", slice(80, 90))):
        some = {column: values[rows] for column, values in columns.items()}
        write_parquet(data / f"{name}.parquet", some, row_group_size=40)
    return str(data)


def write_annotations(data: Path, encode: Encode) -> str:
    images = [coco_image(i, data=encode(i)) for i in range(6)]
    annotations = [caption for i in range(12) for caption in coco_captions(i % 6, f"text {i}")]
    return str(write_coco(data, images, annotations))


WRITERS = {"webdataset": write_tars, "parquet": write_tables, "coco": write_annotations}


def pool_rows(spec: str) -> list[dict[str, Any]]:
    """The pairs of `spec` in canonical order, as the embed stage lists them."""
    rows, seen = [], Counter[str]()
    for sample in read_all(spec)[0]:
        for uid, caption in zip(pair_uids(sample), sample.captions):
            seen[uid] += 1
            name = f"{uid}~{seen[uid] - 1}" if seen[uid] > 1 else uid
            rows.append({"uid": name, "caption": caption, "group": sample.group, **sample.ref.columns()})
    return sorted(rows, key=lambda row: digest(row["uid"].encode()))


def write_run(run: Path, spec: str, dropped: Sequence[int] = (2, 5)) -> list[dict[str, Any]]:
    """A run folder as far as exports read it; the rows of the kept pairs."""
    rows = pool_rows(spec)
    for i, row in enumerate(rows):
        row |= {"kept": i not in dropped, "weight": 0.5 + i, "score": None if i == 0 else i / 8}
    pool = run / "embed" / "pool"
    pool.mkdir(parents=True, exist_ok=True)
    # More pairs than the pool has: a target was cut out of the same data.
    extra = {"uid": "cut out as target", "caption": "x", "image_path": "gone.tar"}
    listed = sorted([*rows, extra], key=lambda row: digest(row["uid"].encode()))
    write_pairs(pool, {name: [row.get(name) for row in listed] for name in PAIRS_SCHEMA.names}, bucket_size=4)
    names = ("uid", "kept", "weight", "score")
    pq.write_table(pa.table({name: [row[name] for row in rows] for name in names}), run / "curated.parquet")
    return [row for row in rows if row["kept"]]
