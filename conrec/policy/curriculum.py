"""What a policy is trained on: the tokens of the supervised tasks, the samples of GRPO, and what measures both.

    world = TrainingWorld.of(settings, catalogue, events)
    data = world.data(supervised_tasks(settings, world), grpo_stages(settings, world)[0])

Invariant: nothing that trains lies after the cut; what validation anchors did later is measured and trains nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from conrec.catalogue.items import Catalogue, unit_categories
from conrec.config import Config, PromptSettings, TimelineSettings
from conrec.errors import TooLittleDataError
from conrec.feedback.anchors import Anchors, training_anchors, validation_anchors
from conrec.feedback.events import REJECTED, Events
from conrec.feedback.histories import history_items
from conrec.feedback.swing import swing_neighbours
from conrec.feedback.targets import ground_truth_sets, targets
from conrec.policy.loop import epochs_of
from conrec.policy.model import build_model
from conrec.policy.prompts import build_prompts
from conrec.policy.samples import GrpoSamples, HeldOutQuestions, JudgedPairs, TrainingData
from conrec.policy.tasks import (
    Examples,
    Questions,
    alignment,
    alignment_questions,
    next_negative,
    translation,
    warm_up,
)
from conrec.policy.vocabulary import Vocabulary
from conrec.ragged import Ragged, pairs

HELD_OUT_QUESTIONS = 1000
"""Alignment questions that measure forgetting, at most."""


@dataclass(frozen=True)
class TrainingWorld:
    """What both halves of the training read: catalogue, events, anchors, and the model before training.

    `history` holds the events that may train, `anchors` those of GRPO: they end at the cut. Validation anchors,
    where something is decided, lie at it, and `events` reach to the end of their windows.
    """

    catalogue: Catalogue
    events: Events
    history: Events
    anchors: Anchors
    validation: Anchors
    model: Any
    tokenizer: Any
    vocabulary: Vocabulary
    questions: Questions
    held_out: np.ndarray
    prompts: PromptSettings

    @classmethod
    def of(
        cls, config: Config, catalogue: Catalogue, events: Events, decided_by: TimelineSettings | None = None
    ) -> TrainingWorld:
        """Builds the model; `decided_by`: the timeline whose validation anchors decide, nobody's without one."""
        model, tokenizer, vocabulary = build_model(config, catalogue.items["text"].to_pylist())
        validation = validation_anchors(events, decided_by or config.timeline)
        if decided_by is None:
            validation = validation.take(np.zeros(0, np.int64))
        history = events.before(config.timeline.cut_us)
        questions = alignment_questions(
            history, catalogue.semantic_ids, unit_categories(catalogue), config.supervised, config.seed
        )
        return cls(
            catalogue,
            events,
            history,
            training_anchors(history, config.timeline),
            validation,
            model,
            tokenizer,
            vocabulary,
            questions,
            held_out(questions, config),
            config.prompt,
        )

    def data(
        self, tasks: dict[str, Examples] | None = None, stages: dict[str, GrpoSamples] | None = None
    ) -> TrainingData:
        """These tasks or samples beside the held-out questions, the validation prompts and their pairs."""
        held = np.flatnonzero(self.held_out)[:HELD_OUT_QUESTIONS]
        return TrainingData(
            tasks or {},
            stages or {},
            held_out_questions(self.questions.take(held), self.catalogue, self.vocabulary),
            build_prompts(self.events, self.validation, self.catalogue.semantic_ids, self.vocabulary, self.prompts),
            self.validation.users,
            judged_pairs(self.catalogue, self.events, self.validation),
        )


def supervised_tasks(config: Config, world: TrainingWorld) -> dict[str, Examples]:
    """Token sequences of each supervised task that has passes and examples. Raises `TooLittleDataError` for none."""
    catalogue, vocabulary = world.catalogue, world.vocabulary
    semantic_ids, texts = catalogue.semantic_ids, catalogue.items["text"].to_pylist()
    asked = world.questions.take(np.flatnonzero(~world.held_out))
    everything = {
        "translation": lambda: translation(texts, semantic_ids, world.tokenizer, vocabulary),
        "alignment": lambda: alignment(asked, semantic_ids, vocabulary),
        "warm_up": lambda: warm_up(world.history, semantic_ids, vocabulary, config.prompt.max_events, config.seed),
        "next_negative": lambda: next_rejections(config, world),
    }
    tasks = {name: everything[name]() for name in epochs_of(config)}
    tasks = {name: examples for name, examples in tasks.items() if len(examples.tokens)}
    if not tasks:
        supervised = config.supervised
        raise TooLittleDataError(
            f"nothing to train before GRPO: supervised.translation_epochs = {supervised.translation_epochs:g}, "
            f"alignment_epochs = {supervised.alignment_epochs:g} over {len(asked.answer):,} questions and "
            f"warmup_epochs = {supervised.warmup_epochs:g} over {len(world.history):,} events "
            f'(warmup_target = "{supervised.warmup_target}") make no example; give translation or events a pass'
        )
    return tasks


def next_rejections(config: Config, world: TrainingWorld) -> Examples:
    """A prompt before every rejection, the rejected item its answer."""
    every = config.timeline.model_copy(update={"max_anchors_per_user": len(world.history)})
    anchors = training_anchors(world.history, every)
    wanted = targets(world.history, anchors).next_negative
    semantic_ids, blocks = world.catalogue.semantic_ids, config.supervised.warmup_blocks
    prompts = build_prompts(world.history, anchors, semantic_ids, world.vocabulary, config.prompt, blocks)
    known = np.flatnonzero(wanted >= 0)
    return next_negative(prompts.take(known), semantic_ids[wanted[known]], world.vocabulary)


