"""The ordered stages of a run; what is finished is skipped, so the same command continues a killed run."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from influencespace.config import RunConfig, save_config
from influencespace.data.artifacts import Manifest, copy_file, installed_versions, read_manifest, write_json
from influencespace.data.embeddings import rejected_reasons
from influencespace.data.pair_set import PairSet
from influencespace.data.readers import list_shards
from influencespace.data.schema import Shard
from influencespace.engine.local import Engine, run_once
from influencespace.errors import InputError
from influencespace.models.encoders import embedding_dimension
from influencespace.report.page import write_report
from influencespace.stages.finish import STAGES
from influencespace.stages.ingest.embed import embed
from influencespace.stages.ingest.imports import import_embeddings
from influencespace.stages.ingest.split import pair_sets, split
from influencespace.stages.proxies.proxies import ALL, Proxy, proxies
from influencespace.stages.scoring.cluster import cluster
from influencespace.stages.scoring.curvature import curvature
from influencespace.stages.scoring.fairness import fairness
from influencespace.stages.scoring.influence import attribute
from influencespace.stages.selection.evidence import Scores
from influencespace.stages.selection.redundancy import redundancy
from influencespace.stages.selection.selection import Earlier, KeptRows, curate
from influencespace.stages.selection.weighting import CONFIRMED, serves_groups, with_chosen
from influencespace.stages.training.dynamic import Reweighting
from influencespace.stages.training.evaluate import evaluate
from influencespace.stages.training.train import train

ROLES = ("pool", "target", "test")
MAX_REASONS = 100  # that are named apart in the summary
RESULTS = ("curated.parquet", "summary.json", "report.html")


def run(config: RunConfig, out: Path, engine: Engine) -> dict[str, Any]:
    """Do the whole job into the folder `out` and return its summary.

    Raises InputError for data or settings that cannot be used, and where another run works in the folder.
    """
    out = out.expanduser().absolute()
    check(config)
    with alone_in(out):
        open_folder(config, out)
        return _run(config, out, engine)


def _run(config: RunConfig, out: Path, engine: Engine) -> dict[str, Any]:
    embedded = embed_roles(config, out, engine)
    roles_folder = out / "split"
    inputs = {role: manifest.fingerprint for role, manifest in embedded.items()}
    before = read_manifest(roles_folder)
    if before is None or before.inputs != inputs:  # other data, by the same config
        _forget_results(out)
    roles = split(
        {role: out / "embed" / role for role in embedded},
        inputs,
        config.split,
        roles_folder,
        engine,
    )
    sets = pair_sets(roles_folder, roles)
    rounds = list(_rounds(config, out, sets, roles, engine))
    best = min(rounds, key=lambda r: r.target_loss)
    summary = summarise(config, out, embedded, roles, rounds, best)
    copy_file(best.folder / "curate" / "curated.parquet", out / "curated.parquet")
    write_json(out / "summary.json", summary)
    write_report(out)
    return summary


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Make the run folder and keep other runs out of it until the block ends, however it ends.

    A process may enter again. Raises InputError where another run works in it, or where it cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / ".lock", is_singleton=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"another run is working in {out}: wait until it has ended, or give another --out"
        ) from None
    except OSError as error:
        raise InputError(
            f"--out {out} cannot be written ({error.strerror}): it must be a folder, or a path where one can be made"
        ) from None
    try:
        yield
    finally:
        lock.release()


def open_folder(config: RunConfig, out: Path) -> None:
    """Write the config into the run folder; results of another config are removed, lest they pass for this one's."""
    path = out / "config.yaml"
    before = path.read_bytes() if path.exists() else None
    save_config(config, path)
    if before != path.read_bytes():
        _forget_results(out)


def _forget_results(out: Path) -> None:
    for name in RESULTS:
        (out / name).unlink(missing_ok=True)


