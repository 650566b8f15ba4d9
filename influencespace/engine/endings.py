"""How a run ends that no change of its input mends: one line, whatever died, and the same command continues."""

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

CONTINUES = "the same command continues"
POLL_SECONDS = 1.0


def reason_of(error: BaseException) -> str:
    """The line for an end that is no bug: a full disk, a lost Ray; empty for any other exception."""
    seen: BaseException | None = error
    while seen is not None:
        if getattr(seen, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "[Errno 28]" in str(seen):
            return f"no space is left on a disk: free some, and {CONTINUES} ({_first_line(seen)})"
        if type(seen).__module__.startswith("ray.exceptions") or isinstance(seen, ConnectionError):
            return f"the connection to Ray or to a storage was lost; {CONTINUES} ({_first_line(seen)})"
        seen = seen.__cause__ or seen.__context__
    return ""


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]


def end_on_sigterm() -> None:
    """Let SIGTERM, by which machines are taken back, end this process as Ctrl-C does; a second one is not heard."""

    def interrupt(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, interrupt)


@contextmanager
def watched(dead: Callable[[], str], clean: Callable[[], None]) -> Iterator[None]:
    """End this process with one line and exit code 1 as soon as `dead` names what died; `clean` ends what is left of it.

    Without this, Ray's client waits a minute for its dead server and then ends the process without a word.
    """
    over = threading.Event()

    def watch() -> None:
        while not over.wait(POLL_SECONDS):
            if (name := dead()) and not over.is_set():
                print(f"error: {name} has died; {CONTINUES}", file=sys.stderr, flush=True)
                clean()
                os._exit(1)

    threading.Thread(target=watch, daemon=True, name="watch").start()
    try:
        yield
    finally:
        over.set()
