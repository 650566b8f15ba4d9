"""The terms of the data layer: what is read (Shard, ReadOptions), and the results (Sample, Rejection)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass as validated_dataclass

from influencespace.errors import STRICT

PLACE = ("image_path", "image_offset", "image_length", "image_row")
"""Columns of a pair with the fields of its ImageRef."""

MAX_CAPTIONS = 100
"""Captions of an image that are read, by default: data sets have up to some twenty, a list of millions is an attack."""

MAX_REASON = 500
"""Characters of a Rejection's reason and uid: it may quote what it found."""

CaptionChoice = Literal["all", "first", "choice"]


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The unit of work: what to read, cheap to pickle."""

    path: str
    """Local path or fsspec URL."""
    format: Literal["webdataset", "parquet", "coco", "class_folder"]
    index: int
    """Position in the sorted listing."""
    row_groups: tuple[int, ...] | None = None
    """Row groups of a big Parquet file; None means all."""
    images: str | None = None
    """COCO: the image folder."""
    rows: tuple[int, int] | None = None
    """COCO, class folder: range (start, stop) of the images of the annotation file or the folder; None means all."""

    @property
    def name(self) -> str:
        """A file name that sorts like the listing, e.g. `00003`."""
        return f"{self.index:05d}"


@validated_dataclass(frozen=True, kw_only=True, config=STRICT)
class ReadOptions:
    """How pairs are taken from the samples of a shard."""

    captions: CaptionChoice = "all"
    """Which captions of an image to use: all, the first usable one, or one drawn by the run's seed and the image."""
    uid_column: str = "uid"
    """JSON field or Parquet column with the data's own identifier of an image."""
    group_column: str = "group"
    """JSON field or Parquet column with the group of an image, used by the fairness measures."""
    caption_column: str | None = None
    """JSON field or Parquet column with the caption or captions; None means the usual names."""
    max_captions: int = Field(default=MAX_CAPTIONS, ge=1)
    """Captions of an image that are read; what it has beyond is one rejection."""


@dataclass(frozen=True, kw_only=True)
class ImageRef:
    """Where the encoded bytes of an image lie, to read them again without a scan."""

    path: str
    offset: int = 0
    length: int = -1
    """Bytes from `offset` on; -1 means to the end of the file."""
    row: int = -1
    """Row of a Parquet file (then offset and length mean nothing), or -1."""

    @classmethod
    def of(cls, pair: Mapping[str, Any]) -> "ImageRef":
        """The place of a pair's image, from the columns PLACE."""
        return cls(**{name.removeprefix("image_"): pair[name] for name in PLACE})

    def columns(self) -> dict[str, str | int]:
        """The columns PLACE of a pair."""
        return {f"image_{name}": value for name, value in vars(self).items()}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image, still encoded, with the captions chosen for it (at least one, none of them blank)."""

    image: bytes
    captions: tuple[str, ...]
    uid: str | None
    group: str | None
    ref: ImageRef
    positions: tuple[int, ...] | None = None
    """Places of `captions` among the image's original captions; None means that none was left out."""


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """One pair (or the unreadable rest of a file) that cannot be used, and why."""

    shard: str
    """Path of the file it came from."""
    uid: str
    """The data's own uid where it is known, else the key or row under which the file holds it."""
    reason: str

    def __post_init__(self) -> None:
        for name in ("uid", "reason"):
            object.__setattr__(self, name, printable(getattr(self, name)[:MAX_REASON]))


def printable(text: str) -> str:
    """`text` with what UTF-8 cannot hold replaced by question marks, so that any file can hold it."""
    return text.encode("utf-8", "replace").decode()
