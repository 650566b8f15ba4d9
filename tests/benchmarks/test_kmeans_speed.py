"""The comparison of k-means: what is measured of each method, on a few rows."""

import numpy as np
import pytest

from benchmarks.speed.kmeans import OURS, RIVALS, Stored, inertia, measure, mixed


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    path = tmp_path_factory.mktemp("rows") / "rows"
    np.concatenate(list(mixed(3000, 16, 12))).tofile(path)
    return Stored(path, 3000)


def test_inertia_is_to_the_means_of_the_clusters(stored: Stored) -> None:
    label, rows = np.arange(3000) % 7, stored.rows(0, 3000).numpy().astype(np.float64)
    expected = sum(np.square(rows[label == k] - rows[label == k].mean(0)).sum() for k in range(7))
    assert inertia(stored, label, 9) == pytest.approx(expected)
    np.testing.assert_array_equal(stored.rows(1000, 1500), rows[1000:1500].astype(np.float32))


def test_every_method_is_measured_and_finds_the_topics(stored: Stored) -> None:
    one_cluster = inertia(stored, np.zeros(3000, np.int64), 1)
    measured = {
        method: measure(method, stored.path, 3000, 12, 0)
        for method in (OURS, *RIVALS)
        if method != "faiss" or pytest.importorskip("faiss")
    }
    for one in measured.values():
        assert one["inertia"] < 0.8 * one_cluster
        assert one["unshared_mb"] > 10
    assert measured[OURS]["inertia"] < 1.02 * min(one["inertia"] for one in measured.values())
