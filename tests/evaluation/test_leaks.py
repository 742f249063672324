"""Planted leaks: each must be refused by the checks, or change nothing in what the stages fit.

30 users meet items 0 to 13 in the two weeks before the cut and in the two weeks after it. The plant: after the cut
everybody rejects items 14 and 15, which nobody met before, and item 0 again and again, so that whoever reads it gets
other neighbours, other embeddings, other popular items and other rejections to learn from.
"""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from worlds import CODES, LEVELS, SEMANTIC_IDS, TRIE, tiny_config

from conrec import storage
from conrec.catalogue.codebook import Codebook
from conrec.config import Config, EmbeddingSettings, InteractionSettings, SwingSettings
from conrec.errors import DataError
from conrec.evaluation.baselines import Histories, fit_floors
from conrec.evaluation.leaks import check_no_leak, check_training_anchors
from conrec.evaluation.sequential import KINDS as SEQUENTIAL_KINDS
from conrec.evaluation.sequential import tune_sequential
from conrec.evaluation.tiger import tune_tiger
from conrec.evaluation.tuning import Trial
from conrec.evaluation.validation import ValidationMeasure
from conrec.feedback.anchors import Anchors, evaluation_anchors, training_anchors, validation_anchors
from conrec.feedback.events import LIKED, REJECTED, Events, encode_events
from conrec.feedback.swing import swing_neighbours
from conrec.feedback.targets import Targets, targets
from conrec.policy.curriculum import grpo_stages, supervised_tasks
from conrec.policy.samples import TrainingData
from conrec.ragged import Ragged
from conrec.stages.artefacts import Artefacts
from conrec.stages.catalogue import item_embeddings
from conrec.stages.train import training_world
from conrec.tables import KINDS

CUT = datetime(2026, 1, 1, tzinfo=UTC)
ITEMS = len(SEMANTIC_IDS)
USERS = 30
ITEM_IDS = pa.array([f"i{item:02}" for item in range(ITEMS)])
SWING = SwingSettings(min_support=1)
Row = tuple[str, float, int, int]


def config(**sections) -> Config:
    settings = tiny_config(
        timeline={"cut": CUT, "min_history": 3, "validation_share": 0.5},
        supervised={"alignment_epochs": 1, "alignment_min_rejections": 1},
        **sections,
    )
    return settings.model_copy(update={"swing": SWING})


TIMELINE = config().timeline


def log() -> list[Row]:
    """(user, days after the cut, kind, item row) of both fortnights, without the plant."""
    random = np.random.default_rng(0)
    rows = []
    for user in range(USERS):
        for day in (*range(-14, 0), *range(15)):
            rows.append(
                (f"u{user:02}", day + 0.1 + 0.8 * random.random(), int(random.integers(3)), int(random.integers(14)))
            )
    return rows


def plant(day: float) -> list[Row]:
    return [
        (f"u{user:02}", day + place / 100, REJECTED, item)
        for user in range(USERS)
        for place, item in enumerate((14, 15, 0, 0, 0))
    ]


def as_table(rows: list[Row]) -> pa.Table:
    users, days, kinds, items = zip(*rows, strict=True)
    return pa.table(
        {
            "user_id": list(users),
            "item_id": ITEM_IDS.take(pa.array(items)),
            "timestamp": pa.array([CUT + timedelta(days=day) for day in days], pa.timestamp("us", "UTC")),
            "feedback": [KINDS[kind] for kind in kinds],
        }
    )


def as_events(rows: list[Row]) -> Events:
    return encode_events(as_table(rows), ITEM_IDS, 0.0)[0]


def past(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row[1] <= 0]


def leaves(thing) -> list[np.ndarray]:
    """All arrays inside dataclasses and mappings, in order."""
    if isinstance(thing, np.ndarray):
        return [thing]
    if isinstance(thing, dict):
        return [array for key in sorted(thing) for array in leaves(thing[key])]
    if dataclasses.is_dataclass(thing):
        return [array for field in dataclasses.fields(thing) for array in leaves(getattr(thing, field.name))]
    return [np.array(thing)]


def same(one, other) -> bool:
    pairs = list(zip(leaves(one), leaves(other), strict=True))
    assert pairs
    return all(np.array_equal(first, second) for first, second in pairs)


# The checks


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """What the evaluate stage has in hand, sound as it stands; tests replace one part."""

    events: Events
    anchors: Anchors
    wanted: Targets
    histories: Histories
    training: Events

    def check(self, **replaced) -> None:
        parts = dataclasses.replace(self, **replaced)
        check_no_leak(parts.events, parts.anchors, parts.wanted, parts.histories, parts.training, TIMELINE.cut_us)


