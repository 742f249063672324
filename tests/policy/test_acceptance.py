"""Whether a stage of GRPO helped: how often chance is taken for it, and what it rests on."""

import itertools

import numpy as np
import pytest

from conrec.policy.acceptance import LEVEL, lift_gain, sure_lift


def hits(rng, users, fhr, fph):
    return {"fhr": (rng.random(users) < fhr).astype(float), "fph": (rng.random(users) < fph).astype(float)}


def changed(rng, before, share, fhr, fph):
    """The same anchors, a share of them answered anew."""
    again = hits(rng, len(before["fhr"]), fhr, fph)
    anew = rng.random(len(before["fhr"])) < share
    return {name: np.where(anew, again[name], before[name]) for name in before}


@pytest.mark.long
@pytest.mark.parametrize("readings", [1, 2, 4])
@pytest.mark.parametrize("share", [0.2, 1.0], ids=["like the stage before", "another policy"])
def test_a_stage_without_an_effect_is_rarely_accepted(share, readings):
    """The best of several readings, as a stage keeps it. Without a test .5, .75 and .94 of these would be."""
    rng = np.random.default_rng(readings)
    users, trials, accepted = np.arange(300), 120, 0
    for _ in range(trials):
        before = hits(rng, len(users), 0.16, 0.12)
        gains = [lift_gain(before, changed(rng, before, share, 0.16, 0.12), users, readings) for _ in range(readings)]
        accepted += max(gains, key=lambda gain: gain.ratio).sure
    assert accepted / trials <= LEVEL + 3 * np.sqrt(LEVEL * (1 - LEVEL) / trials)


def test_a_stage_that_costs_fewer_likes_is_accepted():
    rng = np.random.default_rng(0)
    users, found = np.arange(1370), []
    for _ in range(20):
        before = hits(rng, len(users), 0.157, 0.124)
        found.append(lift_gain(before, changed(rng, before, 0.7, 0.161, 0.085), users, 2))
    assert np.mean([gain.sure for gain in found]) > 0.6


@pytest.mark.parametrize("readings", [201, 1000])
def test_a_stage_that_is_looked_at_often_can_still_be_accepted(readings):
    users = np.arange(40)
    nothing, everything = {"fhr": np.zeros(40), "fph": np.zeros(40)}, {"fhr": np.ones(40), "fph": np.zeros(40)}
    assert lift_gain(nothing, everything, users, readings).sure


def test_chance_is_that_of_all_exchanges():
    """Six users, so that all 64 can be counted."""
    rng = np.random.default_rng(3)
    before, after = hits(rng, 6, 0.3, 0.6), hits(rng, 6, 0.7, 0.3)

    def lift(values):
        return (values["fhr"].sum() + 0.5) / (values["fph"].sum() + 0.5)

    ratios = []
    for exchanged in itertools.product([False, True], repeat=6):
        was = {name: np.where(exchanged, after[name], before[name]) for name in before}
        now = {name: np.where(exchanged, before[name], after[name]) for name in before}
        ratios.append(lift(now) / lift(was))
    gain = lift_gain(before, after, np.arange(6), 1)
    assert gain.ratio == pytest.approx(ratios[0])
    assert gain.chance == pytest.approx(np.mean(np.array(ratios) >= ratios[0] - 1e-9), abs=0.02)


def test_more_anchors_of_the_same_users_say_no_more():
    rng = np.random.default_rng(2)
    before = hits(rng, 200, 0.2, 0.1)
    after = changed(rng, before, 0.5, 0.3, 0.1)
    once = lift_gain(before, after, np.arange(200), 1)
    again = [{name: np.tile(values, 4) for name, values in one.items()} for one in (before, after)]
    four = lift_gain(*again, np.arange(800) % 200, 1)
    assert four.chance == pytest.approx(once.chance, abs=0.01)


def test_what_is_undefined_or_never_hit_has_a_gain_that_is_not_sure():
    nothing = {"fhr": np.zeros(50), "fph": np.full(50, np.nan)}
    gain = lift_gain(nothing, nothing, np.arange(50), 1)
    assert gain.ratio == 1 and not gain.sure
    few = {"fhr": (np.arange(50) < 4).astype(float), "fph": np.zeros(50)}
    assert not lift_gain(nothing, few, np.arange(50), 1).sure
    assert lift_gain(nothing, few, np.arange(50), 1).chance == pytest.approx(2**-4, abs=0.01)
    assert not lift_gain(*({"fhr": np.zeros(0), "fph": np.zeros(0)},) * 2, np.zeros(0, int), 1).sure


def reading(anchors, rejected, liked):
    """Of so many anchors, with a last one that says nothing of likes."""
    return {
        "fhr": (np.arange(anchors) < rejected).astype(float),
        "fph": np.r_[(np.arange(anchors - 1) < liked).astype(float), np.nan],
    }


def test_a_reading_of_one_hit_is_no_best_one():
    for anchors, few, many in (
        (20, (1, 0), (6, 4)),
        (20, (2, 0), (6, 4)),
        (100, (1, 0), (30, 10)),
        (100, (0, 0), (9, 9)),
    ):
        assert sure_lift(reading(anchors, *few)) < sure_lift(reading(anchors, *many)), (few, many)


def test_more_rejections_and_fewer_likes_are_a_better_reading():
    for rejected, liked in itertools.product(range(12), repeat=2):
        here = sure_lift(reading(20, rejected, liked))
        assert sure_lift(reading(20, rejected + 1, liked)) > here > sure_lift(reading(20, rejected, liked + 1))
    # Of many anchors it is nearly the Lift itself.
    assert sure_lift(reading(10**6, 400_000, 100_000)) == pytest.approx(np.log(4), abs=0.01)


@pytest.mark.parametrize("anchors", [20, 300])
def test_the_bound_holds_of_nineteen_readings_in_twenty(anchors):
    rng = np.random.default_rng(4)
    found = [sure_lift(hits(rng, anchors, 0.16, 0.12)) for _ in range(4000)]
    assert np.mean(np.array(found) > np.log(0.16 / 0.12)) <= LEVEL
