"""Row groups of Parquet files in batches of bounded bytes."""

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from influencespace.data.page_headers import pages

# Rows of a file that are in memory at once, at most, and about how many bytes they unpack to: 600 captions of a megabyte were
# a file of 0.6 MB, and 2.3 GB in memory.
BATCH_ROWS = 32
BATCH_BYTES = 64 * 2**20

# A page is unpacked whole, and so is a dictionary. Writers aim at 1 MB, but look at the size after every 1,024 values only: a
# page of pictures may well be large. Of captions it is a mistake: 32 of 200 MB took 2.4 GB.
MAX_TEXT_PAGE = 64 * 2**20
MAX_PAGE = 2**30


class TooLarge(pa.ArrowInvalid):  # type: ignore[misc]
    """A row group that would fill the memory; the message says where."""


def batches(
    parquet: Any, file: Any, group: int, columns: Sequence[str], rows: int = BATCH_ROWS
) -> Iterator[Any]:
    """Record batches of some columns of a row group, of at most `rows` rows, fewer where these are long.

    `file` is what `parquet` reads from. Raises TooLarge for a page of more than MAX_PAGE bytes (MAX_TEXT_PAGE of a column
    of texts, and of any dictionary), and what Arrow raises for a damaged row group.
    """
    metadata = parquet.metadata.row_group(group)
    for index in range(metadata.num_columns):
        column = metadata.column(index)
        if any(
            column.path_in_schema == name or column.path_in_schema.startswith(f"{name}.") for name in columns
        ):
            text = parquet.schema.column(index).logical_type.type == "STRING"
            limit = MAX_TEXT_PAGE if text else MAX_PAGE
            rows = min(rows, _rows_of(column, file, metadata.num_rows, limit))
    yield from parquet.iter_batches(rows, row_groups=[group], columns=list(columns))


def _rows_of(column: Any, file: Any, rows: int, limit: int) -> int:
    """How many rows of a column may be unpacked at once; every value may be the longest of its dictionary."""
    values, left = max(1, column.num_values) / max(1, rows), column.total_uncompressed_size
    longest = left / max(1, rows)
    for page in pages(file, column):
        most = MAX_TEXT_PAGE if page.dictionary else limit
        if page.unpacked > most:
            what = "the dictionary" if page.dictionary else "a page"
            raise TooLarge(
                f"{what} of {column.path_in_schema!r} has {page.unpacked:,} bytes, more than {most:,}; "
                "write the file again with shorter values or smaller pages"
            )
        longest = max(longest, page.unpacked * values / (1 if page.dictionary else page.values))
        left -= page.unpacked
        if left <= limit:  # what is left fits, whatever its pages are
            break
    return max(1, int(BATCH_BYTES / max(1, longest)))
