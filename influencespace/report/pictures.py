"""Pairs to look at: the best, the borderline and the worst by score, as small pictures that travel in the page."""

import base64
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from influencespace.data.artifacts import read_manifest
from influencespace.data.buckets import buckets_of
from influencespace.data.embeddings import EmbeddingTable
from influencespace.data.images import RejectedImage, decode_image, read_image_bytes
from influencespace.data.mirror import here
from influencespace.data.schema import ImageRef
from influencespace.report.strata import records
from influencespace.stages.selection.selection import CURATED

SIDE = 160  # pixels of the longer side
QUALITY = 80  # of the JPEG; a picture takes about 6 kB
SHOWN = 12
# Candidates for each group: several captions of one image, or copies of it, are shown once.
CANDIDATES = 10 * SHOWN
MAX_CAPTION = 300
BATCH_ROWS = 65_536


PLACE = ("path", "offset", "length", "row")


@dataclass(frozen=True, kw_only=True)
class Example:
    """One pair of the page; `picture` is a data URI, None where the picture cannot be read any more."""

    caption: str
    picture: str | None
    decision: Any
    """The pair's row of curated.parquet, with an attribute for each of CURATED; `score_se` may be nan."""


def examples(run: Path, threshold: float = 0.0, margin: float = 0.0) -> dict[str, list[Example]]:
    """The `best` kept pairs, those nearest to the decision (`borderline`), and the `worst`.

    The decision keeps what is above `threshold` when `margin` standard errors are added. Both files are read in
    batches; only candidates are held. Pairs without a score are left out.
    """
    chosen = _choose(run / "curated.parquet", threshold, margin)
    uids = {decision.uid for decisions in chosen.values() for decision in decisions}
    pairs = find_pairs(run / "embed" / "pool", uids)
    return {name: list(_shown(decisions, pairs)) for name, decisions in chosen.items()}


def _choose(curated: Path, threshold: float, margin: float) -> dict[str, list[Any]]:
    """CANDIDATES for each group; ties stay in canonical order, which is random order."""
    first: dict[str, list[pd.DataFrame]] = {"best": [], "borderline": [], "worst": []}
    for batch in pq.ParquetFile(here(curated)).iter_batches(BATCH_ROWS, columns=list(CURATED)):
        rows = batch.to_pandas().fillna({"stratum": "", "reason": ""})
        rows = rows.astype({"score": float, "score_se": float})
        ranks = {
            "best": -rows["score"].where(rows["kept"]),
            "borderline": (rows["score"] + margin * rows["score_se"].fillna(0) - threshold).abs(),
            "worst": rows["score"],
        }
        for name, rank in ranks.items():
            known = rows.assign(rank=rank).dropna(subset="rank")
            first[name] = [pd.concat([*first[name], known]).nsmallest(CANDIDATES, "rank")]
    return {name: [row for frame in frames for row in records(frame)] for name, frames in first.items()}


def _shown(decisions: list[Any], pairs: Mapping[str, dict[str, Any]]) -> Iterator[Example]:
    """The first SHOWN of `decisions`, each image once."""
    images: set[int] = set()
    for decision in decisions:
        pair = pairs.get(decision.uid)
        if pair is None or pair["image"] in images or len(images) == SHOWN:
            continue
        images.add(pair["image"])
        yield Example(caption=shortened(pair["caption"]), picture=picture(pair), decision=decision)


def find_pairs(artifact: Path, uids: set[str]) -> Mapping[str, dict[str, Any]]:
    """Caption and place of the picture of each uid, from an embedding artifact; none where it is not there any more."""
    if read_manifest(artifact) is None:
        return {}
    table = EmbeddingTable.open(artifact)
    columns = ["uid", "image", "caption", *(f"image_{name}" for name in PLACE)]
    wanted = pa.array(sorted(uids), pa.large_string())
    rows: dict[str, dict[str, Any]] = {}
    for span in buckets_of(len(table), BATCH_ROWS):
        batch = table.rows(*span, *columns)
        mine = batch.filter(pc.is_in(batch["uid"], value_set=wanted))
        rows |= {row["uid"]: row for row in mine.to_pylist()}
    return rows


def picture(pair: Mapping[str, Any]) -> str | None:
    """A row of an artifact's pairs as a small picture in a data URI; None where it cannot be read any more."""
    if not pair["image_path"]:  # embeddings that were imported without pictures
        return None
    try:
        return thumbnail(read_image_bytes(ImageRef(**{name: pair[f"image_{name}"] for name in PLACE})))
    except (OSError, RejectedImage, pa.ArrowInvalid):  # moved or changed since the run
        return None


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
