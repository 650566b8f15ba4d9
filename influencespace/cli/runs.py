"""The commands that make a run, and that read what it left."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from influencespace.cli.arguments import (
    Address,
    Finished,
    Stored,
    existing_folder,
    finished_run,
    named_values,
)
from influencespace.data.locations import alone_in, folder_of, local_folder
from influencespace.data.mirror import shown

if TYPE_CHECKING:
    from influencespace.config import RunConfig
    from influencespace.tasks.verify import Problem

Config = Annotated[Path | None, typer.Argument(help="YAML of a run; flags and --set override it.")]
Out = Annotated[
    str,
    typer.Option(
        "--out",
        metavar="FOLDER",
        help="Run folder, or a URL such as s3://bucket/run; the same command continues what is there.",
    ),
]
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


def resolved(config: Path | None, settings: list[str], **flags: str | None) -> "RunConfig":
    """The config of a file, changed by --set and then by the flags that were given."""
    values = named_values(settings, "--set")
    from influencespace.api import resolve

    return resolve(config, values, flags)


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
    folder = folder_of(out, "--out")
    whole = resolved(
        config, settings, data=data, target=target, test=test, encoder=encoder, embeddings=embeddings
    )
    from influencespace.api import curate
    from influencespace.report.table import print_summary

    print_summary(curate(whole, out=folder, address=address).summary())


def demo(
    out: Out = "runs/demo",
    seed: Annotated[int, typer.Option(help="Seed of the synthetic world and of its encoder.")] = 0,
    address: Address = None,
) -> None:
    """The whole job on a synthetic world with 25 % wrong captions: nothing is downloaded."""
    from influencespace.demo import LOCAL_ONLY, run_demo
    from influencespace.engine.session import start_ray
    from influencespace.report.table import print_summary

    folder = local_folder(out, "--out", LOCAL_ONLY)
    with start_ray(address) as engine:
        print_summary(run_demo(folder, engine, seed=seed).summary())


def plan(
    config: Config = None,
    *,
    out: Annotated[
        str, typer.Option("--out", help="Run folder that is planned for: its disk must hold the files.")
    ] = ".",
    limit: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Pairs of the larger slice that is measured (default 20,000 to 100,000, by the pool); 0 only counts the data.",
        ),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option("--cluster", help="Machines to plan for, e.g. '4x(16 cores, 64 GB, 1xA10G)'."),
    ] = None,
    pairs: Annotated[
        str | None, typer.Option("--pairs", help="Plan for so many pairs like these, e.g. 12.8M.")
    ] = None,
    data: Data = None,
    target: Target = None,
    test: Test = None,
    encoder: Encoder = None,
    embeddings: Embeddings = None,
    settings: Settings = [],  # noqa: B006
    address: Address = None,
) -> None:
    """What a run will need, before anything runs: pairs, GB read and written, memory and time of each stage."""
    whole = resolved(
        config, settings, data=data, target=target, test=test, encoder=encoder, embeddings=embeddings
    )
    from influencespace import api
    from influencespace.planning import print_plan

    made = api.plan(
        whole,
        out=out,
        limit=limit,
        cluster=cluster,
        pairs=pairs,
        address=address,
    )
    print_plan(made)


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
    folder = folder_of(out, "--out").expanduser().absolute()
    whole = resolved(
        config, settings, data=data, target=target, test=test, encoder=encoder, embeddings=embeddings
    )
    from influencespace import pipeline
    from influencespace.api import start
    from influencespace.run import carry_out
    from influencespace.sweep import Sweep, SweepConfig

    pipeline.check(whole)
    with alone_in(folder), start("ray", address) as engine:
        done = pipeline.curate(whole, folder, engine)
        best = carry_out(Sweep(SweepConfig(trials=trials)), done, engine).details
    print("best of {trials} trials: {settings}, {value:.4f} (the run's own: {own:.4f})".format(**best))
    print(shown(f"use it: influencespace run {done.at('sweep') / 'best.yaml'} --out {folder}"))
    print("(embeddings and scores there are used again, and its results replaced)")


def show(folder: Finished) -> None:
    """The table and the paths of a finished run, again."""
    path = folder_of(folder, "RUN").expanduser()
    from influencespace.data.results import read_summary
    from influencespace.report.table import print_summary

    print_summary(read_summary(path))


def verify(folder: Stored) -> None:
    """Read every file of a run, and report those that are not as they were written; exit code 1 where there are any."""
    from influencespace.tasks.verify import verify_run

    path = existing_folder(folder)
    with alone_in(path):
        problems = verify_run(path)
        print_problems(path, problems)
    if problems:
        raise typer.Exit(1)


def repair(folder: Stored, address: Address = None) -> None:
    """Make again what `verify` finds, by the run's own config; the rest stays as it is."""
    from influencespace.api import start
    from influencespace.report.table import print_summary
    from influencespace.tasks.verify import repair_run, verify_run

    path = existing_folder(folder)
    with alone_in(path):
        problems = verify_run(path)
        print_problems(path, problems)
        with start("ray", address) as engine:
            print_summary(repair_run(path, problems, engine).summary())


def print_problems(run: Path, problems: "list[Problem]") -> None:
    from influencespace.tasks.verify import advice, is_finished

    for problem in problems:
        print(shown(f"{problem.fault}: {advice(run, problem)}"))
    if not problems:
        print(f"{shown(run)}: every file is as it was written")
    if not is_finished(run):
        print(
            f"{shown(run)} is not finished: `influencespace repair {shown(run)}`, or the command that began it, continues it"
        )


def export(
    folder: Finished,
    to: Annotated[Literal["npy", "webdataset", "parquet"], typer.Option("--to", help="Format.")],
    out: Annotated[str, typer.Option("--out", metavar="FOLDER", help="Folder or URL to write into.")],
    shard_size: Annotated[int, typer.Option(min=1, help="Pairs in a shard.")] = 10_000,
) -> None:
    """Write the kept pairs as others read them."""
    into = folder_of(out, "--out").expanduser()
    with finished_run(folder) as run:
        manifest = run.export(to, into, shard_size=shard_size)
    print(f"{manifest.rows_out:,} pairs written to {shown(into)}")
