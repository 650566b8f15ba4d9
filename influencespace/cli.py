"""The command line: parse, validate, save the resolved config, dispatch."""

import math
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
import yaml

from influencespace.errors import InputError

if TYPE_CHECKING:
    from influencespace.tasks.choose import Choice

# Click's, whether typer takes the installed one or brings its own.
UsageError: Any = typer.BadParameter.__mro__[1]
INTERRUPTED = 130  # exit code after Ctrl-C
EXAMPLES = {"--set": "cluster.k=200", "--option": "role=own"}

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Find out by influence functions which image-text pairs make a model better, and keep those.",
)

Config = Annotated[Path | None, typer.Argument(help="YAML of a run; flags and --set override it.")]
Out = Annotated[Path, typer.Option("--out", help="Run folder; the same command continues what is there.")]
Settings = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, e.g. --set cluster.k=200."),
]
Address = Annotated[
    str | None,
    typer.Option("--address", help="Ray cluster to work on; without it, RAY_ADDRESS or a local Ray."),
]
Data = Annotated[str | None, typer.Option("--data", help="Pool: path, folder, glob or URL of the shards.")]
Target = Annotated[str | None, typer.Option("--target", help="Pairs whose loss is to fall.")]
Test = Annotated[str | None, typer.Option("--test", help="Pairs on which the result is judged.")]
Encoder = Annotated[str | None, typer.Option("--encoder", help="Folder or hub id of a dual encoder.")]
Embeddings = Annotated[
    str | None, typer.Option("--embeddings", help="Embeddings of the pool that you have already.")
]
Run = Annotated[Path, typer.Argument(help="Folder of a finished run.")]
Options = Annotated[
    list[str],
    typer.Option("--option", metavar="KEY=VALUE", help="Of the estimator, e.g. --option role=own."),
]


def named_values(given: list[str], flag: str) -> dict[str, str]:
    """KEY=VALUE as often as it was given."""
    found = {}
    for setting in given:
        key, equals, value = setting.partition("=")
        if not (key and equals):
            raise InputError(f"{flag} {setting}: give a name and a value, as in {flag} {EXAMPLES[flag]}")
        found[key] = value
    return found


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


@app.command()
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
    from influencespace.report.table import print_summary
    from influencespace.stages.ray_session import start_ray

    resolved = load_config(config, overrides_of(settings, data, target, test, encoder, embeddings))
    pipeline.check(resolved)
    out = out.expanduser().absolute()
    with pipeline.alone_in(out):  # before Ray starts: what is refused is refused at once
        pipeline.open_folder(resolved, out)
        with start_ray(address) as runtime:
            print_summary(pipeline.run(resolved, out, runtime))


@app.command()
def demo(
    out: Out = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of the synthetic world and of its encoder.")] = 0,
    address: Address = None,
) -> None:
    """The whole job on a synthetic world with 25 % wrong captions: nothing is downloaded."""
    from influencespace.demo import run_demo
    from influencespace.report.table import print_summary
    from influencespace.stages.ray_session import start_ray

    with start_ray(address) as runtime:
        print_summary(run_demo(out, runtime, seed=seed))


@app.command()
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
    from influencespace.plan import plan as make_plan
    from influencespace.plan import print_plan
    from influencespace.stages.ray_session import start_ray
    from influencespace.stages.runtime import LocalRuntime

    resolved = load_config(config, overrides_of(settings, data, target, test, encoder, embeddings))
    if limit is None and address is None and "RAY_ADDRESS" not in os.environ:
        print_plan(make_plan(resolved, None, LocalRuntime()))
        return
    with start_ray(address) as runtime:
        print_plan(make_plan(resolved, limit, runtime))


@app.command()
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
    from influencespace.stages.ray_session import start_ray
    from influencespace.sweep import SweepConfig
    from influencespace.sweep import sweep as search

    resolved = load_config(config, overrides_of(settings, data, target, test, encoder, embeddings))
    pipeline.check(resolved)
    out = out.expanduser().absolute()
    with pipeline.alone_in(out), start_ray(address) as runtime:
        pipeline.run(resolved, out, runtime)
        best = search(out, SweepConfig(trials=trials), out / "sweep")
    print(f"best of {best.trials} trials: {best.settings}, {best.value:.4f} (the run's own: {best.own:.4f})")
    print(f"use it: influencespace run {best.config} --out {out}")


