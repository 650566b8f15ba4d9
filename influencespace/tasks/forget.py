"""Make the proxy of a finished run forget some pairs without training it again, and say how near that comes."""

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
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from influencespace.core.batches import covering_batches
from influencespace.core.contrastive import info_nce_only
from influencespace.data.artifacts import atomic_path, fingerprint, write_json
from influencespace.data.pair_set import PairSet
from influencespace.errors import InputError
from influencespace.estimators.deletion import deletion_displacement, steps_for, without
from influencespace.estimators.influence import target_gradients
from influencespace.models.space import Space
from influencespace.models.training import train_heads
from influencespace.models.trajectory import Trajectory, space_at
from influencespace.report.table import read_summary
from influencespace.stages.finish import stage_of
from influencespace.stages.ingest.split import pair_sets
from influencespace.stages.proxies.proxies import ALL, Proxy, beginning, train_subset
from influencespace.stages.scoring.score import ScoringInputs
from influencespace.tasks.score import valued

IntArray = NDArray[np.int64]
DOUBTFUL = 0.5
"""Distance to an edit of half the steps above which an edit is not to be used: the real error was up to as large."""
CHECKING_SEEDS = 3
"""Proxies trained anew on fresh batches: the spread that an edit's loss on the deleted pairs is held against."""


def read_uids(path: Path) -> list[str]:
    """Distinct uids in their order: a text file with one a line, or the column uid of a Parquet file. Raises InputError."""
    try:
        if path.suffix == ".parquet":
            found = [str(uid) for uid in pq.read_table(path)["uid"].to_pylist()]
        else:
            found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except KeyError:
        names = ", ".join(pq.read_schema(path).names)
        raise InputError(f"{path} has the columns {names}; the column uid is needed") from None
    except (OSError, UnicodeDecodeError, pa.ArrowInvalid) as error:
        raise InputError(
            f"uids cannot be read from {path}: {str(error).splitlines()[0]}; give a text file with one uid a line, or a "
            "Parquet file with the column uid"
        ) from None
    uids = list(dict.fromkeys(uid for uid in found if uid))
    if not uids:
        raise InputError(
            f"{path} names no pair: give one uid a line, as in the column uid of curated.parquet"
        )
    return uids


