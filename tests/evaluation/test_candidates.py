"""Candidate sets hold what a day showed and nothing that gives the answer away; accuracy as on paper."""

import numpy as np
import pyarrow as pa
import pytest

from conrec.evaluation import candidates as module
from conrec.evaluation.candidates import Candidates, accuracy, candidate_sets, described, served_scores
from conrec.feedback.anchors import Anchors
from conrec.feedback.events import LIKED, REJECTED, SHOWN, Events
from conrec.feedback.targets import targets
from conrec.ragged import Ragged

DAY = 86_400_000_000


def make_events(rows: list[tuple[int, int, int, int]]) -> Events:
    """Events from (user, item, time, kind)."""
    users, items, times, kinds = np.array(sorted(rows, key=lambda row: (row[0], row[2]))).T
    count = users.max() + 1
    return Events(
        pa.array([f"{user:05d}" for user in range(count)]),
        np.concatenate(([0], np.cumsum(np.bincount(users, minlength=count)))),
        items.astype(np.int32),
        times,
        kinds.astype(np.int8),
    )


def anchors_of(events: Events, users: list[int], time: int, window: int) -> Anchors:
    """One anchor at the time for each of these users; the window is the time after it, included."""
    rows, until = events.rows, np.full(len(users), time)

    def before(moment: int) -> np.ndarray:
        return events.offsets[users] + np.array([np.sum(events.times[rows == user] <= moment) for user in users])

    return Anchors(np.array(users, np.int32), until, events.offsets[users], before(time), before(time + window))


def one_day(exposures: dict[int, int], users: int) -> tuple[Events, Anchors]:
    """`users` users who met item 100 on day 0 and reject item 0 on day 1, the only day that showed these items."""
    rows = [(user, 100, 0, LIKED) for user in range(users)] + [(user, 0, DAY + 5, REJECTED) for user in range(users)]
    rows += [(users, item, DAY + 9, SHOWN) for item, count in exposures.items() for _ in range(count)]
    events = make_events(rows)
    return events, anchors_of(events, list(range(users)), DAY, DAY - 1)


def test_the_others_are_what_the_day_showed_without_history_and_later_rejections() -> None:
    events = make_events(
        [
            (0, 1, 10, REJECTED),
            (0, 2, 20, LIKED),
            (0, 3, 2 * DAY, REJECTED),  # the answer, on the first moment of its day
            (0, 4, 3 * DAY, REJECTED),  # rejected in the window too
            (0, 5, 2 * DAY + 1, LIKED),  # the user's own like of that day is a fair candidate
            (1, 1, 2 * DAY + 2, SHOWN),  # in the history of user 0
            (1, 2, 2 * DAY + 2, LIKED),  # so is this
            (1, 4, 2 * DAY + 2, SHOWN),
            (1, 6, 3 * DAY - 1, REJECTED),  # the last moment of the day
            (1, 7, 3 * DAY, SHOWN),  # the next day
            (2, 8, 2 * DAY - 1, SHOWN),  # the day before
            (2, 9, 2 * DAY + 7, SHOWN),
        ]
    )
    anchors = anchors_of(events, [0, 1], DAY, 2 * DAY)
    wanted = targets(events, anchors)
    found = candidate_sets(events, anchors, wanted, seed=0, count=6)
    assert found.items.dtype == np.int32
    assert set(found.items[0].tolist()) == {3, 5, 6, 9, -1}
    assert (found.items[0, 4:] == -1).all(), "padding stands behind"
    assert found.items[0, found.answer[0]] == 3
    # User 1 has no history and rejects nothing but item 6: five of the day's six other items, its own among them.
    assert found.items[1, found.answer[1]] == 6
    assert set(found.items[1].tolist()) - {6} < {1, 2, 3, 4, 5, 9}
    assert (found.items[1] >= 0).all()


def test_an_anchor_without_a_next_rejection_has_no_candidates() -> None:
    events = make_events([(0, 1, 0, REJECTED), (0, 2, DAY, LIKED), (1, 3, DAY, REJECTED)])
    anchors = anchors_of(events, [0], 0, 2 * DAY)
    found = candidate_sets(events, anchors, targets(events, anchors), seed=0, count=3)
    assert (found.items == -1).all()
    assert (found.answer == -1).all()
    assert np.isnan(accuracy(np.ones((1, 3)), found)).all()


