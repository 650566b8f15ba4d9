"""The plan: the data are counted, what cannot fit is refused, and what a slice took is scaled to the whole."""

import io
from collections.abc import Sequence
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

from influencespace.config import RunConfig, load_config
from influencespace.data.readers import list_shards
from influencespace.data.schema import ReadOptions
from influencespace.data.synthetic import WorldConfig, write_world
from influencespace.engine import measured as measuring
from influencespace.engine.local import LocalEngine
from influencespace.engine.measured import Usage, Work, measured
from influencespace.engine.placement import Machine, Resources
from influencespace.errors import InputError
from influencespace.models.encoders import embedding_dimension
from influencespace.pipeline import STAGES, curate, data_stages
from influencespace.planning import Plan, plan, print_plan
from influencespace.planning.cost_model import Timing, scaled
from influencespace.planning.dataset_stats import shard_stats
from influencespace.planning.measuring import MIN_PICTURES, seconds_a_pair
from influencespace.planning.planning import usual_limit
from influencespace.planning.stretched import table as embedding_table
from influencespace.planning.stretched import write
from influencespace.planning.table import size
from influencespace.run import Details, Run, Stage, Workers
from influencespace.stages.ingest.embed import Embed
from influencespace.stages.ingest.fit_encoder import FitEncoder

SMALL = {
    "proxy.train.dimension": 16,
    "proxy.train.batch_size": 32,
    "proxy.train.steps": 4,
    "proxy.folds": 2,
    "curvature.rank": 8,
    "influence.max_samples": 100,
    "influence.target_samples": 8,
    "influence.control_samples": 100,
    "train.seeds": [0],
}
LIMIT = 300
TOY_BYTES = 2 * 10**10
COUNTS = st.integers(1, 10**9)


class Toy(Stage):
    """A stage that no table knows."""

    name = "toy"
    needs = ("evaluate",)

    def settings(self, config: Any) -> None:
        return None

    def resources(self, run: Run) -> Resources:
        return Resources(cpus=1, memory=TOY_BYTES)

    def work(self, run: Run, workers: Workers) -> Details:
        (workers.folder / "toy.txt").write_text("x" * 10_000)
        return Details(rows_in=len(run.pool), rows_out=len(run.pool))


class Elsewhere(LocalEngine):
    """The plain loop, on machines of any size."""

    def __init__(self, *machines: Machine) -> None:
        self._machines = machines

    @property
    def machines(self) -> Sequence[Machine]:
        return self._machines


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


def printed(made: Plan, width: int = 80) -> str:
    stream = io.StringIO()
    print_plan(made, Console(file=stream, width=width))
    return stream.getvalue()


@pytest.fixture(scope="module")
def counted(world: Path) -> Plan:
    return plan(config_of(world), 0, LocalEngine(), world / "run")


