"""As many folds and the seed that a run has by default, on planted worlds: about as many pairs go as have a wrong caption."""

from pathlib import Path

import pytest
from planted import plant

from influencespace.config import load_config
from influencespace.data.buckets import read_columns
from influencespace.data.pair_set import PairSet
from influencespace.engine.local import LocalEngine
from influencespace.pipeline import STAGES
from influencespace.run import Run, carry_out
from influencespace.stages.proxies.proxy import MANY_FOLDS

PAIRS = 600
SMALL = {
    "proxy.train.dimension": 32,
    "proxy.train.steps": 60,
    "proxy.train.batch_size": 64,
    "proxy.train.learning_rate": 0.02,
    "proxy.choose_steps": False,
}
"""A small proxy for a small world; all that decides is as it is by default."""


@pytest.mark.parametrize(("wrong", "least", "most"), [(0.0, 0.0, 0.02), (0.2, 0.17, 0.22), (0.4, 0.29, 0.41)])
def test_the_planted_share_is_found(tmp_path: Path, wrong: float, least: float, most: float) -> None:
    planted = plant(tmp_path / "pool", PAIRS, wrong=wrong, dimension=64, meanings=12, seed=1)
    target = PairSet(plant(tmp_path / "target", 400, dimension=64, meanings=12, seed=2).folder)
    sets = {"pool": PairSet(planted.folder), "target": target, "test": target}
    run = Run(folder=tmp_path / "run", config=load_config(None, SMALL), sets=sets)
    assert run.config.proxy.folds is None
    assert run.seed == 0
    until = next(place for place, stage in enumerate(STAGES) if stage.name == "train")
    for stage in STAGES[:until]:
        carry_out(stage, run, LocalEngine())
    assert run.manifest("proxies").details["folds"] == MANY_FOLDS
    columns = read_columns(run.at("selection") / "curated.parquet", "kept", "uid")
    kept = columns["kept"].astype(bool)
    assert columns["uid"].tolist() == planted.uids
    assert least <= (~kept).mean() <= most
    if wrong:
        assert planted.wrong[~kept].mean() > 0.95  # precision
        assert (~kept)[planted.wrong].mean() > 0.75  # recall; of 40 % the rule leaves some in doubt
