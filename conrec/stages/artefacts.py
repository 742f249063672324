"""The graph of artefacts: what decides each of them, and what it reads. Versions follow from this table alone.

    run = Artefacts(config)
    run["policy"].path("checkpoint")     # <root>/policy/<version>/checkpoint

| artefact | reads |
|---|---|
| catalogue | the items, the history where behaviour is a source |
| supervised | catalogue, the history, the items in it that the catalogue lacks |
| validated | the earlier catalogue and supervised, the history |
| policy | supervised, validated, catalogue |
| calibration | validated, the earlier catalogue, the history |
| evaluation | policy, calibration, catalogue, the log until the last whole window, the items in it, predictions |
| nightly | policy, calibration, catalogue, the whole log, the items of today |

The history is the log until the cut: what came after it changes nothing that is trained. `earlier` artefacts are those
of the same settings with the validation time as their cut: what decides on what lies between the two, a stage of GRPO
or a threshold, is so made of nothing that lies there, for no user. Without `timeline.refit` the policy reads validated
alone, and the catalogue of all is the earlier one. An evaluation of the floors alone reads neither
policy nor calibration. A path is not content (`conrec.stages.sources`), so it stands in no version.

Invariant: a setting changes a version, or stands in `DECIDES_NOTHING`; a test changes every one of them in turn.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, NamedTuple

import pyarrow as pa

from conrec import storage
from conrec.artefact import MANIFEST, VERSION_DIGITS, Artefact, plan
from conrec.config import Config
from conrec.errors import ArtefactError
from conrec.feedback.anchors import evaluated_until
from conrec.feedback.content import Content, items_content
from conrec.stages.sources import ITEM_COLUMNS, Sources, weights_digest

DECIDES_NOTHING = (
    # Places.
    "root",
    "interactions.path",
    "items.path",
    "publish.redis_prefix",
    # Limits beyond which a stage refuses, warns or advises.
    "interactions.max_unknown_item_share",
    "interactions.max_clock_skew_hours",
    "interactions.now",
    "catalogue",
    "nightly",
    "publish.max_failed_share",
    "publish.min_coverage",
    "publish.max_size_change",
    "publish.min_overlap",
    # Which of the finished policies is taken.
    "policy",
    # Machines: devices, cores, memory, how often and how much at once.
    "embedding.batch_size",
    "train.use_gpu",
    "train.cpus_per_worker",
    "train.node_resource",
    "train.tokens_at_once",
    "train.recompute_layers",
    "train.checkpoint_every",
    "train.max_failures",
    "generate.batch_size",
    "generate.engines",
    "generate.cpus_per_engine",
    "generate.use_gpu",
    "generate.tensor_parallel",
    "generate.node_resource",
    "generate.kv_cache_gib",
    "generate.gpu_memory_share",
)
"""Settings, or whole sections of them, that decide no artefact's content."""

FIXED: dict[str, Any] = {
    "prompt.shown": True,
    "lora.dropout": 0.0,
    "supervised.weight_decay": 0.01,
    "supervised.alignment_distractors": ["positive", "popularity", "shown"],
    "grpo.updates_per_rollout": 1,
    "grpo.clip_low": 0.2,
    "grpo.clip_high": 0.28,
    "grpo.normalise_std": True,
}
"""Settings of older releases, each with the value that is now the only one. They stay in the versions, so that what was
made with that value is still taken."""

GENERATING = ("generate.beam_width", "generate.min_similarity")
"""Settings that decide what is generated, and what is said to lie near it."""

_EARLIER = "earlier "
_RECORDED = {"settings", "inputs", "figures", "finished_at"}
_VERSION = re.compile(rf"[0-9a-f]{{{VERSION_DIGITS}}}")

WEIGHTS = ("model.name_or_path", "embedding.encoder")
"""Settings that name weights; a folder on this machine counts by what lies in it."""


class Made(NamedTuple):
    """A row of the table."""

    folder: str
    """Below the root."""
    settings: tuple[str, ...]
    """Sections, or single settings, that decide it beside those of the artefacts that it reads."""
    reads: tuple[str, ...]
    """Artefacts and inputs."""
    revision: int = 1
    """Raised where the code makes something else of the same: what older code left is not taken for it."""


