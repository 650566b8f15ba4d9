"""FairCVtest's pickles: read as numpy reads them, and nothing that a hostile one carries is run."""

import io
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from benchmarks.data.faircv import read_faircv_db, read_profiles
from benchmarks.data.plain_pickle import read_pickled_array
from influencespace.errors import InputError

DATA = Path(os.environ.get("INFLUENCESPACE_DATA", Path(__file__).parents[3] / "shared" / "data")) / "faircv"


def saved(path: Path, value: Any) -> Path:
    np.save(path, np.array(value, dtype=object), allow_pickle=True)
    return path


def as_npy(path: Path, pickled: bytes) -> Path:
    """An .npy file of one object whose pickle is given."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": ()})
    path.write_bytes(header.getvalue() + pickled)
    return path


def applicants(n: int, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    columns = np.column_stack([rng.integers(0, 3, n), rng.integers(0, 2, n), rng.normal(size=(n, 49))])
    return {
        "columns": columns,
        "blind": rng.random(n),
        "biased": rng.random(n),
        "image": np.array([f"H{i}.jpg" for i in range(n)]),
    }


def reduced(n: int = 6) -> dict[str, Any]:
    given = applicants(n)
    return {
        "profiles": given["columns"],
        "blindLabels": given["blind"],
        "biasedLabels": given["biased"],
        "image_list": given["image"],
    }


plain_arrays = arrays.arrays(
    st.one_of(
        arrays.floating_dtypes(sizes=(32, 64)),
        arrays.integer_dtypes(),
        arrays.unicode_string_dtypes(max_len=5),
        arrays.boolean_dtypes(),
    ),
    arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
)
plain = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), plain_arrays),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


def same(left: Any, right: Any) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and np.array_equal(left, right, equal_nan=left.dtype.kind == "f")
    return type(left) is type(right) and left == right


@given(value=plain, fortran=st.booleans(), protocol=st.integers(3, 4))
def test_plain_data_is_read_as_numpy_reads_it(
    value: Any, fortran: bool, protocol: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = np.empty((), object)
    whole[()] = {
        "value": value,
        "order": np.asarray(np.arange(6.0).reshape(2, 3), order="F" if fortran else "C"),
    }
    path = as_npy(tmp_path_factory.mktemp("plain") / "a.npy", pickle.dumps(whole, protocol))
    assert same(read_pickled_array(path), np.load(path, allow_pickle=True).item())


def test_arrays_of_objects_keep_their_shape(tmp_path: Path) -> None:
    value = np.array([["a", 1.5], [None, np.float64(2)]], dtype=object)
    found = read_pickled_array(saved(tmp_path / "a.npy", value))
    assert found.shape == (2, 2)
    assert found.tolist() == value.tolist()


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("protocol", [3, 4])  # what numpy writes
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_hostile_pickle_is_refused_by_name_and_not_run(
    tmp_path: Path, protocol: int, wrapped: bool
) -> None:
    trace = tmp_path / "was-here"
    value: Any = Hostile(trace)
    if wrapped:
        value = reduced() | {"blindLabels": np.array([Hostile(trace)], dtype=object)}
    path = as_npy(tmp_path / "a.npy", pickle.dumps(value, protocol))
    with pytest.raises(InputError, match=rf"refused {os.mkdir.__module__}\.mkdir"):
        read_pickled_array(path)
    assert not trace.exists()
    pickle.loads(pickle.dumps(value, protocol))
    assert trace.exists()  # so the pickle was a hostile one


@pytest.mark.parametrize(
    "name",
    [
        "builtins eval",
        "builtins getattr",
        "copyreg _reconstructor",
        "numpy load",
        "numpy.core.multiarray array",
    ],
)
def test_no_other_name_is_given_out(tmp_path: Path, name: str) -> None:
    module, attribute = name.split()
    path = as_npy(tmp_path / "a.npy", f"c{module}\n{attribute}\n.".encode())
    with pytest.raises(InputError, match=f"refused {module}.{attribute}"):
        read_pickled_array(path)


def test_a_dtype_that_lies_about_its_flags_makes_no_pointers(tmp_path: Path) -> None:
    """numpy believes the flags in a dtype's state: without the one for objects, an array of them is filled from raw bytes."""

    class Lying:
        def __reduce__(self) -> tuple[Any, ...]:
            return np.dtype, ("O8", False, True), (3, "|", None, None, None, 8, 8, 0)

    class Pointers:
        def __reduce__(self) -> tuple[Any, ...]:
            empty = np.ndarray.__reduce__(np.empty(1))[0]
            return empty, (np.ndarray, (0,), b"b"), (1, (1,), Lying(), False, struct.pack("P", 0xDEAD))

    path = as_npy(tmp_path / "a.npy", pickle.dumps(Pointers(), 4))
    with pytest.raises(InputError, match="refused an array of objects"):
        read_pickled_array(path)


