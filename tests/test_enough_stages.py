"""Too little to train on or to measure, through the stages and the command: told early, and the night goes on.

Nothing here starts Ray: refusals end before it, and a night that can predict nothing generates nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import ray

from conrec import storage
from conrec.config import Config
from conrec.errors import ConfigError, DataError, TooLittleDataError
from conrec.policy.curriculum import grpo_stages, supervised_tasks
from conrec.policy.model import build_model, save_checkpoint
from conrec.policy.samples import TrainingData
from conrec.progress import console
from conrec.serving.versions import read_pointer
from conrec.settings_text import to_toml
from conrec.stages.artefacts import Artefacts
from conrec.stages.catalogue import make_catalogue
from conrec.stages.enough import check_training
from conrec.stages.evaluate import make_evaluation
from conrec.stages.inputs import blocklists_url
from conrec.stages.new_items import load_catalogue
from conrec.stages.nightly import make_night
from conrec.stages.policies import serving
from conrec.stages.run import run_all, run_stage
from conrec.stages.scoring import scoring
from conrec.stages.systems import load_world, systems
from conrec.stages.train import training_world, upload_folder, write_rows

pytestmark = pytest.mark.long

HOME = Path(__file__).parents[1]
CUT = datetime(2026, 1, 1, tzinfo=UTC)
ITEMS = 40
STAGES = [{"name": "all", "blocks": ["negatives", "positives"], "steps": 1, "beta": 0.1}]
Log = list[tuple[str, float, str, int]]


def log(days: range, users: int = 6, kinds: tuple[str, ...] = ("negative", "positive", "neutral")) -> Log:
    """Three events a day of every user, a rejection, a like and something merely shown."""
    return [
        (f"u{user}", day + hour / 24, kind, (5 * user + 3 * day + hour) % ITEMS)
        for user in range(users)
        for day in days
        for hour, kind in enumerate(kinds)
    ]


EVERYTHING = log(range(-8, 8))
ONCE = [
    (f"u{user}", -5 + hour / 24, kind, user + hour)
    for user in range(6)
    for hour, kind in enumerate(("negative", "positive"))
]


def world(folder: Path, rows: Log = EVERYTHING, embeddings: np.ndarray | None = None, **sections: Any) -> Config:
    """A log and settings below a folder, with the catalogue stage done for real."""
    vectors = np.random.default_rng(0).normal(size=(ITEMS, 4)) if embeddings is None else embeddings
    ids = [f"i{item:02}" for item in range(len(vectors))]
    items = {"item_id": ids, "text": [f"item {item}" for item in range(len(ids))]}
    items["embedding"] = pa.array(vectors.tolist(), pa.list_(pa.float32()))
    storage.write_table(pa.table(items), f"{folder}/items.parquet")
    users, days, kinds, places = zip(*rows, strict=True)
    interactions = {
        "user_id": list(users),
        "item_id": [ids[place % len(ids)] for place in places],
        "timestamp": pa.array([CUT + timedelta(days=day) for day in days], pa.timestamp("us", "UTC")),
        "feedback": list(kinds),
    }
    storage.write_table(pa.table(interactions), f"{folder}/interactions.parquet")
    base: dict[str, Any] = {
        "root": f"{folder}/root",
        "interactions": {"path": f"{folder}/interactions.parquet"},
        "items": {"path": f"{folder}/items.parquet"},
        "timeline": {
            "cut": CUT,
            "horizon_days": 2,
            "validation_days": 2,
            "validation_share": 0.5,
            "min_history": 2,
        },
        "embedding": {"sources": ["column"]},
        "quantizer": {"levels": 2, "codes": 4, "iterations": 3},
        "model": {"hidden_size": 32, "layers": 1, "heads": 1, "intermediate_size": 32},
        "grpo": {"stages": []},
        "generate": {"engine": "torch", "beam_width": 4},
        "guardrails": {"max_catalogue_share": 1.0},
        "calibration": {"alpha": 0.5, "strata": []},
        "publish": {"buckets": 1},
        "evaluation": {"resamples": 10},
    }
    for name, section in sections.items():
        base[name] = base.get(name, {}) | section
    config = Config.model_validate(base)
    artefact = Artefacts(config)["catalogue"]
    artefact.finish(make_catalogue(Artefacts(config), artefact), 0.0)
    return config


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Config]:
    """`world` in a folder of the test's own."""
    return partial(world, tmp_path)


