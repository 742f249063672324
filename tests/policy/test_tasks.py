"""The supervised examples say what they should, and what is a target is exactly what is asked."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from conrec.config import SupervisedSettings
from conrec.feedback.anchors import LIKED, REJECTED, SHOWN, Events
from conrec.policy.model import word_tokenizer
from conrec.policy.supervised import batches, supervised_loss
from conrec.policy.tasks import OPTIONS, Examples, alignment, alignment_questions, translation, warm_up
from conrec.policy.vocabulary import add_tokens
from conrec.ragged import Ragged

TEXTS = ["Red car, 12 s", "Blue boat"]
SEMANTIC_IDS = np.array([[0, 1], [1, 0]])


@pytest.fixture
def language():
    tokenizer = word_tokenizer(TEXTS)
    return tokenizer, add_tokens(tokenizer, 2, 2)


def words(tokenizer, tokens):
    return tokenizer.convert_ids_to_tokens(list(tokens))


def test_translation_goes_both_ways(language):
    tokenizer, vocabulary = language
    examples = translation(TEXTS, SEMANTIC_IDS, tokenizer, vocabulary)
    rows = [words(tokenizer, examples.tokens[i]) for i in range(4)]
    assert rows[0] == ["<item>", "<a_0>", "<b_1>", "<text>", "red", "car", ",", "1", "2", "s", "<end>"]
    assert rows[3] == ["<text>", "blue", "boat", "<item>", "<a_1>", "<b_0>"]
    target = Ragged(examples.is_target, examples.tokens.offsets)
    assert target[0].tolist() == [False] * 4 + [True] * 7
    assert target[3].tolist() == [False] * 4 + [True] * 2


def log(kinds, items, users=None):
    users = np.zeros(len(kinds), int) if users is None else np.asarray(users)
    offsets = np.concatenate(([0], np.cumsum(np.bincount(users))))
    names = pa.array([str(i) for i in range(len(offsets) - 1)])
    return Events(names, offsets, np.array(items, np.int32), np.arange(len(kinds)), np.array(kinds, np.int8))


def test_warm_up_predicts_every_kind_and_code_in_pieces(language):
    tokenizer, vocabulary = language
    events = log([REJECTED, LIKED, SHOWN], [0, 1, 0])
    examples = warm_up(events, SEMANTIC_IDS, vocabulary, max_events=2, seed=0)
    target = Ragged(examples.is_target, examples.tokens.offsets)
    said = [words(tokenizer, examples.tokens[i][target[i]]) for i in range(len(examples.tokens))]
    assert said == [["<rejected>", "<a_0>", "<b_1>", "<liked>", "<a_1>", "<b_0>"], ["<shown>", "<a_0>", "<b_1>"]]
    assert all(token == "<begin>" for token in words(tokenizer, examples.tokens[0][~target[0]]))


def alignment_world():
    """User 0 rejected item 0 three times and item 5 once; both users like items 1 to 4, user 0 was shown 6 and 7."""
    kinds = [REJECTED] * 4 + [LIKED] * 4 + [SHOWN] * 2 + [LIKED] * 4
    return log(kinds, [0, 0, 0, 5, 1, 2, 3, 4, 6, 7, 1, 2, 3, 4], [0] * 10 + [1] * 4)


IDS = np.array([[i // 4, i % 4] for i in range(8)])


@pytest.mark.parametrize(
    ("kind", "pool"), [("positive", {1, 2, 3, 4}), ("shown", {6, 7}), ("popularity", {1, 2, 3, 4})]
)
def test_alignment_asks_about_repeated_rejections_with_real_distractors(kind, pool):
    settings = SupervisedSettings(alignment_unit="item", alignment_min_rejections=3, alignment_distractors=(kind,))
    questions = alignment_questions(alignment_world(), IDS, np.zeros(8, int), settings, seed=0)
    assert len(questions.answer) == 3
    for options, answer, user in zip(questions.options, questions.answer, questions.users, strict=True):
        assert user == 0
        assert options[answer] == 0
        assert set(np.delete(options, answer).tolist()) <= pool


def test_alignment_is_shuffled_and_never_shows_the_answer_twice():
    settings = SupervisedSettings(alignment_unit="item", alignment_min_rejections=1)
    events = log([REJECTED] * 200 + [LIKED] * 2, [0] * 200 + [0, 1])
    questions = alignment_questions(events, IDS, np.zeros(8, int), settings, seed=0)
    assert set(questions.answer.tolist()) == set(range(OPTIONS))
    same = (IDS[questions.options] == IDS[0]).all(-1).sum(1)
    assert (same == 1).all()


def test_alignment_prompt_has_no_history(language):
    tokenizer, vocabulary = language
    settings = SupervisedSettings(alignment_unit="item", alignment_min_rejections=1)
    events = log([REJECTED, LIKED], [0, 1])
    questions = alignment_questions(events, SEMANTIC_IDS, np.zeros(2, int), settings, seed=0)
    row = words(tokenizer, alignment(questions, SEMANTIC_IDS, vocabulary).tokens[0])
    assert row[0] == "<choose>"
    assert row[-3:] == ["<rejected>", "<a_0>", "<b_1>"]
    assert len(row) == 1 + OPTIONS * 2 + 3


def test_batches_hold_every_example_once_an_epoch_within_the_budget():
    lengths = np.random.default_rng(0).integers(1, 50, 300)
    examples = Examples(Ragged.from_lengths(np.zeros(int(lengths.sum()), np.int32), lengths), np.zeros(0, bool))
    steps = batches(examples, 200, 2.0, seed=0)
    assert sorted(np.concatenate(steps).tolist()) == sorted([*range(300), *range(300)])
    assert all(len(rows) * lengths[rows].max() <= 200 for rows in steps)
    assert sum(len(rows) for rows in batches(examples, 200, 0.5, seed=0)) == 150


def test_supervised_loss_is_the_cross_entropy_of_the_targets(language):
    """Against one full forward per example, tolerance 1e-4."""
    from worlds import tiny_config, tiny_model

    model = tiny_model(tiny_config())[0]
    model.eval()
    random = np.random.default_rng(0)
    lengths = np.array([5, 9, 3])
    tokens = Ragged.from_lengths(random.integers(2, 30, lengths.sum()).astype(np.int32), lengths)
    is_target = random.random(lengths.sum()) < 0.5
    is_target[tokens.offsets[:-1]] = False
    loss, count = supervised_loss(model, Examples(tokens, is_target))
    expected = 0.0
    for row in range(3):
        ids = torch.tensor(tokens[row].astype(np.int64))[None]
        log_probs = model(ids).logits[0].log_softmax(-1)
        for place in np.flatnonzero(Ragged(is_target, tokens.offsets)[row]):
            expected -= log_probs[place - 1, ids[0, place]].item()
    assert count == is_target.sum()
    assert loss.item() == pytest.approx(expected, abs=1e-4)
