"""The list as published: answers on paper, brute force over thresholds, comparisons and resamples, known truths."""

from __future__ import annotations

from itertools import product
from statistics import NormalDist

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from conrec.evaluation import metrics
from conrec.evaluation import published as module
from conrec.evaluation.published import (
    Pairs,
    area,
    at_threshold,
    auc,
    catch_at,
    catch_curve,
    list_lengths,
    paired,
    shown_pairs,
    within_user_auc,
)
from conrec.feedback.anchors import Anchors
from conrec.feedback.events import LIKED, REJECTED, SHOWN, Events

NEVER = -np.inf
NOTHING = {"value": np.nan, "low": np.nan, "high": np.nan}


def same(figure: dict[str, float], value: float, low: float, high: float) -> bool:
    return np.allclose([figure["value"], figure["low"], figure["high"]], [value, low, high], equal_nan=True)


def make_pairs(rejected, users=None, owners=None) -> Pairs:
    count = len(rejected)
    users = np.arange(count) if users is None else np.array(users)
    return Pairs(
        users, np.arange(count, dtype=np.int32), np.array(rejected, bool), None if owners is None else np.array(owners)
    )


# The pairs


def make_events(rows: list[tuple[int, int, int, int]], users: int) -> Events:
    """Events from (user, item, time, kind)."""
    owners, items, times, kinds = np.array(sorted(rows, key=lambda row: (row[0], row[2]))).T
    offsets = np.concatenate(([0], np.cumsum(np.bincount(owners, minlength=users))))
    names = pa.array([f"{user:03}" for user in range(users)])
    return Events(names, offsets, items.astype(np.int32), times, kinds.astype(np.int8))


def anchors_at(events: Events, moments: list[tuple[int, int, int]]) -> Anchors:
    """Anchors from (user, time, end of the window)."""
    users, times, until = np.array(moments).T
    bounds = starts, _ = events.offsets[users], events.offsets[users + 1]
    ends, window_ends = (
        np.array(
            [first + sum(events.times[first:stop] <= limit) for first, stop, limit in zip(*bounds, limits, strict=True)]
        )
        for limits in (times, until)
    )
    return Anchors(users.astype(np.int32), times, starts, ends, window_ends)


def listed(pairs: Pairs) -> list[tuple[int, int, bool, int]]:
    return list(
        zip(
            *(column.tolist() for column in (pairs.users, pairs.items, pairs.rejected, pairs.bootstrap_users)),
            strict=True,
        )
    )


def test_pairs_are_the_new_items_of_the_window_that_were_rejected_or_liked() -> None:
    events = make_events(
        [
            (0, 1, 5, SHOWN),  # met before, if only shown
            (0, 1, 15, REJECTED),
            (0, 2, 11, REJECTED),  # rejected
            (0, 2, 12, REJECTED),
            (0, 3, 11, REJECTED),  # rejected, then liked: liked
            (0, 3, 12, LIKED),
            (0, 4, 12, LIKED),  # liked, then rejected: liked
            (0, 4, 13, REJECTED),
            (0, 5, 13, SHOWN),  # merely shown
            (0, 6, 13, SHOWN),  # shown, then rejected
            (0, 6, 14, REJECTED),
            (0, 7, 10, LIKED),  # at the anchor's own moment: history
            (0, 7, 11, LIKED),
            (0, 8, 20, LIKED),  # the end of the window belongs to it
            (0, 9, 21, LIKED),  # after the window
            (0, 2, 22, LIKED),
            (1, 2, 3, REJECTED),  # another user's history is none of user 0's
            (1, 4, 12, REJECTED),
        ],
        users=3,
    )
    found = shown_pairs(events, anchors_at(events, [(0, 10, 20), (2, 10, 20), (1, 10, 20)]))
    assert listed(found) == [
        (0, 2, True, 0),
        (0, 3, False, 0),
        (0, 4, False, 0),
        (0, 6, True, 0),
        (0, 8, False, 0),
        (2, 4, True, 1),
    ]
    assert found.items.dtype == np.int32
    assert found.rejected.dtype == bool