def check(config: RunConfig) -> None:
    """Refuse what cannot run before anything is read."""
    if not config.data.pool and config.data.embeddings is None:
        raise InputError("no data was given: use --data 'shards/*.tar', or data.pool in the config file")
    needs_encoder = (
        config.data.embeddings is None or config.data.target or config.data.test or config.evaluate.classes
    )
    if needs_encoder and not config.embed.encoder:
        raise InputError(
            "no encoder was given: use --encoder with a folder or hub id, or embed.encoder in the config"
        )
    if config.curate.min_group_share and config.iterate > 1:
        raise InputError(
            f"curate.min_group_share = {config.curate.min_group_share:g} is a share of one round's pairs, and iterate = {config.iterate} would "
            "prune what it left: set iterate to 1, or the floor to 0"
        )
    shards_of(config)
    if config.embed.encoder:
        embedding_dimension(config.embed.encoder, config.embed.trust_remote_code)


def shards_of(config: RunConfig) -> dict[str, list[Shard]]:
    """The shards of every role that has data of its own; all paths are looked up before the first is read."""
    return {
        role: list_shards(spec, config.data.images) for role in ROLES if (spec := getattr(config.data, role))
    }


def embed_roles(config: RunConfig, out: Path, engine: Engine) -> dict[str, Manifest]:
    """Embed the pool, the target and the test set, as far as each has data of its own."""
    listed = shards_of(config)
    listed.setdefault("pool", [])  # embeddings without shards: pairs without pictures
    done = {}
    for role, shards in listed.items():
        folder = out / "embed" / role
        if role == "pool" and config.data.embeddings is not None:
            done[role] = import_embeddings(
                config.data.embeddings, folder, engine, shards=shards, read=config.embed.read
            )
        else:
            done[role] = embed(shards, config.embed, folder, engine)
    return done


@dataclass(frozen=True, kw_only=True)
class Round:
    """One pass of proxy, cluster, score, curate, retrain and evaluate."""

    folder: Path
    stages: dict[str, Manifest]

    @property
    def target_loss(self) -> float:
        """Loss of the curated proxies on the half of the target that chooses."""
        loss: float = self.stages["evaluate"].details["target_loss"]["curated"]
        return loss


def _rounds(
    config: RunConfig, out: Path, sets: dict[str, PairSet], roles: Manifest, engine: Engine
) -> Iterator[Round]:
    everything = sets["pool"]
    pool, earlier = everything, None
    inputs = {"split": roles.fingerprint}
    best = float("inf")
    given, given_rows = config, roles.details["rows"]["pool"]
    for number in range(config.iterate):
        folder = out if number == 0 else out / f"round-{number}"
        this = run_round(config, folder, {**sets, "pool": pool}, inputs, engine, earlier)
        yield this
        if this.target_loss >= best:
            return
        best = this.target_loss
        if number + 1 < config.iterate:
            curated, kept = folder / "curate" / "curated.parquet", folder / "curate" / "kept.npy"
            left = run_once(engine, KeptRows(everything, curated, kept))
            config = _of_what_is_left(given, left / given_rows)
            pool = PairSet(everything.folder, kept)
            earlier = Earlier(pool=everything, quality=out / "proxy" / "quality.parquet", curated=curated)
            inputs = {"split": roles.fingerprint, "curate": this.stages["curate"].fingerprint}


def _of_what_is_left(config: RunConfig, share: float) -> RunConfig:
    """The config of a later round: a target size is of the whole pool, of which this share is left."""
    size = config.curate.target_size
    if size is None:
        return config
    return replace(config, curate=replace(config.curate, target_size=min(1.0, size / share)))


