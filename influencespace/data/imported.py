"""Embeddings that the user already has: the layouts of clip-retrieval and DataComp, and Parquet columns.

Arrays are read a block of rows at a time, straight from the .npy stream: a part of any size takes little
memory, on any file system, and nothing is ever unpickled.
"""

import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO, Any, Literal

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic.dataclasses import dataclass as validated_dataclass

from influencespace.data.captions import label, printable
from influencespace.data.images import open_parquet
from influencespace.data.readers import filesystem_of, list_files
from influencespace.data.readers.parquet import as_bytes, raise_unless_damage
from influencespace.data.schema import ReadOptions, Rejection
from influencespace.data.uids import digest
from influencespace.errors import InputError

Floats = npt.NDArray[np.float32]

# No encoder is this wide: a header that says so is damaged, or wants to fill the memory.
MAX_DIMENSION = 2**16


@dataclass(frozen=True, kw_only=True)
class EmbeddingBatch:
    """Some pairs with their embeddings, of unit length."""

    uids: list[str]
    images: Floats  # (n, D)
    texts: Floats  # (n, D)
    captions: list[str] | None = None
    """None when the data has none; one that is missing is empty."""
    groups: list[str | None] | None = None


@dataclass(frozen=True, kw_only=True)
class ImportedPart:
    """A file, or files side by side, of embeddings: the unit of work."""

    metadata: str
    """Parquet file with a row for each pair; in the layout `parquet` it has the embeddings too."""
    layout: Literal["clip-retrieval", "datacomp", "parquet"]
    images: str = ""
    """The .npy or .npz with the image embeddings."""
    texts: str = ""
    """The .npy or .npz with the text embeddings."""


@validated_dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """How imported embeddings are read."""

    batch_rows: int = 4096
    uid_column: str | None = None
    """None means uid, else key, else image_path (all that clip-retrieval keeps of an image by default)."""
    group_column: str = "group"
    tower: str | None = None
    """DataComp: which `<tower>_img` and `<tower>_txt` to take; None means l14 where there is one."""


def import_options(read: ReadOptions, joined: bool) -> ImportOptions:
    """What `embed.read` says of imported embeddings: with shards it is about those, and the usual columns are taken."""
    if joined:
        return ImportOptions()
    uid = read.uid_column if read.uid_column != ReadOptions.uid_column else None
    return ImportOptions(uid_column=uid, group_column=read.group_column)


class _Damaged(ValueError):
    """A file ends early or makes no sense; the message is the reason."""


def read_imported_embeddings(
    path: str, options: ImportOptions | None = None
) -> Iterator[EmbeddingBatch | Rejection]:
    """All pairs of a folder, file, glob or URL of embeddings, in batches, each uid once.

    A pair with a missing, zero or non-finite embedding, without a uid, or with the uid of an earlier one is a
    Rejection. The uids seen are remembered, in about 100 bytes each. Raises InputError as `list_parts` and
    `read_part` do, and when the parts differ in dimension.
    """
    seen: set[bytes] = set()
    dimension = 0
    for part in list_parts(path):
        for batch in read_part(part, options):
            if isinstance(batch, Rejection):
                yield batch
                continue
            dimension = dimension or batch.images.shape[1]
            if batch.images.shape[1] != dimension:
                raise InputError(
                    f"{part.metadata} has embeddings of {batch.images.shape[1]} numbers, the parts before it "
                    f"of {dimension}. Import the output of one encoder at a time."
                )
            yield from _without_repeats(batch, seen, part)


def list_parts(path: str) -> list[ImportedPart]:
    """The parts of a folder of clip-retrieval, of .npz beside .parquet (DataComp), or of .parquet alone.

    Raises InputError when nothing is found, or a part lacks one of its files.
    """
    filesystem, inside = filesystem_of(f"{path.rstrip('/')}/img_emb")
    if filesystem.isdir(inside):
        return [_clip_retrieval_part(file) for file in list_files(f"{path.rstrip('/')}/img_emb", (".npy",))]
    return [_part(file) for file in list_files(path, (".npz",), (".parquet",))]


