"""What is checked before the train stage begins, and before Ray starts: does the log hold enough?"""

from __future__ import annotations

import numpy as np

from conrec.blocklist.calibrate import at_best
from conrec.config import Config
from conrec.feedback.anchors import REJECTED, Events, validation_anchors
from conrec.feedback.enough import measured_likes, require_training, validation_counts
from conrec.policy.tasks import alignment_questions
from conrec.progress import warn
from conrec.stages.inputs import Catalogue, read_events, rejections_in_history
from conrec.stages.train import held_out, unit_categories


def check_training(config: Config) -> None:
    """Prints what the training will lack. Raises `TooLittleDataError` where it could only end in nothing."""
    catalogue = Catalogue.load(config)
    events = read_events(config, catalogue.item_ids)
    require_training(events, config.timeline, len(config.grpo.stages))
    for line in [*alignment_warnings(config, catalogue, events), *theta_warnings(config, events)]:
        warn(line)


def alignment_warnings(config: Config, catalogue: Catalogue, events: Events) -> list[str]:
    """Says when no alignment question is left to train on: the policy is then trained without alignment."""
    settings = config.supervised
    if not settings.alignment_epochs:
        return []
    history = events.before(config.timeline.cut_us)
    questions = alignment_questions(history, catalogue.semantic_ids, unit_categories(catalogue), settings, config.seed)
    held = np.count_nonzero(held_out(questions, config))
    if held < len(questions.answer):
        return []
    rejections = np.count_nonzero(history.kinds == REJECTED)
    return [
        f"no alignment question to train on, so the policy is trained without alignment: {len(questions.answer):,} "
        f"questions from {rejections:,} rejections until timeline.cut, {held:,} of them held out. A question takes "
        f"{settings.alignment_min_rejections} rejections (supervised.alignment_min_rejections) of one "
        f"{settings.alignment_unit} (supervised.alignment_unit) by one user, and items of another semantic ID than the "
        f"rejected one: the catalogue has {len(catalogue.trie):,}; supervised.alignment_holdout = "
        f"{settings.alignment_holdout:g} of the users train none"
    ]


def theta_warnings(config: Config, events: Events) -> list[str]:
    """Says for which users nothing will be predicted, because too few validation anchors can calibrate theta."""
    anchors = validation_anchors(events, config.timeline)
    likes = measured_likes(events, anchors)
    silent = at_best(rejections_in_history(events, anchors), likes, config.calibration).silent()
    if not silent:
        return []
    counts = validation_counts(events, config.timeline)
    return [f"nothing will be predicted for {line}" for line in silent] + [
        f"theta is calibrated on {np.count_nonzero(likes):,} of {len(anchors):,} validation anchors: {counts}. More of "
        "them come from a larger timeline.validation_share or timeline.validation_days, or a smaller "
        "timeline.min_history; fewer are needed with a larger calibration.alpha, or fewer borders in calibration.strata"
    ]