@pytest.mark.parametrize("kind", [REJECTED, LIKED, SHOWN])
def test_an_item_of_the_window_with_an_event_before_the_anchor_is_no_pair(kind) -> None:
    """What the user did before t may be what a score was made of."""
    window = [(0, 1, 15, REJECTED), (0, 2, 15, LIKED)]
    events = make_events(window, 1)
    assert listed(shown_pairs(events, anchors_at(events, [(0, 10, 20)]))) == [(0, 1, True, 0), (0, 2, False, 0)]
    for item in (1, 2):
        for time, kept in ((1, {1, 2} - {item}), (10, {1, 2} - {item}), (11, {1, 2})):
            events = make_events([*window, (0, item, time, kind)], 1)
            pairs = shown_pairs(events, anchors_at(events, [(0, 10, 20)]))
            assert set(pairs.items.tolist()) == kept, (item, time)


@pytest.mark.parametrize("seed", range(5))
def test_pairs_equal_a_loop_over_every_anchor_and_item(seed) -> None:
    random = np.random.default_rng(seed)
    rows = [tuple(random.integers(0, [8, 15, 100, 3]).tolist()) for _ in range(300)]
    events = make_events(rows, 9)
    moments = [(user, time, time + 30) for user in random.permutation(9).tolist() for time in (20, 50)]
    expected = []
    for row, (user, start, end) in enumerate(moments):
        for item in range(15):
            mine = [(time, kind) for owner, what, time, kind in rows if owner == user and what == item]
            kinds = {kind for time, kind in mine if start < time <= end}
            if any(time <= start for time, _ in mine) or not kinds - {SHOWN}:
                continue
            expected.append((row, item, LIKED not in kinds, user))
    assert listed(shown_pairs(events, anchors_at(events, moments))) == expected
    assert expected


def test_no_anchors_and_no_events_make_no_pairs() -> None:
    events = make_events([(0, 1, 15, REJECTED)], 1)
    assert len(shown_pairs(events, anchors_at(events, [(0, 15, 20)]))) == 0
    assert len(shown_pairs(events, anchors_at(events, [(0, 10, 20)]).take(np.zeros(0, int)))) == 0


def test_a_subset_keeps_its_rows_and_users() -> None:
    pairs = make_pairs([1, 0, 1], users=[0, 3, 3], owners=[7, 8, 8])
    assert listed(pairs.where(np.array([False, True, True]))) == [(3, 1, False, 8), (3, 2, True, 8)]
    alone = make_pairs([1, 0, 1], users=[0, 3, 3]).where(np.array([True, True, False]))
    assert alone.owners is None
    assert alone.bootstrap_users.tolist() == [0, 3]
    with pytest.raises(ValueError, match="rejected has 1 values for 2 pairs"):
        Pairs(np.arange(2), np.arange(2), np.array([True]))


# Catch at a false block


def world() -> tuple[np.ndarray, Pairs]:
    """By score: R, L+R tied, R, L, then an R and an L that the list never holds."""
    scores = np.array([0.9, 0.8, 0.8, 0.5, 0.3, NEVER, NEVER], np.float32)
    return scores, make_pairs([1, 0, 1, 1, 0, 1, 0])


@pytest.mark.parametrize(
    ("share", "catch"), [(0, 1 / 4), (0.33, 1 / 4), (1 / 3, 3 / 4), (0.66, 3 / 4), (2 / 3, 3 / 4), (1, 3 / 4)]
)
def test_catch_is_the_largest_within_the_share(share, catch) -> None:
    """Tied pairs enter together, and no threshold reaches what the list never holds."""
    scores, pairs = world()
    assert catch_at(scores, pairs, (share,), resamples=20)[share]["value"] == pytest.approx(catch)
    assert catch_curve(scores, pairs, np.array([share]), resamples=20)["value"] == pytest.approx([catch])