_TRAINED_BY = ("seed", "timeline", "model", "lora", "prompt", "supervised", "train.workers")
_TUNED_BY = ("seed", "swing", "grpo", "generate.beam_width")

ARTEFACTS = {
    "catalogue": Made("catalogue", ("seed", "embedding", "quantizer"), ("items", "behaviour")),
    "supervised": Made("supervised", _TRAINED_BY, ("catalogue", "history", "seen"), revision=2),
    "validated": Made(
        "validated", (*_TUNED_BY, "timeline"), ("earlier supervised", "earlier catalogue", "history"), revision=4
    ),
    "policy": Made("policy", _TUNED_BY, ("supervised", "validated", "catalogue")),
    "calibration": Made(
        "calibration",
        ("seed", "score", "calibration", "guardrails", "timeline", "prompt", "generate.beam_width"),
        ("validated", "earlier catalogue", "history"),
        revision=4,
    ),
    "evaluation": Made(
        "evaluation",
        ("seed", "timeline", "evaluation", "swing", "prompt", "generate"),
        ("policy", "calibration", "catalogue", "windows", "seen in windows", "predictions"),
        revision=3,
    ),
    "nightly": Made(
        "nightly",
        (
            "seed",
            "guardrails",
            "prompt",
            "publish",
            "generate.engine",
            "generate.max_users",
            "generate.keep_days",
            *GENERATING,
        ),
        ("policy", "calibration", "catalogue", "log", "items"),
        revision=2,
    ),
    "system": Made(
        "systems",
        (
            "seed",
            "timeline",
            "swing",
            "prompt",
            "evaluation.max_anchors",
            "generate.beam_width",
            "guardrails.min_negatives",
            "guardrails.min_history",
        ),
        ("catalogue", "windows", "seen in windows"),
    ),
}