@app.command()
def show(folder: Annotated[Path, typer.Argument(help="Run folder.")]) -> None:
    """The table and the paths of a finished run, again."""
    from influencespace.report.table import print_summary, read_summary

    print_summary(read_summary(folder))


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="Run folder.")],
    to: Annotated[Literal["npy", "webdataset", "parquet"], typer.Option("--to", help="Format.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write into.")],
    shard_size: Annotated[int, typer.Option(help="Pairs in a shard.")] = 10_000,
) -> None:
    """Write the kept pairs as others read them."""
    from influencespace.data.exports import export as write
    from influencespace.report.table import read_summary
    from influencespace.stages.progress import progress

    summary = read_summary(folder)
    kept = round(summary["kept_fraction"] * summary["rows"]["pool"])
    with progress("export", kept, "pairs") as bar:
        manifest = write(folder, to, out, shard_size=shard_size, advance=bar.advance)
    print(f"{manifest.rows_out:,} pairs written to {out}")


def options_of(given: list[str]) -> dict[str, Any]:
    """Options of an estimator, their values read as YAML."""
    return {key: yaml.safe_load(value) for key, value in named_values(given, "--option").items()}


@app.command()
def score(
    folder: Run,
    estimator: Annotated[str, typer.Option(help="Name in the table of estimators.")] = "ecif",
    space: Annotated[
        str,
        typer.Option(
            help="Parameters in which influence is taken: `heads` of the student; or of the towers `last-blocks`, `lora`, "
            "`towers` (all), or patterns of names such as '*projection*'."
        ),
    ] = "heads",
    option: Options = [],  # noqa: B006
    address: Address = None,
) -> None:
    """Score every pair of a run's pool by an estimator: higher is more worth keeping."""
    from influencespace.pipeline import alone_in
    from influencespace.stages.ray_session import start_ray
    from influencespace.tasks.score import check_estimator, score_run

    options = options_of(option)
    folder = folder.expanduser().absolute()
    check_estimator(folder, estimator, options, space)
    with alone_in(folder), start_ray(address) as runtime:
        path, manifest = score_run(folder, estimator, options, runtime, space)
    print(f"{manifest.rows_out:,} pairs, {manifest.details['without_score']:,} without a score: {path}")


@app.command()
def detect(
    folder: Run,
    estimator: Annotated[
        str, typer.Option(help="`pooled`, the run's own score, or a name in the table of estimators.")
    ] = "pooled",
    truth: Annotated[
        Path | None, typer.Option(help="Parquet or CSV with the columns uid and wrong, to judge by.")
    ] = None,
    option: Options = [],  # noqa: B006
    address: Address = None,
) -> None:
    """Rank the pairs that look misaligned, with a page of the first ones; precision and recall where truth is given."""
    from influencespace.pipeline import alone_in
    from influencespace.stages.ray_session import start_ray
    from influencespace.stages.runtime import LocalRuntime
    from influencespace.tasks.detect import detect_run, read_truth
    from influencespace.tasks.score import POOLED, check_estimator

    options = options_of(option)
    check_estimator(folder, estimator, options)
    known = None if truth is None else read_truth(truth)
    ray = nullcontext(LocalRuntime()) if estimator == POOLED else start_ray(address)
    with alone_in(folder.expanduser().absolute()), ray as runtime:
        found = detect_run(folder, estimator, options, known, runtime)
    for name, value in found.items():
        if name != "paths":
            print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")
    for name, path in found["paths"].items():
        print(f"{name}: {path}")


@app.command()
def trace(
    folder: Run,
    query: Annotated[
        tuple[Path, str] | None, typer.Option(metavar="IMAGE TEXT", help="A picture file and its caption.")
    ] = None,
    uid: Annotated[
        list[str], typer.Option(help="A pair of the run's test or target set; may be given several times.")
    ] = [],  # noqa: B006
    top: Annotated[int, typer.Option(min=1, help="Training pairs to find, of each kind.")] = 20,
    index: Annotated[
        bool,
        typer.Option(
            "--index",
            help="Look candidates up in stored projected gradients (written at first use): for many queries.",
        ),
    ] = False,
    address: Address = None,
) -> None:
    """Trace an error on a test pair back to the training pairs that caused it, with a page of their pictures."""
    from influencespace.pipeline import alone_in
    from influencespace.stages.ray_session import start_ray
    from influencespace.stages.trace import TraceConfig
    from influencespace.tasks.trace import query_by_picture, query_by_uid, trace_run

    queries = [query_by_uid(folder, one) for one in uid]
    if query is not None:
        queries.append(query_by_picture(folder, *query))
    if not queries:
        raise InputError("nothing to trace: give --query IMAGE TEXT, or --uid UID of a test or target pair")
    folder = folder.expanduser().absolute()
    with alone_in(folder), start_ray(address) as runtime:
        traced = trace_run(folder, queries, TraceConfig(top=top), runtime, index=index)
    for found in traced:
        caption, picture = (found["retrieved"][what] for what in ("caption", "picture"))
        print(
            f"{found['query']}: caption at rank {caption['rank']:,} of {caption['of']:,}, picture at rank "
            f"{picture['rank']:,} of {picture['of']:,}; {len(found['harmful'])} training pairs caused it"
        )
        for name, path in found["paths"].items():
            print(f"{name}: {path}")