def test_a_share_that_rounds_below_a_whole_number_still_allows_it() -> None:
    """29 % of 100 likes are 29, although .29 x 100 is a little less in floating point."""
    pairs = make_pairs(np.arange(101) == 29)
    found = catch_at(-np.arange(101.0), pairs, (0.28, 0.29), resamples=0)
    assert [figure["value"] for figure in found.values()] == [0, 1]


def random_world(seed: int, count: int = 80, levels: int = 12) -> tuple[np.ndarray, Pairs]:
    """Many ties, scores of -inf, several lists of a user, users of one kind of pair only."""
    random = np.random.default_rng(seed)
    lists = random.integers(0, 14, count)
    scores = random.integers(0, levels, count).astype(np.float32) / levels
    scores[random.random(count) < 0.2] = NEVER
    return scores, make_pairs(random.random(count) < 0.4, lists, (lists * 7 + 3) % 10)


def resampled(pairs: Pairs, resamples: int, seed: int) -> list[np.ndarray]:
    """Weights (N,) of the pairs in each resample."""
    names, place = np.unique(pairs.bootstrap_users, return_inverse=True)
    parts = list(metrics.user_weights(len(names), resamples, seed))
    return [column[place] for part in parts for column in part.T]


def catch_by_hand(scores, pairs: Pairs, weights, share: float) -> float:
    """Tries every threshold."""
    liked, rejected = weights * ~pairs.rejected, weights * pairs.rejected
    if not liked.sum() or not rejected.sum():
        return np.nan
    blocked = [scores >= threshold for threshold in np.unique(scores[scores > NEVER])]
    return max([0.0, *(rejected[b].sum() for b in blocked if liked[b].sum() <= share * liked.sum() + 1e-9)]) / (
        rejected.sum()
    )


def auc_by_hand(scores, pairs: Pairs, weights, within: bool = False) -> float:
    """Compares every rejected pair with every liked one."""
    won, compared = 0.0, 0.0
    for r, j in product(np.flatnonzero(pairs.rejected), np.flatnonzero(~pairs.rejected)):
        if within and pairs.users[r] != pairs.users[j]:
            continue
        # A list drawn twice is two lists: its pairs are compared within each of them.
        weight = weights[r] if within else weights[r] * weights[j]
        won += weight * ((scores[r] > scores[j]) + (scores[r] == scores[j]) / 2)
        compared += weight
    return won / compared if compared else np.nan


def ends(drawn) -> tuple[float, float]:
    drawn = np.array(drawn)[~np.isnan(drawn)]
    return np.percentile(drawn, 2.5, method="lower"), np.percentile(drawn, 97.5, method="higher")


@pytest.mark.parametrize("chunk", [500_000, 170, 1])
@pytest.mark.parametrize("seed", range(3))
def test_figures_equal_brute_force_in_every_resample(seed, chunk, monkeypatch) -> None:
    scores, pairs = random_world(seed)
    monkeypatch.setattr(module, "_CHUNK", chunk)
    ones, weights = np.ones(len(pairs)), resampled(pairs, 15, seed)
    shares = (0.0, 0.1, 0.35, 1.0)
    found = catch_at(scores, pairs, shares, resamples=15, seed=seed)
    curve = catch_curve(scores, pairs, np.array(shares), resamples=15, seed=seed)
    for place, share in enumerate(shares):
        drawn = [catch_by_hand(scores, pairs, weight, share) for weight in weights]
        assert same(found[share], catch_by_hand(scores, pairs, ones, share), *ends(drawn))
        assert {end: column[place] for end, column in curve.items()} == found[share]
    for within, measure in ((False, auc), (True, within_user_auc)):
        drawn = [auc_by_hand(scores, pairs, weight, within) for weight in weights]
        assert same(
            measure(scores, pairs, resamples=15, seed=seed), auc_by_hand(scores, pairs, ones, within), *ends(drawn)
        )
    assert area(scores, pairs.rejected) == pytest.approx(auc_by_hand(scores, pairs, ones))