def run_round(
    config: RunConfig,
    folder: Path,
    sets: dict[str, PairSet],
    inputs: dict[str, str],
    engine: Engine,
    earlier: Earlier | None = None,
) -> Round:
    """The stages after the split, on one pool."""
    pool, target, test = (sets[role] for role in ROLES)
    at = {name: folder / name for name in STAGES}
    done: dict[str, Manifest] = {}

    def given(*names: str) -> dict[str, str]:
        return inputs | {name: done[name].fingerprint for name in names}

    done["proxy"] = proxies(pool, target, inputs, config.proxy, at["proxy"], engine)
    rows = done["proxy"].rows_out
    done["cluster"] = cluster(pool, rows, inputs, config.cluster, at["cluster"], engine)
    done["redundancy"] = redundancy(
        pool,
        at["proxy"],
        at["cluster"],
        given("proxy", "cluster"),
        config.redundancy,
        at["redundancy"],
        engine,
    )
    done["curvature"] = curvature(
        pool,
        target,
        config.proxy,
        at["proxy"],
        given("proxy"),
        config.curvature,
        config.target,
        at["curvature"],
        engine,
    )
    done["attribute"] = attribute(
        pool,
        config.proxy,
        at,
        given("proxy", "cluster", "curvature"),
        config.attribute,
        at["attribute"],
        engine,
    )
    done["fairness"] = fairness(
        pool,
        target,
        config.proxy,
        replace(config.curvature, rank=done["curvature"].details["proxies"][ALL]["rank"]),
        at["proxy"],
        at["attribute"],
        serves_groups(config.curate),
        config.attribute.form,
        config.attribute.bucket_size,
        (rows, done["attribute"].details["sample"]),
        given("proxy", "attribute"),
        at["fairness"],
        engine,
    )
    steps = done["proxy"].details["steps"]
    done["curate"] = curate(
        pool,
        target,
        at["attribute"],
        at["redundancy"],
        at["fairness"],
        at["proxy"],
        given("proxy", "redundancy", "attribute", "fairness"),
        config.curate,
        config.proxy,
        steps,
        config.seed,
        at["curate"],
        engine,
        earlier,
    )
    reweighting = Reweighting(
        pool=pool,
        target=target,
        proxies=config.proxy,
        proxy=Proxy(at["proxy"], ALL),
        scores=Scores(at["attribute"]),
        decided=with_chosen(config.curate, done["curate"].details),
    )
    done["train"] = train(
        earlier.pool if earlier else pool,
        at["curate"] / "weights.parquet",
        config.proxy.train,
        steps,
        given("curate"),
        config.train,
        at["train"],
        engine,
        reweighting,
    )
    done["evaluate"] = evaluate(
        test,
        target,
        config.proxy,
        at["train"],
        done["train"].details["runs"],
        at["curate"] / "weights.parquet",
        config.embed,
        given("train"),
        config.evaluate,
        at["evaluate"],
        engine,
    )
    return Round(folder=folder, stages=done)


def summarise(
    config: RunConfig,
    out: Path,
    embedded: dict[str, Manifest],
    roles: Manifest,
    rounds: list[Round],
    best: Round,
) -> dict[str, Any]:
    """Every number of the table, from manifests alone."""
    curated, evaluated = best.stages["curate"].details, best.stages["evaluate"].details
    stages = {f"embed {role}": manifest for role, manifest in embedded.items()} | {"split": roles}
    for number, each in enumerate(rounds):
        stages |= {
            name if number == 0 else f"{name} (round {number + 1})": m for name, m in each.stages.items()
        }
    reasons = sum((rejected_reasons(out / "embed" / role) for role in embedded), Counter[str]())
    most_frequent = dict(reasons.most_common(MAX_REASONS))
    if rest := reasons.total() - sum(most_frequent.values()):
        most_frequent["other reasons: see rejected.parquet"] = rest
    return {
        "methods": evaluated["methods"],
        "comparisons": evaluated["comparisons"],
        "target_loss": evaluated["target_loss"],
        "kept_fraction": curated["kept_fraction"],
        "reasons": curated["reasons"],
        "weights": {key: curated[key] for key in (*CONFIRMED, "trials")},
        "rows": roles.details["rows"],
        "rejected": {role: manifest.rejected for role, manifest in embedded.items()},
        "rejected_reasons": most_frequent,
        "truncated_captions": sum(int(m.details.get("truncated_captions", 0)) for m in embedded.values()),
        "caption_control": curated["caption_control"],
        "rounds": [{"folder": str(r.folder), "target_loss": r.target_loss} for r in rounds],
        "stages": {
            name: {"seconds": m.seconds, "rows_in": m.rows_in, "rows_out": m.rows_out, "rejected": m.rejected}
            for name, m in stages.items()
        },
        "versions": installed_versions(),
        "seeds": list(config.train.seeds),
        "notes": [*roles.details["notes"], *curated["warnings"]],
        "paths": {name: str(out / name) for name in RESULTS},
    }
