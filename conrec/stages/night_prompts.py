"""Who is generated for tonight, and who keeps what an earlier night generated: what the night asks of its engines.

    plan = write_prompts(run, catalogue, log, asked, artefact)     # prompts/ and kept/, bucket by bucket of users

Of users in `prompts` whom an earlier night answered, `earlier` holds that answer, for a night that ends before theirs.
The earlier night is the newest complete one of this root with the same basis but for the semantic IDs, of which some
come and go every day (`conrec.blocklist.kept`). Invariant:
every user has one row, in `prompts` or in `kept`, and which of them is decided once: a night that goes on after a kill
reads its plan, whatever has become of the earlier night.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from conrec import storage
from conrec.artefact import Artefact
from conrec.blocklist.anchors import Asked
from conrec.blocklist.asking import liked_ids, liked_leaves
from conrec.blocklist.kept import (
    BASIS,
    KEPT,
    SEMANTIC_IDS,
    EarlierRows,
    generation_basis,
    kept_rows,
    lasting,
    outdated_rows,
    row_digests,
)
from conrec.catalogue.items import Catalogue
from conrec.config import DAY_US
from conrec.feedback.anchors import Anchors
from conrec.feedback.events import Events
from conrec.feedback.log import ByBucket
from conrec.policy.prompts import build_prompts
from conrec.policy.vocabulary import Vocabulary
from conrec.progress import console
from conrec.stages.artefacts import Artefacts, intact
from conrec.tables import PROMPTS

PROMPTS_PER_FILE = 4096
"""Rows of one Parquet file of prompts: the piece of work that Ray Data hands to an engine's queue."""


@dataclass(frozen=True)
class Plan:
    """What a night has to generate."""

    users: int
    kept: int
    """Users that keep their rows of an earlier night."""
    basis: dict[str, Any]
    """What decides a generated row beside the user's own prompt."""

    @property
    def asked(self) -> int:
        """Users that are generated for."""
        return self.users - self.kept


def write_prompts(run: Artefacts, catalogue: Catalogue, log: ByBucket, asked: Asked, artefact: Artefact) -> Plan:
    """One row a user, who is asked for in `prompts` or answered in `kept`; says how many keep their rows."""
    url = artefact.path("prompts.json")
    if storage.exists(url):
        # People may have been forgotten since.
        kept, anew = (_rows(artefact.path(name)) for name in ("kept", "prompts"))
        return Plan(kept + anew, kept, storage.read_json(url)["basis"])
    for name in ("prompts", "kept", "earlier"):  # of a killed night, which may have kept others
        storage.remove(artefact.path(name))
    basis = generation_basis(run["policy"].require()["files"], catalogue.trie, run.config.generate)
    vocabulary = load_vocabulary(run["policy"].path("checkpoint"), catalogue)
    found, why = earlier_night(run.config.root, basis)
    files = _PromptFiles(artefact)
    buckets, kept = run.config.publish.buckets, 0
    since_us = asked.watermark_us - round(run.config.generate.keep_days * DAY_US)
    with tempfile.TemporaryDirectory(prefix="conrec-kept-") as folder:
        earlier = EarlierRows.none()
        if found is not None:
            earlier = EarlierRows.of(found[0].url, found[1], catalogue.trie, buckets, Path(folder))
        for bucket in range(buckets):
            rows, outdated = [KEPT.empty_table()], [KEPT.empty_table()]
            known, events = earlier.read(bucket), log.of_bucket(bucket, buckets)
            for table in _blocks(run, catalogue, events, asked.anchors(events), vocabulary, basis):
                theirs = (table["user_id"].combine_chunks(), table["digest"].to_numpy())
                stays, same = kept_rows(known, earlier.leaves, *theirs, basis[SEMANTIC_IDS], since_us)
                anew = table.filter(pa.array(~same))
                rows.append(stays)
                outdated.append(outdated_rows(known, earlier.leaves, anew))
                files.add(anew)
            for name, tables in (("kept", rows), ("earlier", outdated)):
                if any(map(len, tables)):
                    storage.write_table(pa.concat_tables(tables), artefact.path(name, bucket_file(bucket)))
            kept += sum(map(len, rows))
    files.close()
    plan = Plan(asked.count, kept, basis)
    storage.write_json(url, asdict(plan))
    if found is not None:
        console.print(
            f"  {plan.kept:,} of {plan.users:,} users keep what night {found[0].version} generated for them, "
            f"{plan.asked:,} are generated"
        )
    elif plan.users:
        console.print(f"  all {plan.users:,} users are generated: {why}")
    return plan


