"""Encoded images: decoded with distrust and near the size that is needed, and their bytes read again from where they lie."""

import errno
import io
import math
import os
import re
import stat
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import PurePosixPath
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from PIL import Image

from influencespace.data.row_groups import batches
from influencespace.data.schema import ImageRef
from influencespace.errors import InputError

# Formats of web images. Pillow knows many more, some of which call outside programs (EPS) or have a long
# record of hostile files (TIFF).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")

# Pictures are decoded to this many times the edge that the encoder sees. Measured on 48 photographs of COCO, enlarged 4 to 9
# times with grain as a camera's: the least cosine of an embedding with that of the full picture is .9987 at 2, .9991 at 3 and
# .9992 at 4; the same pictures saved again as JPEG of quality 85 give .9989. At 3 a photograph of 24 megapixels is decoded at a
# quarter of its edges, 16 times smaller.
DRAFT = 3

# What a drafted picture holds at most, in squares of DRAFT times the encoder's edge; what is longer is a strip.
HELD_SQUARES = 8

# Pixels that are converted at once on the way to a small picture.
BAND_PIXELS = 2**20

# A pixel of the full size takes at most this while it is decoded (WebP keeps two canvases and its output; a progressive JPEG
# the coefficients of all its pixels).
BYTES_PER_PIXEL = 17

# Encoders write about 10 scans, at most 18. Each scan of a progressive JPEG goes over all pixels again: 300 scans in a file of
# 286 kB took 16 seconds.
MAX_SCANS = 32
_MARKER = re.compile(rb"\xff+([^\x00\x01\xff\xd0-\xd7])")

# An encoded image above this is a mistake or an attack; reading it would only fill the memory of a worker.
MAX_ENCODED_BYTES = 256 * 2**20

# What is wrong with a name; other errors of reading are the machine's, and may pass.
UNREADABLE = (errno.ENAMETOOLONG, errno.ELOOP)

# What a name that leads out of its folder has somewhere.
_UNSURE = re.compile(r"\.\.|[\\:]")

_IMAGE_COLUMNS = ("jpg", "jpeg", "png", "webp", "image")


class RejectedImage(ValueError):
    """An image that cannot be used; the message is the reason."""


def decode_image(data: bytes, max_pixels: int = 64_000_000, near: int | None = None) -> Image.Image:
    """The image in `data` as RGB pixels; its size is read from the header before any pixel is decoded.

    With `near`, the edge in pixels that an encoder sees, a picture of more than DRAFT times that is returned reduced; its
    `info` then holds `full`, the size (width, height) in the file, and `scale`, how many times smaller the edges are.
    Raises RejectedImage for what is no image of a known format, is cut, has more than `max_pixels` pixels, or too many scans.
    """
    # Pillow raises almost anything for hostile bytes: OSError, SyntaxError, struct.error, IndexError, ...
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise RejectedImage(f"the image is too large: {error}") from None
    except Exception as error:
        raise RejectedImage(f"not a readable image ({', '.join(FORMATS)})") from error
    width, height = image.size
    if width * height > max_pixels:
        raise RejectedImage(f"the image has {width} x {height} pixels, more than {max_pixels:,}")
    if has_more_scans(data, MAX_SCANS):
        raise RejectedImage(f"the image is a JPEG of more than {MAX_SCANS} scans")
    try:
        return _to_rgb(image) if near is None else _drafted(image, near)
    except Exception as error:
        raise RejectedImage(f"the image is damaged or cut: {error}") from error


def decoding_bytes(max_pixels: int, near: int) -> tuple[int, int]:
    """Memory for decoding one picture, and for holding one that is decoded, at most; in bytes."""
    return max_pixels * BYTES_PER_PIXEL, 4 * HELD_SQUARES * (DRAFT * near) ** 2