def untrained(config: Config) -> Config:
    """A policy as it is built, in the two places where later stages look for a trained one."""
    model, tokenizer, _ = build_model(config, load_catalogue(Artefacts(config)).items["text"].to_pylist())
    figures = {"training_seconds": {"supervised": 1.0}, "parameters": 1, "stages": []}
    figures |= {"alignment_accuracy": {}, "verdict_auc": {}}
    for artefact in (Artefacts(config)["policy"], Artefacts(config)["validated"]):
        for folder in ("checkpoint", "supervised"):
            upload_folder(lambda local: save_checkpoint(model, tokenizer, local), artefact.path(folder))
        write_rows([{"phase": "warm_up", "step": 1, "loss": 1.0}], artefact)
        artefact.finish(figures | {"alignment_questions": 1}, 1.0)
    return config


def conrec(config: Config, command: str, *arguments: str) -> tuple[int, str, str]:
    """The real command as a process: exit code, standard output, standard error."""
    file = Path(config.root).parent / "settings.toml"
    file.write_text(to_toml(config))
    done = subprocess.run(
        [sys.executable, "-m", "conrec.cli", command, "--config", str(file), *arguments],
        cwd=HOME,
        env=os.environ | {"RAY_ADDRESS": "127.0.0.1:1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    return done.returncode, done.stdout, done.stderr


def printed(call: Any, *arguments: Any) -> str:
    with console.capture() as capture:
        call(*arguments)
    return capture.get()


def artefacts(config: Config) -> set[str]:
    """Kinds of artefacts below the root, and logs."""
    return {path.name for path in Path(config.root).iterdir()}


# ---- training ----


def tonight(config: Config) -> dict[str, Any]:
    run = serving(Artefacts(config))
    return make_night(run, run["nightly"])


def evaluation(config: Config) -> dict[str, Any]:
    run = serving(Artefacts(config), same_cut=True)
    return make_evaluation(run, run["evaluation"])


def test_the_command_refuses_to_train_without_a_rejection_before_ray_starts(make):
    """Ray's address leads nowhere: to look for it would take minutes."""
    config = make(log(range(-5, 5), kinds=("positive", "neutral")) + log(range(1, 5)))
    code, _, errors = conrec(config, "train")
    assert code == 2 and errors.count("\n") == 1 and "no rejection until timeline.cut = 2026-01-01" in errors
    assert artefacts(config) == {"catalogue", "inputs", "logs"}


def test_a_cut_before_the_whole_log_is_told_with_the_remedy(make):
    """Of such a log nothing is read."""
    with pytest.raises(TooLittleDataError, match=r"no event until then\. Move timeline\.cut"):
        check_training(Artefacts(make(log(range(1, 8)))))


def test_stages_over_which_nothing_decides_are_refused_before_ray_starts(make):
    config = make(timeline={"validation_share": 1e-9}, grpo={"stages": STAGES})
    with pytest.raises(TooLittleDataError, match="0 of 6 users are validation users"):
        run_stage("train", config)
    assert artefacts(config) == {"catalogue", "inputs", "logs"} and not ray.is_initialized()


@pytest.mark.parametrize(
    ("changed", "counts"),
    [
        ({"calibration": {"alpha": 0.01}}, "validation users with a later like, and calibration.alpha = 0.01 needs 99"),
        ({"guardrails": {"min_negatives": 1000}}, "0 validation users with a later like"),
        ({"guardrails": {"min_history": 1000}}, "guardrails.min_history = 1000 items until the validation time"),
        # Nobody has five items by then.
        ({"timeline": {"validation_days": 7.5}}, "timeline.validation_days = 7.5 before timeline.cut"),
    ],
)
def test_without_users_to_calibrate_on_the_training_says_that_nothing_will_be_predicted(make, changed, counts):
    said = " ".join(printed(check_training, Artefacts(make(**changed))).split())
    assert "nothing will be predicted: " in said and counts in said
    assert "predicted" not in printed(check_training, Artefacts(make()))


@pytest.mark.parametrize(
    ("rows", "changed", "counts"),
    [
        (ONCE, {}, "0 questions from 6 rejections until timeline.cut, 0 of them held out"),
        (EVERYTHING, {"embeddings": np.ones((ITEMS, 4))}, "the catalogue has 1;"),
        (EVERYTHING, {"embeddings": np.ones((1, 4))}, "the catalogue has 1;"),
        (EVERYTHING, {"supervised": {"alignment_holdout": 1.0}}, "supervised.alignment_holdout = 1 of the users"),
    ],
    ids=["every user rejected once", "one semantic ID", "one item", "all held out"],
)
def test_without_alignment_questions_the_policy_is_trained_without_alignment(make, rows, changed, counts):
    config = make(rows, **changed)
    said = printed(check_training, Artefacts(config))
    assert "trained without alignment" in said and counts in said
    run = Artefacts(config)
    for of, decided_by in ((run, None), (run.earlier, config.timeline)):
        world = training_world(of, decided_by)
        tasks = supervised_tasks(config, world)
        assert set(tasks) == {"translation", "warm_up"}
        url = f"{config.root}/data"
        world.data(tasks=tasks).save(url)
        assert set(TrainingData.load(url).tasks) == set(tasks)


def test_without_passes_over_alignment_nothing_is_said_of_it_and_it_is_no_obstacle(make):
    config = make(ONCE, supervised={"alignment_epochs": 0.0})
    assert "alignment" not in printed(check_training, Artefacts(config))
    world = training_world(Artefacts(config))
    world.data(tasks=supervised_tasks(config, world)).save(f"{config.root}/data")


def test_supervised_training_without_an_example_is_refused_before_anything_is_written(make):
    nothing = dict.fromkeys(("translation_epochs", "alignment_epochs", "warmup_epochs"), 0.0)
    only_alignment = nothing | {"alignment_epochs": 1.0}
    # Nobody did anything before their first rejection: there is no prompt.
    no_prompt = nothing | {"warmup_epochs": 1.0, "warmup_target": "next_negative"}
    for rows, supervised in ((EVERYTHING, nothing), (ONCE, only_alignment), (ONCE[::2], no_prompt)):
        config = make(rows, supervised=supervised)
        with pytest.raises(TooLittleDataError, match=r"supervised\.translation_epochs = 0"):
            supervised_tasks(config, training_world(Artefacts(config)))
        assert "policy" not in artefacts(config)


def test_a_stage_without_samples_is_named_with_its_counts(make):
    """Everybody likes something, then rejects for the first time: no history of rejections to ask from."""
    rows = [(user, day, "positive" if kind == "negative" else "negative", item) for user, day, kind, item in ONCE]
    stage = {"name": "mine", "blocks": ["negatives"], "steps": 1, "beta": 0.1}
    config = make(rows, grpo={"stages": [stage]})
    with pytest.raises(TooLittleDataError, match=r"stage 'mine'.* of 6 training anchors 6 have .* 0 a history"):
        grpo_stages(config, training_world(Artefacts(config)))


# ---- the threshold, and the night without one ----


def test_a_score_that_nobody_could_be_fitted_on_trains_no_policy(make):
    """The twin of the policy is not asked for, and the calibration says why nothing will be predicted."""
    config = make(guardrails={"min_negatives": 1000})
    found = scoring(Artefacts(config))
    assert found.calibration.overall.threshold is None and found.calibration.overall.calibrated_on == 0
    assert found.calibration.silent().startswith("0 validation users with a later like")
    assert found.score.judged is None and np.isinf(found.calibration.thresholds(np.arange(3))).all()
    assert artefacts(config) == {"catalogue", "calibration", "inputs"}


def test_a_threshold_of_too_few_users_is_none_though_the_score_is_fitted(make):
    found = scoring(Artefacts(untrained(make(calibration={"alpha": 0.01, "strata": [3]}))))
    assert found.calibration.overall.threshold is None and 0 < found.calibration.overall.calibrated_on < 99
    assert [stratum.threshold for stratum in found.calibration.strata] == [None, None]
    assert any(found.score.counted.odds.weights.values()) and found.score.judged is not None


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"timeline": {"validation_days": 7.5}}, "0 validation users with a later like"),
        ({"calibration": {"alpha": 0.01, "strata": []}}, "and calibration.alpha = 0.01 needs 99"),
        ({"guardrails": {"min_negatives": 1000}}, "none of 6 users has guardrails.min_negatives = 1000 rejections"),
    ],
    ids=["nobody to calibrate on", "too few of them", "nobody rejected enough"],
)
def test_a_night_that_can_predict_nothing_publishes_what_users_rejected_and_says_why(make, changed, reason):
    config = untrained(make(**changed))
    figures: dict[str, Any] = {}
    said = printed(lambda: figures.update(tonight(config)))
    assert "nothing is predicted tonight" in said and reason in said
    assert figures["users"] == figures["generated"] == 0
    published = figures["published"]
    assert published["explicit"] == published["rows"] > 0 and published["users"] == 6
    pointer = read_pointer(blocklists_url(config), "current")
    assert pointer is not None and pointer["version"] == figures["version"]
    table = storage.read_table(f"{blocklists_url(config)}/versions/{figures['version']}/data")
    assert pc.unique(table["reason"]).to_pylist() == ["explicit"]


