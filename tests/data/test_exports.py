"""Exports: what comes back from any of them is exactly what was kept, whatever was interrupted on the way."""

import json
import tarfile
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from finished_runs import HEX, WRITERS, Encode, write_run, write_tables, write_tar, write_tars
from hypothesis import example, given, settings
from hypothesis import strategies as st
from shards import read_all

from influencespace.data import exports
from influencespace.data.artifacts import read_manifest
from influencespace.data.embeddings import EmbeddingTable
from influencespace.data.exports import export, folder, npy, parquet, pictures, selection
from influencespace.data.exports.npy import hash_of, to_numbers
from influencespace.data.exports.selection import FinishedRun, select
from influencespace.data.integrity import describe
from influencespace.data.schema import ImageRef
from influencespace.data.uids import digest, pair_uids
from influencespace.errors import InputError
from tests.planted import write_pairs

Pairs = dict[str, tuple[str, bytes, str | None]]

SHARDED = ("webdataset", "parquet")


def exported(spec: str | Path) -> Pairs:
    """uid -> caption, encoded picture and group, as our readers find them."""
    samples, rejections = read_all(spec)
    assert not rejections
    pairs = [
        (uid, (caption, sample.image, sample.group))
        for sample in samples
        for uid, caption in zip(pair_uids(sample), sample.captions, strict=True)
    ]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def original(rows: Sequence[dict[str, Any]]) -> Pairs:
    return {
        row["uid"]: (row["caption"], pictures.read_image_bytes(ImageRef.of(row)), row["group"])
        for row in rows
    }


def visible(out: Path) -> dict[str, bytes]:
    """The exported files; the manifest holds the seconds."""
    return {p.name: p.read_bytes() for p in out.iterdir() if p.name != "manifest.json"}


@pytest.fixture
def run(tmp_path: Path, encoded_image: Encode) -> Path:
    write_run(tmp_path / "run", write_tars(tmp_path / "data", encoded_image))
    return tmp_path / "run"


