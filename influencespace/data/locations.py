"""Where output goes, and who may write there: folders of this machine or mounted ones."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from influencespace.errors import InputError

LOCK = ".lock"
# Also the `s3:/bucket` that pathlib makes of `s3://bucket`; a single letter is a drive.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:(/|$)")


def local_folder(value: Path | str, flag: str) -> Path:
    """The folder that the option `flag` names; raises InputError for a URL, of which pathlib would make a local folder."""
    if _URL.match(str(value)):
        raise InputError(
            f"{flag} {value}: URLs cannot be written to, give a local or mounted folder. To keep the result in an "
            "object store, copy the finished folder there."
        )
    return Path(value)


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Make the folder and keep other processes out of it until the block ends, however it ends.

    A process may enter again. Raises InputError where another works in it, or where it cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / LOCK, is_singleton=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"another command is working in {out}: wait until it has ended, or give another folder"
        ) from None
    except OSError as error:
        raise InputError(
            f"{out} cannot be written ({error.strerror}): it must be a folder, or a path where one can be made"
        ) from None
    try:
        yield
    finally:
        lock.release()
