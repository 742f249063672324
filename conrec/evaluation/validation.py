"""What decides over a stage of GRPO: the measures of what a policy generates for the validation anchors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from conrec.config import Config, EvaluationSettings
from conrec.evaluation.leaf_items import leaf_items_by_rejections, ranked_items
from conrec.evaluation.metrics import SERVED_K, per_anchor
from conrec.feedback.histories import history_items, rejecting_users, rejections_in_history
from conrec.feedback.targets import Targets, targets
from conrec.policy.curriculum import TrainingWorld
from conrec.ragged import Ragged


@dataclass(frozen=True)
class ValidationMeasure:
    """FHR and FPH at 20 of generated leaves on the validation anchors; sent to the training workers.

    Shape: A anchors in `targets`, `excluded` (their history) and `rejections`; leaf_items M rows.
    """

    targets: Targets
    excluded: Ragged
    rejections: np.ndarray
    item_rejections: np.ndarray
    leaf_items: Ragged
    settings: EvaluationSettings

    @classmethod
    def of(cls, config: Config, world: TrainingWorld) -> ValidationMeasure:
        """The measure of the validation anchors; what may train decides which items of a shared ID come first."""
        events, anchors = world.events, world.validation
        return cls(
            targets(events, anchors),
            history_items(events, anchors),
            rejections_in_history(events, anchors),
            rejecting_users(world.history, len(world.catalogue.semantic_ids)),
            leaf_items_by_rejections(world.catalogue.trie, world.history),
            config.evaluation,
        )

    def values(self, leaves: np.ndarray) -> dict[str, np.ndarray]:
        """Every measure of every anchor for leaves (A, W), best first."""
        ranked = ranked_items(leaves, self.leaf_items, self.excluded, SERVED_K)
        return per_anchor(ranked, self.targets, self.rejections, self.item_rejections, self.settings)

    def __call__(self, leaves: np.ndarray) -> dict[str, np.ndarray]:
        """What decides over a GRPO stage, by anchor."""
        values = self.values(leaves)
        return {name.lower(): values[name] for name in ("FHR", "FPH", "FRecall")}
