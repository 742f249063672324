"""The headline's users in words: a world of two tastes in which everything that must be said is known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from worlds import CODES, SEMANTIC_IDS, TRIE

from conrec.blocklist.calibrate import Calibration, Stratum
from conrec.blocklist.counts import Counts, Things
from conrec.blocklist.ranking import Answers
from conrec.blocklist.score import LOG_PROB, VERDICT, Estimate, Linear, Score
from conrec.config import Config
from conrec.evaluation.document import Evaluation
from conrec.evaluation.examples import EXAMPLE_LINES, NOT_SHOWN, examples
from conrec.evaluation.headline import OURS, TREES, Published, headline
from conrec.evaluation.published import shown_pairs
from conrec.evaluation.published_lists import Shown, _noting, lists_of, part_of
from conrec.feedback.anchors import served_anchors
from conrec.feedback.events import LIKED, REJECTED, SHOWN, Events
from conrec.ragged import Ragged
from conrec.report.report import report_html

DAY, CUT = 86_400_000_000, 1_767_225_600_000_000
USERS = 12
ITEMS = len(SEMANTIC_IDS)
KINDS = np.arange(ITEMS) // CODES
NAMES = np.array(["Sport", "Cooking", "News", "Music"])


def log() -> Events:
    """User u rejects items of one category, as many as u // 4 + 2, likes two of the next, and meets more later.

    In the window: the last item of the rejected category is rejected, the last of the liked one liked, and the third
    category's last is shown to every second user.
    """
    rows = []
    for user in range(USERS):
        bad, good, other = (user % 4), (user + 1) % 4, (user + 2) % 4
        rows += [(user, bad * CODES + n, CUT - (9 - n) * DAY, REJECTED) for n in range(min(user // 4 + 1, 2))]
        rows += [(user, bad * CODES, CUT - 8 * DAY, REJECTED)]
        rows += [(user, good * CODES + n, CUT - (5 - n) * DAY, LIKED) for n in range(2)]
        rows += [(user, bad * CODES + 3, CUT + DAY, REJECTED), (user, good * CODES + 3, CUT + 2 * DAY, LIKED)]
        if user % 2 == 0:
            rows.append((user, other * CODES + 3, CUT + DAY, SHOWN))
    rows.sort(key=lambda row: (row[0], row[2]))
    users, items, times, kinds = map(np.array, zip(*rows, strict=True))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(users, minlength=USERS))])
    names = pa.array([f"user{number:02d}" for number in range(USERS)])
    return Events(names, offsets, items.astype(np.int32), times, kinds.astype(np.int8))


@pytest.fixture(scope="module")
def world() -> Any:
    guards = {"min_negatives": 1, "min_history": 1, "max_user_share": 1.0, "max_catalogue_share": 1.0}
    inputs: dict[str, Any] = {"root": "unused", "interactions": {"path": "unused"}, "items": {"path": "unused"}}
    settings = {"guardrails": guards, "evaluation": {"resamples": 20}, "calibration": {"alpha": 0.05}}
    config = Config.model_validate(inputs | settings | {"timeline": {"cut": "2026-01-01T00:00:00Z"}})
    events = log()
    items = pa.table({"item_id": [f"i{item:02d}" for item in range(ITEMS)], "category": NAMES[KINDS]})
    live = np.ones(ITEMS, bool)
    catalogue = SimpleNamespace(items=items, item_ids=items["item_id"].combine_chunks(), trie=TRIE, live=live)
    served = served_anchors(events, CUT, 1, 1, CUT + 7 * DAY)
    assert len(served) == USERS
    return SimpleNamespace(events=events, config=config, catalogue=catalogue, served=served, past=events.before(CUT))


@pytest.fixture(scope="module")
def counts(world: Any) -> Counts:
    return Counts.at(world.events, CUT, Things.of(SEMANTIC_IDS, TRIE, {"category": KINDS}))


TASTE = Estimate(Linear({"user x category": 1.5, "leaning": 0.5}, 0.0), Linear({}, 0.0))


def score(judged: bool = False) -> Score:
    """What a user said of a category, and how readily they reject; the policy's verdict where it was asked."""
    says = Estimate(Linear({**TASTE.odds.weights, LOG_PROB: 0.0, VERDICT: 5.0}, 0.0), TASTE.exposure)
    return Score(TASTE, says if judged else None, 1.0)


