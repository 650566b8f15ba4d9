"""The public API: quick to import, the same results as the pipeline, and every example of its docstrings runs."""

import inspect
import json
import re
import subprocess
import sys
import tarfile
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

import influencespace
from influencespace import InputError, Run, WeightedSampler, curate, load_run, plan, score
from influencespace.config import as_tree
from influencespace.core.metrics import auroc
from influencespace.models.training import HeadsConfig

SMALL = HeadsConfig(steps=40, batch_size=32, dimension=16, learning_rate=0.02)
Embedded = dict[str, np.ndarray]


def examples(thing: Any) -> str:
    """The indented code of a docstring."""
    blocks = re.findall(r"(?:^ {4}.*\n?|^\n)+", inspect.cleandoc(thing.__doc__) + "\n", re.MULTILINE)
    return "\n".join(textwrap.dedent(block) for block in blocks)


@pytest.fixture(scope="module")
def run(small_run: Path) -> Run:
    return load_run(small_run)


@pytest.fixture(scope="module")
def embedded() -> Embedded:
    """200 pairs of which the first 50 have captions of others, and 80 right ones."""
    generator = np.random.default_rng(0)
    maps = generator.normal(size=(2, 6, 24))
    meaning, target = generator.normal(size=(200, 6)), generator.normal(size=(80, 6))
    described = meaning.copy()
    described[:50] = np.roll(meaning[:50], 1, 0)

    def seen(values: np.ndarray, by: int) -> np.ndarray:
        return values @ maps[by] + 0.5 * generator.normal(size=(len(values), 24))

    return {
        "images": seen(meaning, 0),
        "texts": seen(described, 1),
        "target_images": seen(target, 0),
        "target_texts": seen(target, 1),
    }


LAZY = """
import sys
import influencespace
assert not {"torch", "ray", "pyarrow", "numpy"} & set(sys.modules), "importing the package imports a library"
assert set(influencespace.__all__) <= set(dir(influencespace))
for name in influencespace.__all__:
    assert getattr(influencespace, name).__doc__, name
    assert "ray" not in sys.modules, name
try:
    influencespace.nothing
except AttributeError as error:
    print(error)
"""


