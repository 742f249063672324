"""What monitoring reads of a store: Prometheus text of what its pointers name.

    text = text_of(blocklists_root, artefacts_root)

docs/alerts.yml has rules on these. Times are seconds since 1970, so that an alert on an age goes on rising where nobody
writes the text any more. Read from manifests alone: an answer takes a second, whatever the number of users.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, NamedTuple

from conrec import storage
from conrec.artefact import MANIFEST
from conrec.serving import versions

STAGES = {"catalogue": "catalogue", "policy": "policy", "nightly": "settings"}
"""Folder below the root -> where `about` of a manifest names the artefact that it was made of."""


class Metric(NamedTuple):
    """One line of the text."""

    name: str
    value: float
    labels: dict[str, str]


HELP = {
    "conrec_version_info": "The version that a pointer names, 1.",
    "conrec_published_timestamp_seconds": "When it was published.",
    "conrec_age_seconds": "Time since then, when this text was written.",
    "conrec_watermark_timestamp_seconds": "Time of the last interaction that went into it.",
    "conrec_trained_until_timestamp_seconds": "Time until which its policy has learned.",
    "conrec_feed_day": "What the last day of its log holds: events by kind, users, items, and what of these is new.",
    "conrec_users": "Users with at least one row.",
    "conrec_rows": "Rows by reason.",
    "conrec_rules": "Rules for new items.",
    "conrec_generated_users": "Users that the generation answered for.",
    "conrec_failed_users": "Of these, users with an error.",
    "conrec_behind_users": "Of these, users who keep a row of an earlier prompt: the deadline came first.",
    "conrec_missing_users": "Users without predictions, since the deadline came first.",
    "conrec_held_back_items": "Items predicted for too many users, and so for nobody.",
    "conrec_false_block_promise": "Alpha: largest admitted share of what a user will like that is blocked.",
    "conrec_phase_seconds": "How long what made it took, by stage, and the generation within the night.",
    "conrec_failed_audits": "Reports of audits that refused a version, as long as they lie there.",
}
"""Name of every metric -> what it says; all of them are gauges."""


def text_of(root: str, artefacts_root: str, now: datetime | None = None) -> str:
    """The metrics of every pointer's version in the text format of Prometheus.

    `artefacts_root`: where what a version was made of lies. Raises `ArtefactError` where nothing is published, or a
    pointer or manifest is damaged: rules alert on the absence.
    """
    found = list[Metric]()
    for pointer in versions.POINTERS:
        named = versions.read_pointer(root, pointer)
        if named is not None:
            manifest = versions.pointed_manifest(root, named)
            found += _of_version(artefacts_root, manifest, pointer, now or datetime.now(UTC))
    if not found:
        versions.require_pointer(root)
    reports = storage.list_files(storage.join(root, "audits"))
    found.append(Metric("conrec_failed_audits", len(reports), {}))
    return "".join(f"{line}\n" for name in HELP for line in _lines(name, found))


def _of_version(artefacts_root: str, manifest: dict[str, Any], pointer: str, now: datetime) -> Iterator[Metric]:
    about, figures = manifest["about"], manifest["figures"]
    published_at = datetime.fromisoformat(manifest["published_at"]).timestamp()

    def metric(name: str, value: float, **labels: str) -> Metric:
        return Metric(f"conrec_{name}", value, {"pointer": pointer} | labels)

    names = {"version": manifest["version"], "policy": str(about.get("policy")), "release": manifest["code_version"]}
    yield metric("version_info", 1, **names)
    yield metric("published_timestamp_seconds", published_at)
    yield metric("age_seconds", round(now.timestamp() - published_at, 3))
    yield metric("watermark_timestamp_seconds", about["watermark_us"] / 1e6)
    if "trained_until" in about:
        until = datetime.fromisoformat(about["trained_until"])
        yield metric("trained_until_timestamp_seconds", until.timestamp())
    for what, count in about.get("feed", {}).items():
        yield metric("feed_day", count, what=what)
    yield metric("users", figures["users"])
    for reason in ("explicit", "predicted"):
        yield metric("rows", figures[reason], reason=reason)
    yield metric("rules", figures["rules"])
    yield metric("generated_users", about["generated_users"])
    yield metric("failed_users", about["failed_users"])
    left = about.get("deadline", {})
    yield metric("behind_users", left.get("behind_users", 0))
    yield metric("missing_users", left.get("missing_users", 0))
    yield metric("held_back_items", len(about.get("held_back", [])))
    if "alpha" in about.get("calibration", {}):
        yield metric("false_block_promise", about["calibration"]["alpha"])
    for phase, seconds in _phases(artefacts_root, about):
        yield metric("phase_seconds", seconds, phase=phase)


def _phases(artefacts_root: str, about: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Seconds of the stages that left what a version names, as far as it is still there."""
    named = {folder: about.get(key) for folder, key in STAGES.items()}
    named["calibration"] = about.get("calibration", {}).get("version")
    for folder, version in named.items():
        url = storage.join(artefacts_root, folder, str(version), MANIFEST)
        if version is not None and storage.exists(url):
            made = storage.read_json(url)
            yield folder, made["seconds"]
            for name, value in made["figures"].items():
                phase = name.removesuffix("_seconds")
                if isinstance(value, dict) and phase != name:
                    yield from ((f"{phase}_{part}", seconds) for part, seconds in value.items())
                elif phase != name:
                    yield phase, value


def _lines(name: str, found: list[Metric]) -> list[str]:
    samples = [one for one in found if one.name == name]
    if not samples:
        return []
    lines = [f"# HELP {name} {HELP[name]}", f"# TYPE {name} gauge"]
    for one in samples:
        labels = ",".join(f'{key}="{_escaped(value)}"' for key, value in one.labels.items())
        lines.append(f"{name}{{{labels}}} {one.value!r}" if labels else f"{name} {one.value!r}")
    return lines


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
