"""Parquet files with image bytes and captions, as img2dataset and Hugging Face datasets write them."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from influencespace.data.captions import RawSample, original_captions
from influencespace.data.images import (
    MAX_ENCODED_BYTES,
    encoded_bytes,
    first_rows,
    image_column,
    open_parquet,
)
from influencespace.data.row_groups import TooLarge, batches
from influencespace.data.schema import ImageRef, ReadOptions, Rejection, Shard
from influencespace.errors import InputError

# A bigger file becomes several shards: minutes of work, so that little is repeated after an interruption.
SHARD_BYTES = 256 * 2**20

# In order of preference, as for tars: a list of captions, the text file of img2dataset, its metadata.
CAPTION_COLUMNS = ("captions", "txt", "caption", "text")


def split_row_groups(path: str) -> list[tuple[int, ...] | None]:
    """Runs of row groups of about SHARD_BYTES; [None] for a small or a damaged one (the reader reports it).

    Raises OSError when the file cannot be opened.
    """
    with fsspec.open(path, "rb") as file:
        try:
            metadata = pq.read_metadata(file)
        except (pa.ArrowException, OSError) as error:
            raise_unless_damage(error)
            return [None]
        except UnicodeDecodeError:
            raise InputError(f"{path}: the name of a column is not UTF-8; rename it") from None
    runs: list[list[int]] = [[]]
    filled = 0
    for index in range(metadata.num_row_groups):
        size = metadata.row_group(index).total_byte_size
        if runs[-1] and filled + size > SHARD_BYTES:
            runs.append([])
            filled = 0
        runs[-1].append(index)
        filled += size
    return [None] if len(runs) == 1 else [tuple(run) for run in runs]


def read_parquet(shard: Shard, options: ReadOptions) -> Iterator[RawSample | Rejection]:
    """The samples of a shard, a few rows in memory; of a damaged row group those before the damage.

    Raises InputError when there is no image or caption column, OSError when the file cannot be read at all.
    """
    with fsspec.open(shard.path, "rb") as file:
        try:
            parquet = open_parquet(file)
        except (pa.ArrowException, OSError) as error:
            raise_unless_damage(error)
            name = PurePosixPath(shard.path).name
            reason = f"not a readable Parquet file: {error}"
            yield Rejection(shard=shard.path, uid=name, reason=reason)
            return
        columns = _find_columns(parquet, shard.path, options)
        starts = first_rows(parquet.metadata)
        for group in shard.row_groups or range(len(starts) - 1):
            row = starts[group]
            try:
                for batch in batches(parquet, file, group, columns):
                    yield from _raw_samples(batch, columns[0], shard.path, row, options)
                    row += len(batch)
            except (pa.ArrowException, OSError) as error:
                raise_unless_damage(error)
                what = "are set aside" if isinstance(error, TooLarge) else "of a damaged row group are lost"
                reason = f"rows {row} to {starts[group + 1] - 1} {what}: {error}"
                yield Rejection(shard=shard.path, uid=f"row {row}", reason=reason)


def raise_unless_damage(error: Exception) -> None:
    """Raise `error` if it is the system's: for damage Arrow raises OSError too, but without a number."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error


def as_bytes(column: Any) -> Any:
    """A column of text, or lists of text, as bytes: one text that is not UTF-8 must not fail its batch."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return column.cast(_bytes_type(column.type))


def values_of(column: Any) -> list[object]:
    """The values of a column, texts as bytes; one that Python cannot hold, like a date in the year 500,000, is an object without
    a meaning, whose type says so."""
    column = as_bytes(column)
    try:
        values: list[object] = column.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException):
        return [_value(scalar) for scalar in column]
    return values


def _value(scalar: Any) -> object:
    try:
        return scalar.as_py()
    except (ValueError, OverflowError, pa.ArrowException):
        return type(f"an unreadable {scalar.type}", (), {})()


def _bytes_type(kind: Any) -> Any:
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pa.large_binary() if pa.types.is_large_string(kind) else pa.binary()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        of = pa.list_ if pa.types.is_list(kind) else pa.large_list
        return of(_bytes_type(kind.value_type))
    return kind


def _caption_columns(options: ReadOptions) -> tuple[str, ...]:
    return (options.caption_column,) if options.caption_column else CAPTION_COLUMNS


def check_names(names: Sequence[str], wanted: Iterable[str], path: str) -> None:
    """Raises InputError where two columns have one of the names that are wanted."""
    for name in wanted:
        if names.count(name) > 1:
            raise InputError(f"{path}: {names.count(name)} columns are called {name!r}; rename all but one")


def _find_columns(parquet: Any, path: str, options: ReadOptions) -> list[str]:
    """The columns that are read of those that the file has, the image first."""
    schema, wanted = parquet.schema_arrow, _caption_columns(options)
    present = ", ".join(schema.names)
    if not any(name in schema.names for name in wanted):
        raise InputError(
            f"{path}: no caption column. It has {present}; expected {' or '.join(wanted)}. "
            "Give the name of yours as caption_column."
        )
    if options.uid_column not in schema.names and options.uid_column != ReadOptions.uid_column:
        raise InputError(f"{path}: no column {options.uid_column!r} (uid_column). It has {present}.")
    names = (image_column(schema, path), *wanted, options.uid_column, options.group_column, "key")
    found = [name for name in dict.fromkeys(names) if name in schema.names]
    check_names(schema.names, found, path)
    return found


def _raw_samples(
    batch: Any, image: str, path: str, first_row: int, options: ReadOptions
) -> Iterator[RawSample]:
    """The rows of a batch that begins at `first_row` of the file."""
    texts = {name: values_of(batch[name]) for name in batch.schema.names if name != image}
    for i, encoded in enumerate(encoded_bytes(batch[image])):
        values = {name: column[i] for name, column in texts.items()}
        data, missing = _image(encoded)
        yield RawSample(
            shard=path,
            key=_key(values.get("key"), first_row + i),
            image=data,
            captions=original_captions(*map(values.get, _caption_columns(options))),
            uid=values.get(options.uid_column),
            group=values.get(options.group_column),
            ref=ImageRef(path=path, row=first_row + i),
            missing=missing,
        )


def _image(scalar: Any) -> tuple[bytes | None, str]:
    """The bytes of an image, or None and the reason."""
    if not scalar.is_valid:
        return None, "the image is missing (its download failed, or only its path was stored)"
    size = scalar.as_buffer().size
    if size > MAX_ENCODED_BYTES:
        return None, f"the image has {size:,} bytes, more than {MAX_ENCODED_BYTES:,}"
    return scalar.as_py(), ""


def _key(value: object, row: int) -> str:
    if value is None:
        return f"row {row}"
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
