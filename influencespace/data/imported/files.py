"""The files of imported embeddings: the layouts of clip-retrieval and DataComp, and Parquet columns.

Arrays are read a block of rows at a time, straight from the .npy stream: a file of any size takes little
memory, on any file system, and nothing is ever unpickled.
"""

import io
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO, Any, Literal

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic.dataclasses import dataclass as validated_dataclass

from influencespace.data.images import open_parquet
from influencespace.data.readers import filesystem_of, list_files
from influencespace.data.readers.parquet import check_names
from influencespace.errors import STRICT, InputError

Floats = npt.NDArray[np.float32]
Block = tuple[Any, Floats, Floats]
"""Rows of metadata with their image and text embeddings, (n, D) each; a row that has none is NaN."""

# No encoder is this wide: a header with more is damaged, or an attack on memory.
MAX_DIMENSION = 2**16

# What identifies a pair, by default.
UID_COLUMNS = ("uid", "key", "image_path")

# numpy writes 128 bytes.
MAX_HEADER = 10_000

# Of embeddings of one kind that are in memory at once, about; a row of MAX_DIMENSION takes 256 kB.
BLOCK_BYTES = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class ImportedChunk:
    """A file, or files side by side, of embeddings: the unit of work."""

    metadata: str
    """Parquet file with a row for each pair; in the layout `parquet` it has the embeddings too."""
    layout: Literal["clip-retrieval", "datacomp", "parquet"]
    images: str = ""
    """The .npy or .npz with the image embeddings."""
    texts: str = ""
    """The .npy or .npz with the text embeddings."""


@validated_dataclass(frozen=True, kw_only=True, config=STRICT)
class ImportOptions:
    """How imported embeddings are read."""

    batch_rows: int = 4096
    uid_column: str | None = None
    """None means uid, else key, else image_path (all that clip-retrieval keeps of an image by default)."""
    group_column: str = "group"
    tower: str | None = None
    """DataComp: which `<tower>_img` and `<tower>_txt` to take; None means l14 where there is one."""


class Damaged(ValueError):
    """A file ends early or makes no sense; the message is the reason."""


def list_chunks(path: str) -> list[ImportedChunk]:
    """The chunks of a folder of clip-retrieval, of .npz beside .parquet (DataComp), or of .parquet alone.

    Raises InputError when nothing is found, or a chunk lacks one of its files.
    """
    filesystem, inside = filesystem_of(f"{path.rstrip('/')}/img_emb")
    if filesystem.isdir(inside):
        return [_clip_retrieval_chunk(file) for file in list_files(f"{path.rstrip('/')}/img_emb", (".npy",))]
    return [_chunk(file) for file in list_files(path, (".npz",), (".parquet",))]


def _clip_retrieval_chunk(images: str) -> ImportedChunk:
    root, _, name = images.rsplit("/", 2)
    number = name.removeprefix("img_emb_").removesuffix(".npy")
    return ImportedChunk(
        layout="clip-retrieval",
        images=images,
        texts=_beside(images, f"{root}/text_emb/text_emb_{number}.npy"),
        metadata=_beside(images, f"{root}/metadata/metadata_{number}.parquet"),
    )


def _chunk(path: str) -> ImportedChunk:
    if path.endswith(".parquet"):
        return ImportedChunk(layout="parquet", metadata=path)
    metadata = _beside(path, path.removesuffix(".npz") + ".parquet")
    return ImportedChunk(layout="datacomp", metadata=metadata, images=path, texts=path)


def _beside(path: str, other: str) -> str:
    filesystem, inside = filesystem_of(other)
    if not filesystem.isfile(inside):
        raise InputError(
            f"{path} has no {other} with it. Image and text embeddings and metadata are all needed."
        )
    return other


def read_blocks(chunk: ImportedChunk, options: ImportOptions) -> Iterator[Block]:
    """All rows of a chunk in order, `batch_rows` at a time; raises Damaged, or InputError for arrays that do not fit."""
    with ExitStack() as stack:
        parquet = stack.enter_context(open_parquet(stack.enter_context(fsspec.open(chunk.metadata, "rb"))))
        if chunk.layout == "parquet":
            yield from _column_blocks(parquet, chunk, options)
        else:
            images, texts = _open_arrays(chunk, options, stack)
            yield from _array_blocks(parquet, images, texts, chunk, options)


def _column_blocks(parquet: Any, chunk: ImportedChunk, options: ImportOptions) -> Iterator[Block]:
    for name in ("image_embedding", "text_embedding"):
        names = parquet.schema_arrow.names
        if name not in names:
            present = ", ".join(names)
            raise InputError(f"{chunk.metadata}: no column {name!r}. It has {present}.")
    dimension = 0
    groups = map(parquet.metadata.row_group, range(parquet.num_row_groups))
    size = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0)
    for batch in _batches(parquet, size, chunk, options):
        images = _matrix(batch, "image_embedding", chunk, dimension)
        dimension = images.shape[1]
        texts = _matrix(batch, "text_embedding", chunk, 0)
        if texts.shape[1] not in (0, dimension):
            raise InputError(_unlike(chunk, dimension, texts.shape[1]))
        yield batch, images, texts if texts.shape[1] else _matrix(batch, "text_embedding", chunk, dimension)


