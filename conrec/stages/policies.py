"""Which policy is served: the newest finished one whose settings agree, or the one that is pinned.

    tonight = serving(run)              # the same run with that policy, its catalogue and its settings
    tonight["policy"].path("checkpoint")

Training is asked for, never begun by a night. So a night serves what was trained, and says which, of when, trained
until when; settings that were changed without a new training are refused, not silently served; a cut that was moved is
the routine of training anew, and until then the older policy is served. Invariant: a policy comes with the catalogue,
the settings and the cut that it was trained with, and with its twin that has not seen the validation anchors.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic import ValidationError

from conrec.artefact import Artefact
from conrec.config import Config, explained
from conrec.errors import ArtefactError, ConfigError
from conrec.progress import console, warn
from conrec.stages.artefacts import (
    FIXED,
    WEIGHTS,
    Artefacts,
    closure,
    differences,
    finished,
    intact,
    leaves,
    recorded,
    settings_of,
)
from conrec.stages.sources import weights_digest

CUT = "timeline.cut"
OLDER = "an older release trained it, in another way"
Finished = tuple[Artefact, dict[str, Any]]


def serving(run: Artefacts, same_cut: bool = False) -> Artefacts:
    """The run with the policy that is served, after it was said which one that is.

    `same_cut`: only one trained until the settings' own cut will do, because what came after it is measured.
    Raises `ArtefactError` where none is finished, none agrees, or the pinned one is missing.
    """
    policy, manifest = chosen(run, same_cut)
    config = with_settings(run.config, policy.settings)
    parts = ("catalogue", "validated")
    made_of: dict[str, Artefact] = {name: _recorded(run, manifest, name) for name in parts if name in policy.inputs}
    if "validated" not in made_of and (twin := _twin(config)) is not None:
        made_of["validated"] = twin
    if "validated" in made_of:
        version = made_of["validated"].inputs["earlier catalogue"]
        made_of["earlier catalogue"] = _finished(run, "catalogue", version, made_of["validated"].version)
    served = run.of(config, policy=policy, **made_of)
    console.print(
        f"  policy {policy.version} of {_minute(manifest['finished_at'])}, trained until "
        f"{config.timeline.learned_until:%Y-%m-%d %H:%M}"
    )
    for line in stale(run, policy):
        warn(line)
    return served


def evaluated(run: Artefacts) -> Artefacts:
    """The run as it is evaluated: with the policy trained until its cut, or as it is for the floors alone.

    Raises `ArtefactError` as `serving`.
    """
    return run if run.config.evaluation.systems == "floors" else serving(run, same_cut=True)


def chosen(run: Artefacts, same_cut: bool) -> Finished:
    """The policy that the rule takes, and its manifest."""
    every = finished(run.config.root, "policy")
    pinned = run.config.policy.version
    if pinned is not None:
        return _pinned(run, every, pinned)
    wanted = settings_of(run.config, closure("policy"))
    agreeing = [one for one in every if not _disagreements(one[0], wanted, same_cut)]
    if agreeing:
        # `every` begins with the newest, and max takes the first of equals.
        return max(agreeing, key=lambda one: _cut(one[0].settings))
    url = f"{run.config.root}/policy"
    if not every:
        raise ArtefactError(f"{url}: no policy is finished; run conrec train with these settings first")
    newest = every[0][0]
    lines = "".join(f"\n  {line}" for line in _disagreements(newest, wanted, same_cut))
    pin = f', or serve that one as it is: policy.version = "{newest.version}"' if _understood(newest) else ""
    raise ArtefactError(
        f"{url}: no policy was trained with these settings. The newest, {newest.version}, differs in{lines}\n"
        f"run conrec train{pin}"
    )


def with_settings(config: Config, trained: dict[str, Any]) -> Config:
    """The settings with those that a policy was trained with in their place.

    Raises `ConfigError` where the others are impossible beside them, or this release has one of them no longer.
    """
    document = config.model_dump(mode="json")
    today = leaves(document)
    for path, value in leaves(trained).items():
        if path in FIXED:
            if value != FIXED[path]:
                raise ConfigError(
                    f"the policy was trained with {path} = {value!r}, and this release has {FIXED[path]!r} alone: run "
                    "conrec train, or serve it by the release that trained it"
                )
            continue
        if path in WEIGHTS and today[path] and weights_digest(today[path]) == value:
            continue  # where the weights lie today is for the settings to say
        *sections, last = path.split(".")
        place = document
        for section in sections:
            if not isinstance(place.get(section), dict):
                place[section] = {}
            place = place[section]
        place[last] = value
    try:
        return Config.model_validate(document)
    except ValidationError as error:
        reasons = "; ".join(explained(detail) for detail in error.errors())
        raise ConfigError(
            "the settings do not go with those that the policy was trained with, which stand in their place: "
            f"{reasons}; change the others, or run conrec train"
        ) from None


def stale(run: Artefacts, policy: Artefact) -> list[str]:
    """What to know of a policy that the settings or the log have left behind."""
    cut = _cut(policy.settings)
    lines = []
    if run.config.timeline.cut > cut:
        lines.append(
            f"timeline.cut is {run.config.timeline.cut:%Y-%m-%d %H:%M}, later than this policy's: run conrec train"
        )
    learned_until = with_settings(run.config, policy.settings).timeline.learned_until
    age = datetime.fromtimestamp(run.sources.log.last_us / 1e6, UTC) - learned_until
    limit = run.config.nightly.max_policy_days
    if age > timedelta(days=limit):
        lines.append(
            f"what this policy learned ends {age.days} days before the newest event (nightly.max_policy_days = "
            f"{limit:g}): move timeline.cut and run conrec train"
        )
    if run.config.policy.version is not None:
        wanted = settings_of(run.config, closure("policy"))
        differing = ", ".join(line.split(":")[0] for line in _disagreements(policy, wanted, same_cut=False))
        if differing:
            lines.append(f"policy.version pins a policy that was trained with other settings: {differing}")
    return lines


def _disagreements(policy: Artefact, wanted: dict[str, Any], same_cut: bool) -> list[str]:
    if not _understood(policy):
        return [OLDER]
    lines = differences(policy.settings, wanted)
    earlier = _cut(policy.settings) < _cut(wanted)
    return [line for line in lines if not line.startswith(f"{CUT}:")] if earlier and not same_cut else lines


def _understood(policy: Artefact) -> bool:
    """Whether it was trained as this release trains."""
    settings = leaves(policy.settings)
    return CUT in settings and ("supervised" in policy.inputs or settings.get("timeline.refit") is False)


def _cut(settings: dict[str, Any]) -> datetime:
    return datetime.fromisoformat(settings["timeline"]["cut"])


def _twin(config: Config) -> Artefact | None:
    """For a policy without stages, which was made of none: the newest one trained with its settings.

    None before the first calibration, which trains one; no later night does, whatever came late to the history.
    """
    wanted = settings_of(config, closure("validated"))
    for artefact, _ in intact(config.root, "validated"):
        if "earlier catalogue" in artefact.inputs and not differences(artefact.settings, wanted):
            return artefact
    return None


def _pinned(run: Artefacts, every: list[Finished], version: str) -> Finished:
    for one in every:
        if one[0].version == version:
            if not _understood(one[0]):
                raise ArtefactError(
                    f"{one[0].url}: policy.version = {version!r}: {OLDER}; run conrec train, and take policy.version "
                    "out of the settings, or serve it by the release that trained it"
                )
            return one
    there = ", ".join(artefact.version for artefact, _ in every) or "none"
    raise ArtefactError(f"{run.config.root}/policy: policy.version = {version!r} is not finished there; it has {there}")


def _recorded(run: Artefacts, manifest: dict[str, Any], name: str) -> Artefact:
    """The artefact that a policy was made of."""
    return _finished(run, name, manifest["inputs"][name], manifest["version"])


def _finished(run: Artefacts, name: str, version: str, made: str) -> Artefact:
    found = recorded(run.config.root, name, version)
    if found is None:
        raise ArtefactError(
            f"{run.config.root}/{name}/{version} is not finished, and policy {made} was made of it; "
            "bring it back, or run conrec train"
        )
    return found[0]


def _minute(moment: str) -> str:
    return f"{datetime.fromisoformat(moment):%Y-%m-%d %H:%M}"
