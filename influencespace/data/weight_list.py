"""A user's list of pairs: their uids, and a weight for each or all alike."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from influencespace.core.arrays import FloatArray
from influencespace.errors import InputError

DATACOMP = np.dtype("u8,u8")
KINDS = "Parquet (.parquet) with a column uid and perhaps weight, text (.txt) with a uid in each line, or DataComp's array (.npy)"


@dataclass(frozen=True)
class WeightList:
    """Uids (n,) and the weight of each (n,) >= 0; of equal uids the first one counts."""

    uids: pa.Array
    weights: FloatArray

    def __len__(self) -> int:
        return len(self.uids)

    def of(self, uids: Sequence[Any] | NDArray[Any]) -> FloatArray:
        """Weights of some pairs by their uids (m,), zero for those that it does not list (m,)."""
        place = pc.index_in(pa.array(uids, pa.large_string()), value_set=self.uids)
        found = place.is_valid().to_numpy(zero_copy_only=False)
        weights = np.zeros(len(found))
        weights[found] = self.weights[place.drop_null().to_numpy(zero_copy_only=False)]
        return weights


def read_weight_list(path: str) -> WeightList:
    """The list in a file, wherever fsspec finds it.

    Raises InputError, naming file and row, for a file that cannot be read, that is none of the known kinds or lists no pair, and
    where a weight is not a number of zero or more.
    """
    return _read(path, weight_list_digest(path))


def weight_list_digest(path: str) -> str:
    """A digest of the file; raises InputError where there is none."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with fsspec.open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}, a file of train.methods, cannot be read: {error}") from error
    return digest.hexdigest()


@lru_cache(maxsize=2)
def _read(path: str, digest: str) -> WeightList:
    """By path and content, so that a worker reads it once."""
    kind = path.rsplit(".", 1)[-1].lower()
    readers = {"parquet": _parquet, "npy": _datacomp, "txt": _lines}
    if kind not in readers:
        raise InputError(f"{path} is no list of pairs that is known here; give {KINDS}")
    try:
        with fsspec.open(path, "rb") as file:
            uids, weights = readers[kind](file)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} cannot be read as a list of pairs ({error}); give {KINDS}") from error
    if not len(uids):
        raise InputError(f"{path} lists no pair")
    wrong = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if len(wrong):
        row = int(wrong[0])
        raise InputError(
            f"{path}: weight {weights[row]} in row {row} (uid {uids[row]}) is not a number of zero or more"
        )
    return WeightList(uids, weights)


def _parquet(file: Any) -> tuple[pa.Array, FloatArray]:
    parquet = pq.ParquetFile(file)
    names = parquet.schema_arrow.names
    if "uid" not in names:
        raise ValueError(f"it has no column uid but {', '.join(names)}")
    table = parquet.read([name for name in ("uid", "weight") if name in names])
    uids = table["uid"].cast(pa.large_string()).combine_chunks()
    if "weight" not in names:
        return uids, np.ones(len(uids))
    weights: FloatArray = table["weight"].cast(pa.float64()).to_numpy()
    return uids, weights


def _datacomp(file: Any) -> tuple[pa.Array, FloatArray]:
    numbers = np.load(file)  # pickles are refused
    if numbers.dtype != DATACOMP:
        raise ValueError(f"its dtype is {numbers.dtype}, not u8,u8")
    uids = [f"{first:016x}{last:016x}" for first, last in numbers.tolist()]
    return pa.array(uids, pa.large_string()), np.ones(len(uids))


def _lines(file: Any) -> tuple[pa.Array, FloatArray]:
    uids = [line.strip() for line in file.read().decode("utf-8").splitlines() if line.strip()]
    return pa.array(uids, pa.large_string()), np.ones(len(uids))