@pytest.fixture(scope="module")
def sound() -> Evaluated:
    events = as_events(log())
    anchors = evaluation_anchors(events, TIMELINE)
    return Evaluated(
        events, anchors, targets(events, anchors), Histories.at(events, anchors), events.before(TIMELINE.cut_us)
    )


def shifted(anchors: Anchors, row: int, **by: int) -> Anchors:
    """The anchors with some ends of one row moved."""
    arrays = {name: getattr(anchors, name).copy() for name in by}
    for name, step in by.items():
        arrays[name][row] += step
    return dataclasses.replace(anchors, **arrays)


def added_to_history(histories: Histories, row: int, item: int, kind: int) -> Histories:
    place = histories.items.offsets[row + 1]
    offsets = histories.items.offsets + (np.arange(len(histories) + 1) > row)
    items = Ragged(np.insert(histories.items.values, place, item), offsets)
    return Histories(histories.users, items, np.insert(histories.kinds, place, kind))


def name_of(sound: Evaluated, place: int) -> str:
    """How an error names an event."""
    events = sound.events
    user = events.users[int(events.rows[place])]
    when = np.datetime64(int(events.times[place]), "us")
    return f"^user {user}, item row {events.items[place]} .{KINDS[events.kinds[place]]}. at {when}Z: "


def test_a_sound_evaluation_passes(sound: Evaluated) -> None:
    assert len(sound.anchors) > 20
    assert len(np.unique(sound.anchors.times)) == 2
    sound.check()


def test_a_target_in_the_history(sound: Evaluated) -> None:
    """The next rejection of one anchor among 40, at the end of what the system is shown."""
    history = sound.histories
    # Items that are also rejected before are no planted leak by name alone: see the next test.
    seen = [set(history.items[row]) for row in range(len(history))]
    row = next(row for row in range(len(history)) if sound.wanted.next_negative[row] not in seen[row])
    item = sound.wanted.next_negative[row]
    ends = sound.anchors.ends[row]
    place = ends + np.flatnonzero((sound.events.items[ends:] == item) & (sound.events.kinds[ends:] == REJECTED))[0]
    with pytest.raises(DataError, match=name_of(sound, place) + "it is in the history of the anchor at 20"):
        sound.check(histories=added_to_history(history, row, item, REJECTED))
    # As something merely shown it tells as much.
    with pytest.raises(DataError, match=f"item row {item} .neutral.*in the history"):
        sound.check(histories=added_to_history(history, row, item, 2))


def test_an_item_rejected_before_and_again_is_in_both_rightly_but_not_twice_in_the_history() -> None:
    rows = [
        ("u", -3, LIKED, 1),
        ("u", -2, REJECTED, 2),
        ("u", -1, REJECTED, 3),
        ("u", 1, REJECTED, 2),
        ("v", 14, LIKED, 1),
    ]
    events = as_events(rows)
    anchors = evaluation_anchors(events, TIMELINE)
    again = Evaluated(
        events, anchors, targets(events, anchors), Histories.at(events, anchors), events.before(TIMELINE.cut_us)
    )
    assert again.wanted.next_negative.tolist() == [2]
    again.check()
    with pytest.raises(DataError, match=r"user u, item row 2 \(negative\) at 2026-01-02.*is in the history"):
        again.check(histories=added_to_history(again.histories, 0, 2, REJECTED))


def test_an_event_that_never_happened_in_the_history(sound: Evaluated) -> None:
    with pytest.raises(DataError, match=r"item row 15 \(positive\), which never happened"):
        sound.check(histories=added_to_history(sound.histories, 3, 15, LIKED))


def test_a_shorter_history_is_no_leak(sound: Evaluated) -> None:
    early = Histories.at(sound.events, dataclasses.replace(sound.anchors, ends=sound.anchors.ends - 2))
    sound.check(histories=early)


def test_a_history_range_that_ends_too_late(sound: Evaluated) -> None:
    leaky = shifted(sound.anchors, 5, ends=1)
    with pytest.raises(DataError, match=name_of(sound, sound.anchors.ends[5]) + "it is in the history of the anchor"):
        sound.check(anchors=leaky, histories=Histories.at(sound.events, leaky), wanted=targets(sound.events, leaky))


def test_a_window_that_begins_too_early(sound: Evaluated) -> None:
    leaky = shifted(sound.anchors, 5, ends=-1)
    with pytest.raises(
        DataError, match=name_of(sound, sound.anchors.ends[5] - 1) + "it is in the window of the anchor"
    ):
        sound.check(anchors=leaky, histories=Histories.at(sound.events, leaky), wanted=targets(sound.events, leaky))


