"""From the table of generated IDs to the two published shapes, bucket by bucket.

    with night([url], log, item_ids, ranking, vectors, .8, calibration, now_us, limits, settings) as tonight:
        publish(root, version, tonight.blocks(), tonight.about, expected)

Users are scored once, and what is predicted for them is counted on the way. Where `guardrails.max_user_share` may hold
an item back, they are scored before, to count for how many of them it is predicted. Invariant: memory is bounded by
the bucket, or as many as `conrec.parallel` holds at once, and the catalogue; what the model generated is read once from
the store and kept, divided into buckets, in a temporary local folder. A user whose generation failed, or who was not
generated for, still gets the explicit rejections: they do not depend on the model. So does one of the holdout, or
outside the release. Of the night before nothing is carried over but what was generated for a user, where
`conrec.stages.night_prompts` or a deadline says so.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as parquet

from conrec import storage
from conrec.blocklist.guardrails import Facts, held_back, longest_list, select
from conrec.blocklist.ranking import Admitted, Answers, Ranking, admitted
from conrec.blocklist.resolve import resolve
from conrec.buckets import rows_of, split
from conrec.catalogue.codebook import format_semantic_ids
from conrec.config import DAY_US
from conrec.errors import ArtefactError
from conrec.parallel import Mapped, in_process
from conrec.ragged import Ragged
from conrec.serving.audience import in_holdout, predictions_for
from conrec.store.publish import Block
from conrec.tables import BLOCKLIST, GENERATED, RULES, TIMESTAMP, check

if TYPE_CHECKING:
    from conrec.blocklist.calibrate import Calibration
    from conrec.blocklist.fitting import Scoring
    from conrec.config import GuardrailSettings, PublishSettings
    from conrec.feedback.events import Events
    from conrec.feedback.log import ByBucket

Result = TypeVar("Result")
_ROWS_AT_ONCE = 1 << 16
SECONDS_A_SCORE = 1.2e-7
"""Of a user and a thing, of one core: its share of the lists and their audit (benchmarks/scale.py)."""


@dataclass
class Generated:
    """The generated table divided into buckets, and what was seen on the way."""

    folder: Path
    seen: np.ndarray
    """Shape: (M,) bool, leaves that were generated."""
    users: int = 0
    """Rows: one per user that the generation answered for, failed or not."""
    failed: int = 0
    """Rows with an error."""
    errors: list[str] = field(default_factory=list)
    """The first few errors."""
    urls: Sequence[str] = ()
    """Where the rows come from: folders of one night."""

    @property
    def remedy(self) -> str:
        """Of rows that are none of a night."""
        return f"delete the folder that holds {', '.join(self.urls)}, and run conrec nightly"

    def read(self, bucket: int, events: Events) -> Piece:
        """A bucket's users with what was generated for them.

        Raises `ArtefactError` for a user without history, or with two rows.
        """
        users = events.users
        table = rows_of(self.folder, GENERATED, bucket)
        table = table.filter(pc.is_null(table["error"]))
        rows = pc.index_in(table["user_id"], value_set=users)
        if rows.null_count:
            unknown = table["user_id"][pc.index(pc.is_null(rows), True).as_py()].as_py()
            raise ArtefactError(f"IDs were generated for user {unknown!r}, who has no interactions; {self.remedy}")
        place = np.asarray(rows).astype(np.int64)
        counts = np.bincount(place, minlength=len(users))
        if counts.max(initial=0) > 1:
            twice = users[int(counts.argmax())].as_py()
            raise ArtefactError(f"IDs were generated twice for user {twice!r}; {self.remedy}")
        order = np.argsort(place)
        leaves, log_probs, verdicts = (
            Ragged.from_arrow(table[name]).take(order) for name in ("leaves", "log_probs", "verdicts")
        )
        lengths = np.zeros(len(users), np.int64)
        lengths[place[order]] = leaves.lengths
        answers = Answers(
            Ragged.from_lengths(leaves.values.astype(np.int64), lengths), log_probs.values, verdicts.values
        )
        return Piece(bucket, events, answers, counts > 0)


@dataclass(frozen=True)
class Piece:
    """The users of a bucket. Shape: answers a row a user; answered (B,) bool, whom the generation answered for."""

    bucket: int
    events: Events
    answers: Answers
    answered: np.ndarray


@dataclass
class Counted:
    """What is counted of some buckets. Shape: users (I,) int64, for how many an item is predicted before caps, the
    audience or not: a canary so holds back what the release to everybody would."""

    users: np.ndarray
    overruled: int = 0
    """Explicit rejections that the allow-list overruled."""
    holdout_users: int = 0
    released_users: int = 0
    """Users who get predictions: released, and not in the holdout."""

    def join(self, other: Counted) -> None:
        """Counts what was counted of other buckets."""
        self.users += other.users
        self.overruled += other.overruled
        self.holdout_users += other.holdout_users
        self.released_users += other.released_users


@dataclass(frozen=True)
class Lists:
    """What makes the lists of a bucket's users, whichever bucket it is.

    Shape: item_ids (I,) string; semantic_ids (M,) string, the written form of each leaf; held (I,) bool, items that are
    held back, which `count` does not ask for.
    """

    item_ids: pa.Array
    ranking: Ranking
    semantic_ids: pa.Array
    calibration: Calibration
    watermark_us: int
    settings: GuardrailSettings
    publish: PublishSettings
    held: np.ndarray

    def nothing(self) -> Counted:
        """Of no bucket."""
        return Counted(np.zeros(len(self.item_ids), np.int64))

    def count(self, bucket: Piece) -> Counted:
        """What `block` counts, without the lists."""
        counted = self.nothing()
        for names, block in self._admitted(bucket):
            self._count(counted, names, block)
        return counted

    def block(self, bucket: Piece) -> tuple[Block, Counted]:
        """Both shapes of a bucket."""
        counted, parts = self.nothing(), [(BLOCKLIST.empty_table(), RULES.empty_table())]
        for names, block in self._admitted(bucket):
            self._count(counted, names, block)
            audience = self._audience(names)
            parts.append((self._items(names, block, audience), self._rules(names, block, audience)))
        return Block(bucket.bucket, *(pa.concat_tables(tables) for tables in zip(*parts, strict=True))), counted

    def _count(self, counted: Counted, names: pa.Array, block: Admitted) -> None:
        counted.users += np.bincount(block.predicted.items, minlength=len(counted.users))
        counted.overruled += block.known.allowed
        counted.holdout_users += int(in_holdout(names, self.publish.holdout_share).sum())
        counted.released_users += int(self._audience(names).sum())

    def _admitted(self, bucket: Piece) -> Iterator[tuple[pa.Array, Admitted]]:
        """Block by block of its users: their names, and what may be predicted for them."""
        events, answered = bucket.events, bucket.answered
        ranking = replace(self.ranking, counts=self.ranking.counts.among(events))

        def thresholds(places: np.ndarray, known: Facts) -> np.ndarray:
            return np.where(answered[places], self.calibration.thresholds(known.rejections), np.inf)

        everybody = np.arange(len(events.users))
        blocks = admitted(ranking, events, everybody, bucket.answers, self.watermark_us, self.settings, thresholds)
        for block in blocks:
            yield events.users.take(pa.array(block.places)), block

    def _audience(self, names: pa.Array) -> np.ndarray:
        """Who gets predictions. Shape: names (B,) string -> (B,) bool."""
        return predictions_for(names, self.publish.holdout_share, self.publish.release.share)

    def _items(self, names: pa.Array, block: Admitted, audience: np.ndarray) -> pa.Table:
        predicted = block.predicted.take(audience[block.predicted.rows])
        rows = select(predicted, block.known, self.held, self.watermark_us, self.settings)
        return pa.table(
            [
                names.take(pa.array(rows.rows)),
                self.item_ids.take(pa.array(rows.items)),
                pa.array(["predicted", "explicit"]).take(pa.array(rows.explicit.astype(np.int8))),
                pa.array(rows.similarities),
                pa.array(rows.scores),
                self.semantic_ids.take(pa.array(rows.leaves, mask=rows.leaves < 0)),
                pa.array(rows.demotes_us).cast(TIMESTAMP),
                pa.array(rows.expires_us).cast(TIMESTAMP),
            ],
            schema=BLOCKLIST,
        )

    def _rules(self, names: pa.Array, block: Admitted, audience: np.ndarray) -> pa.Table:
        kept = audience[block.ruled.rows]
        rows, leaves, scores = block.ruled.rows[kept], block.ruled.leaves[kept], block.ruled.scores[kept]
        demotes = self.watermark_us + round(self.settings.predicted_days * DAY_US)
        expires = demotes + round(self.settings.predicted_demote_days * DAY_US)
        return pa.table(
            [
                names.take(pa.array(rows)),
                self.semantic_ids.take(pa.array(leaves)),
                pa.array(scores),
                pa.array(block.thresholds[rows].astype(np.float32)),
                pa.array(np.full(len(rows), demotes)).cast(TIMESTAMP),
                pa.array(np.full(len(rows), expires)).cast(TIMESTAMP),
            ],
            schema=RULES,
        )


@dataclass
class Night:
    """The lists of all users; made by `night`."""

    generated: Generated
    log: ByBucket
    lists: Lists
    mapped: Mapped

    @cached_property
    def counted(self) -> Counted:
        """What is counted of all buckets: while their lists are made, or before, where it was not yet."""
        counted = self.lists.nothing()
        with closing(self._over(Lists.count, self.lists, "buckets counted")) as buckets:
            for bucket in buckets:
                counted.join(bucket)
        return counted

    @property
    def held(self) -> np.ndarray:
        """Which items (I,) are held back."""
        return held_back(self.counted.users, self.generated.users - self.generated.failed, self.lists.settings)

    def blocks(self) -> Generator[Block]:
        """Both shapes of each bucket, buckets ascending."""
        lists, counted = self.lists, self.lists.nothing()
        if lists.settings.max_user_share < 1:
            lists = replace(lists, held=self.held)
        with closing(self._over(Lists.block, lists, "buckets of lists")) as buckets:
            for block, of_bucket in buckets:
                counted.join(of_bucket)
                yield block
        self.counted = counted

    def about(self) -> dict[str, Any]:
        """What the manifest says of this night beside its files; JSON, the same for the same inputs."""
        held, publish, live = np.flatnonzero(self.held), self.lists.publish, self.lists.ranking.live
        return {
            "watermark_us": self.lists.watermark_us,
            "generated_users": self.generated.users,
            "failed_users": self.generated.failed,
            "failures": self.generated.errors,
            "distinct_generated_ids": int(self.generated.seen.sum()),
            "rejections_overruled_by_likes": self.counted.overruled,
            "held_back": [
                {"item_id": self.lists.item_ids[int(item)].as_py(), "users": int(self.counted.users[item])}
                for item in held
            ],
            "longest_list": longest_list(int(live.sum()), self.lists.settings),
            "audience": {
                "holdout_share": publish.holdout_share,
                "release_share": publish.release.share,
                "shadow": publish.release.shadow,
                "holdout_users": self.counted.holdout_users,
                "released_users": self.counted.released_users,
            },
            "calibration": self.lists.calibration.to_json(),
        }

    def _over(self, work: Callable[[Lists, Piece], Result], lists: Lists, what: str) -> Generator[Result]:
        buckets = self.lists.publish.buckets
        pieces = (self.generated.read(bucket, self.log.of_bucket(bucket, buckets)) for bucket in range(buckets))
        return self.mapped(work, lists, pieces, what, buckets)


@contextmanager
def night(
    generated_urls: Sequence[str],
    log: ByBucket,
    item_ids: pa.Array,
    ranking: Ranking,
    vectors: np.ndarray,
    min_similarity: float,
    calibration: Calibration,
    watermark_us: int,
    settings: GuardrailSettings,
    publish: PublishSettings,
    mapped: Mapped = in_process,
) -> Iterator[Night]:
    """Resolves what was generated; the temporary folder lives as long as the context.

    Each URL is a folder of rows that were generated, tonight or kept of an earlier night. Without any nothing was
    generated, as nobody could get predictions; explicit rejections are published.
    Shape: item_ids (I,) string in the order of the item rows; the log may reach beyond the watermark, which is the
    time of the night in microseconds: later events are not looked at. Of `ranking` the columns of things are taken,
    those of users are counted bucket by bucket. vectors (M, D) of the leaves: what lies at least
    `min_similarity` near a generated ID is said with a row.
    Raises `ArtefactError` when the generated table is empty or belongs to another catalogue.
    """
    if isinstance(item_ids, pa.ChunkedArray):
        item_ids = item_ids.combine_chunks()
    with tempfile.TemporaryDirectory(prefix="conrec-night-") as folder:
        generated = divide(generated_urls, Path(folder), len(ranking.trie), publish.buckets)
        resolution = resolve(np.flatnonzero(generated.seen), ranking.trie, vectors, min_similarity)
        lists = Lists(
            item_ids,
            replace(ranking, resolution=resolution),
            format_semantic_ids(ranking.trie.semantic_ids),
            calibration,
            watermark_us,
            settings,
            publish,
            held=np.zeros(len(item_ids), bool),
        )
        yield Night(generated, log, lists, mapped)


def divide(urls: Sequence[str], folder: Path, leaf_count: int, buckets: int) -> Generated:
    """Reads the generated tables once and writes them to `folder`, one file per bucket of users; no URL: nobody's."""
    result = Generated(folder, np.zeros(leaf_count, bool), urls=urls)

    def noted() -> Iterator[pa.Table]:
        for url in urls:
            for table in _tables(url):
                _note(result, table, url)
                yield table

    split(noted(), folder, GENERATED, buckets)
    if urls and result.users == 0:
        raise ArtefactError(f"{', '.join(urls)}: nothing was generated for any user; {result.remedy}")
    return result


