"""Which pairs are shown: the same ones whatever the size of the batches, each image once."""

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from influencespace.data.images import RejectedImage
from influencespace.report import pictures
from influencespace.report.pictures import examples, thumbnail
from tests.planted import write_pairs

SCORES = st.lists(st.one_of(st.none(), st.just(math.nan), st.integers(-9, 9).map(float)), max_size=60)


def write(run: Path, scores: list[float | None], images: int | None = None) -> None:
    """A run with these scores; pairs of positive score are kept, and have no pictures."""
    count = len(scores)
    (run / "embed" / "pool").mkdir(parents=True, exist_ok=True)
    decisions = {
        "uid": pa.array([f"u{i}" for i in range(count)], pa.string()),
        "kept": pa.array([bool(score and score > 0) for score in scores], pa.bool_()),
        "weight": pa.array([1.0] * count, pa.float32()),
        "score": pa.array(scores, pa.float32()),
        "score_se": pa.array([None] * count, pa.float32()),
        "stratum": pa.array([""] * count, pa.string()),
        "reason": pa.array([None] * count, pa.string()),
    }
    pq.write_table(pa.table(decisions), run / "curated.parquet", row_group_size=7)
    pairs = {
        "uid": decisions["uid"],
        "image": pa.array(np.arange(count) % (images or max(count, 1))),
        "caption": pa.array([f"caption {i} " + "long " * i for i in range(count)], pa.string()),
    }
    write_pairs(run / "embed" / "pool", pairs, bucket_size=5)


def uids(run: Path, threshold: float = 0.0) -> dict[str, list[str]]:
    return {name: [pair.decision.uid for pair in group] for name, group in examples(run, threshold).items()}


@given(scores=SCORES, threshold=st.integers(-3, 3), batch=st.integers(1, 70))
def test_the_best_the_worst_and_the_nearest(
    tmp_path_factory: pytest.TempPathFactory, scores: list[float | None], threshold: int, batch: int
) -> None:
    run = tmp_path_factory.mktemp("any")
    write(run, scores)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "BATCH_ROWS", batch)
        shown = uids(run, threshold)
    known = [(i, s) for i, s in enumerate(scores) if s is not None and not math.isnan(s)]

    def first(rows: list[tuple[int, float]]) -> list[str]:
        return [f"u{i}" for i, _ in rows[:12]]

    assert shown["best"] == first(sorted((r for r in known if r[1] > 0), key=lambda r: -r[1]))
    assert shown["worst"] == first(sorted(known, key=lambda r: r[1]))
    assert shown["borderline"] == first(sorted(known, key=lambda r: abs(r[1] - threshold)))


def test_each_image_is_shown_once(tmp_path: Path) -> None:
    write(tmp_path, [float(i + 1) for i in range(60)], images=20)
    assert uids(tmp_path)["best"] == [f"u{i}" for i in range(59, 47, -1)]
    write(tmp_path, [float(i + 1) for i in range(60)], images=5)
    assert uids(tmp_path)["best"] == ["u59", "u58", "u57", "u56", "u55"]


def test_long_captions_are_cut(tmp_path: Path) -> None:
    write(tmp_path, [float(i + 1) for i in range(80)])
    caption = examples(tmp_path)["best"][0].caption
    assert len(caption) <= pictures.MAX_CAPTION + 2
    assert caption.endswith("…")


def test_what_is_no_picture_is_refused() -> None:
    with pytest.raises(RejectedImage):
        thumbnail(b"<svg onload=alert(1)>")