@app.command()
def clean(
    folder: Run,
    fraction: Annotated[
        str,
        typer.Option(
            help="Share of pairs to remove, those of lowest score; auto: those the run found harmful."
        ),
    ] = "auto",
) -> None:
    """Clean the pool of a run: write which pairs stay, in the columns of curated.parquet, all that stay with weight 1."""
    from influencespace.tasks.choose import clean as choose

    print_choice(
        choose(
            folder,
            None if fraction == "auto" else number(fraction, "--fraction", "a share such as 0.2, or auto"),
        )
    )


@app.command()
def coreset(
    folder: Run,
    size: Annotated[
        str, typer.Option(help="Share of the whole pool (1 or less), or a number of pairs.")
    ] = "0.1",
    method: Annotated[
        Literal["d2", "k_center", "herding", "diversity"],
        typer.Option(help="d2 weighs influence against likeness; the others look at embeddings alone."),
    ] = "d2",
) -> None:
    """Choose pairs that stand for all that a run kept, the most wanted first."""
    from influencespace.tasks.choose import coreset as choose

    print_choice(
        choose(
            folder, number(size, "--size", "a share such as 0.1, or a number of pairs such as 500"), method
        )
    )


@app.command()
def forget(
    folder: Run,
    uids: Annotated[
        Path,
        typer.Option(
            "--uids", help="Pairs to forget: text with one uid a line, or Parquet with the column uid."
        ),
    ],
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Long steps of the edit: more are nearer to retraining, and slower."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Really train again, and tell the distance and the time.")
    ] = False,
) -> None:
    """Make a run's student forget some pairs, without training it again."""
    from influencespace.pipeline import alone_in
    from influencespace.report.table import read_summary
    from influencespace.tasks.forget import forget_run, read_uids

    named = read_uids(uids)
    read_summary(folder)  # before a folder is made
    with alone_in(folder.expanduser().absolute()):
        found = forget_run(folder, named, steps, check)
    print(f"{found['deleted']:,} pairs forgotten, {found['kept']:,} kept, in {found['seconds']:.2f} s")
    if found["unknown"]:
        print(f"unknown uids, not of this pool: {found['unknown']:,}, listed in forget.json")
    for name in ("gradient_norm_on_kept", "loss_of_deleted"):
        print(f"{name}: {found[name]['before']:.4f} before, {found[name]['after']:.4f} after")
    half = "distance_to_edit_of_half_the_steps"
    for name, value in ({half: found[half]} | found.get("check", {})).items():
        print(f"{name}: {value}")
    for name, path in found["paths"].items():
        print(f"{name}: {path}")


def number(text: str, flag: str, wanted: str) -> float:
    """A finite number; raises InputError for anything else."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{flag} is {text!r}: give {wanted}")
    return value


def print_choice(choice: "Choice") -> None:
    print(f"{choice.chosen:,} of {choice.of:,} pairs: {choice.path}")


def main() -> None:
    """The console script: what the user has to change is one line and exit code 2, never a traceback."""
    os.environ.setdefault(
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"
    )  # silences a warning of Ray on machines without GPU
    try:
        sys.exit(app(standalone_mode=False))
    except InputError as error:
        refuse(str(error))
    except UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            sys.exit(2)
        refuse(error.format_message().replace("Value error, ", ""))  # pydantic's words, by way of typer
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer's answer to Ctrl-C, without a word
            print("interrupted; the same command continues", file=sys.stderr)
        raise


def refuse(told: str) -> NoReturn:
    """End with one line for the user and exit code 2."""
    print(f"error: {' '.join(told.split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