def test_a_catalogue_share_of_less_than_an_item_is_refused_before_the_night_generates(make):
    """Today's default of 5 % on 12 items: every list was empty, and the night a success."""
    embeddings = np.random.default_rng(0).normal(size=(12, 4))
    config = untrained(make(embeddings=embeddings, guardrails={"max_catalogue_share": 0.05}))
    with pytest.raises(ConfigError, match=r"max_catalogue_share = 0\.05 of 12 items .* write 0\.09 or more"):
        tonight(config)
    assert not {"nightly", "blocklists"} & artefacts(config)


# ---- evaluation ----


@pytest.mark.parametrize(
    ("rows", "changed", "reason"),
    [
        (log(range(-8, -1)), {}, "the log ends before the first window does"),
        (EVERYTHING, {"timeline": {"horizon_days": 9}}, "timeline.horizon_days = 9 after timeline.cut"),
        (EVERYTHING, {"timeline": {"min_history": 100}}, "of 6 users 0 have 100 distinct items"),
    ],
    ids=["cut after the log", "horizon beyond the log", "nobody has a history"],
)
def test_without_anything_to_measure_the_evaluation_ends_before_it_writes(make, rows, changed, reason):
    config = untrained(make(rows, **changed))
    before = artefacts(config)
    with pytest.raises(TooLittleDataError, match=reason):
        evaluation(config)
    assert artefacts(config) == before


