"""Headers of the pages of a Parquet column: how much each page unpacks to, before anything is unpacked.

A header is a struct of Thrift's compact protocol, which Arrow does not show.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

DICTIONARY = 2  # the type of a page
HEADER_BYTES = (2**8, 2**14, 2**24)
"""How much is read for a header; more where statistics make it longer."""
_BOOLEANS, _NUMBERS, _DOUBLE, _BINARY, _LISTS, _STRUCT = (1, 2), (4, 5, 6), 7, 8, (9, 10), 12


@dataclass(frozen=True)
class Page:
    """What the header of a page says."""

    dictionary: bool
    unpacked: int
    """Bytes."""
    values: int


def pages(file: Any, column: Any) -> Iterator[Page]:
    """The pages of a column chunk in their order; ends early where the next bytes are no header (the chunk is damaged or
    encrypted)."""
    place = column.data_page_offset
    if column.has_dictionary_page and column.dictionary_page_offset:
        place = min(place, column.dictionary_page_offset)
    end = place + column.total_compressed_size
    while place < end and (found := _header(file, place)):
        fields, size = found
        kind, unpacked, packed = (_count(fields, number) for number in (1, 2, 3))
        if min(kind, unpacked, packed) < 0:
            return
        counts = [_count(fields[number], 1) for number in (5, 7, 8) if isinstance(fields.get(number), dict)]
        yield Page(kind == DICTIONARY, unpacked, max([1, *counts]))
        place += size + packed


def _count(fields: dict[int, Any], number: int) -> int:
    """A field that is a count; -1 where it is none."""
    value = fields.get(number)
    return value if isinstance(value, int) else -1


def _header(file: Any, place: int) -> tuple[dict[int, Any], int] | None:
    """Fields of a header by their numbers, and its bytes; None where there is none."""
    for size in HEADER_BYTES:
        file.seek(place)
        reader = _Compact(file.read(size))
        try:
            fields = reader.struct()
        except (IndexError, RecursionError):
            continue
        except ValueError:
            return None
        if reader.place <= len(reader.data):
            return fields, reader.place
    return None


class _Compact:
    """Reads a struct of the compact protocol; raises IndexError where it is cut, ValueError where it is none."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def struct(self) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        number = 0
        while header := self._byte():
            number = number + (header >> 4) if header >> 4 else self._signed()
            fields[number] = self._value(header & 0xF)
        return fields

    def _byte(self) -> int:
        self.place += 1
        return self.data[self.place - 1]

    def _unsigned(self) -> int:
        number = shift = 0
        while (byte := self._byte()) & 0x80:
            number, shift = number | (byte & 0x7F) << shift, shift + 7
            if shift > 63:
                raise ValueError("no number of 64 bits")
        return number | byte << shift

    def _signed(self) -> int:
        number = self._unsigned()
        return number >> 1 ^ -(number & 1)

    def _value(self, kind: int) -> Any:
        """A number or a struct as such; of other kinds only the place behind them matters."""
        if kind in _BOOLEANS:
            return kind == 1
        if kind in _NUMBERS:
            return self._signed()
        if kind == _STRUCT:
            return self.struct()
        if kind == _BINARY:
            length = self._unsigned()
            self.place += length
        elif kind in _LISTS:
            header = self._byte()
            self._skip(header & 0xF, header >> 4 if header >> 4 < 15 else self._unsigned())
        elif kind == _DOUBLE:
            self.place += 8
        elif kind == 3:
            self.place += 1
        else:
            raise ValueError(f"a page header has no field of kind {kind}")
        return None

    def _skip(self, kind: int, count: int) -> None:
        """Elements of a list."""
        if kind in (*_BOOLEANS, 3, _DOUBLE):
            self.place += count * (8 if kind == _DOUBLE else 1)
            return
        for _ in range(count):
            self._value(kind)
