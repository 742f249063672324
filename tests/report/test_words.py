"""Odds, columns and promises as people read them."""

import math

import pytest

from conrec.report.words import alpha_words, column_words, odds_words


@pytest.mark.parametrize(
    ("odds", "said"),
    [
        (4.0, "4 to 1 that it is rejected"),
        (1 / 4, "4 to 1 that it is liked"),
        (1.44, "1.4 to 1 that it is rejected"),
        (9.96, "10 to 1 that it is rejected"),
        (62.4, "62 to 1 that it is rejected"),
        (1e6, "more than 99 to 1 that it is rejected"),
        (1.0, "as likely rejected as liked"),
        (0.97, "as likely rejected as liked"),
    ],
)
def test_odds_are_a_bet(odds: float, said: str) -> None:
    assert odds_words(math.log(odds)) == said


@pytest.mark.parametrize("log_odds", [1e6, -1e6, math.inf, -math.inf])
def test_boundless_odds_are_said_too(log_odds: float) -> None:
    assert odds_words(log_odds) == f"more than 99 to 1 that it is {'rejected' if log_odds > 0 else 'liked'}"


def test_every_column_has_words_and_attributes_are_named() -> None:
    assert column_words("colour") == "how its colour is taken by all users"
    assert column_words("user x colour") == "what the user said of other items of its colour"
    names = ("rejected", "liked", "shown", "fresh", "leaning", "events", "excess", "expected", "log_prob", "verdict")
    assert len({column_words(name) for name in (*names, "user x prefix")}) == 11
    assert not any("taken by all" in column_words(name) for name in names)


def test_alphas_are_written_as_the_figures_are() -> None:
    assert [alpha_words(alpha) for alpha in ("0.05", 0.1, 0.025)] == ["alpha .05", "alpha .1", "alpha .025"]
