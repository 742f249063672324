"""Nightly stage: histories to date and the policy -> tonight's blocklists, published under `<root>/blocklists`."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from conrec import storage
from conrec.artefact import Artefact, plan
from conrec.blocklist.audit import Expected
from conrec.blocklist.calibrate import Calibration
from conrec.blocklist.generate import generate_night
from conrec.blocklist.guardrails import require_room
from conrec.blocklist.night import night
from conrec.blocklist.prior import Prior
from conrec.blocklist.publish import publish
from conrec.catalogue.codebook import format_semantic_ids
from conrec.config import Config
from conrec.feedback.anchors import Anchors, Events, nightly_anchors
from conrec.feedback.clock import latest_us
from conrec.policy.prompts import build_prompts
from conrec.policy.vocabulary import Vocabulary
from conrec.progress import console, warn
from conrec.stages.calibration import calibration, calibration_artefact
from conrec.stages.inputs import (
    SCORING,
    Catalogue,
    blocklists_url,
    catalogue_artefact,
    input_digests,
    read_events,
    rejections_in_history,
    train_artefact,
    validated_artefact,
)
from conrec.stages.train import liked_leaves

PROMPTS_PER_FILE = 4096
"""Rows of one Parquet file of prompts: the piece of work that Ray Data hands to an engine's queue."""


def nightly_artefact(config: Config) -> Artefact:
    """The artefact of the nightly stage: prompts and generated IDs; the published version has its own manifest."""
    settings = config.model_dump(mode="json", include={"guardrails", "prompt", "interactions", "seed"})
    # Not the limits of the audit: a night that failed by one is published under another without being generated again.
    settings["publish"] = config.publish.model_dump(mode="json", include={"buckets", "holdout_share", "release"})
    settings["generate"] = config.generate.model_dump(
        mode="json", include={"engine", "k", "beam_width", "max_users", *SCORING}
    )
    inputs = {
        "interactions": input_digests(config)["interactions"],
        "policy": train_artefact(config).version,
        "calibration": calibration_artefact(config).version,
        "catalogue": catalogue_artefact(config).version,
    }
    return plan(config.root, "nightly", settings, inputs)


def make_night(config: Config, artefact: Artefact) -> dict[str, Any]:
    """Generates, resolves, guards, audits and publishes. Raises `AuditError` with the pointer unchanged."""
    storage.require_creation(blocklists_url(config))  # now, rather than after hours of generating
    policy = train_artefact(config)
    recorded = policy.require()["inputs"]
    catalogue = Catalogue.load(config)
    require_room(len(catalogue.item_ids), config.guardrails)
    events = read_events(config, catalogue.item_ids)
    watermark_us = int(events.times.max())
    theta = calibration(config)
    anchors = tonights_anchors(config, events, watermark_us, theta)
    write_prompts(config, catalogue, events, anchors, artefact)
    generating = time.perf_counter()
    generated = generate_night(
        artefact.path("prompts"),
        artefact.path("generated"),
        policy.path("checkpoint"),
        catalogue.trie,
        Prior.at(events, watermark_us, catalogue.trie, config.generate),
        config.generate,
        storage.join(artefact.url, "progress"),
        len(anchors),
    )
    seconds = time.perf_counter() - generating
    version = f"{datetime.fromtimestamp(watermark_us / 1e6, UTC):%Y%m%dT%H%M%SZ}-{artefact.version}"
    calibrated = calibration_artefact(config)
    with night(
        artefact.path("generated") if len(anchors) else None,
        events,
        catalogue.item_ids,
        catalogue.trie,
        catalogue.codebook,
        theta,
        watermark_us,
        config.guardrails,
        config.publish,
    ) as tonight:
        found = tonight.about()
        about = found | {
            "settings": artefact.version,
            "policy": policy.version,
            "validated": validated_artefact(config).version,
            "catalogue": catalogue_artefact(config).version,
            "codebook": catalogue_artefact(config).require()["files"]["codebook.safetensors"]["sha256"],
            "calibration": found["calibration"] | {"version": calibrated.version},
        }
        recorded_by_calibration = calibrated.require()["inputs"]
        origins = {
            "policy": {name: version for name, version in recorded.items() if name in ("catalogue", "validated")},
            # theta is taken from the twin of the policy that has not seen the validation anchors.
            "calibration": {
                "catalogue": recorded_by_calibration["catalogue"],
                "validated": recorded_by_calibration["policy"],
            },
        }
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
                origins,
            ),
            config.publish.release.pointer,
        )
    beside = " as a shadow: serving hides nothing by it" if config.publish.release.shadow else ""
    console.print(f"  published {version}{beside}")
    return {
        "version": version,
        "users": len(anchors),
        "generated_now": generated,
        "generation_seconds": round(seconds, 1),
        "engine": config.generate.engine,
        "published": manifest["figures"],
    }


def tonights_anchors(config: Config, events: Events, watermark_us: int, theta: Calibration) -> Anchors:
    """Users to generate for: enough rejections, the most recently active first where their number is limited.

    Nobody, where nothing can be predicted: who is predicted nothing, and why, is said.
    """
    for line in theta.silent():
        warn(f"nothing is predicted tonight for {line}")
    anchors = nightly_anchors(events, watermark_us)
    enough = rejections_in_history(events, anchors) >= config.guardrails.min_negatives
    if not enough.any():
        warn(
            f"nothing is predicted tonight: none of {len(anchors):,} users has guardrails.min_negatives = "
            f"{config.guardrails.min_negatives} rejections"
        )
    anchors = anchors.take(np.flatnonzero(enough & (theta.smallest < np.inf)))
    if not len(anchors):
        console.print("  nothing is generated; explicit rejections are published")
    if config.generate.max_users is not None and len(anchors) > config.generate.max_users:
        newest = np.argsort(-events.times[anchors.ends - 1], kind="stable")[: config.generate.max_users]
        anchors = anchors.take(np.sort(newest))
    return anchors


def write_prompts(config: Config, catalogue: Catalogue, events: Events, anchors: Anchors, artefact: Artefact) -> None:
    """One row a user: the prompt, and the semantic IDs never to be generated. Built and written block by block."""
    if storage.exists(artefact.path("prompts.json")):
        return
    tokenizer_url = train_artefact(config).path("checkpoint")
    vocabulary = load_vocabulary(tokenizer_url, catalogue)
    for number, start in enumerate(range(0, len(anchors), PROMPTS_PER_FILE)):
        block = anchors.take(np.arange(start, min(start + PROMPTS_PER_FILE, len(anchors))))
        prompts = build_prompts(events, block, catalogue.semantic_ids, vocabulary, config.prompt)
        table = pa.table(
            {
                "user_id": events.users.take(pa.array(block.users)),
                "prompt": prompts.to_arrow(),
                "excluded_leaves": liked_leaves(catalogue, events, block).to_arrow(),
            }
        )
        storage.write_table(table, artefact.path("prompts", f"{number:06d}.parquet"))
    storage.write_bytes(artefact.path("prompts.json"), json.dumps({"users": len(anchors)}).encode())


def load_vocabulary(checkpoint: str, catalogue: Catalogue) -> Vocabulary:
    """The ids of the new tokens in a saved tokenizer."""
    from transformers import AutoTokenizer

    with storage.local_folder(checkpoint) as folder:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return Vocabulary.of(tokenizer, catalogue.trie.levels, catalogue.trie.codes)
