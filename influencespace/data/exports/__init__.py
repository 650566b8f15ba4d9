"""Kept pairs in the formats that others read: DataComp's uid list, WebDataset tars, Parquet files."""

from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

from influencespace.data.artifacts import Manifest
from influencespace.data.exports.folder import write_shards
from influencespace.data.exports.npy import export_npy
from influencespace.data.exports.parquet import write_parquet
from influencespace.data.exports.selection import FinishedRun
from influencespace.data.exports.webdataset import write_webdataset
from influencespace.data.locations import folder_of
from influencespace.errors import InputError

SHARDED = {"webdataset": (".tar", write_webdataset), "parquet": (".parquet", write_parquet)}
FORMATS = ("npy", *SHARDED)


def export(
    run: Path | str,
    to: str,
    out: Path | str,
    *,
    shard_size: int = 10_000,  # as DataComp's resharder: files of some hundred megabytes
    advance: Callable[[int], None] = lambda pairs: None,
) -> Manifest:
    """Write the kept pairs of a finished run to the folder `out` in format `to`; continues where it stopped.

    `shard_size` is the number of pairs in a file, `advance` is called with how many more pairs are written. Raises
    InputError for an unknown format, a run that is missing or not finished, a folder that holds other files
    as `out`, and source files that are gone.
    """
    if to not in FORMATS:
        near = get_close_matches(to, FORMATS, n=1, cutoff=0.3)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise InputError(f"unknown export format {to!r}, expected one of {', '.join(FORMATS)}.{hint}")
    if shard_size < 1:
        raise InputError(f"shard_size is {shard_size}: a file needs at least one pair")
    folder = folder_of(out, "--out")
    finished = FinishedRun.open(folder_of(run, "RUN"))
    if to == "npy":
        return export_npy(finished, folder, advance)
    suffix, write = SHARDED[to]
    return write_shards(finished, folder, to, suffix, write, shard_size, advance=advance)
