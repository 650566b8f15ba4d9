"""Puts the kinds of dirt that web data has into a pool of real pairs, and remembers what is dirt."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO

import numpy as np
import pyarrow.parquet as pq
import torch
from curation import World
from PIL import Image, ImageFilter

from influencespace.data.artifacts import atomic_path
from influencespace.data.dirt import shuffle_captions
from influencespace.data.images import decode_image, sharpness
from influencespace.data.pair_set import PairSet
from influencespace.data.readers import list_shards, read_shard
from influencespace.data.schema import Sample
from influencespace.models.encoders import load_encoder

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
        """Rightly captioned pairs of another domain."""
        return PairSet(self.world.other_domain)

    def coco(self) -> PairSet:
        """COCO's train and val pictures: a target from elsewhere."""
        root = self.world.data / "coco2017-mini" / "annotations"
        return PairSet(self.world.embedded("coco", str(root / "captions_*.json")))

    @cached_property
    def blurred(self) -> tuple[FloatArray, FloatArray]:
        """Every picture of the pool out of focus, or enlarged from a thumbnail: (Ni, D) and its sharpness (Ni,)."""
        return self._altered("blurred", spoilt)

    @cached_property
    def recompressed(self) -> tuple[FloatArray, FloatArray]:
        """Every picture of the pool slightly cropped and compressed anew: (Ni, D) and its sharpness (Ni,)."""
        return self._altered("recompressed", recompressed)

    def _altered(
        self, name: str, change: Callable[[Image.Image, int], Image.Image]
    ) -> tuple[FloatArray, FloatArray]:
        path = self.world.cache / "embed" / f"{name}.npz"
        if not path.is_file():
            encoder = load_encoder(self.world.encoder)
            table = pq.read_table(self.world.pool / "pairs.parquet", columns=["uid", "image"]).to_pydict()
            row = {uid.rsplit("#", 1)[0]: image for uid, image in zip(table["uid"], table["image"])}
            embeddings = np.zeros(self.pool.table.images.shape, np.float32)
            sharp = np.zeros(len(embeddings))
            pending: list[tuple[int, Image.Image]] = []

            def flush() -> None:
                pictures = encoder.preprocess_images([picture for _, picture in pending])
                embeddings[[index for index, _ in pending]] = encoder.encode_image(pictures).cpu().numpy()
                pending.clear()

            for shard in list_shards(self.world.pool_shards):
                for sample in read_shard(shard):
                    if isinstance(sample, Sample):
                        index = row[str(sample.uid)]
                        picture = change(decode_image(sample.image), index)
                        sharp[index] = sharpness(picture)
                        pending.append((index, picture))
                    if len(pending) == 64:
                        flush()
            if pending:
                flush()
            with atomic_path(path) as aside, aside.open("wb") as file:
                np.savez(file, embeddings=embeddings, sharpness=sharp)
        found = np.load(path)
        return found["embeddings"], found["sharpness"]

    @cached_property
    def boilerplate(self) -> FloatArray:
        encoder = load_encoder(self.world.encoder)
        found: FloatArray = encoder.encode_text(encoder.tokenize(list(BOILERPLATE))[0]).cpu().numpy()
        return found

    def images(self, rows: np.ndarray) -> FloatArray:
        """Embeddings of pictures as `Draft.image` numbers them: pool, blurred, recompressed, scenes; made where asked for."""
        parts = (
            lambda: self.pool.table.images,
            lambda: self.blurred[0],
            lambda: self.recompressed[0],
            lambda: self.scenes.table.images,
        )
        return gathered(rows, parts, [0, self.count, 2 * self.count, 3 * self.count])

    def sharpness(self, rows: np.ndarray) -> FloatArray:
        """Sharpness of the same pictures."""
        parts = (
            lambda: by_picture(self.pool),
            lambda: self.blurred[1][:, None],
            lambda: self.recompressed[1][:, None],
            lambda: by_picture(self.scenes),
        )
        return gathered(rows, parts, [0, self.count, 2 * self.count, 3 * self.count])[:, 0]

    def texts(self, rows: np.ndarray) -> FloatArray:
        """Embeddings of captions as `Draft.text` numbers them: pool, boilerplate, scenes."""
        parts = (
            lambda: self.pool.table.texts,
            lambda: self.boilerplate,
            lambda: self.scenes.table.texts,
        )
        return gathered(rows, parts, [0, self.first_boilerplate, self.first_scene_text])

    @property
    def first_boilerplate(self) -> int:
        return len(self.pool.table.texts)

    @property
    def first_scene_text(self) -> int:
        return self.first_boilerplate + len(BOILERPLATE)

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


def by_picture(pairs: PairSet) -> FloatArray:
    """Sharpness of the pictures of a set, in the order of its embeddings: (Ni, 1)."""
    found = np.full(len(pairs.table.images), np.nan)
    found[pairs.image] = pairs.sharpness
    return found[:, None]


def gathered(rows: np.ndarray, parts: Sequence[Callable[[], FloatArray]], first: Sequence[int]) -> FloatArray:
    """Rows (n,) of parts that are numbered one after another, each from its `first`; no other part is made."""
    part = np.searchsorted(first, rows, side="right") - 1
    chosen = {int(k): np.asarray(parts[k]()) for k in np.unique(part)}
    out = np.empty((len(rows), next(iter(chosen.values())).shape[1]), np.float32)
    for k, values in chosen.items():
        out[part == k] = values[rows[part == k] - first[k]]
    return out


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
    first = sources.first_boilerplate
    return draft.changed(rows, "boilerplate", text=first + rng.integers(len(BOILERPLATE), size=len(rows)))


def irrelevant(draft: Draft, share: float, rng: np.random.Generator, sources: Sources) -> Draft:
    """Pairs of another domain added until they are `share` of the pool."""
    scenes = sources.scenes
    extra = rng.choice(len(scenes), min(len(scenes), round(share / (1 - share) * len(draft))), replace=False)
    image = 3 * sources.count + scenes.image[extra]
    return draft.with_more(image, sources.first_scene_text + scenes.text[extra], "irrelevant")


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