LEVELS = st.sampled_from([NEVER, -1.5, 0.0, 0.25, 0.5, 3.0])


@given(st.data(), st.integers(0, 12))
def test_values_equal_brute_force_whatever_the_pairs(data, count) -> None:
    scores = data.draw(arrays.arrays(np.float32, count, elements=LEVELS))
    pairs = make_pairs(
        data.draw(arrays.arrays(bool, count)), data.draw(arrays.arrays(np.int64, count, elements=st.integers(0, 3)))
    )
    share = data.draw(st.sampled_from([0.0, 0.2, 0.5, 1.0]))
    ones = np.ones(count)
    close = {"nan_ok": True}
    assert catch_at(scores, pairs, (share,), resamples=2)[share]["value"] == pytest.approx(
        catch_by_hand(scores, pairs, ones, share), **close
    )
    assert auc(scores, pairs, resamples=2)["value"] == pytest.approx(auc_by_hand(scores, pairs, ones), **close)
    assert within_user_auc(scores, pairs, resamples=2)["value"] == pytest.approx(
        auc_by_hand(scores, pairs, ones, within=True), **close
    )


# AUC


def test_auc_on_paper() -> None:
    """Likes at .8, .3 and never; rejections at .9 (3 of 3), .8 (2 and a tie), .5 (2), never (a tie)."""
    scores, pairs = world()
    assert auc(scores, pairs, resamples=10)["value"] == pytest.approx((3 + 2.5 + 2 + 0.5) / 12)


def test_within_a_list_only_its_own_pairs_are_compared() -> None:
    """Each list orders its pairs the wrong way round; which list they are in says everything else."""
    scores = np.array([0.9, 0.8, 0.8, 0.2, 0.1, 0.1])
    pairs = make_pairs([0, 1, 1, 0, 0, 1], users=[0, 0, 0, 1, 1, 1])
    assert within_user_auc(scores, pairs, resamples=10)["value"] == pytest.approx(0.5 / 4)
    assert auc(scores, pairs, resamples=10)["value"] == pytest.approx((2 + 2 + 0.5) / 9)


def test_two_lists_of_one_user_are_drawn_together_and_compared_apart() -> None:
    scores = np.array([0.9, 0.1, 0.2, 0.8])
    pairs = make_pairs([1, 0, 1, 0], users=[0, 0, 1, 1], owners=[5, 5, 5, 5])
    assert same(within_user_auc(scores, pairs, resamples=50), 0.5, 0.5, 0.5)
    apart = within_user_auc(scores, make_pairs([1, 0, 1, 0], users=[0, 0, 1, 1]), resamples=50)
    assert (apart["low"], apart["high"]) == (0, 1)


@pytest.mark.parametrize("measure", [auc, within_user_auc])
def test_negated_scores_turn_auc_round(measure) -> None:
    for seed in range(5):
        scores, pairs = random_world(seed)
        there, back = measure(scores, pairs, resamples=50), measure(-scores, pairs, resamples=50)
        assert same(back, 1 - there["value"], 1 - there["high"], 1 - there["low"])


def test_a_monotone_transform_and_the_order_of_the_pairs_change_nothing() -> None:
    for seed in range(5):
        scores, pairs = random_world(seed)
        order = np.random.default_rng(seed).permutation(len(pairs))
        mixed = pairs.where(order)
        with np.errstate(invalid="ignore"):
            stretched = np.exp(3 * scores.astype(np.float64)) - np.where(scores == NEVER, np.inf, 1)
        for measure in (auc, within_user_auc, lambda s, p, **kw: catch_at(s, p, (0.2,), **kw)[0.2]):
            expected = measure(scores, pairs, resamples=40)
            assert measure(stretched, pairs, resamples=40) == expected
            assert same(measure(scores[order], mixed, resamples=40), *expected.values())


