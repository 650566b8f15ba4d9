"""Shards of every format, written for tests, and what our readers find in them."""

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from influencespace.data.readers import ReadOptions, list_shards, read_shard
from influencespace.data.schema import Rejection, Sample
from influencespace.data.uids import pair_uids

Files = list[tuple[str, bytes]]
Result = tuple[list[Sample], list[Rejection]]


def sample_files(
    key: str, image: bytes, suffix: str = "jpg", text: str | None = None, **fields: Any
) -> Files:
    """The files of a sample of a tar: image, .txt and .json."""
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


def write_parquet(path: Path, columns: dict[str, Any], **how: Any) -> Path:
    pq.write_table(pa.table(columns), path, **how)
    return path


def write_coco(folder: Path, images: Sequence[dict[str, Any]], annotations: Sequence[dict[str, Any]]) -> Path:
    """A folder in the official layout, with files for the images that have `data`."""
    path = folder / "annotations" / "captions_val.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    (folder / "val").mkdir(exist_ok=True)
    for image in images:
        if (data := image.pop("data", None)) is not None:
            (folder / "val" / image["file_name"]).write_bytes(data)
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


def coco_image(number: int, **more: Any) -> dict[str, Any]:
    file = {"file_name": f"{number:012d}.jpg", "data": f"image {number}".encode()}
    return {"id": number} | file | more


def coco_captions(number: int, *captions: object) -> list[dict[str, Any]]:
    return [{"image_id": number, "id": i, "caption": caption} for i, caption in enumerate(captions)]


def write_classes(folder: Path, **classes: dict[str, bytes]) -> Path:
    """A folder of class folders, each with these files."""
    for name, files in classes.items():
        (folder / name).mkdir(parents=True)
        for file, data in files.items():
            (folder / name / file).write_bytes(data)
    return folder


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
    """What samples hold, whatever file and place they came from."""
    return {(s.image, s.captions, s.uid, s.group, s.positions) for s in samples}


def all_uids(samples: Iterable[Sample]) -> list[str]:
    return sorted(uid for sample in samples for uid in pair_uids(sample))