def test_windows_that_end_in_a_quiet_hour_of_a_log_that_goes_on_are_whole(make):
    """What comes after the last whole window is not read; that it comes says that the window is whole."""
    quiet = [row for row in EVERYTHING if not 5.5 < row[1] <= 6]
    config = untrained(make(quiet))
    world = load_world(Artefacts(config))
    times = [(CUT + timedelta(days=day)).timestamp() * 1e6 for day in (0, 2, 4)]
    assert sorted(set(world.anchors.times.tolist())) == times


def test_a_horizon_beyond_the_log_is_told_with_where_the_log_ends(make):
    config = untrained(make(timeline={"horizon_days": 9}))
    with pytest.raises(TooLittleDataError, match=r"to 2026-01-08T02:00:00Z.* timeline\.horizon_days = 7\.08 or less"):
        load_world(Artefacts(config))


def test_the_command_ends_with_code_2_and_one_message_where_nothing_can_be_measured(make):
    code, _, errors = conrec(untrained(make(log(range(-8, -1)))), "evaluate")
    assert code == 2 and errors.count("\n") == 1 and errors.startswith("nothing to evaluate")


def test_systems_that_cannot_be_tuned_are_refused_before_the_first_is_fitted(make):
    config = untrained(make(timeline={"validation_share": 1e-9}, evaluation={"systems": "all"}))
    before = artefacts(config)
    with pytest.raises(TooLittleDataError, match=r'evaluation\.systems = "ours"'):
        evaluation(config)
    assert artefacts(config) == before


def test_a_run_without_anything_to_measure_goes_on_to_the_night_and_its_summary(make):
    """The night is complete already, so that nothing starts Ray; the run must reach it, and the summary after it."""
    config = untrained(make(log(range(-8, -1)), calibration={"alpha": 0.01}))
    artefact = serving(Artefacts(config))["nightly"]
    artefact.finish(make_night(serving(Artefacts(config)), artefact), 1.0)
    said = printed(run_all, config, "my.toml")
    for part in (
        "not evaluated: nothing to evaluate",
        "nightly",
        "is complete",
        "Tonight",
        "none: nothing was evaluated",
    ):
        assert part in said
    assert said.index("not evaluated") < said.index("nightly")
    assert "Evaluation at" not in said
    # Alone, the stage is an error as any other.
    with pytest.raises(DataError, match="nothing to evaluate"):
        run_stage("evaluate", config)


@pytest.mark.parametrize(
    "changed",
    [
        {
            "rows": log(range(-8, 0), users=1) + log(range(8), users=1, kinds=("negative",)),
            "embeddings": np.ones((12, 4)),
        },
        {"score": {"reach": 3.0}, "guardrails": {"max_catalogue_share": 1.0, "max_user_share": 0.5}},
        {"supervised": {"warmup_target": "next_negative"}},
    ],
    ids=["one user, one semantic ID, no later like", "a long reach, items held back", "a policy without a verdict"],
)
def test_small_worlds_are_evaluated_to_the_end(make, changed):
    config = untrained(make(**changed))
    run = serving(Artefacts(config), same_cut=True)
    artefact = run["evaluation"]
    said = printed(make_evaluation, run, artefact)
    document = json.loads(storage.read_bytes(artefact.path("metrics.json")))
    judged = config.supervised.warmup_target == "events"
    for spec in systems(run)[-2:]:
        (row,) = spec.rows(None).values()
        verdicts = (row.answer.verdicts, row.answer.candidate_verdicts)
        assert [part is not None for part in verdicts] == [judged] * 2, spec.id
        assert not judged or row.answer.verdicts.shape == row.answer.leaves.shape
    full = document["systems"][document["ours"]]["figures"]
    assert document["about"]["anchors"] > 0 and full["FHR"]["value"] is not None
    assert (full["FPH"]["value"] is None) == ("evaluation anchors has a like" in said)
