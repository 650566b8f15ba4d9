"""What all stages take on slices of the data.

Embedding is measured on pictures, as many as keep the encoders at work for a while. What comes after it costs little for a pair,
and starting workers costs seconds: so it is measured on many pairs of stored embeddings, the pool's own, or made of those of the
pictures, lest chance between two small slices is taken for hours of a large pool.
"""

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from influencespace.config import RunConfig
from influencespace.data.pair_set import PairSet
from influencespace.engine.local import Engine
from influencespace.engine.measured import Work, measured
from influencespace.engine.placement import Machine
from influencespace.errors import InputError
from influencespace.pipeline import data_stages
from influencespace.planning.cost_model import Timing
from influencespace.planning.slice_config import smaller
from influencespace.planning.slices import Slicer
from influencespace.run import Run, Stage, carry_out
from influencespace.stages.ingest.embed import Embed
from influencespace.stages.ingest.split import Split, pair_sets

Timings = Mapping[str, Timing]
SECONDS = 20.0
"""That the pictures of the larger slice keep the encoders at work, about."""
FIRST_PICTURES, MIN_PICTURES = 64, 200
"""Pairs by which that is estimated, and that are taken however slow the encoder is."""
OTHERS, FEW_OTHERS = 2000, 400
"""Pairs of target and test in the larger slice and in the smaller one, at most: what influence takes grows with the target,
whatever the pool is."""
WARM_UP = 2000
"""Pairs of stored embeddings that are run first and not measured, at most: imports and cold caches."""


@dataclass(frozen=True, kw_only=True)
class Slice:
    """What all stages took on a slice of the data."""

    config: RunConfig
    pairs: int
    """Of the pool, for all stages after embedding."""
    timings: Timings

    def pairs_of(self, stage: str) -> int:
        """Pairs of the role that a stage works on: of its own for embedding, else of the pool."""
        return self.timings[stage].pairs if stage.startswith("embed/") else self.pairs


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """The embedded pictures of a slice, and what that took."""

    run: Run
    timings: Timings


def measure_slices(
    slicer: Slicer, sizes: Mapping[str, int], home: Path, engine: Engine, stages: Sequence[Stage]
) -> tuple[Slice, Slice]:
    """What all stages took on a small slice and on a large one, of data of so many pairs in each role.

    The slices lie in `home` meanwhile, which all machines must see. Raises InputError where they are too small.
    """
    limit = slicer.sliced.limit
    with tempfile.TemporaryDirectory(prefix=".plan-", dir=home if os.access(home, os.W_OK) else None) as name:
        folder = Path(name)
        try:
            few, many = _embed_pictures(slicer, sizes, folder, engine)
            steps = ("warm-up", min(WARM_UP, smaller(limit)), few), ("small", smaller(limit), many)
            done = [
                _measure(slicer, folder / label, pairs, embedded, engine, stages)
                for label, pairs, embedded in (*steps, ("large", limit, many))
            ]
        except InputError as error:
            raise InputError(f"{error} (in a slice of {limit} pairs: is --limit too small?)") from None
        small, large = (
            replace(one, timings={**one.timings, **embedded.timings})
            for one, embedded in zip(done[1:], (few, many))
        )
        return small, large


def _embed_pictures(
    slicer: Slicer, sizes: Mapping[str, int], folder: Path, engine: Engine
) -> tuple[Embedded, Embedded]:
    """A few pictures of every role that has some, and more of them; how many of the pool, the encoder decides."""

    def embedded(label: str, **limits: int) -> Embedded:
        of = {role: min(limit, sizes[role]) for role, limit in limits.items() if role in slicer.roles}
        config = slicer.pictures(folder / label, of)
        run = Run(folder=folder / label / "run", config=config)
        timings = {}
        for role in of:
            timing = _timed(Embed(role), run, engine)
            timings[timing.stage] = timing
        return Embedded(run=run, timings=timings)

    first = embedded("first", **dict.fromkeys(slicer.roles[:1], FIRST_PICTURES))
    pool = 0
    if timing := first.timings.get("embed/pool"):
        enough = round(SECONDS / seconds_a_pair(timing, engine.machines))
        pool = min(slicer.sliced.limit, max(MIN_PICTURES, enough))
    few = embedded("few", pool=smaller(pool), target=FEW_OTHERS, test=FEW_OTHERS)
    return few, embedded("many", pool=pool, target=OTHERS, test=OTHERS)


def seconds_a_pair(timing: Timing, machines: Sequence[Machine]) -> float:
    """What a pair takes while all encoders are at work: on GPUs where there are any, which readers on cores feed."""
    gpus, cores = (sum(machine.gpus for machine in machines), sum(machine.cpus for machine in machines))
    encoding, reading = timing.working - timing.reading, timing.reading
    seconds = max(encoding / gpus, reading / cores) if gpus >= 1 else (encoding + reading) / cores
    return max(seconds, 1e-6) / timing.pairs


def _measure(
    slicer: Slicer, folder: Path, pairs: int, embedded: Embedded, engine: Engine, stages: Sequence[Stage]
) -> Slice:
    """All stages on stored embeddings of so many pairs, with the target and the test set that are embedded."""
    pool = None if slicer.imported else PairSet(embedded.run.at("embed/pool"))
    config = slicer.stored(folder / "embeddings", embedded.run.config, pool, pairs)
    run = Run(folder=folder / "run", config=config)
    for role in {"target", "test"} & set(slicer.roles):
        shutil.copytree(embedded.run.at(f"embed/{role}"), run.at(f"embed/{role}"))
    timings: dict[str, Timing] = {}
    for stage in data_stages(config):
        timings[str(stage.name)] = _timed(stage, run, engine, timings)
    sources, split = list(timings), run.manifest(Split.name).content
    run = replace(run, sets=pair_sets(run), inputs={Split.name: split})
    for stage in stages:
        timings[str(stage.name)] = _timed(stage, run, engine, timings, sources)
    return Slice(config=config, pairs=timings["embed/pool"].pairs, timings=timings)


def _timed(
    stage: Stage, run: Run, engine: Engine, before: Timings | None = None, sources: Sequence[str] = ()
) -> Timing:
    """What a stage took, which reads what its inputs and `sources` wrote, of the stages before it."""
    works: list[Work] = []
    manifest = carry_out(stage, run, measured(engine, works.append))
    work, before = sum(works, Work()), before or {}
    return Timing(
        stage=manifest.stage,
        pairs=manifest.rows_in,
        read=sum(before[name].written for name in {*manifest.inputs, *sources} & set(before)),
        written=sum(path.stat().st_size for path in run.at(manifest.stage).rglob("*") if path.is_file()),
        memory=work.peak,
        seconds=manifest.seconds,
        working=work.working,
        reading=work.reading,
    )
