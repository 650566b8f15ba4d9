"""The split stage: which pairs are the pool, the target and the test set."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from pydantic import Field
from pydantic.dataclasses import dataclass as options

from influencespace.core.arrays import BoolArray, FloatArray, IntArray
from influencespace.core.batches import folds_by_image
from influencespace.core.hashing import fold_of
from influencespace.data.buckets import buckets_of
from influencespace.data.mirror import here, is_file
from influencespace.data.npy import write_npy
from influencespace.data.pair_set import PairSet
from influencespace.engine.placement import WORKER_BYTES
from influencespace.errors import STRICT, InputError
from influencespace.run import Details, Run, Stage, Workers
from influencespace.stages.ingest.shards import ROLES, roles_of

MIN_IMAGES = 16
OF_TARGET = (
    2**32
)  # added to the seed: the folds of the proxies are drawn by the same hash, and must not depend on this draw
ENOUGH = 65_536  # pairs among which so many images are looked for
RANGE = 65_536  # pairs whose columns are in memory at once
MAX_DRAWN = 40_000  # pairs that are drawn for a target, of however large a pool: a target of half as many is exact enough


@options(frozen=True, kw_only=True, config=STRICT)
class SplitConfig:
    """What is done where no target or no test set is given."""

    target_share: float = Field(default=0.1, gt=0, lt=0.5)
    """Without a target: this share of the pool's images, rounded to one part in a whole number, is drawn, and its better half by
    quality becomes the target."""

    @property
    def parts(self) -> int:
        """The pool's images are cut into so many parts, one of which is drawn."""
        return max(2, round(1 / self.target_share))


