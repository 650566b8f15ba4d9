"""Progress of one stage: tqdm's bar on a terminal, a plain line every ten seconds elsewhere."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

from tqdm import tqdm

LINE_SECONDS = 10.0
LINE = "{desc}: {n:,} of {total:,}{unit}, {rate_noinv_fmt}, {remaining} left"


class Bar(Protocol):
    """Something that is shown how far the work is."""

    def advance(self, count: int = 1) -> None:
        """`count` more units are done."""


class _Bar:
    def __init__(self, shown: "tqdm[None]") -> None:
        self._shown = shown

    def advance(self, count: int = 1) -> None:
        self._shown.update(count)


class _Lines:
    """A stream on which every state of a bar is a line of its own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._last = stream, ""

    def write(self, text: str) -> None:
        text = text.strip("\r\n ")
        if text and text != self._last:
            self._stream.write(f"{text}\n")
        self._last = text or self._last

    def flush(self) -> None:
        self._stream.flush()


@contextmanager
def progress(stage: str, total: int, unit: str = "pairs", stream: TextIO | None = None) -> Iterator[Bar]:
    """Show rate and time left of `stage` on `stream` (default: stderr) until the block ends."""
    stream = stream or sys.stderr
    plain = not stream.isatty()
    shown: tqdm[None] = tqdm(
        desc=stage,
        total=total,
        unit=f" {unit}",
        file=_Lines(stream) if plain else stream,
        bar_format=LINE if plain else None,
        mininterval=LINE_SECONDS if plain else 0.1,
        maxinterval=LINE_SECONDS,
        delay=1e-9 if plain else 0,  # no line before the first unit
    )
    with shown:
        yield _Bar(shown)


def duration(seconds: float) -> str:
    """Seconds as people write them: `8s`, `3m05s`, `2h07m`."""
    if seconds == float("inf"):
        return "unknown time"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