class Artefacts:
    """The artefacts of one run: each is planned once.

    `taken`: artefacts that stand for those which the settings would give, because a rule chose them; `began`: when the
    run did, by default now.
    """

    def __init__(
        self,
        config: Config,
        sources: Sources | None = None,
        taken: Mapping[str, Artefact] | None = None,
        began: datetime | None = None,
    ) -> None:
        self.config = config
        self.began = began or datetime.now(UTC)
        self.sources = sources or Sources(config)
        self._known = dict(taken or {})

    def of(self, config: Config, **taken: Artefact) -> Artefacts:
        """The artefacts of other settings over the same inputs. The same catalogues, where those agree."""
        if settings_of(config, closure("catalogue")) == settings_of(self.config, closure("catalogue")):
            taken = {"catalogue": self["catalogue"]} | taken
            if config.timeline.validation_us == self.config.timeline.validation_us:
                taken = {"earlier catalogue": self.earlier["catalogue"]} | taken
        return Artefacts(config, self.sources, taken, self.began)

    @cached_property
    def earlier(self) -> Artefacts:
        """The artefacts of the same settings with the validation time as their cut."""
        cut = datetime.fromtimestamp(self.config.timeline.validation_us / 1e6, UTC)
        timeline = self.config.timeline.model_copy(update={"cut": cut, "refit": True})
        taken = {"catalogue": self._known["earlier catalogue"]} if "earlier catalogue" in self._known else None
        return Artefacts(self.config.model_copy(update={"timeline": timeline}), self.sources, taken)

    @cached_property
    def _refitting(self) -> Artefacts:
        """The same with a refit, for what it changes nothing of: the training until the validation time, the score."""
        timeline = self.config.timeline.model_copy(update={"refit": True})
        return Artefacts(self.config.model_copy(update={"timeline": timeline}), self.sources, self._known)

    def __getitem__(self, name: str) -> Artefact:
        """The artefact of that name, finished or to be made.

        The catalogue is the finished one whose settings agree that read behaviour until the latest moment, the newest
        of these, since codebooks are frozen: an item that it was not fitted on is encoded with it. Without a refit it
        is that of the training until the validation time.
        """
        if name == "catalogue" and not self.config.timeline.refit:
            return self._known.get(name) or self.earlier[name]
        if name not in self._known:
            found = self._newest_catalogue() if name == "catalogue" else None
            self._known[name] = found or self.exact(name)
        return self._known[name]

    def exact(self, name: str) -> Artefact:
        """What the settings and inputs of today give, whatever is finished already."""
        if not self.config.timeline.refit:
            if name == "catalogue":
                return self.earlier.exact(name)
            if name in ("validated", "calibration"):
                return self._refitting.exact(name)
        made = ARTEFACTS[name]
        inputs = {read: digest for read in self._reads(name) if (digest := self._digest(read)) is not None}
        if made.revision > 1:
            inputs["revision"] = str(made.revision)
        return plan(self.config.root, made.folder, settings_of(self.config, closure(name)), inputs)

    def system(self, name: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> Artefact:
        """A row of an evaluation's table: `settings` and `inputs` are its own beside those of every row."""
        row = self.exact("system")
        return plan(self.config.root, row.stage, row.settings | {"system": name, **settings}, row.inputs | dict(inputs))

    def fitted_ids(self) -> pa.Array:
        """The items that the catalogue was fitted on. Shape: (I,) string, ascending."""
        table = storage.read_table(self["catalogue"].path("items.parquet"), columns=["item_id"])
        return table["item_id"].combine_chunks()

    def seen(self, time_us: int | None) -> Content:
        """The content of the items that the catalogue was not fitted on and that somebody met until a moment."""
        assert time_us is not None
        return items_content(self.sources.seen(self.fitted_ids(), self["catalogue"].version, time_us), *ITEM_COLUMNS)

    def windows_end_us(self) -> int:
        """End of the last whole window of evaluation; the cut where there is none."""
        return evaluated_until(self.sources.log.last_us, self.config.timeline)

    def _reads(self, name: str) -> tuple[str, ...]:
        left_out: tuple[str, ...] = ()
        if name == "policy" and not self.config.timeline.refit:
            left_out = ("supervised",)
        elif name == "policy" and not self.config.grpo.stages:
            left_out = ("validated",)  # nothing is decided over that the policy is made of
        if name == "evaluation" and self.config.evaluation.systems == "floors":
            left_out = ("policy", "calibration")
        return tuple(read for read in ARTEFACTS[name].reads if read not in left_out)

    def _digest(self, read: str) -> str | None:
        """Digest or version of what an artefact reads; None where these settings read nothing of it."""
        if read in ARTEFACTS:
            return self[read].version
        if read.startswith(_EARLIER):
            return self.earlier[read.removeprefix(_EARLIER)].version
        embedded = self.config.embedding.sources
        if read == "items":
            return self.sources.items_digest("column" in embedded)
        if read == "behaviour" and "behaviour" not in embedded:
            return None
        if read == "predictions":
            return self.sources.predictions_digest()
        time_us = None if read == "log" else self.config.timeline.cut_us
        if read.endswith("windows"):
            time_us = self.windows_end_us()
        if not read.startswith("seen"):
            return self.sources.log.until(time_us).digest
        # A catalogue that is still to be fitted, on the items of today, will lack none.
        return self.seen(time_us).digest if self["catalogue"].read() is not None else Content().digest

    def _newest_catalogue(self) -> Artefact | None:
        wanted = settings_of(self.config, closure("catalogue"))
        found, found_until = None, None
        for artefact, manifest in finished(self.config.root, "catalogue"):
            read_until = manifest["figures"].get("read_until")
            until = datetime.min.replace(tzinfo=UTC) if read_until is None else datetime.fromisoformat(read_until)
            # The earlier catalogue, which read less behaviour, is finished after the one that it is the twin of.
            newer = until <= self.config.timeline.cut and (found_until is None or until > found_until)
            if newer and not differences(artefact.settings, wanted):
                found, found_until = artefact, until
        return found


def closure(name: str) -> tuple[str, ...]:
    """The settings that decide an artefact and all that it is made of."""
    made = ARTEFACTS[name]
    reads = (read.removeprefix(_EARLIER) for read in made.reads)
    return (*made.settings, *(part for read in reads if read in ARTEFACTS for part in closure(read)))


def settings_of(config: Config, names: tuple[str, ...]) -> dict[str, Any]:
    """Those sections and settings as JSON values, without what decides nothing."""
    chosen: dict[str, Any] = {}
    every = leaves(config.model_dump(mode="json"))
    known = {path.rpartition(".")[0] for path in every}
    every |= {path: value for path, value in FIXED.items() if path.rpartition(".")[0] in known}
    for path, value in every.items():
        if any(_within(path, name) for name in names) and not any(_within(path, name) for name in DECIDES_NOTHING):
            section = chosen
            *sections, last = path.split(".")
            for part in sections:
                section = section.setdefault(part, {})
            section[last] = weights_digest(value) if path in WEIGHTS and value else value
    return chosen


def leaves(document: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """`section.setting` -> value of every setting in a document of sections; a list is one value."""
    found: dict[str, Any] = {}
    for name, value in document.items():
        if isinstance(value, Mapping) and value:
            found |= leaves(value, f"{before}{name}.")
        else:
            found[before + name] = value
    return found


def differences(recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """`section.setting: recorded -> wanted` of every setting in which two documents differ.

    A setting that the record lacks, because an older release did not have it, had its default.
    """
    then, now = leaves(recorded), leaves(wanted)
    lines = []
    for name in sorted(then.keys() | now.keys()):
        before, after = (values[name] if name in values else default_of(name) for values in (then, now))
        if before != after:
            lines.append(f"{name}: {before!r} -> {after!r}")
    return lines


def default_of(path: str) -> Any:
    """The default of a setting as a JSON value; None where it has none, or no longer exists."""
    model: Any = Config
    *sections, last = path.split(".")
    for section in sections:
        model = model.model_fields[section].annotation if section in getattr(model, "model_fields", {}) else None
    field = getattr(model, "model_fields", {}).get(last)
    if field is None or field.is_required():
        return None
    return list(field.default) if isinstance(field.default, tuple) else field.default


def finished(root: str, folder: str) -> list[tuple[Artefact, dict[str, Any]]]:
    """The finished artefacts of a folder below the root with their manifests, the newest first.

    A folder whose name is no version, such as somebody's copy, is none. Raises `ArtefactError` where a manifest is
    damaged.
    """
    return _newest_first(recorded(root, folder, name) for name in _versions(root, folder))


def intact(root: str, folder: str) -> list[tuple[Artefact, dict[str, Any]]]:
    """The same but for those whose manifest is damaged: for what does well without an earlier artefact."""
    found = []
    for name in _versions(root, folder):
        with contextlib.suppress(ArtefactError):
            found.append(recorded(root, folder, name))
    return _newest_first(found)


def unfinished(root: str, folder: str) -> list[Artefact]:
    """Those without a manifest: in the making, left by a run that was ended, or half removed."""
    every = (Artefact(folder, name, storage.join(root, folder, name), {}, {}) for name in _versions(root, folder))
    return [artefact for artefact in every if not storage.exists(artefact.path(MANIFEST))]


def _versions(root: str, folder: str) -> list[str]:
    return [name for name in storage.list_folders(storage.join(root, folder)) if _VERSION.fullmatch(name)]


def _newest_first(every: Iterable[tuple[Artefact, dict[str, Any]] | None]) -> list[tuple[Artefact, dict[str, Any]]]:
    found = [one for one in every if one is not None]
    return sorted(found, key=lambda one: (one[1]["finished_at"], one[0].version), reverse=True)


def recorded(root: str, folder: str, version: str) -> tuple[Artefact, dict[str, Any]] | None:
    """A finished artefact as its manifest tells of it, with the manifest; None where it is not finished."""
    artefact = Artefact(folder, version, storage.join(root, folder, version), {}, {})
    manifest = artefact.read()
    if manifest is None:
        return None
    if missing := sorted(_RECORDED - manifest.keys()):
        raise ArtefactError(
            f"{artefact.path(MANIFEST)}: lacks {', '.join(missing)}: no stage wrote it; bring the file back, or delete "
            f"{artefact.url}"
        )
    return Artefact(folder, version, artefact.url, manifest["settings"], manifest["inputs"]), manifest


def _within(path: str, name: str) -> bool:
    return path == name or path.startswith(f"{name}.")
