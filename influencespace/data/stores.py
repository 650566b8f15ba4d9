"""Requests to object stores: tried again while a store is busy or away, counted, and refused in words for people."""

import atexit
import errno
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import fsspec

from influencespace.errors import InputError

T = TypeVar("T")

BACK_OFF = (0.5, 1.0, 2.0, 4.0)
"""Seconds before each further try of a request, about; the store's own client has tried several times before."""
PACKAGES = {"s3": "influencespace[s3]", "s3a": "influencespace[s3]"}
RETRIED: Counter[str] = Counter()
"""Requests of this process that were tried again, by the store's name of the error."""

_BUSY = (429, 500, 502, 503, 504)
_CREDENTIALS = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "NoAuthTokenError",
)
_MISTYPED = ("InvalidEndpoint", "InvalidRegionError", "ProfileNotFound", "ParamValidationError")
_LASTING = frozenset(
    {
        *(errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR),
        *(errno.EINVAL, errno.ENOSPC, errno.EDQUOT),
    }
)
_CLIENTS = ("botocore.", "aiobotocore.", "aiohttp.", "asyncio.", "fsspec.exceptions.")


def needs_package(protocol: str, error: ImportError) -> str:
    """What to install, in a sentence that begins with the URL."""
    package = PACKAGES.get(protocol)
    how = f"pip install '{package}'" if package else str(error)
    return f"needs a package that is not installed: {how}"


@cache
def filesystem(protocol: str) -> Any:
    """The fsspec file system of a protocol.

    Raises InputError where there is none, and where its package, or what the environment must say of it, is missing.
    """
    try:
        store = fsspec.filesystem(protocol, use_listings_cache=False)
    except ImportError as error:
        raise InputError(f"{protocol}:// {needs_package(protocol, error)}") from None
    except ValueError:
        raise InputError(f"{protocol}:// is no storage that fsspec knows. Is the URL mistyped?") from None
    if hasattr(store, "call_s3"):
        try:
            store.connect()
        except Exception as error:
            if reason := _refused(error):
                raise InputError(f"{protocol}://: {reason}") from None
            raise
        store.s3.meta.events.register("needs-retry.s3", _count_response)
    return store


def ask(url: str, request: Callable[[Any, str], T]) -> T:
    """What `request(store, url)` gives, tried again while the store is busy or away.

    Raises InputError where it is not allowed, and ConnectionError where the store stays away.
    """
    for seconds in (*BACK_OFF, None):
        try:
            return request(filesystem(url.partition("://")[0]), url)
        except (FileNotFoundError, FileExistsError, InputError):
            raise
        except Exception as error:
            if reason := _refused(error):
                raise InputError(f"{url}: {reason}") from error
            if not _is_transient(error):
                raise
            if seconds is None:
                raise ConnectionError(f"{url}: {_first_line(error)}") from error
            _count(code_of(error))
        time.sleep(seconds * (0.5 + random.random()))
    raise AssertionError("the last try has an end of its own")


def code_of(error: BaseException) -> str:
    """What the store calls an error; else the name of its class."""
    for one in (error, error.__cause__):
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return type(error).__name__


def _refused(error: Exception) -> str:
    """Why the user has to change something; empty for any other error."""
    name = type(error).__name__
    if name in _CREDENTIALS:
        return (
            "no credentials were found. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, on every "
            "machine that works on the run"
        )
    if isinstance(error, PermissionError):
        return f"not allowed ({_first_line(error)}). Do the credentials permit reading, writing and listing there?"
    if name in _MISTYPED:
        return f"{_first_line(error)}. Is the URL, the profile or AWS_ENDPOINT_URL mistyped?"
    return ""


def _is_transient(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno not in _LASTING
    return f"{type(error).__module__}.".startswith(_CLIENTS)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _count_response(response: Any = None, caught_exception: Any = None, **_: Any) -> None:
    """Count what the client of S3 tries again by itself."""
    if caught_exception is not None:
        _count(type(caught_exception).__name__)
    elif response is not None and response[0].status_code in _BUSY:
        _count(str(response[1].get("Error", {}).get("Code") or response[0].status_code))


def _count(name: str) -> None:
    RETRIED[name] += 1


@atexit.register
def _say() -> None:
    if not RETRIED:
        return
    named = ", ".join(f"{name} {count:,}" for name, count in RETRIED.most_common())
    text = f"storage: {RETRIED.total():,} requests failed for a moment and were tried again ({named})"
    print(text, file=sys.stderr)
