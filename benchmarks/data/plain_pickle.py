"""Pickles of plain data (arrays, lists, dicts, strings, numbers), read without running anything that they carry.

A pickle is a program. The only names it may use here are the three that an array needs, and each of them stands for a class of
this module, never for numpy's own: even numpy's dtype believes a hostile pickle's flags, and would take bytes for pointers.
"""

import pickle
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from influencespace.errors import InputError

_CODE = re.compile(r"([biufSU])(\d{1,9})")  # kind and size, e.g. f8, U51


class _Refused(Exception):
    """What a pickle asks for and may not have."""


class _DType:
    """Stands for numpy.dtype: a kind, a size and a byte order."""

    def __init__(self, code: Any, *copying: Any):
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        # (version, byte order, subarray, names, fields, size, alignment, flags)
        self.order = {"|": "="}.get(state[1], state[1])
        if any(part is not None for part in state[2:5]):
            raise _Refused("a structured dtype")

    @property
    def holds_objects(self) -> bool:
        return self.code in ("O8", "O4", "O")

    def plain(self) -> np.dtype[Any]:
        if (
            not isinstance(self.code, str)
            or not _CODE.fullmatch(self.code)
            or self.order not in ("=", "<", ">")
        ):
            raise _Refused(f"dtype {self.code!r}")
        return np.dtype(self.order + self.code)


def _native(data: bytes, dtype: _DType) -> NDArray[Any]:
    """Bytes as numbers or strings in this machine's byte order: flat, a copy."""
    stored = dtype.plain()
    return np.frombuffer(data, stored).astype(stored.newbyteorder("="))


@dataclass
class _Array:
    """Stands for numpy.ndarray until the whole pickle is read."""

    value: NDArray[Any] | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _DType):
            raise _Refused(f"an array of {type(dtype).__name__}")
        if dtype.holds_objects:
            if not isinstance(data, list) or len(data) != prod(shape):
                raise _Refused("an array of objects that does not list them")
            flat = np.empty(len(data), object)
            flat[:] = data
        else:
            if not isinstance(data, bytes):
                raise _Refused(f"an array's data as {type(data).__name__}")
            flat = _native(data, dtype)
        self.value = flat.reshape(shape, order="F" if fortran else "C")


def _array(*empty: Any) -> _Array:
    """Stands for numpy's _reconstruct, which makes an empty array for its state to fill."""
    return _Array()


def _scalar(dtype: Any, data: Any) -> Any:
    """Stands for numpy's scalar: one number or string of a dtype."""
    if not isinstance(dtype, _DType) or not isinstance(data, bytes):
        raise _Refused("a number that is not of a plain dtype")
    return _native(data, dtype)[0]


_NAMES: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    **{
        (f"numpy.{core}.multiarray", name): stand_in  # `core` up to numpy 1, `_core` since 2
        for core in ("core", "_core")
        for name, stand_in in (("_reconstruct", _array), ("scalar", _scalar))
    },
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise _Refused(f"{module}.{name}")
        return _NAMES[module, name]

    def persistent_load(self, identifier: Any) -> Any:
        raise _Refused("a persistent object")


def _settled(value: Any) -> Any:
    """The value with arrays in the place of what stood for them."""
    if isinstance(value, _Array):
        if value.value is None:
            raise _Refused("an array without data")
        array = value.value
        if array.dtype == object:
            for index, item in np.ndenumerate(array):
                array[index] = _settled(item)
        return array
    if isinstance(value, dict):
        return {_settled(key): _settled(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_settled(item) for item in value)
    if value is None or isinstance(value, bool | int | float | str | bytes | np.generic):
        return value
    raise _Refused(f"a value of type {type(value).__name__.lstrip('_')}")


def read_pickled_array(path: Path | str) -> Any:
    """The object or array in an `.npy` file that numpy reads with allow_pickle only: arrays, lists, dicts, strings, numbers.

    Raises InputError when the file asks for anything else, naming it (nothing of it is run), is damaged, or is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file. Is it mistyped, or not mounted on this machine?")
    with path.open("rb") as file:
        try:
            _skip_header(file)
            array = _settled(_Unpickler(file).load())
        except _Refused as refused:
            raise InputError(
                f"{path}: refused {refused}. Only arrays, lists, dicts, strings and numbers are read; a file that asks for more "
                "may be made to run code on this machine: find out where it comes from, and do not open it with numpy or pickle"
            ) from None
        # a damaged pickle raises whatever its last sound instruction happens to raise (docs of `pickle.UnpicklingError`)
        except Exception as error:
            raise InputError(
                f"{path}: not a readable .npy file of objects ({type(error).__name__}: {error}). Is it damaged, or cut short?"
            ) from None
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path}: holds a {type(array).__name__} where an .npy file has an array")
    return array.item() if array.shape == () else array


def _skip_header(file: BinaryIO) -> None:
    """Read past an `.npy` header of an array of objects."""
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read:
        raise ValueError(f".npy version {version}")
    dtype = read[version](file)[2]
    if not dtype.hasobject:
        raise ValueError(f"an array of {dtype}, which has no objects in it")
