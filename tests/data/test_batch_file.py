"""Batches on disk are the batches that were given."""

import pickle
import tracemalloc

import numpy as np
import pytest

from influencespace.data.batch_file import BatchFile

BATCHES = [np.array([3, 1, 2]), np.empty(0, np.int64), np.array([2**40]), np.array([5, 5])]


@pytest.mark.parametrize("kept", [BatchFile(iter(BATCHES)), pickle.loads(pickle.dumps(BatchFile(BATCHES)))])
def test_they_are_a_sequence(kept: BatchFile) -> None:
    assert [rows.tolist() for rows in kept] == [rows.tolist() for rows in BATCHES]
    assert kept[-1].tolist() == [5, 5]
    assert [rows.tolist() for rows in kept[1:3]] == [[], [2**40]]
    with pytest.raises(IndexError):
        kept[4]


def test_no_batches() -> None:
    assert list(BatchFile([])) == list(BatchFile([np.empty(0, np.int64)])[:0]) == []


def test_memory_is_eight_bytes_a_batch() -> None:
    rows, batches = np.arange(50), 20_000
    tracemalloc.start()
    kept = BatchFile(rows + i for i in range(batches))  # 8 MB
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert 8 * batches < held < 9 * batches + 20_000
    assert kept[499][0] == 499
