"""Row groups of Parquet files in batches of bounded bytes."""

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

# Rows of a file that are in memory at once, at most, and about how many bytes they unpack to: 600 captions of a megabyte were
# a file of 0.6 MB, and 2.3 GB in memory.
BATCH_ROWS = 32
BATCH_BYTES = 64 * 2**20

# A dictionary is unpacked whole. Writers leave it at 1 MB, by default.
MAX_DICTIONARY = 64 * 2**20


def batches(
    parquet: Any, file: Any, group: int, columns: Sequence[str], rows: int = BATCH_ROWS
) -> Iterator[Any]:
    """Record batches of some columns of a row group, of at most `rows` rows, fewer where these are long.

    `file` is what `parquet` reads from. Raises pa.ArrowInvalid for a dictionary of more than MAX_DICTIONARY bytes, and what Arrow
    raises for a damaged row group.
    """
    metadata = parquet.metadata.row_group(group)
    for index in range(metadata.num_columns):
        column = metadata.column(index)
        if any(
            column.path_in_schema == name or column.path_in_schema.startswith(f"{name}.") for name in columns
        ):
            rows = min(rows, _rows_of(column, file, metadata.num_rows))
    yield from parquet.iter_batches(rows, row_groups=[group], columns=list(columns))


def _rows_of(column: Any, file: Any, rows: int) -> int:
    """How many rows of a column may be unpacked at once; every value may be the longest of its dictionary."""
    dictionary = _dictionary_bytes(column, file)
    if dictionary > MAX_DICTIONARY:
        name, limit = column.path_in_schema, f"{MAX_DICTIONARY:,}"
        raise pa.ArrowInvalid(f"the dictionary of {name!r} has {dictionary:,} bytes, more than {limit}")
    values = max(1, column.num_values) / max(1, rows)
    longest = max(column.total_uncompressed_size / max(1, rows), dictionary * values)
    return max(1, int(BATCH_BYTES / max(1, longest)))


def _dictionary_bytes(column: Any, file: Any) -> int:
    """Size of a column's dictionary, unpacked, as the header of its page has it.

    That is a struct of Thrift's compact protocol; it begins with 32-bit numbers, the page's type and its sizes.
    """
    offset = column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset
    file.seek(offset or column.data_page_offset)
    header, place, numbers = file.read(32), 0, []
    for _ in range(2):
        if place >= len(header) or header[place] != 0x15:
            return 0
        number, shift, more = 0, 0, 0x80
        while more:
            place += 1
            if place >= len(header):
                return 0
            number |= (header[place] & 0x7F) << shift
            shift, more = shift + 7, header[place] & 0x80
        numbers.append(number >> 1)
        place += 1
    return numbers[1] if numbers[0] == 2 else 0
