"""One way from a history to a list: against loops, at any threshold, and the night against the measures."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logs import DAY, ITEMS, NOW, USERS, assert_same_of_things, events_of, random_asked, random_log, random_score

from conrec import storage
from conrec.blocklist import ranking as module
from conrec.blocklist.calibrate import Calibration, Stratum
from conrec.blocklist.counts import Counts
from conrec.blocklist.guardrails import admit, facts, select
from conrec.blocklist.night import night
from conrec.blocklist.ranking import Answers, Ranking, candidates_needed, listing, published
from conrec.blocklist.resolve import leaf_vectors, pair_similarities, resolve
from conrec.blocklist.score import LOG_PROB, VERDICT
from conrec.catalogue.codebook import format_semantic_ids
from conrec.config import GuardrailSettings, PublishSettings
from conrec.feedback.events import CODED
from conrec.feedback.log import divided
from conrec.parallel import as_tasks, in_process
from conrec.store.compiled import with_compiled
from conrec.store.publish import write_version
from conrec.tables import GENERATED

NEAR = 0.8
LIMITS = GuardrailSettings(
    max_items_per_user=7, max_catalogue_share=1.0, min_history=3, min_negatives=2, protect_days=8, explicit_days=8
)
EVERYONE = np.arange(USERS)


def ranked(seed):
    """A log, a ranking with every column in its score, and what was generated for each user."""
    log, rng = random_log(seed), np.random.default_rng(seed)
    counts = log.counts()
    return log, Ranking(counts, random_score(rng, counts), log.trie, log.live), random_asked(rng, USERS, len(log.trie))


def with_near(log, ranking, answers):
    vectors = leaf_vectors(log.codebook, log.trie)
    return replace(ranking, resolution=resolve(np.unique(answers.leaves.values), log.trie, vectors, NEAR))


def said_of(answers, user):
    """What the policy said for a user: leaf -> (log probability, verdict), in the order of generation."""
    part = slice(answers.leaves.offsets[user], answers.leaves.offsets[user + 1])
    return {
        int(leaf): (log_prob, verdict)
        for leaf, log_prob, verdict in zip(
            answers.leaves.values[part], answers.log_probs[part], answers.verdicts[part], strict=True
        )
    }


def slow_scores(log, ranking, answers):
    """The score of every user and thing, one pair at a time."""
    found = np.zeros((USERS, len(log.things)))
    for user in range(USERS):
        said = said_of(answers, user)
        every = ranking.counts.columns(np.full(len(log.things), user), np.arange(len(log.things)))
        for thing in range(len(log.things)):
            if thing < ITEMS and not log.live[thing]:
                continue
            leaf = int(log.trie.item_leaves[thing]) if thing < ITEMS else thing - ITEMS
            columns = {name: float(values[thing]) for name, values in every.items()}
            estimate = ranking.score.counted
            if leaf in said:
                estimate = ranking.score.judged
                columns |= dict(zip((LOG_PROB, VERDICT), map(float, said[leaf]), strict=True))
            odds, exposure = (
                linear.bias + sum(weight * columns[name] for name, weight in linear.weights.items())
                for linear in (estimate.odds, estimate.exposure)
            )
            found[user, thing] = 1 / (1 + math.exp(-(odds + ranking.score.reach * exposure)))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_one_pair_at_a_time_judged_where_generated_and_counted_elsewhere(seed):
    log, ranking, answers = ranked(seed)
    expected = slow_scores(log, ranking, answers)
    scores = ranking.scores(EVERYONE, answers)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-7)
    # The judgement counts: without it others would be there.
    counted = ranking.scores(EVERYONE, Answers.nothing(USERS))
    differs = np.abs(counted - scores) > 1e-5
    told = [log.trie.leaf_items[leaf] for user in range(USERS) for leaf in said_of(answers, user)]
    assert differs.sum() == sum(map(len, told)) + len(told)


def slow_predictions(log, ranking, answers, thresholds):
    """From the scores alone: {(user, item): (score, similarity, leaf)} and {(user, leaf): score}."""
    scores = ranking.scores(EVERYONE, answers)
    vectors = leaf_vectors(log.codebook, log.trie)
    items, rules = {}, {}
    for user in range(USERS):
        for thing in range(len(log.things)):
            score = scores[user, thing]
            if not score >= thresholds[user]:
                continue
            if thing >= ITEMS:
                rules[user, thing - ITEMS] = score
                continue
            if not log.live[thing]:
                continue
            own = int(log.trie.item_leaves[thing])
            nearest = (score, np.float32(0), own)
            for leaf in said_of(answers, user):
                similarity = pair_similarities(vectors, np.array([leaf]), np.array([own]))[0]
                if similarity >= np.float32(NEAR) and similarity > nearest[1]:
                    nearest = (score, similarity, leaf)
            items[user, thing] = nearest
    return items, rules


def as_dictionaries(predicted, ruled):
    items = {
        (row, item): found
        for row, item, *found in zip(
            predicted.rows.tolist(),
            predicted.items.tolist(),
            predicted.scores,
            predicted.similarities,
            predicted.leaves.tolist(),
            strict=True,
        )
    }
    assert len(items) == len(predicted.rows)
    rules = dict(zip(zip(ruled.rows.tolist(), ruled.leaves.tolist(), strict=True), ruled.scores, strict=True))
    assert len(rules) == len(ruled.rows)
    return {pair: tuple(found) for pair, found in items.items()}, rules


@pytest.mark.parametrize("seed", range(3))
def test_what_passes_equals_the_loops(seed):
    log, ranking, answers = ranked(seed)
    ranking = with_near(log, ranking, answers)
    scores = ranking.scores(EVERYONE, answers)
    rng = np.random.default_rng(seed)
    # Thresholds at a score, just above one, at nothing and at everything.
    thresholds = scores[EVERYONE, rng.integers(0, scores.shape[1], USERS)]
    thresholds[::4] = np.nextafter(thresholds[::4], np.float32(1))
    thresholds[5::3] = np.inf  # of whom nothing is computed
    thresholds[:2] = 0, np.inf
    items, rules = as_dictionaries(*ranking.predict(EVERYONE, answers, thresholds))
    expected_items, expected_rules = slow_predictions(log, ranking, answers, thresholds)
    assert items == expected_items and list(items) == sorted(items)
    assert rules == expected_rules and list(rules) == sorted(rules)
    assert {item for user, item in items if user == 0} == set(np.flatnonzero(log.live).tolist())
    assert not any(user == 1 for user, _ in (*items, *rules))
    assert {similarity for _, similarity, _ in items.values()} > {0, 1}


@pytest.mark.parametrize("most", [0, 1, 5, ITEMS, 1000])  # 0: where the cap is less than an item
def test_as_many_as_are_needed_are_the_best(most):
    _, ranking, answers = ranked(3)
    thresholds = np.full(USERS, 0.2)
    everything, rules = as_dictionaries(*ranking.predict(EVERYONE, answers, thresholds))
    some, same = as_dictionaries(*ranking.predict(EVERYONE, answers, thresholds, most))
    assert same == rules
    assert some.items() <= everything.items()
    for user in range(USERS):
        scores = sorted((found[0] for (row, _), found in everything.items() if row == user), reverse=True)
        kept = sorted((found[0] for (row, _), found in some.items() if row == user), reverse=True)
        assert kept[:most] == scores[:most]
        assert all(score == scores[max(most, 1) - 1] for score in kept[most:])  # only what is as good as the last


def test_a_user_has_the_best_rules_alone(monkeypatch):
    log, ranking, answers = ranked(4)
    nothing = np.zeros(USERS)
    items, rules = as_dictionaries(*ranking.predict(EVERYONE, answers, nothing))
    assert len(rules) == USERS * len(log.trie)
    monkeypatch.setattr(module, "MOST_RULES", 3)
    same, fewer = as_dictionaries(*ranking.predict(EVERYONE, answers, nothing))
    assert same == items
    for user in range(USERS):
        own = {leaf: score for (row, leaf), score in rules.items() if row == user}
        best = sorted(own, key=lambda leaf: (-own[leaf], leaf))[:3]
        assert {leaf for row, leaf in fewer if row == user} == set(best)


def test_rules_of_one_score_are_no_more_than_the_limit(monkeypatch):
    """As those of IDs that nobody met, below a prefix that nobody met."""
    log, ranking, answers = ranked(4)
    monkeypatch.setattr(module, "MOST_RULES", 3)
    alike = replace(ranking, score=Given(np.zeros((USERS, len(log.things)), np.float32)))
    _, rules = as_dictionaries(*alike.predict(EVERYONE, answers, np.zeros(USERS)))
    assert sorted(rules) == [(user, leaf) for user in range(USERS) for leaf in range(3)]


@pytest.mark.parametrize("seed", range(4))
def test_an_item_that_nobody_met_has_exactly_the_score_of_the_rule_of_its_id(seed):
    log, ranking, answers = ranked(seed)
    scores = ranking.scores(EVERYONE, answers)
    met = set(log.events.items[log.events.times <= NOW].tolist())
    shop, checked = log.things.attributes["shop"], 0
    for item in set(range(ITEMS)) - met:
        rule = ITEMS + int(log.trie.item_leaves[item])
        # A rule has the shop of its ID's first item: an item of another shop may have another score.
        if log.live[item] and shop[item] == shop[rule]:
            assert np.array_equal(scores[:, item], scores[:, rule])
            checked += 1
    assert checked


def lists_of(log, ranking, answers, limits=LIMITS):
    """What `published` yields, as rows of (user, item, explicit, score, similarity, leaf, times) in order."""
    found = []
    for places, rows in published(ranking, log.events, EVERYONE, answers, NOW, limits):
        columns = (places[rows.rows], rows.items, rows.explicit, rows.scores, rows.similarities, rows.leaves)
        found += zip(*(c.tolist() for c in (*columns, rows.demotes_us, rows.expires_us)), strict=True)
    return found


def test_lists_do_not_depend_on_the_block(monkeypatch):
    log, ranking, answers = ranked(5)
    ranking = with_near(log, ranking, answers)
    whole = lists_of(log, ranking, answers)
    for block in (1, 5, 7):
        monkeypatch.setattr("conrec.blocklist.counts.SCORES_AT_ONCE", block * len(log.things))
        assert ranking.block == block
        assert lists_of(log, ranking, answers) == whole
    # Nor on who else is asked for: each user alone.
    for user in range(USERS):
        alone = np.array([user])
        asked_alone = answers.take(alone)
        ((_, rows),) = published(ranking, log.events, alone, asked_alone, NOW, LIMITS)
        assert list(zip(rows.items.tolist(), rows.scores.tolist(), strict=True)) == [
            (row[1], row[3]) for row in whole if row[0] == user
        ]


def test_what_happens_later_changes_no_list():
    log, ranking, answers = ranked(6)
    leak = random_log(6, after=False)
    assert len(leak.events) < len(log.events)
    counts = leak.counts()
    same = replace(ranking, counts=counts)
    assert lists_of(leak, same, answers) == lists_of(log, ranking, answers)


def write_asked(url, log, answers, failed, without=""):
    """The generated table of these users, but for one, with an error for those whose generation failed."""
    rows = [list(said_of(answers, user).items()) for user in range(USERS)]
    columns = [
        log.events.users,
        pa.array([[leaf for leaf, _ in row] for row in rows], GENERATED.field("leaves").type),
        pa.array([[said[0] for _, said in row] for row in rows], GENERATED.field("log_probs").type),
        pa.array([[said[1] for _, said in row] for row in rows], GENERATED.field("verdicts").type),
        pa.array(["it broke" if user in failed else None for user in range(USERS)], pa.string()),
        pa.array(np.zeros(USERS, np.uint64)),
    ]
    table = pa.table(columns, schema=GENERATED).filter(pc.field("user_id") != without)
    storage.write_table(table, storage.join(url, "part.parquet"))


def calibration_at(low, high):
    """One threshold for users with fewer than four rejections, another for the others; None predicts nothing."""
    strata = (Stratum(0, 3, 100, low, 0.0), Stratum(4, None, 100, high, 0.0))
    return Calibration(0.05, Stratum(0, None, 200, low, 0.0), strata)


def tonight(log, ranking, url, calibration, limits, buckets=3, mapped=in_process):
    """The item rows of a night and its rules: {(user, item): (reason, score, ID)}, {(user, ID): (score, threshold)}."""
    publish = PublishSettings(buckets=buckets, holdout_share=0.0)
    vectors = leaf_vectors(log.codebook, log.trie)
    arguments = ([url], log.events, log.item_ids, ranking, vectors, NEAR, calibration, NOW, limits, publish)
    with night(*arguments, mapped) as made:
        blocks = list(made.blocks())
    items = pa.concat_tables([block.items for block in blocks]).to_pylist()
    rules = pa.concat_tables([block.rules for block in blocks]).to_pylist()
    by_item = {(row["user_id"], row["item_id"]): (row["reason"], row["score"], row["semantic_id"]) for row in items}
    by_rule = {(row["user_id"], row["semantic_id"]): (row["score"], row["threshold"]) for row in rules}
    assert len(by_item) == len(items) and len(by_rule) == len(rules)
    return by_item, by_rule


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "changed", [{}, {"max_items_per_user": 1000}, {"max_user_share": 0.3}], ids=["cap", "open", "held"]
)
def test_the_night_at_any_threshold_publishes_what_the_measures_say_it_does(seed, changed, tmp_path):
    """Row by row: a pair is in the list of a night exactly where the threshold is at most the pair's score in the
    longest list, which is what calibrates and what is measured."""
    log, ranking, answers = ranked(seed)
    limits = LIMITS.model_copy(update=changed)
    write_asked(str(tmp_path), log, answers, failed=())
    names, written = log.events.users.to_pylist(), format_semantic_ids(log.trie.semantic_ids).to_pylist()
    rows, items = np.repeat(EVERYONE, ITEMS), np.tile(np.arange(ITEMS), USERS)
    scores = ranking.scores(EVERYONE, answers)
    known = facts(log.events, EVERYONE, NOW, ITEMS, limits)
    enough = (known.rejections >= 2) & (known.met >= 3)
    assert 5 < enough.sum() < USERS

    def measured(thresholds, limits=limits, held=None):
        lists = published(ranking, log.events, EVERYONE, answers, NOW, limits, held)
        return listing(lists, rows, items, ITEMS, {"tonight": thresholds})

    def held_at(thresholds):
        """What is predicted for too many users, before any cap."""
        everything = measured(thresholds, limits.model_copy(update={"max_items_per_user": 1000}))
        users = np.bincount(items[everything.scores >= thresholds[rows]], minlength=ITEMS)
        return users > limits.max_user_share * USERS

    observed = np.sort(measured(np.zeros(USERS)).scores)
    observed = observed[observed > 0]
    middle, high = observed[len(observed) // 2], observed[-5]
    one_above = float(np.nextafter(middle, np.float32(1)))
    lengths, at = (
        [],
        [(0.0, 0.0), (middle, middle), (one_above, one_above), (high, middle), (None, middle), (1.0, None)],
    )
    for low, upper in at:
        calibration = calibration_at(*(None if value is None else float(value) for value in (low, upper)))
        thresholds = calibration.thresholds(known.rejections)
        held = held_at(thresholds)
        found = measured(thresholds, held=held)
        holds = found.scores >= thresholds[rows]
        by_item, by_rule = tonight(log, ranking, str(tmp_path), calibration, limits)

        predicted = {pair: row for pair, row in by_item.items() if row[0] == "predicted"}
        expected = {
            (names[row], f"item{item:02d}"): score
            for row, item, score in zip(rows[holds].tolist(), items[holds].tolist(), found.scores[holds], strict=True)
        }
        assert {pair: row[1] for pair, row in predicted.items()} == expected
        per_user = [sum(user == name for user, _ in predicted) for name in names]
        assert found.lengths["tonight"].tolist() == per_user
        assert max(per_user) <= limits.max_items_per_user
        lengths.append(len(predicted))
        # What users said is there at every threshold.
        explicit = {pair for pair, row in by_item.items() if row[0] == "explicit"}
        assert explicit == {
            (names[row[0]], f"item{row[1]:02d}") for row in lists_of(log, ranking, answers, limits) if row[2]
        }
        assert by_rule == {
            (names[user], written[leaf]): (scores[user, ITEMS + leaf], thresholds[user])
            for user in range(USERS)
            for leaf in range(len(log.trie))
            if enough[user] and scores[user, ITEMS + leaf] >= thresholds[user]
        }
    if limits.max_user_share == 1:
        assert lengths[0] > lengths[1] > lengths[2] >= max(lengths[3:5]) > lengths[5] == 0
    else:
        # The fewer are held back, the longer lists are: they do not grow with a smaller threshold alone.
        assert held_at(np.zeros(USERS)).any() and max(lengths[1:5]) > lengths[5] == 0


def test_rules_and_rows_of_a_night_say_the_same_of_what_nobody_met(tmp_path):
    """The item of the catalogue that nobody met is blocked where its ID is, unless the list is full or has none."""
    log, ranking, answers = ranked(2)
    write_asked(str(tmp_path), log, answers, failed=(3,))
    limits = LIMITS.model_copy(update={"max_items_per_user": 1000})
    by_item, by_rule = tonight(log, ranking, str(tmp_path), calibration_at(0.3, 0.3), limits)
    written = format_semantic_ids(log.trie.semantic_ids).to_pylist()
    shop = log.things.attributes["shop"]
    met = set(log.events.items[log.events.times <= NOW].tolist())
    alike = [
        item
        for item in set(range(ITEMS)) - met
        if log.live[item] and shop[item] == shop[ITEMS + log.trie.item_leaves[item]]
    ]
    both = 0
    for user in log.events.users.to_pylist():
        for item in alike:
            leaf = written[log.trie.item_leaves[item]]
            row, rule = by_item.get((user, f"item{item:02d}")), by_rule.get((user, leaf))
            assert (row is None) == (rule is None)
            if row:
                assert row[1] == rule[0]
                both += 1
    assert both > 10
    assert not any(user == "user03" for user, _ in by_rule)


def test_the_night_does_not_depend_on_buckets_or_blocks(tmp_path, monkeypatch):
    log, ranking, answers = ranked(7)
    write_asked(str(tmp_path), log, answers, failed=(1,))
    whole = tonight(log, ranking, str(tmp_path), calibration_at(0.3, 0.4), LIMITS, buckets=1)
    assert len(whole[0]) > 20 and len(whole[1]) > 20
    for buckets, block in ((1, 1), (1, 5), (7, 2), (40, 3)):
        monkeypatch.setattr("conrec.blocklist.counts.SCORES_AT_ONCE", block * len(log.things))
        assert tonight(log, ranking, str(tmp_path), calibration_at(0.3, 0.4), LIMITS, buckets) == whole


def coded_of(events):
    """The events as rows of a log, as CODED."""
    users = pa.DictionaryArray.from_arrays(pa.array(events.rows, pa.int32()), events.users)
    return pa.table([users, *map(pa.array, (events.items, events.times, events.kinds))], schema=CODED)


def test_the_night_of_a_divided_log_is_that_of_the_log_in_memory(tmp_path):
    """Three tables in no order, so that a user's events lie in several; user05, who did nothing, is in neither."""
    log, ranking, answers = ranked(7)
    write_asked(str(tmp_path), log, answers, failed=(1,), without="user05")
    whole = tonight(log, ranking, str(tmp_path), calibration_at(0.3, 0.4), LIMITS, buckets=1)
    coded = coded_of(log.events)
    coded = coded.take(pa.array(np.random.default_rng(0).permutation(len(coded))))
    for buckets in (1, 3, 40):
        parts = divided([coded.slice(0, 50), coded.slice(50, 1), coded.slice(51)], buckets)
        counted = replace(ranking, counts=Counts.over(parts, NOW, log.things))
        assert_same_of_things(counted.counts, ranking.counts)
        by_bucket = replace(log, events=parts)
        assert tonight(by_bucket, counted, str(tmp_path), calibration_at(0.3, 0.4), LIMITS, buckets) == whole


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.usefixtures("ray_driver")
@pytest.mark.parametrize("at_once", [1, 100])
def test_what_is_counted_as_tasks_is_what_is_counted_here(at_once, monkeypatch):
    """Number for number, of a log in several buckets, one of them without a user, and several pieces of them."""
    monkeypatch.setattr("conrec.blocklist.counts.EVENTS_AT_ONCE", at_once)
    log, ranking, _ = ranked(7)
    parts = divided([coded_of(log.events)], 40)
    here, tasks = Counts.over(parts, NOW, log.things), Counts.over(parts, NOW, log.things, mapped=as_tasks)
    assert min(len(events.users) for events in parts) == 0 and len(log.events) > 2 * at_once
    for counts in (tasks, ranking.counts):
        assert_same_of_things(counts, here)


