"""The two-tower head against one prompt and one ID at a time, and what it learns and may read."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
import torch

from conrec.blocklist.engines import TorchEngine
from conrec.catalogue.codebook import Codebook
from conrec.catalogue.items import Catalogue, semantic_id_column
from conrec.config import DAY_US, Config
from conrec.errors import DataError
from conrec.evaluation import two_tower
from conrec.evaluation.policies import blocks_of_prompts
from conrec.evaluation.tuning import Trial, tuning_anchors
from conrec.evaluation.two_tower import Heads, Samples, Trunk, TwoTower, fit_two_tower, tune_two_tower
from conrec.feedback.events import LIKED, REJECTED, Events
from conrec.policy.model import build_model
from conrec.policy.prompts import build_prompts
from conrec.ragged import Ragged

CODES, USERS = 4, 24
IDS = np.array([[a, b] for a in range(CODES) for b in range(CODES)], np.int32)
ITEMS = len(IDS)
CUT_US = 20 * DAY_US
SMALL, PASSES = Trial(16, 1e-2), 60


def settings() -> Config:
    return Config.model_validate(
        {
            "root": "unused",
            "interactions": {"path": "unused"},
            "items": {"path": "unused"},
            "timeline": {"cut": "1970-01-21T00:00:00Z", "validation_days": 4, "horizon_days": 4, "min_history": 2},
            "quantizer": {"levels": 2, "codes": CODES},
            "model": {"hidden_size": 32, "layers": 1, "heads": 1, "intermediate_size": 32},
        }
    )


def events_of(last_day: int = 20) -> Events:
    """User u rejects an item of kind u a day, and likes one of the next kind."""
    rows = []
    for user in range(USERS):
        random = np.random.default_rng(user)
        for day in range(1, last_day + 1):
            kind = user % CODES
            rows.append((user, day, kind * CODES + random.integers(CODES), REJECTED))
            rows.append((user, day + 0.5, (kind + 1) % CODES * CODES + random.integers(CODES), LIKED))
    users, days, items, kinds = (np.array(column) for column in zip(*rows, strict=True))
    names = pa.array([f"u{user:02d}" for user in range(USERS)])
    offsets = np.searchsorted(users, np.arange(USERS + 1))
    return Events(names, offsets, items.astype(np.int32), (days * DAY_US).astype(np.int64), kinds.astype(np.int8))


@pytest.fixture(scope="module")
def trunk() -> Trunk:
    """An untrained model."""
    config = settings()
    table = {"item_id": [f"i{item:02d}" for item in range(ITEMS)], "text": ["item"] * ITEMS}
    items = pa.table(table).append_column("semantic_id", semantic_id_column(IDS))
    codebook = Codebook(np.zeros((2, CODES, 4), np.float32), np.zeros(4, np.float32))
    catalogue = Catalogue.of(items, codebook)
    model, _, vocabulary = build_model(config, ["item"])
    return Trunk(TorchEngine(model.eval(), catalogue.trie, vocabulary), catalogue, events_of(), config)


def test_a_state_is_that_of_the_prompt_alone(trunk: Trunk) -> None:
    """Prompts of several lengths in one batch against one prompt at a time; to 1e-5, the rounding of other shapes."""
    anchors = trunk.samples_anchors(CUT_US, trunk.config.timeline)
    assert len(set((anchors.ends - anchors.starts).tolist())) > 3
    blocks = blocks_of_prompts(trunk.config)
    vocabulary = trunk.engine.vocabulary
    past = trunk.events.before(CUT_US)
    prompts = build_prompts(past, anchors, IDS, vocabulary, trunk.config.prompt, blocks)
    found = trunk.states(past, anchors)
    for row in range(0, len(anchors), 7):
        tokens = torch.as_tensor(prompts[row], dtype=torch.int64)[None]
        with torch.inference_mode():
            hidden = trunk.engine.model.get_decoder()(input_ids=tokens).last_hidden_state
        np.testing.assert_allclose(found[row], hidden[0, -1].numpy(), atol=1e-5)


@pytest.fixture(scope="module")
def fitted(trunk: Trunk) -> tuple[Samples, TwoTower]:
    samples = trunk.samples(CUT_US, trunk.config.timeline)
    return samples, fit_two_tower(trunk, samples, SMALL, seed=0, epochs=PASSES)


def test_scores_are_dot_products_of_one_state_with_a_vector_of_each_id(
    trunk: Trunk, fitted: tuple[Samples, TwoTower]
) -> None:
    samples, model = fitted
    states, heads = samples.states[:5], model.heads
    first = trunk.engine.vocabulary.first_code_token
    said = trunk.engine.model.get_output_embeddings().weight.detach()[first : first + CODES]
    with torch.no_grad():
        vectors = [heads.item(heads.codes[0, a] + heads.codes[1, b]) for a, b in IDS.tolist()]
        logits = np.zeros((5, ITEMS))
        for row, state in enumerate(torch.from_numpy(states)):
            for leaf, vector in enumerate(vectors):
                logits[row, leaf] = state @ said[IDS[leaf, 0]] + heads.next(state) @ vector + heads.shares[leaf]
        state = torch.from_numpy(states[1])
        verdicts = [float(heads.verdict(state) @ vectors[leaf] + heads.odds[leaf]) for leaf in (3, 7)]
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    scores = model.scores(states)
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    np.testing.assert_allclose(model.judge(states, np.array([1, 1]), np.array([3, 7])), verdicts, atol=1e-4)
    leaves, log_probs = model.generate(states, 20)
    np.testing.assert_array_equal(leaves[:, :ITEMS], np.argsort(-scores, axis=1, kind="stable"))
    assert (leaves[:, ITEMS:] == -1).all() and np.isneginf(log_probs[:, ITEMS:]).all()
    np.testing.assert_array_equal(model.of_leaves(states, leaves), log_probs)


def test_before_any_step_it_says_the_first_code_as_the_trunk_does_and_counts_the_rest(trunk: Trunk) -> None:
    samples = trunk.samples(CUT_US, trunk.config.timeline)
    heads = Heads(trunk, samples, 8)
    counts = np.bincount(samples.leaves.values[samples.rejected], minlength=ITEMS) + 1.0
    likes = np.bincount(samples.leaves.values[~samples.rejected], minlength=ITEMS) + 1.0
    np.testing.assert_allclose(
        heads.shares.detach(), np.log(counts / np.repeat(counts.reshape(CODES, -1).sum(1), 4)), rtol=1e-5
    )
    np.testing.assert_allclose(heads.odds.detach(), np.log(counts / likes), atol=1e-6)


def test_it_learns_what_follows_and_what_is_liked(trunk: Trunk, fitted: tuple[Samples, TwoTower]) -> None:
    """Rejections are of the user's kind, likes of the next one."""
    samples, model = fitted
    kinds = trunk.samples_anchors(CUT_US, trunk.config.timeline).users % CODES
    best = model.generate(samples.states, 4)[0] // CODES
    assert (best == kinds[:, None]).mean() > 0.9
    assert (
        TwoTower(Heads(trunk, samples, 8), 0).generate(samples.states, 4)[0] // CODES == kinds[:, None]
    ).mean() < 0.5
    rows, leaves = samples.leaves.rows, samples.leaves.values
    said = model.judge(samples.states, rows, leaves)
    assert said[samples.rejected].min() > said[~samples.rejected].max()


