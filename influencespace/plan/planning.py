"""The plan of a run: sizes by survey and formula, times by calibration, and a refusal of what cannot fit."""

from dataclasses import dataclass, replace

from influencespace.config import RunConfig
from influencespace.engine.local import Engine
from influencespace.errors import InputError
from influencespace.pipeline import check
from influencespace.plan.calibration import calibrate, extrapolate
from influencespace.plan.choices import most_choices
from influencespace.plan.needs import SKETCH_BYTES, Need, Needs
from influencespace.plan.survey import Sizes, survey_all


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will run, and what it needs."""

    sizes: Sizes
    stages: tuple[Need, ...]
    memory: int
    """Bytes that all workers together may take."""
    calibrated: int | None
    """Pairs that times were measured on."""
    notes: tuple[str, ...]

    @property
    def read(self) -> int:
        return sum(need.read for need in self.stages)

    @property
    def written(self) -> int:
        return sum(need.written for need in self.stages)

    @property
    def peak_disk(self) -> int:
        """Bytes on disk at the worst moment."""
        before = [sum(need.written for need in self.stages[:i]) for i in range(len(self.stages))]
        return max(done + need.written + need.temporary for done, need in zip(before, self.stages))

    @property
    def seconds(self) -> float | None:
        """None before a calibration."""
        known = [need.seconds for need in self.stages if need.seconds is not None]
        return sum(known) if len(known) == len(self.stages) else None

    def stage(self, name: str) -> Need:
        return next(need for need in self.stages if need.stage == name)


def plan(config: RunConfig, limit: int | None, engine: Engine) -> Plan:
    """Pairs, bytes, memory, workers and time of each stage of a run of `config`, before anything runs.

    With `limit`, so many pairs really go through all stages on one worker of `engine`, and times are extrapolated.
    Raises InputError for data, an encoder or settings that cannot be used, and for a curvature sketch that does not
    fit into the memory of `engine`.
    """
    check(config)
    sizes = survey_all(config)
    needs = Needs(
        config=config,
        sizes=sizes,
        choices=most_choices(config, sizes.roles["pool"].pairs),
        engine=engine,
    )
    refuse_large_sketch(needs)
    if limit is None:
        stages = needs.all()
    else:
        found = calibrate(config, limit, engine, sizes.surveys["pool"].shards)
        chosen = replace(found.choices, levels=needs.choices.levels)
        if config.proxy.epochs is not None:  # of the whole pool, not of the slice
            chosen = replace(chosen, steps=needs.choices.steps, tried=needs.choices.tried)
        stages = [extrapolate(need, found) for need in replace(needs, choices=chosen).all()]
    return Plan(
        sizes=sizes,
        stages=tuple(stages),
        memory=engine.memory,
        calibrated=limit,
        notes=tuple(notes(needs, stages, limit)),
    )


def refuse_large_sketch(needs: Needs) -> None:
    """Raise InputError unless the probes of a sketch fit: into the parameters, and into the memory of its workers."""
    rank, p = needs.choices.rank, needs.p
    if rank > p:
        raise InputError(
            f"curvature.rank is {rank}, but a proxy has only {p} parameters; choose a smaller rank"
        )
    need = needs.curvature()
    memory = needs.engine.memory
    if need.workers * need.worker > memory:
        raise InputError(
            f"the curvature sketch does not fit: {p:,} parameters x rank {rank} x {SKETCH_BYTES} bytes make "
            f"{need.worker / 1e9:.1f} GB for each of {need.workers} workers, and there are {memory / 1e9:.1f} GB. "
            "Lower curvature.rank or proxy.train.dimension, or use fewer workers"
        )


def notes(needs: Needs, stages: list[Need], limit: int | None) -> list[str]:
    """What the table does not say: what may not fit, and what its figures assume."""
    config, memory = needs.config, needs.engine.memory
    said = [
        f"{need.stage} may take {need.workers * need.worker / 1e9:.1f} GB, more than the {memory / 1e9:.1f} GB there are"
        for need in stages
        if need.workers * need.worker > memory
    ]
    doubled = replace(needs, choices=replace(needs.choices, rank=largest_rank(needs))).curvature()
    if doubled.workers * doubled.worker > memory:
        said.append(
            f"a sketch doubled up to curvature.max_rank {config.curvature.max_rank} would take "
            f"{doubled.worker / 1e9:.1f} GB for each of {doubled.workers} workers; it is doubled only where it must"
        )
    if config.iterate > 1:
        said.append(
            f"figures are for all {config.iterate} rounds; a run ends earlier when the target loss stops falling"
        )
    if config.cluster.k == "auto":
        said.append(
            "clusters are planned as many as there can be; a run settles on fewer, and is then quicker"
        )
    if limit is not None and limit < 4 * config.proxy.train.batch_size:
        said.append(
            f"--limit {limit} fills no whole bank of contexts: give {4 * config.proxy.train.batch_size} or more"
        )
    return said


def largest_rank(needs: Needs) -> int:
    """The rank at which doubling ends."""
    rank = needs.config.curvature.rank
    while 2 * rank <= needs.config.curvature.max_rank:
        rank *= 2
    return rank
