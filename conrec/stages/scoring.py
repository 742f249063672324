"""The score and its thresholds as an artefact of their own, which the first to ask for it makes.

Another `calibration.alpha`, or a limit of `[guardrails]` that does not decide whom a night serves, asks no policy: the
thresholds are cut anew from the answers that an earlier calibration of the same questions left.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

from conrec import storage
from conrec.artefact import Artefact
from conrec.blocklist.asking import Policy
from conrec.blocklist.calibrate import Calibration
from conrec.blocklist.counts import counting
from conrec.blocklist.engines import TorchEngine
from conrec.blocklist.fitting import FITTED_USERS, Fitting, Scoring
from conrec.blocklist.ranking import Answers
from conrec.blocklist.score import Score
from conrec.config import GuardrailSettings
from conrec.errors import ArtefactError, DataError
from conrec.feedback.log import drawn
from conrec.stages.artefacts import Artefacts, intact, leaves
from conrec.stages.inputs import read_log
from conrec.stages.new_items import load_catalogue
from conrec.stages.train import make_earlier_catalogue, validated


def scoring(run: Artefacts) -> Scoring:
    """The score and the thresholds for what these settings serve, read or made. The policy must be trained."""
    artefact = run["calibration"]
    if artefact.read() is None:
        began = time.perf_counter()
        made, answers = _fit(run)
        storage.write_json(artefact.path("score.json"), made.score.to_json())
        storage.write_json(artefact.path("calibration.json"), made.calibration.to_json())
        storage.write_json(artefact.path("everybody.json"), made.everybody.to_json())
        storage.write_table(answers.to_arrow(), artefact.path("asked.parquet"))
        artefact.finish({"threshold": made.calibration.overall.threshold}, time.perf_counter() - began)
    return Scoring(
        Score.from_json(storage.read_json(artefact.path("score.json"))),
        Calibration.from_json(storage.read_json(artefact.path("calibration.json"))),
        Calibration.from_json(storage.read_json(artefact.path("everybody.json"))),
    )


def calibrating_answers(run: Artefacts) -> Answers:
    """What the policy generated for the users that calibrated, second of `Fitting.asked_rows`; after `scoring`."""
    return Answers.from_arrow(storage.read_table(run["calibration"].path("asked.parquet")))


def _fit(run: Artefacts) -> tuple[Scoring, Answers]:
    fitting = load_fitting(run)
    if not len(fitting.served):
        return fitting.of_nobody(), Answers.nothing(0)
    if (before := _asked_before(run, len(fitting.asked_rows()[1]))) is not None:
        score, answers = before
        return fitting.cut(score, answers), answers
    validated(run)
    with storage.local_folder(run["validated"].path("checkpoint")) as folder:
        engine = TorchEngine.load(folder, fitting.catalogue.trie)
    return fitting.fit(Policy(engine, fitting.catalogue, fitting.events, run.config))


def _asked_before(run: Artefacts, users: int) -> tuple[Score, Answers] | None:
    """What a finished calibration that asked the same users the same left, whole; None where none did."""
    artefact = run["calibration"]
    for one, _ in intact(run.config.root, artefact.stage):
        if one.inputs != artefact.inputs or _asks(one) != _asks(artefact):
            continue
        with contextlib.suppress(ArtefactError, DataError):  # damaged, or gone: the policy is asked
            for name in ("score.json", "asked.parquet"):
                one.verify(name)
            score = Score.from_json(storage.read_json(one.path("score.json")))
            answers = Answers.from_arrow(storage.read_table(one.path("asked.parquet")))
            if len(answers.leaves) == users:
                return score, answers
    return None


def _asks(artefact: Artefact) -> dict[str, Any]:
    """The settings of a calibration that decide what its policy is asked, and the score."""
    cuts = {
        "calibration.alpha",
        "calibration.strata",
        *(f"guardrails.{name}" for name in GuardrailSettings.model_fields),
    }
    cuts -= {"guardrails.min_negatives", "guardrails.min_history"}  # whom a night serves
    return {path: value for path, value in leaves(artefact.settings).items() if path not in cuts}


def load_fitting(run: Artefacts) -> Fitting:
    """Reads the earlier catalogue, fitted where it is not yet, and the events until the cut, of a sample of users."""
    make_earlier_catalogue(run)
    catalogue = load_catalogue(run.earlier, run.config.timeline.cut_us)
    log = read_log(run.config, catalogue.item_ids, run.config.publish.buckets, run.config.timeline.cut_us)
    events = drawn(log, sum(len(bucket.users) for bucket in log), FITTED_USERS, run.config.seed)
    return Fitting.of(run.config, catalogue, events, log, counting(log.events))
