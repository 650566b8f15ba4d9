"""Make the proxy of a finished run forget some pairs without training it again, and report how near that comes."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from torch import Tensor

from influencespace.core.arrays import FloatArray, IntArray
from influencespace.core.batches import covering_batches
from influencespace.core.contrastive import info_nce_only
from influencespace.data.artifacts import atomic_path, fingerprint, write_json
from influencespace.data.mirror import here
from influencespace.data.pair_set import rows_of
from influencespace.engine.local import LocalEngine
from influencespace.errors import InputError
from influencespace.estimators.deletion import deletion_displacement, steps_for, without
from influencespace.estimators.influence import target_gradients
from influencespace.models.heads import Heads
from influencespace.models.space import Space
from influencespace.models.training import train_heads
from influencespace.models.trajectory import Trajectory, space_at
from influencespace.run import Details, Run, Stage, Workers, carry_out
from influencespace.stages.proxies.proxy import Proxy
from influencespace.stages.proxies.train_many import beginning, train
from influencespace.stages.scoring.scoring import ScoringInputs

FILES = ("proxy.safetensors", "forget.json")
DOUBTFUL = 0.5
"""Distance to an edit of half the steps above which an edit is not to be used: the real error was up to as large."""
CHECKING_SEEDS = 3
"""Proxies trained anew on fresh batches: the spread that an edit's loss on the deleted pairs is held against."""


def read_uids(path: Path) -> list[str]:
    """Distinct uids in their order: a text file with one a line, or the column uid of a Parquet file. Raises InputError."""
    try:
        if path.suffix == ".parquet":
            listed = [str(uid) for uid in pq.read_table(path)["uid"].to_pylist()]
        else:
            listed = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except KeyError:
        names = ", ".join(pq.read_schema(path).names)
        raise InputError(f"{path} has the columns {names}; the column uid is needed") from None
    except (OSError, UnicodeDecodeError, pa.ArrowInvalid) as error:
        raise InputError(
            f"uids cannot be read from {path}: {str(error).splitlines()[0]}; give a text file with one uid a line, or a "
            "Parquet file with the column uid"
        ) from None
    uids = list(dict.fromkeys(uid for uid in listed if uid))
    if not uids:
        raise InputError(
            f"{path} names no pair: give one uid a line, as in the column uid of curated.parquet"
        )
    return uids


@dataclass(frozen=True)
class Without:
    """1 for each pair, but 0 for some rows."""

    removed: IntArray

    def read(self, start: int, stop: int) -> FloatArray:
        weights = np.ones(stop - start)
        weights[self.removed[(self.removed >= start) & (self.removed < stop)] - start] = 0
        return weights