@pytest.mark.parametrize(("name", "step"), [("starts", -1), ("window_ends", 100), ("window_ends", -100)])
def test_a_range_with_events_of_another_user(sound: Evaluated, name: str, step: int) -> None:
    with pytest.raises(DataError, match=r"user u05: .*reads events of another user"):
        sound.check(anchors=shifted(sound.anchors, int(np.argmax(sound.anchors.users == 5)), **{name: step}))


def test_histories_in_another_order(sound: Evaluated) -> None:
    with pytest.raises(DataError, match="another user's"):
        sound.check(histories=dataclasses.replace(sound.histories, users=sound.histories.users[::-1]))


def test_training_that_reads_past_the_cut(sound: Evaluated) -> None:
    first = np.flatnonzero(sound.events.times > TIMELINE.cut_us)
    earliest = sound.events.times[first].min()
    place = int(first[sound.events.times[first] == earliest][0])
    with pytest.raises(DataError, match=name_of(sound, place) + "training reads it, but the cut is at 2026-01-01T00"):
        sound.check(training=sound.events.before(int(earliest)))


def test_anchors_before_the_cut(sound: Evaluated) -> None:
    anchors = validation_anchors(sound.events, TIMELINE)
    with pytest.raises(
        DataError, match=r"^user u\d\d: the anchor at 2025-12-30.*before the training cut at 2026-01-01"
    ):
        sound.check(
            anchors=anchors, wanted=targets(sound.events, anchors), histories=Histories.at(sound.events, anchors)
        )


@pytest.mark.parametrize("name", ["future_negatives", "future_positives"])
def test_targets_that_are_not_from_the_window(sound: Evaluated, name: str) -> None:
    """The targets of the whole future, of which the window is the first week."""
    stop = sound.events.offsets[sound.anchors.users + 1]
    whole = targets(sound.events, dataclasses.replace(sound.anchors, window_ends=stop))
    kind = KINDS[REJECTED if name == "future_negatives" else LIKED]
    with pytest.raises(DataError, match=rf"^user u\d\d, item row \d+ is among {name} .* was not {kind} in its window"):
        sound.check(wanted=dataclasses.replace(sound.wanted, **{name: getattr(whole, name)}))


def test_targets_of_the_other_kind_or_of_the_past(sound: Evaluated) -> None:
    swapped = dataclasses.replace(sound.wanted, future_positives=sound.wanted.future_negatives)
    with pytest.raises(DataError, match=r"among future_positives .* was not positive"):
        sound.check(wanted=swapped)
    next_negative = sound.wanted.next_negative.copy()
    next_negative[4] = 15
    with pytest.raises(DataError, match=r"item row 15 is among next_negative .* was not negative"):
        sound.check(wanted=dataclasses.replace(sound.wanted, next_negative=next_negative))


def test_rows_that_do_not_belong_together(sound: Evaluated) -> None:
    with pytest.raises(ValueError, match=r"histories has 3 rows for \d+ anchors"):
        sound.check(histories=sound.histories.block(0, 3))
    with pytest.raises(ValueError, match=r"targets.future_positives has 2 rows"):
        sound.check(
            wanted=dataclasses.replace(sound.wanted, future_positives=sound.wanted.future_positives.take(np.arange(2)))
        )


def test_training_anchors_are_sound_and_a_window_past_the_cut_is_refused() -> None:
    events = as_events(log())
    history = events.before(TIMELINE.cut_us)
    check_training_anchors(history, training_anchors(history, TIMELINE), TIMELINE.cut_us)
    # The stage's function clips windows at the cut even when it is given all events ...
    check_training_anchors(events, training_anchors(events, TIMELINE), TIMELINE.cut_us)
    # ... and a later cut for the windows than for the rest is seen.
    later = TIMELINE.model_copy(update={"cut": CUT + timedelta(hours=30)})
    with pytest.raises(
        DataError, match=r"^user u\d\d, item row \d+ .* at 2026-01-0[12]T.*window that reaches past the cut"
    ):
        check_training_anchors(events, training_anchors(events, later), TIMELINE.cut_us)


def test_a_training_history_that_holds_its_own_target_is_refused() -> None:
    history = as_events(past(log()))
    anchors = training_anchors(history, TIMELINE)
    with pytest.raises(DataError, match="it is in the history of the anchor"):
        check_training_anchors(history, shifted(anchors, 7, ends=1), TIMELINE.cut_us)


