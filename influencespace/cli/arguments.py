"""Arguments that several commands share, and how their texts are read."""

import math
from typing import Annotated

import typer

from influencespace.errors import InputError

EXAMPLES = {"--set": "cluster.k=200", "--option": "role=own"}

Address = Annotated[
    str | None,
    typer.Option("--address", help="Ray cluster to work on; without it, RAY_ADDRESS or a local Ray."),
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


def number(text: str, flag: str, wanted: str) -> float:
    """A finite number; raises InputError for anything else."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{flag} is {text!r}: give {wanted}")
    return value