@dataclass(frozen=True, kw_only=True)
class DrawSplit:
    """Task: write the rows of every role."""

    embeddings: dict[str, Path]  # role -> artifact, for the roles that have data of their own
    config: SplitConfig
    seed: int
    artifact: Path
    """Where the files will lie in the end."""
    folder: Path

    def __call__(self) -> dict[str, Any]:
        sets = {role: PairSet(path) for role, path in self.embeddings.items()}
        _check_dimensions(sets)
        source = dict(self.embeddings)
        rows: dict[str, IntArray] = {}
        """Of the roles that are a part of an artifact."""
        notes: list[str] = []
        if "target" not in source:
            source["target"] = source["pool"]
            rows["target"], rows["pool"], share = self._cut_target(sets["pool"])
            notes.append(
                f"no target was given: {len(rows['target'])} pairs of the pool, the better half by the encoder's CLIP score of "
                f"a seeded {share:.2%} of its images, were set apart as target, and the other half left "
                "out; figures on it are optimistic"
            )
        if "test" not in source:
            source["test"] = source["target"]
            target = PairSet(source["target"])
            of_target = rows.get("target", np.arange(len(target)))
            half = folds_by_image(target.read(of_target, "image")["image"], 2, self.seed + 1)
            rows["target"], rows["test"] = of_target[half == 0], of_target[half == 1]
            notes.append("no test set was given: half of the target's images were set apart as test set")
        notes += self._overlaps(sets)
        counts = {}
        for role in ROLES:
            counts[role] = len(rows[role]) if role in rows else len(sets[role])
            self._check_images(role, PairSet(source[role]), rows.get(role), counts[role])
            if role in rows and role != "pool":
                write_npy(self.folder / f"{role}.npy", [rows[role]], counts[role], np.int64)
        return {
            # relative: a run folder may be moved or copied
            "source": {role: os.path.relpath(path, self.artifact) for role, path in source.items()},
            "rows": counts,
            "notes": notes,
            "total": sum(map(len, sets.values())),
        }

    def _check_images(self, role: str, pairs: PairSet, rows: IntArray | None, count: int) -> None:
        first = slice(0, ENOUGH) if rows is None else rows[:ENOUGH]
        distinct = len(np.unique(pairs.read(first, "image")["image"]))
        if distinct < MIN_IMAGES:
            raise InputError(
                f"the {role} has {count} pair(s) of {distinct} image(s); {MIN_IMAGES} images or more are needed. "
                + self._advice(role)
            )

    def _overlaps(self, sets: dict[str, PairSet]) -> list[str]:
        """Roles with data of their own that share pairs, by uid."""
        notes = []
        for first, second in combinations(sets, 2):  # the pool comes first, and is read by range
            uids = sets[second].table.pairs("uid")["uid"].combine_chunks()
            shared = sum(
                pc.sum(pc.is_in(sets[first].table.rows(*span, "uid")["uid"], value_set=uids)).as_py() or 0
                for span in buckets_of(len(sets[first]), RANGE)
            )
            if shared:
                notes.append(
                    f"{shared:,} of the {len(uids):,} pairs of the {second} are in the {first} too (by uid): "
                    "the comparison is no proof until they are apart"
                )
        return notes

    def _advice(self, role: str) -> str:
        missing = [name for name in ("target", "test") if name not in self.embeddings]
        if role == "pool" or not missing:
            return "Were most pairs rejected? See rejected.parquet in the run's embed folder"
        more = "split.target_share" if "target" in missing else "the target"
        return (
            f"No {' and no '.join(missing)} was given, so that it was set apart: give one, or enlarge {more}"
        )

    def _cut_target(self, pool: PairSet) -> tuple[IntArray, IntArray, float]:
        """Rows of the target, of what is left of the pool (written by range, and by memory map), and the share of images that
        was drawn.

        Whole images, so that no image is in both; of a large pool no more than a target needs.
        """
        parts = max(self.config.parts, len(pool) // MAX_DRAWN)
        drawn, scores = [np.empty(0, np.int64)], [np.empty(0)]
        for start, is_drawn, score in self._draw(pool, parts):
            drawn.append(start + np.flatnonzero(is_drawn))
            scores.append(score[is_drawn])
        candidates, score = np.concatenate(drawn), np.concatenate(scores)
        best = candidates[score >= np.median(score)] if len(score) else candidates
        left = (start + np.flatnonzero(~is_drawn) for start, is_drawn, _ in self._draw(pool, parts))
        path = self.folder / "pool.npy"
        write_npy(path, left, len(pool) - len(candidates), np.int64)
        return best, np.load(here(path), mmap_mode="r"), 1 / parts

    def _draw(self, pool: PairSet, parts: int) -> Iterator[tuple[int, BoolArray, FloatArray]]:
        """By ranges of the pool: the first row, which pairs are drawn, and their CLIP scores."""
        for start, stop in buckets_of(len(pool), RANGE):
            columns = pool.read(slice(start, stop), "image", "clip_score")
            is_drawn = fold_of(columns["image"], parts, self.seed + OF_TARGET) == 0
            yield start, is_drawn, columns["clip_score"].astype(np.float64)


def _check_dimensions(sets: dict[str, PairSet]) -> None:
    dimensions = {role: pairs.table.dimension for role, pairs in sets.items()}
    if len(set(dimensions.values())) > 1:
        listed = ", ".join(f"{role} {dimension}" for role, dimension in dimensions.items())
        raise InputError(
            f"embeddings of different dimensions cannot be compared ({listed}): embed pool, target and test with the encoder "
            "that made the imported embeddings"
        )


class Split(Stage):
    """Writes pool.npy, target.npy and test.npy, of the roles that are a part of an artifact: its rows. The manifest names the
    artifacts."""

    name = "split"
    version = 2

    def settings(self, config: Any) -> tuple[SplitConfig, int]:
        return config.split, config.seed

    def inputs(self, run: Run) -> Mapping[str, str]:
        names = [f"embed/{role}" for role in roles_of(run.config)]
        return {name: run.manifest(name).content for name in names}

    def work(self, run: Run, workers: Workers) -> Details:
        config, seed = self.settings(run.config)
        embeddings = {role: run.at(f"embed/{role}") for role in roles_of(run.config)}
        draw = DrawSplit(
            embeddings=embeddings, config=config, seed=seed, artifact=run.at(self.name), folder=workers.folder
        )
        details = workers.once(draw, memory=WORKER_BYTES)
        rows_in, rows_out = details.pop("total"), sum(details["rows"].values())
        # the worse half of what was drawn for a target is set aside: neither pool nor target
        return Details(rows_in=rows_in, rows_out=rows_out, rejected=rows_in - rows_out, details=details)


def pair_sets(run: Run) -> dict[str, PairSet]:
    """The pool, target and test set of a finished split."""
    out, source = run.at(Split.name), run.manifest(Split.name).details["source"]
    files = {role: out / f"{role}.npy" for role in ROLES}
    return {
        role: PairSet(
            Path(os.path.abspath(out / source[role])), files[role] if is_file(files[role]) else None
        )
        for role in ROLES
    }
