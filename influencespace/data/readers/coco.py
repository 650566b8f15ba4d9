"""COCO captions: the official annotation JSON and a folder of images; the uid of an image is its id."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import fsspec

from influencespace.data.captions import RawSample
from influencespace.data.images import escapes, is_address, read_image_file
from influencespace.data.schema import ImageRef, ReadOptions, Rejection, Shard
from influencespace.errors import InputError


@dataclass(frozen=True)
class _Annotations:
    """What an annotation file holds."""

    images: list[dict[str, Any]]
    captions: dict[object, list[object]]
    """By image id, in the order of the file; under None those without an id."""
    repeated: frozenset[int]
    """Positions of images whose id an earlier one has."""


def count_images(path: str) -> int:
    """Images that the annotation file lists; raises InputError when it is none."""
    return len(_load(path).images)


def image_folder(path: str) -> str:
    """The folder of the official layout, `val2017` beside `annotations/captions_val2017.json`.

    Raises InputError when there is none.
    """
    match = re.fullmatch(r"(.*)/[^/]+/captions_(\w+)\.json", path)
    if match:
        folder = f"{match[1]}/{match[2]}"
        filesystem, inside = fsspec.url_to_fs(folder)
        if filesystem.isdir(inside):
            return folder
    raise InputError(f"{path}: where are its images? Give their folder as `images`, e.g. coco/val2017.")


def read_coco(shard: Shard, options: ReadOptions) -> Iterator[RawSample | Rejection]:
    """The samples of a range of images; the last range also rejects the annotations of unknown images.

    Raises InputError when the file is no annotation file of captions.
    """
    annotations = _load(shard.path)
    start, stop = shard.rows or (0, len(annotations.images))
    for position in range(start, stop):
        image = annotations.images[position]
        if position in annotations.repeated:
            reason = "an earlier image of the file has the same id"
            yield Rejection(shard=shard.path, uid=str(image["id"]), reason=reason)
        else:
            yield _raw_sample(shard, image, annotations, options)
    if stop == len(annotations.images):
        known = {_image_id(image) for image in annotations.images} - {None}
        for key, captions in annotations.captions.items():
            if key not in known:
                reason = f"{len(captions)} annotations name an image that the file does not list"
                yield Rejection(shard=shard.path, uid=str(key), reason=reason)


def _raw_sample(
    shard: Shard, image: dict[str, Any], annotations: _Annotations, options: ReadOptions
) -> RawSample:
    name, key = image.get("file_name"), _image_id(image)
    path = f"{shard.images}/{name}"
    data, missing = None, f"file_name {name!r} is not a path inside the image folder"
    if isinstance(name, str) and name and not escapes(name) and not is_address(name):
        data, missing = read_image_file(path)
    return RawSample(
        shard=shard.path,
        key=str(name),
        image=data,
        captions=annotations.captions.get(key, []) if key is not None else [],
        uid=key,
        group=image.get(options.group_column),
        ref=ImageRef(path=path, length=len(data or b"")),
        missing=missing,
    )


def _load(path: str) -> _Annotations:
    filesystem, inside = fsspec.url_to_fs(path)
    return _parse(path, filesystem.ukey(inside))


@lru_cache(maxsize=1)  # a worker reads many shards of one file, which takes seconds to parse
def _parse(path: str, version: str) -> _Annotations:
    """The annotations of `path`; `version` changes when the file does."""
    try:
        with fsspec.open(path, "rb") as file:
            document = json.load(file)
        images = [dict(image) for image in document["images"]]
        entries = [(entry.get("image_id"), entry.get("caption")) for entry in document["annotations"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path} is not a COCO annotation file ({type(error).__name__}: {error}). It must be JSON with "
            "the lists `images` and `annotations`, such as captions_val2017.json."
        ) from None
    if entries and all(caption is None for _, caption in entries):
        raise InputError(f"{path} has no captions. Is it an instances file? Give captions_*.json instead.")
    captions: dict[object, list[object]] = {}
    for key, caption in entries:
        captions.setdefault(key if isinstance(key, int | str) else None, []).append(caption)
    first: dict[object, int] = {}
    keys = enumerate(map(_image_id, images))
    repeated = {i for i, key in keys if key is not None and first.setdefault(key, i) != i}
    return _Annotations(images, captions, frozenset(repeated))


def _image_id(image: dict[str, Any]) -> int | str | None:
    key = image.get("id")
    return key if isinstance(key, int | str) else None
