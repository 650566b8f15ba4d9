"""Pools of real pairs with the kinds of dirt that web data has, each with its planted truth, which judges only."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from common import SCORING, code_version
from curation import RUNTIME, Curation, World
from PIL import Image, ImageFilter

from influencespace.core.select import SelectConfig
from influencespace.data.artifacts import Manifest, atomic_path, fingerprint, read_manifest, reopen
from influencespace.data.dirt import shuffle_captions
from influencespace.data.images import decode_image
from influencespace.data.pair_set import PairSet
from influencespace.data.readers import list_shards, read_shard
from influencespace.data.schema import Sample
from influencespace.data.synthetic import WorldConfig, write_world
from influencespace.models.encoders import load_encoder
from influencespace.stages.decide import decide
from influencespace.stages.embed import embed
from influencespace.stages.finish import finish_stage
from influencespace.stages.towers import EmbedConfig

FloatArray = np.ndarray
BOILERPLATE = (
    "image",
    "photo",
    "untitled",
    "no description available",
    "click to enlarge",
    "stock photo",
    "free download",
    "buy now with free shipping",
    "picture of the day",
    "see more photos like this",
    "img 0231.jpg",
    "dsc00417",
    "read more",
    "view full size",
    "photo by admin",
    "all rights reserved",
    "thumbnail",
    "default caption",
    "copyright of the photographer",
    "best price guaranteed",
)
CLEAN, COPY = "", "copy"


@dataclass(frozen=True)
class Draft:
    """A pool while dirt is put into it: what each pair shows and says, and what is wrong with it."""

    image: np.ndarray  # (n,) row of the sources' images
    text: np.ndarray  # (n,) row of the sources' captions
    kind: (
        np.ndarray
    )  # (n,) "" for a good pair, else the kind of dirt; "copy" for one that the pool already holds

    def __len__(self) -> int:
        return len(self.image)

    def good(self, share: float, rng: np.random.Generator) -> np.ndarray:
        """Random rows of good pairs, `share` of all."""
        rows = np.flatnonzero(self.kind == CLEAN)
        return rng.choice(rows, min(len(rows), round(share * len(self))), replace=False)

    def changed(self, rows: np.ndarray, kind: str, **columns: np.ndarray) -> "Draft":
        values = {name: getattr(self, name).copy() for name in ("image", "text", "kind")}
        for name, column in columns.items():
            values[name][rows] = column
        values["kind"][rows] = kind
        return Draft(**values)

    def with_more(self, image: np.ndarray, text: np.ndarray, kind: str) -> "Draft":
        return Draft(
            image=np.concatenate([self.image, image]),
            text=np.concatenate([self.text, text]),
            kind=np.concatenate([self.kind, np.full(len(image), kind, dtype="U16")]),
        )


@dataclass(frozen=True)
class Sources:
    """Embeddings of the pool's pictures and captions and of all that dirt is made from, in one numbering."""

    world: World

    @cached_property
    def pool(self) -> PairSet:
        return PairSet(self.world.pool)

    @cached_property
    def scenes(self) -> PairSet:
        """Synthetic scenes, rightly captioned: another domain."""
        folder = self.world.cache / "scenes"
        none = {"pretrain": 0, "target": 0, "test": 0, "wrong_captions": 0.0, "near_duplicates": 0.0}
        clean = {"boilerplate": 0.0, "irrelevant": 0.0, "captions_per_image": 3}
        write_world(folder, WorldConfig(**none, **clean, pool=3000))  # type: ignore[arg-type]
        return self._embedded("scenes", str(folder / "pool" / "*.tar"))

    def _embedded(self, name: str, shards: str) -> PairSet:
        folder = self.world.cache / "embed" / name
        embed(list_shards(shards), EmbedConfig(encoder=self.world.encoder), folder, RUNTIME)
        return PairSet(folder)

    def coco(self) -> PairSet:
        """COCO's train and val pictures: a target from elsewhere."""
        root = self.world.data / "coco2017-mini" / "annotations"
        return self._embedded("coco", str(root / "captions_*.json"))

    @cached_property
    def blurred(self) -> FloatArray:
        """Every picture of the pool out of focus, or enlarged from a thumbnail: (Ni, D)."""
        return self._altered("blurred", spoilt)

    @cached_property
    def recompressed(self) -> FloatArray:
        """Every picture of the pool slightly cropped and compressed anew: (Ni, D)."""
        return self._altered("recompressed", recompressed)

    def _altered(self, name: str, change: Callable[[Image.Image, int], Image.Image]) -> FloatArray:
        path = self.world.cache / "embed" / f"{name}.npy"
        if not path.is_file():
            encoder = load_encoder(self.world.encoder)
            table = pq.read_table(self.world.pool / "pairs.parquet", columns=["uid", "image"]).to_pydict()
            row = {uid.rsplit("#", 1)[0]: image for uid, image in zip(table["uid"], table["image"])}
            out = np.zeros(self.pool.table.images.shape, np.float32)
            pending: list[tuple[int, Image.Image]] = []

            def flush() -> None:
                pictures = encoder.preprocess_images([picture for _, picture in pending])
                out[[index for index, _ in pending]] = encoder.encode_image(pictures).cpu().numpy()
                pending.clear()

            for shard in list_shards(str(self.world.data / "flickr8k" / "pool" / "*.tar")):
                for sample in read_shard(shard):
                    if isinstance(sample, Sample):
                        index = row[str(sample.uid)]
                        pending.append((index, change(decode_image(sample.image), index)))
                    if len(pending) == 64:
                        flush()
            if pending:
                flush()
            with atomic_path(path) as aside, aside.open("wb") as file:
                np.save(file, out)
        found: FloatArray = np.load(path)
        return found

    @cached_property
    def boilerplate(self) -> FloatArray:
        encoder = load_encoder(self.world.encoder)
        found: FloatArray = encoder.encode_text(encoder.tokenize(list(BOILERPLATE))[0]).cpu().numpy()
        return found

    @cached_property
    def images(self) -> FloatArray:
        """Pool, blurred, recompressed, scenes: what `Draft.image` numbers."""
        return np.concatenate(
            [self.pool.table.images, self.blurred, self.recompressed, self.scenes.table.images]
        )

    @cached_property
    def texts(self) -> FloatArray:
        """Pool, scenes, boilerplate: what `Draft.text` numbers."""
        return np.concatenate([self.pool.table.texts, self.scenes.table.texts, self.boilerplate])

    @property
    def count(self) -> int:
        return len(self.pool.table.images)

    def start(self, captions: int) -> Draft:
        """The pool as it is, with some captions of each picture."""
        number = np.array([int(str(uid).rsplit("#", 1)[1]) for uid in self.pool.column("uid")])
        rows = np.flatnonzero(number < captions)
        return Draft(
            image=self.pool.image[rows], text=self.pool.text[rows], kind=np.full(len(rows), "", "U16")
        )


