"""What a written path means: `~` is the home folder, and `s3:/bucket` a mistake."""

from __future__ import annotations

import os
import re

from fsspec.registry import available_protocols

from conrec.errors import DataError

_TYPO = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)(:/?|//)(?![/:])")
"""A protocol without its colon, or without its slashes; `simplecache::s3://bucket/a` is one of fsspec's chains."""
_CACHES = ("simplecache", "filecache", "blockcache")
"""First links of a chain that hand names on, so that a folder's files have URLs of their own."""


def located(url: str) -> str:
    """`url` with `~` as the home folder.

    Raises `DataError` for `s3:/bucket`, `s3:bucket` and `s3//bucket`, which would be local folders of those names, for
    an empty text, which would be the top of the disk once a name is joined to it, and for an archive.
    """
    text = os.path.expanduser(str(url))
    if not text.strip():
        raise DataError(f"{url!r} is no place; write a folder or a URL, `.` for the working directory")
    links, chained, _ = text.partition("::")
    first = links.partition("://")[0]
    if chained and first in available_protocols() and first not in _CACHES:
        raise DataError(f"{url}: what lies within {first}:: is not read; unpack it, and name the folder")
    typo = _TYPO.match(text)
    # `data//log` is a folder and a doubled slash; URLs of the protocol `data` have no slashes.
    if typo is not None and typo[1] != "data" and typo[1] in available_protocols():
        rest = text[typo.end() :]
        meant = f"/{rest} or file:///{rest}" if typo[1] in ("file", "local") else f"{typo[1]}://{rest}"
        raise DataError(f"{url}: write {meant}; a local folder of that name would be ./{text}")
    return text
