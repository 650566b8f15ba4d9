"""What scenario pools are made of: embeddings of the real pairs, and of the pictures and captions that corruptions put there."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from benchmarks.data.datasets import Dataset
from benchmarks.data.distinct import Distinct, RealArray
from influencespace.core.arrays import IntArray
from influencespace.data.artifacts import atomic_path
from influencespace.data.images import decode_image, sharpness
from influencespace.data.pair_set import PairSet
from influencespace.data.readers import list_shards, read_shard
from influencespace.data.schema import Sample
from influencespace.models.encoders import DualEncoder, load_encoder

BOILERPLATE = (
    *(
        "image",
        "photo",
        "untitled",
        "no description available",
        "click to enlarge",
        "stock photo",
        "free download",
    ),
    *(
        "buy now with free shipping",
        "picture of the day",
        "see more photos like this",
        "img 0231.jpg",
        "dsc00417",
    ),
    *("read more", "view full size", "photo by admin", "all rights reserved", "thumbnail", "default caption"),
    *("copyright of the photographer", "best price guaranteed"),
)
PLACEHOLDERS = ("image not available", "no photo", "removed", "loading", "error 404", "coming soon")
FILE_NAMES = ("DSC{:05d}.JPG", "img_{:05d}_large.png", "20131104_{:06d}.jpg", "IMG-{:05d}-WA0003.jpeg")
BATCH = 64
STORED = ("pool", "scenes")  # whose embeddings are there already

Alteration = Callable[[Image.Image, int], Image.Image]


def spoilt(picture: Image.Image, index: int) -> Image.Image:
    """Out of focus for even rows; for odd ones a thumbnail of 16 to 24 pixels, enlarged."""
    if index % 2 == 0:
        return picture.filter(ImageFilter.GaussianBlur(6 + index % 5))
    side = 16 + index % 9
    return picture.resize((side, side)).resize(picture.size)


def recompressed(picture: Image.Image, index: int) -> Image.Image:
    width, height = picture.size
    edge = 2 + index % 5
    with BytesIO() as file:
        inside = picture.crop((edge, edge, width - edge, height - edge))
        inside.save(file, "JPEG", quality=30 + index % 40)
        return Image.open(BytesIO(file.getvalue())).convert("RGB")


def covered(picture: Image.Image, index: int) -> Image.Image:
    """A banner of one colour over nine tenths of the height, as a notice on top of a page is."""
    random = Random(index)
    colour = tuple(random.randrange(256) for _ in range(3))
    out = picture.copy()
    ImageDraw.Draw(out).rectangle((0, 0, picture.width, round(0.9 * picture.height)), fill=colour)
    return out


def placeholder(words: str) -> Image.Image:
    """What a page shows where a picture is missing."""
    picture = Image.new("RGB", (192, 192), (225, 225, 225))
    ImageDraw.Draw(picture).text((30, 90), words, fill=(90, 90, 90))
    return picture


def garbled(captions: list[str], row: int) -> str:
    """The letters of every word in another order."""
    random = Random(row)
    return " ".join("".join(random.sample(word, len(word))) for word in captions[row].split())


ALTERED_PICTURES: dict[str, Alteration] = {
    "blurred": spoilt,
    "recompressed": recompressed,
    "covered": covered,
    "upside_down": lambda picture, index: picture.transpose(Image.Transpose.ROTATE_180),
}
ALTERED_CAPTIONS: dict[str, Callable[[list[str], int], str]] = {
    # the first word or two
    "cut": lambda captions, row: " ".join(captions[row].split()[: 1 + row % 2]),
    "garbled": garbled,
    # followed by the caption of some other picture
    "doubled": lambda captions, row: f"{captions[row]} {captions[Random(row).randrange(len(captions))]}",
    # what a camera or a page calls the picture; no two are the same
    "file_name": lambda captions, row: FILE_NAMES[row % len(FILE_NAMES)].format(row),
}


@dataclass(frozen=True)
class Sources:
    """Pictures and captions of the pool and of all that corruptions need, each in one numbering; made where asked for."""

    dataset: Dataset

    @cached_property
    def pool(self) -> Distinct:
        return Distinct(self.dataset.pool)

    @cached_property
    def scenes(self) -> Distinct:
        """Rightly captioned pairs of another domain."""
        return Distinct(self.dataset.other_domain)

    def coco(self) -> PairSet:
        """COCO's train and val pictures: a target from elsewhere."""
        annotations = self.dataset.data / "coco2017-mini" / "annotations"
        return self.dataset.embedded("coco", str(annotations / "captions_*.json"))

    @property
    def count(self) -> int:
        """Pictures of the pool."""
        return len(self.pool.first_of_image)

    @cached_property
    def _pictures(self) -> dict[str, int]:
        """Where each kind of picture begins."""
        sizes = dict.fromkeys(("pool", *ALTERED_PICTURES), self.count) | {"placeholders": len(PLACEHOLDERS)}
        return starts(sizes, last="scenes")

    @cached_property
    def _captions(self) -> dict[str, int]:
        """Where each kind of caption begins."""
        count = len(self.pool.first_of_text)
        sizes = {"pool": count, "boilerplate": len(BOILERPLATE), **dict.fromkeys(ALTERED_CAPTIONS, count)}
        return starts(sizes, last="scenes")

    def picture(self, kind: str, rows: IntArray) -> IntArray:
        """The numbers of pictures of this kind, by their rows in it."""
        return self._pictures[kind] + rows

    def text(self, kind: str, rows: IntArray) -> IntArray:
        """The numbers of captions of this kind, by their rows in it."""
        return self._captions[kind] + rows

    def images(self, numbers: IntArray) -> RealArray:
        """Embeddings of pictures: (n, D)."""
        return gathered(numbers, self._pictures, lambda kind, rows: self._shown(kind)[0][rows])

    def sharpness(self, numbers: IntArray) -> RealArray:
        """Sharpness of pictures: (n,)."""
        return gathered(numbers, self._pictures, lambda kind, rows: self._shown(kind)[1][rows, None])[:, 0]

    def texts(self, numbers: IntArray) -> RealArray:
        """Embeddings of captions: (n, D)."""
        return gathered(numbers, self._captions, self._texts)

    def _shown(self, kind: str) -> tuple[RealArray, RealArray]:
        """Embeddings (Ni, D) and sharpness (Ni,) of all pictures of a kind."""
        if kind not in STORED:
            return self.altered(kind)
        stored: Distinct = getattr(self, kind)
        return stored.images, stored.pairs.sharpness[stored.first_of_image]

    def _texts(self, kind: str, rows: IntArray) -> RealArray:
        if kind in STORED:
            known: RealArray = getattr(self, kind).texts[rows]
            return known
        captions = self._words(kind, rows)
        parts = [captions[start : start + BATCH] for start in range(0, len(captions), BATCH)]
        tokens = (self.encoder.tokenize(part)[0] for part in parts)
        return np.concatenate([self.encoder.encode_text(part).cpu().numpy() for part in tokens])

    def words(self, numbers: IntArray) -> list[str]:
        """Captions (n,)."""
        kinds, begins = list(self._captions), np.array(list(self._captions.values()))
        kind = np.searchsorted(begins, numbers, side="right") - 1
        found = np.empty(len(numbers), object)
        for k in np.unique(kind):
            found[kind == k] = self._words(kinds[k], numbers[kind == k] - begins[k])
        return [str(one) for one in found]

    def _words(self, kind: str, rows: IntArray) -> list[str]:
        if kind in STORED:
            known: Distinct = getattr(self, kind)
            return list(known.pairs.read(known.first_of_text[rows], "caption")["caption"])
        if kind == "boilerplate":
            return [BOILERPLATE[row] for row in rows]
        return [ALTERED_CAPTIONS[kind](self.captions, row) for row in rows.tolist()]

    @cached_property
    def encoder(self) -> DualEncoder:
        return load_encoder(self.dataset.encoder)

    @cached_property
    def captions(self) -> list[str]:
        """Of the pool, by their numbers."""
        return [
            str(caption) for caption in self.pool.pairs.read(self.pool.first_of_text, "caption")["caption"]
        ]

    def altered(self, kind: str) -> tuple[RealArray, RealArray]:
        """Embeddings of altered pictures and their sharpness, kept for good: (Ni, D), (Ni,)."""
        path = self.dataset.cache / "embed" / f"{kind}.npz"
        if not path.is_file():
            pictures: Iterable[tuple[int, Image.Image]] = enumerate(map(placeholder, PLACEHOLDERS))
            rows = len(PLACEHOLDERS)
            if kind != "placeholders":
                pictures, rows = self._changed(ALTERED_PICTURES[kind]), self.count
            embeddings, sharp = np.zeros((rows, self.pool.pairs.table.dimension), np.float32), np.zeros(rows)
            for row, picture in pictures:
                sharp[row] = sharpness(picture)
                ready = self.encoder.preprocess_images([picture])
                embeddings[row] = self.encoder.encode_image(ready).cpu().numpy()[0]
            with atomic_path(path) as aside, aside.open("wb") as file:
                np.savez(file, embeddings=embeddings, sharpness=sharp)
        stored = np.load(path)
        return stored["embeddings"], stored["sharpness"]

    def _changed(self, change: Alteration) -> Iterator[tuple[int, Image.Image]]:
        """Every picture of the pool after a change, with its number."""
        uids = self.pool.pairs.column("uid")
        row = {str(uid).rsplit("#", 1)[0]: number for uid, number in zip(uids, self.pool.image.tolist())}
        for shard in list_shards(self.dataset.pool_shards):
            for sample in read_shard(shard):
                if isinstance(sample, Sample):
                    index = row[str(sample.uid)]
                    yield index, change(decode_image(sample.image), index)


def starts(sizes: Mapping[str, int], last: str) -> dict[str, int]:
    """Where each kind begins when they are numbered one after another; the last may have any size."""
    ends = np.cumsum(list(sizes.values())).tolist()
    return dict(zip((*sizes, last), [0, *ends], strict=True))


def gathered(
    numbers: IntArray, first: Mapping[str, int], read: Callable[[str, IntArray], RealArray]
) -> RealArray:
    """Rows (n, D) by their numbers (n,), read from the kinds that they fall into; no other kind is made."""
    names, begins = list(first), np.array(list(first.values()))
    part = np.searchsorted(begins, numbers, side="right") - 1
    chosen = {int(k): read(names[k], numbers[part == k] - begins[k]) for k in np.unique(part)}
    out = np.empty((len(numbers), next(iter(chosen.values())).shape[1]), np.float32)
    for k, values in chosen.items():
        out[part == k] = values
    return out