def test_nothing_at_all_is_sound() -> None:
    events = as_events(log())
    none = evaluation_anchors(events, TIMELINE).take(np.zeros(0, np.int64))
    empty = events.where(np.zeros(len(events), bool))
    check_no_leak(events, none, targets(events, none), Histories.at(events, none), empty, TIMELINE.cut_us)
    check_training_anchors(empty, none, TIMELINE.cut_us)


# What the stages fit: the same with the plant and without; and not the same once the plant lies before the cut


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory):
    """Rows -> all that training reads, by the functions of the stage, from files as it reads them."""
    folder = tmp_path_factory.mktemp("train")
    base = config(root=str(folder / "root"), items={"path": str(folder / "items.parquet")})
    items = pa.table({"item_id": ITEM_IDS, "text": [f"item {item}" for item in range(ITEMS)]})
    storage.write_table(items, base.items.path)

    def run(rows: list[Row], deciding: bool = False) -> tuple[TrainingData, dict, ValidationMeasure]:
        """`deciding`: the training until the validation time, whose days until the cut decide over the stages."""
        path = str(folder / f"{len(list(folder.iterdir()))}.parquet")
        storage.write_table(as_table(rows), path)
        settings = base.model_copy(update={"interactions": InteractionSettings(path=path)})
        artefact = Artefacts(settings)["catalogue"]
        semantic_ids = SEMANTIC_IDS.copy()
        semantic_ids[15] = semantic_ids[1]  # shared, so that popularity decides which of the two comes first
        column = Ragged.from_lengths(semantic_ids.ravel(), np.full(ITEMS, LEVELS)).to_arrow()
        storage.write_table(items.append_column("semantic_id", column), artefact.path("items.parquet"))
        codewords = np.random.default_rng(0).normal(size=(LEVELS, CODES, 4)).astype(np.float32)
        Codebook(codewords, np.zeros(4, np.float32)).save(artefact.path("codebook.safetensors"))
        artefact.finish({}, 0.0)
        of = Artefacts(settings).earlier if deciding else Artefacts(settings)
        world = training_world(of, TIMELINE if deciding else None)
        timeline, settings = of.config.timeline, of.config
        check_training_anchors(world.history, training_anchors(world.history, timeline), timeline.cut_us)
        stages, figures = grpo_stages(settings, world)
        data = world.data(supervised_tasks(settings, world), stages)
        return data, figures, ValidationMeasure.of(world)

    return run


def test_training_reads_nothing_after_the_cut(train) -> None:
    """Prompts, ground truth with its Swing neighbours, questions, warm-up; the order of items and their counts."""
    data, figures, measure = train(past(log()))
    assert min(len(data.stages["all"].prompts), len(data.tasks["alignment"].tokens)) > 4
    assert figures["swing_covered_share"] > 0.5
    leaky = train(log() + plant(0.01))
    assert same(data, leaky[0])
    assert figures == leaky[1]
    assert same(measure, leaky[2])

    seen = train(log() + plant(-10))
    assert seen[1]["swing_covered_share"] > figures["swing_covered_share"]
    for name in ("ground_truth", "truth_weights", "prompts"):
        assert not same(getattr(data.stages["all"], name), getattr(seen[0].stages["all"], name)), name
    assert not same(measure.leaf_items, seen[2].leaf_items)
    assert not same(data.tasks, seen[0].tasks)


def test_what_decides_over_stages_is_trained_on_nothing_after_the_validation_time_for_no_user(train) -> None:
    """Rejections of a day before the cut, of everybody or of one who first comes then, decide and train nothing."""
    rows = past(log())
    data, figures, measure = train(rows, deciding=True)
    assert min(len(data.stages["all"].prompts), len(data.tasks["alignment"].tokens), len(data.validation)) > 4
    newcomer = [("a", *row[1:]) for row in plant(-1)[:5]]
    for planted in (plant(-1), newcomer):
        leaky = train(rows + planted, deciding=True)
        assert same(data.tasks, leaky[0].tasks) and same(data.stages, leaky[0].stages)
        assert same(data.questions, leaky[0].questions)
        assert {**figures, "validation_anchors": 0} == {**leaky[1], "validation_anchors": 0}
        assert same(measure.leaf_items, leaky[2].leaf_items)
    # It is what the decision is taken by, and what the policy of the cut learns from.
    planted = train(rows + plant(-1), deciding=True)
    assert not same(measure.targets, planted[2].targets) and not same(data.pairs, planted[0].pairs)
    assert not same(train(rows)[0].stages, train(rows + plant(-1))[0].stages)
    # What lies before is read by both.
    assert not same(data.stages, train(rows + plant(-2.05), deciding=True)[0].stages)


