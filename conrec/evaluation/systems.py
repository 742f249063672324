"""The systems of an evaluation that are policies: ours, other people's, and those that lead to ours, by settings alone.

    for variant in (*rivals(settings), *ablations(settings)):
        variant.settings        # the whole settings that this policy is trained with

An id names a row where code speaks of it, and never changes; a name is what people read, and what metrics.json calls
the row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from conrec.config import Config

BEFORE, AFTER, UNPUNISHED = "before", "after", "unpunished"
"""Ids of the policy before GRPO, after it, and of the one whose reward does not mind likes: gamma 0."""
FULL, COUNTED = "full", "counted"
"""Ids of what the night ranks by, the fitted score with what the policy after GRPO says, and of the same score of what
is counted alone."""

NAMES = {
    "tiger": "TIGER",
    "two_tower": "two-tower head",
    "lc_rec_negatives": "LC-Rec, negatives only",
    "lc_rec": "LC-Rec, negatives and positives",
    "next_negative": "next-negative warm-up only",
    "s_dpo": "S-DPO instead of GRPO",
    "unaligned": "translation and warm-up",
    "next_reward": "+ progressive context",
    BEFORE: "before GRPO",
    AFTER: "after GRPO",
    UNPUNISHED: "+ future-negative reward",
    FULL: "CoNRec, full method",
    COUNTED: "CoNRec without the policy",
}
"""Id -> what people read; floors and sequential models are called by their ids."""

ABLATION = (
    ("unaligned", None),
    (BEFORE, "+ alignment"),
    ("next_reward", "+ progressive context"),
    (UNPUNISHED, NAMES[UNPUNISHED]),
    (AFTER, "+ positive penalty"),
    (FULL, "+ score"),
    (COUNTED, "- policy"),
)
"""Ids of rows in order, each with the step that it adds to the row before, or takes from it."""


class Variant(NamedTuple):
    """A policy that differs from the full method by settings alone."""

    id: str
    settings: Config

    @property
    def name(self) -> str:
        """What people read."""
        return NAMES[self.id]


def rivals(config: Config) -> list[Variant]:
    """Generative systems of other people, made of the project's own policy by settings alone."""
    # A history is read again before every rejection in it, so fewer passes: two of them read as many tokens as five do.
    passes = 0.4 * config.supervised.warmup_epochs
    next_only = {"alignment_epochs": 0.0, "warmup_target": "next_negative", "warmup_epochs": passes}
    no_stages: dict[str, Any] = {"stages": ()}
    steps = sum(stage.steps for stage in config.grpo.stages)
    s_dpo = {"name": "s_dpo", "blocks": ("negatives", "positives"), "steps": max(steps, 1), "beta": 1.0}
    return [
        Variant(
            "lc_rec_negatives",
            changed(config, supervised=next_only | {"warmup_blocks": ("negatives",)}, grpo=no_stages),
        ),
        Variant("lc_rec", changed(config, supervised=next_only, grpo=no_stages)),
        Variant(
            "next_negative",
            changed(config, supervised=next_only | {"translation_epochs": 0.0}, grpo=no_stages),
        ),
        Variant(
            "s_dpo",
            # Its best weights stand, better than before or not: when our stages are rejected is no rule of the
            # publication, and a rejected one would be a row of our own policy by the rival's name.
            changed(config, grpo={"stages": ({**s_dpo, "objective": "s_dpo"},), "tolerance": 1.0}),
        ),
    ]


def ablations(config: Config) -> list[Variant]:
    """The steps that lead to the policy before GRPO and from there to the one after it, cumulative."""
    return [
        Variant("unaligned", changed(config, supervised={"alignment_epochs": 0.0}, grpo={"stages": ()})),
        Variant("next_reward", changed(config, grpo={"targets": "next_negative", "gamma": 0.0})),
        Variant(UNPUNISHED, changed(config, grpo={"gamma": 0.0})),
    ]


def changed(config: Config, **sections: Mapping[str, Any]) -> Config:
    """The settings with some of a section's values replaced, checked again."""
    document = config.model_dump()
    for name, values in sections.items():
        document[name] = document[name] | dict(values)
    return Config.model_validate(document)
