"""Who is generated for tonight, and who keeps what an earlier night generated: what the night asks of its engines.

    plan = write_prompts(run, catalogue, log, asked, artefact)     # prompts/ and kept/, bucket by bucket of users

Of users in `prompts` whom an earlier night answered, `earlier` holds that answer, for a night that ends before theirs.
The earlier night is the newest one of this root with the same basis but for the semantic IDs, of which some come and go
every day (`conrec.blocklist.kept`), complete or ended before it was; where it was of few users, beside it older ones of
more.

Invariant: every user has one row, in `prompts` or in `kept`, and which of them is decided once: a night that goes on
after a kill reads its plan, whatever has become of the earlier night.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing
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
    NIGHT_US,
    SEMANTIC_IDS,
    EarlierNight,
    EarlierRows,
    generation_basis,
    kept_rows,
    lasting,
    outdated_rows,
    row_digests,
)
from conrec.catalogue.items import Catalogue
from conrec.config import PromptSettings
from conrec.errors import DataError
from conrec.feedback.events import Events
from conrec.feedback.log import ByBucket
from conrec.parallel import mapping
from conrec.policy.prompts import build_prompts
from conrec.policy.vocabulary import Vocabulary
from conrec.progress import console
from conrec.stages.artefacts import Artefacts, intact, unfinished
from conrec.tables import PROMPTS

PLAN = "prompts.json"
"""Of a night: its plan, which is there once prompts and kept rows are whole."""
PROMPTS_PER_FILE = 4096
"""Rows of one Parquet file of prompts: the piece of work that Ray Data hands to an engine's queue."""
SECONDS_A_PROMPT = 2.5e-5
"""Of one core (benchmarks/scale.py)."""
MORE_USERS = 1.1
"""An older night is looked at, too, where it has so many times the users of the newer ones: the newer were a trial."""


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
    url = artefact.path(PLAN)
    if storage.exists(url):
        # People may have been forgotten since.
        kept, anew = (_rows(artefact.path(name)) for name in ("kept", "prompts"))
        return Plan(kept + anew, kept, storage.read_json(url)["basis"])
    for name in ("prompts", "kept", "earlier"):  # of a killed night, which may have kept others
        storage.remove(artefact.path(name))
    basis = generation_basis(run["policy"].require()["files"], catalogue.trie, run.config.generate)
    vocabulary = load_vocabulary(run["policy"].path("checkpoint"), catalogue)
    found, why = earlier_nights(run.config.root, basis)
    files = _PromptFiles(artefact)
    buckets, kept = run.config.publish.buckets, 0
    with tempfile.TemporaryDirectory(prefix="conrec-kept-") as folder:
        earlier = EarlierRows.of(found, catalogue.trie, buckets, Path(folder)) if found else EarlierRows.none()
        asking = Asking(
            catalogue.semantic_ids,
            catalogue.trie.item_leaves,
            vocabulary,
            run.config.prompt,
            asked,
            basis,
            run.config.generate.keep_days,
        )
        pieces = ((earlier.read(bucket), log.of_bucket(bucket, buckets)) for bucket in range(buckets))
        mapped = mapping(asked.count * SECONDS_A_PROMPT)
        with closing(mapped(Asking.of_bucket, asking, pieces, "buckets of prompts", buckets)) as made:
            for bucket, (anew, stays, outdated) in enumerate(made):
                files.add(anew)
                for name, rows in (("kept", stays), ("earlier", outdated)):
                    if len(rows):
                        storage.write_table(rows, artefact.path(name, bucket_file(bucket)))
                kept += len(stays)
    files.close()
    plan = Plan(asked.count, kept, basis)
    storage.write_json(url, asdict(plan) | {NIGHT_US: asked.watermark_us})
    if found:
        console.print(
            f"  {plan.kept:,} of {plan.users:,} users keep what {' and '.join(map(str, found))} generated for them, "
            f"{plan.asked:,} are generated"
        )
    elif plan.users:
        console.print(f"  all {plan.users:,} users are generated: {why}")
    return plan


def _rows(folder: str) -> int:
    return sum(storage.parquet_metadata(url).num_rows for url in storage.list_parquet(folder))


