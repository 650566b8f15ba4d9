"""A run folder as the pipeline leaves it: real shards and embeddings of a fake encoder, and invented results."""

import io
import json
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from influencespace.data.artifacts import Manifest, write_json, write_manifest
from influencespace.data.embeddings import EmbeddingTable, read_rejected
from influencespace.data.readers import list_shards
from influencespace.data.synthetic import WorldConfig, write_world
from influencespace.data.uids import digest
from influencespace.engine.local import LocalEngine
from influencespace.stages.ingest.embed import embed
from influencespace.stages.ingest.encode import EmbedConfig

HOSTILE = (
    '<script>alert(1)</script><img src=https://evil.example/x.png onerror=alert(2)> & "quoted" {{ 7 * 7 }}'
)
HOSTILE_UID = "\"><script>alert('uid')</script>"
QUANTILES = 20
UNIT = 1e-5
WARNING = "the proxy is not at rest: its mean in-training influence is 0.14 standard deviations"


@dataclass
class FakeEncoder:
    """Embeds pixels by themselves and a text by its digest."""

    dimension: int = 48
    fingerprint: str = "fake"

    def preprocess_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        pixels = [np.asarray(image.resize((4, 4)), np.float32).reshape(-1) for image in images]
        return torch.tensor(np.stack(pixels)) - 127.3

    def tokenize(self, texts: Sequence[str]) -> tuple[dict[str, torch.Tensor], list[bool]]:
        rows = [np.frombuffer(digest(text.encode()), np.uint8).astype(np.float32) for text in texts]
        return {"ids": torch.tensor(np.stack(rows))}, [len(text) > 80 for text in texts]

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(pixels, dim=1)

    def encode_text(self, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.normalize(tokens["ids"].repeat(1, 3) - 127.3, dim=1)


def write_run(run: Path, data: Path, images: int = 120, clusters: int = 6) -> dict[str, Any]:
    """Write the folder of a finished run; returns its summary."""
    write_world(data, WorldConfig(pretrain=0, pool=images, target=0, test=0, shard_size=50))
    write_dirt(data / "pool" / "dirt.tar")
    config = EmbedConfig(encoder="fake")
    shards = list_shards(str(data / "pool"))
    embed(
        shards,
        config,
        run / "embed" / "pool",
        LocalEngine(),
        load_encoder=lambda config, device: FakeEncoder(),
    )
    write_decisions(run, clusters)
    summary = invented_summary(run)
    write_json(run / "summary.json", summary)
    (run / "config.yaml").write_text("# <b>resolved</b>\nencoder: fake\ncluster:\n  k: 6\n")
    return summary


def write_dirt(path: Path) -> None:
    """A pair with hostile text, and two that are rejected."""
    picture = io.BytesIO()
    Image.new("RGB", (400, 300), "teal").save(picture, "PNG")
    fields = json.dumps({"uid": HOSTILE_UID, "caption": HOSTILE}).encode()
    members = {
        "hostile.png": picture.getvalue(),
        "hostile.json": fields,
        "<i>text</i>.jpg": b"only text",
        "<i>text</i>.txt": b"a caption",
        "empty.png": picture.getvalue(),
        "empty.txt": b"  ",
    }
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def write_decisions(run: Path, clusters: int) -> None:
    """Strata with a plausible shape, and a decision on each pair that agrees with them."""
    uids = EmbeddingTable.open(run / "embed" / "pool").pairs("uid")["uid"].to_pylist()
    rng = np.random.default_rng(0)
    cluster, quantile = (axis.reshape(-1) for axis in np.indices((clusters, QUANTILES)))
    truth = UNIT * (0.55 + np.tanh((quantile - 6) / 3) + 0.25 * np.sin(2 * cluster))
    se = UNIT * rng.uniform(0.1, 0.3, len(truth))
    influence = truth + rng.normal(0, 1, len(truth)) * se
    pairs = rng.integers(20, 60, len(truth))
    names = [f"c{c:03d}/q{q:02d}" for c, q in zip(cluster, quantile)]
    kept = (truth >= 0).astype(float)
    (run / "curate").mkdir(parents=True, exist_ok=True)
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
    pq.write_table(pa.table(columns), run / "curate" / "strata.parquet")
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
        stage="curate",
        fingerprint="c" * 32,
        details={
            "rule": "T < 0",
            "threshold": 0.0,
            "kept_fraction": float(keep.mean()),
            "caption_control": caption_control(),
            "warnings": [WARNING],
        },
    )
    write_manifest(run / "curate", manifest)


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
    rejected = read_rejected(run / "embed" / "pool")["reason"].to_pylist()
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
            "embed pool": {"seconds": 48.21, "rows_in": len(kept) + 2, "rows_out": len(kept), "rejected": 2},
            "proxy": {"seconds": 9.7, "rows_in": len(kept)},
            "cluster": {"seconds": 3.2, "rows_in": len(kept)},
            "curvature": {"seconds": 5.5, "rows_in": 4096},
            "attribute": {"seconds": 21.4, "rows_in": len(kept)},
            "curate": {"seconds": 0.8, "rows_in": len(kept)},
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
