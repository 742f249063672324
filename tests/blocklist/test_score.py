"""The fitted score: one number whichever way it is asked for, and weights that are those of the best fit."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logs import USERS, random_log, random_score
from scipy.optimize import minimize

from conrec.blocklist.score import LOG_PROB, RIDGE, VERDICT, Linear, Score, fit_linear, sigmoid
from conrec.errors import ArtefactError


@pytest.mark.parametrize("seed", range(3))
def test_dense_equals_pairs(seed):
    log, rng = random_log(seed), np.random.default_rng(seed)
    counts = log.counts()
    score = random_score(rng, counts)
    users = rng.permutation(USERS)[:7]
    things = len(log.things)
    columns = counts.columns(np.repeat(users, things), np.tile(np.arange(things), 7))
    linears = [score.counted.odds, score.counted.exposure]
    # Also of a part of the columns, of each alone, and of none.
    linears += [Linear({name: 0.7}, -0.2) for name in (*counts.odds_names, *counts.exposure_names)]
    linears += [Linear({"leaning": 1.0, "expected": -1.0}, 0.5), Linear({}, 0.25)]
    for linear in linears:
        dense = linear.dense(counts, users, counts.expected(users))
        assert dense.dtype == np.float32 and dense.shape == (7, things)
        np.testing.assert_allclose(dense.ravel(), linear.of(columns), rtol=1e-5, atol=1e-5)
    odds, exposure = score.parts(counts, users, counts.expected(users))
    assert np.array_equal(odds, linears[0].dense(counts, users, counts.expected(users)))
    assert np.array_equal(exposure, linears[1].dense(counts, users, counts.expected(users)))


def test_what_the_policy_says_enters_both_parts():
    log, rng = random_log(0), np.random.default_rng(0)
    counts = log.counts()
    score = random_score(rng, counts)
    columns = counts.columns(np.arange(6), np.arange(6))
    said = {LOG_PROB: rng.normal(size=6), VERDICT: rng.normal(size=6)}
    odds, exposure = score.parts_of(columns | said)
    judged = score.judged
    counted = judged.odds.bias + sum(judged.odds.weights[name] * columns[name] for name in counts.odds_names)
    np.testing.assert_allclose(odds, counted + sum(judged.odds.weights[name] * said[name] for name in said), rtol=1e-5)
    shown = judged.exposure.bias + sum(judged.exposure.weights[name] * columns[name] for name in counts.exposure_names)
    np.testing.assert_allclose(exposure, shown + judged.exposure.weights[LOG_PROB] * said[LOG_PROB], rtol=1e-5)


def loss(linear, columns, label):
    """The regularised loss: the ridge weighs coefficients of standardised columns, the bias is free."""
    logits = linear.of(columns)
    spread = {name: np.std(np.asarray(columns[name], np.float64)) for name in linear.weights}
    penalty = RIDGE / 2 * sum((linear.weights[name] * spread[name]) ** 2 for name in linear.weights)
    return np.logaddexp(0, np.where(label, -logits, logits)).sum() + penalty


def best(columns, label):
    """The same minimised by scipy."""
    names = tuple(columns)
    spread = np.array([np.std(columns[name]) for name in names])

    def of(weights):
        return Linear(dict(zip(names, weights[:-1] / spread, strict=True)), float(weights[-1]))

    found = minimize(lambda weights: loss(of(weights), columns, label), np.zeros(len(names) + 1), method="BFGS")
    return of(found.x)


def data(seed, count=400, scale=1.0):
    rng = np.random.default_rng(seed)
    columns = {
        "a": rng.normal(5, 2, count),
        "b": rng.exponential(30, count),
        "c": rng.integers(0, 2, count).astype(float),
    }
    columns["d"] = columns["a"] + rng.normal(0, 0.3, count)
    logits = scale * (columns["a"] - 5 - columns["b"] / 30 + 2 * columns["c"])
    return columns, rng.random(count) < 1 / (1 + np.exp(-logits))


@pytest.mark.parametrize("scale", [0.0, 1.0, 20.0], ids=["noise", "some", "separable"])
@pytest.mark.parametrize("seed", range(3))
def test_the_fit_is_that_of_scipy(seed, scale):
    columns, label = data(seed, scale=scale)
    found = fit_linear(columns, tuple(columns), label)
    expected = best(columns, label)
    assert loss(found, columns, label) <= loss(expected, columns, label) + 1e-6
    for name, values in columns.items():
        assert found.weights[name] * values.std() == pytest.approx(expected.weights[name] * values.std(), abs=2e-3)
    np.testing.assert_allclose(found.of(columns), expected.of(columns), atol=2e-2)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(2, 60),
    st.integers(1, 4),
    st.sampled_from([1.0, 1e-3, 1e4]),
    st.sampled_from([0.5, 0.02]),
    st.booleans(),
)
def test_nothing_near_the_fit_is_better(seed, count, width, unit, share, separable):
    """However few rows there are, whatever their units, and where a column tells the label without fail."""
    rng = np.random.default_rng(seed)
    columns = {str(number): unit * rng.standard_t(2, count) for number in range(width)}
    label = rng.random(count) < share
    if separable:
        columns["0"] = unit * (label + 0.01 * rng.normal(size=count))
    found = fit_linear(columns, tuple(columns), label)
    assert np.isfinite([*found.weights.values(), found.bias]).all()
    if not 0 < label.sum() < count:
        return
    least = loss(found, columns, label)
    for name, values in columns.items():
        for step in (1e-3, -1e-3):
            # The bias gives way, as it would in a regression of centred columns.
            change = step / values.std()
            moved = Linear({**found.weights, name: found.weights[name] + change}, found.bias - change * values.mean())
            assert loss(moved, columns, label) >= least - 1e-9
    for step in (1e-3, -1e-3):
        assert loss(Linear(found.weights, found.bias + step), columns, label) >= least - 1e-9


def test_one_label_of_many_that_a_column_tells_without_fail_is_fitted():
    """Whole steps of Newton's method leapt over the best and back for ever."""
    label = np.arange(18) == 4
    columns = {"a": label + 0.01 * np.sin(np.arange(18))}
    found, expected = fit_linear(columns, ("a",), label), best(columns, label)
    assert found.weights["a"] == pytest.approx(expected.weights["a"], rel=1e-3)
    assert found.bias == pytest.approx(expected.bias, rel=1e-3)