def calibration(threshold: float | None) -> Calibration:
    def at(alpha: float, limit: float | None) -> Calibration:
        stratum = Stratum(0, None, 50, limit, 0.01)
        return Calibration(alpha, stratum, (stratum,))

    served = at(0.05, threshold)
    return Calibration(0.05, served.overall, served.strata, (at(0.01, 0.99), at(0.1, 0.3)))


def lists(world: Any, counts: Counts, made: Score, answers: Answers, threshold: float | None = 0.5) -> Published:
    pairs = shown_pairs(world.events, world.served)
    odds = made.counted.odds.of(counts.columns(world.served.users[pairs.users], pairs.items))
    return lists_of(world, counts, made, odds, answers, pairs, calibration(threshold))


def shown(
    world: Any, counts: Counts, made: Score, answers: Answers, threshold: float | None = 0.5
) -> list[dict[str, Any]]:
    best = lists(world, counts, made, answers, threshold).best
    return examples(world, counts, made, answers, calibration(threshold), best, {"leaning": 0.0, VERDICT: 0.0})


def test_a_user_is_told_by_what_they_rejected_what_is_blocked_and_what_came_of_it(world: Any, counts: Counts) -> None:
    answers = Answers.nothing(USERS)
    found = shown(world, counts, score(), answers)
    assert [user["kind"] for user in found] == ["sure", "middling", "unsure"]
    assert len({user["user"] for user in found}) == 3
    for user in found:
        number = int(user["user"].removeprefix("user"))
        bad, history = NAMES[number % 4], min(number // 4 + 1, 2) + 1
        assert user["rejections"] == history
        assert user["rejected"] == [{"words": bad, "count": history}]
        assert user["length"] >= len(user["blocked"]) > 0 and len(user["blocked"]) <= EXAMPLE_LINES
        of_category = [item for item in user["blocked"] if item["words"] == bad]
        # What they rejected themselves is blocked as said, not predicted; the last of the category is rejected later.
        last = f"i{(number % 4) * CODES + 3:02d}"
        assert {item["item"]: item["window"] for item in of_category}[last] == "rejected"
        assert all(item["window"] == NOT_SHOWN for item in of_category if item["item"] != last)
        assert all(item["reasons"][0] == "user x category" and item["log_odds"] > 0 for item in of_category)
        assert user["blocked"][: len(of_category)] == of_category, "the best by score first"
    best = lists(world, counts, score(), answers).best
    chosen = [best[int(user["user"].removeprefix("user"))] for user in found]
    assert chosen == sorted(chosen, reverse=True)
    assert shown(world, counts, score(), answers) == found


def test_the_window_says_a_like_before_a_rejection_and_what_was_only_shown(world: Any, counts: Counts) -> None:
    everything = Estimate(Linear({}, 2.0), Linear({}, 0.0))
    windows = {}
    for user in shown(world, counts, Score(everything, None, 1.0), Answers.nothing(USERS)):
        windows |= {(user["user"], item["item"]): item["window"] for item in user["blocked"]}
        assert all(not item["reasons"] for item in user["blocked"]), "nothing is told by what is the same for all"
    assert windows
    events = world.events
    for (user, item), said in windows.items():
        place = slice(*events.offsets[int(user[4:]) : int(user[4:]) + 2])
        later = (events.items[place] == int(item[1:])) & (events.times[place] > CUT)
        kinds = set(events.kinds[place][later].tolist())
        assert said == {frozenset(): NOT_SHOWN, frozenset({REJECTED}): "rejected", frozenset({LIKED}): "liked"}.get(
            frozenset(kinds), "shown"
        )


def test_what_the_policy_said_is_a_reason_where_it_was_asked(world: Any, counts: Counts) -> None:
    """Every user is asked about the last item of the fourth category after theirs, and the policy says rejected."""
    leaves = TRIE.item_leaves[(np.arange(USERS) + 3) % 4 * CODES + 2].astype(np.int64)
    ones = np.ones(USERS, np.int64)
    answers = Answers(Ragged.from_lengths(leaves, ones), np.full(USERS, -1, np.float32), np.full(USERS, 3, np.float32))
    for user in shown(world, counts, score(judged=True), answers):
        first = user["blocked"][0]
        assert first["item"] == f"i{(int(user['user'][4:]) + 3) % 4 * CODES + 2:02d}"
        assert first["reasons"][0] == VERDICT
        assert all(VERDICT not in item["reasons"] for item in user["blocked"][1:])


def test_a_part_lists_what_was_generated_and_nothing_else(world: Any, counts: Counts) -> None:
    """Even where a threshold of 0 keeps the promise, and however small the probability of what was generated."""
    leaves = TRIE.item_leaves[(np.arange(USERS) + 3) % 4 * CODES + 2].astype(np.int64)
    ones = np.ones(USERS, np.int64)
    answers = Answers(Ragged.from_lengths(leaves, ones), np.full(USERS, -60, np.float32), np.zeros(USERS, np.float32))
    pairs = shown_pairs(world.events, world.served)
    known = np.arange(len(pairs)) > 0
    part, odds = part_of((LOG_PROB,), Shown(pairs, counts, {}, known, {LOG_PROB: np.full(len(pairs) - 1, -60.0)}))
    assert odds[0] == -np.inf and (odds[1:] == -60).all()
    found = lists_of(world, counts, part, odds, answers, pairs, calibration(0.0))
    assert found.lengths["0.05"].tolist() == [1] * USERS
    generated = TRIE.item_leaves[pairs.items] == leaves[pairs.users]
    assert (np.isfinite(found.scores) == generated).all()


def test_nobody_is_shown_where_nothing_is_predicted(world: Any, counts: Counts) -> None:
    assert shown(world, counts, score(), Answers.nothing(USERS), None) == []


def test_fewer_lists_than_kinds_are_shown_once_each(world: Any, counts: Counts) -> None:
    best = np.full(USERS, -np.inf, np.float32)
    best[5] = 0.9
    found = examples(world, counts, score(), Answers.nothing(USERS), calibration(0.5), best, {})
    assert [(user["kind"], user["user"]) for user in found] == [("sure", "user05")]


def test_the_largest_score_is_noted_and_the_lists_pass_unchanged() -> None:
    rows = SimpleNamespace(
        rows=np.array([0, 0, 1, 2, 2]),
        explicit=np.array([True, False, True, False, False]),
        scores=np.array([1, 0.25, 1, 0.5, 0.75], np.float32),
    )
    best = np.full(5, -np.inf, np.float32)
    given = [(np.array([1, 2, 3]), rows)]
    assert list(_noting(iter(given), best)) == given  # type: ignore[arg-type]
    assert best.tolist() == [-np.inf, 0.25, -np.inf, 0.75, -np.inf]


def test_the_document_of_a_night_is_a_report(world: Any, counts: Counts) -> None:
    answers, pairs = Answers.nothing(USERS), shown_pairs(world.events, world.served)
    made = lists(world, counts, score(), answers)
    items = Score(Estimate(Linear({"rejected": 1.0, "liked": -1.0}, 0.0), TASTE.exposure), None, 1.0)
    document = headline(world, {OURS: made, TREES: lists(world, counts, items, answers)}, pairs)
    document["examples"] = shown(world, counts, score(), answers)
    html = report_html(
        Evaluation(
            {}, {}, published=document, calibration=calibration(0.5).to_json(), score=score(judged=True).to_json()
        )
    )
    assert "Three users as they would see it" in html
    assert all(f"user {user['user']}</h3>" in html for user in document["examples"])
    assert "what the user said of other items of its category" in html
    assert document["systems"][OURS]["at_alpha"]["0.05"]["catch"]["value"] == 1
    assert "<b>100 are spared</b>" in html
