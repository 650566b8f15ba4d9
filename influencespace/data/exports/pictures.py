"""Encoded pictures, read again from where they lie, one at a time."""

from collections.abc import Iterable, Iterator
from itertools import groupby

import pyarrow as pa

from influencespace.data.images import RejectedImage, read_image_bytes, read_rows
from influencespace.data.schema import ImageRef
from influencespace.errors import InputError

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
        rows = [ref.row for ref in wanted if ref.row >= 0]
        try:
            for ref, data in zip(wanted, read_rows(path, rows) if rows else _ranges(wanted), strict=True):
                if not data or extension(data) is None:
                    raise RejectedImage(f"no picture at {ref}")
                yield data
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
        data = read_image_bytes(ref)
        yield from (data for _ in same)
