"""Floors on a checkerboard world: group 0 meets even items, group 1 odd ones, and rejects some of them.

users 0-9   (group 0) met items 0, 2, 4 and rejected 0 and 2
users 10-19 (group 1) met items 1, 3, 5 and rejected 1 and 3
users 20 and 21 met only item 0 resp. 1, and rejected it: what comes next is obvious
item 6 is met and liked by everybody, item 7 by nobody
"""

import numpy as np
import pyarrow as pa
import pytest

from conrec.config import SwingSettings
from conrec.evaluation.baselines import FLOORS, Floor, Histories, best_items, fit_floors, item_scores
from conrec.feedback.anchors import Anchors, served_anchors
from conrec.feedback.events import LIKED, REJECTED, SHOWN, Events
from conrec.feedback.swing import Neighbours, swing_neighbours
from conrec.ragged import Ragged

ITEMS, CUT = 8, 100
CATEGORIES = np.array([0, 1, 0, 1, 0, 1, 2, 2])
NAMES = [
    "random",
    "most rejected",
    "highest rejection rate",
    "most shown",
    "most rejected category",
    "Swing on negatives",
    "EASE on negatives",
    "EASE on everything shown",
    "exposure x rejection rate^1",
    "exposure x rejection rate^2",
    "exposure x rejection rate^3",
]


def make_events(rows: list[tuple[int, int, int, int]]) -> Events:
    """Events from (user, item, time, kind)."""
    users, items, times, kinds = np.array(sorted(rows, key=lambda row: (row[0], row[2]))).T
    count = users.max() + 1
    return Events(
        pa.array([f"{user:02d}" for user in range(count)]),
        np.concatenate(([0], np.cumsum(np.bincount(users, minlength=count)))),
        items.astype(np.int32),
        times,
        kinds.astype(np.int8),
    )


def checkerboard_rows() -> list[tuple[int, int, int, int]]:
    rows = []
    for user in range(20):
        group = user // 10
        rows += [(user, group, 10, REJECTED), (user, 2 + group, 20, REJECTED), (user, 4 + group, 30, SHOWN)]
        rows += [(user, 6, 40, LIKED)]
    return [*rows, (20, 0, 10, REJECTED), (20, 6, 40, LIKED), (21, 1, 10, REJECTED), (21, 6, 40, LIKED)]


def checkerboard() -> Events:
    return make_events(checkerboard_rows())


def swing(events: Events) -> Neighbours:
    return swing_neighbours(events.before(CUT), ITEMS, SwingSettings(min_support=1), seed=0)


def fitted(events: Events) -> dict[str, Floor]:
    return {floor.name: floor for floor in fit_floors(events, CUT, ITEMS, CATEGORIES, swing(events), seed=0)}


@pytest.fixture(scope="module")
def floors() -> dict[str, Floor]:
    return fitted(checkerboard())


@pytest.fixture(scope="module")
def histories() -> Histories:
    events = checkerboard()
    return Histories.at(events, served_anchors(events, CUT, 0, 1))


