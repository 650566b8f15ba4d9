"""What is meant for the person at the keyboard: the one exception, and how options refuse what they do not know."""

from pydantic import ConfigDict

STRICT = ConfigDict(extra="forbid")
"""Of every class of options: an unknown name is refused, not ignored."""


class InputError(ValueError):
    """What the user gave cannot be used: the message names the value, the likely causes and what to change.

    The command line prints it as one line and exits with code 2, without a traceback.
    """