def test_the_same_seed_gives_the_same_head(trunk: Trunk, fitted: tuple[Samples, TwoTower]) -> None:
    samples, model = fitted
    state = torch.random.get_rng_state()
    again = fit_two_tower(trunk, samples, SMALL, seed=0, epochs=PASSES)
    assert torch.equal(torch.random.get_rng_state(), state)
    np.testing.assert_array_equal(again.scores(samples.states), model.scores(samples.states))
    assert model.parameters == sum(weight.numel() for weight in model.heads.parameters()) and model.epochs == PASSES


def test_it_is_tuned_and_trained_without_what_comes_after_the_cut(
    trunk: Trunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(two_tower, "EPOCHS", 3)
    timeline = trunk.config.timeline
    leaky = dataclasses.replace(trunk, events=events_of(24))
    past = trunk.events.before(CUT_US)
    asked = trunk.states(past, tuning_anchors(past, timeline))
    tuned, reread = (tune_two_tower(one, one, timeline, (SMALL,), seed=0) for one in (trunk, leaky))
    assert tuned.chosen.figure == reread.chosen.figure and 1 <= tuned.model.epochs <= 3
    np.testing.assert_array_equal(tuned.model.scores(asked), reread.model.scores(asked))
    later = leaky.samples(CUT_US + 4 * DAY_US, timeline)
    assert not np.array_equal(later.leaves.values, trunk.samples(CUT_US, timeline).leaves.values)


def test_nothing_to_learn_from(trunk: Trunk) -> None:
    with pytest.raises(DataError, match=r"nothing to learn from: .* until 1970-01-01 00:00; check timeline\.cut"):
        trunk.samples(0, trunk.config.timeline)


def test_an_anchor_without_an_answer_trains_nothing(trunk: Trunk) -> None:
    none = Samples(np.zeros((3, 32), np.float32), Ragged.from_lengths(np.array([5]), [0, 1, 0]), np.array([True]))
    model = fit_two_tower(trunk, none, SMALL, seed=0, epochs=2)
    assert np.isfinite(model.scores(none.states)).all()
