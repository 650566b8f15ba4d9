"""What the documents say is true: their commands and their Python run, and all that they name exists."""

import contextlib
import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
import typer

import influencespace
from benchmarks.render import RESULTS, rendered
from influencespace.cli import app
from influencespace.config import RunConfig, load_config
from influencespace.core.metrics import auroc
from influencespace.engine.local import LocalEngine
from influencespace.estimators.table import TABLE

ROOT = Path(influencespace.__file__).parents[1]
PACKAGE = ROOT / "influencespace"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
SMALL: dict[str, Any] = {
    "proxy.train.batch_size": 24,
    "proxy.train.steps": 10,
    "proxy.choose_steps": False,
    "proxy.folds": 2,
    "train.seeds": [0],
    "train.methods": ["curated", "everything"],
}
"""Beneath what the documents say: a small run."""

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in a language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """The commands of a page's bash blocks, as lists of words."""
    text = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def plain(page: Path) -> str:
    """A page without its fenced blocks and generated tables."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.sub(r"<!-- (?:table|pivot|short).*?<!-- end -->", "", text, flags=re.DOTALL)


PYTHON = [(page, i) for page in PAGES for i in range(len(blocks(page, "python")))]
README_COMMANDS = [words for words in commands(PAGES[0]) if words[0] == "influencespace"]


def slow_or_not(words: list[str]) -> Any:
    """A case of the README's commands; that of a sweep is slow, and tried on a small world by `tests/e2e` as well."""
    return pytest.param(words, id=" ".join(words), marks=[pytest.mark.slow] if words[1] == "sweep" else [])


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the documents name: shards, an encoder, pictures, a finished run; tests leave the run as it is."""
    from influencespace.data.readers import list_shards, read_shard
    from influencespace.data.schema import Sample
    from influencespace.data.synthetic import WorldConfig, write_world
    from influencespace.stages.ingest.fit_encoder import FitEncoder

    folder = tmp_path_factory.mktemp("workplace")
    world = folder / "world"
    write_world(world, WorldConfig(seed=1, pretrain=100, pool=120, target=60, test=40))
    FitEncoder(shards=str(world / "pretrain"), out=folder / "my-clip", steps=3, seed=0)()
    for role, name in (("pool", "shards"), ("target", "dev"), ("test", "test")):
        (folder / name).symlink_to(world / role)
    for role, name in (("pool", "pairs"), ("target", "target")):
        (folder / name).mkdir()
        for shard in list_shards(str(world / role)):
            for number, sample in enumerate(one for one in read_shard(shard) if isinstance(one, Sample)):
                (folder / name / f"{number:04d}.jpg").write_bytes(sample.image)
                (folder / name / f"{number:04d}.txt").write_text(sample.captions[0])
    (folder / "dog.jpg").write_bytes((folder / "pairs" / "0000.jpg").read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        small_and_local(patch)
        patch.chdir(folder)
        exec(blocks(ROOT / "README.md", "python")[0], {})  # our own document
    (folder / "config.yaml").write_bytes((folder / "runs" / "mine" / "config.yaml").read_bytes())
    gone = influencespace.load_run(folder / "runs" / "mine").curated()["uid"].to_pylist()[:2]
    (folder / "gone.txt").write_text("\n".join(gone))
    return folder


def small_and_local(patch: pytest.MonkeyPatch) -> None:
    """Make runs small, and do them by the plain loop."""

    def small(path: Any = None, overrides: Any = None) -> RunConfig:
        return load_config(path, SMALL | dict(overrides or {}))

    @contextlib.contextmanager
    def local(*_: Any) -> Iterator[LocalEngine]:
        yield LocalEngine()

    import influencespace.api
    import influencespace.config
    import influencespace.engine.session

    for module in (influencespace.api, influencespace.config):
        patch.setattr(module, "load_config", small)
    patch.setattr(influencespace.engine.session, "start_ray", local)


@pytest.fixture
def within(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The workplace as the working directory."""
    small_and_local(monkeypatch)
    monkeypatch.chdir(workplace)
    return workplace


@pytest.mark.e2e
@pytest.mark.parametrize(("page", "number"), PYTHON, ids=[f"{page.name}-{i}" for page, i in PYTHON])
def test_the_python_of_the_documents_runs(within: Path, page: Path, number: int) -> None:
    names: dict[str, Any] = {"__name__": "document"}
    exec(blocks(page, "python")[number], names)  # our own document
    for name in ("worth", "value"):
        if isinstance(scores := names.get(name), np.ndarray):
            assert len(scores) == 120
            assert np.isfinite(scores).all()


@pytest.mark.e2e
@pytest.mark.parametrize("words", map(slow_or_not, README_COMMANDS))
def test_the_commands_of_the_readme_run(within: Path, words: list[str]) -> None:
    if words[1] == "sweep":  # by Ray Tune alone: in a process of its own
        words = [sys.executable, "-m", "influencespace.cli", *words[1:], "--trials", "1"]
        with tempfile.TemporaryDirectory(prefix="is-", dir="/tmp", ignore_cleanup_errors=True) as home:
            own = {"HOME": home, "RAY_TMPDIR": home, "RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": "local"}
            done = subprocess.run(
                words, env={**os.environ, **own}, cwd=within, capture_output=True, text=True, check=False
            )
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        app(words[1:], standalone_mode=False)


