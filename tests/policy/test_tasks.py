"""The supervised examples say what they should, and what is a target is exactly what is asked."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from conrec.config import SupervisedSettings
from conrec.feedback.events import LIKED, REJECTED, SHOWN, Events
from conrec.policy.model import word_tokenizer
from conrec.policy.supervised import batches, supervised_loss
from conrec.policy.tasks import (
    OPTIONS,
    Examples,
    Questions,
    alignment,
    alignment_questions,
    choices,
    drop_events,
    next_negative,
    translation,
    warm_up,
)
from conrec.policy.vocabulary import Vocabulary, add_tokens
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


HOSTILE = [
    "<rejected>",
    "a <a_1><b_0> b",
    "<end> <text> <item>",
    "<|im_end|>",
    "red <unk> <pad> <begin>",
    "<A_0>",
    "</s>",
]


def pieces_tokenizer():
    """As a pretrained model brings it: pieces of bytes, and marks of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|im_end|>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="</s>")


@pytest.mark.parametrize(
    "make", [lambda: word_tokenizer([*TEXTS, *HOSTILE]), pieces_tokenizer], ids=["words", "pieces"]
)
def test_no_text_becomes_a_mark_or_a_code(make, tmp_path):
    tokenizer = make()
    add_tokens(tokenizer, 2, 2)
    tokenizer.save_pretrained(tmp_path)
    for loaded in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        vocabulary = Vocabulary.of(loaded, 2, 2)
        marks = {token for token in loaded.get_vocab().values() if token >= vocabulary.begin}
        marks |= {loaded.pad_token_id, loaded.eos_token_id} - {None}
        semantic_ids = np.zeros((len(HOSTILE), 2), int)
        examples = translation(HOSTILE, semantic_ids, loaded, vocabulary)
        for row in range(len(HOSTILE)):
            to_text, to_id = examples.tokens[row].tolist(), examples.tokens[len(HOSTILE) + row].tolist()
            said = to_text[4:-1]
            assert said
            assert not marks & set(said)
            assert said == to_id[1:-3]
    if make is pieces_tokenizer:
        assert loaded.decode(said) == HOSTILE[-1]


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
    assert said == [["<a_0>", "<b_1>", "<rejected>", "<a_1>", "<b_0>", "<liked>"], ["<a_0>", "<b_1>", "<shown>"]]
    assert all(token == "<begin>" for token in words(tokenizer, examples.tokens[0][~target[0]]))


