"""The benchmark of scale: its stored embeddings, what it sees of processes, and its exponents."""

import math
import os
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks.speed import stored
from benchmarks.speed.scale import exponent
from benchmarks.speed.stored import Noisy
from benchmarks.speed.vit import vit_b_32
from benchmarks.speed.watch import Sample, Watched, watch
from influencespace.data.imported import EmbeddingBatch, read_imported_embeddings
from influencespace.data.pair_set import PairSet
from influencespace.models.encoders import load_encoder
from tests.planted import plant


@pytest.fixture
def noisy(tmp_path: Path) -> Noisy:
    return Noisy.of(PairSet(plant(tmp_path / "base", 300, dimension=32).folder))


def test_stored_pairs_are_unit_vectors_of_distinct_uids_some_of_them_wrong(
    noisy: Noisy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "FILE_PAIRS", 400)
    noisy.write(tmp_path / "stored", 1001)
    files = sorted((tmp_path / "stored").iterdir())
    assert [pq.read_metadata(path).num_rows for path in files] == [400, 400, 201]
    batches = list(read_imported_embeddings(str(tmp_path / "stored")))
    assert all(isinstance(batch, EmbeddingBatch) for batch in batches)
    uids = [uid for batch in batches for uid in batch.uids]
    assert len(set(uids)) == 1001
    images, texts = (
        np.concatenate([getattr(batch, name) for batch in batches]) for name in ("images", "texts")
    )
    np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1, atol=1e-5)
    # two captions an image, and captions that many images share
    assert len(np.unique(images, axis=0)) == pytest.approx(1001 / 2, abs=2)
    assert 970 < len(np.unique(texts, axis=0)) < 1001
    again, wrong = noisy.file(1, 400)
    assert again.equals(pq.read_table(files[1]))
    assert wrong.mean() == pytest.approx(stored.WRONG, abs=0.08)


def test_a_right_caption_is_of_the_image_that_it_stands_beside(noisy: Noisy) -> None:
    table, wrong = noisy.file(0, 2000)
    images, texts = (
        np.stack(table[name].to_numpy()).astype(np.float32) for name in ("image_embedding", "text_embedding")
    )
    nearest_image, nearest_text = (images @ noisy.images.T).argmax(1), (texts @ noisy.texts.T).argmax(1)
    same = nearest_image == nearest_text
    assert same[~wrong].mean() > 0.8
    assert same[wrong].mean() < 0.1


def test_memory_cpu_and_bytes_of_all_processes_of_a_command_are_seen(tmp_path: Path) -> None:
    child = "import time; x = b'1' * 200_000_000; time.sleep(1.5)"
    code = f"""
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {child!r}])
began = time.process_time()
while time.process_time() - began < 0.5:
    pass
with open({str(tmp_path / "file")!r}, "wb") as file:
    file.write(bytes(3_000_000))
    os.fsync(file.fileno())
child.wait()
time.sleep(0.3)
"""
    watched = watch([sys.executable, "-c", code], os.environ, tmp_path / "log", every=0.05)
    whole = watched.between(0, math.inf)
    assert 200 < whole["peak_mb"] < 300
    assert whole["together_mb"] >= whole["peak_mb"]
    assert whole["process"].startswith(Path(sys.executable).resolve().name[:6])
    assert whole["cpu_seconds"] >= 0.5
    assert whole["written_mb"] >= 3
    assert watched.seconds > 1.5


def test_a_command_that_fails_is_an_error_with_its_output(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)ended with 1.*no such pool"):
        watch([sys.executable, "-c", "raise SystemExit('no such pool')"], os.environ, tmp_path / "log")


def test_a_stage_has_what_was_seen_between_its_beginning_and_its_end() -> None:
    def at(seconds: float, largest: int, cpu: float) -> Sample:
        written = int(cpu * 1e6)
        return Sample(
            at=seconds, largest=largest, name=str(largest), together=2 * largest, cpu=cpu, written=written
        )

    watched = Watched(
        samples=[at(1, 10**6, 1.0), at(2, 5 * 10**6, 3.0), at(3, 4 * 10**6, 7.0), at(4, 9 * 10**6, 8.0)]
    )
    seen = watched.between(1.5, 3.5)
    assert seen == {"peak_mb": 5, "process": "5000000", "together_mb": 10, "cpu_seconds": 6, "written_mb": 6}
    assert watched.between(1.1, 1.2)["peak_mb"] is None


def test_the_exponent_is_that_of_a_power_law() -> None:
    assert exponent((1000, 3.0), (8000, 3.0 * 8**1.3)) == pytest.approx(1.3)


def test_the_encoder_has_the_size_of_a_vit_b_32(tmp_path: Path) -> None:
    captions = ["two dogs run over a green field", "a red square"]
    encoder = load_encoder(vit_b_32(tmp_path, captions, tiny=True))
    tokens, _ = encoder.tokenize(captions)
    assert encoder.encode_text(tokens).shape == (2, 512)
