"""The commands that make a run, and that read what it left."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from influencespace.cli.arguments import Address, named_values

Config = Annotated[Path | None, typer.Argument(help="YAML of a run; flags and --set override it.")]
Out = Annotated[Path, typer.Option("--out", help="Run folder; the same command continues what is there.")]
Settings = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, e.g. --set cluster.k=200."),
]
Data = Annotated[str | None, typer.Option("--data", help="Pool: path, folder, glob or URL of the shards.")]
Target = Annotated[str | None, typer.Option("--target", help="Pairs whose loss is to fall.")]
Test = Annotated[str | None, typer.Option("--test", help="Pairs on which the result is judged.")]
Encoder = Annotated[str | None, typer.Option("--encoder", help="Folder or hub id of a dual encoder.")]
Embeddings = Annotated[
    str | None, typer.Option("--embeddings", help="Embeddings of the pool that you have already.")
]


def overrides_of(
    settings: list[str],
    data: str | None,
    target: str | None,
    test: str | None,
    encoder: str | None,
    embeddings: str | None,
) -> dict[str, Any]:
    """Dotted overrides of --set, then those of the flags that were given."""
    flags = {
        "data.pool": data,
        "data.target": target,
        "data.test": test,
        "data.embeddings": embeddings,
        "embed.encoder": encoder,
    }
    given = {key: value for key, value in flags.items() if value is not None}
    return named_values(settings, "--set") | given


def run(
    config: Config = None,
    *,
    out: Out,
    data: Data = None,
    target: Target = None,
    test: Test = None,
    encoder: Encoder = None,
    embeddings: Embeddings = None,
    settings: Settings = [],  # noqa: B006  (typer reads it, nobody writes it)
    address: Address = None,
) -> None:
    """Curate: from shards to a subset, with a model retrained on it and compared."""
    from influencespace import pipeline
    from influencespace.config import load_config
    from influencespace.engine.session import start_ray
    from influencespace.report.table import print_summary

    resolved = load_config(config, overrides_of(settings, data, target, test, encoder, embeddings))
    pipeline.check(resolved)
    out = out.expanduser().absolute()
    with pipeline.alone_in(out):  # before Ray starts: what is refused is refused at once
        pipeline.open_folder(resolved, out)
        with start_ray(address) as engine:
            print_summary(pipeline.run(resolved, out, engine))


def demo(
    out: Out = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of the synthetic world and of its encoder.")] = 0,
    address: Address = None,
) -> None:
    """The whole job on a synthetic world with 25 % wrong captions: nothing is downloaded."""
    from influencespace.demo import run_demo
    from influencespace.engine.session import start_ray
    from influencespace.report.table import print_summary

    with start_ray(address) as engine:
        print_summary(run_demo(out, engine, seed=seed))


def plan(
    config: Config = None,
    *,
    limit: Annotated[int | None, typer.Option(help="Calibrate on a slice of this many pairs.")] = None,
    data: Data = None,
    target: Target = None,
    test: Test = None,
    encoder: Encoder = None,
    embeddings: Embeddings = None,
    settings: Settings = [],  # noqa: B006
    address: Address = None,
) -> None:
    """What a run will need, before anything runs: pairs, GB read and written, memory and time of each stage."""
    from influencespace.config import load_config
    from influencespace.engine.local import LocalEngine
    from influencespace.engine.session import start_ray
    from influencespace.plan import plan as make_plan
    from influencespace.plan import print_plan

    resolved = load_config(config, overrides_of(settings, data, target, test, encoder, embeddings))
    if limit is None and address is None and "RAY_ADDRESS" not in os.environ:
        print_plan(make_plan(resolved, None, LocalEngine()))
        return
    with start_ray(address) as engine:
        print_plan(make_plan(resolved, limit, engine))


def sweep(
    config: Config = None,
    *,
    out: Out,
    trials: Annotated[int, typer.Option(min=1, help="Settings to try.")] = 20,
    data: Data = None,
    target: Target = None,
    test: Test = None,
    encoder: Encoder = None,
    embeddings: Embeddings = None,
    settings: Settings = [],  # noqa: B006
    address: Address = None,
) -> None:
    """Search thresholds and size by Ray Tune, on the scores of the run in --out (which is finished first)."""
    from influencespace import pipeline
    from influencespace.config import load_config
    from influencespace.engine.session import start_ray
    from influencespace.sweep import SweepConfig
    from influencespace.sweep import sweep as search

    resolved = load_config(config, overrides_of(settings, data, target, test, encoder, embeddings))
    pipeline.check(resolved)
    out = out.expanduser().absolute()
    with pipeline.alone_in(out), start_ray(address) as engine:
        pipeline.run(resolved, out, engine)
        best = search(out, SweepConfig(trials=trials), out / "sweep")
    print(f"best of {best.trials} trials: {best.settings}, {best.value:.4f} (the run's own: {best.own:.4f})")
    print(f"use it: influencespace run {best.config} --out {out}")


def show(folder: Annotated[Path, typer.Argument(help="Run folder.")]) -> None:
    """The table and the paths of a finished run, again."""
    from influencespace.report.table import print_summary, read_summary

    print_summary(read_summary(folder))


def export(
    folder: Annotated[Path, typer.Argument(help="Run folder.")],
    to: Annotated[Literal["npy", "webdataset", "parquet"], typer.Option("--to", help="Format.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write into.")],
    shard_size: Annotated[int, typer.Option(min=1, help="Pairs in a shard.")] = 10_000,
) -> None:
    """Write the kept pairs as others read them."""
    from influencespace.data.exports import export as write
    from influencespace.engine.progress import progress
    from influencespace.report.table import read_summary

    summary = read_summary(folder)
    kept = round(summary["kept_fraction"] * summary["rows"]["pool"])
    with progress("export", kept, "pairs") as bar:
        manifest = write(folder, to, out, shard_size=shard_size, advance=bar.advance)
    print(f"{manifest.rows_out:,} pairs written to {out}")
