"""How rivals that learn are tuned: passes over the events until no better figure comes, and which trial is taken.

    tuned = tune("TIGER", trials, fit, ranked, events, timeline)     # every trial, then the best one until the cut
    best = fit_passes(network, one_pass, epochs=30, patience=3, told="TIGER, 64 wide", stop=stop)

Invariant: trials are fitted on events until the validation time and chosen by FHR@20 on the validation anchors,
whose windows end by the cut; of equal figures the first trial stands. Nothing after the cut takes part in any choice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np

from conrec.errors import DataError
from conrec.evaluation.baselines import Histories
from conrec.evaluation.leaf_items import item_shares, leaf_items_by_rejections, scored_items, without_liked
from conrec.evaluation.metrics import members
from conrec.feedback.anchors import Anchors, validation_anchors
from conrec.feedback.events import LIKED, Events
from conrec.feedback.targets import targets
from conrec.ragged import Ragged

if TYPE_CHECKING:
    from torch import nn

    from conrec.catalogue.trie import Trie
    from conrec.config import TimelineSettings

TOP = 20
"""Length of the lists that trials are measured by."""


class Fitted(Protocol):
    """A model that was fitted in passes."""

    @property
    def epochs(self) -> int:
        """Passes that made its weights."""


Model = TypeVar("Model", bound=Fitted)


@dataclass(frozen=True)
class Trial:
    """What is tuned: the width of the model and the learning rate of Adam."""

    hidden: int
    learning_rate: float

    @property
    def told(self) -> str:
        """In words."""
        return f"{self.hidden} wide at {self.learning_rate:g}"


@dataclass(frozen=True)
class RuleTrial:
    """What is tuned of counted rules: after how many days an event counts half, and how much of everybody's share of
    an item stands in a rule before anything is counted."""

    half_life_days: float
    prior: float

    @property
    def told(self) -> str:
        """In words."""
        return f"half-life {self.half_life_days:g} days, prior {self.prior:g}"


Tried = TypeVar("Tried", Trial, RuleTrial)


@dataclass(frozen=True)
class TrialResult:
    """FHR@20 on the validation anchors after the best number of epochs, and what the trial cost."""

    trial: Trial | RuleTrial
    figure: float
    epochs: int
    seconds: float

    def to_json(self) -> dict[str, float]:
        """As the manifest of a row says it."""
        told = {"validation_fhr": self.figure, "epochs": self.epochs, "seconds": round(self.seconds, 1)}
        return vars(self.trial) | told

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> TrialResult:
        """What `to_json` said."""
        kind = RuleTrial if "half_life_days" in told else Trial
        trial = kind(**{field.name: told[field.name] for field in fields(kind)})
        return cls(trial, told["validation_fhr"], told["epochs"], told["seconds"])


@dataclass(frozen=True)
class Tuned(Generic[Model]):
    """The model of the chosen trial, trained until the cut.

    `trials` are in the order in which they were tried; `training_seconds` is the last fit alone.
    """

    model: Model
    trials: tuple[TrialResult, ...]
    chosen: TrialResult
    training_seconds: float


@dataclass(frozen=True)
class Question:
    """What trials are measured by: the validation anchors, of which a list must hit a later rejection.

    Shape: a row for each anchor; `excluded`: items of the history, which no list holds; `past`: the events until the
    validation time.
    """

    histories: Histories
    excluded: Ragged
    wanted: Ragged
    past: Events

    @classmethod
    def of(cls, events: Events, timeline: TimelineSettings) -> Question:
        """Of the events until the cut. Raises `DataError` when no user can be measured."""
        known = events.before(timeline.cut_us)
        anchors = tuning_anchors(known, timeline)
        histories = Histories.at(known, anchors)
        wanted = targets(known, anchors).future_negatives
        return cls(histories, histories.distinct(), wanted, known.before(timeline.validation_us))

    def of_ids(self, leaves: np.ndarray, log_probs: np.ndarray, trie: Trie) -> np.ndarray:
        """The lists (A, TOP) of generated IDs (A, W), ranked as the evaluation ranks those of a policy by itself."""
        liked = self.histories.distinct((LIKED,))
        ids = trie.item_leaves[liked.values].astype(np.int64)
        liked = Ragged.from_rows(liked.rows[ids >= 0], ids[ids >= 0], len(liked))
        leaf_items, shares = leaf_items_by_rejections(trie, self.past), item_shares(trie, self.past)
        new = without_liked(leaves, liked, len(trie))
        return scored_items(new, log_probs, leaf_items, shares, self.excluded, TOP)[0]

    def fhr(self, ranked: np.ndarray) -> float:
        """Share of the lists (A, TOP) that hit."""
        return float(members(self.wanted, ranked).any(axis=1).mean())


def tuning_anchors(events: Events, timeline: TimelineSettings) -> Anchors:
    """The validation anchors. Raises `DataError` when there are none."""
    anchors = validation_anchors(events, timeline)
    if not len(anchors):
        raise DataError(
            f"no user has a history until the validation time and a rejection between it and the cut "
            f"{timeline.cut.isoformat()}; raise timeline.validation_days, now {timeline.validation_days:g}, or lower "
            f"timeline.min_history, now {timeline.min_history}"
        )
    return anchors


def tune(
    name: str,
    trials: Sequence[Tried],
    fit: Callable[[int, Tried, Callable[[Model], float] | None, int | None], Model],
    ranked: Callable[[Model, Question], np.ndarray],
    events: Events,
    timeline: TimelineSettings,
) -> Tuned[Model]:
    """Chooses a trial on the validation anchors, then fits it on everything until the cut for its best epoch count.

    `fit(until_us, trial, stop, epochs)`: with `stop`, which gives a figure after every pass, as many epochs as help;
    else so many. `ranked` answers the question: lists (A, TOP) of item rows, -1 padding.
    Raises ValueError without trials, `DataError` when no user can be measured.
    """
    if not trials:
        raise ValueError(f"{name}: no trials to choose from; give at least one")
    question = Question.of(events, timeline)
    results = []
    for trial in trials:
        figures: list[float] = []

        def measured(model: Model, figures: list[float] = figures) -> float:
            figures.append(question.fhr(ranked(model, question)))
            return figures[-1]

        started = time.monotonic()
        model = fit(timeline.validation_us, trial, measured, None)
        results.append(TrialResult(trial, max(figures), model.epochs, time.monotonic() - started))
    best = best_of([result.figure for result in results])
    started = time.monotonic()
    model = fit(timeline.cut_us, trials[best], None, results[best].epochs)
    return Tuned(model, tuple(results), results[best], time.monotonic() - started)


def best_of(figures: Sequence[float]) -> int:
    """Position of the largest figure, the first of equals; one that is undefined counts as 0."""
    return int(np.argmax(np.nan_to_num(figures)))


def fit_passes(
    network: nn.Module,
    one_pass: Callable[[], float],
    epochs: int,
    patience: int,
    told: str,
    stop: Callable[[int], float] | None = None,
    note: Callable[[str], None] | None = None,
) -> tuple[int, float | None]:
    """Trains in passes and leaves the weights of the best one; returns its number, from 1, and its figure.

    `one_pass` trains once over everything and returns its mean loss. Without `stop` there are `epochs` passes, the last
    of which is the best. With it, `stop` gives a figure after each, higher is better, and training ends early after
    `patience` passes without a better one. `note` hears one line a pass, which begins with `told`.
    Raises ValueError when no pass gave a figure that is a number.
    """
    best, best_epoch, best_weights = -np.inf, 0, {}
    for epoch in range(1, epochs + 1):
        line = f"{told}, epoch {epoch}: loss {one_pass():.4g}"
        figure = float(epoch)  # without a measurement the latest weights are the best ones
        if stop is not None:
            figure = stop(epoch)
            line += f", figure {figure:.4f}"
        if note is not None:
            note(line)
        if figure > best:
            best, best_epoch = figure, epoch
            best_weights = {name: value.clone() for name, value in network.state_dict().items()}
        if epoch - best_epoch >= patience:
            break
    if not best_weights:
        raise ValueError(f"{told}: none of {epochs} epochs gave a figure to choose it by; `stop` must return numbers")
    network.load_state_dict(best_weights)
    return best_epoch, None if stop is None else best
