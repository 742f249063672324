"""The committed example: its rules, its evaluation anchors, and the figures its README names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from conrec.config import InteractionSettings, ItemSettings, load_settings
from conrec.feedback.anchors import evaluation_anchors, served_anchors, training_anchors, validation_anchors
from conrec.feedback.events import REJECTED, Events, encode_events
from conrec.feedback.labels import read_interactions, read_items
from conrec.feedback.targets import targets

EXAMPLE = Path(__file__).parents[2] / "examples" / "kuairand"
SETTINGS = load_settings(EXAMPLE / "conrec.toml")
RULES, TIMELINE = SETTINGS.interactions.rules, SETTINGS.timeline


@pytest.fixture(scope="module")
def interactions() -> pa.Table:
    return read_interactions(InteractionSettings(path=str(EXAMPLE / "interactions.parquet"), rules=RULES))


@pytest.fixture(scope="module")
def events(interactions: pa.Table) -> Events:
    items = read_items(ItemSettings(path=str(EXAMPLE / "items.parquet")))
    encoded, unknown = encode_events(interactions, items["item_id"], 0.0)
    assert unknown == 0
    return encoded


def test_settings_cut_where_the_published_floors_do():
    assert TIMELINE.cut.isoformat() == "2022-05-01T16:00:00+00:00"


def test_rules_over_raw_signals_give_the_feedback_column(interactions):
    given = read_interactions(InteractionSettings(path=str(EXAMPLE / "interactions.parquet")))
    assert given["feedback"].equals(interactions["feedback"])
    counts = {row["values"]: row["counts"] for row in interactions["feedback"].value_counts().to_pylist()}
    assert counts == {"negative": 64_403, "positive": 72_034, "neutral": 86_432}


def test_items_are_readable():
    items = read_items(ItemSettings(path=str(EXAMPLE / "items.parquet")))
    assert len(items) == 7_583
    assert items["category"].null_count == 0
    assert pc.all(pc.greater(pc.utf8_length(items["text"]), 10)).as_py()


def test_evaluation_anchors_at_the_cut(events):
    anchors = evaluation_anchors(events, TIMELINE)
    assert len(anchors) == 4_380
    assert np.all(anchors.times == TIMELINE.cut_us)
    rejected = np.concatenate(([0], np.cumsum(events.kinds == REJECTED)))
    assert np.mean(rejected[anchors.window_ends] - rejected[anchors.ends]) == pytest.approx(3.2, abs=0.05)
    assert np.mean(rejected[anchors.ends] - rejected[anchors.starts] < 3) == pytest.approx(0.46, abs=0.005)


def test_training_and_validation_anchors_have_targets(events):
    training = events.before(TIMELINE.validation_us)
    anchors = training_anchors(training, TIMELINE)
    assert len(anchors) > 10_000
    wanted = targets(training, anchors)
    assert wanted.next_negative.min() >= 0
    assert wanted.future_negatives.lengths.min() >= 1
    validation = validation_anchors(events, TIMELINE)
    assert len(validation) > 100
    assert events.times[validation.window_ends - 1].max() <= TIMELINE.cut_us


def test_users_whom_a_night_at_the_end_of_the_log_predicts_for(events):
    now, limits = int(events.times.max()), SETTINGS.guardrails
    assert len(served_anchors(events, now, 0, 0)) == len(events.users) == 25_156
    served = served_anchors(events, now, limits.min_negatives, limits.min_history)
    counted = 0
    for user in range(0, 25_156, 50):
        own = slice(events.offsets[user], events.offsets[user + 1])
        rejected, distinct = (events.kinds[own] == REJECTED).sum(), len(set(events.items[own].tolist()))
        counted += (user in served.users) == (rejected >= limits.min_negatives and distinct >= limits.min_history)
    assert counted == 504


def test_example_stays_small_and_carries_its_licence():
    assert sum(file.stat().st_size for file in EXAMPLE.iterdir()) <= 6_000_000
    licence = (EXAMPLE / "LICENSE.md").read_text()
    assert "CC BY-SA 4.0" in licence
    assert "KuaiRand: An" in licence
