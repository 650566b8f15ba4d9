"""Any partition, any order, same scores: the whole job on the same pairs, dealt into shards in many ways."""

import io
import random
import tarfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import run_here
from scipy.stats import spearmanr

pytestmark = pytest.mark.e2e

# A threshold amid the scores.
PRUNED = {"proxy__train__steps": 100, "selection__tau_low": 0.2}
# number of shards, seed of the order, and settings of who computes what at once
DEALS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "two shards": (2, 1, {}),
    "seven shards in small batches": (7, 2, {"embed__batch_size": 7}),
    "one shard in small buckets": (
        1,
        3,
        {
            "embed__batch_size": 13,
            "proxy__bucket_size": 37,
            "cluster__bucket_size": 41,
            "influence__bucket_size": 29,
        },
    ),
}


def samples_of(folder: Path) -> list[list[tuple[tarfile.TarInfo, bytes]]]:
    """The members of each sample of all tars of a folder."""
    samples: dict[str, list[tuple[tarfile.TarInfo, bytes]]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                samples.setdefault(member.name.partition(".")[0], []).append((member, file.read()))
    return list(samples.values())


def dealt(world: Path, folder: Path, shards: int, seed: int) -> Path:
    """The pool of the world in another order, in so many shards of unlike size."""
    samples = samples_of(world / "pool")
    generator = random.Random(seed)
    generator.shuffle(samples)
    cuts = sorted(generator.sample(range(1, len(samples)), shards - 1))
    folder.mkdir()
    for number, (start, stop) in enumerate(zip([0, *cuts], [*cuts, len(samples)])):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for member, data in (part for sample in samples[start:stop] for part in sample):
                info = tarfile.TarInfo(member.name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder


def decisions(out: Path) -> dict[str, tuple[bool, float]]:
    """Kept and score of every pair."""
    table = pq.read_table(out / "curated.parquet", columns=["uid", "kept", "score"]).to_pydict()
    return dict(zip(table["uid"], zip(table["kept"], table["score"])))


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[bool, float]]:
    """What the job decides on the pool as one shard, in its first order."""
    folder = tmp_path_factory.mktemp("whole")
    pool = dealt(world, folder / "pool", 1, seed=0)
    run_here(world, folder / "run", data__pool=str(pool), **PRUNED)
    return decisions(folder / "run")


@pytest.mark.parametrize("deal", DEALS)
def test_the_partition_of_the_pool_changes_no_score(
    world: Path, whole: dict[str, tuple[bool, float]], tmp_path: Path, deal: str
) -> None:
    shards, seed, settings = DEALS[deal]
    pool = dealt(world, tmp_path / "pool", shards, seed)
    assert len(list(pool.iterdir())) == shards
    run_here(world, tmp_path / "run", data__pool=str(pool), **PRUNED, **settings)
    again = decisions(tmp_path / "run")
    assert again.keys() == whole.keys()
    scores = [(whole[uid][1], again[uid][1]) for uid in whole]
    assert spearmanr(*zip(*scores)).statistic >= 0.9999
    moved = [uid for uid in whole if whole[uid][0] != again[uid][0]]
    assert len(moved) <= 0.001 * len(whole), moved
    kept = sum(keep for keep, _ in whole.values())
    assert 0 < kept < len(whole)
