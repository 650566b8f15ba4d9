"""The Python of the documents runs as it is written."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import influencespace
from influencespace.core.metrics import auroc
from influencespace.estimators.table import TABLE

DOCS = Path(influencespace.__file__).parents[1] / "docs"


def python_of(page: str) -> list[str]:
    """The Python blocks of a page of the documents."""
    found = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    return [str(block) for block in found]


def test_every_estimator_is_documented() -> None:
    text = (DOCS / "estimators.md").read_text(encoding="utf-8")
    assert set(TABLE) <= set(re.findall(r"`(\w+)`", text))


@pytest.mark.e2e
def test_the_python_of_the_estimators_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from influencespace import pipeline
    from influencespace.config import load_config
    from influencespace.data.synthetic import WorldConfig, write_world
    from influencespace.engine.local import LocalEngine
    from influencespace.stages.ingest.fit_encoder import FitEncoder

    sizes = {"pretrain": 100, "pool": 120, "target": 60, "test": 40}
    write_world(tmp_path / "world", WorldConfig(seed=1, **sizes))
    FitEncoder(shards=str(tmp_path / "world" / "pretrain"), out=tmp_path / "encoder", steps=3, seed=0)()
    small = {"proxy.train.batch_size": 24, "proxy.train.steps": 10, "proxy.choose_steps": False}
    small |= {
        "proxy.folds": 2,
        "train.seeds": [0],
        "train.methods": ["curated"],
        "curate.weights": "uniform",
    }
    roles = {f"data.{role}": str(tmp_path / "world" / role) for role in ("pool", "target", "test")}
    config = load_config(None, small | roles | {"embed.encoder": str(tmp_path / "encoder")})
    monkeypatch.chdir(tmp_path)
    pipeline.run(config, Path("runs/mine"), LocalEngine())
    names: dict[str, object] = {}
    code, _ = python_of("estimators.md")
    exec(code, names)  # our own document
    value = names["value"]
    assert isinstance(value, np.ndarray)
    assert len(value) == 120
    assert np.isfinite(value).all()


def test_a_classifiers_samples_are_valued_as_documented() -> None:
    generator = torch.Generator().manual_seed(0)
    rule = torch.randn(5, 3, generator=generator)
    features, trusted = (torch.randn(count, 5, generator=generator) for count in (150, 80))
    labels, trusted_labels = (
        torch.nn.functional.one_hot((x @ rule).argmax(1), 3).float() for x in (features, trusted)
    )
    wrong = np.arange(150) < 30
    labels[:30] = labels[:30].roll(1, 1)
    names: dict[str, Any] = {}
    _, code = python_of("estimators.md")
    exec(code, names)  # our own document
    found = names["worth"](features, labels, trusted, trusted_labels)
    assert auroc(-found, wrong) > 0.8


@pytest.mark.e2e
def test_the_python_of_the_tutorial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from influencespace.data.readers import list_shards, read_shard
    from influencespace.data.schema import Sample
    from influencespace.data.synthetic import WorldConfig, write_world
    from influencespace.stages.ingest.fit_encoder import FitEncoder

    write_world(tmp_path / "world", WorldConfig(seed=1, pretrain=100, pool=60, target=30, test=0))
    FitEncoder(shards=str(tmp_path / "world" / "pretrain"), out=tmp_path / "my-clip", steps=3, seed=0)()
    for role, folder in (("pool", "pairs"), ("target", "target")):
        (tmp_path / folder).mkdir()
        for shard in list_shards(str(tmp_path / "world" / role)):
            for number, sample in enumerate(read_shard(shard)):
                assert isinstance(sample, Sample)
                (tmp_path / folder / f"{number:04d}.jpg").write_bytes(sample.image)
                (tmp_path / folder / f"{number:04d}.txt").write_text(sample.captions[0])
    (code,) = python_of("tutorial.md")
    assert len(code.strip().splitlines()) <= 40
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code, names)  # our own document
    worth = names["worth"]
    assert isinstance(worth, np.ndarray)
    assert len(worth) == 60
    assert np.isfinite(worth).all()