def has_more_scans(data: bytes, limit: int) -> bool:
    """Whether `data` is a JPEG of more than `limit` scans; what looks like one in its metadata does not count."""
    if not data.startswith(b"\xff\xd8") or data.count(b"\xff\xda") <= limit:
        return False
    place, scans = 2, 0
    while (marker := _MARKER.search(data, place)) and marker[1] != b"\xd9" and scans <= limit:
        scans += marker[1] == b"\xda"
        place = marker.end() + max(2, int.from_bytes(data[marker.end() : marker.end() + 2]))
    return scans > limit


def sharpness(image: Image.Image) -> float:
    """Logarithm of the variance of the Laplacian of the grey picture at 128 x 128 pixels (Pech-Pacheco et al. 2000).

    Low for pictures out of focus and for enlarged thumbnails, whatever their size now: 6 to 9 for photographs, 1 to 3
    for blurred ones. The logarithm of 0.001 for a picture of one colour. Of a reduced picture it is that of the full one.
    """
    side = 128
    factors = max(1, image.width // side), max(1, image.height // side)
    grey = (image.reduce(factors) if max(factors) > 1 else image).convert("L")
    grey = np.asarray(grey.resize((side, side), Image.Resampling.BOX)).ravel().astype(np.int16)
    # Slices of one flat array are quicker than those of a square; the two ends of each row are left out below.
    laplacian = 4 * grey[side:-side]
    for step in (0, side - 1, side + 1, 2 * side):
        laplacian -= grey[step : step + laplacian.size]
    # Sums of whole numbers are exact, in floats too.
    values = laplacian.reshape(-1, side)[:, 1:-1].astype(np.float64).ravel()
    mean, square = float(values.sum()) / values.size, float(values @ values) / values.size
    return float(np.log(square - mean**2 + 1e-3))


def read_image_bytes(ref: ImageRef) -> bytes:
    """The encoded image at `ref`, by a range read; raises RejectedImage when the file no longer holds it."""
    data: bytes | None
    if ref.row >= 0:
        data = next(read_rows(ref.path, [ref.row]))
    else:
        filesystem, path = fsspec.url_to_fs(ref.path)
        end = None if ref.length < 0 else ref.offset + ref.length
        data = filesystem.cat_file(path, start=ref.offset, end=end)
    if not data or len(data) < ref.length:
        place = f"row {ref.row}" if ref.row >= 0 else f"byte {ref.offset}"
        raise RejectedImage(f"{ref.path} holds no whole image at {place}: has it changed?")
    return data


def read_rows(path: str, rows: Sequence[int]) -> Iterator[bytes | None]:
    """The encoded images of ascending `rows` of a Parquet file, None for a missing one; each row group is read once.

    Raises RejectedImage when the file has fewer rows.
    """
    with fsspec.open(path, "rb") as file, open_parquet(file) as parquet:
        starts = first_rows(parquet.metadata)
        if rows[-1] >= starts[-1]:
            raise RejectedImage(f"{path} has {starts[-1]} rows, no row {rows[-1]}: has it changed?")
        name = image_column(parquet.schema_arrow, path)
        for group, (first, end) in enumerate(pairwise(starts)):
            some = rows[bisect_left(rows, first) : bisect_left(rows, end)]
            for batch in batches(parquet, file, group, [name]) if some else ():
                here, images = some[: bisect_left(some, first + len(batch))], encoded_bytes(batch[name])
                yield from (images[row - first].as_py() for row in here)
                some = some[len(here) :]
                if not some:
                    break
                first += len(batch)


def read_image_file(path: str) -> tuple[bytes | None, str]:
    """The bytes of an image that is a file of its own, or None and the reason to reject it."""
    filesystem, inside = fsspec.url_to_fs(path)
    if isinstance(filesystem, LocalFileSystem) and _waits(inside):
        return None, "the image file is a pipe or a device"
    try:
        data: bytes = filesystem.cat_file(inside, start=0, end=MAX_ENCODED_BYTES + 1)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError):
        return None, "the image file is missing"
    except OSError as error:
        if error.errno not in UNREADABLE:
            raise
        return None, f"the image file cannot be read ({error.strerror})"
    if len(data) > MAX_ENCODED_BYTES:
        return None, f"the image has more than {MAX_ENCODED_BYTES:,} bytes"
    return data, ""