def test_every_floor_of_the_method_is_there(floors: dict[str, Floor]) -> None:
    assert list(floors) == NAMES == list(FLOORS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", [1, 3, 20])
def test_contract(floors: dict[str, Floor], histories: Histories, name: str, k: int) -> None:
    """Rows of the right shape, distinct, nothing excluded, -1 only at the end and only when items run out."""
    excluded = histories.distinct()
    ranked = floors[name].rank(histories, excluded, k)
    assert ranked.shape == (22, k)
    assert ranked.dtype == np.int32
    for row, history in zip(ranked, np.split(excluded.values, excluded.offsets[1:-1]), strict=True):
        items = row[row >= 0]
        assert len(items) == min(k, ITEMS - len(history))
        assert len(set(items)) == len(items)
        assert not set(items) & set(history)
        assert items.max() < ITEMS
        assert (row[len(items) :] == -1).all()


@pytest.mark.parametrize("name", NAMES)
def test_anchors_do_not_depend_on_each_other(floors: dict[str, Floor], histories: Histories, name: str) -> None:
    excluded = histories.distinct()
    together = floors[name].rank(histories, excluded, 4)
    for anchor in (0, 13, 21):
        alone = floors[name].rank(histories.block(anchor, anchor + 1), excluded.take(np.array([anchor])), 4)
        np.testing.assert_array_equal(alone[0], together[anchor])


@pytest.mark.parametrize("name", NAMES)
def test_an_event_after_the_cut_changes_nothing(floors: dict[str, Floor], histories: Histories, name: str) -> None:
    """The leak: after the cut, everybody rejects item 7 and the groups change sides."""
    later = [(user, item, CUT + 1, REJECTED) for user in range(22) for item in (7, 5 - user // 10)] * 3
    leaky = fitted(make_events(checkerboard_rows() + later))[name]
    sound = floors[name]
    np.testing.assert_array_equal(leaky.scores(histories), sound.scores(histories))


def test_the_planted_leak_would_show_if_the_cut_were_later(histories: Histories) -> None:
    later = [(user, 7, CUT + 1, REJECTED) for user in range(22)]
    events = make_events(checkerboard_rows() + later)
    for floor in fit_floors(events, CUT + 1, ITEMS, CATEGORIES, swing(events), seed=0):
        if floor.name == "most rejected":
            assert (floor.rank(histories, histories.distinct(), 1) == 7).all()


def test_histories_read_nothing_after_the_anchor() -> None:
    events = make_events([(0, 1, 10, LIKED), (0, 2, 50, REJECTED), (0, 2, 60, LIKED), (0, 3, 61, REJECTED)])
    anchors = Anchors(np.array([0, 0]), np.array([60, 10]), np.array([0, 0]), np.array([3, 1]), np.array([4, 4]))
    histories = Histories.at(events, anchors)
    np.testing.assert_array_equal(histories.distinct().padded(-1), [[1, 2], [1, -1]])
    np.testing.assert_array_equal(histories.distinct((REJECTED,)).padded(-1), [[2], [-1]])


@pytest.mark.parametrize(
    "name", ["Swing on negatives", "EASE on negatives", "EASE on everything shown", "exposure x rejection rate^2"]
)
def test_personal_floors_see_the_group(floors: dict[str, Floor], histories: Histories, name: str) -> None:
    """Who met (and rejected) only item 0 is predicted item 2; item 1 leads to item 3."""
    ranked = floors[name].rank(histories, histories.distinct(), 1)
    np.testing.assert_array_equal(ranked[20:, 0], [2, 3])


def test_category_floor_ranks_the_most_rejected_category_first(floors: dict[str, Floor], histories: Histories) -> None:
    ranked = floors["most rejected category"].rank(histories, histories.distinct(), 2)
    np.testing.assert_array_equal(ranked[20:], [[2, 4], [3, 5]])


def test_popular_floors_rank_as_counted(floors: dict[str, Floor]) -> None:
    """Scores on paper: rejections 11 11 10 10 0 0 0 0, users shown 11 11 10 10 10 10 22 0."""
    nobody = Histories(np.array([0]), Ragged(np.zeros(0, np.int32), np.array([0, 0])), np.zeros(0, np.int8))
    paper = {
        "most rejected": [11, 11, 10, 10, 0, 0, 0, 0],
        "most shown": [11, 11, 10, 10, 10, 10, 22, 0],
        "highest rejection rate": [12 / 31, 12 / 31, 11 / 30, 11 / 30, 1 / 30, 1 / 30, 1 / 42, 1 / 20],
    }
    for name, scores in paper.items():
        np.testing.assert_allclose(floors[name].scores(nobody)[0], scores, rtol=1e-6, err_msg=name)


def test_a_repeated_event_of_one_user_counts_once(floors: dict[str, Floor], histories: Histories) -> None:
    rows = checkerboard_rows()
    again = fitted(make_events(rows + [(0, 0, time, REJECTED) for time in range(41, 60)]))
    for name in NAMES:
        if name == "Swing on negatives":  # its N_j are rejections, not users
            continue
        np.testing.assert_array_equal(again[name].scores(histories), floors[name].scores(histories), err_msg=name)


def test_ease_equals_the_closed_form_on_dense_matrices(floors: dict[str, Floor], histories: Histories) -> None:
    """Steck 2019, equation 8, with an ordinary inverse in float64."""
    x = np.zeros((22, ITEMS))
    for user, item, _, _ in checkerboard_rows():
        x[user, item] = 1
    inverse = np.linalg.inv(x.T @ x + 200 * np.eye(ITEMS))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0)
    np.testing.assert_allclose(floors["EASE on everything shown"].scores(histories), x @ weights, atol=1e-6)


def test_exposure_times_rate_is_the_product(floors: dict[str, Floor], histories: Histories) -> None:
    exposure = floors["EASE on everything shown"].scores(histories)
    rate = np.array([12 / 16, 12 / 16, 11 / 15, 11 / 15, 1 / 15, 1 / 15, 1 / 27, 1 / 5])
    for power in (1, 2, 3):
        scores = floors[f"exposure x rejection rate^{power}"].scores(histories)
        np.testing.assert_allclose(scores, exposure * rate**power, rtol=1e-5)


def test_random_is_uniform_over_items(floors: dict[str, Floor]) -> None:
    empty = Ragged(np.zeros(0, np.int32), np.zeros(4001, np.int64))
    users = np.arange(4000) % 22
    ranked = floors["random"].rank(Histories(users, empty, np.zeros(0, np.int8)), empty, 2)
    np.testing.assert_array_equal(ranked[0], ranked[22])
    events = make_events([(user, 0, 1, SHOWN) for user in range(4000)])
    random = next(fit_floors(events, CUT, ITEMS, None, swing(events), seed=0))
    first = random.rank(Histories(np.arange(4000), empty, np.zeros(0, np.int8)), empty, 1)
    # 500 each, standard deviation 21.
    assert (np.abs(np.bincount(first[:, 0], minlength=ITEMS) - 500) < 100).all()


def test_without_categories_only_that_floor_is_missing() -> None:
    events = checkerboard()
    names = [floor.name for floor in fit_floors(events, CUT, ITEMS, None, swing(events), seed=0)]
    assert names == [name for name in NAMES if name != "most rejected category"]


def test_items_beyond_the_limit_of_ease_still_get_a_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conrec.evaluation.baselines.EASE_ITEMS", 3)
    events = checkerboard()
    histories = Histories.at(events, served_anchors(events, CUT, 0, 1))
    scores = fitted(events)["EASE on everything shown"].scores(histories)
    # The three most shown items are 6, 0 and 1.
    assert (scores[:, [2, 3, 4, 5, 7]] == 0).all()
    assert (scores[20:, [0, 1, 6]] != 0).any()


def test_swing_falls_back_to_the_most_rejected() -> None:
    nothing = Neighbours(Ragged(np.zeros(0, np.int32), np.zeros(ITEMS + 1, np.int64)), np.zeros(0), np.zeros(0), 0.0)
    events = checkerboard()
    histories = Histories.at(events, served_anchors(events, CUT, 0, 1))
    floors = {floor.name: floor for floor in fit_floors(events, CUT, ITEMS, None, nothing, seed=0)}
    one, other = floors["Swing on negatives"], floors["most rejected"]
    np.testing.assert_array_equal(
        one.rank(histories, histories.distinct(), 2), other.rank(histories, histories.distinct(), 2)
    )


def indexed_scores(histories: Histories) -> np.ndarray:
    """User u gives item i the score (3 i + u) mod 7: known, without a fit, and another for every user."""
    return ((3 * np.arange(ITEMS) + histories.users[:, None]) % 7).astype(np.float32)


def asking(users: int) -> Histories:
    return Histories(
        np.arange(users), Ragged.from_lengths(np.zeros(0, np.int32), np.zeros(users)), np.zeros(0, np.int8)
    )


@pytest.mark.parametrize("block", [1, 3, 1024])
def test_best_items_come_with_their_scores_block_by_block(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conrec.evaluation.baselines._BLOCK", block)
    users = 8
    rng = np.random.default_rng(0)
    lengths = np.array([0, 2, 8, 7, 1, 0, 3, 4])
    forbidden = [np.sort(rng.permutation(ITEMS)[:length]) for length in lengths]
    # Item 0, which stands in for padding inside, is all that is left for user 3.
    forbidden[3] = np.arange(1, ITEMS)
    excluded = Ragged.from_lengths(np.concatenate(forbidden), lengths)
    items, values = best_items(indexed_scores, asking(users), excluded, k=3)
    assert items.dtype == np.int32 and values.dtype == np.float32
    for user in range(users):
        scores = {item: (3 * item + user) % 7 for item in range(ITEMS) if item not in forbidden[user]}
        expected = sorted(scores, key=lambda item: (-scores[item], item))[:3]
        assert items[user].tolist() == expected + [-1] * (3 - len(expected))
        assert values[user].tolist() == [scores[item] for item in expected] + [-np.inf] * (3 - len(expected))


@pytest.mark.parametrize("block", [1, 3, 1024])
def test_scores_of_given_items_are_those_of_the_system_and_padding_has_none(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("conrec.evaluation.baselines._BLOCK", block)
    items = np.array([[0, 7, 3], [6, -1, 2], [-1, -1, -1], [5, 5, 0]], np.int32)
    found = item_scores(indexed_scores, asking(4), items)
    assert found.dtype == np.float32
    nan = np.nan
    # (3 i + u) mod 7.
    np.testing.assert_array_equal(found, [[0, 0, 2], [5, nan, 0], [nan, nan, nan], [4, 4, 3]])


def test_a_floor_ranks_by_best_items(floors: dict[str, Floor]) -> None:
    events = checkerboard()
    histories = Histories.at(events, served_anchors(events, CUT, 0, 1))
    floor = floors["most shown"]
    items, values = best_items(floor.scores, histories, histories.distinct(), k=4)
    np.testing.assert_array_equal(floor.rank(histories, histories.distinct(), k=4), items)
    np.testing.assert_array_equal(item_scores(floor.scores, histories, items)[items >= 0], values[items >= 0])
