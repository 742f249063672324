"""`conrec forget`: takes people out of everything below the root that names them, and proves it by searching again.

| what | how |
|---|---|
| published versions | written again without them, conrec/store/forget.py |
| prompts, generated rows and progress of nights | the same files without their rows; `artefact.json` follows |
| calibrations, systems that were evaluated | removed: rows of people without names; the next run makes them anew |
| files that a killed process was writing | removed: what they hold cannot be searched |
| evaluations that show one of them, replays of nights | removed |
| reports of failed audits, lines of logs that name one | removed |
| folders of `conrec anchors`, mirrors, Redis, where they are named | without their rows, mirrored anew, keys unlinked |

What it cannot reach is said in the end: the log, the weights, what killed processes left in temporary folders, backups,
and readers on other machines until they follow.

Invariant: a run that was killed is finished by the same command. Nothing may run on the root meanwhile.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet

from conrec import storage
from conrec.artefact import MANIFEST
from conrec.config import Config
from conrec.errors import ArtefactError, ConfigError
from conrec.location import located
from conrec.serving import mirror as mirrors
from conrec.serving import versions
from conrec.serving.compile import map_files
from conrec.serving.lookup import Compiled
from conrec.serving.packed import download
from conrec.serving.redis import Keys, connected, user_keys
from conrec.serving.rows import SCHEMAS
from conrec.stages.inputs import blocklists_url
from conrec.store import forget as published

WITHOUT_NAMES = ("calibration", "systems")
"""Folders of artefacts with a row a person and no name in it."""
UNREACHED = (
    "the interactions themselves: take the people out there as well, before the next night",
    "weights, and the token sequences below supervised/, validated/ and policy/, which hold no name: "
    "conrec train on the cleaned log, then conrec collect-garbage",
    "what processes that were killed outright left: delete conrec-* in the temporary folder of their machines while "
    "nothing of conrec runs there",
    "mirrors of other machines until their next round, and readers until they refresh; backups and copies elsewhere",
)


@dataclass
class Forgotten:
    """What was done, and what a search of everything found afterwards."""

    done: list[str] = field(default_factory=list)
    searched: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    """Where one of the people is still named."""


def forget(
    config: Config, users: Sequence[str], anchors: Sequence[str], folders: Sequence[str], redis_url: str | None
) -> Forgotten:
    """Takes people out of the root, of folders that `conrec anchors` wrote, of mirrors on this machine, and of Redis.

    Raises `ArtefactError` for what cannot be read and so not be searched, `PublishError` where somebody publishes
    meanwhile, `ConfigError` without anybody to forget, or for a folder that is not what its option names.
    """
    if not users:
        raise ConfigError("name at least one user to forget")
    result, root, store = Forgotten(), config.root, blocklists_url(config)
    folders = [located(folder) for folder in folders]
    _require_places(store, anchors, folders)
    result.done += [f"version {name} is now {other}" for name, other in published.forget(store, users).items()]
    replaced = published.replaced(store)
    for place in (root, *anchors):
        for url in filter(storage.is_partial, _files(place, config.interactions.path)):
            storage.remove(url)
            result.done.append(f"removed {url}")
    for name in storage.list_folders(storage.join(root, "nightly")):
        result.done += _rewrite(storage.join(root, "nightly", name), users)
        _rename(storage.join(root, "nightly", name), replaced)
    for folder in anchors:
        result.done += _rewrite(folder, users)
    for url in _to_remove(root, users):
        storage.remove_marked(url, MANIFEST)
        result.done.append(f"removed {url}")
    result.done += _cut_logs(storage.join(root, "logs"), users)
    for folder in folders:
        state = mirrors.read_state(Path(folder))
        mirrors.mirror(store, folder, state["pointer"], mirrors.shard_of(state))
        result.done.append(f"mirrored {folder} anew")
    if redis_url is not None:
        result.done.append(f"removed {_unlink(config, redis_url, users)} keys of Redis")
    _prove(result, config, users, anchors, folders, redis_url)
    return result


def _require_places(store: str, anchors: Sequence[str], folders: Sequence[str]) -> None:
    """Raises `ConfigError` for a folder that holds nothing of its kind, of which a search would prove nothing, and
    `ArtefactError` for a mirror of another store."""
    for folder in anchors:
        if not storage.list_parquet(folder):
            raise ConfigError(f"--anchors {folder}: holds no Parquet file; name the folder that conrec anchors wrote")
    for folder in folders:
        if not mirrors.is_mirror(folder):
            raise ConfigError(f"--mirror {folder}: holds no {mirrors.STATE}; name a folder that conrec mirror wrote")
        mirrors.require_source(Path(folder), mirrors.read_state(Path(folder)), store)


def _files(place: str, log: str) -> list[str]:
    """Every file below a folder, hidden ones too, but for the log, a file or folder, where it lies in there."""
    urls = [storage.join(place, name) for name in storage.list_files(place, hidden=True)]
    around, inputs = (f"{storage.absolute(url).rstrip('/')}/" for url in (place, log))
    if inputs == around or not inputs.startswith(around):
        return urls
    return [url for url in urls if not f"{storage.absolute(url)}/".startswith(inputs)]


def _rewrite(folder: str, users: Sequence[str]) -> list[str]:
    """Writes every Parquet file below a folder that names one of them without their rows; the manifest goes first, so
    that a run which is killed in between finds the same file to write again."""
    done = []
    for url in storage.list_parquet(folder, hidden=True):
        if not published.file_holds(url, users):
            continue
        table = storage.read_table(url)
        kept = published.without(table, users)
        sink = io.BytesIO()
        parquet.write_table(kept, sink, compression="zstd")
        _relist(folder, url, sink.getvalue())
        storage.write_bytes(url, sink.getvalue())
        done.append(f"{len(table) - len(kept):,} rows fewer in {url}")
    return done


def _relist(folder: str, url: str, data: bytes) -> None:
    """Says in the manifest of an artefact, where the folder is a finished one, what one of its files will be."""
    manifest = _manifest(folder)
    name = url.removeprefix(f"{folder}/")
    if manifest is not None and name in manifest["files"]:
        manifest["files"][name] = {"bytes": len(data), "sha256": published.digest(data)}
        storage.write_json(storage.join(folder, MANIFEST), manifest)


def _rename(folder: str, replaced: dict[str, str]) -> None:
    """A night names the version that it published, or what took its place."""
    manifest = _manifest(folder)
    if manifest is None or (name := manifest["figures"].get("version")) not in replaced:
        return
    manifest["figures"]["version"] = replaced[name]
    storage.write_json(storage.join(folder, MANIFEST), manifest)


def _manifest(folder: str) -> dict[str, Any] | None:
    url = storage.join(folder, MANIFEST)
    return storage.read_json(url) if storage.exists(url) else None


def _to_remove(root: str, users: Sequence[str]) -> list[str]:
    """What is removed whole."""
    found = []
    for stage in WITHOUT_NAMES:
        found += [storage.join(root, stage, name) for name in storage.list_folders(storage.join(root, stage))]
    evaluations = storage.join(root, "evaluation")
    found += [
        storage.join(evaluations, name)
        for name in storage.list_folders(evaluations)
        if _shows(storage.join(evaluations, name), users)
    ]
    replays = storage.join(root, "simulation")
    found += [
        storage.join(replays, name)
        for name in storage.list_folders(replays)
        if any(
            published.file_holds(url, users) for url in storage.list_parquet(storage.join(replays, name), hidden=True)
        )
    ]
    audits = storage.join(root, "blocklists", "audits")
    found += [
        storage.join(audits, name)
        for name in storage.list_files(audits)
        if published.is_told_of(storage.read_json(storage.join(audits, name)), users)
    ]
    return found


def _shows(folder: str, users: Sequence[str]) -> bool:
    """Whether an evaluation has one of them among its examples."""
    url = storage.join(folder, "metrics.json")
    if not storage.exists(url):
        return False
    examples = (storage.read_json(url).get("published") or {}).get("examples", [])
    return any(example["user"] in users for example in examples)


def _cut_logs(folder: str, users: Sequence[str]) -> list[str]:
    done = []
    for name in storage.list_files(folder):
        lines = _lines(storage.join(folder, name))
        kept = [line for line in lines if not published.mentions(line, users)]
        if len(kept) < len(lines):
            storage.write_bytes(storage.join(folder, name), "".join(kept).encode())
            done.append(f"{len(lines) - len(kept):,} lines fewer in {storage.join(folder, name)}")
    return done


def _lines(url: str) -> list[str]:
    return storage.read_bytes(url).decode(errors="replace").splitlines(keepends=True)


def _unlink(config: Config, url: str, users: Sequence[str]) -> int:
    keys = Keys(config.publish.redis_prefix)
    with connected(blocklists_url(config), url, keys) as client:
        found = _of_users(client, keys, users)
        return client.unlink(*found) if found else 0


def _of_users(client: Any, keys: Keys, users: Sequence[str]) -> list[bytes]:
    """Keys of these users, of whatever version: no name of a version holds a colon."""
    ids = {user.encode() for user in users}
    return [key for key in user_keys(client, keys) if key.split(b":", 2)[2] in ids]


def _prove(
    result: Forgotten,
    config: Config,
    users: Sequence[str],
    anchors: Sequence[str],
    folders: Sequence[str],
    redis_url: str | None,
) -> None:
    """Searches everything again, whatever was done to it."""
    files = [url for place in (config.root, *anchors) for url in _files(place, config.interactions.path)]
    urls = [url for url in files if url.endswith(".parquet")]
    result.left += filter(storage.is_partial, files)
    result.left += [url for url in urls if published.file_holds(url, users)]
    result.left += _to_remove(config.root, users)
    store, folder = blocklists_url(config), storage.join(config.root, "logs")
    logs = [storage.join(folder, name) for name in storage.list_files(folder)]
    result.left += [url for url in logs if any(published.mentions(line, users) for line in _lines(url))]
    manifests = [manifest for manifest, _ in versions.read_manifests(store)]
    told = [manifest["version"] for manifest in manifests if published.is_told_of(manifest, users)]
    result.left += [storage.join(versions.version_url(store, name), versions.MANIFEST) for name in told]
    packed, held = _packed(store, users)
    result.searched.append(f"{packed} compiled forms of versions")
    result.left += held
    places = ", ".join((config.root, *anchors))
    result.searched.append(
        f"{len(urls):,} Parquet files below {places}, {len(logs) + len(manifests):,} logs and manifests"
    )
    for folder in folders:
        copies, held = _mirrored(Path(folder), users)
        result.searched.append(f"{copies} copies in {folder}")
        result.left += held
    if redis_url is not None:
        keys = Keys(config.publish.redis_prefix)
        with connected(store, redis_url, keys) as client:
            result.left += [f"key {key.decode()}" for key in _of_users(client, keys, users)]
            result.searched.append(f"the keys {keys.prefix}:*:* of Redis")


def _mirrored(folder: Path, users: Sequence[str]) -> tuple[int, list[str]]:
    """How many copies a mirror has, and which hold one of them."""
    state, held = mirrors.read_state(folder), []
    copies = [made.name for made in (folder / "mirrored").iterdir()]
    for name in copies:
        index_url = str(folder / "mirrored" / name / "index.json")
        copy = state | {"folder": name, "index_sha256": storage.sha256(index_url)}
        index = mirrors.read_index(folder, copy)
        for shape in SCHEMAS:
            if _names_one(mirrors.open_arrays(folder, copy, index, shape), users):
                held.append(f"{shape} of {folder}/mirrored/{name}")
    return len(copies), held


def _packed(root: str, users: Sequence[str]) -> tuple[int, list[str]]:
    """How many versions have a compiled form, and in which it holds one of them."""
    searched, held = 0, []
    for manifest, _ in versions.read_manifests(root):
        with tempfile.TemporaryDirectory(prefix="conrec-forget-") as folder:
            shapes = download(root, manifest, Path(folder))
            if shapes is None:
                continue
            searched += 1
            for shape in SCHEMAS:
                if _names_one(map_files(Path(folder), shapes[shape]), users):
                    held.append(f"{shape} of {versions.compiled_url(root, manifest['version'])}")
    return searched, held


def _names_one(arrays: Mapping[str, np.ndarray], users: Sequence[str]) -> bool:
    compiled = Compiled(arrays)
    rows = [compiled.rows(user) for user in users]
    return any(one.stop > one.start for one in rows)


def require_nothing_left(result: Forgotten) -> None:
    """Raises `ArtefactError` naming where somebody is still named."""
    if result.left:
        raise ArtefactError("\n".join(["still named in", *result.left, "run again, with nothing running on the root"]))
