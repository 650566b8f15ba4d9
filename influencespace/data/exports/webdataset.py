"""WebDataset tars of the kept pairs: `key.jpg` (or png, webp), `key.txt` and `key.json` for each pair."""

import json
from collections.abc import Iterator
from pathlib import Path

from influencespace.data.exports.folder import KeptPair
from influencespace.data.exports.pictures import extension
from influencespace.data.tars import add_sample, new_tar

# Readers of tars look for these names alone, and then go by the content: what came as a GIF or BMP under
# such a name leaves under such a name.
_NAMES = ("jpg", "png", "webp")


def write_webdataset(path: Path, pairs: Iterator[KeptPair]) -> None:
    """Write a tar: pictures as they came, captions, and a JSON of uid, caption, weight, score and group.

    The pairs of one image are samples of their own, side by side.
    """
    with new_tar(path) as tar:
        for pair in pairs:
            suffix = extension(pair.image)
            fields = {name: getattr(pair, name) for name in ("uid", "caption", "weight", "score", "group")}
            files = {
                suffix if suffix in _NAMES else "jpg": pair.image,
                "txt": pair.caption.encode(),
                "json": json.dumps(fields).encode(),
            }
            add_sample(tar, f"{pair.number:012d}", files)
