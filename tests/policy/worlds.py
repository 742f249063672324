"""A tiny constructed world: users of four kinds, each with one aversion that the history tells.

Semantic IDs are two codes of four: 16 leaves, one item each. A user of kind g rejected leaf (g, 0) before and will
reject (g, 3); likes are of the next kind, and (g + 1, 3) will be liked.
"""

import numpy as np

from conrec.catalogue.trie import Trie
from conrec.config import Config
from conrec.policy.model import build_model
from conrec.policy.prompts import CACHE_BLOCK
from conrec.policy.samples import GrpoSamples, HeldOutQuestions, JudgedPairs, TrainingData
from conrec.policy.tasks import Examples
from conrec.ragged import Ragged

LEVELS, CODES, KINDS = 2, 4, 4
VALIDATED = 16
"""Validation anchors, four of each kind: what all of them gain is no chance."""
SEMANTIC_IDS = np.array([[a, b] for a in range(CODES) for b in range(CODES)], np.int32)
TRIE = Trie.build(SEMANTIC_IDS, CODES)


def tiny_config(**sections) -> Config:
    """Settings of a world that trains in seconds; sections override."""
    base = {
        "root": "unused",
        "interactions": {"path": "unused"},
        "items": {"path": "unused"},
        "timeline": {"cut": "2026-01-01T00:00:00Z"},
        "quantizer": {"levels": LEVELS, "codes": CODES},
        "model": {"hidden_size": 32, "layers": 2, "heads": 2, "intermediate_size": 64},
        "supervised": {
            "learning_rate": 1e-2,
            "translation_epochs": 0,
            "alignment_epochs": 0,
            "warmup_epochs": 15,
            "tokens_per_step": 1200,
        },
        "grpo": {
            "group_size": 4,
            "prompts_per_step": 8,
            "learning_rate": 1e-2,
            "evaluate_every": 20,
            "stages": [{"name": "all", "blocks": ["negatives", "positives"], "steps": 100, "beta": 0.02}],
        },
        "generate": {"engine": "torch", "beam_width": 4},
        "train": {"cpus_per_worker": 1, "checkpoint_every": 10},
    }
    for name, section in sections.items():
        base[name] = base.get(name, {}) | section if isinstance(section, dict) else section
    return Config.model_validate(base)


def tiny_model(config: Config):
    """(model, tokenizer, vocabulary), the same for the same seed."""
    return build_model(config, ["one red item", "two blue items"])


def prompts_of(kinds: np.ndarray, vocabulary) -> Ragged:
    """`<begin>... (g, 0) <rejected> (g + 1, 0) <liked>` for users of these kinds."""
    rows = np.full((len(kinds), CACHE_BLOCK), vocabulary.begin, np.int32)
    rows[:, -6:-4] = vocabulary.code_tokens(np.stack([kinds, np.zeros_like(kinds)], 1))
    rows[:, -4] = vocabulary.rejected
    rows[:, -3:-1] = vocabulary.code_tokens(np.stack([(kinds + 1) % KINDS, np.zeros_like(kinds)], 1))
    rows[:, -1] = vocabulary.liked
    return Ragged.from_lengths(rows.ravel(), np.full(len(kinds), CACHE_BLOCK))


def leaves_of(kinds: np.ndarray, second_code: int) -> np.ndarray:
    """Leaf (g, second_code) of each kind g."""
    return TRIE.find(np.stack([kinds % KINDS, np.full_like(kinds, second_code)], 1))


def tiny_data(config: Config, vocabulary) -> TrainingData:
    """Supervised examples, GRPO samples, prompts.

    An example goes on with an ID of the user's own kind, which is rejected, or of the next, liked; any second code.
    """
    kinds = np.arange(64) % KINDS
    prompts = prompts_of(kinds, vocabulary)
    random = np.random.default_rng(0)
    liked = random.integers(2, size=len(kinds))
    near = vocabulary.code_tokens(np.stack([(kinds + liked) % KINDS, random.integers(CODES, size=len(kinds))], 1))
    said = np.where(liked, vocabulary.liked, vocabulary.rejected).astype(np.int32)
    tokens = np.concatenate([prompts.values.reshape(len(kinds), -1), near, said[:, None]], axis=1)
    is_target = np.zeros(tokens.shape, bool)
    # Codes and kind, as in a warm-up: whole events are targets.
    is_target[:, -LEVELS - 1 :] = True
    examples = Examples(Ragged.from_lengths(tokens.ravel(), np.full(len(kinds), tokens.shape[1])), is_target.ravel())
    one = np.ones(len(kinds), np.int64)
    samples = GrpoSamples(
        prompts,
        Ragged.from_lengths(leaves_of(kinds, 3), one),
        np.ones(len(kinds), np.float32),
        Ragged.from_lengths(leaves_of(kinds + 1, 3), one),
    )
    options = np.stack([leaves_of(kinds[:8] + shift, 3) for shift in range(4)], axis=1)
    questions = HeldOutQuestions(prompts_of(kinds[:8], vocabulary), options, np.zeros(8, np.int64))
    stages = {stage.name: samples for stage in config.grpo.stages}
    users = np.arange(VALIDATED)
    kinds = users % KINDS
    validation = prompts_of(kinds, vocabulary)
    return TrainingData({"warm_up": examples}, stages, questions, validation, users, pairs_of(kinds))


def pairs_of(kinds: np.ndarray) -> JudgedPairs:
    """Every user will reject (g, 1) and (g, 3), and like (g + 1, 3)."""
    leaves = np.stack([leaves_of(kinds, 1), leaves_of(kinds, 3), leaves_of(kinds + 1, 3)], 1)
    return JudgedPairs(
        Ragged.from_lengths(leaves.ravel(), np.full(len(kinds), 3)), np.tile([True, True, False], len(kinds))
    )


def fhr_at_1(leaves: np.ndarray) -> dict[str, float]:
    """Share of the users whose first generated ID is the one they will reject, or the one they will like."""
    kinds = np.arange(len(leaves)) % KINDS
    return {
        "fhr": float(np.mean(leaves[:, 0] == leaves_of(kinds, 3))),
        "fph": float(np.mean(leaves[:, 0] == leaves_of(kinds + 1, 3))),
    }
