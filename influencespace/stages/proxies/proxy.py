"""What a proxy is: how it is trained, and the file that a trained one lies in."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as plain_field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as options
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from influencespace.core.arrays import IntArray
from influencespace.data.artifacts import atomic_path
from influencespace.data.mirror import here, is_file
from influencespace.data.pair_set import PairSet
from influencespace.errors import STRICT
from influencespace.estimators.influence import NegativeBatch
from influencespace.models.heads import Heads
from influencespace.models.training import HeadsConfig, Trained

MANY_FOLDS, FEW_FOLDS = 5, 2
MANY_FOLDS_PAIRS = 200_000
"""Above, half of the pool is enough for a proxy, and each further fold would cost a pass."""

ALL = "all"
"""The proxy of all pairs."""


@options(frozen=True, kw_only=True, config=STRICT)
class ProxyConfig:
    """The proxies whose training influence explains."""

    train: HeadsConfig = plain_field(default_factory=HeadsConfig)
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the pool that a proxy takes, in place of `train.steps`; by default these steps, but one pass at least."""
    choose_steps: bool = True
    """Double the steps while that lowers the loss on the choosing half of the target by at least `min_gain`."""
    min_gain: float = Field(default=0.01, ge=0)
    """Relative fall of the loss that a doubling must bring."""
    max_doublings: int = Field(default=3, ge=0)
    """Of `train.steps`, or of `epochs` where they are given: a pass that takes as many steps already is not repeated."""
    folds: int | None = Field(default=None, ge=2)
    """K: proxies that leave out one fold of the images each; by default 5, and 2 for pools of more than 200,000 pairs."""
    negative_batches: int = Field(default=4, ge=2)
    """Batches in the reference bank of each proxy, of batch_size - 1 pairs."""
    bucket_size: int = Field(default=16_384, ge=1)
    """Pairs scored in one task; no score depends on it."""

    def first_steps(self, pairs: int) -> int:
        """Steps of the first proxy on a pool of so many pairs, before any doubling."""
        if self.epochs is None:
            return max(self.train.steps, -(-pairs // self.train.batch_size))
        return max(1, round(self.epochs * pairs / self.train.batch_size))

    def max_steps(self, pairs: int) -> int:
        """Steps that doubling does not go beyond."""
        first = self.first_steps(pairs)
        if not self.choose_steps:
            return first
        doubled = self.train.steps if self.epochs is None else first
        return max(first, doubled * 2**self.max_doublings)

    def fold_count(self, pairs: int) -> int:
        """K for a pool of so many pairs."""
        if self.folds is not None:
            return self.folds
        return MANY_FOLDS if pairs <= MANY_FOLDS_PAIRS else FEW_FOLDS

    def passes(self, steps: int, pairs: int) -> float:
        """Passes over the pool that so many steps are."""
        return steps * self.train.batch_size / pairs

    def bank_batches(self, images: int) -> int:
        """Batches in every proxy's bank: as many as the one with the fewest images can fill, so many; two or more.

        Influence in sample and out of fold is balanced batch by batch.
        """
        return max(2, min(self.negative_batches, images // (self.train.batch_size - 1)))


def proxy_name(fold: int | None) -> str:
    """Of the proxy that leaves a fold out, or of all pairs."""
    return ALL if fold is None else f"without_fold_{fold}"


@dataclass(frozen=True)
class Proxy:
    """A trained proxy on disk, opened where it is used."""

    folder: Path
    name: str

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}.safetensors"

    @property
    def _seconds(self) -> Path:
        """Beside the file until the stage is finished: equal trainings give equal files, whatever time they took."""
        return self.folder / f".{self.name}.seconds"

    @property
    def record(self) -> dict[str, Any] | None:
        """What its training recorded, with its seconds while the stage is at work; None where it is not trained."""
        if not is_file(self.path):
            return None
        with safe_open(here(self.path), "pt") as file:
            record: dict[str, Any] = json.loads(file.metadata()["record"])
        if is_file(self._seconds):
            record["seconds"] = float(here(self._seconds).read_text())
        return record

    @cached_property
    def _state(self) -> dict[str, Tensor]:
        return load_file(here(self.path))

    @cached_property
    def heads(self) -> Heads:
        image, text = self._state["image"], self._state["text"]
        heads = Heads(image.shape[0], text.shape[0], image.shape[1])
        heads.load_state_dict({"image": image, "text": text})
        return heads

    @property
    def preconditioner(self) -> Tensor:
        return self._state["preconditioner"]

    @property
    def sum_of_learning_rates(self) -> float:
        return float(self._state["sum_of_learning_rates"])

    @property
    def bank(self) -> list[IntArray]:
        """Pairs of the pool in each negative batch."""
        batches = sorted(key for key in self._state if key.startswith("batch_"))
        return [self._state[key].numpy() for key in batches]

    def reference_bank(self, pool: PairSet, device: str = "cpu") -> list[NegativeBatch]:
        image = [pool.read(rows, "image")["image"] for rows in self.bank]
        inputs = [pool.inputs(rows, device) for rows in self.bank]
        return [NegativeBatch(inputs=x, image=i) for x, i in zip(inputs, image, strict=True)]

    @torch.no_grad()
    def embed(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        u, t = self.heads(*inputs)
        return u, t

    def save(
        self, trained: Trained, bank: Sequence[IntArray], record: Mapping[str, Any], seconds: float
    ) -> None:
        """One file: heads, the trainer's response, the bank, the record."""
        with atomic_path(self._seconds) as aside:
            aside.write_text(str(seconds))
        state = {
            "image": trained.heads.image.detach(),
            "text": trained.heads.text.detach(),
            "preconditioner": trained.preconditioner,
            "sum_of_learning_rates": torch.tensor(trained.sum_of_learning_rates, dtype=torch.float64),
        }
        state |= {f"batch_{k:03d}": torch.from_numpy(rows) for k, rows in enumerate(bank)}
        with atomic_path(self.path) as aside:
            save_file(
                {key: value.cpu().contiguous() for key, value in state.items()},
                aside,
                {"record": json.dumps(record)},
            )