def spoilt(picture: Image.Image, index: int) -> Image.Image:
    """Out of focus for even rows; for odd ones a thumbnail of 16 to 24 pixels, enlarged."""
    if index % 2 == 0:
        return picture.filter(ImageFilter.GaussianBlur(6 + index % 5))
    side = 16 + index % 9
    return picture.resize((side, side)).resize(picture.size)


def recompressed(picture: Image.Image, index: int) -> Image.Image:
    width, height = picture.size
    edge = 2 + index % 5
    cut = picture.crop((edge, edge, width - edge, height - edge))
    with BytesIO() as file:
        cut.save(file, "JPEG", quality=30 + index % 40)
        return Image.open(BytesIO(file.getvalue())).convert("RGB")


Dirt = Callable[[Draft, float, np.random.Generator, Sources], Draft]


def clean(draft: Draft, share: float, rng: np.random.Generator, sources: Sources) -> Draft:
    return draft


def wrong(draft: Draft, share: float, rng: np.random.Generator, sources: Sources) -> Draft:
    """Captions moved between pictures."""
    rows = draft.good(share, rng)
    seed = int(rng.integers(2**31))
    moved, _ = shuffle_captions([str(t) for t in draft.text[rows]], draft.image[rows].tolist(), 1.0, seed)
    return draft.changed(rows, "wrong", text=np.array([int(text) for text in moved]))


