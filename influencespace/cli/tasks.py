"""The commands that ask something of a finished run."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from influencespace.cli.arguments import Address, Finished, finished_run, number, options_of, print_paths
from influencespace.data.mirror import shown
from influencespace.errors import InputError

if TYPE_CHECKING:
    from influencespace.tasks.choose import Choice

Options = Annotated[
    list[str],
    typer.Option("--option", metavar="KEY=VALUE", help="Of the estimator, e.g. --option role=own."),
]


def score(
    folder: Finished,
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
    options = options_of(option)
    from influencespace.engine.session import start_ray
    from influencespace.tasks.score import score_run, scoring_stage

    stage = scoring_stage(estimator, options, space)
    with finished_run(folder) as run, start_ray(address) as engine:
        path, manifest = score_run(run, stage, engine)
    print(
        f"{manifest.rows_out:,} pairs, {manifest.details['without_score']:,} without a score: {shown(path)}"
    )


def detect(
    folder: Finished,
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
    options = options_of(option)
    from influencespace.api import start
    from influencespace.tasks.detect import detect_run, ranking_stage, read_truth

    stage = ranking_stage(estimator, options)
    known = None if truth is None else read_truth(truth)
    with finished_run(folder) as run, start("ray" if stage else "local", address) as engine:
        result = detect_run(run, stage, known, engine)
    paths = result.pop("paths")
    for name, value in result.items():
        print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")
    print_paths(paths)


def trace(
    folder: Finished,
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
    if not uid and query is None:
        raise InputError("nothing to trace: give --query IMAGE TEXT, or --uid UID of a test or target pair")
    from influencespace.engine.session import start_ray
    from influencespace.stages.scoring.trace import TraceConfig
    from influencespace.tasks.trace import query_by_picture, query_by_uid, trace_run

    with finished_run(folder) as run:
        queries = [query_by_uid(run, one) for one in uid]
        if query is not None:
            queries.append(query_by_picture(run, *query))
        with start_ray(address) as engine:
            traced = trace_run(run, queries, TraceConfig(top=top), engine, index=index)
    for result in traced:
        caption, picture = (result["retrieved"][what] for what in ("caption", "picture"))
        print(
            f"{result['query']}: caption at rank {caption['rank']:,} of {caption['of']:,}, picture at rank "
            f"{picture['rank']:,} of {picture['of']:,}; {len(result['harmful'])} training pairs caused it"
        )
        print_paths(result["paths"])


def clean(
    folder: Finished,
    fraction: Annotated[
        str,
        typer.Option(
            help="Share of pairs to remove, those of lowest score; auto: those the run did not keep."
        ),
    ] = "auto",
) -> None:
    """Clean the pool of a run: write which pairs stay, in the columns of curated.parquet, all that stay with weight 1."""
    share = None if fraction == "auto" else number(fraction, "--fraction", "a share such as 0.2, or auto")
    from influencespace.tasks.choose import clean as choose

    with finished_run(folder) as run:
        print_choice(choose(run, share))


def coreset(
    folder: Finished,
    size: Annotated[
        str, typer.Option(help="Share of the whole pool (1 or less), or a number of pairs.")
    ] = "0.1",
    method: Annotated[
        Literal["d2", "k_center", "herding", "diversity"],
        typer.Option(help="d2 weighs influence against likeness; the others look at embeddings alone."),
    ] = "d2",
) -> None:
    """Choose pairs that stand for all that a run kept, the most wanted first."""
    wanted = number(size, "--size", "a share such as 0.1, or a number of pairs such as 500")
    from influencespace.tasks.choose import coreset as choose

    with finished_run(folder) as run:
        print_choice(choose(run, wanted, method))


def forget(
    folder: Finished,
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
        bool, typer.Option("--check", help="Really train again, and report the distance and the time.")
    ] = False,
) -> None:
    """Make a run's proxy forget some pairs, without training it again."""
    from influencespace.tasks.forget import forget_run, read_uids

    named = read_uids(uids)
    with finished_run(folder) as run:
        result = forget_run(run, named, steps, check)
    print(f"{result['deleted']:,} pairs forgotten, {result['kept']:,} kept, in {result['seconds']:.2f} s")
    if result["unknown"]:
        print(f"unknown uids, not of this pool: {result['unknown']:,}, listed in forget.json")
    for name in ("gradient_norm_on_kept", "loss_of_deleted"):
        print(f"{name}: {result[name]['before']:.4f} before, {result[name]['after']:.4f} after")
    half = "distance_to_edit_of_half_the_steps"
    for name, value in ({half: result[half]} | result.get("check", {})).items():
        print(f"{name}: {value}")
    print_paths(result["paths"])
    if result["doubtful"]:
        print(
            "warning: this edit still moves with its number of steps, so it may lie as far from the retrained proxy as the "
            "unedited one: give more --steps, or train again without the pairs (--check reports what that takes)",
            file=sys.stderr,
        )


def print_choice(choice: "Choice") -> None:
    print(f"{choice.chosen:,} of {choice.of:,} pairs: {shown(choice.path)}")
