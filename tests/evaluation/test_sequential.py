"""Sequential models on a world of chains, where what comes next is known.

60 users each reject three of the items 0-5 in a row, item i + 1 after item i and 0 after 5, and like 6 and 7 in
between, in turn; item 8 is shown to everybody, item 9 to nobody.
"""

import math
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest
import torch

from conrec.config import TimelineSettings
from conrec.errors import DataError
from conrec.evaluation import sequential, tuning
from conrec.evaluation.baselines import EVERYTHING, Histories
from conrec.evaluation.sequence_network import MAX_LENGTH, Sequences
from conrec.evaluation.sequential import (
    BETA,
    KINDS,
    PATIENCE,
    TRIALS,
    FittedModel,
    contrast,
    fit_sequential,
    not_to_recommend,
    tune_sequential,
)
from conrec.evaluation.tuning import Trial, tuning_anchors
from conrec.feedback.anchors import evaluation_anchors
from conrec.feedback.events import LIKED, REJECTED, SHOWN, Events
from conrec.ragged import Ragged

pytestmark = pytest.mark.long

ITEMS, CUT, DAY = 10, 100, 86_400_000_000
NEGATIVES, LOWEST, SWAPPED, OPPOSING = KINDS
PREDICTS_REJECTIONS = (NEGATIVES, SWAPPED, OPPOSING)
TRIAL = Trial(16, 1e-2)
Rows = list[tuple[int, int, int, int]]


def make_events(rows: Rows) -> Events:
    """Events from (user, item, time, kind)."""
    users, items, times, kinds = np.array(sorted(rows, key=lambda row: (row[0], row[2]))).T
    count = users.max() + 1
    return Events(
        pa.array([f"{user:03d}" for user in range(count)]),
        np.concatenate(([0], np.cumsum(np.bincount(users, minlength=count)))),
        items.astype(np.int32),
        times,
        kinds.astype(np.int8),
    )


def chain_rows() -> Rows:
    rows = []
    for user in range(60):
        rows += [(user, (user + step) % 6, 10 + 20 * step, REJECTED) for step in range(3)]
        rows += [(user, 6 + (user + step) % 2, 20 + 20 * step, LIKED) for step in range(2)]
        rows += [(user, 8, 90, SHOWN)]
    return rows


def histories(*sequences: list[tuple[int, int]]) -> Histories:
    """Histories from lists of (item, kind)."""
    pairs = np.array([pair for sequence in sequences for pair in sequence]).reshape(-1, 2)
    items = Ragged.from_lengths(pairs[:, 0].astype(np.int32), np.array([len(sequence) for sequence in sequences]))
    return Histories(np.arange(len(sequences)), items, pairs[:, 1].astype(np.int8))


def rejected(*items: int) -> list[tuple[int, int]]:
    return [(item, REJECTED) for item in items]


def fit(kind: str, rows: Rows, epochs: int = 40, seed: int = 0) -> FittedModel:
    return fit_sequential(kind, make_events(rows), CUT, ITEMS, TRIAL, seed, epochs=epochs)


@pytest.fixture(scope="module")
def models() -> dict[str, FittedModel]:
    return {kind: fit(kind, chain_rows()) for kind in KINDS}


@pytest.mark.parametrize("kind", PREDICTS_REJECTIONS)
def test_the_next_rejection_of_the_chain_comes_first(models: dict[str, FittedModel], kind: str) -> None:
    chains = ([(first, REJECTED), (6 + first % 2, LIKED), ((first + 1) % 6, REJECTED)] for first in range(6))
    asked = histories(*([*chain, (7 - chain[0][0] % 2, LIKED)] for chain in chains))
    scores = models[kind].scores(asked)
    np.testing.assert_array_equal(scores.argmax(axis=1), (np.arange(6) + 2) % 6)


def test_the_order_of_the_history_decides(models: dict[str, FittedModel]) -> None:
    scores = models[NEGATIVES].scores(histories(rejected(1, 2), rejected(2, 1)))
    np.testing.assert_array_equal(scores.argmax(axis=1), [3, 2])


