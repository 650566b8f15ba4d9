"""A stage is one class and one entry: this one runs, is killed and resumed, planned, reported and shown, from this file alone."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from planted import plant
from rich.console import Console

from influencespace import pipeline
from influencespace.config import RunConfig, load_config
from influencespace.data import buckets
from influencespace.data.buckets import Columns, read_columns
from influencespace.data.pair_set import PairSet
from influencespace.engine.local import LocalEngine
from influencespace.pipeline import STAGES
from influencespace.planning import plan, print_plan
from influencespace.report.table import print_summary
from influencespace.run import Details, Run, Stage, Workers

BUCKET = 150


@dataclass(frozen=True)
class Lengths:
    """Columns: the length of each caption of a bucket of pairs, and its cluster."""

    run: Run
    unit: str

    def __call__(self, start: int, stop: int) -> Columns:
        captions = map(str, self.run.pool.column("caption")[start:stop])
        length = [len(text.split() if self.unit == "words" else text) for text in captions]
        clusters = read_columns(self.run.at("cluster") / "clusters.parquet", "cluster")["cluster"]
        return {"cluster": clusters[start:stop], "length": np.array(length)}


@dataclass(frozen=True)
class MeanByCluster:
    """Task: the mean length of every cluster's captions."""

    folder: Path

    def __call__(self) -> list[float]:
        pairs = read_columns(self.folder / "lengths.parquet")
        sums = np.bincount(pairs["cluster"], pairs["length"])
        means: list[float] = (sums / np.bincount(pairs["cluster"])).tolist()
        return means


@dataclass
class CaptionLength(Stage):
    """Mean length of the captions of every cluster; writes lengths.parquet."""

    unit: str = "letters"
    name = "caption_length"
    needs = ("cluster",)

    def settings(self, config: Any) -> str:
        return self.unit

    def work(self, run: Run, workers: Workers) -> Details:
        rows = run.manifest("cluster").rows_out
        workers.table("lengths", Lengths(run, self.unit), rows, BUCKET)
        means = workers.once(MeanByCluster(workers.folder))
        return Details(rows_in=rows, rows_out=rows, details={"means": means})


TOY = CaptionLength.name
WITH_TOY = (*STAGES[:2], CaptionLength(), *STAGES[2:])


class Killed(BaseException):
    """The end of a run by a signal."""


class Tasks(LocalEngine):
    """The plain loop, that counts its tasks and may be killed after some."""

    def __init__(self, limit: int = 10**9) -> None:
        self.done, self.limit = 0, limit

    def map(self, *arguments: Any, **options: Any) -> Any:
        for result in super().map(*arguments, **options):
            self.done += 1
            yield result
            if self.done >= self.limit:
                raise Killed


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A pool of imported embeddings, of which the target and the test set are cut."""
    folder = tmp_path_factory.mktemp("toy")
    planted = plant(folder / "planted", 400, wrong=0.2)
    pairs = PairSet(planted.folder)
    thin = pairs.read(slice(None), "uid", "caption")
    fat = dict(zip(("image_embedding", "text_embedding"), pairs.inputs(slice(None))))
    vectors = {name: pa.array(list(side.numpy()), pa.list_(pa.float32())) for name, side in fat.items()}
    pairs = pa.table({"uid": list(thin["uid"]), "caption": list(thin["caption"]), **vectors})
    pq.write_table(pairs, folder / "pairs.parquet")
    small = {"proxy.train.steps": 10, "proxy.train.batch_size": 16, "proxy.train.dimension": 8}
    small |= {"proxy.choose_steps": False, "proxy.folds": 2, "cluster.k": 2, "influence.quantiles": 4}
    small |= {"train.seeds": [0], "train.methods": ["curated", "everything"], "split.target_share": 0.4}
    return load_config(None, small | {"data.embeddings": str(folder / "pairs.parquet")})


@pytest.fixture(scope="module")
def finished(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of the usual stages, to which the toy was added: killed within it, and resumed."""
    out = tmp_path_factory.mktemp("run")
    pipeline.curate(config, out, LocalEngine())
    usual = {
        str(stage.name): (out / str(stage.name) / "manifest.json").stat().st_mtime_ns for stage in STAGES
    }
    with pytest.raises(Killed):
        pipeline.curate(config, out, Tasks(limit=1), WITH_TOY)
    assert len(list(out.glob(f".{TOY}-*/buckets/*"))) == 1
    assert not (out / TOY).exists()
    written, write, engine = [], buckets.write_bucket, Tasks()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buckets, "write_bucket", lambda *bucket: (written.append(bucket[2]), write(*bucket)))
        run = pipeline.curate(config, out, engine, WITH_TOY)
    assert engine.done == 5  # two buckets, their table, the means, digests: nothing of other stages
    assert written == [BUCKET]
    assert usual == {name: (out / name / "manifest.json").stat().st_mtime_ns for name in usual}
    return run


def test_it_is_carried_out_as_the_others_are(finished: Run) -> None:
    manifest = finished.manifest(TOY)
    lengths = np.array([len(str(caption)) for caption in finished.pool.column("caption")])
    cluster = read_columns(finished.at("cluster") / "clusters.parquet")["cluster"]
    assert manifest.details["means"] == pytest.approx([lengths[cluster == k].mean() for k in range(2)])
    assert manifest.rows_in == manifest.rows_out == len(finished.pool)
    assert list(manifest.files) == ["lengths.parquet"]
    assert pipeline.load_run(finished.folder).manifest(TOY) == manifest
    assert not list(finished.folder.glob(f".{TOY}*"))


def test_a_finished_one_is_skipped_and_another_setting_is_another_result(
    config: RunConfig, finished: Run
) -> None:
    before, engine = finished.manifest(TOY), Tasks()
    pipeline.curate(config, finished.folder, engine, WITH_TOY)
    assert engine.done == 0
    words = (*STAGES[:2], CaptionLength("words"), *STAGES[2:])
    pipeline.curate(config, finished.folder, engine, words)
    assert engine.done == 5
    assert finished.manifest(TOY).details["means"] == [3, 3]  # caption of pair-...
    pipeline.curate(config, finished.folder, engine, WITH_TOY)
    assert finished.manifest(TOY).details == before.details


def test_it_is_reported_and_shown(finished: Run) -> None:
    summary = finished.summary()
    assert list(summary["stages"]).index(TOY) == list(summary["stages"]).index("cluster") + 1
    assert TOY in finished.report().read_text(encoding="utf-8")
    console = Console(file=io.StringIO(), width=200)
    print_summary(summary, console)
    assert TOY in console.file.getvalue()  # type: ignore[attr-defined]


def test_it_is_planned(config: RunConfig, tmp_path: Path) -> None:
    planned = plan(config, 300, LocalEngine(), tmp_path, (*STAGES[:2], CaptionLength()))
    cost = planned.cost(TOY)
    assert cost.pairs is not None
    assert cost.seconds is not None
    assert cost.written
    console = Console(file=io.StringIO(), width=200)
    print_plan(planned, console)
    assert TOY in console.file.getvalue()  # type: ignore[attr-defined]
