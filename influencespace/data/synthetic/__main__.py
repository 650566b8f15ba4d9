"""Writes a synthetic world: `python -m influencespace.data.synthetic --out DIR --pool 4000 --seed 0`.

There is one option for each field of WorldConfig.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from pydantic import ValidationError

from influencespace.data.synthetic import WorldConfig, write_world
from influencespace.errors import InputError


def main(arguments: list[str] | None = None) -> int:
    """Writes a world; returns the exit code (2 for options that cannot be used)."""
    parser = argparse.ArgumentParser(prog="python -m influencespace.data.synthetic", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    for field in dataclasses.fields(WorldConfig):
        option, kind = "--" + field.name.replace("_", "-"), type(field.default)
        parser.add_argument(option, type=kind, default=field.default, metavar=kind.__name__)
    options = vars(parser.parse_args(arguments))
    try:
        print(write_world(options.pop("out"), WorldConfig(**options)))
    except (InputError, ValidationError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