def _tables(url: str) -> Iterator[pa.Table]:
    files, path = storage.filesystem(url)
    for file_url in storage.list_parquet(url) if files.isdir(path) else [url]:
        with files.open(storage.filesystem(file_url)[1], "rb") as source:
            for batch in parquet.ParquetFile(source).iter_batches(_ROWS_AT_ONCE):
                yield check(pa.Table.from_batches([batch]), GENERATED, file_url).select(GENERATED.names).cast(GENERATED)


def _note(result: Generated, table: pa.Table, url: str) -> None:
    failures = table["error"].drop_null()
    result.users += len(table)
    result.failed += len(failures)
    result.errors += failures.slice(0, max(0, 3 - len(result.errors))).to_pylist()
    succeeded = table.filter(pc.is_null(table["error"]))
    require_sound(succeeded, len(result.seen), url, result.remedy)
    result.seen[Ragged.from_arrow(succeeded["leaves"]).values] = True


def require_sound(rows: pa.Table, leaf_count: int, source: str, remedy: str) -> None:
    """Raises `ArtefactError` for rows of GENERATED without error that are none over so many leaves."""
    leaves = Ragged.from_arrow(rows["leaves"])
    outside = (leaves.values < 0) | (leaves.values >= leaf_count)
    if outside.any():
        row = int(np.flatnonzero(outside)[0])
        raise ArtefactError(
            f"{source}: user {rows['user_id'][int(leaves.rows[row])]} has leaf {leaves.values[row]}, the catalogue "
            f"has {leaf_count}; {remedy}"
        )
    for name in ("log_probs", "verdicts"):
        numbers = Ragged.from_arrow(rows[name])
        if not np.array_equal(leaves.offsets, numbers.offsets) or np.isnan(numbers.values).any():
            raise ArtefactError(f"{source}: {name} are not one number for each of the leaves; {remedy}")


def for_everybody(made: Scoring, tonight: Night) -> dict[str, Any]:
    """The list that is the same for all users, the surest first: what a ranking demotes for everybody, with how many
    users' own lists hold an item."""
    calibration, live = made.everybody, tonight.lists.ranking.live
    threshold = calibration.overall.threshold
    scores = np.where(live, made.score.for_everybody(tonight.lists.ranking.counts)[: len(live)], 0)
    listed = np.flatnonzero(scores >= (np.inf if threshold is None else threshold))
    listed = listed[np.argsort(-scores[listed], kind="stable")]
    return {
        "alpha": calibration.alpha,
        "threshold": threshold,
        "items": [
            {
                "item_id": tonight.lists.item_ids[int(item)].as_py(),
                "score": round(float(scores[item]), 4),
                "users": int(tonight.counted.users[item]),
            }
            for item in listed
        ],
    }