@pytest.mark.parametrize(("kind", "better"), [(LOWEST, [6, 7]), (SWAPPED, [0, 1, 2, 3, 4, 5])])
def test_the_roles_say_which_items_are_predicted(models: dict[str, FittedModel], kind: str, better: list[int]) -> None:
    """Likes are predicted by the published loss, which is ranked by the lowest probability; swapped, rejections."""
    scores = models[kind].scores(histories(rejected(0, 1), [(3, REJECTED), (7, LIKED)]))
    log_probs = -scores if kind == LOWEST else scores
    worse = sorted({0, 1, 2, 3, 4, 5, 6, 7} - set(better))
    assert (np.exp(log_probs[:, better]).sum(axis=1) > 0.9).all()
    assert (np.exp(log_probs[:, worse]).sum(axis=1) < 0.05).all()


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_log_probabilities_of_what_anybody_met(models: dict[str, FittedModel], kind: str) -> None:
    scores = models[kind].scores(histories(rejected(0, 1), rejected(), [(6, LIKED)]))
    assert scores.shape == (3, ITEMS)
    assert scores.dtype == np.float32
    assert np.isneginf(scores[:, 9]).all()
    log_probs = -scores[:, :9] if kind == LOWEST else scores[:, :9]
    np.testing.assert_allclose(np.exp(log_probs).sum(axis=1), 1, rtol=1e-5)


def test_an_empty_history_asks_for_the_first_rejection_of_anybody(models: dict[str, FittedModel]) -> None:
    """Ten users each begin with 0, 1, ..., 5."""
    probabilities = np.exp(models[NEGATIVES].scores(histories([], [(6, LIKED)])))
    np.testing.assert_allclose(probabilities[:, :6], 1 / 6, atol=0.08)
    np.testing.assert_array_equal(probabilities[0], probabilities[1])


@pytest.mark.parametrize(("kind", "reads"), [(NEGATIVES, False), (OPPOSING, False), (LOWEST, True), (SWAPPED, True)])
def test_what_a_kind_reads(models: dict[str, FittedModel], kind: str, reads: bool) -> None:
    with_like, without, other_kind = models[kind].scores(
        histories([*rejected(0, 1), (6, LIKED)], rejected(0, 1), [*rejected(0, 1), (6, SHOWN)])
    )
    assert (not np.allclose(with_like, without)) == reads
    assert (not np.allclose(with_like, other_kind)) == reads


@pytest.mark.parametrize("kind", KINDS)
def test_a_history_does_not_depend_on_the_others(models: dict[str, FittedModel], kind: str) -> None:
    asked = histories(rejected(0, 1), rejected(*[1, 2, 3] * 10), [], rejected(4))
    together = models[kind].scores(asked)
    for row in range(len(asked)):
        alone = models[kind].scores(asked.block(row, row + 1))[0]
        np.testing.assert_allclose(alone[:9], together[row, :9], rtol=1e-4, atol=1e-5)


