"""What is checked before the train stage begins, and before Ray starts: does the log hold enough?"""

from __future__ import annotations

import numpy as np

from conrec.blocklist.fitting import threshold_warnings
from conrec.catalogue.items import Catalogue, unit_categories
from conrec.config import Config
from conrec.feedback.anchors import REJECTED, Events
from conrec.feedback.enough import require_training
from conrec.policy.tasks import alignment_questions
from conrec.progress import warn
from conrec.stages.artefacts import Artefacts
from conrec.stages.inputs import read_events
from conrec.stages.new_items import load_catalogue
from conrec.stages.train import held_out


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
