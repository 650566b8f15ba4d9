"""Pairs to look at: the best, the borderline and the worst by score, as small pictures that travel in the page."""

import base64
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from influencespace.data.images import RejectedImage, decode_image, read_image_bytes
from influencespace.data.schema import ImageRef

SIDE = 160  # pixels of the longer side
QUALITY = 80  # of the JPEG; a picture takes about 6 kB
SHOWN = 12
# Candidates for each group: several captions of one image, or copies of it, are shown once.
CANDIDATES = 10 * SHOWN
MAX_CAPTION = 300
BATCH_ROWS = 65_536

DECISION = ("uid", "kept", "weight", "score", "score_se", "stratum", "reason")


@dataclass(frozen=True, kw_only=True)
class Example:
    """One pair of the page; `picture` is a data URI, None where the picture cannot be read any more."""

    uid: str
    caption: str
    picture: str | None
    kept: bool
    weight: float
    score: float
    score_se: float | None
    stratum: str
    reason: str


def examples(run: Path, threshold: float = 0.0, margin: float = 0.0) -> dict[str, list[Example]]:
    """The `best` kept pairs, those nearest to the decision (`borderline`), and the `worst`.

    The decision keeps what is above `threshold` when `margin` standard errors are added. Both files are read in
    batches; only candidates are held. Pairs without a score are left out.
    """
    chosen = _choose(run / "curated.parquet", threshold, margin)
    uids = {row["uid"] for rows in chosen.values() for row in rows}
    pairs = find_pairs(run / "embed" / "pool" / "pairs.parquet", uids)
    return {name: list(_shown(rows, pairs)) for name, rows in chosen.items()}


def thumbnail(data: bytes) -> str:
    """An encoded picture as a small JPEG in a data URI; raises RejectedImage when it is none."""
    image = decode_image(data)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def shortened(caption: str) -> str:
    """A caption that fits below a picture."""
    return caption if len(caption) <= MAX_CAPTION else f"{caption[:MAX_CAPTION]} …"


@dataclass
class _Smallest:
    """The rows of smallest rank so far; ties stay in canonical order, which is random order."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    ranks: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def add(self, batch: Any, ranks: npt.NDArray[np.float64]) -> None:
        """Rows of `batch` with their ranks (n,); infinite ones are not wanted."""
        first = np.argsort(ranks, kind="stable")[:CANDIDATES]
        first = first[np.isfinite(ranks[first])]
        rows = [*self.rows, *batch.take(pa.array(first)).to_pylist()]
        ranks = np.concatenate([self.ranks, ranks[first]])
        order = np.argsort(ranks, kind="stable")[:CANDIDATES]
        self.rows, self.ranks = [rows[i] for i in order], ranks[order]


def _choose(curated: Path, threshold: float, margin: float) -> dict[str, list[dict[str, Any]]]:
    groups = {name: _Smallest() for name in ("best", "borderline", "worst")}
    for batch in pq.ParquetFile(curated).iter_batches(BATCH_ROWS, columns=list(DECISION)):
        score = pc.fill_null(batch.column("score").cast(pa.float64()), float("nan")).to_numpy()
        error = pc.fill_null(batch.column("score_se").cast(pa.float64()), 0.0).to_numpy()
        kept = batch.column("kept").to_numpy(zero_copy_only=False)
        ranks = {
            "best": np.where(kept, -score, np.inf),
            "borderline": np.abs(score + margin * np.nan_to_num(error) - threshold),
            "worst": score,
        }
        for name, group in groups.items():
            group.add(batch, np.where(np.isnan(score), np.inf, ranks[name]))
    return {name: group.rows for name, group in groups.items()}


def find_pairs(pairs: Path, uids: set[str]) -> Mapping[str, dict[str, Any]]:
    """Caption and place of the picture of each uid."""
    if not pairs.is_file():
        return {}
    columns = ["uid", "image", "caption", "image_path", "image_offset", "image_length", "image_row"]
    wanted = pa.array(sorted(uids), pa.string())
    found: dict[str, dict[str, Any]] = {}
    for batch in pq.ParquetFile(pairs).iter_batches(BATCH_ROWS, columns=columns):
        mine = batch.filter(pc.is_in(batch.column("uid").cast(pa.string()), value_set=wanted))
        found |= {row["uid"]: row for row in mine.to_pylist()}
    return found


def _shown(rows: list[dict[str, Any]], pairs: Mapping[str, dict[str, Any]]) -> Iterator[Example]:
    """The first SHOWN of `rows`, each image once."""
    seen: set[int] = set()
    for row in rows:
        pair = pairs.get(row["uid"])
        if pair is None or pair["image"] in seen:
            continue
        seen.add(pair["image"])
        yield Example(
            uid=row["uid"],
            caption=shortened(pair["caption"]),
            picture=picture(pair),
            kept=row["kept"],
            weight=row["weight"],
            score=row["score"],
            score_se=row["score_se"] if row["score_se"] == row["score_se"] else None,
            stratum=row["stratum"] or "",
            reason=row["reason"] or "",
        )
        if len(seen) == SHOWN:
            return


def picture(pair: Mapping[str, Any]) -> str | None:
    """A row of pairs.parquet as a small picture in a data URI; None where it cannot be read any more."""
    if not pair["image_path"]:  # embeddings that were imported without pictures
        return None
    ref = ImageRef(
        path=pair["image_path"],
        offset=pair["image_offset"],
        length=pair["image_length"],
        row=pair["image_row"],
    )
    try:
        return thumbnail(read_image_bytes(ref))
    except (OSError, RejectedImage, pa.ArrowInvalid):  # moved or changed since the run
        return None
