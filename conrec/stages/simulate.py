"""Night after night of a log that is known: what each would have published, and what the day after said of it.

    for night in simulate(config, nights=3): print(night.catch, night.false_block)

The last night lies a day before the log ends, the others a day before each other. Each sees a snapshot: the events
until then, and the items of then. An item comes with the first event that names it; three days after the last one it
disappears, unless that was before the first night, whose history is to be known whole; what nobody met is always there.
Catalogue and policy are made from the first snapshot, as on a first day, and the nights go through the stage that a
real one goes through, below `<root>/simulation/<version>`, so that nothing there is served. Run again after being
killed, it goes on with the night that is missing. Invariant: nights that begin elsewhere, of another log or with other
settings have a folder of their own, since a catalogue or a policy of theirs may know days that are judged here.

Judged are the pairs of user and item of the day after that the user had not met before, of the users that the night
generated for: catch is the share of the rejected ones that the list blocks, false block that of the liked ones. One
that was both is liked, as in every other measure of a published list.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as parquet
from rich.table import Table

from conrec import storage
from conrec.artefact import plan
from conrec.config import DAY_US, Config, InteractionSettings, PolicySettings
from conrec.errors import DataError
from conrec.feedback.anchors import served_anchors
from conrec.feedback.content import events_content, items_content
from conrec.feedback.events import encode_events
from conrec.feedback.labels import interaction_tables, no_rows, read_items
from conrec.feedback.outcomes import first_meetings
from conrec.progress import console
from conrec.serving import versions
from conrec.serving.rows import bucket_path
from conrec.stages.artefacts import closure, settings_of
from conrec.stages.inputs import blocklists_url
from conrec.stages.run import run_stage
from conrec.stages.sources import ITEM_COLUMNS
from conrec.store.continuity import Before, total
from conrec.tables import KINDS, TIMESTAMP

GONE_AFTER_US = 3 * DAY_US
"""An item whose last event lies further back has disappeared."""


@dataclass(frozen=True)
class SimulatedNight:
    """What one night published, and what the day after said of it; shares are None where there is nothing to share."""

    night: str
    """The time of the night, ISO 8601."""
    version: str
    users: int
    """With a list."""
    rows: int
    predicted: int
    items: int
    new_items: int
    removed_items: int
    overlap: float | None
    """Share of the predicted rows of the night before that are still there, as `publish.min_overlap` counts them."""
    rejected: int
    """Pairs of the day after that were rejected."""
    catch: float | None
    liked: int
    false_block: float | None


def simulate(config: Config, nights: int) -> Iterator[SimulatedNight]:
    """Runs the nights in order and yields the figures of each.

    Raises `DataError` where the log is too short for so many nights after the cut.
    """
    log = whole_log(config.interactions)
    items = read_items(config.items)
    times_us = night_times(log, nights, config)
    config = apart(config, log, items, times_us[0])
    for number, time_us in enumerate(times_us):
        tonight = snapshot(config, log, items_at(items, log, times_us[0], time_us), time_us)
        if number == 0:
            for stage in ("catalogue", "train"):
                run_stage(stage, tonight)
        figures = run_stage("nightly", tonight).require()["figures"]
        yield judged(tonight, figures["version"], log, time_us)


def whole_log(settings: InteractionSettings) -> pa.Table:
    """All interactions in memory, our columns alone. Raises `DataError`, also for a log without events."""
    log = pa.concat_tables(interaction_tables(settings))
    if not len(log):
        raise no_rows(settings.path)
    return log


def night_times(log: pa.Table, nights: int, config: Config) -> list[int]:
    """When each night runs, in microseconds since 1970."""
    last_us = pc.max(log["timestamp"]).cast(pa.int64()).as_py()
    times_us = [last_us - days * DAY_US for days in range(nights, 0, -1)]
    room = (last_us - config.timeline.cut_us) // DAY_US
    if times_us[0] < config.timeline.cut_us:
        raise DataError(
            f"{config.interactions.path}: {nights} nights and the day after the last would begin at "
            f"{_iso(times_us[0])}, before timeline.cut = {_iso(config.timeline.cut_us)}; ask for at most "
            f"{max(room, 0)}, or move the cut"
        )
    return times_us


def apart(config: Config, log: pa.Table, items: pa.Table, first_us: int) -> Config:
    """The settings with the root of nights that begin at `first_us`, and with no policy pinned: it has its own. A
    replayed night ends at no hour and calls nobody."""
    nightly = config.nightly.model_copy(update={"deadline": None, "on_failure": ()})
    config = config.model_copy(update={"policy": PolicySettings(), "nightly": nightly})
    embedding = ("embedding",) if "column" in config.embedding.sources else ()
    inputs = {
        "log": events_content(log).digest,
        "items": items_content(items, *ITEM_COLUMNS, *embedding).digest,
        "first night": _iso(first_us),
    }
    root = plan(config.root, "simulation", settings_of(config, closure("nightly")), inputs).url
    return config.model_copy(update={"root": root})


def snapshot(config: Config, log: pa.Table, items: pa.Table, time_us: int) -> Config:
    """Writes what a night at that time reads, `items` among it; returns the settings with which it runs."""
    url = storage.join(config.root, "snapshots", f"{datetime.fromtimestamp(time_us / 1e6, UTC):%Y%m%dT%H%M%SZ}")
    known = log.filter(pc.less_equal(log["timestamp"].cast(pa.int64()), time_us))
    storage.write_table(known, storage.join(url, "interactions.parquet"))
    storage.write_table(items, storage.join(url, "items.parquet"))
    document = config.model_dump(mode="json")
    document["interactions"] |= {"path": storage.join(url, "interactions.parquet"), "columns": {}, "rules": []}
    document["interactions"] |= {"now": _iso(time_us)}
    document["items"] = {"path": storage.join(url, "items.parquet"), "columns": {}}
    return Config.model_validate(document)


def items_at(items: pa.Table, log: pa.Table, first_us: int, time_us: int) -> pa.Table:
    """The items of a moment, where the first night lies at `first_us`: those that have come and not disappeared."""
    times = log["timestamp"].cast(pa.int64())
    met = pa.table({"item_id": log["item_id"], "time": times}).group_by("item_id")
    lives = met.aggregate([("time", "min"), ("time", "max")])
    last_us = lives["time_max"]
    ended = pc.and_(pc.less(last_us, time_us - GONE_AFTER_US), pc.greater_equal(last_us, first_us - GONE_AFTER_US))
    absent = pc.or_(pc.greater(lives["time_min"], time_us), ended)
    gone = lives["item_id"].filter(absent).combine_chunks()
    return items.filter(pc.invert(pc.is_in(items["item_id"], value_set=gone)))


def judged(config: Config, version: str, log: pa.Table, time_us: int) -> SimulatedNight:
    """The figures of a published night, from what is published and the day after."""
    root = blocklists_url(config)
    manifest, _ = versions.complete_manifest(root, version)
    rows = _rows(root, manifest)
    shown = new_pairs(log, time_us, _served(config, manifest))
    blocked = shown.join(rows.select(["user_id", "item_id"]), ["user_id", "item_id"], join_type="left semi")
    counts = {kind: _count(shown, kind) for kind in ("negative", "positive")}
    hits = {kind: _count(blocked, kind) for kind in counts}
    share = {kind: hits[kind] / counts[kind] if counts[kind] else None for kind in counts}
    about = manifest["about"]["items"]
    return SimulatedNight(
        night=_iso(time_us),
        version=version,
        users=manifest["figures"]["users"],
        rows=len(rows),
        predicted=manifest["figures"]["predicted"],
        items=about["live"],
        new_items=about["new"],
        removed_items=about["removed"],
        overlap=overlap(root, manifest, config),
        rejected=counts["negative"],
        catch=share["negative"],
        liked=counts["positive"],
        false_block=share["positive"],
    )


def new_pairs(log: pa.Table, time_us: int, users: pa.Array) -> pa.Table:
    """Distinct user_id and item_id of the day after that the user had not met before, with one feedback each."""
    log = log.filter(pc.is_in(log["user_id"], value_set=users))
    items = pc.unique(log["item_id"])
    events, _ = encode_events(log, items, max_unknown_share=0.0)
    anchors = served_anchors(events, time_us, 0, 0, time_us + DAY_US)
    met = first_meetings(events, anchors)
    columns = {
        "user_id": events.users.take(pa.array(anchors.users[met.anchors])),
        "item_id": items.take(pa.array(met.items)),
        "feedback": pa.array(KINDS).take(pa.array(met.kinds)),
    }
    return pa.table(columns)


def overlap(root: str, manifest: dict[str, Any], config: Config) -> float | None:
    """What the audit's rule of that name compares; None for a first night."""
    before, buckets = Before.of(root, manifest, config.publish), manifest["buckets"]
    if before is None:
        return None
    change = total(before.change(_bucket(root, manifest, bucket), bucket, buckets) for bucket in range(buckets))
    return change.kept / change.comparable if change is not None and change.comparable else None


