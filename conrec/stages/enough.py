"""What is checked before the train stage begins, and before Ray starts: does the log hold enough?"""

from __future__ import annotations

from conrec.blocklist.fitting import threshold_warnings
from conrec.feedback.enough import require_training
from conrec.policy.curriculum import alignment_warnings
from conrec.progress import warn
from conrec.stages.artefacts import Artefacts
from conrec.stages.inputs import read_events
from conrec.stages.new_items import load_catalogue


def check_training(run: Artefacts) -> None:
    """Prints what the training will lack. Raises `TooLittleDataError` where it could only end in nothing."""
    config, catalogue = run.config, load_catalogue(run)
    events = read_events(config, catalogue.item_ids, config.timeline.cut_us)
    require_training(events, config.timeline, len(config.grpo.stages))
    for line in [*alignment_warnings(config, catalogue, events), *threshold_warnings(config, events)]:
        warn(line)
