"""WebDataset tars of the kept pairs: `key.jpg` (or png, webp), `key.txt` and `key.json` for each pair."""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

from influencespace.data.artifacts import Manifest
from influencespace.data.exports.folder import (
    DEFAULT_SHARD_SIZE,
    Advance,
    KeptPair,
    ShardFormat,
    ignore,
    write_shards,
)
from influencespace.data.exports.pictures import extension

# Readers of tars look for these names alone, and then go by the content: what came as a GIF or BMP under
# such a name leaves under such a name.
_NAMES = ("jpg", "png", "webp")


def export_webdataset(
    run: Path | str,
    out: Path | str,
    *,
    shard_size: int = DEFAULT_SHARD_SIZE,
    advance: Advance = ignore,
) -> Manifest:
    """Write the kept pairs as tars `00000000.tar ...`: pictures as they came, captions, uid, weight, score, group.

    The pairs of one image are samples of their own, side by side. The same run gives the same bytes. Raises
    InputError as `export` does.
    """
    form = ShardFormat(name="webdataset", suffix="tar", write=_write)
    return write_shards(Path(run), Path(out), form, shard_size, advance)


def _write(path: Path, pairs: Iterator[KeptPair]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for pair in pairs:
            found = extension(pair.image)
            fields = {
                "uid": pair.uid,
                "caption": pair.caption,
                "weight": pair.weight,
                "score": pair.score,
                "group": pair.group,
            }
            members = {
                found if found in _NAMES else "jpg": pair.image,
                "txt": pair.caption.encode(),
                "json": json.dumps(fields).encode(),
            }
            for suffix, data in members.items():
                # Time and owner stay zero: the same bytes on every run.
                member = tarfile.TarInfo(f"{pair.number:012d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
