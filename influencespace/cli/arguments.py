"""Arguments that several commands share, and how their texts are read."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from influencespace.data.locations import alone_in, folder_of
from influencespace.data.mirror import is_folder, shown
from influencespace.errors import InputError

if TYPE_CHECKING:
    from influencespace.run import Run

EXAMPLES = {"--set": "cluster.k=200", "--option": "role=own"}

Address = Annotated[
    str | None,
    typer.Option("--address", help="Ray cluster to work on; without it, RAY_ADDRESS or a local Ray."),
]
Finished = Annotated[str, typer.Argument(metavar="RUN", help="Folder or URL of a finished run.")]
Stored = Annotated[str, typer.Argument(metavar="RUN", help="Folder or URL of a run.")]


def existing_folder(folder: str) -> Path:
    """The folder of a run; raises InputError where there is none."""
    path = folder_of(folder, "RUN").expanduser().absolute()
    if not is_folder(path):
        raise InputError(f"{path}: no such run folder. Is it mistyped?")
    return path


@contextmanager
def finished_run(folder: str) -> Iterator["Run"]:
    """The run in a folder, where no other command works until the block ends; raises InputError where it is not finished."""
    path = folder_of(folder, "RUN").expanduser().absolute()
    from influencespace.data.results import read_summary
    from influencespace.pipeline import load_run

    if not is_folder(path):
        read_summary(path)  # says what is missing, and makes no folder
    with alone_in(path):
        read_summary(path)
        yield load_run(path)


def named_values(given: list[str], flag: str) -> dict[str, str]:
    """KEY=VALUE as often as it was given."""
    values = {}
    for setting in given:
        key, equals, value = setting.partition("=")
        if not (key and equals):
            raise InputError(f"{flag} {setting}: give a name and a value, as in {flag} {EXAMPLES[flag]}")
        values[key] = value
    return values


def options_of(given: list[str]) -> dict[str, Any]:
    """Options of an estimator, their values read as YAML; raises InputError for what is not."""
    from influencespace.data.yaml_text import read_yaml

    values = {}
    for key, value in named_values(given, "--option").items():
        try:
            values[key] = read_yaml(value)
        except ValueError as error:
            raise InputError(f"--option {key}={value} is not valid YAML: {error}") from None
    return values


def number(text: str, flag: str, wanted: str) -> float:
    """A finite number; raises InputError for anything else."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{flag} is {text!r}: give {wanted}")
    return value


def print_paths(paths: dict[str, Path | str]) -> None:
    for name, path in paths.items():
        print(f"{name}: {shown(path)}")
