"""Nightly stage: histories to date and the policy -> tonight's blocklists, published under `<root>/blocklists`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from conrec import storage
from conrec.artefact import Artefact
from conrec.blocklist.calibrate import Calibration
from conrec.blocklist.counts import Counts
from conrec.blocklist.generate import generate_night
from conrec.blocklist.guardrails import require_room
from conrec.blocklist.night import Night, night
from conrec.blocklist.ranking import Ranking
from conrec.blocklist.resolve import leaf_vectors
from conrec.catalogue.codebook import format_semantic_ids
from conrec.config import Config
from conrec.feedback.anchors import Anchors, served_anchors
from conrec.feedback.clock import latest_us
from conrec.feedback.events import Events
from conrec.progress import console, warn
from conrec.stages.artefacts import Artefacts
from conrec.stages.inputs import blocklists_url, read_events
from conrec.stages.new_items import tonights_catalogue
from conrec.stages.night_prompts import BASIS, write_prompts
from conrec.stages.scoring import Scoring, scoring, things_of
from conrec.stages.spent import spent
from conrec.store.audit import Expected
from conrec.store.publish import publish
from conrec.store.served import remove_damaged, unserved


def make_night(run: Artefacts, artefact: Artefact) -> dict[str, Any]:
    """Generates, resolves, guards, audits and publishes. Raises `AuditError` with the pointer unchanged.

    Leaves items.parquet (the items of today with their semantic IDs), prompts, generated IDs and those kept of an
    earlier night; `run` is that of the policy that is served.
    """
    config = run.config
    require_room(len(run.sources.items), config.guardrails)
    storage.require_creation(blocklists_url(config))  # now, rather than after hours of generating
    policy = run["policy"]
    catalogue, items = tonights_catalogue(run)
    storage.write_table(catalogue.items.filter(pa.array(catalogue.live)), artefact.path("items.parquet"))
    events = read_events(config, catalogue.item_ids)
    watermark_us = int(events.times.max())
    made = scoring(run)
    anchors = tonights_anchors(config, events, watermark_us, made.calibration)
    plan = write_prompts(run, catalogue, events, anchors, artefact)
    if plan.asked:
        policy.verify("checkpoint")  # torn weights answer too
    with spent(artefact.url, ".generating.json") as seconds:
        generate_night(
            artefact.path("prompts"),
            artefact.path("generated"),
            policy.path("checkpoint"),
            catalogue.trie,
            config.generate,
            storage.join(artefact.url, "progress"),
            plan.asked,
        )
        generation_seconds = seconds()
    counts = Counts.at(events, watermark_us, things_of(catalogue))
    version = f"{datetime.fromtimestamp(watermark_us / 1e6, UTC):%Y%m%dT%H%M%SZ}-{artefact.version}"
    remove_damaged(blocklists_url(config), version)
    with night(
        plan.rows(artefact),
        events,
        catalogue.item_ids,
        Ranking(counts, made.score, catalogue.trie, catalogue.live),
        leaf_vectors(catalogue.codebook, catalogue.trie),
        config.generate.min_similarity,
        made.calibration,
        watermark_us,
        config.guardrails,
        config.publish,
    ) as tonight:
        about = tonight.about()
        about |= made_of(run, artefact) | {"items": items}
        about["calibration"] = about["calibration"] | {"version": run["calibration"].version}
        about["everybody"] = for_everybody(made, tonight)
        manifest = publish(
            blocklists_url(config),
            version,
            tonight.blocks(),
            about,
            Expected(
                events,
                catalogue.item_ids,
                format_semantic_ids(catalogue.trie.semantic_ids),
                watermark_us,
                len(anchors),
                config.guardrails,
                config.publish,
                # A time that is given for a replay admits nothing that this machine's clock does not.
                min(latest_us(config.interactions), latest_us(config.interactions, datetime.now(UTC))),
                origins(run),
                catalogue.live,
            ),
            config.publish.release.pointer,
        )
    beside = " as a shadow: serving hides nothing by it" if config.publish.release.shadow else ""
    console.print(f"  published {version}{beside}")
    return {
        "version": version,
        "users": plan.users,
        "kept": plan.kept,
        BASIS: plan.basis,
        # Of all runs, where some were killed.
        "generated": plan.asked,
        "generation_seconds": round(generation_seconds, 1),
        "engine": config.generate.engine,
        "published": manifest["figures"],
    }


def lacking(run: Artefacts, artefact: Artefact) -> str | None:
    """Why serving does not have what this finished night published; None where nothing is to be done."""
    pointer = run.config.publish.release.pointer
    return unserved(blocklists_url(run.config), artefact.require()["figures"]["version"], pointer)


def made_of(run: Artefacts, artefact: Artefact) -> dict[str, Any]:
    """Versions that a manifest names, and until when the policy has learned."""
    return {
        "settings": artefact.version,
        "policy": run["policy"].version,
        "trained_until": run.config.timeline.cut.isoformat(),
        "trained_at": run["policy"].require()["finished_at"],
        "validated": run["validated"].version,
        "catalogue": run["catalogue"].version,
        "codebook": run["catalogue"].require()["files"]["codebook.safetensors"]["sha256"],
    }


def for_everybody(made: Scoring, tonight: Night) -> dict[str, Any]:
    """The list that is the same for all users, the surest first: what a ranking demotes for everybody, with how many
    users' own lists hold an item."""
    calibration, live = made.everybody, tonight.ranking.live
    threshold = calibration.overall.threshold
    scores = np.where(live, made.score.for_everybody(tonight.ranking.counts)[: len(live)], 0)
    listed = np.flatnonzero(scores >= (np.inf if threshold is None else threshold))
    listed = listed[np.argsort(-scores[listed], kind="stable")]
    return {
        "alpha": calibration.alpha,
        "threshold": threshold,
        "items": [
            {
                "item_id": tonight.item_ids[int(item)].as_py(),
                "score": round(float(scores[item]), 4),
                "users": int(tonight.counts[item]),
            }
            for item in listed
        ],
    }


def origins(run: Artefacts) -> dict[str, dict[str, str]]:
    """What policy and calibration recorded of the artefacts that they were made from: the audit compares it."""
    parts = {"policy": ("catalogue", "validated"), "calibration": ("validated",)}
    return {
        name: {part: version for part, version in run[name].require()["inputs"].items() if part in made_from}
        for name, made_from in parts.items()
    }


def tonights_anchors(config: Config, events: Events, watermark_us: int, calibration: Calibration) -> Anchors:
    """Users to generate for: enough history, the most recently active first where their number is limited.

    Nobody, where nothing can be predicted: why, is said.
    """
    limits, silent = config.guardrails, calibration.silent()
    anchors = served_anchors(events, watermark_us, limits.min_negatives, limits.min_history)
    if not len(anchors):
        warn(
            f"nothing is predicted tonight: none of {len(events.users):,} users has guardrails.min_negatives = "
            f"{limits.min_negatives} rejections and guardrails.min_history = {limits.min_history} items"
        )
    elif silent is not None:
        warn(f"nothing is predicted tonight: {silent}")
        anchors = anchors.take(np.zeros(0, np.int64))
    if not len(anchors):
        console.print("  nothing is generated; explicit rejections are published")
    if config.generate.max_users is not None and len(anchors) > config.generate.max_users:
        newest = np.argsort(-events.times[anchors.ends - 1], kind="stable")[: config.generate.max_users]
        anchors = anchors.take(np.sort(newest))
    return anchors
