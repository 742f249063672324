"""The audit of a version before readers see it: everything is read again from the store and held against its source.

    findings = audit(root, manifest, Expected(...))      # empty: publish
    raise failure(root, manifest, findings)              # else: <root>/audits/<version>.json says what and where

It shares no rule and no join with the guardrails: a (user, item) key is made here by hand, not by `ragged.pairs`, so
that a mistake there is seen here. Invariant: memory is bounded by one bucket of this version and of the one before, or
as many as `conrec.parallel` holds at once, apart from one count per item.

| rule | what it finds |
|---|---|
| files | a file that is missing, truncated or changed; a bucket without a file; a file that no entry names |
| schema | a column that is missing, of another type, or null (user_id above all) |
| unique | a (user, item) or (user, semantic ID) twice |
| order | users not ascending in their file, or in the wrong bucket: readers would not find them |
| catalogue | an item or a semantic ID that the catalogue lacks |
| liked | an item that its user liked in the protected period |
| reason | neither explicit nor predicted; explicit without a rejection; predicted of too few rejections or items met |
| expiry | a row that is past, blocks longer than its reason allows, or demotes for another time than the settings say |
| audience | a prediction, in either shape, for a user of the holdout or outside the release |
| list length | more rows for a user than max_items_per_user |
| catalogue share | more of the catalogue for a user than max_catalogue_share |
| item share | an item predicted for more than max_user_share of the users |
| coverage | too many input users that the generation did not answer for |
| failed | too many users whose generation failed |
| belongs | a policy or a calibration that was made for another catalogue, or the calibration of another policy |
| size | explicit or predicted rows more, or fewer, than those of the version before by more than max_size_change |
| overlap | too few of the predicted rows before are still there, for the users that have predictions in both |
| clock | a watermark ahead of the clock: no true night could follow, since readers never go back |
| figures | rows, users, list lengths, watermark or audience that differ from what the manifest says |

Size and overlap look at what readers would notice against the version that the pointer names; where that is damaged,
there is nothing to hold against, and a version that mends it is not kept from readers. Predicted rows are compared for
the users whom both versions predict for: a release to more users is no change.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as parquet

from conrec import storage
from conrec.buckets import user_buckets
from conrec.config import DAY_US
from conrec.errors import ArtefactError, AuditError, DataError
from conrec.feedback.events import LIKED, REJECTED, Events
from conrec.parallel import Mapped, in_process
from conrec.ragged import ranges
from conrec.serving import versions
from conrec.serving.audience import in_holdout, released
from conrec.serving.rows import bucket_path
from conrec.store.continuity import Before, Change, total
from conrec.tables import BLOCKLIST, RULES, check

if TYPE_CHECKING:
    from conrec.config import GuardrailSettings, PublishSettings
    from conrec.feedback.log import ByBucket

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FEW_ROWS = 100
"""Below so many rows a factor between two nights is chance."""
# Shares such as .29 of 100 are not whole in binary.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Expected:
    """What a version is held against.

    Shape: item_ids (I,) string in the order of the item rows; semantic_ids (M,) string, written form, of the
    catalogue. `input_users`: users that the night was to generate for.
    """

    events: ByBucket
    item_ids: pa.Array
    semantic_ids: pa.Array
    watermark_us: int
    input_users: int
    guardrails: GuardrailSettings
    publish: PublishSettings
    latest_us: int = field(default_factory=lambda: round(time.time() * 1e6))
    """What no event, and so no watermark, can lie after: this machine's clock, or a skew later."""
    origins: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Artefact -> what it recorded of the ones that it was made from, {"calibration": {"policy": ..., "catalogue":
    ...}}; each must be the one of that name in `about`."""
    live: np.ndarray | None = None
    """Shape: (I,) bool, items of today; None: all. Only they may be blocked."""

    @property
    def live_ids(self) -> pa.Array:
        """The items of today."""
        return self.item_ids if self.live is None else self.item_ids.filter(pa.array(self.live))


_NOTHING = Events(
    pa.array([], pa.string()), np.zeros(1, np.int64), *(np.zeros(0, kind) for kind in (np.int32, np.int64, np.int8))
)


@dataclass(frozen=True)
class Finding:
    """One broken rule."""

    rule: str
    where: str
    """File, or `version` for a figure over all of it."""
    what: str
    """The value, the limit, an example."""

    def __str__(self) -> str:
        return f"{self.rule}: {self.where}: {self.what}"


class Figures:
    """Counts over the blocks of a version; the writer and the audit each make their own."""

    def __init__(self) -> None:
        self.rows = self.explicit = self.rules = 0
        self.lengths = np.zeros(1, np.int64)
        """lengths[n]: users with n rows."""

    def add(self, items: pa.Table, rules: pa.Table) -> None:
        """Counts one bucket; no user may be in two."""
        self.rows += len(items)
        self.explicit += int(np.count_nonzero(_numpy(pc.equal(items["reason"], "explicit"))))
        self.rules += len(rules)
        self._add(np.bincount(_numpy(pc.value_counts(items["user_id"]).field("counts")).astype(np.int64)))

    def join(self, other: Figures) -> None:
        """Counts what another one counted of other buckets."""
        self.rows += other.rows
        self.explicit += other.explicit
        self.rules += other.rules
        self._add(other.lengths)

    def _add(self, lengths: np.ndarray) -> None:
        if len(lengths) > len(self.lengths):
            lengths, self.lengths = self.lengths, lengths
        self.lengths = self.lengths + np.pad(lengths, (0, len(self.lengths) - len(lengths)))

    def to_json(self) -> dict[str, Any]:
        """Rows by reason, users, and quantiles of the length of the lists that are not empty."""
        ends = np.cumsum(self.lengths)
        users = int(ends[-1])

        def quantile(share: float) -> int:
            return int(np.searchsorted(ends, max(1, np.ceil(share * users)))) if users else 0

        return {
            "users": users,
            "rows": self.rows,
            "explicit": self.explicit,
            "predicted": self.rows - self.explicit,
            "rules": self.rules,
            "list_length": {"p50": quantile(0.5), "p95": quantile(0.95), "max": quantile(1.0)},
        }


@dataclass(frozen=True)
class _Draft:
    """What is audited: a version by the manifest that readers will get. `expected` is without the events."""

    root: str
    manifest: dict[str, Any]
    expected: Expected
    live_ids: pa.Array
    before: Before | None


@dataclass
class _Bucket:
    """What the audit finds in a bucket of users. Shape: items (N,) distinct rows, users (N,) they are predicted for."""

    findings: list[Finding] = field(default_factory=list)
    figures: Figures = field(default_factory=Figures)
    items: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    users: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    change: Change | None = field(default_factory=Change)
    """None where the version before turns out damaged."""


def audit(
    root: str,
    manifest: dict[str, Any],
    expected: Expected,
    mapped: Mapped = in_process,
    alive: Callable[[], None] = lambda: None,
) -> list[Finding]:
    """Reads a version again and returns every broken rule; `manifest` is the draft of what readers will get.

    `alive` is called after every bucket.
    """
    root = storage.absolute(root)  # workers of a cluster start elsewhere
    findings = list(_file_names(root, manifest))
    figures = Figures()
    predicted = np.zeros(len(expected.item_ids), np.int64)
    before, changes = Before.of(root, manifest, expected.publish), []
    draft = _Draft(root, manifest, replace(expected, events=_NOTHING), expected.live_ids, before)
    buckets = manifest["buckets"]
    pieces = ((bucket, expected.events.of_bucket(bucket, buckets)) for bucket in range(buckets))
    with closing(mapped(_bucket, draft, pieces, "buckets audited", buckets)) as parts:
        for part in parts:
            findings += part.findings
            figures.join(part.figures)
            predicted[part.items] += part.users
            changes.append(part.change)
            alive()
    findings += _belongs(manifest, expected)
    if before is not None and (change := total(changes)) is not None:
        findings += _changes(change, before, expected.publish)
    return [*findings, *_whole(manifest, expected, figures, predicted)]


def _bucket(draft: _Draft, piece: tuple[int, Events]) -> _Bucket:
    root, manifest, expected = draft.root, draft.manifest, draft.expected
    (bucket, events), buckets = piece, manifest["buckets"]
    found = _Bucket()
    tables = {}
    for shape, schema in (("data", BLOCKLIST), ("rules", RULES)):
        table = _read(root, manifest, bucket_path(shape, bucket), schema)
        if isinstance(table, pa.Table):
            tables[shape] = table
        else:
            found.findings += table
    if len(tables) < 2:
        return found
    items, rules = tables["data"], tables["rules"]
    found.figures.add(items, rules)
    for shape, table, key in (("data", items, "item_id"), ("rules", rules, "semantic_id")):
        found.findings += _layout(table, key, bucket_path(shape, bucket), bucket, buckets)
    found.findings += _unknown(items, "item_id", draft.live_ids, bucket_path("data", bucket))
    found.findings += _unknown(items, "semantic_id", expected.semantic_ids, bucket_path("data", bucket))
    found.findings += _unknown(rules, "semantic_id", expected.semantic_ids, bucket_path("rules", bucket))
    found.findings += _lists(items, bucket_path("data", bucket), expected)
    found.findings += _feedback(items, bucket_path("data", bucket), events, expected)
    found.findings += _expiry(items, rules, bucket, expected)
    found.findings += _audience(items, rules, bucket, expected.publish)
    if draft.before is not None:
        found.change = draft.before.change(items, bucket, buckets)
    blocked = items.filter(pc.equal(items["reason"], "predicted"))["item_id"]
    rows = pc.index_in(blocked, value_set=expected.item_ids).drop_null()
    found.items, found.users = np.unique(_numpy(rows).astype(np.int64), return_counts=True)
    return found


def failure(root: str, manifest: dict[str, Any], findings: list[Finding]) -> AuditError:
    """The error of a failed audit, after its report was written to `<root>/audits/<version>.json`."""
    url = storage.join(root, "audits", f"{manifest['version']}.json")
    report = {
        "version": manifest["version"],
        "audited_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "findings": [asdict(finding) for finding in findings],
        "figures": manifest["figures"],
        "about": manifest["about"],
    }
    try:
        storage.write_json(url, report)
        where = f"the whole report: {url}"
    except OSError as error:
        where = f"no report could be written to {url}: {error}"  # the audit's own message matters more
    return AuditError(
        f"{versions.version_url(root, manifest['version'])}: {len(findings)} findings, nothing was published:\n"
        + "\n".join(f"  {finding}" for finding in findings)
        + f"\n{where}"
    )


def _file_names(root: str, manifest: dict[str, Any]) -> Iterator[Finding]:
    named = [entry["path"] for entry in manifest["files"]]
    needed = [bucket_path(shape, bucket) for shape in ("data", "rules") for bucket in range(manifest["buckets"])]
    for path in sorted(set(needed) ^ set(named)):
        yield Finding("files", path, "not named by the manifest" if path in needed else "belongs to no bucket")
    for path in storage.list_files(versions.version_url(root, manifest["version"])):
        if path.endswith(".parquet") and path not in named:
            yield Finding("files", path, "lies in the version, and the manifest does not name it")


def _read(root: str, manifest: dict[str, Any], path: str, schema: pa.Schema) -> pa.Table | list[Finding]:
    entry = next((entry for entry in manifest["files"] if entry["path"] == path), None)
    if entry is None:
        return []  # already found by _file_names
    try:
        table = parquet.read_table(pa.BufferReader(versions.read_entry(root, manifest["version"], entry)))
    except (ArtefactError, pa.ArrowException, OSError) as error:
        return [Finding("files", path, str(error))]
    if len(table) != entry["rows"]:
        return [Finding("files", path, f"{len(table)} rows, the manifest says {entry['rows']}")]
    try:
        return check(table, schema, path)
    except DataError as error:
        return [Finding("schema", path, str(error))]


def _layout(table: pa.Table, key: str, path: str, bucket: int, buckets: int) -> Iterator[Finding]:
    users = table["user_id"].combine_chunks()
    descends = pc.greater(users.slice(0, max(0, len(users) - 1)), users.slice(min(1, len(users))))
    if pc.any(descends).as_py():
        yield Finding("order", path, f"user {users[pc.index(descends, True).as_py() + 1]} comes after a greater one")
    elsewhere = np.flatnonzero(user_buckets(users, buckets) != bucket)
    if len(elsewhere):
        yield Finding("order", path, f"user {users[int(elsewhere[0])]} belongs to another bucket")
    counts = table.group_by(["user_id", key]).aggregate([([], "count_all")])
    twice = counts.filter(pc.greater(counts["count_all"], 1))
    if len(twice):
        first = twice.slice(0, 1).to_pylist()[0]
        yield Finding("unique", path, f"{len(twice)} pairs more than once, first {first['user_id']!r}, {first[key]!r}")


def _unknown(table: pa.Table, key: str, known: pa.Array, path: str) -> Iterator[Finding]:
    values = table[key].drop_null()
    unknown = values.filter(pc.invert(pc.is_in(values, value_set=known)))
    if len(unknown):
        yield Finding("catalogue", path, f"{key}: {len(unknown)} rows are not in the catalogue, first {unknown[0]}")


def _lists(items: pa.Table, path: str, expected: Expected) -> Iterator[Finding]:
    counts = items.group_by("user_id").aggregate([([], "count_all")])
    if len(counts) == 0:
        return
    longest = pc.max(counts["count_all"]).as_py()
    user = counts["user_id"][pc.index(counts["count_all"], longest).as_py()]
    limit = expected.guardrails.max_items_per_user
    if longest > limit:
        yield Finding("list length", path, f"user {user} has {longest} rows, the limit is {limit}")
    share, limit_share = longest / len(expected.live_ids), expected.guardrails.max_catalogue_share
    if share > limit_share + _ROUNDING:
        yield Finding(
            "catalogue share", path, f"user {user} loses {share:.2%} of the catalogue, the limit is {limit_share:.2%}"
        )


def _feedback(items: pa.Table, path: str, events: Events, expected: Expected) -> Iterator[Finding]:
    """Rules liked and reason, against the events of the bucket's users themselves."""
    limits = expected.guardrails
    names = items["user_id"].unique()
    rows = pc.index_in(names, value_set=events.users)
    if rows.null_count:
        yield Finding("reason", path, f"user {names.filter(pc.is_null(rows))[0]} of this bucket has no interactions")
        return
    users = _numpy(rows).astype(np.int64)
    lengths = np.diff(events.offsets)[users]
    places = ranges(events.offsets[users], lengths)
    holder = np.repeat(np.arange(len(users)), lengths)
    age_us = expected.watermark_us - events.times[places]
    catalogue = len(expected.item_ids)
    history = holder * catalogue + events.items[places]

    row = _numpy(pc.index_in(items["user_id"], value_set=names)).astype(np.int64)
    item = _numpy(pc.fill_null(pc.index_in(items["item_id"], value_set=expected.item_ids), -1)).astype(np.int64)
    blocked = np.where(item >= 0, row * catalogue + item, -1)

    def example(mask: np.ndarray) -> str:
        position = int(np.flatnonzero(mask)[0])
        return f"{int(mask.sum())} rows, first user {items['user_id'][position]}, item {items['item_id'][position]}"

    liked = history[(events.kinds[places] == LIKED) & (age_us >= 0) & (age_us <= limits.protect_days * DAY_US)]
    hides_liked = np.isin(blocked, liked)
    if hides_liked.any():
        yield Finding("liked", path, f"liked within {limits.protect_days} days: {example(hides_liked)}")

    rejected = (events.kinds[places] == REJECTED) & (age_us >= 0)
    explicit = _numpy(pc.equal(items["reason"], "explicit"))
    predicted = _numpy(pc.equal(items["reason"], "predicted"))
    if not (explicit | predicted).all():
        yield Finding("reason", path, f"neither explicit nor predicted: {example(~(explicit | predicted))}")
    invented = explicit & ~np.isin(blocked, history[rejected])
    if invented.any():
        yield Finding("reason", path, f"explicit without a rejection: {example(invented)}")
    few = predicted & (np.bincount(holder[rejected], minlength=len(users))[row] < limits.min_negatives)
    if few.any():
        yield Finding("reason", path, f"predicted with fewer than {limits.min_negatives} rejections: {example(few)}")
    met = np.bincount(np.unique(history[age_us >= 0]) // catalogue, minlength=len(users))
    strange = predicted & (met[row] < limits.min_history)
    if strange.any():
        yield Finding("reason", path, f"predicted with fewer than {limits.min_history} items met: {example(strange)}")


def _expiry(items: pa.Table, rules: pa.Table, bucket: int, expected: Expected) -> Iterator[Finding]:
    limits = expected.guardrails
    explicit = _numpy(pc.equal(items["reason"], "explicit"))
    for shape, table, is_explicit in (("data", items, explicit), ("rules", rules, np.zeros(len(rules), bool))):
        demotes_us, expires_us = (_numpy(table[name].cast(pa.int64())) for name in ("demotes_at", "expires_at"))
        blocks_us = np.where(is_explicit, limits.explicit_days, limits.predicted_days) * DAY_US
        demotion_us = np.where(is_explicit, limits.explicit_demote_days, limits.predicted_demote_days) * DAY_US
        wrong = (
            (expires_us <= expected.watermark_us)
            | (demotes_us - expected.watermark_us > np.rint(blocks_us))
            | (expires_us - demotes_us != np.rint(demotion_us))
        )
        if wrong.any():
            position = int(np.flatnonzero(wrong)[0])
            yield Finding(
                "expiry",
                bucket_path(shape, bucket),
                f"{int(wrong.sum())} rows are past or last too long, first user {table['user_id'][position]}: "
                f"{table['expires_at'][position]}",
            )


def _audience(items: pa.Table, rules: pa.Table, bucket: int, settings: PublishSettings) -> Iterator[Finding]:
    guesses = items.filter(pc.not_equal(items["reason"], "explicit"))
    for shape, table in (("data", guesses), ("rules", rules)):
        users = table["user_id"].combine_chunks()
        for what, wrong in (
            ("of the holdout", in_holdout(users, settings.holdout_share)),
            ("outside the release", ~released(users, settings.release.share)),
        ):
            if wrong.any():
                first = users[int(np.flatnonzero(wrong)[0])]
                what = f"{int(wrong.sum())} predictions for users {what}, first user {first}"
                yield Finding("audience", bucket_path(shape, bucket), what)


def _belongs(manifest: dict[str, Any], expected: Expected) -> Iterator[Finding]:
    for artefact, inputs in expected.origins.items():
        for name, version in inputs.items():
            tonight = manifest["about"].get(name)
            if version != tonight:
                yield Finding(
                    "belongs", "version", f"{artefact} was made of {name} {version}, the night's is {tonight}"
                )


def _changes(change: Change, before: Before, settings: PublishSettings) -> Iterator[Finding]:
    """Rules size and overlap."""
    name, limit = before.manifest["version"], settings.max_size_change
    for reason, (then, now) in (("explicit", change.explicit), ("predicted", change.predicted)):
        # None counts as one row: a night after one that predicted nothing has a factor that can be admitted.
        factor = max(then, now) / max(1, min(then, now))
        if max(then, now) >= _FEW_ROWS and factor > limit:
            yield Finding(
                "size",
                "version",
                f"{now} {reason} rows, {then} in version {name}, the limit is a factor of {limit:g}; "
                f"where this is meant, set publish.max_size_change={math.ceil(factor)} for one night",
            )
    if change.comparable >= _FEW_ROWS and change.kept < settings.min_overlap * change.comparable - _ROUNDING:
        yield Finding(
            "overlap",
            "version",
            f"{change.kept} of {change.comparable} predicted rows of version {name} are still there, the limit is "
            f"{settings.min_overlap:.2%}; where this is meant, set publish.min_overlap for one night",
        )


def _whole(manifest: dict[str, Any], expected: Expected, figures: Figures, predicted: np.ndarray) -> Iterator[Finding]:
    about = manifest["about"]
    if about["watermark_us"] != expected.watermark_us:
        what = f"watermark {about['watermark_us']}, the night's is {expected.watermark_us}"
        yield Finding("figures", "version", what)
    if about["watermark_us"] > expected.latest_us:
        watermark, latest = (_EPOCH + timedelta(microseconds=at) for at in (about["watermark_us"], expected.latest_us))
        yield Finding(
            "clock", "version", f"the last event is of {watermark}, ahead of the clock: the limit is {latest}"
        )
    release = expected.publish.release
    audience = {"holdout_share": expected.publish.holdout_share, "release_share": release.share}
    claimed_audience = {name: about.get("audience", audience).get(name) for name in audience}
    if claimed_audience != audience:
        yield Finding("figures", "version", f"audience {audience}, the manifest says {claimed_audience}")
    answered, failed = about["generated_users"], about["failed_users"]
    limit = expected.guardrails.max_user_share
    worst = int(np.argmax(predicted)) if len(predicted) else 0
    if len(predicted) and predicted[worst] > limit * (answered - failed) + _ROUNDING:
        yield Finding(
            "item share",
            "version",
            f"item {expected.item_ids[worst]} is predicted for {predicted[worst]} of {answered - failed} users, "
            f"the limit is {limit:.2%}",
        )
    if answered < expected.publish.min_coverage * expected.input_users - _ROUNDING:
        yield Finding(
            "coverage",
            "version",
            f"{answered} of {expected.input_users} users were answered for, "
            f"the limit is {expected.publish.min_coverage:.2%}",
        )
    if failed > expected.publish.max_failed_share * answered + _ROUNDING:
        yield Finding(
            "failed",
            "version",
            f"generation failed for {failed} of {answered} users, the limit is {expected.publish.max_failed_share:.2%}",
        )
    actual = figures.to_json()
    for name, value in actual.items():
        claimed = manifest["figures"].get(name)
        if claimed != value:
            yield Finding("figures", "version", f"{name} is {value}, the manifest says {claimed}")


def _numpy(array: pa.Array | pa.ChunkedArray) -> np.ndarray:
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    return np.asarray(array.to_numpy(zero_copy_only=False))
