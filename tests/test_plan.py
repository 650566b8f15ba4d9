"""The plan: what it says before a run is what a run then does, and what cannot fit is refused."""

import io
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from influencespace import pipeline
from influencespace.config import RunConfig, load_config
from influencespace.data.artifacts import read_manifest
from influencespace.data.readers import list_shards
from influencespace.data.schema import ReadOptions
from influencespace.data.synthetic import WorldConfig, write_world
from influencespace.engine.local import LocalEngine
from influencespace.errors import InputError
from influencespace.models.encoders import embedding_dimension
from influencespace.plan import Plan, plan, print_plan
from influencespace.plan.calibration import STARTS, Calibration, Timing, Watched, extrapolate
from influencespace.plan.choices import most_choices, most_levels
from influencespace.plan.needs import SKETCH_BYTES, Needs
from influencespace.plan.survey import SetSize, Sizes, Survey, survey
from influencespace.plan.table import size
from influencespace.stages.ingest.fit_encoder import FitEncoder

STAGES = [
    *("embed pool", "embed target", "embed test", "split", "proxy", "cluster", "redundancy"),
    *("curvature", "attribute", "fairness", "curate", "train", "evaluate", "report"),
]
SMALL = {
    "proxy.train.dimension": 16,
    "proxy.train.batch_size": 32,
    "proxy.train.steps": 4,
    "proxy.folds": 2,
    "curvature.rank": 8,
    "attribute.budget": 20,
    "attribute.target_budget": 8,
    "attribute.caption_control": 100,
    "train.seeds": [0, 1],
}


