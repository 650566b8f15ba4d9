"""Memory that the C library keeps although nothing needs it."""

import ctypes
from functools import cache
from typing import Any

KEPT = 256 * 2**20
"""Bytes that may be kept: less is soon used again."""


FIELDS = (
    "arena",
    "ordblks",
    "smblks",
    "hblks",
    "hblkhd",
    "usmblks",
    "fsmblks",
    "uordblks",
    "fordblks",
    "keepcost",
)


class _Info(ctypes.Structure):
    """What glibc's mallinfo2 tells."""

    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS]


@cache
def _library() -> Any:
    """glibc of 2.33 or newer; None elsewhere."""
    library = ctypes.CDLL(None)
    if not (hasattr(library, "mallinfo2") and hasattr(library, "malloc_trim")):
        return None
    library.mallinfo2.restype = _Info
    return library


def free_bytes() -> int:
    """Bytes that nothing needs and that the machine has not got back; 0 where that cannot be told."""
    library = _library()
    return int(library.mallinfo2().fordblks) if library else 0


def give_back() -> None:
    """Give free memory back to the machine, where it is much.

    Once blocks of up to 32 MB were freed glibc makes such blocks in its heap, whose holes stay: 5 GB of them in each worker, of
    ten million pairs.
    """
    if free_bytes() > KEPT:
        _library().malloc_trim(0)