def _rows(folder: str) -> int:
    files = (name for name in storage.list_files(folder) if name.endswith(".parquet"))
    return sum(len(storage.read_table(storage.join(folder, name), columns=["user_id"])) for name in files)


def _blocks(
    run: Artefacts,
    catalogue: Catalogue,
    events: Events,
    anchors: Anchors,
    vocabulary: Vocabulary,
    basis: Mapping[str, Any],
) -> Iterator[pa.Table]:
    """Rows of PROMPTS, so many users at a time."""
    for start in range(0, len(anchors), PROMPTS_PER_FILE):
        block = anchors.take(np.arange(start, min(start + PROMPTS_PER_FILE, len(anchors))))
        prompts = build_prompts(events, block, catalogue.semantic_ids, vocabulary, run.config.prompt)
        excluded = liked_leaves(catalogue, events, block)
        columns = [
            events.users.take(pa.array(block.users)),
            prompts.to_arrow(),
            excluded.to_arrow(),
            pa.array(row_digests(basis, prompts, liked_ids(catalogue, events, block))),
        ]
        yield pa.table(columns, names=PROMPTS.names).cast(PROMPTS)


class _PromptFiles:
    """Writes rows of PROMPTS to files of PROMPTS_PER_FILE rows, however few come at once."""

    def __init__(self, artefact: Artefact) -> None:
        self._artefact = artefact
        self._waiting = PROMPTS.empty_table()
        self._written = 0

    def add(self, rows: pa.Table) -> None:
        self._waiting = pa.concat_tables([self._waiting, rows])
        while len(self._waiting) >= PROMPTS_PER_FILE:
            self._write(self._waiting.slice(0, PROMPTS_PER_FILE))
            self._waiting = self._waiting.slice(PROMPTS_PER_FILE)

    def close(self) -> None:
        if len(self._waiting):
            self._write(self._waiting)

    def _write(self, rows: pa.Table) -> None:
        storage.write_table(rows, self._artefact.path("prompts", f"{self._written:06d}.parquet"))
        self._written += 1


def bucket_file(bucket: int) -> str:
    """The name of the file of a bucket's users."""
    return f"{bucket:05d}.parquet"


def earlier_night(root: str, basis: Mapping[str, Any]) -> tuple[tuple[Artefact, dict[str, Any]] | None, str]:
    """The newest complete night that generated by this basis, with its manifest, or why there is none."""
    # Somebody's copy, or a damaged manifest, is no night to take rows from.
    nights = [one for one in intact(root, "nightly") if one[1]["figures"].get("users")]
    if not nights:
        return None, "no night before this one is complete"
    for one in nights:
        if lasting(one[1]["figures"].get(BASIS) or {}) == lasting(basis):
            return one, ""
    newest, manifest = nights[0]
    before = manifest["figures"].get(BASIS) or {}
    changed = [name for name in lasting({**before, **basis}) if before.get(name) != basis.get(name)]
    return None, f"changed since night {newest.version}: {', '.join(changed)}"


def load_vocabulary(checkpoint: str, catalogue: Catalogue) -> Vocabulary:
    """The ids of the new tokens in a saved tokenizer."""
    from transformers import AutoTokenizer

    with storage.local_folder(checkpoint) as folder:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return Vocabulary.of(tokenizer, catalogue.trie.levels, catalogue.trie.codes)