def _array_blocks(
    parquet: Any, images: "_Rows", texts: "_Rows", chunk: ImportedChunk, options: ImportOptions
) -> Iterator[Block]:
    counts = {images.count, texts.count, parquet.metadata.num_rows}
    if len(counts) > 1:
        raise InputError(
            f"{chunk.metadata} has {parquet.metadata.num_rows} rows, {chunk.images} {images.count} image and "
            f"{chunk.texts} {texts.count} text embeddings. Are they of different runs?"
        )
    if images.dimension != texts.dimension:
        raise InputError(_unlike(chunk, images.dimension, texts.dimension))
    for batch in _batches(parquet, images.width, chunk, options):
        left, right = images.read(len(batch)), texts.read(len(batch))
        whole = min(len(left), len(right))
        yield batch.slice(0, whole), left[:whole], right[:whole]
        if whole < len(batch):
            raise Damaged("the embeddings end early")


def _batches(parquet: Any, row_bytes: int, chunk: ImportedChunk, options: ImportOptions) -> Iterator[Any]:
    """The rows of the metadata, of the columns that are used: `batch_rows` at a time, fewer where these are long."""
    names = parquet.schema_arrow.names
    used = (
        "image_embedding",
        "text_embedding",
        "caption",
        "text",
        options.uid_column,
        options.group_column,
        *UID_COLUMNS,
    )
    columns = [name for name in dict.fromkeys(used) if name is not None and name in names]
    check_names(names, columns, chunk.metadata)
    rows = max(1, min(options.batch_rows, BLOCK_BYTES // max(1, row_bytes)))
    return iter(parquet.iter_batches(rows, columns=columns))


def _unlike(chunk: ImportedChunk, images: int, texts: int) -> str:
    return (
        f"{chunk.metadata}: image embeddings of {images} numbers, text embeddings of {texts}. "
        "Both must come from one dual encoder."
    )


def _header(stream: IO[bytes]) -> Any:
    """Shape, order and type of an .npy file; its header is read only where it is of a likely size: it may say 4 GB."""
    version = np.lib.format.read_magic(stream)
    width = 2 if version == (1, 0) else 4
    size = int.from_bytes(length := stream.read(width), "little")
    if size > MAX_HEADER:
        raise ValueError(f"a header of {size:,} bytes")
    header = io.BytesIO(length + stream.read(size))
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(header)
    return np.lib.format.read_array_header_2_0(header)


class _Rows:
    """An .npy stream of a matrix of floats, read a block of rows at a time."""

    def __init__(self, stream: IO[bytes], name: str) -> None:
        self.stream = stream
        try:
            shape, by_column, self.dtype = _header(stream)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError) as error:
            raise Damaged(f"{name} is no .npy file: {error or type(error).__name__}") from None
        if self.dtype.kind != "f":
            raise InputError(f"{name} holds {self.dtype}, not floats. Pickled objects are never read.")
        if len(shape) != 2 or not 0 < shape[1] <= MAX_DIMENSION or by_column:
            order = ", column by column" if by_column else ""
            raise InputError(f"{name} has the shape {shape}{order}; expected (rows, dimension), row by row.")
        self.count, self.dimension = shape
        self.width = self.dtype.itemsize * self.dimension

    def read(self, rows: int) -> Floats:  # (n, D), n <= rows
        """The next rows, fewer at the end."""
        data = self.stream.read(rows * self.width)
        whole = len(data) // self.width
        block = np.frombuffer(data, self.dtype, count=whole * self.dimension)
        return block.reshape(whole, self.dimension).astype(np.float32)


def _open_arrays(chunk: ImportedChunk, options: ImportOptions, stack: ExitStack) -> tuple[_Rows, _Rows]:
    file = stack.enter_context(fsspec.open(chunk.images, "rb"))
    if chunk.layout == "clip-retrieval":
        texts = stack.enter_context(fsspec.open(chunk.texts, "rb"))
        return _Rows(file, chunk.images), _Rows(texts, chunk.texts)
    archive = stack.enter_context(zipfile.ZipFile(file))
    tower = _tower(archive.namelist(), chunk, options)
    streams = (stack.enter_context(archive.open(f"{tower}_{kind}.npy")) for kind in ("img", "txt"))
    images, texts = (_Rows(stream, chunk.images) for stream in streams)
    return images, texts


def _tower(names: list[str], chunk: ImportedChunk, options: ImportOptions) -> str:
    images = (name.removesuffix("_img.npy") for name in names if name.endswith("_img.npy"))
    towers = sorted(tower for tower in images if f"{tower}_txt.npy" in names)
    wanted = options.tower or ("l14" if "l14" in towers else next(iter(towers), "l14"))
    if wanted not in towers:
        raise InputError(f"{chunk.images}: no {wanted}_img with {wanted}_txt. It has {', '.join(names)}.")
    return wanted


def _matrix(batch: Any, name: str, chunk: ImportedChunk, dimension: int) -> Floats:  # (n, D)
    """The rows of a column of lists; NaN where a row has not `dimension` (0: the usual number of) floats."""
    column = batch[name]
    if isinstance(column.type, pa.BaseExtensionType):  # tensors
        column = column.storage
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not any(of(column.type) for of in lists) or not pa.types.is_floating(column.type.value_type):
        kind = batch[name].type
        raise InputError(f"{chunk.metadata}: {name} is {kind}; expected a list of floats in each row.")
    rows = [() if row is None else row for row in column.to_numpy(zero_copy_only=False)]
    lengths = np.array([len(row) for row in rows], np.int64)
    if lengths.max(initial=0) > MAX_DIMENSION:
        raise InputError(
            f"{chunk.metadata}: {name} has {lengths.max():,} numbers in a row, more than {MAX_DIMENSION:,}"
        )
    dimension = dimension or int(np.bincount(lengths, minlength=1).argmax())
    matrix = np.full((len(rows), dimension), np.nan, np.float32)
    if dimension and (lengths == dimension).any():
        matrix[lengths == dimension] = [row for row in rows if len(row) == dimension]
    return matrix