def hard_wrong(draft: Draft, share: float, rng: np.random.Generator, sources: Sources) -> Draft:
    """The caption of one of the ten pictures that look most alike."""
    rows = draft.good(share, rng)
    base = torch.from_numpy(np.asarray(sources.pool.table.images))
    alike = torch.cat(
        [(part @ base.T).topk(11, 1).indices[:, 1:] for part in torch.split(base, 1024)]
    ).numpy()
    by_image = [np.flatnonzero(draft.image == i) for i in range(sources.count)]
    texts = []
    for row in rows:
        near = [i for i in alike[draft.image[row]] if len(by_image[i])]
        texts.append(draft.text[rng.choice(by_image[rng.choice(near)])])
    return draft.changed(rows, "hard_wrong", text=np.array(texts))


def boilerplate(draft: Draft, share: float, rng: np.random.Generator, sources: Sources) -> Draft:
    rows = draft.good(share, rng)
    first = len(sources.texts) - len(BOILERPLATE)
    return draft.changed(rows, "boilerplate", text=first + rng.integers(len(BOILERPLATE), size=len(rows)))


def irrelevant(draft: Draft, share: float, rng: np.random.Generator, sources: Sources) -> Draft:
    """Synthetic scenes added until they are `share` of the pool."""
    scenes = sources.scenes
    extra = rng.choice(len(scenes), min(len(scenes), round(share / (1 - share) * len(draft))), replace=False)
    image = 3 * sources.count + scenes.image[extra]
    return draft.with_more(image, len(sources.pool.table.texts) + scenes.text[extra], "irrelevant")


def blurred(draft: Draft, share: float, rng: np.random.Generator, sources: Sources) -> Draft:
    """All good pairs of `share` of the pictures."""
    spoiled = rng.random(sources.count) < share
    rows = np.flatnonzero((draft.kind == CLEAN) & (draft.image < sources.count))
    rows = rows[spoiled[draft.image[rows]]]
    return draft.changed(rows, "blurred", image=sources.count + draft.image[rows])


def duplicates(draft: Draft, share: float, rng: np.random.Generator, sources: Sources) -> Draft:
    """A tenth of the good pairs again and again, as they are or compressed anew, until copies are `share` of the pool."""
    originals = draft.good(0.1, rng)
    copies = originals[rng.integers(len(originals), size=round(share / (1 - share) * len(draft)))]
    image = draft.image[copies]
    anew = (rng.random(len(copies)) < 0.5) & (image < sources.count)
    return draft.with_more(
        np.where(anew, 2 * sources.count + image % sources.count, image), draft.text[copies], COPY
    )


def web(draft: Draft, share: float, rng: np.random.Generator, sources: Sources) -> Draft:
    """All of it together; `share` scales every part."""
    parts = (
        (wrong, 0.15),
        (boilerplate, 0.07),
        (blurred, 0.07),
        (hard_wrong, 0.05),
        (irrelevant, 0.1),
        (duplicates, 0.1),
    )
    for dirt, part in parts:
        draft = dirt(draft, share * part, rng, sources)
    return draft


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One dirty pool, and the target that is known."""

    dirt: Dirt
    share: float
    captions: int = 5
    seed: int = 1
    target_pairs: int | None = None
    """Images of the target, each with its captions; None takes all."""
    shifted: bool = False
    """The target is COCO's, the test set is not."""


