"""The one exception that is meant for the person at the keyboard."""


class InputError(ValueError):
    """What the user gave cannot be used: the message names the value, the likely causes and what to change.

    The command line prints it as one line and exits with code 2, without a traceback.
    """
