"""A user's list of pairs is read in every form, and refused in the user's terms."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from influencespace.data.weight_list import read_weight_list
from influencespace.errors import InputError

UIDS = ["0" * 31 + "a", "f" * 32, "00000000000000010000000000000002"]


def written(path: Path, uids: list[str], weights: list[float] | None = None) -> str:
    """A list in the form that its name says."""
    if path.suffix == ".parquet":
        columns = {"uid": uids} | ({} if weights is None else {"weight": weights})
        pq.write_table(pa.table(columns), path)
    elif path.suffix == ".npy":
        np.save(path, np.array([(int(uid[:16], 16), int(uid[16:], 16)) for uid in uids], "u8,u8"))
    else:
        path.write_text("\n".join(uids) + "\n\n")
    return str(path)


@pytest.mark.parametrize("name", ["list.parquet", "list.npy", "list.txt", "LIST.TXT"])
def test_uids_without_weights_count_alike(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    found = read_weight_list(written(path, UIDS))
    assert len(found) == 3
    np.testing.assert_array_equal(found.of([UIDS[2], "another", UIDS[0]]), [1, 0, 1])
    np.testing.assert_array_equal(found.of([]), [])


def test_weights_are_those_of_the_file_and_the_first_of_equal_uids_counts(tmp_path: Path) -> None:
    path = written(tmp_path / "list.parquet", ["a", "b", "a"], [0.5, 2, 3])
    np.testing.assert_array_equal(read_weight_list(path).of(["b", "a", "c"]), [2, 0.5, 0])


def test_a_list_that_changes_is_read_again(tmp_path: Path) -> None:
    path = written(tmp_path / "list.txt", ["a"])
    assert read_weight_list(path).of(["a", "b"]).tolist() == [1, 0]
    written(tmp_path / "list.txt", ["b"])
    assert read_weight_list(path).of(["a", "b"]).tolist() == [0, 1]


@pytest.mark.parametrize(("weight", "row"), [(-1.0, 1), (float("nan"), 1), (float("inf"), 1)])
def test_a_weight_that_is_none_is_named(tmp_path: Path, weight: float, row: int) -> None:
    path = written(tmp_path / "list.parquet", ["a", "b"], [1, weight])
    with pytest.raises(InputError, match=rf"list\.parquet: weight .* in row {row} \(uid b\)"):
        read_weight_list(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.csv", b"uid", "no list of pairs that is known here; give Parquet"),
        ("list.txt", b"", "lists no pair"),
        ("list.parquet", b"no parquet", "cannot be read as a list of pairs"),
        ("list.npy", b"no array", "cannot be read as a list of pairs"),
    ],
)
def test_a_file_that_is_no_list_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_weight_list(str(tmp_path / name))


def test_a_table_without_uids_and_an_array_of_other_numbers_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"key": ["a"]}), tmp_path / "list.parquet")
    np.save(tmp_path / "list.npy", np.arange(3))
    with pytest.raises(InputError, match="no column uid but key"):
        read_weight_list(str(tmp_path / "list.parquet"))
    with pytest.raises(InputError, match="dtype is int64, not u8,u8"):
        read_weight_list(str(tmp_path / "list.npy"))
    with pytest.raises(InputError, match=r"missing\.txt, a file of train\.methods, cannot be read"):
        read_weight_list(str(tmp_path / "missing.txt"))


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    np.save(tmp_path / "list.npy", np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(InputError, match="cannot be read as a list of pairs"):
        read_weight_list(str(tmp_path / "list.npy"))