def test_nothing_is_asked_where_the_history_holds_the_answer_and_the_other_sets_stay() -> None:
    """Who rejects again what they had met would have a set of which the answer alone is in the history."""
    events, anchors = one_day(dict.fromkeys(range(1, 30), 1), users=5)
    found = candidate_sets(events, anchors, targets(events, anchors), seed=0)
    for time in (1, DAY + 1):  # user 2 met item 0 before the anchor; after it there is nothing to give away
        rows = zip(
            events.rows.tolist(), events.items.tolist(), events.times.tolist(), events.kinds.tolist(), strict=True
        )
        again = make_events([*rows, (2, 0, time, REJECTED)])
        asked = anchors_of(again, list(range(5)), DAY, DAY - 1)
        sets = candidate_sets(again, asked, targets(again, asked), seed=0)
        if time < DAY:
            assert (sets.items[2] == -1).all() and sets.answer[2] == -1
            others = [0, 1, 3, 4]
            np.testing.assert_array_equal(sets.items[others], found.items[others])
            np.testing.assert_array_equal(sets.answer[others], found.answer[others])
        else:
            assert sets.items[2, sets.answer[2]] == 0


@pytest.mark.parametrize("surplus", [1, 4])
def test_others_are_drawn_by_exposure_one_after_the_other(surplus, monkeypatch) -> None:
    """Two of three items that the day showed 1, 2 and 5 times: p_i + sum_j p_j w_i / (8 - w_j), also where the first
    draws repeat themselves and the rest is completed.
    """
    monkeypatch.setattr(module, "_SURPLUS", surplus)
    users = 6000
    events, anchors = one_day({1: 1, 2: 2, 3: 5}, users)
    found = candidate_sets(events, anchors, targets(events, anchors), seed=1, count=3)
    # Item 0 fills most of the day; it is each anchor's answer and therefore never one of the others.
    shares = [(found.items == item).any(axis=1).mean() for item in (1, 2, 3)]
    # Four standard deviations of a share of 6,000 are at most .026.
    np.testing.assert_allclose(shares, [0.375, 0.702381, 0.922619], atol=0.026)


def test_exposure_counts_events_of_every_kind() -> None:
    rows = [(user, 0, DAY, REJECTED) for user in range(3000)]
    rows += [(5000, 1, DAY, kind) for kind in (REJECTED, LIKED, SHOWN)] + [(5000, 2, DAY, SHOWN)]
    events = make_events(rows)
    anchors = anchors_of(events, list(range(3000)), 0, DAY)
    found = candidate_sets(events, anchors, targets(events, anchors), seed=0, count=2)
    # Four standard deviations of a share of 3,000 are .032.
    assert (found.items == 1).any(axis=1).mean() == pytest.approx(0.75, abs=0.032)


def test_rare_items_fill_the_set_where_one_item_fills_the_day() -> None:
    events, anchors = one_day({1: 20_000, **dict.fromkeys(range(2, 22), 1)}, users=50)
    found = candidate_sets(events, anchors, targets(events, anchors), seed=0)
    assert found.items.shape == (50, 20)
    assert (found.items >= 0).all()
    assert (np.diff(np.sort(found.items, axis=1), axis=1) > 0).all()