@pytest.mark.parametrize("share", [1.0, 0.2])
def test_what_is_counted_while_lists_are_made_is_what_is_counted_before(tmp_path, monkeypatch, share):
    """Only where an item may be held back are users scored twice."""
    log, ranking, answers = ranked(7)
    write_asked(str(tmp_path), log, answers, failed=(1,))
    limits = LIMITS.model_copy(update={"max_user_share": share})
    scored, score = [], Ranking.scores
    monkeypatch.setattr(Ranking, "scores", lambda *asked: scored.append(len(asked[1])) or score(*asked))
    publish = PublishSettings(buckets=3, holdout_share=0.2)
    arguments = ([str(tmp_path)], log.events, log.item_ids, ranking, leaf_vectors(log.codebook, log.trie), NEAR)
    arguments = (*arguments, calibration_at(0.3, 0.4), NOW, limits, publish)
    with night(*arguments) as made, night(*arguments) as other:
        list(made.blocks())
        once, about = sum(scored), other.about()
        assert made.about() == about and made.counted.users.sum() > 20
    assert bool(about["held_back"]) == (share < 1)
    assert once == (sum(scored) - once) * (1 if share == 1 else 2)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_driver")
def test_the_night_as_tasks_is_the_night_in_one_process(tmp_path):
    """Of a divided log, whose folder no task can read, without user05, who did nothing; items are held back."""
    log, ranking, answers = ranked(7)
    write_asked(str(tmp_path), log, answers, failed=(1,), without="user05")
    by_bucket = replace(log, events=divided([coded_of(log.events)], 7))
    limits = LIMITS.model_copy(update={"max_user_share": 0.2})
    arguments = (by_bucket, ranking, str(tmp_path), calibration_at(0.3, 0.4), limits, 7)
    whole = tonight(*arguments)
    assert len(whole[0]) > 20 and len(whole[1]) > 20
    assert tonight(*arguments, mapped=as_tasks) == whole


