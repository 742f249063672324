"""The decoding against sums over all leaves, and a model that learns a planted rule from the past alone."""

import itertools
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch

from conrec.catalogue.trie import Trie
from conrec.config import TimelineSettings
from conrec.errors import DataError
from conrec.evaluation import tiger as module
from conrec.evaluation import tuning
from conrec.evaluation.baselines import EVERYTHING, Histories
from conrec.evaluation.leaf_items import item_shares, leaf_items_by_rejections
from conrec.evaluation.rankings import alone
from conrec.evaluation.rows import LIST, Generated
from conrec.evaluation.tiger import MAX_ITEMS, TIGER_TRIALS, Tiger, fit_tiger, tune_tiger
from conrec.evaluation.tuning import Question, Trial
from conrec.feedback.events import LIKED, REJECTED, SHOWN, Events
from conrec.ragged import Ragged

pytestmark = pytest.mark.long

CODES, ITEMS = 3, 12
# Three levels, uneven: two items share the first ID, and no node has all children.
SEMANTIC_IDS = np.array(
    [
        [0, 0, 0], [0, 0, 0], [0, 0, 2], [0, 1, 1], [0, 2, 0], [0, 2, 1],
        [1, 0, 0], [1, 0, 1], [1, 0, 2], [2, 1, 0], [2, 1, 2], [2, 2, 2],
    ],
    np.int32,
)  # fmt: skip
TRIE = Trie.build(SEMANTIC_IDS, CODES)
DAY = 86_400_000_000
CUT = 20 * DAY
SMALL = Trial(16, 1e-2)


def events_of(*users):
    """Each user: (item, day, kind) triples in order."""
    rows = [event for user in users for event in user]
    items, days, kinds = (np.array(column) for column in zip(*rows, strict=True))
    offsets = np.cumsum([0, *(len(user) for user in users)])
    names = pa.array([f"u{number:03}" for number in range(len(users))])
    return Events(names, offsets, items.astype(np.int32), (days * DAY).astype(np.int64), kinds.astype(np.int8))


def histories_of(*rows):
    """Each row: (item, kind) pairs, oldest first."""
    items, kinds = (np.array([event[place] for row in rows for event in row]) for place in (0, 1))
    lengths = [len(row) for row in rows]
    return Histories(np.arange(len(rows)), Ragged.from_lengths(items.astype(np.int32), lengths), kinds.astype(np.int8))


def rejected(*items):
    return [(item, REJECTED) for item in items]


def walkers(count=24, length=5, until=CUT / DAY):
    """Users who reject one item after the other, round the catalogue, from a start of their own; a like in between."""
    users = []
    for user in range(count):
        days = until - 1 - np.arange(length)[::-1]
        walk = [((user + step) % ITEMS, day, REJECTED) for step, day in enumerate(days)]
        users.append([((user * 5) % ITEMS, days[0] - 1, LIKED), *walk])
    return events_of(*users)


def fitted(events=None, cut_us=CUT, **options):
    events = walkers(12, 3) if events is None else events
    return fit_tiger(events, cut_us, SEMANTIC_IDS, TRIE, SMALL, 0, **{"epochs": 1} | options)


MIXED = histories_of(rejected(3), rejected(1, 2, 3, 4), [(5, LIKED)], rejected(*range(11)))
ALL_LEAVES = np.tile(np.arange(len(TRIE)), (4, 1))


@pytest.fixture(scope="module", autouse=True)
def small_and_quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LAYERS", 1)
        patch.setattr(module, "WARM_UP_STEPS", 5)
        yield


@pytest.fixture(scope="module")
def untaught():
    return fitted()


@pytest.fixture(scope="module")
def taught():
    return fitted(walkers(24), epochs=80)