@dataclass(frozen=True)
class Forgetting:
    """The proxy of all pairs, the pairs of its pool that it is to forget, and what the edit is measured on."""

    given: ScoringInputs
    test: PairSet
    removed: IntArray

    @cached_property
    def space(self) -> Space:
        return Space(Proxy(self.given.proxy_folder, ALL).heads)

    @cached_property
    def proxy(self) -> Tensor:
        """Parameters as they were trained (p,)."""
        return self.space.flatten(self.space.parameters)

    @cached_property
    def path(self) -> Trajectory:
        return self.given.trajectory(self.space)

    @cached_property
    def kept(self) -> NDArray[np.float64]:
        """Weight of each pair of the pool without the removed ones (N,)."""
        weights = np.ones(len(self.given.pool))
        weights[self.removed] = 0
        return weights

    @cached_property
    def bank(self) -> list[IntArray]:
        """The proxy's recorded contexts less the removed pairs."""
        contexts = Proxy(self.given.proxy_folder, ALL).bank
        return [rows[self.kept[rows] > 0] for rows in contexts]

    def edited(self, steps: int) -> Tensor:
        """Parameters of the edited proxy (p,)."""
        pool = self.given.pool
        return self.proxy + deletion_displacement(self.path, self.removed, pool.image, steps)

    def gradient_norm(self, theta: Tensor) -> float:
        """Norm of the gradient of the kept pairs' loss, over the recorded contexts."""
        contexts = [self.given.pool.inputs(rows) for rows in self.bank if len(rows) > 1]
        folds = [np.zeros(len(images), np.int64) for images, _ in contexts]
        space = space_at(self.space, theta)
        return float(target_gradients(space, contexts, folds, 1, self.path.objective).norm())

    @torch.no_grad()
    def removed_loss(self, theta: Tensor) -> float:
        """Mean loss of the removed pairs, in contexts filled up by kept pairs of other images."""
        image = self.given.pool.image
        others = self.bank[0][~np.isin(image[self.bank[0]], image[self.removed])]
        rows = np.concatenate([self.removed, others])
        space, terms = space_at(self.space, theta), []
        for context in covering_batches(image[rows], self.path.config.batch_size, self.given.proxies.seed):
            u, t = space.embed(self.given.pool.inputs(rows[context]))
            terms.append(self.path.objective.terms(u, t)[context < len(self.removed)])
        return float(torch.cat(terms).mean())

    @torch.no_grad()
    def logits(self, theta: Tensor) -> Tensor:
        """Test logits in contexts of at most a batch, one after another."""
        scale = info_nce_only(self.path.objective, "forget").scale
        space, blocks = space_at(self.space, theta), []
        for rows in covering_batches(self.test.image, self.path.config.batch_size, self.given.proxies.seed):
            u, t = space.embed(self.test.inputs(rows))
            blocks.append((scale * u @ t.T).flatten())
        return torch.cat(blocks)

    def measured(self, edited: Tensor, steps: int) -> dict[str, Any]:
        """What is known of an edit without retraining."""
        norm, loss = self.gradient_norm, self.removed_loss
        half = self.distance_to_half_the_steps(edited, steps)
        return {
            "gradient_norm_on_kept": {"before": norm(self.proxy), "after": norm(edited)},
            "loss_of_deleted": {"before": loss(self.proxy), "after": loss(edited)},
            "distance_to_edit_of_half_the_steps": half,
            "doubtful": half is None or half > DOUBTFUL,
        }

    def distance_to_half_the_steps(self, edited: Tensor, steps: int) -> float | None:
        """Between the test logits of this edit and of one with half the steps, 1 is what the edit moved; None for one step."""
        if steps < 2:
            return None
        logits = self.logits(edited)
        doubt = (logits - self.logits(self.edited(steps // 2))).norm()
        return float(doubt / (logits - self.logits(self.proxy)).norm())

    def checked(self, edited: Tensor) -> dict[str, Any]:
        """Really train again: the distance that the edit leaves, the time that it saves, and the loss it should have."""
        began = time.monotonic()
        config, pool = self.path.config, self.given.pool
        seed = self.given.proxies.seed + 1
        heads, _ = beginning(pool, self.kept, config, seed)
        retrained = _flat(
            train_heads(pool.inputs, without(self.path, self.removed).batches, heads, config).heads
        )
        seconds = time.monotonic() - began
        fresh = [
            _flat(train_subset(pool, self.kept, config, config.steps, seed + k).heads)
            for k in range(CHECKING_SEEDS)
        ]
        before, after, same, other = (
            self.logits(theta) for theta in (self.proxy, edited, retrained, fresh[0])
        )
        return {
            "distance_to_retrained": float((after - same).norm() / (before - same).norm()),
            "distance_to_retrained_on_fresh_batches": float((after - other).norm() / (before - other).norm()),
            "loss_of_deleted_retrained": [self.removed_loss(theta) for theta in (retrained, *fresh)],
            "seconds_of_retraining": seconds,
        }


def _flat(heads: torch.nn.Module) -> Tensor:
    space = Space(heads)
    return space.flatten(space.parameters)


def forget_run(
    run: Path, uids: Sequence[str], steps: int | None = None, check: bool = False
) -> dict[str, Any]:
    """Edit the proxy of all pairs of a finished run as if the named pairs had not been in its batches.

    `steps` as in `estimators.deletion`; with `check` the proxy is really trained again and compared. Writes, in a folder
    of its own for each set of pairs, proxy.safetensors (the edited heads) and forget.json. Distances are between test
    logits, 1 is the unedited proxy's. Uids that the pool does not hold are listed.
    Raises InputError where no pair would be deleted, or too few would be kept.
    """
    run = run.expanduser().absolute()
    read_summary(run)  # without one the stages may be of two configs
    given, inputs = valued(run)
    test = pair_sets(run / "split", stage_of(run, "split"))["test"]
    place = {str(uid): row for row, uid in enumerate(given.pool.column("uid"))}
    unknown = sorted(set(uids).difference(place))
    removed = np.array(sorted(place[uid] for uid in set(uids) - set(unknown)), np.int64)
    if not len(removed):
        raise InputError(
            f"none of the {len(uids)} uid(s) is of this run's pool (first: {next(iter(uids), 'none given')}): give those of "
            "the column uid of curated.parquet"
        )
    if len(removed) == len(place):
        raise InputError(f"all {len(place)} pairs of the pool are to be deleted: nothing is left to train on")
    forgetting = Forgetting(given, test, removed)
    steps = steps_for(forgetting.path) if steps is None else steps
    mark = fingerprint({"inputs": inputs, "removed": [str(row) for row in removed], "steps": steps})
    out = run / "forget" / mark
    note = out / "forget.json"
    if note.is_file():
        done: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
        if done["unknown_uids"] == unknown and ("check" in done or not check):
            return done
    began = time.monotonic()
    edited = forgetting.edited(steps)
    seconds = time.monotonic() - began
    state = {name: value.contiguous() for name, value in forgetting.space.unflatten(edited).items()}
    with atomic_path(out / "proxy.safetensors") as aside:
        save_file(state, aside)
    found: dict[str, Any] = {
        "deleted": len(removed),
        "kept": len(place) - len(removed),
        "unknown": len(unknown),
        "unknown_uids": unknown,
        "steps": steps,
        "steps_of_training": len(forgetting.path.batches),
        "seconds": seconds,
    }
    found |= forgetting.measured(edited, steps)
    if check:
        judged = forgetting.checked(edited)
        found["check"] = judged | {"time_of_retraining_over_edit": judged["seconds_of_retraining"] / seconds}
    found["paths"] = {name: str(out / name) for name in ("proxy.safetensors", "forget.json")}
    write_json(note, found)
    return found
