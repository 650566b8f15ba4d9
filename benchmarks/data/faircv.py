"""FairCVtest: profiles of job applicants with scores that are blind to gender and ethnicity, and scores that are biased.

Source: Pena, Serna, Morales and Fierrez, "Bias in multimodal AI: testbed for fair automatic recruitment" (2020). Two layouts are
read: one experiment's profiles (`Profiles_test_gen.npy`, `Profiles_test_et.npy`) and the whole database (`FairCVdb.npy`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.data.plain_pickle import read_pickled_array
from influencespace.errors import InputError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

FACE = 20  # numbers of a face embedding, and of its blinded twin, which end a profile's columns
OCCUPATION = 2
Split = Literal["Train", "Test"]
Bias = Literal["Gender", "Ethnicity"]


@dataclass(frozen=True, kw_only=True)
class Profiles:
    """Applicants, one a row, with the score that each deserves and the biased score that was given."""

    columns: FloatArray  # (n, C) ethnicity, gender, occupation, suitability, merits, face, blinded face
    blind: FloatArray  # (n,)
    biased: FloatArray  # (n,)
    image: NDArray[np.str_]  # (n,) name of the face picture

    def __len__(self) -> int:
        return len(self.blind)

    @property
    def ethnicity(self) -> IntArray:
        """0, 1 or 2 (n,)."""
        return self.columns[:, 0].astype(np.int64)

    @property
    def gender(self) -> IntArray:
        """0 male, 1 female (n,)."""
        return self.columns[:, 1].astype(np.int64)

    @property
    def merits(self) -> FloatArray:
        """What a score should depend on: suitability, education, experience and so on, to the languages (n, M)."""
        return self.columns[:, OCCUPATION + 1 : -2 * FACE]

    @property
    def occupation(self) -> IntArray:
        """Number of the occupation (n,): names, so no scale."""
        return self.columns[:, OCCUPATION].astype(np.int64)

    @property
    def face(self) -> FloatArray:
        """The face embedding, which tells gender and ethnicity (n, 20)."""
        return self.columns[:, -2 * FACE : -FACE]


def read_profiles(path: Path | str) -> Profiles:
    """The profiles of one experiment; raises InputError as `read_pickled_array` does, and where a part is missing or misfits."""
    result = _dictionary(path)
    names = ("profiles", "blindLabels", "biasedLabels", "image_list")
    return _profiles(path, result, names)


def read_faircv_db(path: Path | str, split: Split, bias: Bias) -> Profiles:
    """One split of the whole database, with one experiment's biased scores; raises InputError as `read_profiles` does."""
    result = _dictionary(path)
    names = (
        f"Profiles {split}",
        f"Blind Labels {split}",
        f"Biased Labels {split} ({bias})",
        f"Image List {split}",
    )
    return _profiles(path, result, names)


def _dictionary(path: Path | str) -> dict[Any, Any]:
    result = read_pickled_array(path)
    if not isinstance(result, dict):
        raise InputError(f"{path}: holds no dict of arrays, so it is no FairCVtest file")
    return result


def _profiles(path: Path | str, result: dict[Any, Any], names: tuple[str, str, str, str]) -> Profiles:
    if missing := [name for name in names if name not in result]:
        raise InputError(
            f"{path}: has no {', '.join(map(repr, missing))} (it has {', '.join(sorted(map(repr, result)))}). One experiment's "
            "profiles are read by read_profiles, the whole FairCVdb.npy by read_faircv_db"
        )
    try:
        columns, blind, biased = (np.asarray(result[name], np.float64) for name in names[:3])
        image = np.asarray(result[names[3]], np.str_)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: a column is not of numbers ({error})") from None
    n = len(columns) if columns.ndim == 2 else -1
    if (
        columns.ndim != 2
        or columns.shape[1] <= OCCUPATION + 2 * FACE
        or any(part.shape != (n,) for part in (blind, biased, image))
    ):
        shapes = [f"{name} {part.shape}" for name, part in zip(names, (columns, blind, biased, image))]
        raise InputError(
            f"{path}: shapes do not fit: {', '.join(shapes)}; one row a profile is wanted in each"
        )
    if (bad := np.flatnonzero(~np.isfinite(np.column_stack([columns, blind, biased])).all(1))).size:
        raise InputError(f"{path}: {len(bad)} profile(s) hold nan or infinity, the first in row {bad[0]}")
    return Profiles(columns=columns, blind=blind, biased=biased, image=image)