@pytest.mark.parametrize("code", ["V8", "M8[s]", "f8,f8", "f99", 3])
def test_odd_dtypes_are_refused(tmp_path: Path, code: Any) -> None:
    class Odd:
        def __reduce__(self) -> tuple[Any, ...]:
            return np.dtype, (code, False, True)

    class Array:
        def __reduce__(self) -> tuple[Any, ...]:
            return (
                np.ndarray.__reduce__(np.empty(1))[0],
                (np.ndarray, (0,), b"b"),
                (1, (1,), Odd(), False, bytes(8)),
            )

    with pytest.raises(InputError):
        read_pickled_array(as_npy(tmp_path / "a.npy", pickle.dumps(Array(), 4)))


@pytest.mark.parametrize("left", [0, 5, 100, 200, 400])
def test_a_file_cut_short_says_so(tmp_path: Path, left: int) -> None:
    path = saved(tmp_path / "a.npy", reduced())
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(InputError, match="damaged, or cut short"):
        read_pickled_array(path)


def test_what_is_no_file_of_objects_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_pickled_array(tmp_path / "none.npy")
    np.save(tmp_path / "numbers.npy", np.arange(3))
    with pytest.raises(InputError, match="no objects"):
        read_pickled_array(tmp_path / "numbers.npy")
    with pytest.raises(InputError, match="holds a dict where"):
        read_pickled_array(as_npy(tmp_path / "bare.npy", pickle.dumps({})))
    with pytest.raises(InputError, match="no FairCVtest file"):
        read_profiles(saved(tmp_path / "list.npy", [1, 2]))


def test_one_experiments_profiles(tmp_path: Path) -> None:
    given = reduced()
    found = read_profiles(saved(tmp_path / "a.npy", given))
    np.testing.assert_array_equal(found.columns, given["profiles"])
    np.testing.assert_array_equal(found.blind, given["blindLabels"])
    np.testing.assert_array_equal(found.biased, given["biasedLabels"])
    np.testing.assert_array_equal(found.image, given["image_list"])
    assert (found.merits.shape, found.face.shape) == ((6, 8), (6, 20))
    np.testing.assert_array_equal(
        np.column_stack([found.ethnicity, found.gender]), given["profiles"][:, :2].astype(int)
    )


def test_the_whole_database(tmp_path: Path) -> None:
    train, test = applicants(5, 1), applicants(3, 2)
    whole: dict[str, Any] = {}
    for split, part in (("Train", train), ("Test", test)):
        whole |= {
            f"Profiles {split}": part["columns"],
            f"Bios {split}": np.array([["a", "b"]] * len(part["blind"])),
            f"Blind Labels {split}": part["blind"],
            f"Biased Labels {split} (Gender)": part["biased"],
            f"Biased Labels {split} (Ethnicity)": -part["biased"],
            f"Image List {split}": part["image"].tolist(),
        }
    path = saved(tmp_path / "FairCVdb.npy", whole)
    np.testing.assert_array_equal(read_faircv_db(path, "Train", "Gender").biased, train["biased"])
    found = read_faircv_db(path, "Test", "Ethnicity")
    np.testing.assert_array_equal(found.biased, -test["biased"])
    np.testing.assert_array_equal(found.image, test["image"])
    assert len(found) == 3
    with pytest.raises(InputError, match="read_faircv_db"):
        read_profiles(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blindLabels": np.zeros(5)}, "shapes do not fit"),
        ({"profiles": np.zeros((6, 12))}, "shapes do not fit"),
        ({"profiles": np.zeros(6)}, "shapes do not fit"),
        ({"biasedLabels": np.array(list("abcdef"))}, "not of numbers"),
        ({"biasedLabels": np.array([0, 0, 0, np.nan, 0, 0])}, "1 profile.* row 3"),
    ],
)
def test_what_does_not_fit_says_so(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_profiles(saved(tmp_path / "a.npy", reduced() | change))


@pytest.mark.real_data
@pytest.mark.skipif(not DATA.is_dir(), reason="no real data")
@pytest.mark.parametrize("experiment", ["gen", "et"])
def test_the_real_files(experiment: str) -> None:
    path = DATA / f"Profiles_test_{experiment}.npy"
    found, truth = read_profiles(path), np.load(path, allow_pickle=True).item()
    assert len(found) == 4800
    np.testing.assert_array_equal(found.columns, truth["profiles"])
    np.testing.assert_array_equal(found.image, truth["image_list"])
    assert np.ptp(found.columns[:, -20:], axis=0).max() < 1e-4 < np.ptp(found.face, axis=0).min()
    group, untouched = (found.gender, 0) if experiment == "gen" else (found.ethnicity, 1)
    np.testing.assert_array_equal(found.biased != found.blind, group != untouched)
