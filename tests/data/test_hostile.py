"""Malformed and malicious input, as it was collected: a rejection or one line, and nothing else."""

from pathlib import Path

import pytest

from influencespace.data.images import RejectedImage, decode_image, sharpness
from influencespace.data.imported import read_imported_embeddings
from influencespace.data.readers import list_shards, read_shard
from influencespace.data.schema import Rejection, Sample
from influencespace.errors import InputError

# Some seconds, or gigabytes by the size of one page: tests/data/test_memory.py has such files of its own.
HEAVY = ("pq_32x200MB_batch", "emb_npz_bomb", "webp_anim_bomb", "png_64MP_zeros", "png_strip_1x64M")


@pytest.mark.real_data
def test_collected_cases_are_a_rejection_or_one_line(real_data: Path) -> None:
    cases = sorted((real_data.parent / "cases" / "hostile").glob("*/in"))
    if not cases:
        pytest.skip("no collected cases")
    ends = {}
    for case in cases:
        if case.parent.name not in HEAVY:
            ends[case.parent.name] = end_of(case)
    assert all("\n" not in end for end in ends.values())
    assert ends["coco_url_in_name"] == "2 kept, 1 rejected"
    assert ends["jpg_dct_64MP_progressive_scans"] == "0 kept, 1 rejected"
    assert "2 columns are called 'caption'" in ends["pq_dup_column_names"]
    assert "not UTF-8" in ends["pq_invalid_utf8_column"]
    assert all(end != "0 kept, 0 rejected" for name, end in ends.items() if name != "pq_zero_rows")


def end_of(case: Path) -> str:
    """How many pairs were kept and rejected, or the line that ended the reading."""
    kept = rejected = 0
    try:
        if case.parent.name.startswith("emb_"):
            for batch in read_imported_embeddings(str(case)):
                rejected += isinstance(batch, Rejection)
                kept += 0 if isinstance(batch, Rejection) else len(batch.uids)
            return f"{kept} kept, {rejected} rejected"
        annotations = list(case.glob("annotations/*.json"))
        for shard in list_shards(str(annotations[0] if annotations else case)):
            for result in read_shard(shard):
                usable = isinstance(result, Sample) and is_picture(result)
                kept, rejected = kept + usable, rejected + (not usable)
    except InputError as error:
        return str(error)
    return f"{kept} kept, {rejected} rejected"


def is_picture(sample: Sample) -> bool:
    try:
        sharpness(decode_image(sample.image, near=224))
    except RejectedImage:
        return False
    return True