def test_enough_beams_find_every_leaf_with_its_probability(untaught):
    leaves, log_probs = untaught.generate(MIXED, len(TRIE) + 3)
    assert (np.sort(leaves[:, :-3], axis=1) == ALL_LEAVES).all()
    assert (leaves[:, -3:] == -1).all() and np.isneginf(log_probs[:, -3:]).all()
    assert (np.diff(log_probs[:, :-3]) <= 0).all()
    np.testing.assert_allclose(np.exp(log_probs).sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(untaught.score(MIXED, leaves)[:, :-3], log_probs[:, :-3], atol=1e-5)
    assert leaves.dtype == np.int64 and log_probs.dtype == np.float32


def test_beams_follow_the_full_prefix(untaught):
    """Two beams, by hand: the best two of each level among the children of the two before."""
    leaves, log_probs = untaught.generate(MIXED, 2)
    scores = untaught.score(MIXED, ALL_LEAVES).astype(np.float64)
    codes = TRIE.semantic_ids
    for row in range(4):
        beams = [()]
        for level in range(3):
            mass = {
                prefix: np.exp(scores[row][(codes[:, : level + 1] == prefix).all(axis=1)]).sum()
                for prefix in {tuple(code) for code in codes[:, : level + 1].tolist()}
                if prefix[:level] in beams
            }
            beams = sorted(mass, key=mass.get, reverse=True)[:2]
        assert leaves[row].tolist() == TRIE.find(np.array(beams)).tolist()
    np.testing.assert_allclose(log_probs, np.take_along_axis(scores, leaves, 1), atol=1e-5)


def test_a_probability_is_the_product_over_allowed_codes_of_the_model_as_transformers_runs_it(untaught):
    leaf, codes, first = 3, TRIE.semantic_ids[3], module._FIRST_CODE
    assert codes.tolist() == [0, 2, 0]
    tokens = first + codes + np.arange(3) * CODES
    history = first + SEMANTIC_IDS[[1, 2]] + np.arange(3) * CODES
    with torch.no_grad():
        logits = untaught.network(
            input_ids=torch.tensor([[module._BEGIN, *history.ravel()]]),
            decoder_input_ids=torch.tensor([[0, *tokens[:2]]]),
        ).logits[0]
    total = 0.0
    for level, allowed in enumerate(([0, 1, 2], [0, 1, 2], [0, 1])):
        own = logits[level, first + level * CODES : first + (level + 1) * CODES]
        total += (own[codes[level]] - own[allowed].logsumexp(0)).item()
    score = untaught.score(histories_of(rejected(1, 2)), np.array([[leaf, -1]]))
    assert score[0, 0] == pytest.approx(total, abs=1e-5)
    assert score[0, 1] == -np.inf


def test_a_history_is_read_alone_as_among_longer_ones(untaught, monkeypatch):
    together = untaught.score(MIXED, ALL_LEAVES), *untaught.generate(MIXED, 4)
    monkeypatch.setattr(module, "_POSITIONS", 1)
    alone = untaught.score(MIXED, ALL_LEAVES), *untaught.generate(MIXED, 4)
    np.testing.assert_allclose(together[0], alone[0], atol=1e-5)
    assert (together[1] == alone[1]).all()
    np.testing.assert_allclose(together[2], alone[2], atol=1e-5)


def test_only_the_latest_rejections_are_read(untaught):
    latest = [index % ITEMS for index in range(MAX_ITEMS)]
    long, short = histories_of(rejected(7, 7, *latest)), histories_of(rejected(*latest))
    leaves = ALL_LEAVES[:1]
    assert (untaught.score(long, leaves) == untaught.score(short, leaves)).all()
    with_likes = histories_of([(2, LIKED), *rejected(*latest[:9]), (8, SHOWN), *rejected(*latest[9:])])
    assert (untaught.score(with_likes, leaves) == untaught.score(short, leaves)).all()
    other = histories_of(rejected(9, *latest[1:]))
    assert (untaught.score(other, leaves) != untaught.score(short, leaves)).any()


def test_a_model_of_all_events_tells_their_kinds_apart():
    typed, leaves = fitted(kinds=EVERYTHING), ALL_LEAVES[:1]
    asked = [histories_of([(3, REJECTED), (4, kind)]) for kind in (REJECTED, LIKED, SHOWN)]
    scores = [typed.score(histories, leaves) for histories in asked]
    for one, other in itertools.combinations(scores, 2):
        assert (one != other).any()


def test_it_learns_what_follows(taught):
    histories = histories_of(*(rejected(item, (item + 1) % ITEMS) for item in range(ITEMS)))
    following = TRIE.item_leaves[(np.arange(ITEMS) + 2) % ITEMS]
    leaves, log_probs = taught.generate(histories, 3)
    assert (leaves[:, 0] == following).mean() > 0.9
    assert np.exp(log_probs[:, 0]).mean() > 0.6


def test_rejections_are_learnt_not_likes():
    likes = [[(0, 1, REJECTED), (3, 2, LIKED), (6, 3, REJECTED)]] * 40
    model = fitted(events_of(*likes), kinds=EVERYTHING, epochs=30)
    probability = np.exp(model.score(histories_of(rejected(0)), TRIE.item_leaves[None, [3, 6]]))[0]
    assert probability[0] < 0.05
    after_the_like = np.exp(model.score(histories_of([(0, REJECTED), (3, LIKED)]), TRIE.item_leaves[None, [6]]))
    assert after_the_like > 0.9


def weights_of(model):
    return torch.cat([weight.flatten() for weight in model.network.state_dict().values()])


def test_nothing_after_the_cut_is_learnt_and_the_same_seed_gives_the_same_model():
    events = walkers(12, 3)
    past = events.before(CUT - 2 * DAY)
    assert len(past) < len(events)
    state = torch.random.get_rng_state()
    one, other = fitted(events, CUT - 2 * DAY), fitted(past, CUT)
    assert torch.equal(weights_of(one), weights_of(other))
    assert not torch.equal(weights_of(one), weights_of(fitted(events, CUT)))
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_best_pass_stays_and_patience_ends():
    figures = iter([0.1, 0.5, 0.4, 0.5, 0.9])
    lines = []
    model = fitted(stop=lambda model: next(figures), epochs=5, note=lines.append)
    assert (model.epochs, len(lines)) == (2, 4)
    assert torch.equal(weights_of(model), weights_of(fitted(epochs=2)))


def test_nothing_to_learn_from_is_said():
    likes = events_of([(0, 1, LIKED), (1, 2, LIKED)])
    with pytest.raises(DataError, match="nothing to learn"):
        fitted(likes)
    with pytest.raises(ValueError, match="kinds"):
        fitted(kinds=(LIKED,))
    with pytest.raises(ValueError, match="no trials"):
        tune_tiger(likes, timeline(), SEMANTIC_IDS, TRIE, (), 0)


def timeline():
    return TimelineSettings(cut="1970-01-21T00:00:00Z", horizon_days=7, validation_days=2, min_history=2)


def test_a_trial_is_chosen_by_the_hits_before_the_cut():
    events = walkers(40, 6, until=22)
    trials = (Trial(16, 1e-9), SMALL)
    tuned = tune_tiger(events, timeline(), SEMANTIC_IDS, TRIE, trials, 0)
    assert [result.trial for result in tuned.trials] == list(trials)
    # With 12 items and 20 places everything is a hit: equal figures, so the first trial stands, after its first pass.
    assert [result.figure for result in tuned.trials] == [1, 1]
    assert tuned.model.epochs == 1 and torch.equal(
        weights_of(tuned.model), weights_of(fit_tiger(events, CUT, SEMANTIC_IDS, TRIE, trials[0], 0, epochs=1))
    )


def test_a_trial_that_learns_is_preferred(monkeypatch):
    monkeypatch.setattr(tuning, "TOP", 1)
    monkeypatch.setattr(module, "PATIENCE", 40)
    events = walkers(24, 8, until=22)
    tuned = tune_tiger(events, timeline(), SEMANTIC_IDS, TRIE, (Trial(16, 1e-9), SMALL), 0, epochs=40)
    idle, learnt = tuned.trials
    assert learnt.figure > idle.figure and learnt.epochs > 1
    model = fit_tiger(events, CUT, SEMANTIC_IDS, TRIE, SMALL, 0, epochs=learnt.epochs)
    assert torch.equal(weights_of(tuned.model), weights_of(model))
    assert tuned.training_seconds > 0


def test_trials_are_ranked_as_the_evaluation_ranks_a_policy_by_itself(monkeypatch):
    """Items of one ID by who rejected them until the validation time, none of an ID that the user liked or met."""
    monkeypatch.setattr(tuning, "TOP", 5)
    random = np.random.default_rng(0)
    days = np.arange(14, 22)
    users = [zip(random.permutation(ITEMS), days, random.integers(0, 3, len(days)), strict=False) for _ in range(20)]
    events = events_of(*map(list, users))
    trie = Trie.build(SEMANTIC_IDS[np.arange(ITEMS) // 2 * 2], CODES)
    known, until_us = events.before(CUT), timeline().validation_us
    anchors = tuning.tuning_anchors(known, timeline())
    question = Question.of(events, timeline())
    leaves = np.argsort(random.random((len(anchors), len(trie))), axis=1)
    log_probs = -np.sort(random.random(leaves.shape)).astype(np.float32)
    past = events.before(until_us)
    liked = [
        {int(trie.item_leaves[known.items[place]]) for place in range(first, last) if known.kinds[place] == LIKED}
        for first, last in zip(anchors.starts, anchors.ends, strict=True)
    ]
    world = SimpleNamespace(
        catalogue=SimpleNamespace(trie=trie),
        liked_leaves=Ragged.from_lengths(np.array(list(itertools.chain(*liked))), [len(row) for row in liked]),
        leaf_items=leaf_items_by_rejections(trie, past),
        shares=item_shares(trie, past),
        excluded=question.excluded,
        candidates=SimpleNamespace(items=np.zeros((len(anchors), 1), np.int64)),
    )
    answer = Generated(leaves, log_probs, np.zeros((len(anchors), 1), np.float32))
    listed = question.of_ids(leaves, log_probs, trie)
    np.testing.assert_array_equal(listed, alone(world, answer)[1].items[:, :5])
    assert len(anchors) > 3 and len(trie) == ITEMS // 2 and (listed >= 0).any()


def test_a_trial_is_measured_on_as_many_ids_as_are_measured(monkeypatch):
    asked = []
    generate = Tiger.generate
    monkeypatch.setattr(
        Tiger, "generate", lambda self, histories, width: asked.append(width) or generate(self, histories, width)
    )
    tune_tiger(walkers(24, 8, until=22), timeline(), SEMANTIC_IDS, TRIE, (SMALL,), 0, epochs=1)
    assert asked == [LIST]


def test_what_follows_the_cut_takes_no_part_in_the_choice(monkeypatch):
    monkeypatch.setattr(tuning, "TOP", 3)
    events = walkers(24, 8, until=22)
    past = events.where(events.times <= CUT)
    whole, known = (tune_tiger(some, timeline(), SEMANTIC_IDS, TRIE, (SMALL,), 0) for some in (events, past))
    assert whole.trials[0].figure == known.trials[0].figure > 0
    assert torch.equal(weights_of(whole.model), weights_of(known.model))


def test_a_trial_is_trained_until_the_validation_time_and_the_chosen_one_until_the_cut():
    events, losses = walkers(24, 8, until=22), []
    tune_tiger(events, timeline(), SEMANTIC_IDS, TRIE, (SMALL,), 0, epochs=1, note=losses.append)
    for until in (timeline().validation_us, CUT):
        fitted(events, until, note=losses.append)
    trial, final, until_validation, until_cut = (line.split(",")[3] for line in losses)
    assert trial == until_validation != until_cut == final


def test_the_larger_trials_have_about_a_million_weights(monkeypatch):
    assert len(TIGER_TRIALS) == 4
    monkeypatch.setattr(module, "LAYERS", 3)
    sizes = [
        sum(weight.numel() for weight in module._network(trial.hidden, 1024).parameters()) for trial in TIGER_TRIALS
    ]
    assert 0.9e6 < max(sizes) < 1.3e6
