"""Artefacts go when nothing that stays was made of them; what a version or the newest policy names stays."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pytest

from conrec import cli, storage
from conrec.config import Config
from conrec.stages.garbage import KINDS, collect
from conrec.store import pointers
from conrec.store.publish import Block, write_version
from conrec.tables import BLOCKLIST, RULES

AT_ONCE = timedelta(0)
NEEDED = {"catalogue/c0", "catalogue/c1", "supervised/s0", "supervised/s1", "validated/v1", "policy/p1"}
NEWEST = {"catalogue/c0", "catalogue/c3", "supervised/s0", "supervised/s3", "validated/v3", "policy/p3"}
UNNEEDED = {"catalogue/c2", "supervised/s2", "validated/v2", "policy/p2", "calibration/k2", "items/c2"}


def version(name):
    """`p1` as 12 hexadecimal digits."""
    return name.encode().hex().rjust(12, "0")


def full(names):
    return {"/".join((kind, version(name))) for kind, name in (one.split("/") for one in names)}


@pytest.fixture
def config(tmp_path):
    """Three generations of policies on catalogues of their own, and the same twin of the validation time."""
    root = str(tmp_path / "root")

    def finish(kind, name, day, **inputs):
        url = storage.join(root, kind, version(name))
        inputs = {part.replace("_", " "): version(made) for part, made in inputs.items()}
        record = {"version": version(name), "settings": {}, "inputs": {"history": "x", **inputs}, "figures": {}}
        storage.write_bytes(storage.join(url, "data"), b"12345")
        storage.write_json(
            storage.join(url, "artefact.json"), record | {"finished_at": f"2026-01-0{day}T00:00:00+00:00"}
        )

    finish("catalogue", "c0", 1)
    finish("supervised", "s0", 1, catalogue="c0")
    for day in (1, 2, 3):
        finish("catalogue", f"c{day}", day + 1)
        finish("supervised", f"s{day}", day + 1, catalogue=f"c{day}")
        finish("validated", f"v{day}", day + 1, earlier_supervised="s0", earlier_catalogue="c0")
        finish("policy", f"p{day}", day + 1, supervised=f"s{day}", validated=f"v{day}", catalogue=f"c{day}")
        finish("calibration", f"k{day}", day + 1, validated=f"v{day}", earlier_catalogue="c0")
        storage.write_bytes(storage.join(root, "items", version(f"c{day}"), "0.parquet"), b"12345")
    publish(root, "p1")
    return Config.model_validate(
        {
            "root": root,
            "interactions": {"path": "i"},
            "items": {"path": "i"},
            "timeline": {"cut": "2026-01-01T00:00:00Z"},
        }
    )


def publish(root, policy):
    number = policy[1]
    about = {"watermark_us": 1, "generated_users": 0, "failed_users": 0, "policy": version(policy)}
    about |= {"validated": version(f"v{number}"), "catalogue": version(f"c{number}")}
    about |= {"calibration": {"version": version(f"k{number}")}}
    store = storage.join(root, "blocklists")
    manifest = write_version(store, f"night-{policy}", [Block(0, BLOCKLIST.empty_table(), RULES.empty_table())], about)
    digest = pointers.create_manifest(store, f"night-{policy}", manifest)
    pointers.swap_pointer(pointers.observe(store), f"night-{policy}", digest)


def there(config):
    folders = (*KINDS, "items")
    return {f"{kind}/{name}" for kind in folders for name in storage.list_folders(storage.join(config.root, kind))}


def test_what_a_version_or_the_newest_policy_names_stays(config):
    before = there(config)
    said = collect(config, 1, dry_run=True, min_age=AT_ONCE)
    assert there(config) == before
    assert set(said.artefacts) == full(UNNEEDED)
    assert all(said.sizes["artefacts", name] >= 5 for name in said.artefacts)
    assert any(f"policy/{version('p2')}" in line and line.endswith(" bytes") for line in said.lines())
    assert collect(config, 1, min_age=AT_ONCE) == said
    assert there(config) == before - full(UNNEEDED)
    assert there(config) >= full(NEEDED | NEWEST | {"calibration/k1", "calibration/k3", "items/c1", "items/c3"})
    assert collect(config, 1, min_age=AT_ONCE).artefacts == []


def test_a_policy_goes_once_no_version_names_it(config):
    publish(config.root, "p3")
    assert full({"policy/p1"}) <= there(config)
    storage.remove(
        storage.join(config.root, "blocklists", "versions", "night-p1")
    )  # as an older one that was collected
    gone = set(collect(config, 1, min_age=AT_ONCE).artefacts)
    assert gone == full(UNNEEDED | (NEEDED - NEWEST) | {"calibration/k1", "items/c1"})


def test_a_pinned_policy_and_what_is_young_stay(config):
    pinned = config.model_copy(update={"policy": config.policy.model_copy(update={"version": version("p2")})})
    folder = Path(config.root)
    record = storage.read_json(str(folder / "policy" / version("p2") / "artefact.json"))
    record["settings"] = {"timeline": {"cut": "2026-01-01T00:00:00Z"}}
    storage.write_json(str(folder / "policy" / version("p2") / "artefact.json"), record)
    assert set(collect(pinned, 1, dry_run=True, min_age=AT_ONCE).artefacts) == full({"calibration/k2"})
    assert collect(config, 1, dry_run=True).artefacts == []  # nothing is a week old
    for file in (folder / "calibration" / version("k2")).iterdir():
        os.utime(file, (1, 1))
    assert collect(config, 1, dry_run=True).artefacts == sorted(full({"calibration/k2"}))


def test_no_artefact_goes_while_it_is_unknown_what_a_version_names(config, tmp_path, capsys):
    storage.write_bytes(storage.join(config.root, "blocklists", "versions", "x", "manifest.json"), b"{}")
    collected = collect(config, 1, min_age=AT_ONCE)
    assert (collected.artefacts, len(collected.unreadable)) == ([], 1)
    storage.remove(storage.join(config.root, "blocklists", "versions", "x"))
    storage.write_bytes(storage.join(config.root, "policy", version("p2"), "artefact.json"), b"{")
    file = tmp_path / "settings.toml"
    file.write_text(f'root = "{config.root}"\ninteractions = {{ path = "i" }}\nitems = {{ path = "i" }}\n')
    with file.open("a") as settings:
        settings.write("timeline = { cut = 2026-01-01T00:00:00Z }\n")
    with pytest.raises(SystemExit) as ended:
        cli.main(["collect-garbage", "--keep", "1", "--config", str(file)])
    assert ended.value.code == 2
    assert version("p2") in capsys.readouterr().err
