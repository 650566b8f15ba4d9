"""A tiny synthetic world for all benchmarks; the tiny encoders of the models' tests."""

import sys
from functools import cached_property
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from benchmarks.data.datasets import CLEAN_SCENES, Dataset
from influencespace.data.pair_set import PairSet
from influencespace.data.synthetic import WorldConfig, write_world
from influencespace.stages.ingest.fit_encoder import FitEncoder
from tests.models.conftest import encoder_folders  # noqa: F401


class TinyDataset(Dataset):
    """Synthetic scenes in place of photographs."""

    @property
    def encoder(self) -> str:
        return str(self.data / "encoder")

    @property
    def pool_shards(self) -> str:
        return str(self.data / "pool" / "*.tar")

    def dev(self, tar: int) -> PairSet:
        split = ("target", "test")[tar]
        return self.embedded(split, str(self.data / split / "*.tar"))

    @cached_property
    def other_domain(self) -> PairSet:
        return self.pool


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("tiny")
    sizes = {"pretrain": 70, "pool": 160, "target": 40, "test": 40}
    write_world(folder, WorldConfig(seed=1, **sizes, **CLEAN_SCENES))
    FitEncoder(shards=str(folder / "pretrain"), out=folder / "encoder", steps=3, seed=0)()
    return TinyDataset(folder, folder / "cache")