def test_behaviour_embeddings_read_nothing_after_the_cut(tmp_path: Path) -> None:
    items = pa.table({"item_id": ITEM_IDS, "text": ["item"] * ITEMS})

    def embed(name: str, rows: list[Row], **timeline) -> np.ndarray:
        path = str(tmp_path / f"{name}.parquet")
        storage.write_table(as_table(rows), path)
        settings = config(
            interactions={"path": path}, embedding=EmbeddingSettings(sources=("behaviour",), behaviour_dim=4)
        )
        timeline = settings.timeline.model_copy(update=timeline)
        return item_embeddings(settings.model_copy(update={"timeline": timeline}), items)

    sound = embed("past", past(log()))
    assert sound[:14].any(axis=1).all() and not sound[14:].any()
    np.testing.assert_array_equal(embed("leaky", log() + plant(0.01)), sound)
    assert embed("seen", log() + plant(0.01), cut=CUT + timedelta(days=1))[14:].any()


def test_swing_neighbours_of_the_evaluation_read_nothing_after_the_cut() -> None:
    def fit(events: Events):
        return swing_neighbours(events, ITEMS, SWING, seed=0)

    leaky = as_events(log() + plant(0.01))
    sound = fit(as_events(past(log())))
    assert same(fit(leaky.before(TIMELINE.cut_us)), sound)
    assert len(sound.items[14]) == 0
    assert 15 in fit(leaky).items[14], "the plant would give the items neighbours"


def test_floors_read_nothing_after_the_cut() -> None:
    """Every floor, popularity and EASE among them, on the same histories."""
    honest, leaky = as_events(past(log())), as_events(log() + plant(0.01))
    neighbours = swing_neighbours(honest, ITEMS, SWING, seed=0)
    known = Histories.at(honest, validation_anchors(honest, TIMELINE))

    def scores(events: Events, cut_us: int) -> dict[str, np.ndarray]:
        floors = fit_floors(events, cut_us, ITEMS, np.arange(ITEMS) // 4, neighbours, seed=0)
        return {floor.name: floor.scores(known) for floor in floors}

    sound = scores(honest, TIMELINE.cut_us)
    assert same(sound, scores(leaky, TIMELINE.cut_us))
    changed = scores(leaky, TIMELINE.cut_us + 86_400_000_000)
    assert {name for name in sound if same(sound[name], changed[name])} == {"random"}


@pytest.mark.parametrize("kind", SEQUENTIAL_KINDS)
def test_sequential_models_are_tuned_and_trained_without_what_comes_after_the_cut(kind: str) -> None:
    honest, leaky = as_events(past(log())), as_events(log() + plant(0.01))
    known = Histories.at(honest, validation_anchors(honest, TIMELINE))

    def fit(events: Events, **changes) -> tuple[float, np.ndarray]:
        timeline = TIMELINE.model_copy(update=changes)
        tuned = tune_sequential(kind, events, timeline, ITEMS, [Trial(8, 3e-3)], seed=0)
        return tuned.chosen.figure, tuned.model.scores(known)

    sound = fit(honest)
    assert np.isneginf(sound[1][:, 14:]).all()
    figure, scores = fit(leaky)
    assert figure == sound[0]
    np.testing.assert_array_equal(scores, sound[1])
    assert np.isfinite(fit(leaky, cut=CUT + timedelta(days=1))[1][:, 14:]).all()


@pytest.mark.long
def test_tiger_is_tuned_and_trained_without_what_comes_after_the_cut() -> None:
    honest, leaky = as_events(past(log())), as_events(log() + plant(0.01))
    known = Histories.at(honest, validation_anchors(honest, TIMELINE))
    leaves = np.tile(np.arange(ITEMS), (len(known), 1))

    def fit(events: Events, **changes) -> tuple[float, np.ndarray]:
        timeline = TIMELINE.model_copy(update=changes)
        tuned = tune_tiger(events, timeline, SEMANTIC_IDS, TRIE, [Trial(16, 3e-3)], seed=0)
        return tuned.trials[0].figure, tuned.model.score(known, leaves)

    sound, reread = fit(honest), fit(leaky)
    assert reread[0] == sound[0]
    np.testing.assert_array_equal(reread[1], sound[1])
    seen = fit(leaky, cut=CUT + timedelta(days=1))[1]
    assert seen[:, 15].mean() > sound[1][:, 15].mean()
