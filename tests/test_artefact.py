"""An artefact is complete once its manifest exists, and its version is its settings and inputs."""

import hashlib

import pytest

from conrec import storage
from conrec.artefact import UNFINISHED, Artefact, plan
from conrec.errors import ArtefactError

SETTINGS = {"codes": 16, "levels": 3}
INPUTS = {"items": "d1", "interactions": "d2"}


def test_the_version_is_decided_by_settings_and_inputs_alone(tmp_path):
    version = plan(str(tmp_path), "catalogue", SETTINGS, INPUTS).version
    assert len(version) == 12
    assert int(version, 16) >= 0
    reordered = plan("elsewhere", "catalogue", dict(reversed(SETTINGS.items())), dict(reversed(INPUTS.items())))
    assert reordered.version == version
    assert plan(str(tmp_path), "catalogue", SETTINGS | {"codes": 17}, INPUTS).version != version
    assert plan(str(tmp_path), "catalogue", SETTINGS, INPUTS | {"items": "d3"}).version != version


def test_files_without_a_manifest_are_not_an_artefact(tmp_path):
    artefact = plan(str(tmp_path), "catalogue", SETTINGS, INPUTS)
    storage.write_bytes(artefact.path("items.parquet"), b"half of")
    assert artefact.read() is None
    with pytest.raises(ArtefactError, match="run conrec catalogue with these settings first"):
        artefact.require()


@pytest.mark.parametrize("root", ["local", "memory://artefacts"])
def test_a_finished_artefact_names_everything(root, tmp_path):
    artefact = plan(str(tmp_path) if root == "local" else root, "catalogue", SETTINGS, INPUTS)
    storage.write_bytes(artefact.path("deep", "file"), b"abc")
    artefact.finish({"items": 3}, seconds=1.26)
    manifest = artefact.read()
    assert manifest == artefact.require()
    assert manifest["files"] == {"deep/file": {"bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}}
    assert (manifest["settings"], manifest["inputs"], manifest["figures"]) == (SETTINGS, INPUTS, {"items": 3})
    assert manifest["seconds"] == 1.3
    assert {"conrec", "torch", "pyarrow"} <= manifest["libraries"].keys()


def test_finishing_again_does_not_list_the_manifest_itself(tmp_path):
    artefact = plan(str(tmp_path), "catalogue", SETTINGS, INPUTS)
    artefact.finish({}, 0.0)
    assert artefact.finish({}, 0.0)["files"] == {}


def test_other_figures_of_a_finished_artefact_read_none_of_its_files(tmp_path, monkeypatch):
    artefact = plan(str(tmp_path), "nightly", SETTINGS, INPUTS)
    with pytest.raises(ArtefactError, match="is not complete"):
        artefact.finish_again({}, 1.0)
    storage.write_bytes(artefact.path("prompts", "0.parquet"), b"abc")
    first = artefact.finish({"users": 3}, 1.0)
    monkeypatch.setattr(storage, "sha256", lambda url: pytest.fail(f"{url} was read"))
    again = artefact.finish_again({"users": 3, "version": "v1"}, 2.0)
    assert again == artefact.read() and first["files"].keys() == {"prompts/0.parquet"}
    assert {name for name in first if first[name] != again[name]} == {"figures", "seconds", "finished_at"}


@pytest.mark.parametrize("content", [b"{", b'{"version": "another"}', b"[]"])
def test_a_damaged_or_foreign_manifest_is_refused(tmp_path, content):
    artefact = plan(str(tmp_path), "catalogue", SETTINGS, INPUTS)
    storage.write_bytes(artefact.path("artefact.json"), content)
    with pytest.raises(ArtefactError, match=r"artefact\.json"):
        artefact.read()


def test_a_manifest_that_lists_no_files_is_named(tmp_path):
    artefact = plan(str(tmp_path), "catalogue", SETTINGS, INPUTS)
    storage.write_json(artefact.path("artefact.json"), {"version": artefact.version})
    with pytest.raises(ArtefactError, match=r"artefact\.json: lists no files.* delete .* and run conrec catalogue"):
        artefact.verify("items.parquet")


def test_a_message_names_the_command_that_makes_the_artefact(tmp_path):
    for folder, command in (
        ("catalogue", "catalogue"),
        ("policy", "train"),
        ("validated", "train"),
        ("nightly", "nightly"),
    ):
        with pytest.raises(ArtefactError, match=f"run conrec {command} with these settings first"):
            plan(str(tmp_path), folder, SETTINGS, INPUTS).require()


def test_what_only_a_run_that_goes_on_needs_is_no_part_of_it_and_goes_once_it_is_complete(tmp_path, monkeypatch):
    artefact = plan(str(tmp_path), "policy", SETTINGS, INPUTS)
    storage.write_bytes(artefact.path(UNFINISHED, "ray", "checkpoint"), b"hours")
    with monkeypatch.context() as patch:
        # The manifest comes first: until it is there, everything else is.
        patch.setattr(Artefact, "tidy", lambda self: None)
        assert artefact.finish({}, 0.0)["files"] == {}
    assert storage.exists(artefact.path(UNFINISHED, "ray", "checkpoint"))
    artefact.finish({}, 0.0)
    assert not storage.exists(artefact.path(UNFINISHED)) and artefact.read() is not None