def test_columns_in_other_units_have_the_same_fit():
    columns, label = data(0)
    found = fit_linear(columns, tuple(columns), label)
    moved = {name: values * 1000 - 7 for name, values in columns.items()}
    again = fit_linear(moved, tuple(columns), label)
    np.testing.assert_allclose(again.of(moved), found.of(columns), rtol=1e-6, atol=1e-6)
    assert again.weights["a"] == pytest.approx(found.weights["a"] / 1000)


@pytest.mark.parametrize("value", [0.0, 3.0, -1e6])
def test_a_column_that_does_not_vary_has_no_weight_and_changes_nothing(value):
    columns, label = data(1)
    found = fit_linear(columns, tuple(columns), label)
    more = fit_linear({**columns, "flat": np.full(400, value, np.float32)}, (*columns, "flat"), label)
    assert more.weights["flat"] == 0
    assert {name: more.weights[name] for name in columns} == pytest.approx(found.weights)
    assert more.bias == pytest.approx(found.bias)


def test_only_the_named_columns_are_used():
    columns, label = data(1)
    found = fit_linear(columns, ("c",), label)
    assert set(found.weights) == {"c"}
    assert found == fit_linear({"c": columns["c"]}, ("c",), label)


@pytest.mark.parametrize("label", [True, False])
@pytest.mark.parametrize("count", [0, 1, 99])
def test_one_label_alone_has_no_weights_and_a_smoothed_share(label, count):
    columns = {"a": np.arange(count, dtype=float), "b": np.ones(count)}
    found = fit_linear(columns, ("a", "b"), np.full(count, label))
    assert found.weights == {"a": 0.0, "b": 0.0}
    yes, no = (count, 0) if label else (0, count)
    assert found.bias == pytest.approx(np.log((yes + 0.5) / (no + 0.5)))


def test_a_sum_within_a_sum_is_unfolded():
    columns, _ = data(0)
    inner = Linear({"a": 2.0, "b": -0.5}, 1.5)
    outer = Linear({"inner": 0.7, "b": 3.0, "c": -1.0}, -2.0)
    unfolded = outer.unfolded("inner", inner)
    assert unfolded.weights.keys() == {"a", "b", "c"}
    np.testing.assert_allclose(unfolded.of(columns), outer.of(columns | {"inner": inner.of(columns)}), rtol=1e-9)


def test_sigmoid_lies_inside_0_and_1_and_never_falls():
    values = np.array([-np.inf, -1e30, -200, -100, -88, -20, -1, 0, 1, 17, 20, 200, 1e30, np.inf], np.float32)
    found = sigmoid(values)
    assert found.dtype == np.float32
    assert (found > 0).all() and (found < 1).all()
    assert (np.diff(found) >= 0).all()
    assert found[7] == 0.5
    middle = np.linspace(-10, 10, 101)
    np.testing.assert_allclose(sigmoid(middle), 1 / (1 + np.exp(-middle)), rtol=1e-5)


@pytest.mark.parametrize("judged", [True, False])
def test_json_comes_back_equal(judged):
    log = random_log(0)
    counts = log.counts()
    score = random_score(np.random.default_rng(0), counts, reach=0.45)
    score = Score(score.counted, score.judged if judged else None, score.reach)
    read = Score.from_json(json.loads(json.dumps(score.to_json(), allow_nan=False)))
    assert read == score
    users = np.arange(USERS)
    for one, other in zip(
        read.parts(counts, users, counts.expected(users)),
        score.parts(counts, users, counts.expected(users)),
        strict=True,
    ):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("broken", [{}, {"reach": 1}, {"reach": None}, {"judged": {}}, {"counted": {"odds": {}}}])
def test_what_is_no_score_is_refused(broken):
    document = random_score(np.random.default_rng(0), random_log(0).counts()).to_json()
    document = {} if not broken else document | broken
    if "reach" in broken and broken["reach"] == 1:
        del document["counted"]
    with pytest.raises(ArtefactError, match="not a score"):
        Score.from_json(document)