@pytest.mark.parametrize("to", SHARDED)
@pytest.mark.parametrize("source", WRITERS)
def test_round_trip_from_any_source(tmp_path: Path, encoded_image: Encode, source: str, to: str) -> None:
    kept = write_run(tmp_path / "run", WRITERS[source](tmp_path / "data", encoded_image))
    counted: list[int] = []
    manifest = export(tmp_path / "run", to, tmp_path / "out", shard_size=4, advance=counted.append)
    assert exported(tmp_path / "out") == original(kept)
    assert manifest.rows_out == sum(counted) == len(kept)
    assert len(manifest.files) == len(counted) == -(-len(kept) // 4)
    assert not list((tmp_path / "out").glob(".*"))


@settings(max_examples=12)
@example(size=3, dropped=set(range(14)))
@given(size=st.integers(1, 20), dropped=st.sets(st.integers(0, 13)))
def test_any_shard_size_and_any_choice_export_what_was_kept(
    tmp_path_factory: pytest.TempPathFactory, encoded_image: Encode, size: int, dropped: set[int]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    kept = write_run(folder / "run", write_tars(folder / "data", encoded_image), sorted(dropped))
    for to in SHARDED:
        manifest = export(folder / "run", to, folder / to, shard_size=size)
        assert manifest.rows_out == len(kept)
        if kept:
            assert exported(folder / to) == original(kept)
        else:
            assert manifest.files == {}


def test_weights_scores_and_groups_travel_with_the_pairs(tmp_path: Path, encoded_image: Encode) -> None:
    kept = write_run(tmp_path / "run", write_tars(tmp_path / "data", encoded_image))
    names = ("caption", "weight", "score", "group")
    wanted = {row["uid"]: {name: row[name] for name in names} for row in kept}

    export(tmp_path / "run", "webdataset", tmp_path / "tars")
    with tarfile.open(tmp_path / "tars" / "00000000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    found = {}
    for name, data in members.items():
        if name.endswith(".json"):
            fields = json.loads(data)
            assert members[name.replace(".json", ".txt")].decode() == fields["caption"]
            found[fields.pop("uid")] = fields
    assert found == wanted
    for name, data in members.items():
        if not name.endswith((".json", ".txt")):
            assert name.rpartition(".")[2] == (pictures.extension(data) or "").replace("gif", "jpg")

    export(tmp_path / "run", "parquet", tmp_path / "parquet")
    rows = pq.read_table(tmp_path / "parquet" / "00000000.parquet").to_pylist()
    assert {row["uid"]: {name: row[name] for name in names} for row in rows} == wanted


def test_npy_is_the_sorted_list_of_datacomp(run: Path, tmp_path: Path) -> None:
    manifest = export(run, "npy", tmp_path / "out")
    numbers = np.load(tmp_path / "out" / "uids.npy", allow_pickle=False)
    table = pq.read_table(tmp_path / "out" / "uids.parquet")
    kept = [row["uid"] for row in pq.read_table(run / "curated.parquet").to_pylist() if row["kept"]]
    assert table["uid"].to_pylist() == kept
    hashes = table["hash"].to_pylist()
    assert hashes == [uid if uid == HEX or len(uid) == 32 else digest(uid.encode()).hex() for uid in kept]
    assert numbers.dtype == np.dtype("u8,u8")
    assert numbers.shape == (manifest.rows_out,) == (len(kept),)
    assert [f"{high:016x}{low:016x}" for high, low in numbers.tolist()] == sorted(hashes)


@given(st.lists(st.integers(0, 2**128 - 1).map(lambda number: f"{number:032x}"), max_size=20), st.text())
def test_uids_become_numbers_that_sort_like_their_digits(uids: list[str], other: str) -> None:
    numbers = np.sort(to_numbers(uids))
    assert [f"{high:016x}{low:016x}" for high, low in numbers.tolist()] == sorted(uids)
    assert [hash_of(uid) for uid in uids] == uids, "those of DataComp are their own"
    assert len(hash_of(other)) == 32


@pytest.mark.parametrize("to", SHARDED)
def test_an_interrupted_export_continues(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    export(run, to, tmp_path / "whole", shard_size=3)
    out, calls = tmp_path / "out", [0]
    read = pictures.read_image_bytes

    def fails(ref: ImageRef) -> bytes:
        calls[0] += 1
        if calls[0] == 5:
            raise KeyboardInterrupt
        return read(ref)

    with monkeypatch.context() as patch:
        patch.setattr(pictures, "read_image_bytes", fails)
        with pytest.raises(KeyboardInterrupt):
            export(run, to, out, shard_size=3)
    assert read_manifest(out) is None
    first = next(p for p in sorted(out.iterdir()) if p.suffix in (".tar", ".parquet"))
    before = first.stat().st_ino
    (out / f".{first.name}.0123.tmp").write_bytes(b"left by a kill")
    export(run, to, out, shard_size=3)
    assert first.stat().st_ino == before
    assert visible(out) == visible(tmp_path / "whole")


@pytest.mark.parametrize("to", exports.FORMATS)
def test_the_same_run_gives_the_same_bytes_and_a_finished_export_is_left_alone(
    run: Path, tmp_path: Path, to: str
) -> None:
    first = export(run, to, tmp_path / "a", shard_size=3)
    export(run, to, tmp_path / "b", shard_size=3)
    assert visible(tmp_path / "a") == visible(tmp_path / "b")
    before = {path: path.stat().st_ino for path in (tmp_path / "a").iterdir()}
    counted: list[int] = []
    assert export(run, to, tmp_path / "a", shard_size=3, advance=counted.append) == first
    assert sum(counted) == first.rows_out
    assert {path: path.stat().st_ino for path in (tmp_path / "a").iterdir()} == before


@pytest.mark.parametrize("to", exports.FORMATS)
def test_a_new_decision_replaces_the_export_and_leaves_nothing_behind(
    tmp_path: Path, encoded_image: Encode, to: str
) -> None:
    data = write_tars(tmp_path / "data", encoded_image)
    write_run(tmp_path / "run", data)
    export(tmp_path / "run", to, tmp_path / "out", shard_size=2)
    write_run(tmp_path / "run", data, dropped=range(3, 14))
    export(tmp_path / "run", to, tmp_path / "out", shard_size=2)
    export(tmp_path / "run", to, tmp_path / "fresh", shard_size=2)
    assert visible(tmp_path / "out") == visible(tmp_path / "fresh")


def test_sources_are_read_front_to_back_and_each_picture_once(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    read = pictures.read_image_bytes

    def record(ref: ImageRef) -> bytes:
        asked.append((ref.path, ref.offset))
        return read(ref)

    monkeypatch.setattr(pictures, "read_image_bytes", record)
    export(run, "webdataset", tmp_path / "out")
    assert asked == sorted(set(asked))


def test_one_picture_is_in_memory_at_a_time(tmp_path: Path, encoded_image: Encode) -> None:
    images = [encoded_image(i) + bytes(200_000) for i in range(60)]
    samples = [(image, "jpg", {"uid": str(i), "caption": "large"}) for i, image in enumerate(images)]
    write_tar(tmp_path / "data" / "0.tar", samples)
    write_run(tmp_path / "run", str(tmp_path / "data"))
    del images, samples
    tracemalloc.start()
    try:
        export(tmp_path / "run", "webdataset", tmp_path / "out")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4_000_000, "12 MB of pictures were to pass through"


@pytest.mark.parametrize("to", ["npy", *SHARDED])
def test_the_size_of_batches_changes_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    """What is sorted and held at once is a batch; the order is that of a sort of all kept pairs."""
    export(run, to, tmp_path / "whole", shard_size=5)
    for size in (1, 4):
        for module in (selection, npy):
            monkeypatch.setattr(module, "BATCH_ROWS", size)
        export(run, to, tmp_path / f"{size}", shard_size=5)
        names = sorted(path.name for path in (tmp_path / "whole").iterdir())
        names = [name for name in names if name.endswith((".tar", ".parquet", ".npy"))]
        assert names
        for name in names:
            files = [(tmp_path / folder / name) for folder in ("whole", f"{size}")]
            if name == "uids.parquet":  # its row groups are batches
                assert pq.read_table(files[0]).equals(pq.read_table(files[1]))
            else:
                assert files[0].read_bytes() == files[1].read_bytes()
    finished = FinishedRun.open(run)
    places = [row for batch in finished.kept_pairs() for row in batch.to_pylist()]
    places.sort(key=lambda row: (row["image_path"], row["image_offset"], row["image_row"]))  # stable
    with select(finished, tmp_path / "scratch") as pairs:
        assert pairs.rows(0, len(pairs)) == places
        assert pairs.rows(2, 7) == places[2:7]


def test_row_groups_are_bounded(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "GROUP_ROWS", 4)
    export(run, "parquet", tmp_path / "rows")
    sizes = row_groups(tmp_path / "rows" / "00000000.parquet")
    assert max(sizes) == 4
    assert sum(sizes) == 12
    monkeypatch.setattr(parquet, "GROUP_BYTES", 1)
    export(run, "parquet", tmp_path / "bytes")
    assert set(row_groups(tmp_path / "bytes" / "00000000.parquet")) == {1}


def row_groups(path: Path) -> list[int]:
    metadata = pq.read_metadata(path)
    return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]


@pytest.fixture
def broken(run: Path, tmp_path: Path) -> Callable[..., str]:
    """The message of the InputError of an export; nothing else may be raised."""

    def attempt(to: str = "webdataset", out: Path = tmp_path / "out", **options: Any) -> str:
        with pytest.raises(InputError) as error:
            export(options.pop("run", run), to, out, **options)
        return str(error.value)

    return attempt


def test_wrong_options_are_explained(broken: Callable[..., str], tmp_path: Path) -> None:
    assert "Did you mean 'webdataset'?" in broken("webdatset")
    assert "shard_size is 0" in broken(shard_size=0)


def test_a_run_that_is_missing_or_not_finished(broken: Callable[..., str], run: Path, tmp_path: Path) -> None:
    for to in exports.FORMATS:
        assert "no such run folder" in broken(to, run=tmp_path / "nowhere")
        assert "no finished run" in broken(to, run=tmp_path / "data")
        (run / "embed" / "pool" / "manifest.json").rename(tmp_path / "aside.json")
        assert "no finished run" in broken(to)
        (tmp_path / "aside.json").rename(run / "embed" / "pool" / "manifest.json")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_others_is_never_touched(broken: Callable[..., str], run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "00000007.tar").write_bytes(b"precious")
    assert "holds other files" in broken(out=tmp_path / "mine")
    assert (tmp_path / "mine" / "00000007.tar").read_bytes() == b"precious"
    assert "holds other files" in broken(out=run)
    assert "is a file" in broken(out=tmp_path / "mine" / "00000007.tar")
    export(run, "npy", tmp_path / "npy")
    assert "an export to npy" in broken("parquet", out=tmp_path / "npy")


def test_sources_that_are_gone_or_changed(broken: Callable[..., str], tmp_path: Path) -> None:
    tar = tmp_path / "data" / "0.tar"
    data = tar.read_bytes()
    for changed in (None, data[:2000], bytes(len(data))):
        tar.unlink(missing_ok=True)
        if changed is not None:
            tar.write_bytes(changed)
        for to in SHARDED:
            assert "moved or changed since the run" in broken(to, out=tmp_path / to)
    tar.write_bytes(data)


def test_imported_embeddings_have_no_pictures(broken: Callable[..., str], run: Path, tmp_path: Path) -> None:
    pairs = EmbeddingTable.open(run / "embed" / "pool").pairs().to_pydict()
    write_pairs(run / "embed" / "pool", pairs | {"image_path": [""] * len(pairs["uid"])})
    assert "no pictures" in broken()
    export(run, "npy", tmp_path / "npy")


def test_a_parquet_source_that_was_cut(tmp_path: Path, encoded_image: Encode) -> None:
    write_run(tmp_path / "run", write_tables(tmp_path / "data", encoded_image))
    (tmp_path / "data" / "b.parquet").rename(tmp_path / "data" / "a.parquet")
    with pytest.raises(InputError, match="has 10 rows, no row"):
        export(tmp_path / "run", "parquet", tmp_path / "out")


def test_a_decision_of_another_run(broken: Callable[..., str], run: Path) -> None:
    other = pa.table({"uid": ["stranger"], "kept": [True], "weight": [1.0], "score": [0.0]})
    pq.write_table(other, run / "curated.parquet")
    assert "'stranger'" in broken()
    pq.write_table(other.drop_columns("weight"), run / "curated.parquet")
    assert "no column weight" in broken()
    (run / "curated.parquet").write_bytes(b"PAR1 no more")
    assert "is damaged" in broken()


def test_stats_are_read_with_distrust(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "00000000.tar"
    path.write_bytes(b"abc")
    right = describe(path)
    known = {"fingerprint": "mark", "bytes": 3, "digest": right.digest, "rows": None}
    wrong = [known | {key: 7} for key in ("fingerprint", "bytes", "digest")] + [{"fingerprint": "mark"}, []]
    for text in ("", *map(json.dumps, wrong)):
        (tmp_path / "00000000_stats.json").write_text(text)
        assert folder._finished(path, "mark") is None
    (tmp_path / "00000000_stats.json").write_text(json.dumps(known))
    assert folder._finished(path, "mark") == right
    assert folder._finished(path, "other") is None
