"""What a run reads from outside, as digests of its content: the log until a moment, the items, the items that are new,
what other systems predicted.

    sources = Sources(config)
    sources.log.until(config.timeline.cut_us).digest
    sources.items_digest()

Invariant: a path is not content. Items are read once a run. Digests of the log are remembered over runs in
`<root>/inputs/`; the log itself is read by `seen`, once a run for each catalogue and moment.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from conrec import storage
from conrec.config import Config
from conrec.feedback.content import LogContent, items_content
from conrec.feedback.labels import interaction_tables, read_items

ITEM_COLUMNS = ("text", "category")
"""What is read of an item beside its id, and the embedding where the settings ask for it."""


@lru_cache(maxsize=8)
def weights_digest(name: str) -> str:
    """What stands for named weights in a version: the name, or `sha256:` and the digest of a local folder's files."""
    folder = Path(name).expanduser()
    return f"sha256:{storage.sha256(str(folder))}" if folder.is_dir() else name


class Sources:
    """The two input tables of a run. `config` names them; what rivals and ablations set otherwise changes nothing.

    `predictions`: name of a system that is measured beside ours -> the file of its answers.
    """

    def __init__(self, config: Config, predictions: Mapping[str, str] | None = None) -> None:
        self._config = config
        self.predictions = dict(predictions or {})
        self._seen: dict[tuple[str, int], pa.Table] = {}

    @cached_property
    def log(self) -> LogContent:
        """The interactions until any moment."""
        config = self._config
        return LogContent(config.interactions, storage.join(config.root, "inputs", "interactions.json"))

    @cached_property
    def items(self) -> pa.Table:
        """The items of today, sorted by item_id."""
        return read_items(self._config.items)

    def items_digest(self, with_embedding: bool) -> str:
        """Of what is read of the items of today."""
        return items_content(self.items, *ITEM_COLUMNS, *(["embedding"] if with_embedding else [])).digest

    def predictions_digest(self) -> str | None:
        """Of the names of the systems and their files; None without any. Raises `DataError` where a file is missing."""
        lines = [f"{storage.sha256(url)}  {name}\n" for name, url in self.predictions.items()]
        return hashlib.sha256("".join(lines).encode()).hexdigest() if lines else None

    def added_url(self, catalogue_version: str) -> str:
        """Folder of the items that were encoded with a catalogue's codebook after it was fitted."""
        return storage.join(self._config.root, "items", catalogue_version)

    def added(self, catalogue_version: str) -> pa.Table | None:
        """Those items with their semantic IDs, sorted by item_id, the removed ones among them; None: none yet."""
        url = self.added_url(catalogue_version)
        names = storage.list_files(url) if storage.exists(url) else []
        if not names:
            return None
        # File by file: items had a category in some nights and none in others, and a folder is read as its first file.
        files = [storage.read_table(storage.join(url, name)) for name in names]
        table = pa.concat_tables(files, promote_options="permissive")
        # Two runs may have encoded the same item; both found the same ID.
        first = table.append_column("row", pa.array(np.arange(len(table))))
        kept = first.group_by("item_id").aggregate([("row", "min")])["row_min"]
        return table.take(kept).sort_by("item_id")

    def lacking(self, fitted_ids: pa.Array, catalogue_version: str) -> pa.Table:
        """id, text and category of the items that a catalogue was not fitted on: those that were encoded with it since,
        as they were described then, and those of today that were not. Sorted by item_id."""
        tables = [self.added(catalogue_version), self.items]
        columns = ("item_id", *ITEM_COLUMNS)
        known = [table.select([c for c in columns if c in table.column_names]) for table in tables if table is not None]
        if len(known) == 2:
            # What training reads of an encoded item is what it was encoded from: another text changes nothing of that.
            known[1] = known[1].filter(pc.invert(pc.is_in(known[1]["item_id"], value_set=known[0]["item_id"])))
        table = pa.concat_tables(known, promote_options="permissive")
        return table.filter(pc.invert(pc.is_in(table["item_id"], value_set=fitted_ids))).sort_by("item_id")

    def seen(self, fitted_ids: pa.Array, catalogue_version: str, time_us: int) -> pa.Table:
        """Those of the lacking items that somebody met until a moment; reads the log where any item lacks."""
        key = (catalogue_version, time_us)
        if key not in self._seen:
            lacking = self.lacking(fitted_ids, catalogue_version)
            met = np.zeros(len(lacking), bool)
            if len(lacking):
                for table in interaction_tables(self._config.interactions):
                    ids = table.filter(pc.less_equal(table["timestamp"].cast(pa.int64()), time_us))["item_id"]
                    met |= np.asarray(pc.is_in(lacking["item_id"], value_set=pc.unique(ids)))
            self._seen[key] = lacking.filter(pa.array(met))
        return self._seen[key]
