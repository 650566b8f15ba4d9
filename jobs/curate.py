"""One curation as a Ray job.

    ray job submit --working-dir . -- python jobs/curate.py --config configs/x.yaml --out /abs/path

The config travels with the working directory; data and the run folder do not: they lie under absolute paths
or URLs that every node sees. Submitting the same command again continues where a lost job stopped.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from influencespace import InputError, curate
from influencespace.cli import refuse
from influencespace.cli.arguments import named_values
from influencespace.data.locations import folder_of
from influencespace.engine.endings import end_on_sigterm, reason_of
from influencespace.report.table import print_summary


def main(arguments: Sequence[str] | None = None) -> int:
    """Curate as the options say; returns the exit code 0; ends with code 2 for what the user has to change."""
    options = parser().parse_args(arguments)
    end_on_sigterm()
    try:
        out, settings = absolute(options.out), named_values(options.set, "--set")
        print_summary(curate(options.config, out=out, settings=settings).summary())
    except InputError as error:
        refuse(str(error))
    except Exception as error:
        if not (reason := reason_of(error)):
            raise
        refuse(reason, code=1)
    return 0


def parser() -> argparse.ArgumentParser:
    """The options of the job."""
    options = argparse.ArgumentParser(description="One curation as a Ray job.")
    options.add_argument("--config", type=Path, required=True, help="YAML of the run")
    options.add_argument("--out", required=True, help="run folder, an absolute path all nodes see, or a URL")
    options.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override the config"
    )
    return options


def absolute(out: str) -> Path:
    """The folder `out`; raises InputError where it is a relative path."""
    path = folder_of(out, "--out")
    if path.is_absolute():
        return path
    raise InputError(
        f"--out {path} is a relative path, but a job runs in a copy of the working directory that is deleted "
        "afterwards. Give the absolute path of a folder that all nodes see, or a URL such as s3://bucket/run."
    )


if __name__ == "__main__":
    sys.exit(main())