def many_histories(language, users=200, events=20):
    """Warm-up sequences in which item i comes at place i of every history."""
    ids = np.array([[item // 5, item % 5] for item in range(events)])
    vocabulary = add_tokens(word_tokenizer(TEXTS), 2, 5)
    kinds = [REJECTED, LIKED, SHOWN, REJECTED] * (events // 4)
    logged = log(kinds * users, list(range(events)) * users, np.repeat(np.arange(users), events))
    return warm_up(logged, ids, vocabulary, max_events=events, seed=0), vocabulary


def test_dropped_events_leave_whole_and_the_rest_keeps_its_order(language):
    examples, vocabulary = many_histories(language)
    dropped = drop_events(examples, 3, 0.25, np.random.default_rng(0))
    assert len(dropped.tokens) == 200
    before = Ragged(examples.is_target, examples.tokens.offsets)
    after = Ragged(dropped.is_target, dropped.tokens.offsets)
    for row in range(200):
        whole = examples.tokens[row][before[row]].reshape(20, 3)
        left = dropped.tokens[row][after[row]].reshape(-1, 3)
        place = (left[:, 0] - vocabulary.code_tokens(np.array([0, 0]))[0]) * 5
        place += left[:, 1] - vocabulary.code_tokens(np.array([0, 0]))[1]
        assert (np.diff(place) > 0).all()
        np.testing.assert_array_equal(left, whole[place])
        # Marks before the history stay as they are.
        np.testing.assert_array_equal(dropped.tokens[row][~after[row]], examples.tokens[row][~before[row]])
    kept = dropped.is_target.sum() / examples.is_target.sum()
    assert kept == pytest.approx(0.75, abs=4 * (0.25 * 0.75 / 4000) ** 0.5)


def test_every_pass_drops_other_events_and_a_seed_the_same(language):
    examples, _ = many_histories(language, users=5)
    one, same, other = (drop_events(examples, 3, 0.5, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert one.tokens.values.tolist() == same.tokens.values.tolist()
    assert one.tokens.values.tolist() != other.tokens.values.tolist()


def test_what_is_left_after_everything_was_dropped(language):
    examples, _ = many_histories(language, users=3)
    none = drop_events(examples, 3, 1.0, np.random.default_rng(0))
    assert len(none.tokens) == 3 and not none.is_target.any()
    everything = drop_events(examples, 3, 0.0, np.random.default_rng(0))
    np.testing.assert_array_equal(everything.tokens.values, examples.tokens.values)
    np.testing.assert_array_equal(everything.is_target, examples.is_target)


def test_the_next_rejection_is_the_only_target_behind_its_prompt(language):
    tokenizer, vocabulary = language
    begin, rejected = vocabulary.begin, vocabulary.rejected
    prompts = Ragged.from_lengths(np.array([begin, rejected, begin, begin, rejected], np.int32), np.array([2, 3]))
    examples = next_negative(prompts, SEMANTIC_IDS, vocabulary)
    rows = [words(tokenizer, examples.tokens[row]) for row in range(2)]
    assert rows == [
        ["<begin>", "<rejected>", "<a_0>", "<b_1>"],
        ["<begin>", "<begin>", "<rejected>", "<a_1>", "<b_0>"],
    ]
    target = Ragged(examples.is_target, examples.tokens.offsets)
    assert target[0].tolist() == [False, False, True, True]
    assert target[1].tolist() == [False, False, False, True, True]


def alignment_world():
    """User 0 rejected item 0 three times and item 5 once; both users like items 1 to 4, user 0 was shown 6 and 7."""
    kinds = [REJECTED] * 4 + [LIKED] * 4 + [SHOWN] * 2 + [LIKED] * 4
    return log(kinds, [0, 0, 0, 5, 1, 2, 3, 4, 6, 7, 1, 2, 3, 4], [0] * 10 + [1] * 4)


IDS = np.array([[i // 4, i % 4] for i in range(8)])


@pytest.mark.parametrize(
    ("kind", "pool"), [("positive", {1, 2, 3, 4}), ("shown", {6, 7}), ("popularity", {1, 2, 3, 4})]
)
def test_alignment_asks_about_repeated_rejections_with_real_distractors(kind, pool, monkeypatch):
    monkeypatch.setattr("conrec.policy.tasks.DISTRACTORS", (kind,))
    settings = SupervisedSettings(alignment_unit="item", alignment_min_rejections=3)
    questions = alignment_questions(alignment_world(), IDS, np.zeros(8, int), settings, seed=0)
    assert len(questions.answer) == 3
    for options, answer, user in zip(questions.options, questions.answer, questions.users, strict=True):
        assert user == 0
        assert options[answer] == 0
        assert set(np.delete(options, answer).tolist()) <= pool


@pytest.mark.parametrize("kind", ["positive", "shown", "popularity"])
def test_no_question_offers_another_item_that_its_user_rejected(kind, monkeypatch):
    """User 0 likes what was rejected before, is shown it again, and rejects what user 1 likes."""
    monkeypatch.setattr("conrec.policy.tasks.DISTRACTORS", (kind,))
    settings = SupervisedSettings(alignment_unit="item", alignment_min_rejections=3)
    kinds = [REJECTED] * 60 + [REJECTED, REJECTED, LIKED, LIKED, LIKED, SHOWN, SHOWN] + [LIKED] * 4
    events = log(kinds, [0] * 60 + [5, 6, 5, 1, 2, 6, 7] + [6, 1, 2, 3], [0] * 67 + [1] * 4)
    questions = alignment_questions(events, IDS, np.zeros(8, int), settings, seed=0)
    assert 0 < len(questions.answer) < 60
    others = questions.options[np.arange(OPTIONS) != questions.answer[:, None]]
    assert set(others.tolist()) == {"positive": {1, 2}, "shown": {7}, "popularity": {1, 2, 3}}[kind]


def test_where_nothing_was_liked_only_what_was_shown_is_offered():
    """Without a like nothing is invented: item 1 was never seen by anybody."""
    settings = SupervisedSettings(alignment_unit="item", alignment_min_rejections=1)
    for shown, pool in (([], set()), ([6, 7], {6, 7})):
        events = log([REJECTED] * 40 + [SHOWN] * len(shown), [4] * 40 + shown)
        questions = alignment_questions(events, IDS, np.zeros(8, int), settings, seed=0)
        others = questions.options[np.arange(OPTIONS) != questions.answer[:, None]]
        assert set(others.tolist()) == pool and (len(questions.answer) > 0) == bool(pool)


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


def test_a_question_lists_its_options_in_order_whatever_their_number(language):
    tokenizer, vocabulary = language
    asked = choices(np.array([[1, 0, 0], [0, 1, 1]]), SEMANTIC_IDS, vocabulary)
    assert words(tokenizer, asked[0]) == [
        "<choose>", "<a_1>", "<b_0>", "<a_0>", "<b_1>", "<a_0>", "<b_1>", "<rejected>",
    ]  # fmt: skip
    assert asked.shape == (2, 8)


def test_alignment_asks_the_question_of_choices_and_teaches_the_answer(language):
    _, vocabulary = language
    options = np.array([[1, 0, 0, 0], [0, 0, 1, 0]])
    questions = Questions(options, np.array([0, 2]), np.array([0, 1]))
    examples = alignment(questions, SEMANTIC_IDS, vocabulary)
    rows = examples.tokens.values.reshape(2, -1)
    np.testing.assert_array_equal(rows[:, :-2], choices(options, SEMANTIC_IDS, vocabulary))
    np.testing.assert_array_equal(rows[:, -2:], vocabulary.code_tokens(SEMANTIC_IDS[[1, 1]]))
    assert examples.is_target.reshape(2, -1).sum(0).tolist() == [0] * 10 + [2, 2]


def test_batches_hold_every_example_once_an_epoch_within_the_budget():
    lengths = np.random.default_rng(0).integers(1, 50, 300)
    examples = Examples(Ragged.from_lengths(np.zeros(int(lengths.sum()), np.int32), lengths), np.zeros(0, bool))
    steps = batches(examples, 200, 2.0, seed=0)
    assert sorted(np.concatenate(steps).tolist()) == sorted([*range(300), *range(300)])
    assert all(len(rows) * lengths[rows].max() <= 200 for rows in steps)
    assert sum(len(rows) for rows in batches(examples, 200, 0.5, seed=0)) == 150


@pytest.mark.parametrize("budget", [1, 30, 200, 5000])
def test_batches_are_those_of_a_loop_over_examples(budget):
    """The shortest first, and a new step where one more would not fit."""
    lengths = np.random.default_rng(0).integers(1, 50, 300)
    examples = Examples(Ragged.from_lengths(np.zeros(int(lengths.sum()), np.int32), lengths), np.zeros(0, bool))
    groups = [[]]
    order = np.random.default_rng(7).permutation(300)
    for row in order[np.argsort(lengths[order], kind="stable")].tolist():
        if groups[-1] and lengths[row] * (len(groups[-1]) + 1) > budget:
            groups.append([])
        groups[-1].append(row)
    assert sorted(map(list, batches(examples, budget, 1.0, seed=7))) == sorted(groups)


def test_batches_of_many_examples_take_no_more_than_a_look_at_each(monkeypatch):
    """What is multiplied to find the groups of a pass, in all: a fixed number of times as many rows as there are."""
    looked, plain = [], np.arange
    monkeypatch.setattr("conrec.policy.supervised.np.arange", lambda *given: looked.append(given[-1]) or plain(*given))
    lengths = np.full(20_000, 20)
    examples = Examples(Ragged.from_lengths(np.zeros(int(lengths.sum()), np.int32), lengths), np.zeros(0, bool))
    assert len(batches(examples, 200, 1.0, seed=0)) == 2000
    assert 0 < sum(looked) < 5 * len(lengths)


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


@pytest.mark.parametrize("block", [1, 3, 1000])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
def test_cross_entropy_in_blocks_is_that_of_all_logits_at_once(tied, adapter, block):
    """Also of a head that is the embedding, and of one that an adapter wraps; 1e-6, gradients 1e-5."""
    model = small_model(tied, adapter)
    tokens = Ragged.from_lengths(np.random.default_rng(0).integers(0, 20, 24).astype(np.int32), np.array([11, 13]))
    is_target = np.random.default_rng(1).random(24) < 0.7
    most = []
    handle = model.get_output_embeddings().register_forward_hook(lambda head, given, logits: most.append(len(logits)))
    loss, count = supervised_loss(model, Examples(tokens, is_target), block=block)
    handle.remove()
    assert max(most) <= block and sum(most) == count
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(2.5 * loss, trained)
    padded = torch.from_numpy(tokens.padded(0).astype(np.int64))
    wanted = torch.from_numpy(Ragged(is_target, tokens.offsets).padded(False))[:, 1:]
    logits = model(input_ids=padded).logits[:, :-1][wanted]
    plain = torch.nn.functional.cross_entropy(logits, padded[:, 1:][wanted], reduction="sum")
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=1e-6)
    for one, other in zip(found, torch.autograd.grad(2.5 * plain, trained), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(supervised_loss(model, Examples(tokens, is_target), block=block)[0], plain.detach())


def small_model(tied, adapter):
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, tie_word_embeddings=tied, **sizes)).eval()
    if not adapter:
        return model
    tokens = {"embed_tokens": [3, 4, 5]} | ({} if tied else {"lm_head": [3, 4, 5]})
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=tokens)).eval()
