"""`conrec collect-garbage`: old versions and their nights, then the artefacts that nothing names any more.

    collected = collect(config, keep=14, dry_run=True)      # what it would remove, with sizes

Of catalogues, of policies and of what these are made of and calibrated with (`supervised/`, `validated/`,
`calibration/`) stays: what a version names that is left, what the policy that these settings serve is made of, the
newest finished one of each, and whatever changed within MIN_ARTEFACT_AGE. Evaluations and replays are for a person to
delete: they are read by people.

Invariant: what an artefact that stays was made of stays. Where one version or artefact cannot be read, no artefact
goes: what it names is not known. A manifest goes before its files, so that nothing half removed looks finished.
"""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime, timedelta
from typing import Any

from conrec import storage
from conrec.artefact import MANIFEST
from conrec.config import Config
from conrec.errors import ArtefactError
from conrec.serving import versions
from conrec.stages.artefacts import ARTEFACTS, Artefacts, finished
from conrec.stages.inputs import blocklists_url
from conrec.stages.policies import chosen
from conrec.store.garbage import Collected, collect_garbage, folders_below

MIN_ARTEFACT_AGE = timedelta(days=7)
"""An artefact may be in the making, waiting to be resumed, or about to be used for this long."""
KINDS = ("catalogue", "supervised", "validated", "policy", "calibration")
"""Folders that are collected."""


def collect(config: Config, keep: int, dry_run: bool = False, min_age: timedelta = MIN_ARTEFACT_AGE) -> Collected:
    """Removes what no reader and no policy needs; returns what it removed, or would.

    Raises `ConfigError` for a `keep` below 1, `ArtefactError` where a pointer or an artefact is damaged.
    """
    store = blocklists_url(config)
    collected = collect_garbage(store, keep, dry_run=dry_run, nights=storage.join(config.root, "nightly"))
    if collected.unreadable:
        return collected
    left = (manifest for manifest, _ in versions.read_manifests(store) if manifest["version"] not in collected.versions)
    needed, before = _needed(config, [manifest["about"] for manifest in left]), datetime.now(UTC) - min_age
    for kind in KINDS:
        place = storage.join(config.root, kind)
        for name, files in sorted(folders_below(place).items()):
            if f"{kind}/{name}" in needed or max(file.changed_at for file in files) > before:
                continue
            if not dry_run:
                storage.remove_marked(storage.join(place, name), MANIFEST)
            collected.add("artefacts", f"{kind}/{name}", sum(file.bytes for file in files))
    _collect_items(config, collected, before, dry_run)
    return collected


def _needed(config: Config, nights: list[dict[str, Any]]) -> set[str]:
    """`<folder>/<version>` of every artefact that stays; `nights`: what the versions that are left say of theirs."""
    every = {kind: finished(config.root, kind) for kind in KINDS}
    inputs = {f"{kind}/{one.version}": one.inputs for kind, found in every.items() for one, _ in found}
    open_ends = [f"{kind}/{found[0][0].version}" for kind, found in every.items() if found]
    with contextlib.suppress(ArtefactError):  # these settings may have trained none yet
        open_ends.append(f"policy/{chosen(Artefacts(config), same_cut=False)[0].version}")
    for about in nights:
        open_ends += [f"{kind}/{about[kind]}" for kind in KINDS if isinstance(about.get(kind), str)]
        open_ends.append(f"calibration/{about.get('calibration', {}).get('version')}")
    needed: set[str] = set()
    while open_ends:
        name = open_ends.pop()
        if name not in needed:
            needed.add(name)
            read = inputs.get(name, {}).items()
            open_ends += [f"{_kind(part)}/{version}" for part, version in read if _kind(part) in ARTEFACTS]
    return needed


def _kind(part: str) -> str:
    """`earlier catalogue` is a catalogue."""
    return part.rsplit(" ", maxsplit=1)[-1]


def _collect_items(config: Config, collected: Collected, before: datetime, dry_run: bool) -> None:
    """Semantic IDs of items that came after their catalogue go with it."""
    place = storage.join(config.root, "items")
    gone = {name.removeprefix("catalogue/") for name in collected.artefacts if name.startswith("catalogue/")}
    there = set(storage.list_folders(storage.join(config.root, "catalogue"))) - gone
    for name, files in sorted(folders_below(place).items()):
        if name in there or max(file.changed_at for file in files) > before:
            continue
        if not dry_run:
            storage.remove(storage.join(place, name))
        collected.add("artefacts", f"items/{name}", sum(file.bytes for file in files))
