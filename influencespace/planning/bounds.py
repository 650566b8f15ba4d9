"""What is refused before anything runs: data that the disk cannot hold, and workers that no machine can hold."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from influencespace.engine.placement import Machine, Resources, check_place
from influencespace.errors import InputError
from influencespace.run import Run, Stage


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def check_disk(needed: int, folder: Path) -> None:
    """Raise InputError where `needed` bytes do not fit on the disk of the run `folder`, beside what is not of the run."""
    free = shutil.disk_usage(existing(folder)).free
    embedded = folder / "embed"
    if (folder / "config.yaml").is_file():  # of a run that goes on, embeddings are there already
        free += sum(path.stat().st_size for path in embedded.rglob("*") if path.is_file())
    if needed > free:
        raise InputError(
            f"the run needs {needed / 1e9:.1f} GB in {folder}, and that disk has {free / 1e9:.1f} GB free: free some space, "
            "or set --out to a folder on a larger disk"
        )


def check_workers(stages: Sequence[Stage], run: Run, machines: Sequence[Machine]) -> dict[str, Resources]:
    """What a worker of each stage declares that it needs; raises InputError where no machine has it."""
    workers = {str(stage.name): stage.resources(run) for stage in stages}
    for stage, worker in workers.items():
        try:
            check_place(machines, worker)
        except InputError as error:
            raise InputError(f"stage {stage}: {error}") from None
    return workers
