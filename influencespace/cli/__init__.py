"""The command line: parse, validate, save the resolved config, dispatch."""

import os
import sys
from typing import Any, NoReturn

import typer

from influencespace.cli import runs, tasks
from influencespace.data.mirror import shown
from influencespace.engine.endings import end_on_sigterm, reason_of
from influencespace.errors import InputError

# Click's, whether typer takes the installed one or brings its own.
UsageError: Any = typer.BadParameter.__mro__[1]
INTERRUPTED = 130  # exit code after Ctrl-C

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Find out by influence functions which image-text pairs make a model better, and keep those.",
)
COMMANDS = (
    *(runs.run, runs.demo, runs.plan, runs.sweep, runs.show, runs.verify, runs.repair),
    runs.export,
    *(tasks.score, tasks.detect, tasks.trace, tasks.clean, tasks.coreset, tasks.forget),
)
for command in COMMANDS:
    app.command()(command)


def main() -> None:
    """The console script: what the user has to change is one line and exit code 2, never a traceback."""
    os.environ.setdefault(
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"
    )  # silences a warning of Ray on machines without GPU
    end_on_sigterm()
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
    except Exception as error:
        if not (reason := reason_of(error)):
            raise
        refuse(reason, code=1)


def refuse(reason: str, code: int = 2) -> NoReturn:
    """End with one line for the user: code 2 for what the user has to change, 1 for what died."""
    print(f"error: {shown(' '.join(reason.split()))}", file=sys.stderr)
    sys.exit(code)
