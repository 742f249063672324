"""What is published, in words: `conrec show USER` and `conrec versions`. Imports no torch, ray or vllm: it answers at
once."""

from __future__ import annotations

from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc
from rich.text import Text

from conrec import storage
from conrec.blocklist import versions
from conrec.blocklist.reader import BlockedItem, BlocklistReader
from conrec.catalogue.codebook import format_semantic_ids
from conrec.config import Config
from conrec.errors import ArtefactError
from conrec.feedback.labels import read_interactions
from conrec.progress import console
from conrec.ragged import Ragged
from conrec.stages.inputs import blocklists_url, catalogue_artefact

LINES = 8
"""Rows shown of each part unless all are asked for."""


def published(config: Config) -> list[str]:
    """One line for each complete version, newest first, the current one marked.

    Raises `ArtefactError` where nothing is published.
    """
    root = blocklists_url(config)
    pointer = versions.read_pointer(root)
    if pointer is None:
        raise ArtefactError(f"{root}: nothing is published; run conrec nightly first")
    names = {name.split("/")[0] for name in storage.list_files(storage.join(root, "versions"))}
    complete = [found[0] for name in names if (found := versions.read_manifest(root, name)) is not None]
    return [
        f"{'*' if manifest['version'] == pointer['version'] else ' '} {manifest['version']}  "
        f"published {manifest['published_at']}, {manifest['figures']['rows']:,} rows"
        for manifest in sorted(complete, key=lambda manifest: str(manifest["published_at"]), reverse=True)
    ]


@dataclass(frozen=True)
class Pictures:
    """The published blocklists beside what they were made from."""

    reader: BlocklistReader
    interactions: pa.Table
    words: dict[str, str] = field(repr=False)
    """Item -> category, or the start of its text."""
    meaning: dict[str, str] = field(repr=False)
    """Semantic ID -> the most frequent words of the items that have it."""

    @classmethod
    def load(cls, config: Config) -> Pictures:
        """Reads the current version. Raises `ArtefactError` where nothing is published."""
        reader = BlocklistReader(blocklists_url(config))
        items = storage.read_table(catalogue_artefact(config).path("items.parquet"))
        column = items["category"].fill_null("") if "category" in items.column_names else items["text"]
        words = pc.utf8_slice_codeunits(column, 0, 60).to_pylist()
        codes = Ragged.from_arrow(items["semantic_id"]).values.reshape(items.num_rows, -1)
        named = pa.table({"id": pa.array(format_semantic_ids(codes)), "words": words})
        # Ties by the alphabet, so that the same run reads the same tomorrow.
        counted = named.group_by(["id", "words"]).aggregate([([], "count_all")])
        counted = counted.sort_by([("count_all", "ascending"), ("words", "descending")])
        meaning = dict(zip(counted["id"].to_pylist(), counted["words"].to_pylist(), strict=True))
        return cls(
            reader,
            read_interactions(config.interactions),
            dict(zip(items["item_id"].to_pylist(), words, strict=True)),
            meaning,
        )

    def rejected(self, user_id: str) -> list[str]:
        """Items that the user rejected, newest first."""
        rows = self.interactions.filter(
            (pc.field("user_id") == user_id) & (pc.field("feedback") == "negative")
        ).sort_by([("timestamp", "descending")])
        return list(dict.fromkeys(rows["item_id"].to_pylist()))

    def show(self, user_id: str, lines: int | None = LINES) -> None:
        """Prints the user: what they rejected, what is blocked and why."""
        rejected = self.rejected(user_id)
        blocked = self.reader.blocklist(user_id)
        explicit = [row for row in blocked if row.reason == "explicit"]
        predicted = [row for row in blocked if row.reason == "predicted"]
        console.print(f"[bold]user {user_id}[/bold]")
        if not rejected and not blocked:
            console.print("  unknown: nothing is blocked")
            return
        console.print(f"  rejected {len(rejected)} items:")
        counted: dict[str, int] = {}
        for item in rejected:
            words = self.words.get(item, "not in the catalogue")
            counted[words] = counted.get(words, 0) + 1
        _lines([f"{count:3} x  {words}" for words, count in counted.items()], lines)
        console.print(
            f"  blocked {len(blocked)}: {len(explicit)} that they rejected themselves, {len(predicted)} predicted:"
        )
        _lines([self._line(row) for row in predicted], lines)

    def _line(self, row: BlockedItem) -> str:
        caught = f"{row.semantic_id} ({self.meaning.get(row.semantic_id or '', '')})"
        return f"{row.item_id}  {self.words.get(row.item_id, '')}  <- {caught}, similarity {row.similarity:.2f}"


def _lines(texts: list[str], limit: int | None) -> None:
    for text in texts[:limit]:
        # Text, not markup: a semantic ID or a category may hold brackets.
        console.print(Text(f"    {text}"))
    if limit is not None and len(texts) > limit:
        console.print(f"    ... and {len(texts) - limit} more")