SCENARIOS: dict[str, Scenario] = {
    "clean": Scenario(dirt=clean, share=0.0),
    **{f"wrong {share}": Scenario(dirt=wrong, share=share / 100) for share in (10, 20, 30, 40)},
    "hard wrong": Scenario(dirt=hard_wrong, share=0.3),
    "boilerplate": Scenario(dirt=boilerplate, share=0.3),
    "duplicates": Scenario(dirt=duplicates, share=0.3),
    "irrelevant": Scenario(dirt=irrelevant, share=0.3),
    "blurred": Scenario(dirt=blurred, share=0.3),
    "web": Scenario(dirt=web, share=1.0),
    "target of 50": Scenario(dirt=wrong, share=0.3, target_pairs=50),
    "target of 200": Scenario(dirt=wrong, share=0.3, target_pairs=200),
    "shifted target": Scenario(dirt=wrong, share=0.3, shifted=True),
}


def written(sources: Sources, scenario: Scenario, cache: Path) -> tuple[PairSet, np.ndarray]:
    """The pool of a scenario as an embedding artifact, and the kind of each pair."""
    key = replace(scenario, target_pairs=None, shifted=False)
    mark = fingerprint(["scenario", scenario.dirt.__name__, key.share, key.captions, key.seed])
    folder = cache / "pools" / mark
    if read_manifest(folder) is None:
        rng = np.random.default_rng(scenario.seed)
        draft = scenario.dirt(sources.start(scenario.captions), scenario.share, rng, sources)
        order = rng.permutation(len(draft))  # as the canonical order of uids would be
        reopen(folder)
        _write(draft, order, sources, folder)
        manifest = Manifest(stage="embed", fingerprint=mark, rows_in=len(draft), rows_out=len(draft))
        finish_stage(folder, manifest, 0.0)
    return PairSet(folder), np.load(folder / "kind.npy")


def _write(draft: Draft, order: np.ndarray, sources: Sources, folder: Path) -> None:
    used_images, image = np.unique(draft.image[order], return_inverse=True)
    used_texts, text = np.unique(draft.text[order], return_inverse=True)
    images, texts = sources.images[used_images], sources.texts[used_texts]
    np.save(folder / "images.npy", images)
    np.save(folder / "texts.npy", texts)
    np.save(folder / "kind.npy", draft.kind[order])
    columns = {
        "uid": [f"{row:06d}" for row in range(len(order))],
        "image": image,
        "text": text,
        "caption": [str(t) for t in used_texts[text]],
        "clip_score": (images[image] * texts[text]).sum(1),
        "truncated": np.zeros(len(order), bool),
    }
    with atomic_path(folder / "pairs.parquet") as aside:
        pq.write_table(pa.table(columns), aside)


@dataclass(frozen=True)
class DirtyCuration(Curation):
    """The stages up to the decision, for a scenario."""

    name: str = ""

    @property
    def scenario(self) -> Scenario:
        return SCENARIOS[self.name]

    @cached_property
    def sources(self) -> Sources:
        return Sources(self.world)

    @property
    def folder(self) -> Path:
        return self.world.cache / "curations" / fingerprint([self.name, self.setting, code_version(SCORING)])

    @cached_property
    def _written(self) -> tuple[PairSet, np.ndarray]:
        return written(self.sources, self.scenario, self.world.cache)

    @cached_property
    def pool(self) -> PairSet:
        return self._written[0]

    @cached_property
    def kind(self) -> np.ndarray:
        """The kind of dirt of each pair; empty for good ones."""
        return self._written[1]

    @cached_property
    def wrong(self) -> np.ndarray:
        return self.kind != CLEAN

    @cached_property
    def target(self) -> PairSet:
        if self.scenario.shifted:
            return self.sources.coco()
        whole = self.world.dev(self.setting.target)
        if self.scenario.target_pairs is None:
            return whole
        chosen = np.random.default_rng(0).permutation(np.unique(whole.image))[: self.scenario.target_pairs]
        path = self.folder / "target.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, whole.rows[np.isin(whole.image, chosen)])
        return PairSet(whole.folder, path)

    def judge_kinds(self) -> dict[str, Any]:
        """The decision against the planted truth, for every kind of dirt apart."""
        kept = decide(self.run(), SelectConfig()).kept
        return {
            kind or "good": {
                "pairs": int((self.kind == kind).sum()),
                "pruned": float(1 - kept[self.kind == kind].mean()),
            }
            for kind in np.unique(self.kind)
        }
