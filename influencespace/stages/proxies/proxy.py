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
from influencespace.data.pair_set import PairSet
from influencespace.errors import STRICT
from influencespace.estimators.influence import NegativeBatch
from influencespace.models.heads import Heads
from influencespace.models.training import HeadsConfig, Trained

ALL = "all"
"""The proxy of all pairs."""


@options(frozen=True, kw_only=True, config=STRICT)
class ProxyConfig:
    """The proxies whose training influence explains."""

    train: HeadsConfig = plain_field(default_factory=HeadsConfig)
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the pool that a proxy takes, in place of `train.steps`."""
    choose_steps: bool = True
    """Double the steps while that lowers the loss on the choosing half of the target by at least `min_gain`."""
    min_gain: float = Field(default=0.01, ge=0)
    """Relative fall of the loss that a doubling must bring."""
    max_doublings: int = Field(default=3, ge=0)
    folds: int = Field(default=5, ge=2)
    """K: proxies that leave out one fold of the images each."""
    negative_batches: int = Field(default=4, ge=2)
    """Batches in the reference bank of each proxy, of batch_size - 1 pairs."""
    bucket_size: int = Field(default=16_384, ge=1)
    """Pairs scored in one task; no score depends on it."""

    def first_steps(self, pairs: int) -> int:
        """Steps of the first proxy on a pool of so many pairs, before any doubling."""
        if self.epochs is None:
            return self.train.steps
        return max(1, round(self.epochs * pairs / self.train.batch_size))

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
        if not self.path.exists():
            return None
        with safe_open(self.path, "pt") as file:
            record: dict[str, Any] = json.loads(file.metadata()["record"])
        if self._seconds.exists():
            record["seconds"] = float(self._seconds.read_text())
        return record

    @cached_property
    def _state(self) -> dict[str, Tensor]:
        return load_file(self.path)

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

    def reference_bank(self, pool: PairSet) -> list[NegativeBatch]:
        return [NegativeBatch(inputs=pool.inputs(rows), image=pool.image[rows]) for rows in self.bank]

    @torch.no_grad()
    def embed(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        u, t = self.heads(*inputs)
        return u, t

    def save(
        self, trained: Trained, bank: Sequence[IntArray], record: Mapping[str, Any], seconds: float
    ) -> None:
        """One file: heads, the trainer's response, the bank, the record."""
        self._seconds.write_text(str(seconds))
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
