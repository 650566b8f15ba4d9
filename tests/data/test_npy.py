"""An array that is written in parts is the file of the whole one."""

from pathlib import Path

import numpy as np
import pytest

from influencespace.data.npy import write_npy


@pytest.mark.parametrize("dtype", [np.int64, np.float32, np.dtype("u8,u8")])
@pytest.mark.parametrize("cuts", [[], [3], [0, 4, 4, 11]])
def test_parts_are_the_whole(tmp_path: Path, dtype: np.dtype, cuts: list[int]) -> None:
    whole = np.arange(11, dtype=np.int64).astype(dtype)
    np.save(tmp_path / "whole.npy", whole)
    write_npy(tmp_path / "parts.npy", iter(np.split(whole, cuts)), 11, dtype)
    assert (tmp_path / "parts.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_a_wrong_count_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 values came"):
        write_npy(tmp_path / "parts.npy", [np.arange(2)], 3, np.int64)
    assert not list(tmp_path.iterdir())
    write_npy(tmp_path / "parts.npy", [], 0, np.int64)
    assert np.load(tmp_path / "parts.npy").shape == (0,)
