"""Commands around the run, by the real command line: imported embeddings, the plan, the sweep, scores of a finished run."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import SMALL, STAGES, Command, run_arguments, run_here, times
from PIL import Image
from scipy.stats import spearmanr

from influencespace.config import load_config
from influencespace.data.embeddings import EmbeddingTable
from influencespace.data.locations import alone_in
from influencespace.data.pair_set import PairSet
from influencespace.sweep import SETTINGS

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="session")
def embeddings(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the run's encoder made of the pool, as a Parquet file of another tool, in another order."""
    pool = PairSet(finished / "embed" / "pool")
    order = np.random.default_rng(0).permutation(len(pool))
    images, texts = pool.inputs(order)
    uids = pool.column("uid")
    columns = {
        "uid": pa.array([uids[i] for i in order]),
        "image_embedding": pa.array(list(images.numpy()), pa.list_(pa.float32())),
        "text_embedding": pa.array(list(texts.numpy()), pa.list_(pa.float32())),
    }
    path = tmp_path_factory.mktemp("embeddings") / "pool.parquet"
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.slow
def test_a_run_on_embeddings_needs_neither_pictures_nor_encoder(
    influencespace: Command, finished: Path, embeddings: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    settings = [part for setting in (*SMALL, "split.target_share=0.4") for part in ("--set", setting)]
    done = influencespace("run", "--embeddings", embeddings, "--out", out, *settings)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "no target was given" in done.stdout.replace("\n", " ")
    curated = pq.read_table(out / "curated.parquet")
    known = set(pq.read_table(finished / "curated.parquet")["uid"].to_pylist())
    assert 100 < len(curated) < len(known)
    assert set(curated["uid"].to_pylist()) < known
    exported = influencespace("export", out, "--to", "npy", "--out", tmp_path / "npy")
    assert exported.returncode == 0, exported.stderr[-3000:]
    assert len(np.load(tmp_path / "npy" / "uids.npy")) == curated["kept"].to_numpy().sum()
    assert (out / "report.html").is_file()


def test_embeddings_are_joined_to_the_pairs_of_the_shards(
    world: Path, finished: Path, embeddings: Path, tmp_path: Path
) -> None:
    """The encoder's own embeddings, given as a file, make the scores that it makes itself."""
    summary = run_here(world, tmp_path, data__embeddings=str(embeddings))
    assert summary["rejected"]["pool"] == 0
    mine, theirs = (pq.read_table(folder / "curated.parquet") for folder in (tmp_path, finished))
    assert mine["uid"] == theirs["uid"]
    single = Path("influence", "influence.parquet")
    influence = [pq.read_table(folder / single)["influence"].to_numpy() for folder in (tmp_path, finished)]
    assert spearmanr(*influence).statistic >= 0.9999
    # embeddings do not say how sharp a picture is, which the pooled score of a run on pictures knows
    scores = [table["score"].to_numpy() for table in (mine, theirs)]
    assert spearmanr(*scores).statistic >= 0.9


@pytest.mark.slow  # two slices through all stages on Ray: minutes
def test_a_plan_is_measured_on_a_slice_and_leaves_nothing(
    influencespace: Command, finished: Path, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_bytes((finished / "config.yaml").read_bytes())
    done = influencespace("plan", config, "--limit", 150)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line.strip()}
    for stage in {stage.partition("/")[0] for stage in STAGES}:
        assert stage in rows
        assert "?" not in rows[stage], "a time is unknown"
    assert "300" in rows["proxies"]
    printed = " ".join(done.stdout.split())
    assert "pool 300, target 80, test 80" in printed
    assert "measured on 150 pairs, made of the embeddings of" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.slow  # tests/test_sweep.py has the search; this is the command
def test_a_sweep_finds_settings_for_a_run(influencespace: Command, finished: Path, tmp_path: Path) -> None:
    config = finished / "config.yaml"
    before = times(finished)
    done = influencespace("sweep", config, "--out", finished, "--trials", 3)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert times(finished) == before
    trials = pq.read_table(finished / "sweep" / "trials.parquet").to_pylist()
    assert len(trials) == 3
    best = min(trials, key=lambda trial: trial["loss"])
    line = next(line for line in done.stdout.splitlines() if line.startswith("best of 3 trials"))
    assert f"{best['loss']:.4f}" in line
    path = finished / "sweep" / "best.yaml"
    assert f"influencespace run {path} --out {finished}" in done.stdout
    chosen, own = load_config(path, {}), load_config(config, {})
    for name in SETTINGS:
        assert getattr(chosen.selection, name) == best[name]
    assert replace(chosen, selection=own.selection) == own
    again = influencespace("sweep", config, "--out", finished, "--trials", 3)
    assert again.returncode == 0, again.stderr[-3000:]
    assert next(line for line in again.stdout.splitlines() if line.startswith("best of")) == line


def test_score_and_detect_work_on_a_finished_run(
    influencespace: Command, world: Path, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    done = influencespace("score", run, "--estimator", "ecif", "--option", "role=own")
    assert done.returncode == 0, done.stderr[-3000:]
    scores = pq.read_table(run / "scores" / "ecif" / "scores.parquet")
    assert scores.column_names == ["uid", "score"]
    assert len(scores) == 300
    done = influencespace("score", run, "--space", "*projection*")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"300 pairs, 0 without a score: {run / 'scores' / 'ecif-projection'}" in done.stdout
    truth = world / "truth" / "pool.parquet"
    done = influencespace("detect", run, "--truth", truth)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((run / "detect" / "pooled" / "detect.json").read_text())
    assert found["known"] == 300
    assert 0 < found["base_rate"] < 1
    assert f"auroc: {found['auroc']:.4f}" in done.stdout
    ranking = pq.read_table(run / "detect" / "pooled" / "ranking.parquet").to_pydict()
    assert ranking["rank"] == list(range(1, 301))
    assert ranking["score"] == sorted(ranking["score"])
    page = (run / "detect" / "pooled" / "detect.html").read_text()
    assert page.count("data:image/jpeg;base64,") > 10
    for arguments, reason in (
        (["score", run, "--estimator", "eciff"], "there is no estimator 'eciff'"),
        (
            ["score", run, "--estimator", "trak", "--space", "towers"],
            "trak cannot score in the space 'towers'",
        ),
        (["detect", run, "--truth", tmp_path / "none.csv"], "cannot be read"),
    ):
        refused = influencespace(*arguments)
        assert refused.returncode == 2
        assert reason in refused.stderr
        assert "Traceback" not in refused.stderr


@pytest.mark.slow  # tests/test_tasks.py has the task; this is the command
def test_an_error_is_traced_back_on_a_finished_run(
    influencespace: Command, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    uid = EmbeddingTable.open(finished / "embed" / "test").pairs("uid")["uid"][0].as_py()
    picture = tmp_path / "picture.png"
    Image.new("RGB", (32, 32), "red").save(picture)
    done = influencespace(
        "trace", run, "--uid", uid, "--query", picture, "a blue circle", "--top", 4, "--index"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{uid}: caption at rank ")
    assert lines[3].startswith(f"{picture}: caption at rank ")
    pages = [Path(line.removeprefix("trace.html: ")) for line in lines if line.startswith("trace.html: ")]
    assert len(pages) == 2
    for page in pages:
        assert "a blue circle" in page.read_text() or uid in page.read_text()
        found = json.loads((page.parent / "trace.json").read_text())
        assert len(found["harmful"]) == len(found["helpful"]) == 4
    for arguments, reason in (
        (["--uid", "nobody"], "uid 'nobody' is in neither the test nor the target set"),
        (["--query", tmp_path / "none.png", "a dog"], "none.png cannot be read"),
        (["--query", picture, ""], "is empty"),
        ([], "nothing to trace: give --query IMAGE TEXT, or --uid UID"),
    ):
        refused = influencespace("trace", run, *arguments)
        assert refused.returncode == 2
        assert reason in refused.stderr
        assert "Traceback" not in refused.stderr


def test_a_file_is_no_run_folder(influencespace: Command, world: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    done = influencespace(*run_arguments(world, tmp_path / "file" / "run"))
    assert done.returncode == 2
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr


def test_two_runs_do_not_share_a_folder(influencespace: Command, world: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with alone_in(out), alone_in(out):  # the process itself may enter again
        done = influencespace(*run_arguments(world, out))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: another command is working in {out}")
    assert not (out / "config.yaml").exists()