@pytest.mark.parametrize("blocks", [(1 << 15, 1 << 21), (7, 40)])
def test_sets_equal_the_rule_in_random_worlds(blocks, monkeypatch) -> None:
    monkeypatch.setattr(module, "_ANCHORS_AT_ONCE", blocks[0])
    monkeypatch.setattr(module, "_CELLS_AT_ONCE", blocks[1])
    rng = np.random.default_rng(0)
    count, padded, met = 8, 0, 0
    popularity = np.arange(1, 31) ** -1.5
    for seed in range(5):
        size = 300
        rows = zip(
            rng.integers(0, 60, size).tolist(),
            rng.choice(30, size, p=popularity / popularity.sum()).tolist(),
            rng.integers(0, 8 * DAY, size).tolist(),
            rng.integers(0, 3, size).tolist(),
            strict=True,
        )
        events = make_events(list(rows))
        anchors = anchors_of(events, list(range(len(events.users))), 4 * DAY, 3 * DAY)
        wanted = targets(events, anchors)
        found = candidate_sets(events, anchors, wanted, seed, count)
        for row, (items, column) in enumerate(zip(found.items, found.answer, strict=True)):
            window = slice(anchors.ends[row], anchors.window_ends[row])
            rejections = events.times[window][events.kinds[window] == REJECTED]
            history = set(events.items[anchors.starts[row] : anchors.ends[row]].tolist())
            if len(rejections) == 0 or wanted.next_negative[row] in history:
                assert (items == -1).all() and column == -1
                met += len(rejections) > 0
                continue
            shown = set(events.items[events.times // DAY == rejections[0] // DAY].tolist())
            shown -= history
            shown -= set(wanted.future_negatives[row].tolist())
            others = np.delete(items, column)
            others = others[others >= 0].tolist()
            assert items[column] == wanted.next_negative[row]
            assert len(set(others)) == len(others) == min(count - 1, len(shown))
            assert set(others) <= shown
            padded += len(shown) < count - 1
    assert padded > 5, "some days have too few items"
    assert met > 5, "some reject again what they had met"


def test_the_answer_is_in_every_column_alike_and_the_same_seed_says_where() -> None:
    events, anchors = one_day(dict.fromkeys(range(1, 4), 1), users=4000)
    wanted = targets(events, anchors)
    found = candidate_sets(events, anchors, wanted, seed=0, count=4)
    # Four standard deviations of a share of 4,000 at 1/4 are .027.
    np.testing.assert_allclose(np.bincount(found.answer) / 4000, 0.25, atol=0.027)
    again, other = (candidate_sets(events, anchors, wanted, seed, 4) for seed in (0, 1))
    np.testing.assert_array_equal(found.items, again.items)
    assert (found.items != other.items).any()


def test_wrong_targets_and_no_choice_are_refused() -> None:
    events, anchors = one_day({1: 1}, users=3)
    wanted = targets(events, anchors)
    with pytest.raises(ValueError, match="targets are those of other events or anchors"):
        candidate_sets(events, anchors.take(np.array([0, 1])), wanted, 0)
    earlier = anchors_of(events, [0, 1, 2], 0, DAY)
    with pytest.raises(ValueError, match="targets are those of other events or anchors"):
        candidate_sets(events, earlier, wanted, 0)
    with pytest.raises(ValueError, match="1 candidates leave no choice"):
        candidate_sets(events, anchors, wanted, 0, count=1)


SETS = Candidates(
    np.array([[5, 6, 7], [5, 6, 7], [5, 6, 7], [5, 6, -1], [5, 6, 7], [5, 6, 7], [-1, -1, -1], [5, 6, 7]], np.int32),
    np.array([0, 1, 2, 0, 0, 1, -1, 2]),
)


def test_accuracy_as_on_paper() -> None:
    nan, inf = np.nan, np.inf
    scores = np.array(
        [
            [3, 2, 1],  # right
            [3, 2, 1],  # wrong
            [2, 2, 2],  # three alike
            [1, 0, 9],  # the padding's score is not read
            [nan, nan, nan],  # undefined
            [nan, -inf, nan],  # the answer is the only one with a score, however low
            [1, 1, 1],  # no answer
            [0, 1, nan],  # the answer is not named, others are
        ]
    )
    np.testing.assert_array_equal(accuracy(scores, SETS), [1, 0, 1 / 3, 1, nan, 1, nan, 0])
    with pytest.raises(ValueError, match="shape"):
        accuracy(scores[:, :2], SETS)


def test_the_question_says_how_often_a_guess_is_right() -> None:
    items = np.array([[5, -1, -1], [5, 6, -1], [5, 6, 7], [-1, -1, -1]], np.int32)
    sets, measured = Candidates(items, np.array([0, 1, 0, -1])), np.array([True, True, False, True])
    assert described(sets, measured).endswith(
        "among 3 items shown the same day, fewer on thin days, drawn by exposure; a guess is right in 75 %"
    )
    assert described(sets, ~measured).endswith("; a guess is right in 33.3 %")
    assert described(sets, np.array([False, False, False, True])).endswith("drawn by exposure")


def test_a_score_that_only_padding_has_is_no_score() -> None:
    scores = np.full((8, 3), np.nan)
    scores[3, 2] = 1
    assert np.isnan(accuracy(scores, SETS)).all()


def test_an_oracle_scores_one_an_inverted_oracle_zero_and_a_guess_one_in_twenty() -> None:
    users = 4000
    events, anchors = one_day({item: 1 + item % 3 for item in range(1, 40)}, users)
    found = candidate_sets(events, anchors, targets(events, anchors), seed=3)
    oracle = np.where(np.arange(20) == found.answer[:, None], 1.0, 0.0)
    assert (accuracy(oracle, found) == 1).all()
    assert (accuracy(-oracle, found) == 0).all()
    assert (accuracy(np.zeros((users, 20)), found) == 1 / 20).all()
    guess = accuracy(np.random.default_rng(0).random((users, 20)), found)
    # Four standard deviations of a share of 4,000 at 1/20 are .014.
    assert guess.mean() == pytest.approx(0.05, abs=0.014)
    column = accuracy(np.tile(-np.arange(20.0), (users, 1)), found)
    assert column.mean() == pytest.approx(0.05, abs=0.014), "always the first candidate is a guess"


@pytest.mark.parametrize("at_once", [1, 1 << 19])
def test_served_scores_are_the_largest_similarity(at_once, monkeypatch) -> None:
    monkeypatch.setattr(module, "PAIRS_AT_ONCE", at_once)
    vectors = np.array([[1, 0], [0.6, 0.8], [0, 1], [-1, 0]], np.float32)
    item_leaves = np.array([0, 1, 2, 2, 3])
    served = Ragged.from_lengths(np.array([0, 2, 1]), np.array([2, 0, 1]))
    sets = Candidates(np.array([[3, 1, 4], [0, 1, 2], [0, 4, -1]], np.int32), np.array([0, 0, 1]))
    scores = served_scores(served, sets, item_leaves, vectors)
    assert scores.dtype == np.float32
    # Leaves 0 and 2 were served: item 3 shares leaf 2, item 1 is .6 and .8 near, item 4 -1 and 0.
    np.testing.assert_allclose(scores[0], [1, 0.8, 0], atol=1e-7)
    assert scores[0, 0] == 1
    assert np.isneginf(scores[1]).all()
    np.testing.assert_allclose(scores[2], [0.6, -0.6, np.nan], atol=1e-7)
    np.testing.assert_allclose(accuracy(scores, sets), [1, 1 / 3, 0])
    nobody = Ragged.from_lengths(np.array([], np.int64), np.zeros(3, np.int64))
    np.testing.assert_array_equal(np.isneginf(served_scores(nobody, sets, item_leaves, vectors)), sets.items >= 0)


@pytest.mark.long
def test_of_thirty_thousand_anchors_every_set_is_full() -> None:
    """And there is one wherever the history does not hold the answer."""
    rng = np.random.default_rng(0)
    users, items, size = 30_000, 10_000, 400_000
    popularity = 1 / np.arange(1, items + 1)
    rows = np.sort(np.concatenate([np.arange(users), rng.integers(0, users, size)]))
    order = np.lexsort((times := rng.integers(0, 10 * DAY, len(rows)), rows))
    events = Events(
        pa.array([f"{user:05d}" for user in range(users)]),
        np.concatenate(([0], np.cumsum(np.bincount(rows, minlength=users)))),
        rng.choice(items, len(rows), p=popularity / popularity.sum()).astype(np.int32),
        times[order],
        rng.integers(0, 3, len(rows)).astype(np.int8),
    )
    half = events.offsets[:-1] + np.diff(events.offsets) // 2
    everyone = np.arange(users, dtype=np.int32)
    anchors = Anchors(everyone, np.zeros(users, np.int64), events.offsets[:-1], half, events.offsets[1:])
    wanted = targets(events, anchors)
    found = candidate_sets(events, anchors, wanted, 0)
    met = [wanted.next_negative[row] in events.items[anchors.starts[row] : anchors.ends[row]] for row in everyone]
    asked = (wanted.next_negative >= 0) & ~np.array(met)
    assert asked.sum() > 20_000 and np.sum(met) > 100
    assert (found.items[asked] >= 0).all() and (found.items[~asked] < 0).all()