@pytest.mark.ray
@pytest.mark.usefixtures("ray_driver")
def test_what_tasks_compile_is_what_one_process_compiles(tmp_path):
    """To the byte: of lists and rules of several buckets, one of them empty, in which texts and terms repeat."""
    log, ranking, answers = ranked(7)
    write_asked(str(tmp_path), log, answers, failed=(1,), without="user05")
    buckets = 40
    publish = PublishSettings(buckets=buckets, holdout_share=0.0)
    vectors, calibration = leaf_vectors(log.codebook, log.trie), calibration_at(0.3, 0.4)
    arguments = ([str(tmp_path)], log.events, log.item_ids, ranking, vectors, NEAR, calibration, NOW, LIMITS, publish)
    root = str(tmp_path / "store")
    with night(*arguments) as made:
        manifest = write_version(root, "v1", made.blocks(), {})
    assert manifest["figures"]["rules"] > 20 and 0 in [entry["rows"] for entry in manifest["files"]]
    here, there = (with_compiled(root, manifest, lambda: None, mapped) for mapped in (in_process, as_tasks))
    assert here["compiled"]["shapes"]["data"]["item_id"]["bytes"] > 80
    assert here == there


@dataclass(frozen=True)
class Given:
    """Scores that are given, (U, T) odds with ties; whatever orders things has this shape."""

    odds: np.ndarray
    judged: None = None
    reach: float = 0.0

    def parts(self, counts, users, expected):
        return self.odds[users].copy(), np.zeros_like(self.odds[users])

    def parts_of(self, columns):
        raise AssertionError("there is no policy")


