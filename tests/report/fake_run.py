"""A run folder as the pipeline leaves it: real pictures in a real tar, and invented results."""

import io
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from influencespace.data.artifacts import Manifest, write_json, write_manifest
from tests.planted import write_pairs

HOSTILE = (
    '<script>alert(1)</script><img src=https://evil.example/x.png onerror=alert(2)> & "quoted" {{ 7 * 7 }}'
)
HOSTILE_UID = "\"><script>alert('uid')</script>"
QUANTILES = 20
UNIT = 1e-5
WARNING = "the proxy has not converged: its mean in-training influence is 0.14 standard deviations"


def write_run(run: Path, data: Path, images: int = 120, clusters: int = 6) -> dict[str, Any]:
    """Write the folder of a finished run; returns its summary."""
    uids = write_pictures(run / "embed" / "pool", data / "pool.tar", images)
    write_decisions(run, uids, clusters)
    summary = invented_summary(run)
    write_json(run / "summary.json", summary)
    (run / "config.yaml").write_text("# <b>resolved</b>\nencoder: fake\ncluster:\n  k: 6\n")
    return summary


def write_pictures(folder: Path, shard: Path, images: int) -> list[str]:
    """Pairs of pictures in a tar, the first with hostile text, and two that were rejected; returns their uids."""
    folder.mkdir(parents=True)
    shard.parent.mkdir(parents=True, exist_ok=True)
    uids = [HOSTILE_UID, *(f"{i:032x}" for i in range(1, images))]
    with tarfile.open(shard, "w") as tar:
        for i in range(images):
            picture = io.BytesIO()
            Image.new("RGB", (400, 300), (i % 256, 128, i // 256)).save(picture, "PNG")
            member = tarfile.TarInfo(f"{i:06d}.png")
            member.size = picture.tell()
            tar.addfile(member, io.BytesIO(picture.getvalue()))
    with tarfile.open(shard) as tar:
        members = tar.getmembers()
    pairs = {
        "uid": uids,
        "image": list(range(images)),
        "caption": [HOSTILE, *(f"a picture, number {i}" for i in range(1, images))],
        "image_path": [str(shard)] * images,
        "image_offset": [member.offset_data for member in members],
        "image_length": [member.size for member in members],
        "image_row": [-1] * images,
    }
    write_pairs(folder, pairs)
    rejected = {
        "shard": [str(shard)] * 2,
        "uid": ["<i>text</i>", "empty"],
        "reason": ["no picture: <i>text</i>", "the caption is empty"],
    }
    pq.write_table(pa.table(rejected), folder / "rejected.parquet")
    return uids


def write_decisions(run: Path, uids: list[str], clusters: int) -> None:
    """Strata with a plausible shape, and a decision on each pair that agrees with them."""
    rng = np.random.default_rng(0)
    cluster, quantile = (axis.reshape(-1) for axis in np.indices((clusters, QUANTILES)))
    truth = UNIT * (0.55 + np.tanh((quantile - 6) / 3) + 0.25 * np.sin(2 * cluster))
    se = UNIT * rng.uniform(0.1, 0.3, len(truth))
    influence = truth + rng.normal(0, 1, len(truth)) * se
    pairs = rng.integers(20, 60, len(truth))
    names = [f"c{c:03d}/q{q:02d}" for c, q in zip(cluster, quantile)]
    kept = (truth >= 0).astype(float)
    (run / "selection").mkdir(parents=True, exist_ok=True)
    columns = {
        "stratum": names,
        "cluster": cluster,
        "quantile": quantile,
        "pairs": pairs,
        "scored": pairs // 2,
        "quality": 0.2 + quantile / 40,
        "influence_in": influence * 0.8,
        "influence_out": influence * 1.2,
        "influence": influence,
        "influence_se": se,
        "pooled": truth,
        "pooled_se": se / 2,
        "kept": kept,
    }
    pq.write_table(pa.table(columns), run / "selection" / "strata.parquet")
    stratum = rng.integers(0, len(names), len(uids))
    stratum[uids.index(HOSTILE_UID)] = int(np.argmin(truth))
    keep = kept[stratum] > 0
    reason = np.where(keep, "kept", "harmful").astype("U20")
    duplicate = keep & (rng.random(len(uids)) < 0.03)
    reason[duplicate], keep[duplicate] = "duplicate", False
    decisions = {
        "uid": uids,
        "kept": keep,
        "weight": keep.astype(np.float32),
        "score": truth[stratum].astype(np.float32),
        "score_se": (se[stratum] / 2).astype(np.float32),
        "stratum": [names[i] for i in stratum],
        "reason": reason,
    }
    pq.write_table(pa.table(decisions), run / "curated.parquet")
    manifest = Manifest(
        stage="selection",
        fingerprint="c" * 32,
        details={
            "rule": "T < 0",
            "threshold": 0.0,
            "kept_fraction": float(keep.mean()),
            "caption_control": caption_control(),
            "warnings": [WARNING],
        },
    )
    write_manifest(run / "selection", manifest)


def caption_control() -> dict[str, float]:
    return {
        "estimated_wrong_share": 0.2431,
        "influence_top_half": 1.62 * UNIT,
        "influence_mean": 0.71 * UNIT,
        "influence_permuted": -2.13 * UNIT,
    }


def invented_summary(run: Path) -> dict[str, Any]:
    """Numbers of the shape that the pipeline writes."""
    recalls = {"curated": 41.237, "everything": 38.911, "random": 37.052, "clip_score": 40.918}
    recalls["neg_clip_loss"] = 41.871
    kept = pq.read_table(run / "curated.parquet")["kept"].to_numpy()
    share = float(kept.mean())
    rejected = ["no picture: <i>text</i>", "the caption is empty"]
    halves = {"curated": 0.71, "everything": 0.64, "random": 0.83, "clip_score": 0.77, "neg_clip_loss": 0.69}
    return {
        "methods": {
            name: {
                "mean_recall": recall,
                "mean_recall_ci": [recall - halves[name], recall + halves[name]],
                "recall": {
                    "image_to_text": {"1": recall - 22.31, "5": recall + 4.13, "10": recall + 15.07},
                    "text_to_image": {"1": recall - 23.62, "5": recall + 3.24, "10": recall + 14.18},
                },
                "kept_fraction": 1.0 if name == "everything" else share,
                "steps": 1200,
                "seconds": 12.34 + recall / 10,
                "seeds": [0, 1, 2],
                "zero_shot_accuracy": None,
            }
            for name, recall in recalls.items()
        },
        "comparisons": {
            "everything": {"difference": 2.326, "ci": [1.314, 3.338]},
            "random": {"difference": 4.185, "ci": [3.021, 5.349]},
            "clip_score": {"difference": 0.319, "ci": [-0.642, 1.281]},
            "neg_clip_loss": {"difference": -0.634, "ci": [-1.113, -0.155]},
        },
        "kept_fraction": share,
        "rows": {"pool": len(kept), "target": 1000, "test": 1000},
        "rejected": {"pool": len(rejected), "target": 0, "test": 0},
        "rejected_reasons": {reason: rejected.count(reason) for reason in rejected},
        "truncated_captions": 7,
        "stages": {
            "embed pool": {"seconds": 48.21, "rows_in": len(kept) + 2, "rows_out": len(kept), "rejected": 2}
            | {
                "busy": 0.875,
                "peak_memory": 1_234_000_000,
                "images_per_second": 321.5,
                "bytes_read": 6_780_000_000,
            }
            | {"images_per_second_per_gpu": 107.2, "encoders_busy": 0.9331},
            "split": {"seconds": 0.4, "rows_in": 3000, "rows_out": 2000, "rejected": 1000},
            "proxies": {"seconds": 9.7, "rows_in": len(kept)},
            "cluster": {"seconds": 3.2, "rows_in": len(kept)},
            "curvature": {"seconds": 5.5, "rows_in": 4096},
            "influence": {"seconds": 21.4, "rows_in": len(kept)},
            "selection": {"seconds": 0.8, "rows_in": len(kept)},
            "train": {"seconds": 95.3, "rows_in": len(kept)},
            "evaluate": {"seconds": 11.9, "rows_in": 1000},
        },
        "versions": {"python": "3.11.9", "influencespace": "0.1.0", "torch": "2.6.0", "ray": "2.50.0"},
        "seeds": [0, 1, 2],
        "caption_control": caption_control(),
        "notes": [
            "no target was given: the better half of 1,000 pairs of the pool, drawn by seed, is the target",
            WARNING,
        ],
        "paths": {name: str(run / name) for name in ("curated.parquet", "report.html")},
    }


if __name__ == "__main__":
    from influencespace.report import write_report

    home = Path(sys.argv[1])
    write_run(home / "demo", home / "data", images=600, clusters=12)
    print(write_report(home / "demo"))
