"""Class folders, `folder/class/picture.jpg`: the folder's name is the class, and the caption is a prompt of it.

The uid of a picture is `class/picture.jpg`, its group is the class.
"""

from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

import fsspec

from influencespace.data.captions import RawSample
from influencespace.data.images import is_address, read_image_file
from influencespace.data.schema import ImageRef, ReadOptions, Shard

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
CAPTION = "a photo of a {}"  # CLIP's own prompt (Radford et al. 2021)


def pictures(filesystem: Any, folder: str) -> list[str]:
    """Sorted names of the pictures that lie directly in a folder, hidden ones left out."""
    names = (PurePosixPath(path).name for path in filesystem.ls(folder, detail=False))
    return sorted(name for name in names if name.lower().endswith(SUFFIXES) and not name.startswith("."))


def find_classes(filesystem: Any, paths: Sequence[str]) -> list[str]:
    """The folders among `paths` if they are classes: two or more, all of which hold pictures; else [].

    One folder of pictures, or one beside annotations, is no class: its name would be the caption of all pictures.
    """
    folders = [
        path for path in paths if filesystem.isdir(path) and not PurePosixPath(path).name.startswith(".")
    ]
    classes = len(folders) > 1 and all(pictures(filesystem, folder) for folder in folders)
    return folders if classes else []


def count_pictures(folder: str) -> int:
    """Pictures of a class folder."""
    return len(pictures(*fsspec.url_to_fs(folder)))


def read_class_folder(shard: Shard, options: ReadOptions) -> Iterator[RawSample]:
    """The samples of a range of the pictures of one class; underscores in its name are read as spaces."""
    folder = PurePosixPath(shard.path).name
    name = folder.replace("_", " ")
    for picture in pictures(*fsspec.url_to_fs(shard.path))[slice(*(shard.rows or (None,)))]:
        path = f"{shard.path}/{picture}"
        data, missing = None, "the name of the image file would be read as a URL"
        if not is_address(picture):
            data, missing = read_image_file(path)
        yield RawSample(
            shard=shard.path,
            key=f"{folder}/{picture}",
            image=data,
            captions=[CAPTION.format(name)],
            uid=f"{folder}/{picture}",
            group=name,
            ref=ImageRef(path=path, length=len(data or b"")),
            missing=missing,
        )
