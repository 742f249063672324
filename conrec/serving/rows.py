"""The rows of a version, read as they were published and verified.

    table = read_bucket(root, manifest, bucket_path("data", 3), "data")
    users, offsets = user_offsets(table, "bucket 3")

Invariant: a table has the columns of today whatever schema it was published with, and what its manifest says. Needs
pyarrow, fsspec and numpy only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as parquet

from conrec.errors import ArtefactError, DataError
from conrec.serving import versions
from conrec.tables import BLOCKLIST, RULES, check

SCHEMAS = {"data": BLOCKLIST, "rules": RULES}
"""Shape of the published rows -> their columns."""
_FORMER_NAMES = {2: {"theta": "threshold"}}
"""Schema version of a manifest -> columns that had another name then."""
BLOCKING_REASONS = ("explicit", "predicted")
"""Rows with any other reason, of a later release say, do nothing."""
_REMEDY = "roll back to another version"


def bucket_path(shape: str, bucket: int) -> str:
    """The file of a bucket below its version; shape is `data` for item rows, `rules` for rules."""
    return f"{shape}/bucket-{bucket:05d}.parquet"


def read_bucket(root: str, manifest: dict[str, Any], path: str, shape: str) -> pa.Table:
    """The rows of one file of a version, verified, in the columns of today whatever schema it was published with.

    Raises `ArtefactError` where it is missing or damaged.
    """
    url = versions.version_url(root, manifest["version"])
    entry = next((entry for entry in manifest["files"] if entry["path"] == path), None)
    if entry is None:
        raise ArtefactError(f"{url}: names no {path}; {_REMEDY}")
    data = versions.read_entry(root, manifest["version"], entry)
    former = _FORMER_NAMES.get(manifest["schema_version"], {})
    try:
        table = parquet.read_table(pa.BufferReader(data))
        table = table.rename_columns([former.get(name, name) for name in table.column_names])
        table = check(table, SCHEMAS[shape], path)
    except (DataError, pa.ArrowException, OSError) as error:
        raise ArtefactError(f"{url}: damaged: {error}; {_REMEDY}") from None
    if len(table) != entry["rows"]:
        raise ArtefactError(f"{url}: damaged: {path} has {len(table)} rows; {_REMEDY}")
    return table


def user_offsets(table: pa.Table, source: str) -> tuple[pa.Array, np.ndarray]:
    """The distinct users, in their order, and where the rows of each begin; `source` names the file in messages.

    Shape: returns (U,) large_string and (U + 1,) int64. Raises `ArtefactError` when the users do not ascend.
    """
    column = table["user_id"].cast(pa.large_string()).combine_chunks()
    last = max(0, len(column) - 1)
    starts = pc.not_equal(column.slice(min(1, len(column))), column.slice(0, last)).to_numpy(zero_copy_only=False)
    first = np.concatenate(([0], np.flatnonzero(starts) + 1)).astype(np.int64)[: len(column)]
    distinct = column.take(pa.array(first))
    last = max(0, len(distinct) - 1)
    if not pc.all(pc.less(distinct.slice(0, last), distinct.slice(min(1, len(distinct)))), min_count=0).as_py():
        raise ArtefactError(f"{source}: damaged: users are not ascending; {_REMEDY}")
    return distinct, np.append(first, len(column))
