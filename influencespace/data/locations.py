"""Where output goes: folders of this machine or mounted ones, until runs can lie in an object store."""

import re
from pathlib import Path

from influencespace.errors import InputError

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
