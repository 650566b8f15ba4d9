"""Encoded pictures, read again from where they lie, one at a time."""

from collections.abc import Iterable, Iterator
from itertools import groupby, pairwise

import fsspec
import pyarrow as pa

from influencespace.data.images import (
    RejectedImage,
    encoded_bytes,
    first_rows,
    image_column,
    open_parquet,
    read_image_bytes,
)
from influencespace.data.schema import ImageRef
from influencespace.errors import InputError

# Rows of a Parquet file whose pictures are in memory at once.
BATCH_ROWS = 32

_SIGNATURES = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG\r\n\x1a\n", "png"), (b"GIF8", "gif"), (b"BM", "bmp"))


def read_pictures(refs: Iterable[ImageRef]) -> Iterator[bytes]:
    """The encoded pictures at `refs`, in their order; `refs` are sorted by path and place in it.

    A picture that several in a row ask for is read once. Raises InputError when a file is gone or changed, or
    there never were pictures.
    """
    for path, group in groupby(refs, key=lambda ref: ref.path):
        if not path:
            raise InputError(
                "this run has no pictures: its embeddings were imported without the shards they came from. "
                "Export to npy, or run again with --data beside --embeddings."
            )
        wanted = list(group)
        try:
            if wanted[0].row >= 0:
                yield from _rows(path, [ref.row for ref in wanted])
            else:
                yield from _ranges(wanted)
        except (OSError, RejectedImage, pa.ArrowInvalid) as error:
            raise InputError(
                f"{path}: the pictures of kept pairs cannot be read ({error}). Has the file been moved or "
                "changed since the run? Bring it back, or run again to embed what is there now."
            ) from error


def extension(data: bytes) -> str | None:
    """jpg, png, webp, gif or bmp by the first bytes of a picture; None for anything else."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((name for signature, name in _SIGNATURES if data.startswith(signature)), None)


def _ranges(refs: Iterable[ImageRef]) -> Iterator[bytes]:
    for ref, same in groupby(refs):
        data = _checked(read_image_bytes(ref), f"byte {ref.offset}")
        for _ in same:
            yield data


def _rows(path: str, rows: list[int]) -> Iterator[bytes]:
    """The pictures of ascending `rows` of a Parquet file, each row group opened once."""
    with fsspec.open(path, "rb") as file, open_parquet(file) as parquet:
        starts = first_rows(parquet.metadata)
        name = image_column(parquet.schema_arrow, path)
        if rows[-1] >= starts[-1]:
            raise RejectedImage(f"it has {starts[-1]} rows, no row {rows[-1]}")
        waiting = iter(groupby(rows))
        row, same = next(waiting)
        for group, (first, end) in enumerate(pairwise(starts)):
            if row >= end:
                continue
            for batch in parquet.iter_batches(BATCH_ROWS, row_groups=[group], columns=[name]):
                while row < first + len(batch):
                    data = _checked(encoded_bytes(batch.column(0))[row - first].as_py(), f"row {row}")
                    for _ in same:
                        yield data
                    following = next(waiting, None)
                    if following is None:
                        return
                    row, same = following
                first += len(batch)


def _checked(data: bytes | None, place: str) -> bytes:
    if not data or extension(data) is None:
        raise RejectedImage(f"no picture at {place}")
    return data
