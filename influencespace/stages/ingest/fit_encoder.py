"""Fits a tiny CLIP on the pairs of some shards: the encoder of the synthetic world."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from influencespace.data.images import decode_image
from influencespace.data.readers import list_shards, read_shard
from influencespace.data.schema import Sample
from influencespace.engine.progress import progress
from influencespace.models.tiny_clip import train_tiny_clip


@dataclass(frozen=True, kw_only=True)
class FitEncoder:
    """Task: fit the encoder and write it to `out`, unless one is there."""

    shards: str
    out: Path
    steps: int
    seed: int

    def __call__(self) -> None:
        if (self.out / "model.safetensors").is_file():
            return
        partly = self.out.with_name(f".{self.out.name}.partly")
        shutil.rmtree(partly, ignore_errors=True)
        images, captions = [], []
        for shard in list_shards(self.shards):
            for sample in read_shard(shard):
                if isinstance(sample, Sample):
                    images.append(decode_image(sample.image))
                    captions.append(sample.captions[0])
        with progress("encoder", self.steps, "steps") as bar:
            train_tiny_clip(
                images,
                captions,
                seed=self.seed,
                steps=self.steps,
                out=partly,
                on_step=lambda step, steps, loss: bar.advance(),
            )
        shutil.rmtree(self.out, ignore_errors=True)
        partly.rename(self.out)