@pytest.fixture(scope="module")
def made(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A plan of the pipeline with one stage more."""
    home = tmp_path_factory.mktemp("home")
    engine = Elsewhere(Machine(cpus=4, memory=10**12))
    made = plan(config_of(world), LIMIT, engine, home / "run", stages=(*STAGES, Toy()))
    assert not list(home.iterdir())  # neither slices nor a run are left
    return made


@pytest.fixture(scope="module")
def run(world: Path) -> Run:
    """The run that was planned."""
    return curate(config_of(world), world / "run", LocalEngine())


class TestAgainstARealRun:
    def test_the_stages_are_those_of_the_pipeline(self, made: Plan, counted: Plan, world: Path) -> None:
        names = [stage.name for stage in (*data_stages(config_of(world)), *STAGES)]
        assert [cost.stage for cost in counted.costs] == names
        assert [cost.stage for cost in made.costs] == [*names, "toy"]

    def test_pairs_are_exact_where_all_shards_were_read(self, counted: Plan, made: Plan, run: Run) -> None:
        for role, found in counted.sizes.items():
            manifest = run.manifest(f"embed/{role}")
            assert found.exact
            assert (found.pairs, found.dimension) == (manifest.rows_out, manifest.details["dimension"])
            assert counted.cost(f"embed/{role}").pairs == found.pairs
        for name in ("embed/pool", "split", "proxies", "cluster"):
            assert made.cost(name).pairs == run.manifest(name).rows_in

    def test_embeddings_are_counted_and_all_files_are_near(self, counted: Plan, made: Plan, run: Run) -> None:
        bytes_of = sum(path.stat().st_size for path in run.at("embed/pool").rglob("vectors.arrow"))
        assert counted.sizes["pool"].embedding_bytes == pytest.approx(bytes_of, abs=2000)
        for cost in made.costs[:-1]:
            if cost.stage == "influence":  # its samples saturate: planned are more
                continue
            real = sum(path.stat().st_size for path in run.at(cost.stage).rglob("*") if path.is_file())
            assert cost.written == pytest.approx(real, rel=0.5, abs=10_000), cost.stage
        real = sum(path.stat().st_size for path in run.folder.rglob("*") if path.parent != run.folder)
        assert made.written == pytest.approx(real, rel=0.25)

    def test_a_stage_that_no_table_knows_is_planned(self, made: Plan) -> None:
        toy = made.cost("toy")
        assert toy.worker == Resources(cpus=1, memory=TOY_BYTES)
        assert toy.memory == TOY_BYTES
        assert toy.written == pytest.approx(10_000, rel=0.2)  # a constant
        assert toy.pairs == made.cost("proxies").pairs
        assert "toy" in printed(made)

    def test_imported_embeddings_are_sliced_too(
        self, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        generator = np.random.default_rng(0)
        vectors = [list(row) for row in generator.normal(size=(400, 64)).astype(np.float32)]
        columns = {"uid": [f"{i:032x}" for i in range(400)], "caption": [f"number {i}" for i in range(400)]}
        columns |= {"image_embedding": vectors, "text_embedding": vectors[::-1]}
        pq.write_table(pa.table(columns), tmp_path / "own.parquet")
        config = config_of(world, "target", "test", **{"data.embeddings": str(tmp_path / "own.parquet")})
        made = plan(config, 200, LocalEngine(), tmp_path / "run")
        assert (made.sizes["pool"].pairs, made.measured, made.embedded) == (400, 200, 0)
        first, *_ = capsys.readouterr().err.splitlines()
        assert first.startswith(
            "plan: all stages after embedding are carried out on slices of 100 and 200 of 400 pairs"
        )
        assert all(cost.seconds is not None for cost in made.costs)

    def test_embeddings_without_target_need_no_picture_and_no_encoder(self, tmp_path: Path) -> None:
        vectors = np.random.default_rng(0).normal(size=(2000, 16)).astype(np.float32)
        tables = [embedding_table([f"{i}" for i in range(2000)], ["a caption"] * 2000, vectors, vectors)]
        settings = {**SMALL, "data.embeddings": write(tmp_path / "own", tables)}
        made = plan(load_config(None, settings), None, LocalEngine(), tmp_path / "run")
        assert (made.measured, made.embedded) == (2000, 0)
        assert [cost.stage for cost in made.costs][:2] == ["embed/pool", "split"]
        assert all(cost.seconds is not None for cost in made.costs)


class TestScaling:
    @given(few=COUNTS, more=COUNTS, amounts=st.tuples(COUNTS, COUNTS), rounds=st.integers(1, 3))
    def test_the_slice_itself_costs_what_was_measured(
        self, few: int, more: int, amounts: tuple[int, int], rounds: int
    ) -> None:
        small, large = (timing(amount) for amount in amounts)
        pairs = few, few + more, few + more
        cost = scaled(small, large, pairs, worker=Resources(), rounds=rounds)
        assert cost.seconds == pytest.approx(rounds * large.seconds)
        assert (cost.written, cost.read) == (rounds * large.written, rounds * large.read)

    @given(
        constant=st.integers(0, 10**6), slope=st.integers(0, 10**4), few=st.integers(1, 10**4), whole=COUNTS
    )
    def test_a_constant_stays_and_twice_the_pairs_take_twice_the_rest(
        self, constant: int, slope: int, few: int, whole: int
    ) -> None:
        small, large = timing(constant + slope * few), timing(constant + slope * 2 * few)
        once, twice = (
            scaled(small, large, (few, 2 * few, pairs), worker=Resources()) for pairs in (whole, 2 * whole)
        )
        assert once.seconds == pytest.approx(constant + slope * whole)
        assert twice.seconds == pytest.approx(constant + 2 * slope * whole)

    @given(st.tuples(COUNTS, COUNTS), COUNTS, COUNTS, COUNTS)
    def test_more_pairs_never_cost_less(
        self, amounts: tuple[int, int], few: int, more: int, whole: int
    ) -> None:
        small, large = (timing(amount) for amount in amounts)
        costs = [
            scaled(small, large, (few, few + more, pairs), worker=Resources()).seconds or 0.0
            for pairs in (whole, 2 * whole)
        ]
        assert 0 <= costs[0] <= costs[1]

    def test_rounds_repeat_the_stages_after_the_split(self, made: Plan, world: Path) -> None:
        note = printed(replace(made, rounds=3), width=200)
        assert "for all 3 rounds" in note
        assert "rounds" not in printed(made, width=200)


class TestSlices:
    def test_a_pool_of_any_size_has_a_usual_slice(self) -> None:
        pools = (300, 20_000, 500_000, 2_000_000, 12_800_000)
        assert [usual_limit(pairs) for pairs in pools] == [300, 20_000, 20_000, 80_000, 100_000]

    def test_encoders_are_timed_while_all_are_at_work(self) -> None:
        took = replace(timing(100), working=30.0, reading=10.0)
        assert seconds_a_pair(took, [Machine(cpus=2), Machine(cpus=2)]) == pytest.approx(30 / 4 / 100)
        assert seconds_a_pair(took, [Machine(cpus=4, gpus=2)]) == pytest.approx(20 / 2 / 100)
        assert seconds_a_pair(took, [Machine(cpus=1, gpus=8)]) == pytest.approx(10 / 1 / 100)

    def test_target_and_test_set_are_embedded_once_for_all_stages(
        self, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        worked: list[str] = []
        work = Embed.work

        def counted(self: Embed, run: Run, workers: Workers) -> Details:
            worked.append(self.role)
            return work(self, run, workers)

        monkeypatch.setattr(Embed, "work", counted)
        plan(config_of(world), LIMIT, LocalEngine(), tmp_path / "run")
        pictures, stored = ["pool", "pool", "target", "test", "pool", "target", "test"], 3 * ["pool"]
        assert worked == [*pictures, *stored]


def timing(amount: int) -> Timing:
    return Timing(stage="any", pairs=amount, read=amount, written=amount, memory=1, seconds=float(amount))


class TestRefusals:
    def test_data_that_the_disk_cannot_hold(self, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        full = type("Usage", (), {"free": 100_000})()
        monkeypatch.setattr("shutil.disk_usage", lambda path: full)
        with pytest.raises(InputError, match=r"GB free: free some space, or set --out"):
            plan(config_of(world), 0, LocalEngine(), world / "elsewhere")

    def test_workers_that_no_machine_can_hold(self, world: Path) -> None:
        with pytest.raises(
            InputError, match=r"stage toy: a worker needs 1 CPU.* 20\.0 GB.* no machine"
        ) as error:
            plan(config_of(world), 0, Elsewhere(Machine(cpus=4, memory=10**10)), world, stages=(Toy(),))
        assert "10.0 GB" in str(error.value)
        large = Elsewhere(Machine(cpus=1, memory=10**10), Machine(cpus=4, memory=3 * 10**10))
        assert plan(config_of(world), 0, large, world, stages=(Toy(),)).cost("toy").memory == TOY_BYTES

    def test_a_limit_that_is_too_small_is_named(self, world: Path) -> None:
        with pytest.raises(InputError, match="--limit 10: give 0 to count only, or 64"):
            plan(config_of(world), 10, LocalEngine())
        config = config_of(world, "pool", **{"split.target_share": 0.05})
        with pytest.raises(InputError, match="slice of 64 pairs: is --limit too small"):
            plan(config, 64, LocalEngine(), world)

    def test_data_that_cannot_be_used(self, world: Path) -> None:
        with pytest.raises(InputError, match="no data was given"):
            plan(load_config(None, {}), 0, LocalEngine())
        with pytest.raises(InputError, match="no such file or folder"):
            plan(config_of(world, **{"data.test": "/nowhere/at/all"}), 0, LocalEngine())


class TestDatasetStats:
    def test_the_beginning_of_many_shards_gives_an_estimate(
        self, world: Path, monkeypatch: pytest.MonkeyPatch, counted: Plan
    ) -> None:
        shards = list_shards(str(world / "world" / "pool"))
        exact = shard_stats(shards, ReadOptions(), 64)
        monkeypatch.setattr(
            "influencespace.planning.dataset_stats.INDEX_BYTES", 1.5 * exact.bytes / len(shards)
        )
        estimate = shard_stats(shards, ReadOptions(), 64)
        assert (exact.exact, estimate.exact, estimate.shards_read) == (True, False, 2)
        assert estimate.bytes == exact.bytes
        assert estimate.pairs == pytest.approx(exact.pairs, rel=0.05)
        sizes = {**counted.sizes, "pool": estimate}
        assert f"pool {estimate.pairs:,} (estimated: 2 of 6" in printed(replace(counted, sizes=sizes), 200)

    def test_of_one_huge_tar_the_beginning_is_read(
        self, world: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shards = list_shards(str(world / "world" / "pool" / "00000.tar"))
        exact = shard_stats(shards, ReadOptions(), 64)
        monkeypatch.setattr("influencespace.planning.dataset_stats.INDEX_BYTES", exact.bytes / 3)
        estimate = shard_stats(shards, ReadOptions(), 64)
        assert not estimate.exact
        assert estimate.pairs == pytest.approx(exact.pairs, rel=0.1)

    def test_parquet_is_counted_too(self, tmp_path: Path) -> None:
        rows = {"image": [b"no picture is opened"] * 40, "caption": [f"number {i}" for i in range(40)]}
        pq.write_table(pa.table(rows), tmp_path / "pairs.parquet")
        found = shard_stats(list_shards(str(tmp_path)), ReadOptions(), 64)
        assert (found.pairs, found.exact) == (40, True)

    def test_data_without_a_pair_is_refused(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"image": [b""], "caption": ["no image"]}), tmp_path / "pairs.parquet")
        with pytest.raises(InputError, match="no usable pair"):
            shard_stats(list_shards(str(tmp_path)), ReadOptions(), 64)

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


class TestTable:
    def test_it_fits_a_terminal_and_shows_what_is_not_known(self, made: Plan, counted: Plan) -> None:
        for one in (made, counted):
            text = printed(one)
            assert max(map(len, text.splitlines())) <= 80
            assert "…" not in text
            for cost in one.costs:
                assert cost.stage.replace("/", " ") in text
            assert "pool 1,200, target 160, test 160" in " ".join(text.split())
        assert "Nothing was measured:" in printed(counted)
        assert made.measured == LIMIT >= made.embedded >= MIN_PICTURES
        assert f"measured on {LIMIT} pairs, made of the embeddings of {made.embedded} pairs" in printed(
            made, 300
        )

    @pytest.mark.parametrize(
        ("count", "text"),
        [
            (None, "?"),
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.0 kB"),
            (12_345, "12 kB"),
            (1.5e9, "1.5 GB"),
            (2e15, "2.0 PB"),
        ],
    )
    def test_sizes_are_readable(self, count: float | None, text: str) -> None:
        assert size(count) == text


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from /proc")
def test_the_peak_of_a_task_is_measured_and_its_result_is_kept() -> None:
    works: list[Work] = []
    engine = measured(LocalEngine(), works.append)
    assert isinstance(engine, LocalEngine)
    results = list(engine.map(lambda: lambda count: np.ones(count).sum(), [10, 25_000_000, 10]))
    assert results == [10, 25_000_000, 10]
    peaks = [work.peak for work in works]
    assert 180e6 < peaks[1] - peaks[0] < 260e6
    assert peaks[2] < peaks[1]
    assert all(work.working > 0 == work.reading for work in works)
    with engine.pool(lambda: lambda task, shared: task + shared) as pool:
        assert pool.fold([1, 2, 3], lambda one, other: one + other, shared=10) == 36
        assert pool.run(lambda: 7) == 7
    assert len(works) == 5

    def read() -> Any:
        return lambda task: iter(range(task))

    assert list(engine.stream(read, [2, 3], lambda: lambda item: -item)) == [0, -1, 0, -1, -2]
    assert len(works) == 10
    assert all(work.working > work.reading > 0 for work in works[5:])
    assert all(work.reader_peak > 0 for work in works[5:])


def test_usage_is_the_share_of_all_places_for_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    took = Work(peak=500, working=2.0)
    monkeypatch.setattr(measuring, "_measure", lambda call, *arguments: (call(*arguments), took))
    usage = Usage(Elsewhere(Machine(cpus=4, memory=100), Machine(cpus=2, memory=10)))
    assert usage.within(1.0) == {}
    list(usage.engine.map(lambda: str, range(3), resources=Resources(cpus=2)))  # three places
    assert usage.within(10.0) == {"busy": 0.2, "peak_memory": 500}
    list(usage.engine.map(lambda: str, range(3), resources=Resources(memory=50)))  # two
    assert usage.within(10.0)["busy"] == 0.5

    def read() -> Any:
        return lambda task: iter(range(task))

    list(usage.engine.stream(read, [1], lambda: str, resources=Resources(cpus=2)))
    # a reader and a worker at two seconds each, in three places
    assert usage.within(10.0) == {"busy": 0.6333, "peak_memory": 500, "reader_peak_memory": 500}
