"""Arrays that nobody holds whole, written part by part as the .npy files that `numpy.save` writes."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from influencespace.data.artifacts import atomic_path


def write_npy(path: Path, parts: Iterable[NDArray[Any]], count: int, dtype: Any) -> None:
    """Write `count` values of a type, which come in parts (m,), atomically; raises ValueError where they are not so many."""
    kind, written = np.dtype(dtype), 0
    header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": (count,)}
    with atomic_path(path) as aside:
        with aside.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for part in parts:
                file.write(np.ascontiguousarray(part, kind).tobytes())
                written += len(part)
        if written != count:
            raise ValueError(f"{written} values came for {path}, and {count} were announced")
