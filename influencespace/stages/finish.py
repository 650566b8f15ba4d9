"""The last step of every stage: digests of its files, versions, time; then the manifest."""

import time
from dataclasses import replace
from pathlib import Path

from influencespace.data.artifacts import (
    Manifest,
    file_digest,
    installed_versions,
    is_done,
    read_manifest,
    write_manifest,
)
from influencespace.data.buckets import remove_buckets
from influencespace.errors import InputError

STAGES = (
    "split",
    "proxy",
    "cluster",
    "redundancy",
    "curvature",
    "attribute",
    "fairness",
    "curate",
    "train",
    "evaluate",
)
"""What a run does once its data are embedded, in order."""


def finish_stage(out: Path, manifest: Manifest, began: float) -> Manifest:
    """Write the manifest of the stage that filled `out` since `began` (time.monotonic); its blocks have done their service."""
    files = {
        path.name: file_digest(path)
        for path in sorted(out.iterdir())
        if path.is_file() and path.name[0] != "."
    }
    done = replace(
        manifest, files=files, versions=installed_versions(), seconds=round(time.monotonic() - began, 3)
    )
    write_manifest(out, done)
    remove_buckets(out)
    return done


def stage_of(run: Path, stage: str, purpose: str = "") -> Manifest:
    """The manifest of a stage of a run that others build on; raises InputError where it is not finished."""
    manifest = read_manifest(run / stage)
    if manifest is None:
        raise InputError(
            f"{run} has no finished {stage} stage{purpose and f' {purpose}'}: run `influencespace run` with this folder "
            "first, or check the path"
        )
    return manifest


def finished_stage(out: Path, mark: str) -> Manifest | None:
    """The manifest where the stage is done already, by the same config from the same inputs."""
    if not is_done(out, mark):
        return None
    remove_buckets(out)  # of a run that was killed between its manifest and this
    return read_manifest(out)
