"""What decides over a stage of GRPO: the measures of what a policy generates for the validation anchors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from conrec.evaluation.leaf_items import leaf_items_by_rejections, ranked_items
from conrec.evaluation.metrics import SERVED_K, of_window
from conrec.feedback.histories import history_items
from conrec.feedback.targets import Targets, targets
from conrec.policy.curriculum import TrainingWorld
from conrec.ragged import Ragged


@dataclass(frozen=True)
class ValidationMeasure:
    """FHR and FPH at 20 of generated leaves on the validation anchors; sent to the training workers.

    Shape: A anchors in `targets` and `excluded`, their history; leaf_items M rows.
    """

    targets: Targets
    excluded: Ragged
    leaf_items: Ragged

    @classmethod
    def of(cls, world: TrainingWorld) -> ValidationMeasure:
        """The measure of the validation anchors; what may train decides which items of a shared ID come first."""
        events, anchors = world.events, world.validation
        return cls(
            targets(events, anchors),
            history_items(events, anchors),
            leaf_items_by_rejections(world.catalogue.trie, world.history),
        )

    def __call__(self, leaves: np.ndarray) -> dict[str, np.ndarray]:
        """What decides over a GRPO stage, by anchor, of leaves (A, W), best first."""
        ranked = ranked_items(leaves, self.leaf_items, self.excluded, SERVED_K)
        return {name.lower(): values for name, values in of_window(ranked, self.targets).items()}
