"""Where output goes, and who may write there: folders of this machine, mounted ones, or folders of an object store."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from influencespace.data.mirror import is_stored, is_url, mirrored
from influencespace.data.store_lock import store_lock
from influencespace.errors import InputError

LOCK = ".lock"


def folder_of(value: Path | str, flag: str) -> Path:
    """The folder that the option `flag` names; for a URL, its place in the mirror of this machine.

    Raises InputError for a URL that cannot be written to.
    """
    if not is_url(value):
        return Path(value)
    try:
        return mirrored(value)
    except InputError as error:
        raise InputError(f"{flag} {error}") from None


def local_folder(value: Path | str, flag: str, why: str) -> Path:
    """The folder that the option `flag` names; raises InputError for a URL, and says why."""
    if is_url(value):
        raise InputError(f"{flag} {value}: {why}. Give a local or mounted folder")
    return Path(value)


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Make the folder and keep other processes out of it until the block ends, however it ends.

    A process may enter again. Raises InputError where another works in it, or where it cannot be written.
    """
    with store_lock(out / LOCK) if is_stored(out) else _file_lock(out):
        yield


@contextmanager
def _file_lock(out: Path) -> Iterator[None]:
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