def test_one_score_for_all_orders_nothing() -> None:
    _, pairs = random_world(0)
    for constant in (0.5, NEVER):
        level = np.full(len(pairs), constant)
        assert same(auc(level, pairs, resamples=20), 0.5, 0.5, 0.5)
        assert same(within_user_auc(level, pairs, resamples=20), 0.5, 0.5, 0.5)
        assert same(catch_at(level, pairs, (0.5,), resamples=20)[0.5], 0, 0, 0)
    assert same(catch_at(np.zeros(len(pairs)), pairs, (1.0,), resamples=20)[1.0], 1, 1, 1)


# At a threshold


def test_at_a_threshold_on_paper() -> None:
    """Lists 0 and 1: 2 of 3 rejected pairs and 1 of 4 liked ones blocked; liked by list 1/1 and 0/3."""
    scores = np.array([0.9, 0.5, 0.4, 0.4, 0.3, 0.2, NEVER], np.float32)
    pairs = make_pairs([1, 0, 1, 0, 0, 0, 1], users=[0, 0, 1, 1, 1, 1, 2])
    thresholds = np.array([0.5, 0.5, 0.4, 0.45, 0.45, 0.45, NEVER])
    found = at_threshold(scores, pairs, thresholds, resamples=10)
    assert {name: figure["value"] for name, figure in found.items()} == pytest.approx(
        {"catch": 2 / 3, "false_block": 1 / 4, "false_block_per_user": 1 / 2, "selectivity": 8 / 3}
    )


def test_a_threshold_is_compared_in_the_precision_of_the_scores() -> None:
    scores = np.array([0.7, 0.7], np.float32)
    assert np.float64(scores[0]) < 0.7
    for thresholds in (0.7, np.float64(0.7), np.full(2, 0.7)):
        assert at_threshold(scores, make_pairs([1, 0]), thresholds, resamples=0)["catch"]["value"] == 1
    assert at_threshold(np.array([1, 0]), make_pairs([1, 0]), 0.5, resamples=0)["false_block"]["value"] == 0


def at_threshold_by_hand(scores, pairs: Pairs, thresholds, weights) -> list[float]:
    blocked = (scores >= thresholds) & (scores > NEVER)
    liked, rejected = weights * ~pairs.rejected, weights * pairs.rejected
    shares, lists = 0.0, 0.0
    for row in np.unique(pairs.users[~pairs.rejected]):
        mine = (pairs.users == row) & ~pairs.rejected
        weight = weights[mine][0]
        shares += weight * blocked[mine].mean()
        lists += weight
    with np.errstate(divide="ignore", invalid="ignore"):
        catch, false_block = rejected[blocked].sum() / rejected.sum(), liked[blocked].sum() / liked.sum()
        return [catch, false_block, np.divide(shares, lists), catch / false_block]


@pytest.mark.parametrize("seed", range(3))
def test_at_thresholds_equals_a_loop_over_lists_in_every_resample(seed) -> None:
    scores, pairs = random_world(seed)
    thresholds = np.random.default_rng(seed).choice([0.3, 0.5, NEVER, np.inf], 14)[pairs.users]
    drawn = [at_threshold_by_hand(scores, pairs, thresholds, weight) for weight in resampled(pairs, 30, seed)]
    value = at_threshold_by_hand(scores, pairs, thresholds, np.ones(len(pairs)))
    found = at_threshold(scores, pairs, thresholds, resamples=30, seed=seed)
    assert list(found) == ["catch", "false_block", "false_block_per_user", "selectivity"]
    for place, figure in enumerate(found.values()):
        assert same(figure, value[place], *ends(np.array(drawn)[:, place]))


def test_no_threshold_brings_in_what_is_never_held_and_selectivity_without_harm_is_infinite() -> None:
    pairs = make_pairs([1, 0])
    found = at_threshold(np.array([NEVER, NEVER]), pairs, NEVER, resamples=5)
    assert found["catch"]["value"] == found["false_block"]["value"] == 0
    assert np.isnan(found["selectivity"]["value"])
    assert at_threshold(np.array([1.0, 0.0]), pairs, 1, resamples=5)["selectivity"]["value"] == np.inf