def test_the_package_imports_nothing_until_a_name_is_asked_for() -> None:
    done = subprocess.run([sys.executable, "-c", LAZY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "module 'influencespace' has no attribute 'nothing'\n"


def test_curate_in_a_plain_loop_finishes_what_is_there(small_run: Path, run: Run) -> None:
    """The same config changes nothing, whether as it is, as its file, or by dotted settings."""
    before = (small_run / "train" / "manifest.json").stat().st_mtime_ns
    for config, settings in ((run.config, {}), (small_run / "config.yaml", {"train.seeds": [0]})):
        again = curate(config, out=small_run, settings=settings, engine="local")
        assert again.config == run.config
        assert again.curated() == run.curated()
        assert again.report() == small_run / "report.html"
    assert (small_run / "train" / "manifest.json").stat().st_mtime_ns == before


def test_paths_and_flags_override_a_config(run: Run) -> None:
    from influencespace.api import resolve

    flags = {"data": [Path("a"), "b"], "target": Path("t"), "test": None, "encoder": "e", "embeddings": None}
    config = resolve(run.config, {"cluster.k": "7", "data.target": "lost"}, flags)
    assert config.data.pool == ("a", "b")
    assert (config.data.target, config.embed.encoder, config.cluster.k) == ("t", "e", 7)
    assert config.data.test == run.config.data.test
    assert as_tree(resolve(None, {}, {})) == as_tree(influencespace.load_config())


def test_a_plan_counts_what_a_run_will_see(run: Run, tmp_path: Path) -> None:
    needs = plan(run.config, limit=0, out=tmp_path)
    assert {role: size.pairs for role, size in needs.sizes.items()} == {"pool": 150, "target": 60, "test": 40}
    assert needs.measured == 0
    assert list(tmp_path.iterdir()) == []


def test_a_run_in_a_store_is_planned_for_the_disk_of_its_copies(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFLUENCESPACE_MIRROR", str(tmp_path))
    assert plan(run.config, limit=0, out="memory://store/run") == plan(run.config, limit=0, out=tmp_path)
    full = SimpleNamespace(free=1)
    monkeypatch.setattr("influencespace.planning.bounds.shutil.disk_usage", {tmp_path: full}.__getitem__)
    with pytest.raises(InputError, match=f"needs .* in {tmp_path}"):
        plan(run.config, limit=0, out="memory://store/run")
    assert list(tmp_path.iterdir()) == []


def test_what_curate_cannot_use_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--out https://host/run: no run and no export can be there"):
        curate(data="x", encoder="y", out="https://host/run", engine="local")
    with pytest.raises(InputError, match="did you mean cluster"):
        curate(data="x", out=tmp_path / "run", settings={"cluster.kk": 1})
    with pytest.raises(InputError, match="no data was given"):
        curate(out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="no finished split stage"):
        load_run(tmp_path)


def test_scores_find_wrong_captions_and_depend_on_the_pairs_alone(embedded: Embedded) -> None:
    scores = score(**embedded, config=SMALL)
    assert scores.shape == (200,)
    assert scores.dtype == np.float64
    assert auroc(-scores, np.arange(200) < 50) > 0.8
    tensors = {name: 3 * torch.from_numpy(rows) for name, rows in embedded.items()}  # of any length
    np.testing.assert_allclose(score(**tensors, config=SMALL), scores, rtol=1e-6, atol=1e-12)
    half = score(**{name: rows.astype(np.float16) for name, rows in embedded.items()}, config=SMALL)
    assert np.corrcoef(half, scores)[0, 1] > 0.99


def test_an_estimator_is_a_name_with_options_or_an_object(embedded: Embedded) -> None:
    from influencespace.estimators.ecif import Ecif

    own = score(**embedded, config=SMALL, options={"role": "own"})
    np.testing.assert_array_equal(score(**embedded, config=SMALL, estimator=Ecif(role="own")), own)
    assert np.isfinite(score(**embedded, config=SMALL, estimator="clip_score")).all()


def test_pairs_of_one_image_are_no_negatives_of_each_other(embedded: Embedded) -> None:
    ids = [f"image {i // 2}" for i in range(200)]
    scores = score(**embedded, config=SMALL, image_ids=ids)
    assert not np.allclose(scores, score(**embedded, config=SMALL))
    numbers = np.arange(200)[::-1] // 2  # other numbers of the same images
    np.testing.assert_array_equal(score(**embedded, config=SMALL, image_ids=1000 + numbers[::-1]), scores)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"images": np.ones(200)}, r"images have shape \(200,\)"),
        ({"texts": np.ones((199, 24))}, "200 images, but 199 texts"),
        ({"target_images": np.ones((80, 9))}, "images have 24 dimensions and target_images 9"),
        ({"target_texts": np.full((80, 24), np.nan)}, "row 0 of target_texts is zero or not finite .80 such"),
        ({"images": np.zeros((200, 24))}, "row 0 of images is zero"),
        ({"image_ids": [1, 2]}, r"image_ids have shape \(2,\)"),
        ({"image_ids": np.zeros(200)}, r"the pool has 1 image\(s\)"),
        ({"estimator": "eciff"}, "there is no estimator 'eciff'"),
        ({"options": {"rol": "own"}}, "does not take .*rol"),
    ],
)
def test_what_cannot_be_scored_is_refused(embedded: Embedded, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        score(**embedded | change, config=SMALL)


@pytest.fixture(scope="module")
def exported(run: Run, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The kept pairs of the run as WebDataset tars."""
    folder = tmp_path_factory.mktemp("exported") / "tars"
    run.export("webdataset", folder, shard_size=50)
    return [str(path) for path in sorted(folder.glob("*.tar"))]


class Captions(torch.utils.data.Dataset[str]):
    """A map-style data set in an order of its own."""

    def __init__(self, run: Run) -> None:
        pairs = run.pool.table.pairs("uid", "caption")[::-1]
        self.uids, self.captions = pairs["uid"].to_pylist(), pairs["caption"].to_pylist()

    def __len__(self) -> int:
        return len(self.uids)

    def __getitem__(self, index: int) -> str:
        return str(self.captions[index])


def test_the_example_of_the_sampler_runs(run: Run, exported: list[str]) -> None:
    """Indices and a WebDataset draw the same pairs, by the weights that the run gave."""
    pytest.importorskip("webdataset")
    dataset = Captions(run)
    names: dict[str, Any] = {"WeightedSampler": WeightedSampler, "run": run, "dataset": dataset}
    names |= {"uids": dataset.uids, "shards": exported}
    exec(examples(WeightedSampler), names)  # our own document
    assert names["epoch"] == 2
    streamed = Counter(str(text.decode()) for _, text in names["samples"])
    assert streamed == Counter(dataset[i] for i in names["sampler"])
    weights = dict(zip(run.curated()["uid"].to_pylist(), run.curated()["weight"].to_pylist()))
    for index, copies in Counter(names["sampler"]).items():
        assert abs(copies - weights[dataset.uids[index]]) < 1


def test_a_plain_reader_of_tars_draws_the_same(run: Run, exported: list[str]) -> None:
    sampler = WeightedSampler.of(run.curated_batches("uid", "weight"))
    sampler.set_epoch(7)

    def samples() -> Iterator[dict[str, Any]]:
        for path in reversed(exported):
            with tarfile.open(path) as tar:
                for member in tar:
                    if member.name.endswith(".json"):
                        yield json.load(tar.extractfile(member))  # type: ignore[arg-type]

    drawn = Counter(sample["uid"] for sample in sampler.stream(samples(), key="uid"))
    uids = run.curated()["uid"].to_pylist()
    assert drawn == Counter(uids[i] for i in sampler)


def test_what_is_curated_comes_in_batches(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from influencespace.data import results

    monkeypatch.setattr(results, "BATCH_ROWS", 32)
    batches = list(run.curated_batches())
    assert max(len(batch) for batch in batches) == 32
    assert pa.Table.from_batches(batches).equals(run.curated())
    (first, *_) = run.curated_batches("uid", "weight")
    assert first.schema.names == ["uid", "weight"]
    with pytest.raises(InputError, match=r"curated.parquet has no column 'wieght'; it has uid, kept, weight"):
        run.curated_batches("wieght")


def test_the_examples_of_scores_and_curation_run(
    run: Run, embedded: Embedded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: dict[str, Any] = {"score": score, **embedded}
    exec(examples(score), names)  # our own document
    assert len(names["best"]) == 200
    assert names["worth"][names["best"][0]] == names["worth"].max()
    calls: list[dict[str, Any]] = []

    def curated(**options: Any) -> Run:
        inspect.signature(curate).bind(**options)
        calls.append(options)
        return run

    def planned(**options: Any) -> Any:
        inspect.signature(plan).bind(**options)
        calls.append(options)
        return plan(run.config, limit=0)

    monkeypatch.setattr(influencespace, "curate", curated)
    for thing in (influencespace, curate, plan):
        exec(examples(thing), {"curate": curated, "plan": planned})  # our own document
    assert [call["data"] for call in calls] == ["pairs", "pairs", "pairs"]