def read_part(
    part: ImportedPart, options: ImportOptions | None = None
) -> Iterator[EmbeddingBatch | Rejection]:
    """The pairs of one part in batches; repeated uids are not looked for.

    The rest of a damaged part is one Rejection. Raises InputError when columns or arrays are missing, of the
    wrong type, or differ in length or dimension: then rows cannot be trusted to belong together.
    """
    options = options or ImportOptions()
    row = 0
    try:
        for table, images, texts in _blocks(part, options):
            yield from _judge(part, options, row, table, images, texts)
            row += len(images)
    except (_Damaged, EOFError, OSError, zipfile.BadZipFile, zlib.error, pa.ArrowException) as error:
        raise_unless_damage(error)
        reason = printable(f"damaged, the rows from {row} on are lost: {error}")
        yield Rejection(shard=part.metadata, uid=f"row {row}", reason=reason)


def missing_uids(wanted: Iterable[str], found: Iterable[str]) -> list[str]:
    """The wanted uids that were not found, sorted."""
    return sorted(set(wanted).difference(found))


def _without_repeats(
    batch: EmbeddingBatch, seen: set[bytes], part: ImportedPart
) -> Iterator[EmbeddingBatch | Rejection]:
    new = []
    for i, uid in enumerate(batch.uids):
        if (key := digest(uid.encode())) in seen:
            yield Rejection(shard=part.metadata, uid=uid, reason="an earlier pair has the same uid")
        else:
            seen.add(key)
            new.append(i)
    if len(new) == len(batch.uids):
        yield batch
    elif new:
        yield _take(batch, new)


def _take(batch: EmbeddingBatch, rows: list[int]) -> EmbeddingBatch:
    return EmbeddingBatch(
        uids=[batch.uids[i] for i in rows],
        images=batch.images[rows],
        texts=batch.texts[rows],
        captions=[batch.captions[i] for i in rows] if batch.captions is not None else None,
        groups=[batch.groups[i] for i in rows] if batch.groups is not None else None,
    )


# Parts


def _clip_retrieval_part(images: str) -> ImportedPart:
    root, _, name = images.rsplit("/", 2)
    number = name.removeprefix("img_emb_").removesuffix(".npy")
    return ImportedPart(
        layout="clip-retrieval",
        images=images,
        texts=_beside(images, f"{root}/text_emb/text_emb_{number}.npy"),
        metadata=_beside(images, f"{root}/metadata/metadata_{number}.parquet"),
    )


def _part(path: str) -> ImportedPart:
    if path.endswith(".parquet"):
        return ImportedPart(layout="parquet", metadata=path)
    metadata = _beside(path, path.removesuffix(".npz") + ".parquet")
    return ImportedPart(layout="datacomp", metadata=metadata, images=path, texts=path)


def _beside(path: str, other: str) -> str:
    filesystem, inside = filesystem_of(other)
    if not filesystem.isfile(inside):
        raise InputError(
            f"{path} has no {other} with it. Image and text embeddings and metadata are all needed."
        )
    return other


# Blocks of rows


def _blocks(part: ImportedPart, options: ImportOptions) -> Iterator[tuple[Any, Floats, Floats]]:
    """Rows of metadata with their image and text embeddings, (n, D) each; a row that has none is NaN."""
    with ExitStack() as stack:
        parquet = stack.enter_context(open_parquet(stack.enter_context(fsspec.open(part.metadata, "rb"))))
        if part.layout == "parquet":
            yield from _column_blocks(parquet, part, options)
        else:
            images, texts = _open_arrays(part, options, stack)
            yield from _array_blocks(parquet, images, texts, part, options)