@dataclass(frozen=True)
class Asking:
    """What a night asks of a bucket's users, whichever bucket it is.

    Shape: semantic_ids (I, L) int32; item_leaves (I,) int64, -1 for items that have disappeared.
    """

    semantic_ids: np.ndarray
    item_leaves: np.ndarray
    vocabulary: Vocabulary
    settings: PromptSettings
    asked: Asked
    basis: Mapping[str, Any]
    keep_days: float

    def of_bucket(self, bucket: tuple[pa.Table, Events]) -> tuple[pa.Table, pa.Table, pa.Table]:
        """Of earlier rows and events: PROMPTS of who is asked anew, and of KEPT the rows of all others and those that
        the first ones had."""
        known, events = bucket
        parts = [(PROMPTS.empty_table(), KEPT.empty_table(), KEPT.empty_table())]
        for table in self._prompts(events):
            theirs = (table["user_id"].combine_chunks(), table["digest"].to_numpy())
            ids, moment = self.basis[SEMANTIC_IDS], self.asked.watermark_us
            stays, same = kept_rows(known, *theirs, ids, moment, self.keep_days)
            anew = table.filter(pa.array(~same))
            parts.append((anew, stays, outdated_rows(known, anew)))
        anew, stays, outdated = (pa.concat_tables(tables) for tables in zip(*parts, strict=True))
        return anew, stays, outdated

    def _prompts(self, events: Events) -> Iterator[pa.Table]:
        """Rows of PROMPTS, so many users at a time."""
        anchors = self.asked.anchors(events)
        for start in range(0, len(anchors), PROMPTS_PER_FILE):
            block = anchors.take(np.arange(start, min(start + PROMPTS_PER_FILE, len(anchors))))
            prompts = build_prompts(events, block, self.semantic_ids, self.vocabulary, self.settings)
            liked = liked_ids(self.semantic_ids, events, block)
            columns = [
                events.users.take(pa.array(block.users)),
                prompts.to_arrow(),
                liked_leaves(self.item_leaves, events, block).to_arrow(),
                pa.array(row_digests(self.basis, prompts, liked)),
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


def earlier_nights(root: str, basis: Mapping[str, Any]) -> tuple[list[EarlierNight], str]:
    """Nights that generated by this basis, the newest first, or why there is none."""
    nights = _every_night(root)
    if not nights:
        return [], "no night before this one is complete"
    found: list[EarlierNight] = []
    for one in nights:
        if lasting(one.basis) == lasting(basis) and (not found or one.users > MORE_USERS * found[-1].users):
            found.append(one)
    if found:
        return found, ""
    before = nights[0].basis
    changed = [name for name in lasting({**before, **basis}) if before.get(name) != basis.get(name)]
    return [], f"changed since night {nights[0].version}: {', '.join(changed)}"


def _every_night(root: str) -> list[EarlierNight]:
    """By their moment, the newest first; of the same moment complete ones first."""
    # Before the complete ones: a night that another process completes meanwhile is among either.
    begun = [one for artefact in unfinished(root, "nightly") if (one := _begun(artefact)) is not None]
    complete = []
    # Somebody's copy, or a damaged manifest, is no night to take rows from.
    for artefact, manifest in intact(root, "nightly"):
        figures = manifest["figures"]
        users, by, moment = figures.get("users"), figures.get(BASIS) or {}, figures.get(NIGHT_US, 0)
        complete.append(EarlierNight(artefact.version, artefact.url, users, by, moment, manifest["files"]))
    nights = [one for one in (*complete, *begun) if one.users]
    return sorted(nights, key=lambda one: one.watermark_us, reverse=True)


def _begun(artefact: Artefact) -> EarlierNight | None:
    """A night that has a plan and has not finished, whoever may be at it."""
    try:
        plan = storage.read_json(artefact.path(PLAN))
        return EarlierNight(artefact.version, artefact.url, plan["users"], plan["basis"], plan[NIGHT_US], None)
    except (FileNotFoundError, DataError, KeyError, TypeError):  # it has none yet, or one of an older release
        return None


def load_vocabulary(checkpoint: str, catalogue: Catalogue) -> Vocabulary:
    """The ids of the new tokens in a saved tokenizer."""
    from transformers import AutoTokenizer

    with storage.local_folder(checkpoint) as folder:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return Vocabulary.of(tokenizer, catalogue.trie.levels, catalogue.trie.codes)
