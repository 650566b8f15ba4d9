"""Kept pairs in the formats that others read: DataComp's uid list, WebDataset tars, Parquet files."""

from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

from influencespace.data.artifacts import Manifest
from influencespace.data.exports.folder import DEFAULT_SHARD_SIZE, Advance, ignore
from influencespace.data.exports.npy import export_npy
from influencespace.data.exports.parquet import export_parquet
from influencespace.data.exports.webdataset import export_webdataset
from influencespace.data.locations import local_folder
from influencespace.errors import InputError

__all__ = ["FORMATS", "export", "export_npy", "export_parquet", "export_webdataset"]

FORMATS: dict[str, Callable[[Path, Path, int, Advance], Manifest]] = {
    "npy": lambda run, out, _, advance: export_npy(run, out, advance=advance),
    "webdataset": lambda run, out, size, advance: export_webdataset(
        run, out, shard_size=size, advance=advance
    ),
    "parquet": lambda run, out, size, advance: export_parquet(run, out, shard_size=size, advance=advance),
}


def export(
    run: Path | str,
    to: str,
    out: Path | str,
    *,
    shard_size: int = DEFAULT_SHARD_SIZE,
    advance: Advance = ignore,
) -> Manifest:
    """Write the kept pairs of a finished run to the folder `out` in format `to`; continues where it stopped.

    `shard_size` is the number of pairs in a file, `advance` is told how many more pairs are written. Raises
    InputError for an unknown format, a run that is missing or not finished, a folder that holds other files,
    and source files that are gone.
    """
    if to not in FORMATS:
        near = get_close_matches(to, FORMATS, n=1, cutoff=0.3)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise InputError(f"unknown export format {to!r}, expected one of {', '.join(FORMATS)}.{hint}")
    return FORMATS[to](Path(run), local_folder(out, "--out"), shard_size, advance)