SMALL = random_log(0)
EVENT = st.tuples(st.integers(0, ITEMS - 1), st.sampled_from([-1, 0, 1, 5, 10, 20]), st.integers(0, 2))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(EVENT, max_size=12), min_size=3, max_size=3),
    st.integers(0, 2**32 - 1),
    st.integers(1, 8),
    st.lists(st.sampled_from(np.linspace(-2, 2, 9).tolist()), min_size=2, max_size=2),
)
def test_a_list_at_a_larger_threshold_is_the_beginning_of_one_at_a_smaller(histories, seed, longest, cuts):
    """Through the guardrails and with a cap; and no list needs more candidates than `candidates_needed`."""
    events = events_of([[(item, NOW - days * DAY, kind) for item, days, kind in rows] for rows in histories])
    users = np.arange(3)
    odds = np.random.default_rng(seed).choice(np.linspace(-2, 2, 9), (3, len(SMALL.things))).astype(np.float32)
    ranking = Ranking(Counts.at(events, NOW, SMALL.things), Given(odds), SMALL.trie, SMALL.live)
    limits = GuardrailSettings(
        max_items_per_user=longest, max_catalogue_share=1.0, min_history=1, protect_days=8, explicit_days=8
    )
    known = facts(events, users, NOW, ITEMS, limits, SMALL.live)
    nobody = np.zeros(ITEMS, bool)

    def lists(threshold, most=None):
        thresholds = np.full(3, threshold, np.float32)
        predicted, ruled = ranking.predict(users, Answers.nothing(3), thresholds, most)
        rows = select(admit(predicted, known, limits), known, nobody, NOW, limits)
        own = [rows.rows == user for user in range(3)]
        found = [list(zip(rows.items[mine].tolist(), rows.scores[mine].tolist(), strict=True)) for mine in own]
        return found, set(zip(ruled.rows.tolist(), ruled.leaves.tolist(), strict=True))

    smaller, larger = sorted(1 / (1 + math.exp(-np.float32(cut))) for cut in cuts)
    longer, more_rules = lists(smaller)
    shorter, fewer_rules = lists(larger)
    for of_smaller, of_larger in zip(longer, shorter, strict=True):
        assert of_larger == of_smaller[: len(of_larger)]
        assert len(of_smaller) <= longest
    assert fewer_rules <= more_rules
    needed = candidates_needed(known, limits)
    for threshold in (0.0, smaller, larger):
        assert lists(threshold, needed) == lists(threshold)