def _column_blocks(
    parquet: Any, part: ImportedPart, options: ImportOptions
) -> Iterator[tuple[Any, Floats, Floats]]:
    names = ("image_embedding", "text_embedding")
    for name in names:
        if name not in parquet.schema_arrow.names:
            present = ", ".join(parquet.schema_arrow.names)
            raise InputError(f"{part.metadata}: no column {name!r}. It has {present}.")
    dimension = 0
    for batch in parquet.iter_batches(options.batch_rows):
        images, texts = (_lists(batch.column(name), name, part) for name in names)
        dimension = dimension or _usual_length(images)
        if _usual_length(texts) not in (0, dimension):
            raise InputError(_unlike(part, dimension, _usual_length(texts)))
        yield batch, _matrix(images, dimension), _matrix(texts, dimension)


def _array_blocks(
    parquet: Any, images: "_Rows", texts: "_Rows", part: ImportedPart, options: ImportOptions
) -> Iterator[tuple[Any, Floats, Floats]]:
    counts = {images.count, texts.count, parquet.metadata.num_rows}
    if len(counts) > 1:
        raise InputError(
            f"{part.metadata} has {parquet.metadata.num_rows} rows, {part.images} {images.count} image and "
            f"{part.texts} {texts.count} text embeddings. Are they of different runs?"
        )
    if images.dimension != texts.dimension:
        raise InputError(_unlike(part, images.dimension, texts.dimension))
    for batch in parquet.iter_batches(options.batch_rows):
        left, right = images.read(len(batch)), texts.read(len(batch))
        whole = min(len(left), len(right))
        yield batch.slice(0, whole), left[:whole], right[:whole]
        if whole < len(batch):
            raise _Damaged("the embeddings end early")


def _unlike(part: ImportedPart, images: int, texts: int) -> str:
    return (
        f"{part.metadata}: image embeddings of {images} numbers, text embeddings of {texts}. "
        "Both must come from one dual encoder."
    )


class _Rows:
    """An .npy stream of a matrix of floats, read a block of rows at a time."""

    def __init__(self, stream: IO[bytes], name: str) -> None:
        self.stream = stream
        try:
            version = np.lib.format.read_magic(stream)
            read_header = np.lib.format.read_array_header_1_0
            if version != (1, 0):
                read_header = np.lib.format.read_array_header_2_0
            shape, by_column, self.dtype = read_header(stream)
        except ValueError as error:
            raise _Damaged(f"{name} is no .npy file: {error}") from None
        if self.dtype.kind != "f":
            raise InputError(f"{name} holds {self.dtype}, not floats. Pickled objects are never read.")
        if len(shape) != 2 or not 0 < shape[1] <= MAX_DIMENSION or by_column:
            order = ", column by column" if by_column else ""
            raise InputError(f"{name} has the shape {shape}{order}; expected (rows, dimension), row by row.")
        self.count, self.dimension = shape

    def read(self, rows: int) -> Floats:  # (n, D), n <= rows
        """The next rows, fewer at the end."""
        width = self.dtype.itemsize * self.dimension
        data = self.stream.read(rows * width)
        whole = len(data) // width
        block = np.frombuffer(data, self.dtype, count=whole * self.dimension)
        return block.reshape(whole, self.dimension).astype(np.float32)


def _open_arrays(part: ImportedPart, options: ImportOptions, stack: ExitStack) -> tuple[_Rows, _Rows]:
    file = stack.enter_context(fsspec.open(part.images, "rb"))
    if part.layout == "clip-retrieval":
        texts = stack.enter_context(fsspec.open(part.texts, "rb"))
        return _Rows(file, part.images), _Rows(texts, part.texts)
    archive = stack.enter_context(zipfile.ZipFile(file))
    tower = _tower(archive.namelist(), part, options)
    streams = (stack.enter_context(archive.open(f"{tower}_{kind}.npy")) for kind in ("img", "txt"))
    images, texts = (_Rows(stream, part.images) for stream in streams)
    return images, texts


def _tower(names: list[str], part: ImportedPart, options: ImportOptions) -> str:
    images = (name.removesuffix("_img.npy") for name in names if name.endswith("_img.npy"))
    towers = sorted(tower for tower in images if f"{tower}_txt.npy" in names)
    wanted = options.tower or ("l14" if "l14" in towers else next(iter(towers), "l14"))
    if wanted not in towers:
        raise InputError(f"{part.images}: no {wanted}_img with {wanted}_txt. It has {', '.join(names)}.")
    return wanted


