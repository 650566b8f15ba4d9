"""The settings of slices: what depends on the size of a pool is as of the whole one."""

import math

import pytest

from influencespace.config import load_config
from influencespace.planning.growth import GROWTH
from influencespace.planning.slice_config import Sliced, smaller
from influencespace.stages.scoring.cluster import KMeans

MILLION = 10**6


def sliced(whole: int, **settings: object) -> Sliced:
    return Sliced(config=load_config(None, settings), limit=20_000, whole=whole, workers=2)


def test_what_the_pool_decides_is_as_of_the_whole_pool() -> None:
    small, large = sliced(50_000).of(20_000), sliced(MILLION).of(20_000)
    assert (small.proxy.folds, large.proxy.folds) == (5, 2)
    assert (small.proxy.max_doublings, large.proxy.max_doublings) == (3, 0)
    assert (small.train.seeds, large.train.seeds) == ((0, 1, 2), (0, 1))


@pytest.mark.parametrize("whole", [50_000, 300_000, MILLION])
def test_a_slice_has_as_many_clusters_as_the_whole_pool(whole: int) -> None:
    cut = sliced(whole)
    of_whole = KMeans.of(None, whole, cut.config.cluster, 0)  # type: ignore[arg-type]
    for pairs in (20_000, smaller(20_000)):
        of_slice = KMeans.of(None, pairs, cut.of(pairs).cluster, 0)  # type: ignore[arg-type]
        assert of_slice.k == of_whole.k > 1


def test_slices_too_small_for_these_clusters_have_equally_many() -> None:
    cut = Sliced(config=load_config(None, {}), limit=400, whole=MILLION, workers=2)
    k = [KMeans.of(None, pairs, cut.of(pairs).cluster, 0).k for pairs in (200, 400)]  # type: ignore[arg-type]
    assert k == [50, 50]


def test_numbers_that_the_user_gave_stay() -> None:
    given = {"proxy.folds": 3, "cluster.k": 7, "train.seeds": "[4]", "proxy.choose_steps": "false"}
    config = sliced(MILLION, **given).of(10_000)
    assert (config.proxy.folds, config.cluster.k, config.train.seeds) == (3, 7, (4,))


@pytest.mark.parametrize("whole", [20_000, 100_000, MILLION])
def test_a_slice_is_passed_as_often_as_the_whole_pool(whole: int) -> None:
    """Else what is done for every pair and what is done for every drawn one cannot be told apart."""
    cut, units = sliced(whole), GROWTH["proxies"].units
    for pairs in (20_000, smaller(20_000)):
        assert units(cut.of(pairs), pairs) / pairs == pytest.approx(
            units(cut.config, whole) / whole, rel=0.05
        )
        first, most = (of(pairs) for of in (cut.of(pairs).proxy.first_steps, cut.of(pairs).proxy.max_steps))
        whole_first, whole_most = cut.config.proxy.first_steps(whole), cut.config.proxy.max_steps(whole)
        assert int(math.log2(most / first)) == int(math.log2(whole_most / whole_first))


def test_buckets_keep_as_many_workers_busy() -> None:
    config = sliced(MILLION).of(20_000)
    assert config.proxy.bucket_size == config.cluster.bucket_size == 10_000
