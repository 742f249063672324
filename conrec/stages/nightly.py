"""Nightly stage: histories to date and the policy -> tonight's blocklists, published under `<root>/blocklists`."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa

from conrec import storage
from conrec.artefact import Artefact
from conrec.blocklist.anchors import Asked, tonights_users
from conrec.blocklist.counts import Counts, counting, things_of
from conrec.blocklist.fitting import Scoring
from conrec.blocklist.generate import generate_night
from conrec.blocklist.guardrails import require_room
from conrec.blocklist.kept import BASIS, ITEMS, NIGHT_US
from conrec.blocklist.night import SECONDS_A_SCORE, for_everybody, night
from conrec.blocklist.ranking import Ranking
from conrec.blocklist.resolve import leaf_vectors
from conrec.catalogue.codebook import format_semantic_ids
from conrec.catalogue.items import Catalogue
from conrec.feedback.clock import latest_us
from conrec.feedback.feed import Feed
from conrec.feedback.log import Log
from conrec.parallel import mapping
from conrec.progress import console, warn
from conrec.spent import spent
from conrec.stages.artefacts import Artefacts
from conrec.stages.deadline import Reached, deadline_of, goes_on, reach
from conrec.stages.feed import FEED, fed
from conrec.stages.inputs import blocklists_url, read_log
from conrec.stages.new_items import tonights_catalogue
from conrec.stages.night_prompts import Plan, write_prompts
from conrec.stages.scoring import scoring
from conrec.store.audit import Expected
from conrec.store.lock import Lock
from conrec.store.publish import publish, require_onward
from conrec.store.served import remove_damaged, unserved

NIGHT_LEASE = timedelta(minutes=4)
"""Of a night whose machine is gone: the next try of a scheduler, which comes after five, finds it over."""


def make_night(run: Artefacts, artefact: Artefact) -> dict[str, Any]:
    """Generates, resolves, guards, audits and publishes. Raises `AuditError` with the pointer unchanged.

    Leaves items.parquet (the items of today with their semantic IDs), prompts, generated IDs and those kept of an
    earlier night, finished before they are published; `run` is that of the policy that is served. Raises
    `PublishError` where another process is at the same night: both would generate into one folder.
    """
    require_room(len(run.sources.items), run.config.guardrails)
    storage.require_creation(blocklists_url(run.config))  # now, rather than after hours of generating
    with Lock(artefact.path(".lock"), NIGHT_LEASE, f"night {artefact.version}") as lock, lock.renewing():
        return _make_night(run, artefact, lock)


def _make_night(run: Artefacts, artefact: Artefact, lock: Lock) -> dict[str, Any]:
    root, pointer = blocklists_url(run.config), run.config.publish.release.pointer
    read = Tonight.read(run, artefact)
    require_onward(root, _version(read, artefact), read.watermark_us, pointer)
    plan = write_prompts(run, read.catalogue, read.log, read.asked, artefact)
    if plan.asked:
        run["policy"].verify("checkpoint")  # torn weights answer too
    # The first try that can generate fixes the hour: one that was refused before is mended when that may have passed.
    ends_at = deadline_of(run.config.nightly, artefact, run.began)
    generated, seconds = generate(run, artefact, read.catalogue, plan, ends_at)
    lock.check()
    reached = reach(artefact, plan, generated, run.config.publish.buckets)
    figures = {
        FEED: read.feed.to_json(),
        "users": plan.users,
        "kept": plan.kept,
        BASIS: plan.basis,
        NIGHT_US: read.watermark_us,
        # Of all runs, where some were killed.
        "generated": reached.generated,
        "behind": reached.behind,
        "missing": reached.missing,
        "generation_seconds": round(seconds, 1),
        "engine": run.config.generate.engine,
    }
    if not reached.whole:
        hour = "a deadline" if ends_at is None else f"nightly.deadline, {ends_at:%Y-%m-%d %H:%M %Z},"
        warn(f"{hour} came first: {reached}; the next run goes on")
    else:
        storage.remove(artefact.path("earlier"))
    # Other nights keep these rows whatever the audit says: the next one, and tonight's with the settings it asks for.
    artefact.finish(figures, seconds)
    manifest = publish_lists(run, artefact, read, reached)
    beside = " as a shadow: serving hides nothing by it" if run.config.publish.release.shadow else ""
    console.print(f"  published {manifest['version']}{beside}")
    return figures | {"version": manifest["version"], "published": manifest["figures"]}


@dataclass(frozen=True)
class Tonight:
    """What a night knows before it generates; `items`: what its manifest says of the catalogue."""

    catalogue: Catalogue
    items: dict[str, Any]
    log: Log
    watermark_us: int
    """Time of the last interaction: the moment at which the night stands."""
    feed: Feed
    made: Scoring
    asked: Asked
    """Users that are predicted for."""

    @classmethod
    def read(cls, run: Artefacts, artefact: Artefact) -> Tonight:
        """Reads the items and interactions of today and the score, which is fitted where nobody asked for it yet."""
        catalogue, items = tonights_catalogue(run)
        storage.write_table(catalogue.items.filter(pa.array(catalogue.live)), artefact.path(ITEMS))
        log = read_log(run.config, catalogue.item_ids, run.config.publish.buckets)
        feed = fed(run.config, log, len(catalogue.item_ids))
        made = scoring(run)
        asked = tonights_users(run.config, log, log.last_us, made.calibration)
        return cls(catalogue, items, log, log.last_us, feed, made, asked)


def generate(
    run: Artefacts, artefact: Artefact, catalogue: Catalogue, plan: Plan, ends_at: datetime | None
) -> tuple[int, float]:
    """Generates for whoever is asked, until the deadline; returns for how many it has, and the seconds, of all runs."""
    with spent(artefact.url, ".generating.json") as seconds:
        generated = generate_night(
            artefact.path("prompts"),
            artefact.path("generated"),
            run["policy"].path("checkpoint"),
            catalogue.trie,
            run.config.generate,
            storage.join(artefact.url, "progress"),
            plan.asked,
            ends_at,
        )
        return generated, seconds()


def publish_lists(run: Artefacts, artefact: Artefact, read: Tonight, reached: Reached) -> dict[str, Any]:
    """Resolves, guards, audits and publishes what was generated; returns the manifest."""
    config, root, catalogue = run.config, blocklists_url(run.config), read.catalogue
    # Versions are immutable: one that a deadline ended is named by how far it came, and the whole one is another.
    version = _version(read, artefact, "" if reached.whole else f"{reached.generated}-")
    remove_damaged(root, version)
    things = things_of(catalogue)
    counts = Counts.over(read.log, read.watermark_us, things, mapped=counting(read.log.events))
    mapped = mapping(float(read.asked.count) * len(things) * SECONDS_A_SCORE)
    with night(
        reached.folders(artefact),
        read.log,
        catalogue.item_ids,
        Ranking(counts, read.made.score, catalogue.trie, catalogue.live),
        leaf_vectors(catalogue.codebook, catalogue.trie),
        config.generate.min_similarity,
        read.made.calibration,
        read.watermark_us,
        config.guardrails,
        config.publish,
        mapped,
    ) as tonight:

        def about() -> dict[str, Any]:
            told = tonight.about() | made_of(run, artefact) | {"items": read.items} | reached.about()
            told["feed"] = dict(read.feed.day)
            told["calibration"] |= {"version": run["calibration"].version}
            return told | {"everybody": for_everybody(read.made, tonight)}

        if config.guardrails.max_user_share < 1:
            # All buckets are counted before the first is written; the lease of the version's lock could end meanwhile.
            _ = tonight.counted
        pointer = config.publish.release.pointer
        with closing(tonight.blocks()) as blocks:
            return publish(root, version, blocks, about, expected(run, read), pointer, mapped)


def _version(read: Tonight, artefact: Artefact, part: str = "") -> str:
    return f"{datetime.fromtimestamp(read.watermark_us / 1e6, UTC):%Y%m%dT%H%M%SZ}-{part}{artefact.version}"


def expected(run: Artefacts, read: Tonight) -> Expected:
    """What the audit holds a version against."""
    config, catalogue = run.config, read.catalogue
    return Expected(
        read.log,
        catalogue.item_ids,
        format_semantic_ids(catalogue.trie.semantic_ids),
        read.watermark_us,
        read.asked.count,
        config.guardrails,
        config.publish,
        # A time that is given for a replay admits nothing that this machine's clock does not.
        min(latest_us(config.interactions), latest_us(config.interactions, datetime.now(UTC))),
        origins(run),
        catalogue.live,
    )


def lacking(run: Artefacts, artefact: Artefact) -> str | None:
    """Why a finished night is not done: its deadline left users, it has not published, or serving lacks what it did."""
    figures, pointer = artefact.require()["figures"], run.config.publish.release.pointer
    if (left := goes_on(figures)) is not None:
        return left
    if "version" not in figures:
        return "it never published what it generated"
    why = unserved(blocklists_url(run.config), figures["version"], pointer)
    return None if why is None else f"what it published is not what serving has: {why}; it is published again"


def made_of(run: Artefacts, artefact: Artefact) -> dict[str, Any]:
    """Versions that a manifest names, and until when the policy has learned."""
    return {
        "settings": artefact.version,
        "policy": run["policy"].version,
        "trained_until": run.config.timeline.learned_until.isoformat(),
        "trained_at": run["policy"].require()["finished_at"],
        "validated": run["validated"].version,
        "catalogue": run["catalogue"].version,
        "codebook": run["catalogue"].require()["files"]["codebook.safetensors"]["sha256"],
    }


def origins(run: Artefacts) -> dict[str, dict[str, str]]:
    """What policy and calibration recorded of the artefacts that they were made from: the audit compares it."""
    parts = {"policy": ("catalogue", "validated"), "calibration": ("validated",)}
    return {
        name: {part: version for part, version in run[name].require()["inputs"].items() if part in made_from}
        for name, made_from in parts.items()
    }