def test_catch_at_is_what_its_threshold_catches() -> None:
    """The two ways to measure agree at the threshold that catch_at chooses."""
    for seed in range(5):
        scores, pairs = random_world(seed)
        chosen = catch_at(scores, pairs, (0.25,), resamples=0)[0.25]["value"]
        measured = [at_threshold(scores, pairs, t, resamples=0) for t in np.unique(scores[scores > NEVER])]
        assert chosen == pytest.approx(
            max(found["catch"]["value"] for found in measured if found["false_block"]["value"] <= 0.25)
        )


# Two systems


def test_a_system_does_not_differ_from_itself_in_any_resample() -> None:
    scores, pairs = random_world(4, levels=60)
    found = paired(scores, np.exp(scores), pairs, (0.3, 0.9), resamples=100)
    assert found.auc_difference == found.within_user_auc_difference == {"value": 0, "low": 0, "high": 0}
    for share in (0.3, 0.9):
        assert same(found.catch_difference[share], 0, 0, 0)
        assert same(found.catch_ratio[share], 1, 1, 1)


def test_two_systems_on_paper() -> None:
    """All users are alike, so every resample says the same: ours catches two of two, theirs one."""
    pairs = make_pairs([1, 1, 0] * 6, users=np.repeat(np.arange(6), 3))
    found = paired(np.tile([3.0, 2.0, 1.0], 6), np.tile([9.0, 7.0, 8.0], 6), pairs, (0.0,), resamples=30)
    assert same(found.auc_difference, 0.5, 0.5, 0.5)
    assert same(found.within_user_auc_difference, 0.5, 0.5, 0.5)
    assert same(found.catch_difference[0.0], 0.5, 0.5, 0.5)
    assert same(found.catch_ratio[0.0], 2, 2, 2)


def test_differences_and_ratios_equal_brute_force_in_every_resample() -> None:
    (ours, pairs), (theirs, _) = random_world(1), random_world(2)
    ones, weights = np.ones(len(pairs)), resampled(pairs, 25, 3)
    found = paired(ours, theirs, pairs, (0.3,), resamples=25, seed=3)

    def both(measure, *more) -> np.ndarray:
        return np.array([[measure(s, pairs, w, *more) for s in (ours, theirs)] for w in (ones, *weights)]).T

    for figure, (mine, other) in (
        (found.auc_difference, both(auc_by_hand)),
        (found.within_user_auc_difference, both(auc_by_hand, True)),
        (found.catch_difference[0.3], both(catch_by_hand, 0.3)),
    ):
        assert same(figure, (mine - other)[0], *ends((mine - other)[1:]))
    mine, other = both(catch_by_hand, 0.3)
    assert same(found.catch_ratio[0.3], mine[0] / other[0], *ends(mine[1:] / other[1:]))


# What cannot be measured


@pytest.mark.parametrize("rejected", [[], [1, 1, 1], [0, 0, 0]])
def test_without_one_of_the_sides_a_measure_is_nan(rejected) -> None:
    pairs, scores = make_pairs(rejected, users=[0, 1, 1][: len(rejected)]), np.arange(len(rejected), dtype=np.float32)
    everything = [auc(scores, pairs, resamples=9), within_user_auc(scores, pairs, resamples=9)]
    everything += catch_at(scores, pairs, resamples=9).values()
    everything.append(at_threshold(scores, pairs, 1, resamples=9)["selectivity"])
    both = paired(scores, -scores, pairs, (0.1,), resamples=9)
    everything += [both.auc_difference, both.within_user_auc_difference, both.catch_difference[0.1]]
    everything.append(both.catch_ratio[0.1])
    for figure in everything:
        np.testing.assert_equal(figure, NOTHING)
    assert np.isnan(catch_curve(scores, pairs, np.array([0.1, 0.2]), resamples=9)["high"]).all()
    found = at_threshold(scores, pairs, 1, resamples=9)
    assert np.isnan(found["catch"]["value"]) == (not any(rejected))
    for name in ("false_block", "false_block_per_user"):
        assert np.isnan(found[name]["value"]) == (not len(rejected) or all(rejected))


