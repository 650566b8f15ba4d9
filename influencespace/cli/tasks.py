"""The commands that ask something of a finished run."""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
import yaml

from influencespace.cli.arguments import Address, named_values, number
from influencespace.errors import InputError

if TYPE_CHECKING:
    from influencespace.tasks.choose import Choice

Run = Annotated[Path, typer.Argument(help="Folder of a finished run.")]
Options = Annotated[
    list[str],
    typer.Option("--option", metavar="KEY=VALUE", help="Of the estimator, e.g. --option role=own."),
]


def options_of(given: list[str]) -> dict[str, Any]:
    """Options of an estimator, their values read as YAML; raises InputError for what is none."""
    found = {}
    for key, value in named_values(given, "--option").items():
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"--option {key}={value} is no YAML: {' '.join(str(error).split())}") from None
    return found


def score(
    folder: Run,
    estimator: Annotated[str, typer.Option(help="Name in the table of estimators.")] = "ecif",
    space: Annotated[
        str,
        typer.Option(
            help="Parameters in which influence is taken: `heads` of the proxy; or of the towers `last-blocks`, `lora`, "
            "`towers` (all), or patterns of names such as '*projection*'."
        ),
    ] = "heads",
    option: Options = [],  # noqa: B006
    address: Address = None,
) -> None:
    """Score every pair of a run's pool by an estimator: higher is more worth keeping."""
    from influencespace.engine.session import start_ray
    from influencespace.pipeline import alone_in
    from influencespace.tasks.score import check_estimator, score_run

    options = options_of(option)
    folder = folder.expanduser().absolute()
    check_estimator(folder, estimator, options, space)
    with alone_in(folder), start_ray(address) as engine:
        path, manifest = score_run(folder, estimator, options, engine, space)
    print(f"{manifest.rows_out:,} pairs, {manifest.details['without_score']:,} without a score: {path}")


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
    from influencespace.engine.local import LocalEngine
    from influencespace.engine.session import start_ray
    from influencespace.pipeline import alone_in
    from influencespace.tasks.detect import detect_run, read_truth
    from influencespace.tasks.score import POOLED, check_estimator

    options = options_of(option)
    check_estimator(folder, estimator, options)
    known = None if truth is None else read_truth(truth)
    ray = nullcontext(LocalEngine()) if estimator == POOLED else start_ray(address)
    with alone_in(folder.expanduser().absolute()), ray as engine:
        found = detect_run(folder, estimator, options, known, engine)
    for name, value in found.items():
        if name != "paths":
            print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")
    for name, path in found["paths"].items():
        print(f"{name}: {path}")


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
    from influencespace.engine.session import start_ray
    from influencespace.pipeline import alone_in
    from influencespace.stages.scoring.trace import TraceConfig
    from influencespace.tasks.trace import query_by_picture, query_by_uid, trace_run

    queries = [query_by_uid(folder, one) for one in uid]
    if query is not None:
        queries.append(query_by_picture(folder, *query))
    if not queries:
        raise InputError("nothing to trace: give --query IMAGE TEXT, or --uid UID of a test or target pair")
    folder = folder.expanduser().absolute()
    with alone_in(folder), start_ray(address) as engine:
        traced = trace_run(folder, queries, TraceConfig(top=top), engine, index=index)
    for found in traced:
        caption, picture = (found["retrieved"][what] for what in ("caption", "picture"))
        print(
            f"{found['query']}: caption at rank {caption['rank']:,} of {caption['of']:,}, picture at rank "
            f"{picture['rank']:,} of {picture['of']:,}; {len(found['harmful'])} training pairs caused it"
        )
        for name, path in found["paths"].items():
            print(f"{name}: {path}")


def clean(
    folder: Run,
    fraction: Annotated[
        str,
        typer.Option(
            help="Share of pairs to remove, those of lowest score; auto: those the run did not keep."
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
    """Make a run's proxy forget some pairs, without training it again."""
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
    if found["doubtful"]:
        print(
            "warning: this edit still moves with its number of steps, so it may lie as far from the retrained proxy as the "
            "unedited one: give more --steps, or train again without the pairs (--check tells what that takes)",
            file=sys.stderr,
        )


def print_choice(choice: "Choice") -> None:
    print(f"{choice.chosen:,} of {choice.of:,} pairs: {choice.path}")