def test_all_candidates_are_needed_where_items_may_be_held_back():
    known = facts(SMALL.events, EVERYONE, NOW, ITEMS, LIMITS, SMALL.live)
    assert candidates_needed(known, LIMITS.model_copy(update={"max_user_share": 0.9})) is None
    said = [sum(pair // ITEMS == user for pair in (*known.protected, *known.explicit)) for user in range(USERS)]
    assert candidates_needed(known, LIMITS) == 7 + max(said)


def test_what_was_said_is_taken_and_joined_by_user():
    rng = np.random.default_rng(0)
    answers = random_asked(rng, 9, 20)
    order = np.array([4, 4, 0, 8, 2])
    taken = answers.take(order)
    assert [said_of(taken, row) for row in range(5)] == [said_of(answers, user) for user in order]
    joined = Answers.joined([answers.take(np.arange(4)), Answers.nothing(2), answers.take(np.arange(4, 9))])
    expected = (
        [said_of(answers, user) for user in range(4)] + [{}, {}] + [said_of(answers, user) for user in range(4, 9)]
    )
    assert [said_of(joined, row) for row in range(11)] == expected
    assert len(Answers.joined([]).leaves) == 0
    read = Answers.from_arrow(joined.to_arrow())
    assert [said_of(read, row) for row in range(11)] == expected


def test_pairs_that_no_list_holds_have_no_score_and_lists_of_nobody_are_empty():
    log, ranking, answers = ranked(0)
    none = Answers.nothing(0)
    nobody = published(ranking, log.events, np.zeros(0, np.int64), none, NOW, LIMITS)
    found = listing(nobody, np.zeros(0, np.int64), np.zeros(0, np.int64), ITEMS, {"any": np.zeros(0)})
    assert len(found.scores) == 0 and len(found.lengths["any"]) == 0
    gone = np.flatnonzero(~log.live)
    rows, items = np.repeat(EVERYONE, len(gone)), np.tile(gone, USERS)
    lists = published(ranking, log.events, EVERYONE, answers, NOW, LIMITS)
    assert (listing(lists, rows, items, ITEMS, {}).scores == -np.inf).all()


def test_generated_ids_near_which_nothing_lies_name_no_id():
    """With a resolution in which no generated ID caught anything, rows name their own IDs."""
    log, ranking, answers = ranked(1)
    empty = resolve(np.unique(answers.leaves.values), log.trie, leaf_vectors(log.codebook, log.trie), 2.0)
    predicted, _ = replace(ranking, resolution=empty).predict(EVERYONE, answers, np.zeros(USERS))
    assert (predicted.similarities == 0).all()
    assert np.array_equal(predicted.leaves, log.trie.item_leaves[predicted.items])
