"""The pipeline: the stages in their order, the rounds, and the summary; what is finished is skipped, so that a run continues."""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from influencespace.config import RunConfig, as_tree, load_config, save_config
from influencespace.core.select import CHOSEN
from influencespace.data.artifacts import Manifest, copy_file, installed_versions, write_json
from influencespace.data.embeddings import rejected_reasons
from influencespace.data.integrity import is_done
from influencespace.data.locations import alone_in, folder_of
from influencespace.data.mirror import here, is_file, shown
from influencespace.data.pair_set import PairSet
from influencespace.data.results import (
    CURATED,
    RESULTS,
    SUMMARY,
    finish_results,
    forget_results,
    reopen_results,
)
from influencespace.data.weight_list import read_weight_list
from influencespace.engine.local import Engine, run_once
from influencespace.errors import InputError
from influencespace.models.encoders import embedding_dimension
from influencespace.report.page import write_report
from influencespace.run import Run, Stage, carry_out, stage_fingerprint
from influencespace.stages.ingest.embed import RATES, Embed
from influencespace.stages.ingest.shards import roles_of, shards_of
from influencespace.stages.ingest.split import Split, pair_sets
from influencespace.stages.proxies.proxies import Proxies
from influencespace.stages.rivals.names import DYNAMIC, list_of
from influencespace.stages.rivals.rivals import Rivals
from influencespace.stages.scoring.cluster import Cluster
from influencespace.stages.scoring.curvature import Curvature
from influencespace.stages.scoring.fairness import Fairness
from influencespace.stages.scoring.influence import Influence
from influencespace.stages.scoring.scoring import make_estimator
from influencespace.stages.selection.redundancy import Redundancy
from influencespace.stages.selection.selection import KeptRows, Selection
from influencespace.stages.training.evaluate import Evaluate
from influencespace.stages.training.train import Train

STAGES: tuple[Stage, ...] = (
    Proxies(),
    Cluster(),
    Redundancy(),
    Curvature(),
    Influence(),
    Fairness(),
    Selection(),
    Rivals(),
    Train(),
    Evaluate(),
)
"""What a round does once the data are embedded and split, in order: a new stage is an entry here."""
MAX_REASONS = 100  # that are named apart in the summary


def data_stages(config: RunConfig) -> tuple[Stage, ...]:
    """What comes before the first round: each role that has data is embedded, then all are split."""
    return (*(Embed(role) for role in roles_of(config)), Split())


def curate(config: RunConfig, out: Path | str, engine: Engine, stages: tuple[Stage, ...] = STAGES) -> Run:
    """Do the whole job into the folder `out`; the finished Run.

    The same call continues a run that was killed. Raises InputError for data or settings that cannot be used, and where
    another run works in the folder.
    """
    folder = folder_of(out, "--out").expanduser().absolute()
    check(config)
    with alone_in(folder):
        open_folder(config, folder)
        return _curate(config, folder, engine, stages)


def _curate(config: RunConfig, out: Path, engine: Engine, stages: tuple[Stage, ...]) -> Run:
    data = Run(folder=out, config=config)
    done = {}
    for stage in data_stages(config):
        if isinstance(stage, Split) and not is_done(out / Split.name, stage_fingerprint(stage, data)[0]):
            forget_results(out)  # of other data, by the same config
        done[str(stage.name)] = carry_out(stage, data, engine)
    rounds = list(_rounds(replace(data, sets=pair_sets(data)), done[Split.name], engine, stages))
    best = min(rounds, key=lambda one: one.target_loss)
    summary = summarise(data, done, rounds, best)
    for fault in reopen_results(out):
        print(f"results: written again, as {fault}", file=sys.stderr, flush=True)
    copy_file(best.run.at("selection") / CURATED, out / CURATED)
    write_json(out / SUMMARY, summary)
    write_report(out)
    of_rounds = {
        (one.run.folder / name).relative_to(out).as_posix(): manifest
        for one in rounds
        for name, manifest in one.stages.items()
    }
    finish_results(out, done | of_rounds, as_tree(config))
    return rounds[0].run


def load_run(folder: Path | str) -> Run:
    """The Run of a folder whose data are embedded and split; raises InputError where it is not so far, or damaged."""
    folder = folder_of(folder, "RUN").expanduser().absolute()
    run = Run(folder=folder, config=None)
    split = run.manifest(Split.name)
    for name in (*split.inputs, Split.name):
        run.check(name)
    config = load_config(folder / "config.yaml")
    return replace(run, config=config, sets=pair_sets(run), inputs={Split.name: split.content})


def open_folder(config: RunConfig, out: Path) -> None:
    """Write the config into the run folder; results of another config are removed, lest they pass for this one's."""
    path = out / "config.yaml"
    before = here(path).read_bytes() if is_file(path) else None
    save_config(config, path)
    if before != path.read_bytes():
        forget_results(out)


