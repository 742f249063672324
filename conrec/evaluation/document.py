"""What an evaluation found, as metrics.json holds it: everything that a report says.

    storage.write_json(url, evaluation.to_json())
    systems = read_systems(storage.read_json(url))

Invariant: all values are plain; rows of the training are drawn, and not copied.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from conrec.evaluation.metrics import MEASURES

Figures = Mapping[str, Mapping[str, float | None]]
"""measure -> value, low, high."""
Line = Sequence[Mapping[str, Any]]
"""Settings of one system in the order of what is traded: `label`, and the figures FHR and FPH."""

Group = Literal["floor", "outside", "sequential", "generative", "ablation", "ours"]
"""Kinds of systems; those of a group stand together."""
CATCH = "catch at 1 %"
COLUMNS = (*MEASURES, CATCH, "choice", "likelihood", "served")
"""The measures of a system in the order in which they are shown."""


@dataclass(frozen=True)
class System:
    """One row: what a system catches, what that costs in likes, and what the system itself costs."""

    group: Group
    figures: Figures
    """Measure of COLUMNS -> value, low, high; a measure that the system does not define is absent."""
    training_seconds: float | None = None
    parameters: int | None = None
    users_per_second: float | None = None
    note: str = ""
    """What a reader of the row must know, in one sentence."""


@dataclass(frozen=True)
class Evaluation:
    """Everything a report says. All values are plain: what metrics.json holds."""

    about: Mapping[str, Any]
    """Facts above the table: cut, anchors, users, K, what is excluded, ..."""
    systems: Mapping[str, System]
    """In the order of the table; the systems of a group stand together."""
    ours: str = ""
    """Name of the full method's row."""
    lines: Mapping[str, Line] = field(default_factory=dict)
    """Settings of one system in the order of what they trade. A line takes the colour of the system that one of its
    labels names, or whose name begins with the line's; else it is the full method's."""
    catch_curves: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    """System -> `false_block` and `catch`, of one length."""
    comparisons: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """System -> its FPH, its FHR and `ours`, the full method's, there, and the figures `difference`, `ratio`,
    `catch_difference` and `catch_ratio`. What has several settings, theirs or ours, is a frontier, and read on the half
    of the users that did not choose it; the FHR of such a row is that of its frontier."""
    ablation: Sequence[Mapping[str, Any]] = ()
    """Steps in their order: `step`, `against`, `differences` (measure -> figure)."""
    differences: Mapping[str, Figures] = field(default_factory=dict)
    """Other paired differences, by a name that says of what: `after GRPO - before GRPO`."""
    published: Mapping[str, Any] = field(default_factory=dict)
    """The headline: figures, curves and paired differences of the lists as published, and users in words
    (`conrec.evaluation.headline`)."""
    calibration: Mapping[str, Any] = field(default_factory=dict)
    """The thresholds that are served, at every alpha."""
    score: Mapping[str, Any] = field(default_factory=dict)
    """The fitted weights."""
    target_coverage: Mapping[str, Any] = field(default_factory=dict)
    """`shares`: target -> top -> figure, and facts."""
    responsiveness: Mapping[str, Any] = field(default_factory=dict)
    """Event -> figures, and group of items -> share -> figure; and facts."""
    forgetting: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """System -> phase -> share of held-out alignment questions answered right after it."""
    verdict_auc: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """System -> phase -> AUC of the verdict on validation anchors' later rejections and likes after it."""
    quality: Mapping[str, Any] = field(default_factory=dict)
    """quality.json of the catalogue."""
    training: Sequence[Mapping[str, Any]] = ()
    """Rows of the training's metrics.jsonl; drawn, and not copied into metrics.json."""

    def to_json(self) -> dict[str, Any]:
        """metrics.json: every part but the training rows; undefined and infinite figures as None."""
        document = {part.name: getattr(self, part.name) for part in fields(self) if part.name != "training"}
        document["systems"] = {name: vars(system) for name, system in self.systems.items()}
        found: dict[str, Any] = plain(document)
        return found


def read_systems(document: Mapping[str, Any]) -> dict[str, System]:
    """The table's systems of a metrics.json."""
    return {name: System(**system) for name, system in document["systems"].items()}


def plain(value: Any) -> Any:
    """The same with NaN and infinities as None, which JSON has no other word for, and numpy numbers as Python's."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