@pytest.mark.parametrize("target", ["demo", "test"])
def test_make_knows_the_two_commands(target: str) -> None:
    assert ["make", target] in commands(ROOT / "README.md")
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {"demo": "influencespace demo --out runs/demo", "test": "pytest"}[target] in done.stdout


def test_the_job_of_the_cluster_page_has_the_arguments_that_it_takes() -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("curate", ROOT / "jobs" / "curate.py")
    assert spec is not None
    assert spec.loader is not None
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)
    submitted = [words for words in commands(ROOT / "docs" / "cluster.md") if "jobs/curate.py" in words]
    assert len(submitted) == 2
    for words in submitted:
        job.parser().parse_args(words[words.index("jobs/curate.py") + 1 :])


COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
FLAGS = {name: {flag for one in command.params for flag in one.opts} for name, command in COMMANDS.items()}


@every_page
def test_commands_and_flags_that_a_page_names_exist(page: Path) -> None:
    if page.name == "CHANGELOG.md":
        return  # it names those of earlier versions
    text = page.read_text(encoding="utf-8")
    inline = [shlex.split(code) for code in re.findall(r"`(influencespace [a-z][^`\n]*)`", plain(page))]
    for words in [*inline, *(words for words in commands(page) if words[0] == "influencespace")]:
        assert words[1].rstrip(",") in COMMANDS, words
        assert {word for word in words if word.startswith("--")} <= FLAGS[words[1].rstrip(",")], words
    known = set.union(*FLAGS.values()) | {"--list", "--quick", "--parts"}  # and those of benchmarks/run.py
    assert set(re.findall(r"`(--[a-z][a-z-]*)", text)) <= known


def is_key(names: list[str]) -> bool:
    """Whether a dotted name, or a section by `*`, is one of the config."""
    kind: Any = RunConfig
    for name in names:
        if name == "*":
            return dataclasses.is_dataclass(kind)
        hints = get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        if name not in hints:
            return False
        kind = hints[name]
    return True


@every_page
def test_config_keys_that_a_page_names_exist(page: Path) -> None:
    if page.name == "CHANGELOG.md":
        return
    sections = {field.name for field in dataclasses.fields(RunConfig)}
    named = [one.split(".") for one in re.findall(r"`([a-z_]+(?:\.[a-z_*]+)+)[`:=]", plain(page))]
    named += [one.split(".") for one in re.findall(r"--set ([a-z_.]+)=", page.read_text(encoding="utf-8"))]
    files = {"py", "md", "html", "json", "yaml", "parquet", "txt", "jpg", "j2", "safetensors"}
    keys = [names for names in named if names[0] in sections and names[-1] not in files]
    assert [names for names in keys if not is_key(names)] == []


@every_page
def test_files_and_names_that_a_page_names_exist(page: Path) -> None:
    text = plain(page)
    places = re.findall(r"`((?:[\w.-]+/)*[\w-]+\.(?:py|j2)|(?:[a-z_]+/)+)`", text)
    # folders of a run, and files of the user, are none of ours
    ours = [place for place in places if place.endswith((".py", ".j2")) or (PACKAGE / place).exists()]
    assert [place for place in ours if not ((PACKAGE / place).exists() or (ROOT / place).exists())] == []
    for names, place in re.findall(r"((?:`[\w.]+`(?:, | and )?)+) in `([\w/]+\.py)`", text):
        source = next(base / place for base in (PACKAGE, ROOT) if (base / place).exists()).read_text("utf-8")
        for name in re.findall(r"`([\w.]+)`", names):
            assert re.search(rf"\b{name.rpartition('.')[2]}\b", source), f"{name} is not in {place}"


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", plain(page)):
        path, _, anchor = link.partition("#")
        if path.startswith("https://"):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@every_page
def test_tables_are_those_of_the_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert rendered(text) == text, "run python benchmarks/render.py"


def test_withdrawn_figures_are_listed_and_shown_nowhere() -> None:
    listed = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8").partition("## Withdrawn")[2]
    for path in RESULTS.glob("*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["withdrawn"]:
            lines = " ".join(line for line in listed.splitlines() if f"`{path.stem}`:" in line)
            assert "all parts" in lines or all(f"`{part}`" in lines for part in result["withdrawn"]), (
                path.stem
            )


def test_every_estimator_is_documented() -> None:
    text = (ROOT / "docs" / "estimators.md").read_text(encoding="utf-8")
    assert set(TABLE) <= set(re.findall(r"`(\w+)`", text))


def test_every_section_of_the_config_is_in_the_glossary() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    sections = {field.name for field in dataclasses.fields(RunConfig)} - {"seed"}
    assert [name for name in sections if f"`{name}" not in text] == []


def test_the_stage_of_contributing_is_one_class(within: Path, tmp_path: Path) -> None:
    from influencespace.run import carry_out

    names: dict[str, Any] = {"__name__": "document"}
    exec(
        next(
            code for code in blocks(ROOT / "CONTRIBUTING.md", "python") if "Stage" in code and "class" in code
        ),
        names,
    )
    run = influencespace.load_run("runs/mine")
    manifest = carry_out(names["CountKept"](), run, LocalEngine())
    assert manifest.details["kept"] == sum(run.curated()["kept"].to_pylist())


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
    (code,) = [code for code in blocks(ROOT / "docs" / "estimators.md", "python") if "Pointwise" in code]
    exec(code, names)  # our own document
    worth: Callable[..., np.ndarray] = names["worth"]
    assert auroc(-worth(features, labels, trusted, trusted_labels), wrong) > 0.8
