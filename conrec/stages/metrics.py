"""What monitoring reads, of the store that the settings publish to: `conrec metrics`, and what commands say as JSON.

conrec metrics --config my.toml > /var/lib/node_exporter/conrec.prom.new
"""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import Any

from conrec.config import Config
from conrec.stages.inputs import blocklists_url
from conrec.store.diff import diff, diff_user
from conrec.store.inventory import inventory
from conrec.store.metrics import text_of


def prometheus_text(config: Config, now: datetime | None = None) -> str:
    """`text_of` the store that these settings publish to."""
    return text_of(blocklists_url(config), config.root, now)


def versions_json(config: Config) -> dict[str, Any]:
    """What `conrec versions` says: `pointers`, `versions` newest first with their manifests' figures, `damaged`.

    Raises `ArtefactError` where nothing is published.
    """
    found = inventory(blocklists_url(config))
    keys = ("version", "published_at", "previous", "figures")
    listed = [
        {key: manifest[key] for key in keys} | {"watermark_us": manifest["about"]["watermark_us"]}
        for manifest in found.manifests
    ]
    return {
        "pointers": found.pointers,
        "versions": listed,
        "not_complete": found.not_complete,
        "damaged": found.damaged,
    }


def diff_json(config: Config, older: str, newer: str, user: str | None) -> dict[str, Any]:
    """What `conrec diff` says; of one user `gained` and `lost`, the rows.

    Raises `ArtefactError` for a version that is unknown, incomplete or damaged.
    """
    root = blocklists_url(config)
    if user is None:
        return asdict(diff(root, older, newer))
    gained, lost = diff_user(root, older, newer, user)
    return {"older": older, "newer": newer, "user": user, "gained": gained.to_pylist(), "lost": lost.to_pylist()}
