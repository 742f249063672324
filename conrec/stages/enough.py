"""What is checked before the train stage begins, and before Ray starts: does the log hold enough?"""

from __future__ import annotations

import numpy as np

from conrec.config import Config
from conrec.feedback.enough import require_training
from conrec.feedback.events import REJECTED, Events
from conrec.policy.tasks import alignment_questions
from conrec.progress import warn
from conrec.stages.artefacts import Artefacts
from conrec.stages.inputs import Catalogue, read_events
from conrec.stages.new_items import load_catalogue
from conrec.stages.scoring import uncalibrated
from conrec.stages.train import held_out, unit_categories


def check_training(run: Artefacts) -> None:
    """Prints what the training will lack. Raises `TooLittleDataError` where it could only end in nothing."""
    config, catalogue = run.config, load_catalogue(run)
    events = read_events(config, catalogue.item_ids, config.timeline.cut_us)
    require_training(events, config.timeline, len(config.grpo.stages))
    for line in [*alignment_warnings(config, catalogue, events), *threshold_warnings(config, events)]:
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


def threshold_warnings(config: Config, events: Events) -> list[str]:
    """Says when nothing will be predicted for anybody, because too few users can calibrate the threshold."""
    silent = uncalibrated(config, events)
    if silent is None:
        return []
    timeline, limits = config.timeline, config.guardrails
    return [
        f"nothing will be predicted: {silent}. They are users with guardrails.min_negatives = {limits.min_negatives} "
        f"rejections and guardrails.min_history = {limits.min_history} items until the validation time, which is "
        f"timeline.validation_days = {timeline.validation_days:g} before timeline.cut, and a like after it; a larger "
        "calibration.alpha needs fewer"
    ]