def _lists(column: Any, name: str, part: ImportedPart) -> Any:
    """A column of lists of floats, without the wrapping of tensor columns."""
    if isinstance(column.type, pa.BaseExtensionType):
        column = column.storage
    kind = column.type
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not any(of(kind) for of in lists) or not pa.types.is_floating(kind.value_type):
        raise InputError(f"{part.metadata}: {name} is {column.type}; expected a list of floats in each row.")
    return column


def _lengths(column: Any) -> npt.NDArray[np.int64]:
    lengths: npt.NDArray[np.int64] = pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)
    return lengths


def _usual_length(column: Any) -> int:
    lengths = _lengths(column)
    return int(np.bincount(lengths).argmax()) if lengths.any() else 0


def _matrix(column: Any, dimension: int) -> Floats:  # (n, D)
    """The rows of a list column; NaN where a row has not `dimension` numbers."""
    rows = np.full((len(column), dimension), np.nan, dtype=np.float32)
    good = _lengths(column) == dimension
    if dimension and good.any():
        numbers = pc.list_flatten(column.filter(pa.array(good))).cast(pa.float32())
        rows[good] = numbers.to_numpy(zero_copy_only=False).reshape(-1, dimension)
    return rows


# Judgement of rows


def _judge(
    part: ImportedPart, options: ImportOptions, first_row: int, table: Any, images: Floats, texts: Floats
) -> Iterator[EmbeddingBatch | Rejection]:
    """The usable rows of a block, if any, then a Rejection for each other."""
    uids = _column(table, _uid_column(table.schema.names, part, options)) or []
    image_norms, text_norms = _norms(images), _norms(texts)
    names: dict[int, str] = {}
    rejections = []
    for i, value in enumerate(uids):
        try:
            uid = label(value)
            problem = "the pair has no uid" if uid is None else ""
        except ValueError as error:
            uid, problem = None, f"the uid {error}"
        for kind, norm in (("image", image_norms[i]), ("text", text_norms[i])):
            if not problem and (norm == 0 or not np.isfinite(norm)):
                problem = f"the {kind} embedding is missing, incomplete, zero or not finite"
        if problem or uid is None:
            uid = uid or f"row {first_row + i}"
            rejections.append(Rejection(shard=part.metadata, uid=uid, reason=problem))
        else:
            names[i] = uid
    if names:
        rows = list(names)
        captions = _column(table, next((n for n in ("caption", "text") if n in table.schema.names), ""))
        groups = _column(table, options.group_column)
        yield EmbeddingBatch(
            uids=list(names.values()),
            images=(images[rows] / image_norms[rows, None]).astype(np.float32),
            texts=(texts[rows] / text_norms[rows, None]).astype(np.float32),
            captions=[_text(captions[i]) or "" for i in rows] if captions is not None else None,
            groups=[_text(groups[i]) for i in rows] if groups is not None else None,
        )
    yield from rejections


def _uid_column(names: list[str], part: ImportedPart, options: ImportOptions) -> str:
    wanted = [options.uid_column] if options.uid_column else ["uid", "key", "image_path"]
    for name in wanted:
        if name in names:
            return name
    raise InputError(
        f"{part.metadata}: no column {' or '.join(wanted)}. It has {', '.join(names)}. "
        "Name the one that identifies a pair as embed.read.uid_column, or uid where the pairs are those of shards."
    )


def _column(table: Any, name: str) -> list[object] | None:
    if name not in table.schema.names:
        return None
    values: list[object] = as_bytes(table.column(name)).to_pylist()
    return values


def _text(value: object) -> str | None:
    if value is None:
        return None
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else printable(str(value))


def _norms(rows: Floats) -> npt.NDArray[np.float64]:  # (n,)
    norms: npt.NDArray[np.float64] = np.linalg.norm(rows.astype(np.float64), axis=1)
    return norms