def write_nights(config: Config, nights: list[SimulatedNight]) -> str:
    """Leaves `<root>/simulation/nights.json`, of the last nights that were replayed, and returns where."""
    url = storage.join(config.root, "simulation", "nights.json")
    storage.write_json(url, [asdict(night) for night in nights])
    return url


def print_nights(nights: list[SimulatedNight]) -> None:
    """The figures as a table."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    for title in ("night", "users", "rows", "predicted", "items", "new", "gone", "overlap", "catch", "false block"):
        table.add_column(title, justify="left" if title == "night" else "right", no_wrap=True)
    for one in nights:
        counts = (one.users, one.rows, one.predicted, one.items, one.new_items, one.removed_items)
        table.add_row(
            f"{datetime.fromisoformat(one.night):%m-%d %H:%M}",
            *(f"{count:,}" for count in counts),
            _share(one.overlap),
            f"{_share(one.catch)}/{one.rejected:,}",
            f"{_share(one.false_block)}/{one.liked:,}",
        )
    console.print(table)
    console.print(
        "catch: share of the items rejected the day after, new to their user, that were blocked / how many there were; "
        "false block: the same of those that were liked; overlap: predicted rows of the night before that stay",
        style="dim",
    )


def _served(config: Config, manifest: dict[str, Any]) -> pa.Array:
    """The users that a night generated for."""
    folder = storage.join(config.root, "nightly", manifest["about"]["settings"])
    places = [url for name in ("prompts", "kept") if storage.exists(url := storage.join(folder, name))]
    tables = [storage.read_table(url, columns=["user_id"]) for url in places]
    return pa.concat_tables(tables)["user_id"].combine_chunks() if tables else pa.array([], pa.string())


def _rows(root: str, manifest: dict[str, Any]) -> pa.Table:
    return pa.concat_tables([_bucket(root, manifest, bucket) for bucket in range(manifest["buckets"])])


def _bucket(root: str, manifest: dict[str, Any], bucket: int) -> pa.Table:
    path = bucket_path("data", bucket)
    entry = next(entry for entry in manifest["files"] if entry["path"] == path)
    return parquet.read_table(pa.BufferReader(versions.read_entry(root, manifest["version"], entry)))


def _count(pairs: pa.Table, kind: str) -> int:
    return int(pc.sum(pc.equal(pairs["feedback"], kind)).as_py() or 0)


def _iso(time_us: int) -> str:
    # A whole microsecond: a rounded time would leave out the night's last event.
    return pa.scalar(time_us, pa.int64()).cast(TIMESTAMP).as_py().isoformat()


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}".lstrip("0")