def open_parquet(file: Any) -> Any:
    """A ParquetFile that is read page by page: by default Arrow reads the columns of a row group at once."""
    return pq.ParquetFile(file, buffer_size=2**20, pre_buffer=False)


def image_column(schema: Any, path: str) -> str:
    """Name of the image column of a Parquet file: binary, or Hugging Face's struct of bytes and path.

    The usual names come first, then the only column of such a type. Raises InputError when there is none.
    """
    columns = [field.name for field in schema if _holds_bytes(field.type)]
    for name in _IMAGE_COLUMNS:
        if name in columns:
            return name
    if len(columns) == 1:
        return str(columns[0])
    raise InputError(
        f"{path}: no image column among {', '.join(schema.names)}. Expected binary `jpg` or `image`, or a "
        "struct `image` with `bytes`. Files with URLs alone must be downloaded first (img2dataset does it)."
    )


def encoded_bytes(column: Any) -> Any:
    """The binary array of an image column: itself, or the field `bytes` of a struct column."""
    if pa.types.is_struct(column.type):
        return pc.struct_field(column, "bytes")
    return column


def first_rows(metadata: Any) -> list[int]:
    """Row of a Parquet file at which each of its row groups begins, then the number of rows."""
    sizes = (metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    return list(accumulate(sizes, initial=0))


def is_address(name: str) -> bool:
    """Whether a file name that the data give would be read as a URL, or as a chain of them, wherever it is put."""
    return "://" in name or "::" in name


def escapes(name: str) -> bool:
    """Whether a file name leads out of the folder or archive that it belongs to."""
    if name and name[0] != "/" and not _UNSURE.search(name):
        return False
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or any(part.endswith(":") for part in path.parts[:1])


def _drafted(image: Image.Image, near: int) -> Image.Image:
    """The picture in RGB, with a short edge of about DRAFT * `near` at least where it has that, and few pixels."""
    full, side = image.size, DRAFT * near
    box = image.draft(None, (side, side)) if image.format in ("JPEG", "MPO") else None
    scale = round(full[0] / box[1][2]) if box else 1
    short, pixels = min(image.size), image.width * image.height
    most = HELD_SQUARES * side**2
    factor = max(short // side, min(math.ceil(math.sqrt(pixels / most)), short // near), 1)
    small = _reduced(image, factor) if factor > 1 else _to_rgb(image)
    small.info = {} if scale * factor == 1 else {"full": full, "scale": scale * factor}
    if small.width * small.height > most:  # a strip: a square crop sees only its middle
        width, height = (min(edge, most // min(small.size)) for edge in small.size)
        left, top = (small.width - width) // 2, (small.height - height) // 2
        small = small.crop((left, top, left + width, top + height))
        small.info = {}
    return small


def _reduced(image: Image.Image, factor: int) -> Image.Image:
    """The picture in RGB with edges `factor` times shorter; never a second picture of the full size."""
    width, height = image.size
    small = Image.new("RGB", (-(-width // factor), -(-height // factor)))
    rows = factor * max(1, BAND_PIXELS // (width * factor))
    for top in range(0, height, rows):
        band = _to_rgb(image.crop((0, top, width, min(top + rows, height))))
        small.paste(band.reduce(factor), (0, top // factor))
    return small


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = image.point(lambda grey: grey * (1 / 256))  # Pillow would cut 16 bits off at 255: all white
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours, without Pillow's warning for each such image
    return image.convert("RGB")


def _waits(path: str) -> bool:
    """Whether a path leads to what may never end or never begin: a pipe, a device."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False  # reading it tells what is wrong
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _holds_bytes(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