@dataclass(frozen=True)
class Forgetting:
    """The proxy of all pairs of a run, the pairs that it is to forget, and what the edit is measured on."""

    run: Run
    removed: IntArray

    @cached_property
    def inputs(self) -> ScoringInputs:
        return ScoringInputs.of(self.run)

    @cached_property
    def trained(self) -> Proxy:
        return self.inputs.trained()

    @cached_property
    def space(self) -> Space:
        return Space(self.trained.heads)

    @cached_property
    def theta(self) -> Tensor:
        """Parameters as they were trained (p,)."""
        return self.space.flatten(self.space.parameters)

    @cached_property
    def path(self) -> Trajectory:
        return self.inputs.trajectory(self.space)

    @property
    def kept(self) -> "Without":
        """Weights of the pool's pairs without the removed ones."""
        return Without(self.removed)

    @cached_property
    def bank(self) -> list[IntArray]:
        """The proxy's negative batches less the removed pairs."""
        return [rows[~np.isin(rows, self.removed)] for rows in self.trained.bank]

    def edited(self, steps: int) -> Tensor:
        """Parameters of the edited proxy (p,)."""
        return self.theta + deletion_displacement(self.path, self.removed, self.images, steps)

    def images(self, rows: IntArray) -> IntArray:
        """Image of some pairs of the pool (m,)."""
        return self.run.pool.read(rows, "image")["image"]

    def gradient_norm(self, theta: Tensor) -> float:
        """Norm of the gradient of the kept pairs' loss, over the negative batches."""
        batches = [self.run.pool.inputs(rows) for rows in self.bank if len(rows) > 1]
        folds = [np.zeros(len(images), np.int64) for images, _ in batches]
        space = space_at(self.space, theta)
        return float(target_gradients(space, batches, folds, 1, self.path.objective).norm())

    @torch.no_grad()
    def removed_loss(self, theta: Tensor) -> float:
        """Mean loss of the removed pairs, in batches filled up by kept pairs of other images."""
        bank, removed = self.images(self.bank[0]), self.images(self.removed)
        others = ~np.isin(bank, removed)
        rows, image = np.concatenate([self.removed, self.bank[0][others]]), np.append(removed, bank[others])
        space, terms = space_at(self.space, theta), []
        for batch in covering_batches(image, self.path.config.batch_size, self.run.seed):
            u, t = space.embed(self.run.pool.inputs(rows[batch]))
            terms.append(self.path.objective.terms(u, t)[batch < len(self.removed)])
        return float(torch.cat(terms).mean())

    @torch.no_grad()
    def logits(self, theta: Tensor) -> Tensor:
        """Test logits, one batch after another."""
        scale = info_nce_only(self.path.objective, "forget").scale
        space, logits = space_at(self.space, theta), []
        for rows in covering_batches(self.run.test.image, self.path.config.batch_size, self.run.seed):
            u, t = space.embed(self.run.test.inputs(rows))
            logits.append((scale * u @ t.T).flatten())
        return torch.cat(logits)

    def measured(self, edited: Tensor, steps: int) -> dict[str, Any]:
        """What is known of an edit without retraining."""
        norm, loss = self.gradient_norm, self.removed_loss
        half = self.distance_to_half_the_steps(edited, steps)
        return {
            "gradient_norm_on_kept": {"before": norm(self.theta), "after": norm(edited)},
            "loss_of_deleted": {"before": loss(self.theta), "after": loss(edited)},
            "distance_to_edit_of_half_the_steps": half,
            "doubtful": half is None or half > DOUBTFUL,
        }

    def distance_to_half_the_steps(self, edited: Tensor, steps: int) -> float | None:
        """Between the test logits of this edit and of one with half the steps, 1 is what the edit moved; None for one step."""
        if steps < 2:
            return None
        logits = self.logits(edited)
        doubt = (logits - self.logits(self.edited(steps // 2))).norm()
        return float(doubt / (logits - self.logits(self.theta)).norm())

    def checked(self, edited: Tensor) -> dict[str, Any]:
        """Really train again: the distance that the edit leaves, the time that it saves, and the loss it should have."""
        began = time.monotonic()
        config, pool = self.path.config, self.run.pool
        seed = self.run.seed + 1
        heads, _ = beginning(pool, self.kept, config, seed)
        batches = without(self.path, self.removed).batches
        retrained = _flat(train_heads(pool.inputs, batches, heads, config).heads)
        seconds = time.monotonic() - began
        seeds = range(seed, seed + CHECKING_SEEDS)
        fresh = [_flat(train(pool, self.kept, config, one).heads) for one in seeds]
        all_ = (self.theta, edited, retrained, fresh[0])
        before, after, same, other = (self.logits(theta) for theta in all_)
        return {
            "distance_to_retrained": float((after - same).norm() / (before - same).norm()),
            "distance_to_retrained_on_fresh_batches": float((after - other).norm() / (before - other).norm()),
            "loss_of_deleted_retrained": [self.removed_loss(theta) for theta in (retrained, *fresh)],
            "seconds_of_retraining": seconds,
        }


def _flat(heads: Heads) -> Tensor:
    space = Space(heads)
    return space.flatten(space.parameters)


@dataclass(frozen=True, kw_only=True)
class Forget(Stage):
    """Edits the proxy of all pairs as if some had not been in its batches; writes proxy.safetensors and forget.json."""

    removed: tuple[int, ...]
    """Rows of the pool."""
    unknown: tuple[str, ...]
    """Uids that the pool does not hold."""
    steps: int | None
    check: bool
    needs = ("proxies",)

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"forget/{fingerprint([self.removed, self.steps, self.check])}"

    def settings(self, config: Any) -> Any:
        return self.removed, self.unknown, self.steps, self.check

    def work(self, run: Run, workers: Workers) -> Details:
        forgetting = Forgetting(run, np.array(self.removed, np.int64))
        steps = steps_for(forgetting.path) if self.steps is None else self.steps
        began = time.monotonic()
        edited = forgetting.edited(steps)
        seconds = time.monotonic() - began
        state = {name: value.contiguous() for name, value in forgetting.space.unflatten(edited).items()}
        with atomic_path(workers.folder / "proxy.safetensors") as aside:
            save_file(state, aside)
        deleted, pairs = len(self.removed), len(run.pool)
        result: dict[str, Any] = {
            "deleted": deleted,
            "kept": pairs - deleted,
            "unknown": len(self.unknown),
            "unknown_uids": self.unknown,
            "steps": steps,
            "steps_of_training": len(forgetting.path.batches),
            "seconds": seconds,
        }
        result |= forgetting.measured(edited, steps)
        if self.check:
            checked = forgetting.checked(edited)
            ratio = checked["seconds_of_retraining"] / seconds
            result["check"] = checked | {"time_of_retraining_over_edit": ratio}
        write_json(workers.folder / "forget.json", result)
        return Details(rows_in=pairs, rows_out=pairs - deleted, rejected=deleted)


def forget_run(
    run: Run, uids: Sequence[str], steps: int | None = None, check: bool = False
) -> dict[str, Any]:
    """Edit the proxy of all pairs of a finished run as if the named pairs had not been in its batches.

    `steps` as in `estimators.deletion`; with `check` the proxy is really trained again and compared. Writes, in a folder
    of its own for each set of pairs, proxy.safetensors (the edited heads) and forget.json; returns what this says, with the
    paths. Distances are between test logits, 1 is the unedited proxy's. Uids that the pool does not hold are listed.
    Raises InputError where no pair would be deleted, or too few would be kept, and where the run is not finished.
    """
    run.summary()  # without one the stages may be of two configs
    place = rows_of(run.pool, set(uids))
    unknown = tuple(sorted(set(uids).difference(place)))
    removed = tuple(sorted(place.values()))
    if not removed:
        raise InputError(
            f"none of the {len(uids)} uid(s) is of this run's pool (first: {next(iter(uids), 'none given')}): give those of "
            "the column uid of curated.parquet"
        )
    if len(removed) == len(run.pool):
        raise InputError(
            f"all {len(removed)} pairs of the pool are to be deleted: nothing is left to train on"
        )
    stage = Forget(removed=removed, unknown=unknown, steps=steps, check=check)
    carry_out(stage, run, LocalEngine())
    folder = run.at(stage.name)
    result: dict[str, Any] = json.loads(here(folder / "forget.json").read_text(encoding="utf-8"))
    return result | {"paths": {name: str(folder / name) for name in FILES}}