def check(config: RunConfig) -> None:
    """Refuse what cannot run before anything is read."""
    data, encoder = config.data, config.embed.encoder
    if not data.pool and data.embeddings is None:
        raise InputError("no data was given: use --data 'shards/*.tar', or data.pool in the config file")
    needs_encoder = data.embeddings is None or data.target or data.test or config.evaluate.classes
    if needs_encoder and not encoder:
        raise InputError(
            "no encoder was given: use --encoder with a folder or hub id, or embed.encoder in the config"
        )
    if config.selection.min_group_share and config.iterate > 1:
        raise InputError(
            f"selection.min_group_share = {config.selection.min_group_share:g} is a share of one round's pairs, and iterate = "
            f"{config.iterate} would prune what it left: set iterate to 1, or min_group_share to 0"
        )
    if DYNAMIC in config.train.methods and (
        config.selection.unit == "cluster" or config.selection.tau_high is not None
    ):
        raise InputError(
            "train.methods has dynamic, which weighs pair by pair: set selection.unit to pair and selection.tau_high to null, or "
            "leave dynamic out"
        )
    make_estimator(config.influence.estimator, config.influence.options, config.curvature)
    for path in filter(None, map(list_of, config.train.methods)):
        read_weight_list(path)
    shards_of(config)
    if encoder:
        embedding_dimension(encoder, config.embed.trust_remote_code)


@dataclass(frozen=True, kw_only=True)
class Round:
    """One pass over the stages."""

    run: Run
    stages: Mapping[str, Manifest]

    @property
    def target_loss(self) -> float:
        """Loss of the curated proxies on the half of the target that chooses."""
        loss: float = self.stages["evaluate"].details["target_loss"]["curated"]
        return loss


def _rounds(data: Run, split: Manifest, engine: Engine, stages: tuple[Stage, ...]) -> Iterator[Round]:
    """Rounds until the target loss stops falling; each sees what the one before kept."""
    config = data.config
    run = replace(data, inputs={Split.name: split.content})
    best = float("inf")
    for number in range(config.iterate):
        this = Round(run=run, stages={str(stage.name): carry_out(stage, run, engine) for stage in stages})
        yield this
        if this.target_loss >= best:
            return
        best = this.target_loss
        if number + 1 < config.iterate:
            everything, kept = run.everything, run.at("selection").with_name("kept.npy")
            left = run_once(engine, KeptRows(everything, run.at("selection") / "curated.parquet", kept))
            run = Run(
                folder=data.folder / f"round-{number + 1}",
                config=_of_what_is_left(config, left / split.details["rows"]["pool"]),
                sets={**run.sets, "everything": everything, "pool": PairSet(everything.folder, kept)},
                inputs={Split.name: split.content, "selection": this.stages["selection"].content},
                previous=run,
            )


def _of_what_is_left(config: RunConfig, share: float) -> RunConfig:
    """The config of a later round: a target size is of the whole pool, of which this share is left."""
    size = config.selection.target_size
    if size is None:
        return config
    return replace(config, selection=replace(config.selection, target_size=min(1.0, size / share)))


def summarise(
    data: Run, embedded: Mapping[str, Manifest], rounds: list[Round], best: Round
) -> dict[str, Any]:
    """Every number of the table, from manifests alone."""
    proxies, selected, evaluated = (
        best.stages[name].details for name in ("proxies", "selection", "evaluate")
    )
    stages = {name.replace("/", " "): manifest for name, manifest in embedded.items()}
    for number, one in enumerate(rounds):
        stages |= {
            name if number == 0 else f"{name} (round {number + 1})": m for name, m in one.stages.items()
        }
    split, roles = embedded[Split.name], {n: m for n, m in embedded.items() if n != Split.name}
    reasons = sum((rejected_reasons(data.at(name)) for name in roles), Counter[str]())
    most_frequent = dict(reasons.most_common(MAX_REASONS))
    if rest := reasons.total() - sum(most_frequent.values()):
        most_frequent["other reasons: see rejected.parquet"] = rest
    return {
        "methods": evaluated["methods"],
        "comparisons": evaluated["comparisons"],
        "target_loss": evaluated["target_loss"],
        "kept_fraction": selected["kept_fraction"],
        "reasons": selected["reasons"],
        "weights": {key: selected[key] for key in (*CHOSEN, "trials")},
        "rows": split.details["rows"],
        "rejected": {name.removeprefix("embed/"): manifest.rejected for name, manifest in roles.items()},
        "rejected_reasons": most_frequent,
        "truncated_captions": sum(int(m.details.get("truncated_captions", 0)) for m in roles.values()),
        "caption_control": selected["caption_control"],
        "exchangeability": selected["exchangeability"],
        "rounds": [{"folder": shown(one.run.folder), "target_loss": one.target_loss} for one in rounds],
        "stages": {
            name: {"seconds": m.seconds, "rows_in": m.rows_in, "rows_out": m.rows_out, "rejected": m.rejected}
            | m.usage
            | {rate: m.details[rate] for rate in RATES if rate in m.details}
            for name, m in stages.items()
        },
        "versions": installed_versions(),
        "seeds": sorted({run["seed"] for run in best.stages["train"].details["runs"]}),
        "notes": [*split.details["notes"], *proxies["warnings"], *selected["warnings"]],
        "paths": {name: shown(data.folder / name) for name in RESULTS},
    }