class Machine(LocalEngine):
    """A machine of any size."""

    def __init__(self, cores: int = 4, memory: float = 64e9) -> None:
        self._cores, self._memory = cores, int(memory)

    @property
    def cores(self) -> int:
        return self._cores

    @property
    def gpus(self) -> int:
        return 0

    @property
    def memory(self) -> int:
        return self._memory


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small world and an encoder for it."""
    folder = tmp_path_factory.mktemp("plan")
    clean = {"near_duplicates": 0.0, "boilerplate": 0.2}
    splits = {"pretrain": 64, "pool": 600, "target": 80, "test": 80, "shard_size": 100}
    write_world(folder / "world", WorldConfig(captions_per_image=2, **splits, **clean))
    FitEncoder(shards=str(folder / "world" / "pretrain"), out=folder / "encoder", steps=1, seed=0)()
    return folder


def config_of(world: Path, *roles: str, **more: Any) -> RunConfig:
    data = {f"data.{role}": str(world / "world" / role) for role in roles or ("pool", "target", "test")}
    return load_config(None, {**SMALL, **data, "embed.encoder": str(world / "encoder"), **more})


@pytest.fixture(scope="module")
def run_folder(world: Path) -> Path:
    """A finished run."""
    pipeline.run(config_of(world), world / "run", LocalEngine())
    return world / "run"


@pytest.fixture(scope="module")
def planned(world: Path) -> Plan:
    return plan(config_of(world), None, LocalEngine())


def written_by(run: Path, stage: str) -> int:
    if stage == "report":
        files = [run / name for name in ("curated.parquet", "report.html", "summary.json")]
    else:
        files = [path for path in (run / stage.replace(" ", "/")).rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files)


class TestAgainstARealRun:
    def test_the_stages_are_those_of_the_run(self, planned: Plan, run_folder: Path) -> None:
        assert [need.stage for need in planned.stages] == STAGES
        done = {str(path.parent.relative_to(run_folder)) for path in run_folder.rglob("manifest.json")}
        assert done == {name.replace(" ", "/") for name in STAGES if name != "report"}

    def test_pairs_are_exact_where_all_shards_were_indexed(self, planned: Plan, run_folder: Path) -> None:
        for role, found in planned.sizes.surveys.items():
            manifest = read_manifest(run_folder / "embed" / role)
            assert manifest is not None
            assert found.exact
            assert (found.pairs, found.images, found.texts) == (
                manifest.rows_out,
                manifest.details["distinct_images"],
                manifest.details["distinct_texts"],
            )
            assert planned.stage(f"embed {role}").pairs == manifest.rows_out

    def test_the_dimension_is_that_of_the_embeddings(self, planned: Plan, run_folder: Path) -> None:
        manifest = read_manifest(run_folder / "embed" / "pool")
        assert manifest is not None
        assert planned.sizes.dimension == manifest.details["dimension"]

    def test_disk_is_within_a_quarter(self, planned: Plan, run_folder: Path) -> None:
        real = sum(path.stat().st_size for path in run_folder.rglob("*") if path.is_file())
        assert planned.written == pytest.approx(real, rel=0.25)

    @pytest.mark.parametrize("stage", STAGES)
    def test_disk_of_each_stage_is_within_a_quarter(
        self, planned: Plan, run_folder: Path, stage: str
    ) -> None:
        # the headers and notes of small files do not grow with the data
        assert planned.stage(stage).written == pytest.approx(
            written_by(run_folder, stage), rel=0.25, abs=15_000
        )

    def test_roles_without_data_are_cut_as_the_split_does(self, world: Path, tmp_path: Path) -> None:
        config = config_of(world, "pool", **{"split.target_share": 0.4})
        roles = plan(config, None, LocalEngine()).sizes.roles
        embedded = pipeline.embed_roles(config, tmp_path, LocalEngine())
        folders = {role: tmp_path / "embed" / role for role in embedded}
        marks = {role: manifest.fingerprint for role, manifest in embedded.items()}
        done = pipeline.split(folders, marks, config.split, tmp_path / "split", LocalEngine())
        for role, rows in done.details["rows"].items():
            assert roles[role].pairs == pytest.approx(rows, rel=0.15)


class TestSurvey:
    def test_the_beginning_of_many_shards_gives_an_estimate(
        self, world: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shards = list_shards(str(world / "world" / "pool"))
        exact = survey(shards, ReadOptions())
        monkeypatch.setattr("influencespace.plan.survey.INDEX_BYTES", 1.5 * exact.bytes / len(shards))
        estimate = survey(shards, ReadOptions())
        assert (exact.exact, estimate.exact, estimate.indexed) == (True, False, 2)
        assert estimate.bytes == exact.bytes
        assert estimate.pairs == pytest.approx(exact.pairs, rel=0.05)
        assert estimate.row_bytes == pytest.approx(exact.row_bytes, rel=0.2)  # its header is in fewer rows

    def test_of_one_huge_tar_the_beginning_is_read(
        self, world: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shards = list_shards(str(world / "world" / "pool" / "00000.tar"))
        exact = survey(shards, ReadOptions())
        monkeypatch.setattr("influencespace.plan.survey.INDEX_BYTES", exact.bytes / 3)
        estimate = survey(shards, ReadOptions())
        assert not estimate.exact
        assert estimate.pairs == pytest.approx(exact.pairs, rel=0.1)

    def test_parquet_is_counted_too(self, tmp_path: Path) -> None:
        rows = {"image": [b"no picture is opened"] * 40, "caption": [f"number {i}" for i in range(40)]}
        pq.write_table(pa.table(rows), tmp_path / "pairs.parquet")
        found = survey(list_shards(str(tmp_path)), ReadOptions())
        assert (found.pairs, found.images, found.texts, found.exact) == (40, 1, 40, True)

    def test_data_without_a_pair_is_refused(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"image": [b""], "caption": ["no image"]}), tmp_path / "pairs.parquet")
        with pytest.raises(InputError, match="no usable pair"):
            survey(list_shards(str(tmp_path)), ReadOptions())

    @pytest.mark.parametrize(
        ("config", "dimension"),
        [
            (transformers.CLIPConfig(projection_dim=24), 24),
            (transformers.SiglipConfig(text_config={"hidden_size": 40}), 40),
            (transformers.SiglipConfig(text_config={"hidden_size": 40, "projection_size": 48}), 48),
            (transformers.FlavaConfig(projection_dim=20), 20),
        ],
        ids=["clip", "siglip", "siglip with projection", "flava"],
    )
    def test_the_dimension_needs_no_weights(self, tmp_path: Path, config: Any, dimension: int) -> None:
        config.save_pretrained(tmp_path)
        assert embedding_dimension(str(tmp_path)) == dimension

    def test_an_encoder_that_is_no_dual_encoder_is_refused(self, tmp_path: Path) -> None:
        transformers.BertConfig().save_pretrained(tmp_path)
        with pytest.raises(InputError, match="'bert' model, not a dual encoder"):
            embedding_dimension(str(tmp_path))


def sizes_of(pairs: int, dimension: int = 512) -> Sizes:
    found = Survey(
        shards=max(1, pairs // 1000),
        indexed=1,
        bytes=30_000 * pairs,
        pairs=pairs,
        images=pairs,
        texts=pairs,
        row_bytes=80.0,
        uid_bytes=32.0,
        image_bytes=30_000.0,
    )
    few = SetSize(pairs=1000, images=1000)
    roles = {"pool": SetSize(pairs=pairs, images=pairs), "target": few, "test": few}
    return Sizes(surveys=dict.fromkeys(("pool", "target", "test"), found), roles=roles, dimension=dimension)


def needs_of(pairs: int = 100_000, dimension: int = 512, **overrides: Any) -> Needs:
    settings = {name.replace("__", "."): value for name, value in overrides.items()}
    config = load_config(None, {"embed.encoder": "org/model", **settings})
    sizes = sizes_of(pairs, dimension)
    return Needs(config=config, sizes=sizes, choices=most_choices(config, pairs), engine=Machine())


class TestFormulas:
    @pytest.mark.parametrize("rank", [64, 128, 256])
    def test_a_sketch_takes_parameters_times_rank(self, rank: int) -> None:
        needs = needs_of()
        least, need = (
            replace(needs, choices=replace(needs.choices, rank=chosen)).curvature() for chosen in (1, rank)
        )
        parameters = 2 * 512 * 256
        assert need.worker - least.worker <= SKETCH_BYTES * parameters * rank <= need.worker
        assert need.temporary == 6 * 4 * parameters * (rank if rank < 64 else 2 * rank - 32)

    @given(st.integers(10_000, 10**9), st.sampled_from([64, 512, 1024]))
    def test_more_pairs_never_need_less_and_disk_grows_in_proportion(
        self, pairs: int, dimension: int
    ) -> None:
        for small, large in zip(needs_of(pairs, dimension).all(), needs_of(2 * pairs, dimension).all()):
            assert small.stage == large.stage
            for name in ("read", "written", "temporary", "worker", "driver", "work"):
                assert getattr(small, name) <= getattr(large, name), (small.stage, name)
            assert large.written <= 2 * small.written + 1

    def test_the_driver_holds_tasks_but_no_pairs(self) -> None:
        # the number of clusters counts (their sums are merged there), so it is fixed here
        million, hundred = (needs_of(pairs, cluster__k=1000).all() for pairs in (10**6, 10**8))
        for small, large in zip(million, hundred):
            assert large.driver - small.driver < 5 * 10**8, small.stage

    def test_blocks_bound_what_embeddings_take(self) -> None:
        # per pair a worker holds columns of numbers, never its embeddings (4 kB a pair here)
        for small, large in zip(needs_of(10**6).all(), needs_of(2 * 10**6).all()):
            assert (large.worker - small.worker) / 10**6 < 500, small.stage

    def test_more_workers_make_the_longest_path_shorter(self) -> None:
        needs = needs_of(10**6)
        wide = replace(needs, engine=Machine(cores=64, memory=1e12)).all()
        for narrow, broad in zip(needs.all(), wide):
            assert broad.work <= narrow.work
            assert broad.workers >= narrow.workers

    def test_rounds_repeat_the_stages_after_the_split(self) -> None:
        one, three = needs_of().all(), needs_of(iterate=3).all()
        ratios = {a.stage: b.written / a.written for a, b in zip(one, three)}
        assert ratios.pop("report") == ratios.pop("split") == ratios.pop("embed pool") == 1
        assert ratios.pop("embed target") == ratios.pop("embed test") == 1
        assert set(ratios.values()) == {3}

    def test_dynamic_proxies_take_a_run_and_a_pass_over_the_pool_for_each_refresh(self) -> None:
        """16 times the 100 steps at most, so 1600 / 400 - 1 re-weightings of each of three proxies."""
        methods = {"train__methods": ["curated", "dynamic"], "proxy__max_doublings": 4}
        plain = needs_of(train__methods=["curated"], proxy__max_doublings=4).train()
        rare, often = (needs_of(train__refresh=every, **methods) for every in (400, 200))
        assert (rare.runs, rare.refreshes, often.refreshes) == (6, 9, 21)
        never = needs_of(train__refresh=1600, **methods).train()
        assert (never.read, never.worker) == (plain.read, plain.worker)
        assert (never.written, never.work) == (2 * plain.written, 2 * plain.work)
        assert rare.train().read == 10 * plain.read
        assert often.train().work - never.work == pytest.approx(21 / 9 * (rare.train().work - never.work))
        assert rare.train().worker > never.worker

    def test_levels_double_while_the_pool_allows(self) -> None:
        config = load_config(None, {})
        assert most_levels(config, 100) == (1,)
        assert most_levels(config, 20_000) == (4, 8, 16)
        assert most_levels(load_config(None, {"cluster.k": 7}), 20_000) == (7,)


class TestRefusals:
    def test_a_sketch_that_does_not_fit_is_refused_with_numbers(self, world: Path) -> None:
        config = config_of(world, **{"curvature.rank": 1024, "proxy.train.dimension": 2048})
        with pytest.raises(
            InputError, match=r"262,144 parameters x rank 1024 x 60 bytes.* 16\.\d GB"
        ) as error:
            plan(config, None, Machine(memory=8e9))
        assert "8.0 GB" in str(error.value)
        assert "curvature.rank" in str(error.value)
        assert plan(config, None, Machine(memory=200e9)).stage("curvature").worker > 16e9

    def test_more_probes_than_parameters_are_refused(self, world: Path) -> None:
        config = config_of(world, **{"curvature.rank": 512, "proxy.train.dimension": 2})
        with pytest.raises(InputError, match="only 256 parameters"):
            plan(config, None, Machine())

    def test_what_may_not_fit_is_noted(self, world: Path) -> None:
        config = config_of(world, **{"curvature.max_rank": 2**20, "proxy.train.dimension": 256})
        notes = " ".join(plan(config, None, Machine(memory=1.5e9)).notes)
        assert "curvature.max_rank" in notes
        assert "embed pool may take" in notes

    def test_missing_data_and_wrong_paths_are_named(self, world: Path) -> None:
        with pytest.raises(InputError, match="no data was given"):
            plan(load_config(None, {}), None, Machine())
        with pytest.raises(InputError, match="no such file or folder"):
            plan(config_of(world, **{"data.test": "/nowhere/at/all"}), None, Machine())


@pytest.fixture(scope="module")
def calibrated(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    temporary = tmp_path_factory.mktemp("calibration")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(temporary))
        made = plan(config_of(world), 150, LocalEngine())
    assert not list(temporary.iterdir())
    return made


class TestCalibration:
    def test_every_stage_has_a_time(self, calibrated: Plan) -> None:
        assert [need.stage for need in calibrated.stages] == STAGES
        times = [need.seconds for need in calibrated.stages]
        assert all(seconds is not None and seconds >= 0 for seconds in times)
        assert calibrated.seconds == pytest.approx(sum(filter(None, times)))
        assert (calibrated.calibrated, calibrated.stage("train").seconds > 0) == (150, True)

    def test_sizes_stay_those_of_the_whole_data(self, calibrated: Plan, planned: Plan) -> None:
        for before, after in zip(planned.stages, calibrated.stages):
            assert (after.pairs, after.written) == (before.pairs, before.written)
            assert after.worker >= before.worker

    def test_a_limit_that_is_too_small_is_named(self, world: Path) -> None:
        with pytest.raises(InputError, match=r"--limit 10: .*Is the limit too small"):
            plan(config_of(world), 10, LocalEngine())
        with pytest.raises(InputError, match="--limit 0"):
            plan(config_of(world), 0, LocalEngine())

    def test_imported_embeddings_are_sliced_too(self, world: Path, tmp_path: Path) -> None:
        generator = np.random.default_rng(0)
        vectors = [list(row) for row in generator.normal(size=(400, 64)).astype(np.float32)]
        columns = {"uid": [f"{i:032x}" for i in range(400)], "caption": [f"number {i}" for i in range(400)]}
        columns |= {"image_embedding": vectors, "text_embedding": vectors[::-1]}
        pq.write_table(pa.table(columns), tmp_path / "own.parquet")
        config = config_of(world, "target", "test", **{"data.embeddings": str(tmp_path / "own.parquet")})
        made = plan(config, 200, LocalEngine())
        assert made.sizes.surveys["pool"].pairs == 400
        assert made.stage("embed pool").seconds is not None

    @given(st.floats(0.1, 100), st.floats(0, 10), st.integers(1, 1000))
    def test_seconds_grow_with_the_work_and_start_up_does_not(
        self, seconds: float, startup: float, times: int
    ) -> None:
        need = needs_of().train()
        found = Timing(need=need, seconds=seconds + startup, startup=startup, peak=need.worker + 5)
        calibration = Calibration(
            stages={"train": found}, choices=most_choices(load_config(None), 1), start_seconds=2.0
        )
        larger = extrapolate(replace(need, work=times * need.work), calibration)
        assert larger.seconds == pytest.approx(STARTS["train"] * 2.0 + startup + times * seconds)
        assert larger.worker == need.worker + 5

    @pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peaks are read from /proc")
    def test_the_peak_of_a_task_is_seen_after_it_is_over(self) -> None:
        engine = Watched()
        began = engine.moments[0].at
        list(engine.map(lambda: lambda count: np.ones(count).sum(), [10, 25_000_000]))
        ended = engine.moments[-1].at
        grown = engine.peak_between(began, ended) - engine.moments[0].now
        assert 180e6 < grown < 260e6


class TestTable:
    def test_it_fits_a_terminal_and_says_what_is_not_known(self, planned: Plan) -> None:
        stream = io.StringIO()
        print_plan(planned, Console(file=stream, width=80))
        text = stream.getvalue()
        assert max(map(len, text.splitlines())) <= 80
        for stage in STAGES:
            assert stage in text
        assert "…" not in text
        flat = " ".join(text.split())
        assert "pool 1,200, target 160, test 160" in flat
        assert "unknown until calibrated: --limit" in flat

    def test_an_estimate_is_called_one(self, planned: Plan) -> None:
        found = replace(planned.sizes.surveys["pool"], indexed=2)
        surveys = {**planned.sizes.surveys, "pool": found}
        stream = io.StringIO()
        print_plan(
            replace(planned, sizes=replace(planned.sizes, surveys=surveys), calibrated=500),
            Console(file=stream, width=200),
        )
        assert "pool 1,200 (estimated: 2 of 6 shards read)" in stream.getvalue()
        assert "extrapolated from 500 pairs" in stream.getvalue()

    @pytest.mark.parametrize(
        ("count", "text"),
        [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.0 kB"),
            (12_345, "12 kB"),
            (1.5e9, "1.5 GB"),
            (2e15, "2.0 PB"),
        ],
    )
    def test_sizes_are_readable(self, count: float, text: str) -> None:
        assert size(count) == text
