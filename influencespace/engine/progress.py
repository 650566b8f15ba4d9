"""Progress of one stage: a bar on a terminal, a plain line every ten seconds elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LINE_SECONDS = 10.0


class Bar(Protocol):
    """Something that is told how far the work is."""

    def advance(self, count: int = 1) -> None:
        """`count` more units are done."""


@contextmanager
def progress(stage: str, total: int, unit: str = "pairs", stream: TextIO | None = None) -> Iterator[Bar]:
    """Show rate and time left of `stage` on `stream` (default: stderr) until the block ends."""
    stream = stream or sys.stderr
    if stream.isatty():
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}  {task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(file=stream)) as rich:
            yield _RichBar(rich, rich.add_task(stage, total=total, unit=unit, rate=""), Meter(total))
    else:
        lines = _LineBar(stage, unit, stream, Meter(total))
        try:
            yield lines
        finally:
            lines.write("done" if lines.meter.done >= total else "stopped")


@dataclass
class Meter:
    """Units done, their rate and the seconds left."""

    total: int
    done: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def rate(self) -> float:
        """Units a second since the start."""
        return self.done / max(time.monotonic() - self.started, 1e-9)

    @property
    def pace(self) -> str:
        """The rate as people read it: `12.3/s`, or `25s each` where it takes seconds."""
        if not self.done or self.rate >= 0.5:
            return f"{self.rate:,.1f}/s"
        return f"{duration(1 / self.rate)} each"

    @property
    def left(self) -> float:
        """Seconds left at this rate; infinite before the first unit."""
        return (self.total - self.done) / self.rate if self.done else float("inf")


@dataclass
class _RichBar:
    progress: Progress
    task: TaskID
    meter: Meter

    def advance(self, count: int = 1) -> None:
        self.meter.done += count
        self.progress.update(self.task, advance=count, rate=self.meter.pace)


@dataclass
class _LineBar:
    stage: str
    unit: str
    stream: TextIO
    meter: Meter
    written: float = field(default_factory=time.monotonic)

    def advance(self, count: int = 1) -> None:
        self.meter.done += count
        if self.meter.done < self.meter.total and time.monotonic() - self.written >= LINE_SECONDS:
            self.write(f"{duration(self.meter.left)} left")

    def write(self, ending: str) -> None:
        meter = self.meter
        self.written = time.monotonic()
        print(
            f"{self.stage}: {meter.done:,} of {meter.total:,} {self.unit}, {meter.pace}, {ending}",
            file=self.stream,
            flush=True,
        )


def duration(seconds: float) -> str:
    """Seconds as people write them: `8s`, `3m05s`, `2h07m`."""
    if seconds == float("inf"):
        return "unknown time"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