def test_lists_of_one_kind_compare_nothing_within() -> None:
    pairs, scores = make_pairs([1, 0], users=[0, 1]), np.array([1.0, 0.0])
    np.testing.assert_equal(within_user_auc(scores, pairs, resamples=9), NOTHING)
    assert auc(scores, pairs, resamples=9)["value"] == 1


def test_scores_and_thresholds_that_cannot_be_measured_are_refused() -> None:
    pairs = make_pairs([1, 0])
    for measure in (auc, within_user_auc, catch_at, lambda s, p: at_threshold(s, p, 0.5), lambda s, p: paired(s, s, p)):
        with pytest.raises(ValueError, match=r"scores have shape \(3,\) for 2 pairs"):
            measure(np.zeros(3), pairs)
        with pytest.raises(ValueError, match="the score of pair 1 is NaN"):
            measure(np.array([0, np.nan]), pairs)
    for thresholds in (np.zeros(3), np.nan, np.array([0, np.nan])):
        with pytest.raises(ValueError, match="thresholds have shape"):
            at_threshold(np.zeros(2), pairs, thresholds)


# Lengths


def test_lengths_on_paper() -> None:
    lengths = np.array([0] * 2 + [3] * 9 + [10] * 8 + [99])
    found = {name: figure["value"] for name, figure in list_lengths(lengths, resamples=10).items()}
    assert found == {"p5": 0, "p50": 3, "p95": 10, "mean": pytest.approx(206 / 20), "none": 0.1}


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(0, 3))
def test_lengths_equal_those_of_repeated_lists_in_every_resample(lengths, seed) -> None:
    lengths, users = np.array(lengths), np.arange(len(lengths)) // 2
    weights = [np.ones(len(lengths), int)]
    weights += [w.astype(int) for part in metrics.user_weights(users[-1] + 1, 7, seed) for w in part[users].T]
    rows = []
    for weight in weights:
        drawn = np.repeat(lengths, weight)
        percentiles = np.percentile(drawn, [5, 50, 95], method="inverted_cdf")
        rows.append([*percentiles, drawn.mean(), (drawn == 0).mean()])
    for place, figure in enumerate(list_lengths(lengths, users, resamples=7, seed=seed).values()):
        assert same(figure, rows[0][place], *ends(np.array(rows[1:])[:, place]))


def test_no_lists_have_no_lengths() -> None:
    found = list_lengths(np.zeros(0, int))
    for figure in found.values():
        np.testing.assert_equal(figure, NOTHING)
    with pytest.raises(ValueError, match="users has 1 values for 2 lists"):
        list_lengths(np.zeros(2, int), np.zeros(1, int))


# Intervals and time


def test_intervals_of_auc_cover_the_truth_at_about_the_nominal_rate() -> None:
    """200 worlds of 80 users, who shift all their scores alike by N(0, 1/4): over users the difference of a rejected
    and a liked pair is N(1, 2.5), within a user N(1, 2).
    """
    truth = {auc: NormalDist().cdf(1 / np.sqrt(2.5)), within_user_auc: NormalDist().cdf(1 / np.sqrt(2))}
    random = np.random.default_rng(0)
    covered = dict.fromkeys(truth, 0)
    users = np.repeat(np.arange(80), 6)
    pairs = make_pairs(np.tile([1, 0, 0], 160), users)
    for seed in range(200):
        scores = random.normal(size=480) + random.normal(0, 0.5, 80)[users] + pairs.rejected
        for measure, value in truth.items():
            figure = measure(scores, pairs, resamples=200, seed=seed)
            covered[measure] += figure["low"] <= value <= figure["high"]
    # Binomial(200, .95) lies in here with probability above .999; the percentile interval loses a point or two.
    assert all(178 <= count <= 199 for count in covered.values()), covered
