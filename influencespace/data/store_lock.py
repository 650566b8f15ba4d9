"""The lock of a folder in an object store: an object that one process writes, by conditional puts, as long as it works there.

The owner writes it anew every BEAT seconds. Another process takes it over where it was not written for PATIENCE seconds, which it
watches itself, so that no two clocks are compared; at once where the owner was a process of this machine that has ended.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from influencespace.data.mirror import ask, url_of, version_of
from influencespace.data.stores import code_of
from influencespace.errors import InputError

BEAT = 10.0
PATIENCE = 60.0
POLL = 1.0
_UNKNOWN = ("NotImplemented", "501", "MethodNotAllowed")


@dataclass
class _Held:
    """A lock of this process."""

    path: Path
    owner: dict[str, Any]
    tag: str
    """The version that this process wrote."""
    times: int = 0
    """The process has entered so often and not left."""
    ended: threading.Event = field(default_factory=threading.Event)

    def beat(self) -> None:
        """Write the lock again and again, until it is released or lost."""
        while not self.ended.wait(BEAT):
            self.owner = self.owner | {"beat": self.owner["beat"] + 1}
            try:
                tag = put_if(self.path, self.owner, self.tag)
            except (
                OSError,
                InputError,
            ):  # a store that is away: the next beat says whether the lock is still ours
                continue
            if tag is None and not self.ended.is_set():
                print(
                    f"error: {url_of(self.path.parent)} was taken over by another command, as this one gave no sign of life "
                    f"for {PATIENCE:g} seconds; this one ends",
                    file=sys.stderr,
                    flush=True,
                )
                end_this_process()
                return
            self.tag = tag or self.tag


_HELD: dict[Path, _Held] = {}
_ENTERING = threading.RLock()


@contextmanager
def store_lock(path: Path) -> Iterator[None]:
    """Hold the lock object of a path until the block ends; a process may enter again.

    Raises InputError where another process holds it, and where it cannot be written.
    """
    with _ENTERING:
        held = _HELD.get(path)
        if held is None:
            held = _HELD[path] = _acquired(path)
            threading.Thread(target=held.beat, daemon=True, name="store lock").start()
        held.times += 1
    try:
        yield
    finally:
        with _ENTERING:
            held.times -= 1
            if not held.times:
                del _HELD[path]
                _release(held)


def _acquired(path: Path) -> _Held:
    owner = {
        "token": uuid.uuid4().hex,
        "since": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        "beat": 0,
        **_process(),
    }
    watched, began = "", 0.0
    while True:
        if tag := put_if(path, owner, None):
            return _Held(path, owner, tag)
        tag, other = _read(path)
        if not tag:  # it ended a moment ago
            time.sleep(POLL)
            continue
        if watched and tag != watched:
            raise InputError(_busy(path, other))
        if not watched:
            watched, began = tag, time.monotonic()
            if _is_of_this_machine(other) and not _has_ended(other):
                raise InputError(_busy(path, other))
            if not _is_of_this_machine(other):
                print(
                    f"{_busy(path, other)}. Waiting up to {PATIENCE:g} s for its next sign of life",
                    file=sys.stderr,
                    flush=True,
                )
        if _is_of_this_machine(other) or time.monotonic() - began > PATIENCE:
            if taken := put_if(path, owner, tag):
                return _Held(path, owner, taken)
            raise InputError(_busy(path, _read(path)[1]))
        time.sleep(POLL)


def end_this_process() -> None:
    """As Ctrl-C does; or by SIGTERM where the process was started deaf to that, as in the background of a shell."""
    deaf = signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None)
    os.kill(os.getpid(), signal.SIGTERM if deaf else signal.SIGINT)


def _release(held: _Held) -> None:
    held.ended.set()
    with suppress(OSError, InputError):
        tag, owner = _read(held.path)
        if tag and owner.get("token") == held.owner["token"]:
            ask(held.path, lambda store, url: store.rm_file(url))


def put_if(path: Path, owner: dict[str, Any], tag: str | None) -> str | None:
    """Write a lock object where its version is still `tag`, or where there is none; its new version, None where it is another's.

    S3 decides both itself; of other stores only the first writing is decided there. Raises InputError for a missing bucket.
    """
    body = json.dumps(owner).encode()

    def put(store: Any, url: str) -> str | None:
        return (_put_s3 if hasattr(store, "call_s3") else _put_any)(store, url, body, tag)

    try:
        done = ask(path, put)
    except FileNotFoundError:
        if tag is not None:
            return None
        raise InputError(
            f"{url_of(path.parent)}: there is no such bucket, or none that these credentials may see"
        ) from None
    if not done:  # the answer to a try that had worked may have been lost
        now, other = _read(path)
        return now if now and other == owner else None
    return done


def _put_s3(store: Any, url: str, body: bytes, tag: str | None) -> str | None:
    bucket, key, _ = store.split_path(url)
    condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}
    try:
        return str(store.call_s3("put_object", Bucket=bucket, Key=key, Body=body, **condition)["ETag"])
    except FileExistsError:
        return None
    except Exception as error:
        code = code_of(error)
        if code in ("PreconditionFailed", "412", "ConditionalRequestConflict", "409"):
            return None
        if code in _UNKNOWN:
            return _put_any(store, url, body, tag)
        raise


def _put_any(store: Any, url: str, body: bytes, tag: str | None) -> str | None:
    """Checked, then written: between the two another process may write too."""
    if (_tag(store, url) or None) != tag:
        return None
    try:
        store.pipe_file(url, body, **({"mode": "create"} if tag is None else {}))
    except FileExistsError:
        return None
    return _tag(store, url)


def _tag(store: Any, url: str) -> str:
    store.invalidate_cache()
    with suppress(FileNotFoundError):
        return version_of(store.info(url))
    return ""


def _read(path: Path) -> tuple[str, dict[str, Any]]:
    """The version of a lock object and what is in it; nothing where there is none."""

    def read(store: Any, url: str) -> tuple[str, bytes]:
        with suppress(FileNotFoundError):
            return _tag(store, url), store.cat_file(url)
        return "", b"{}"

    tag, body = ask(path, read)
    with suppress(ValueError):
        return tag, dict(json.loads(body))
    return tag, {}


def _busy(path: Path, owner: dict[str, Any]) -> str:
    who = "process {pid} on {host} since {since}".format(**{"pid": "?", "host": "?", "since": "?"} | owner)
    return f"another command is working in {url_of(path.parent)} ({who}): wait until it has ended, or give another folder"


def _process() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "machine": _machine(),
        "started": _started(os.getpid()),
    }


def _machine() -> str:
    """What two processes have in common only where one sees the other: machine, boot, and space of process ids."""
    boot = space = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()} {boot} {space}"


def _started(pid: int) -> str:
    """When a process began, in ticks of its machine: ids are used again."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


def _is_of_this_machine(owner: dict[str, Any]) -> bool:
    return owner.get("machine") == _machine()


def _has_ended(owner: dict[str, Any]) -> bool:
    try:
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return _started(int(owner["pid"])) != str(owner["started"])