def test_blocks_of_histories_change_nothing(models: dict[str, FittedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = histories(rejected(0, 1), rejected(2), [], rejected(4), rejected(5, 0, 1))
    together = models[NEGATIVES].scores(asked)
    monkeypatch.setattr(sequential, "_BLOCK", 2)
    np.testing.assert_allclose(models[NEGATIVES].scores(asked)[:, :9], together[:, :9], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_latest_events_of_a_kind_are_read(models: dict[str, FittedModel], kind: str) -> None:
    latest = rejected(*[0, 1, 2, 3, 4] * (MAX_LENGTH // 5))
    assert len(latest) == MAX_LENGTH
    long, cut_off, shorter = models[kind].scores(histories(rejected(5, 3) + latest, latest, latest[1:]))
    np.testing.assert_array_equal(long, cut_off)
    assert not np.array_equal(shorter, cut_off)


@pytest.mark.parametrize("kind", KINDS)
def test_items_nobody_had_met_are_passed_over_in_histories(models: dict[str, FittedModel], kind: str) -> None:
    with_unknown, without = models[kind].scores(histories(rejected(9, 0, 9, 1, 9), rejected(0, 1)))
    np.testing.assert_array_equal(with_unknown, without)


def test_not_to_recommend_on_paper() -> None:
    """Likes of probability 1/2 and 1/4, a rejection of probability 1/5: log 2 + log 4 - log(4/5)."""
    log_probs = torch.tensor([0.5, 0.2, 0.25]).log()
    loss = not_to_recommend(log_probs, torch.tensor([True, False, True]))
    assert loss.item() == pytest.approx(math.log(2) + math.log(4) - math.log(0.8))


@pytest.mark.parametrize("logit", [-3.0, 0.0, 3.0, 8.0, 30.0])
def test_the_gradient_of_pushing_away_is_the_probability(logit: float) -> None:
    logits = torch.tensor([logit, 0.0], requires_grad=True)
    loss = not_to_recommend(torch.log_softmax(logits, 0)[:1], torch.tensor([False]))
    loss.backward()
    assert torch.isfinite(loss)
    assert logits.grad is not None
    assert (logits.grad.abs() <= 1.01).all()
    if logit <= 8:
        assert logits.grad[0].item() == pytest.approx(1 / (1 + math.exp(-logit)), rel=1e-2)


def test_contrast_on_paper() -> None:
    """e^y against e^y + e^j: y = 1 against 0 and 2 in the first state, y = 3 against nothing in the second."""
    logits = torch.tensor([[1.0, 0.0, 2.0, 9.0], [9.0, 9.0, 9.0, 3.0]])
    other = Ragged.from_lengths(np.array([1, 2], np.int32), np.array([2, 0]))
    value = contrast(logits, torch.tensor([0, 1]), torch.tensor([0, 3]), other)
    assert value.item() == pytest.approx(math.log(math.e + 1 + math.e**2) - 1)


def test_the_contrast_lowers_what_the_user_has_in_the_other_sequence() -> None:
    logits = torch.zeros(1, 3, requires_grad=True)
    contrast(logits, torch.tensor([0]), torch.tensor([0]), Ragged.from_lengths(np.array([1]), np.array([1]))).backward()
    assert logits.grad is not None
    np.testing.assert_allclose(logits.grad[0].numpy(), [-0.5, 0.5, 0])


def prefix_loss(model: FittedModel, rows: Rows) -> float:
    """The loss of a kind, one event after the other: every event is predicted from the events before it."""
    recipe = sequential._RECIPES[model.kind]
    total, count = 0.0, 0
    for user in range(max(row[0] for row in rows) + 1):
        events = [(item, kind) for who, item, _, kind in sorted(rows, key=lambda row: row[2]) if who == user]
        for place, stream in enumerate(recipe.streams):
            inside = [event for event in events if event[1] in stream]
            outside = [model.codes[item] for item, kind in events if kind not in stream and kind != SHOWN]
            for position, (item, kind) in enumerate(inside):
                if kind not in recipe.pulled + recipe.pushed:
                    continue
                items = np.array([model.codes[before] for before, _ in inside[:position]], np.int32)
                kinds = np.array([before for _, before in inside[:position]], np.int8)
                sequence = Sequences(Ragged(items, np.array([0, position])), kinds)
                with torch.no_grad():
                    logits = model.network.logits(model.network.states(place, sequence)[0, -1:])[0].double()
                p = torch.softmax(logits, 0)[model.codes[item]].item()
                value = -math.log(p) if kind in recipe.pulled else -math.log(1 - p)
                if model.kind == OPPOSING:
                    y = logits[model.codes[item]].exp().item()
                    against = sum(logits[code].exp().item() for code in outside)
                    value = (sequential.ALPHA if place == 0 else 1) * value - BETA * math.log(y / (y + against))
                total, count = total + value, count + 1
    return total / count


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_a_batch_is_the_formula_event_by_event(
    models: dict[str, FittedModel], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Users of one event, of many, of one kind only and with an item in both sequences, in one batch."""
    rows = [
        *chain_rows()[:18],
        (3, 4, 10, REJECTED),
        (4, 6, 10, LIKED),
        *((5, item % 6, item, REJECTED) for item in range(9)),
        (6, 2, 10, REJECTED),
        (6, 2, 20, LIKED),
        (6, 3, 30, SHOWN),
        (6, 3, 40, REJECTED),
        (7, 8, 10, SHOWN),
    ]
    monkeypatch.setattr(sequential, "ALPHA", 3.0)
    model = models[kind]
    model.network.eval()
    recipe = sequential._RECIPES[kind]
    streams = sequential._pieces(make_events(rows), recipe.streams, model.codes)
    loss = sequential._loss(model.network, recipe, streams)
    assert loss.item() == pytest.approx(prefix_loss(model, rows), rel=1e-4)


def test_users_of_one_event_are_enough() -> None:
    """Two of three users reject item 1: so will who comes next."""
    rows = [(0, 1, 10, REJECTED), (1, 1, 10, REJECTED), (2, 2, 10, REJECTED)]
    scores = fit(NEGATIVES, rows).scores(histories([]))
    np.testing.assert_allclose(np.exp(scores[0, 1:3]), [2 / 3, 1 / 3], atol=0.15)


def test_long_sequences_are_cut_into_pieces_and_streams_stay_side_by_side() -> None:
    """User 0 rejects 120 items and likes 1, user 1 likes 1: pieces of 51, 51 and 18 rejections."""
    rows = [(0, time % 6, time, REJECTED) for time in range(120)] + [(0, 6, 3, LIKED), (1, 7, 3, LIKED)]
    rejections, likes = sequential._pieces(make_events(rows), ((REJECTED,), (LIKED,)), np.arange(ITEMS, dtype=np.int32))
    np.testing.assert_array_equal(rejections.items.lengths, [51, 51, 18, 0])
    np.testing.assert_array_equal(rejections.items.values, np.arange(120) % 6)
    np.testing.assert_array_equal(likes.items.padded(-1)[:, 0], [6, -1, -1, 7])


def test_batches_hold_every_row_once_and_are_not_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequential, "_BATCH_EVENTS", 20)
    lengths = np.arange(40) % 8
    batches = list(sequential._batches(lengths, np.random.default_rng(0)))
    np.testing.assert_array_equal(np.sort(np.concatenate(batches)), np.arange(40))
    assert max(lengths[rows].sum() for rows in batches) < 20 + 8
    assert not np.array_equal(np.concatenate(batches), np.arange(40))


@pytest.mark.parametrize("kind", KINDS)
def test_an_event_after_the_cut_changes_nothing(kind: str) -> None:
    later = [(user, item, CUT + 1, feedback) for user in range(60) for item, feedback in ((9, REJECTED), (8, LIKED))]
    asked = histories(rejected(0, 1), [(6, LIKED)])
    leaky, sound = fit(kind, chain_rows() + later, epochs=2), fit(kind, chain_rows(), epochs=2)
    np.testing.assert_array_equal(leaky.scores(asked), sound.scores(asked))
    events = make_events(chain_rows() + later)
    showing = fit_sequential(kind, events, CUT + 1, ITEMS, TRIAL, seed=0, epochs=2)
    assert not np.array_equal(showing.scores(asked), sound.scores(asked))


def test_the_seed_alone_decides_and_torch_is_left_as_it_was() -> None:
    asked = histories(rejected(0, 1))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = fit(SWAPPED, chain_rows(), epochs=2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    np.testing.assert_array_equal(fit(SWAPPED, chain_rows(), epochs=2).scores(asked), one.scores(asked))
    assert not np.array_equal(fit(SWAPPED, chain_rows(), epochs=2, seed=1).scores(asked), one.scores(asked))


def test_training_ends_without_a_better_figure_and_keeps_the_best_weights() -> None:
    figures: Iterator[float] = iter([0.1, 0.3, 0.3, 0.2, 0.2, 0.9])
    lines: list[str] = []
    events = make_events(chain_rows())
    model = fit_sequential(NEGATIVES, events, CUT, ITEMS, TRIAL, 0, lambda model: next(figures), note=lines.append)
    assert model.epochs == 2
    assert model.figure == 0.3
    assert len(lines) == 2 + PATIENCE
    assert next(figures) == 0.9
    asked = histories(rejected(0, 1))
    np.testing.assert_array_equal(model.scores(asked), fit(NEGATIVES, chain_rows(), epochs=2).scores(asked))


def test_the_number_of_weights_on_paper(models: dict[str, FittedModel]) -> None:
    """Per block 6 d^2 + 10 d; per encoder two blocks, positions and a norm; 9 items and the start, 9 biases."""
    hidden = TRIAL.hidden
    encoder = 2 * (6 * hidden**2 + 10 * hidden) + (MAX_LENGTH + 1) * hidden + 2 * hidden
    shared = 10 * hidden + 9
    assert models[NEGATIVES].parameters == shared + encoder
    assert models[OPPOSING].parameters == shared + 2 * encoder
    assert models[SWAPPED].parameters == shared + encoder + (len(EVERYTHING) + 1) * hidden


TIMELINE = TimelineSettings(cut="1970-01-11T00:00Z", validation_days=2, horizon_days=7, min_history=2)  # type: ignore[arg-type]
"""Validation at the end of day 8, the cut at the end of day 10."""


def tuning_rows(window: tuple[int, ...]) -> Rows:
    """The chains on day 7; then every user rejects the items of `window`, counted on from the chain, on day 9."""
    rows = [(user, item, 6 * DAY + time, kind) for user, item, time, kind in chain_rows()]
    return rows + [(user, item, 9 * DAY + item, REJECTED) for user in range(60) for item in window]


def test_a_trial_does_not_know_what_comes_after_the_validation_time() -> None:
    """Item 9 is first met in the window: no honest trial can rank it, the last fit can."""
    tuned = tune_sequential(NEGATIVES, make_events(tuning_rows((9,))), TIMELINE, ITEMS, (TRIAL,), seed=0)
    assert tuned.trials[0].figure == 0
    assert np.isfinite(tuned.model.scores(histories(rejected(0, 1)))[0, 9])


def test_a_trial_is_measured_with_the_history_excluded() -> None:
    """The window repeats what was rejected or shown before: nothing that may still be predicted is a hit."""
    rows = tuning_rows(())
    rows += [(user, (user + step) % 6, 9 * DAY, REJECTED) for user in range(60) for step in range(3)]
    tuned = tune_sequential(NEGATIVES, make_events(rows), TIMELINE, ITEMS, (TRIAL,), seed=0)
    assert tuned.trials[0].figure == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_better_trial_is_trained_until_the_cut(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The window goes on with the chain; one trial learns nothing. Measured by the top item alone."""
    monkeypatch.setattr(tuning, "TOP", 1)
    rows = tuning_rows(())
    rows += [(user, (user + 3) % 6, 9 * DAY, REJECTED) for user in range(60)]
    trials = (Trial(16, 1e-5), TRIAL)
    later = [(user, 9, 10 * DAY + 1, feedback) for user in range(60) for feedback in (REJECTED, LIKED)]
    tuned = tune_sequential(kind, make_events(rows + later), TIMELINE, ITEMS, trials, seed=0)
    assert [result.trial for result in tuned.trials] == list(trials)
    assert tuned.chosen is max(tuned.trials, key=lambda result: result.figure)
    assert all(0 <= result.figure <= 1 and 1 <= result.epochs <= sequential.EPOCHS for result in tuned.trials)
    assert tuned.training_seconds > 0
    asked = histories(rejected(0, 1))
    expected = fit_sequential(
        kind, make_events(rows), TIMELINE.cut_us, ITEMS, tuned.chosen.trial, seed=0, epochs=tuned.chosen.epochs
    )
    np.testing.assert_array_equal(tuned.model.scores(asked), expected.scores(asked))
    assert tuned.model.parameters == expected.parameters
    at_validation = fit_sequential(
        kind, make_events(rows), TIMELINE.validation_us, ITEMS, tuned.chosen.trial, seed=0, epochs=tuned.chosen.epochs
    )
    assert not np.array_equal(tuned.model.scores(asked), at_validation.scores(asked))


def test_a_trial_that_learns_the_chain_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "TOP", 1)
    monkeypatch.setattr(sequential, "PATIENCE", 30)
    rows = tuning_rows(())
    rows += [(user, (user + 3) % 6, 9 * DAY, REJECTED) for user in range(60)]
    tuned = tune_sequential(NEGATIVES, make_events(rows), TIMELINE, ITEMS, (Trial(16, 1e-9), Trial(16, 3e-2)), seed=0)
    assert tuned.chosen.trial == Trial(16, 3e-2)
    assert tuned.chosen.figure > 0.9


def test_tuning_anchors_are_all_users_until_the_cut() -> None:
    """User 0 can be measured, user 1 rejects only after the cut, user 2 likes nothing, user 3 has no history."""
    rows = [(user, 0, 7 * DAY, REJECTED) for user in range(3)] + [(user, 1, 7 * DAY, LIKED) for user in range(2)]
    rows += [(0, 2, 10 * DAY, REJECTED), (0, 3, 10 * DAY + 1, REJECTED), (1, 2, 10 * DAY + 1, REJECTED)]
    rows += [(2, 1, 7 * DAY, SHOWN), (2, 2, 9 * DAY, REJECTED), (3, 2, 9 * DAY, REJECTED)]
    events = make_events(rows)
    anchors = tuning_anchors(events, TIMELINE)
    np.testing.assert_array_equal(anchors.users, [0])
    np.testing.assert_array_equal(anchors.times, [TIMELINE.validation_us])
    np.testing.assert_array_equal(events.items[anchors.ends[0] : anchors.window_ends[0]], [2])


def test_tuning_anchors_are_evaluation_anchors_of_an_earlier_cut() -> None:
    events = make_events([*tuning_rows((9,)), (0, 9, 10 * DAY, SHOWN)])
    earlier = TimelineSettings(cut="1970-01-09T00:00Z", horizon_days=2, min_history=2)  # type: ignore[arg-type]
    ours, theirs = tuning_anchors(events, TIMELINE), evaluation_anchors(events, earlier)
    assert len(ours) == 60
    for name in ("users", "times", "starts", "ends", "window_ends"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


def test_every_kind_has_the_same_four_trials() -> None:
    assert {(trial.hidden, trial.learning_rate) for trial in TRIALS} == {(32, 1e-3), (32, 3e-3), (64, 1e-3), (64, 3e-3)}


def test_what_cannot_be_fitted_says_so() -> None:
    events = make_events(chain_rows())
    with pytest.raises(ValueError, match="'GRU' is none of SASRec"):
        fit_sequential("GRU", events, CUT, ITEMS, TRIAL, seed=0)
    with pytest.raises(DataError, match="nothing to learn from"):
        fit_sequential(NEGATIVES, events, 5, ITEMS, TRIAL, seed=0)
    with pytest.raises(ValueError, match="must return numbers"):
        fit_sequential(NEGATIVES, events, CUT, ITEMS, TRIAL, 0, lambda scores: float("nan"), epochs=1)
    with pytest.raises(ValueError, match="no trials"):
        tune_sequential(NEGATIVES, events, TIMELINE, ITEMS, (), seed=0)
    with pytest.raises(DataError, match=r"raise timeline\.validation_days"):
        tune_sequential(NEGATIVES, events, TIMELINE, ITEMS, TRIALS, seed=0)