def grpo_stages(config: Config, world: TrainingWorld) -> tuple[dict[str, GrpoSamples], dict[str, Any]]:
    """The samples of each GRPO stage, and figures about what training reads.

    Raises `TooLittleDataError` for a stage without samples.
    """
    history, trie = world.history, world.catalogue.trie
    semantic_ids = world.catalogue.semantic_ids
    neighbours = swing_neighbours(history, len(semantic_ids), config.swing, config.seed)
    anchors, wanted = world.anchors, targets(history, world.anchors)
    if config.grpo.targets == "next_negative":
        known = wanted.next_negative >= 0
        truth = Ragged.from_lengths(wanted.next_negative[known], known.astype(np.int64))
        weights = np.ones(len(truth.values))
    else:
        truth, weights = ground_truth_sets(wanted, neighbours, config.grpo.kappa)
    # Without a future rejection there is nothing to reward.
    rejecting = wanted.future_negatives.lengths > 0
    truth_leaves = Ragged(trie.item_leaves[truth.values], truth.offsets)
    positive_leaves = Ragged(trie.item_leaves[wanted.future_positives.values], wanted.future_positives.offsets)
    stages = {}
    for stage in config.grpo.stages:
        prompts = build_prompts(history, anchors, semantic_ids, world.vocabulary, config.prompt, stage.blocks)
        samples = GrpoSamples(prompts, truth_leaves, weights.astype(np.float32), positive_leaves)
        # A user without events of the stage's blocks has nothing that an ID could be predicted from.
        informative = np.bincount(prompts.rows, prompts.values != world.vocabulary.begin, len(prompts)) > 0
        chosen = np.flatnonzero(informative & rejecting)
        if not len(chosen):
            raise TooLittleDataError(
                f"GRPO stage {stage.name!r} has nothing to learn from: of {len(anchors):,} training anchors "
                f"{np.count_nonzero(rejecting):,} have a rejection in their window, {np.count_nonzero(informative):,} "
                f"a history of the blocks {', '.join(stage.blocks)}, none both; leave the stage out of grpo.stages"
            )
        stages[stage.name] = samples.take(chosen)
    return stages, {
        "training_anchors": int(rejecting.sum()),
        "validation_anchors": len(world.validation),
        "swing_covered_share": neighbours.covered_share,
        "alignment_questions": len(world.questions.answer),
    }


def held_out(questions: Questions, config: Config) -> np.ndarray:
    """Which questions train nothing: those of a share of the users. Shape: (Q,) bool."""
    users = np.unique(questions.users)
    chosen = np.random.default_rng(config.seed).random(len(users)) < config.supervised.alignment_holdout
    return chosen[np.searchsorted(users, questions.users)]


def held_out_questions(questions: Questions, catalogue: Catalogue, vocabulary: Vocabulary) -> HeldOutQuestions:
    """The questions as prompts with four leaves to choose from."""
    examples = alignment(questions, catalogue.semantic_ids, vocabulary)
    count = len(questions.answer)
    width = len(examples.tokens.values) // count if count else 1
    tokens = examples.tokens.values.reshape(count, width)[:, : width - vocabulary.levels]
    prompts = Ragged.from_lengths(tokens.ravel(), np.full(count, tokens.shape[1]))
    return HeldOutQuestions(prompts, catalogue.trie.item_leaves[questions.options].astype(np.int64), questions.answer)


def judged_pairs(catalogue: Catalogue, events: Events, anchors: Anchors) -> JudgedPairs:
    """What each anchor rejects or likes in its window and has not met before, less what it does both to.

    Items without a semantic ID of the trie are left out. Shape: A anchors -> A rows of leaves.
    """
    item_count = len(catalogue.semantic_ids)
    wanted = targets(events, anchors)
    known, rejected, liked = (
        pairs(part.rows, part.values, item_count)
        for part in (history_items(events, anchors), wanted.future_negatives, wanted.future_positives)
    )
    told = np.setdiff1d(np.setxor1d(rejected, liked), known)
    anchor, item = np.divmod(told, item_count)
    leaves = catalogue.trie.item_leaves[item].astype(np.int64)
    live = leaves >= 0
    return JudgedPairs(
        Ragged.from_rows(anchor[live], leaves[live], len(anchors)), np.isin(told[live], rejected, assume_unique=True)
    )


def alignment_warnings(config: Config, catalogue: Catalogue, events: Events) -> list[str]:
    """Says when no alignment question is left to train on: the policy is then trained without alignment."""
    settings = config.supervised
    if not settings.alignment_epochs:
        return []
    history = events.before(config.timeline.cut_us)
    questions = alignment_questions(history, catalogue.semantic_ids, unit_categories(catalogue), settings, config.seed)
    held = np.count_nonzero(held_out(questions, config))
    if held < len(questions.answer):
        return []
    rejections = np.count_nonzero(history.kinds == REJECTED)
    return [
        f"no alignment question to train on, so the policy is trained without alignment: {len(questions.answer):,} "
        f"questions from {rejections:,} rejections until timeline.cut, {held:,} of them held out. A question takes "
        f"{settings.alignment_min_rejections} rejections (supervised.alignment_min_rejections) of one "
        f"{settings.alignment_unit} (supervised.alignment_unit) by one user, and items of another semantic ID than the "
        f"rejected one: the catalogue has {len(catalogue.trie):,}; they were liked, or shown to the user, who rejected "
        f"none of them; supervised.alignment_holdout = {settings.alignment_holdout:g} of the users train none"
    ]
