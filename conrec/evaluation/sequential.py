"""Published sequential models on item ids, small and in plain torch: systems to beat.

    tuned = tune_sequential("SASRec on negatives", events, settings.timeline, item_count, TRIALS, settings.seed)
    scores = tuned.model.scores(histories)      # (A, I)

Invariant: a model is fitted on events at or before the cut, which it cuts off itself; a prediction reads the fitted
weights and the user's own history, nothing else. Every kind gets the same trials (`conrec.evaluation.tuning`).

| kind | reads | trained to | ranked by |
|---|---|---|---|
| SASRec on negatives | rejections | predict the next rejection | p |
| SASRec, not-to-recommend loss | all events with their kinds | predict likes, push rejections away | lowest p |
| SASRec, not-to-recommend loss, roles swapped | all events with their kinds | predict rejections, push likes away | p |
| opposing sequences | rejections; a second encoder likes | predict both, contrast them | p of a rejection |

SASRec (arXiv 1808.09781) is a causal transformer that predicts the next item at every position; here with a softmax
over all items. The not-to-recommend loss (arXiv 2308.12256) is
-sum_likes log p(y | s) - sum_rejections w log(1 - p(y | s)), here with w = 1. Swapping the roles is the stronger
reading of the same idea where rejections are what is asked for.
Opposing sequences (arXiv 2508.14786) are two encoders with shared item embeddings, one on likes, one on rejections:
L = CE_likes + alpha CE_rejections + beta contrast. The contrast at a position with state s and next item y is
-log(exp(s e_y) / (exp(s e_y) + sum_j exp(s e_j))), j being the user's items of the other sequence. Published for the
likes only, because they are what is recommended there; here for both sequences, because rejections are ranked.

A model knows the items that anybody met before its cut: all others have probability 0, score -inf, and are passed over
in histories.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from conrec.errors import DataError
from conrec.evaluation import tuning
from conrec.evaluation.baselines import EVERYTHING, Histories, best_items
from conrec.evaluation.sequence_network import MAX_LENGTH, Network, Recipe, Sequences
from conrec.evaluation.tuning import Question, Trial, Tuned, fit_passes, tune
from conrec.feedback.events import LIKED, REJECTED, Events
from conrec.ragged import Ragged, pairs, places, ranges

if TYPE_CHECKING:
    from conrec.config import TimelineSettings

KINDS = (
    "SASRec on negatives",
    "SASRec, not-to-recommend loss",
    "SASRec, not-to-recommend loss, roles swapped",
    "opposing sequences",
)
"""The systems, by the names of their rows."""
EPOCHS = 30
"""Passes over the training events at most."""
PATIENCE = 3
"""A fit that is measured ends after so many passes without a better figure."""
ALPHA, BETA = 1.0, 0.25
"""Opposing sequences: weight of the rejections' cross-entropy, and of the contrast."""

_BATCH_EVENTS = 512
_BLOCK = 1024
# Sequences of a batch are encoded in so many groups of similar length and about as many events each: most sequences are
# far shorter than the longest.
_GROUPS = 4
# The first events of all sequences of a batch are predicted from so many states of the empty sequence, which differ by
# dropout only: a state for each of them would cost a softmax over all items.
_STARTS = 8


TRIALS = tuple(Trial(hidden, rate) for hidden in (32, 64) for rate in (1e-3, 3e-3))
"""The budget of every kind."""


_RECIPES = dict(
    zip(
        KINDS,
        (
            Recipe(((REJECTED,),), pulled=(REJECTED,)),
            Recipe((EVERYTHING,), pulled=(LIKED,), pushed=(REJECTED,), sign=-1),
            Recipe((EVERYTHING,), pulled=(REJECTED,), pushed=(LIKED,)),
            Recipe(((REJECTED,), (LIKED,)), pulled=(REJECTED, LIKED)),
        ),
        strict=True,
    )
)


@dataclass(frozen=True)
class FittedModel:
    """A trained model: what it knows and how it ranks.

    Shape: codes (I,) int32, the model's number of each item, -1 for items it does not know. `epochs` is the number of
    passes that made its weights, `figure` what `stop` said about them, None if nothing was measured.
    """

    kind: str
    network: Network
    codes: np.ndarray
    epochs: int
    figure: float | None = None

    @property
    def parameters(self) -> int:
        """Number of trained weights."""
        return sum(weight.numel() for weight in self.network.parameters())

    def scores(self, histories: Histories) -> np.ndarray:
        """Log-probability of each item as the next rejection, (B, I) float32, -inf for unknown items.

        For the model that predicts likes and is ranked by the lowest probability: minus its log-probability.
        """
        recipe = _RECIPES[self.kind]
        known = np.flatnonzero(self.codes >= 0)
        result = np.full((len(histories), len(self.codes)), -np.inf, np.float32)
        self.network.eval()
        with torch.inference_mode():
            for start in range(0, len(histories), _BLOCK):
                block = histories.block(start, min(start + _BLOCK, len(histories)))
                sequences = _latest(block, recipe.streams[0], self.codes)
                states = self.network.states(0, sequences)
                last = states[torch.arange(len(block)), torch.from_numpy(sequences.items.lengths)]
                log_probs = functional.log_softmax(self.network.logits(last), dim=1)
                result[start : start + len(block), known] = recipe.sign * log_probs.numpy()
        return result


def fit_sequential(
    kind: str,
    events: Events,
    cut_us: int,
    item_count: int,
    trial: Trial,
    seed: int,
    stop: Callable[[FittedModel], float] | None = None,
    epochs: int = EPOCHS,
    note: Callable[[str], None] | None = None,
) -> FittedModel:
    """Trains one model on the events at or before the cut.

    `epochs`, `stop` and `note` as in `fit_passes`, with a patience of `PATIENCE`. Random numbers come from the seed
    alone, and torch's own state is left as it was.
    Raises ValueError for an unknown kind or figures that are no numbers, `DataError` when no event before the cut has a
    kind that the model predicts.
    """
    if kind not in _RECIPES:
        raise ValueError(f"{kind!r} is none of {', '.join(KINDS)}")
    recipe = _RECIPES[kind]
    past = events.before(cut_us)
    if not np.isin(past.kinds, recipe.pulled).any():
        raise DataError(f"{kind}: nothing to learn from: no event until the cut is of a kind that it predicts")
    known = np.unique(past.items)
    codes = np.full(item_count, -1, np.int32)
    codes[known] = np.arange(len(known), dtype=np.int32)
    streams = _pieces(past, recipe.streams, codes)
    random = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Network(recipe, len(known), trial.hidden)
        optimiser = torch.optim.Adam(network.parameters(), lr=trial.learning_rate)
        passed = fit_passes(
            network,
            lambda: _epoch(network, recipe, streams, optimiser, random),
            epochs,
            PATIENCE,
            f"{kind}, {trial.hidden} wide, rate {trial.learning_rate:g}",
            None if stop is None else lambda epoch: stop(FittedModel(kind, network, codes, epoch)),
            note,
        )
    return FittedModel(kind, network, codes, *passed)


def tune_sequential(
    kind: str,
    events: Events,
    timeline: TimelineSettings,
    item_count: int,
    trials: Sequence[Trial],
    seed: int,
    note: Callable[[str], None] | None = None,
) -> Tuned[FittedModel]:
    """Chooses a trial on the validation anchors, then trains it on everything until the cut for its best epoch count.

    Raises `DataError` when no user can be measured there, ValueError without trials.
    """

    def fit(
        until_us: int, trial: Trial, stop: Callable[[FittedModel], float] | None, epochs: int | None
    ) -> FittedModel:
        return fit_sequential(kind, events, until_us, item_count, trial, seed, stop, epochs or EPOCHS, note)

    def ranked(model: FittedModel, question: Question) -> np.ndarray:
        return best_items(model.scores, question.histories, question.excluded, tuning.TOP)[0]

    return tune(kind, trials, fit, ranked, events, timeline)


def _epoch(
    network: Network,
    recipe: Recipe,
    streams: list[Sequences],
    optimiser: torch.optim.Optimizer,
    random: np.random.Generator,
) -> float:
    """One pass over all sequences in random order; returns the mean loss of its steps."""
    network.train()
    losses = []
    for rows in _batches(np.sum([stream.items.lengths for stream in streams], axis=0), random):
        loss = _loss(network, recipe, [stream.take(rows) for stream in streams])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return float(np.mean(losses))


def _batches(lengths: np.ndarray, random: np.random.Generator) -> Iterator[np.ndarray]:
    """Rows in random order, cut where another `_BATCH_EVENTS` events are full."""
    order = random.permutation(len(lengths))
    full = np.cumsum(lengths[order]) // _BATCH_EVENTS
    yield from np.split(order, np.flatnonzero(np.diff(full)) + 1)


def _loss(network: Network, recipe: Recipe, streams: list[Sequences]) -> Tensor:
    """The loss of a batch, a mean over the events that are predicted.

    Row b of every stream is the same user at the same stage; opposing sequences are contrasted within the row.
    """
    terms, count = [], 0
    for place, stream in enumerate(streams):
        kept = np.isin(stream.kinds, recipe.pulled + recipe.pushed)
        count += int(kept.sum())
        if not kept.any():
            continue
        states, source = _predicting(network, place, stream)
        used, source = np.unique(source[kept], return_inverse=True)
        logits = network.logits(states[torch.from_numpy(used)])
        log_probs = functional.log_softmax(logits, dim=1)
        rows, items = torch.from_numpy(source), torch.from_numpy(stream.items.values[kept]).long()
        pulled = torch.from_numpy(np.isin(stream.kinds[kept], recipe.pulled))
        weight = ALPHA if len(streams) > 1 and place == 0 else 1.0
        terms.append(weight * not_to_recommend(log_probs[rows, items], pulled))
        if len(streams) > 1:
            other = streams[1 - place].items.take(stream.items.rows[kept])
            terms.append(BETA * contrast(logits, rows, items, other))
    return torch.stack(terms).sum() / max(count, 1)


def not_to_recommend(log_probs: Tensor, pulled: Tensor) -> Tensor:
    """-log p summed over the items that are pulled, plus -log(1 - p) over the others; both (N,).

    The gradient of the second by the item's logit is p: it never exceeds 1.
    """
    # In float32 a probability just below 1 is 1, whose complement has no logarithm.
    pushed = log_probs[~pulled].clamp(max=-1e-6)
    return -log_probs[pulled].sum() - torch.log(-torch.expm1(pushed)).sum()


def contrast(logits: Tensor, rows: Tensor, items: Tensor, other: Ragged) -> Tensor:
    """-log(exp(s y) / (exp(s y) + sum of exp(s j))) summed over predictions, j being the other sequence's items.

    Shape: logits (S, M); prediction n has the state rows[n], the next item items[n] and the opposing items other[n],
    of which there may be none: then it adds nothing.
    """
    right = logits[rows, items]
    columns = torch.from_numpy(other.padded(-1)).long()
    opposing = logits[rows[:, None], columns.clamp(min=0)].masked_fill(columns < 0, -torch.inf)
    return (torch.logsumexp(torch.cat([right[:, None], opposing], dim=1), dim=1) - right).sum()


def _predicting(network: Network, encoder: int, sequences: Sequences) -> tuple[Tensor, np.ndarray]:
    """States (S, d), and for each event of the sequences (N,) the row of the state from which it is predicted.

    The first events take turns in the first `_STARTS` states, all of the empty sequence.
    """
    lengths = sequences.items.lengths
    # Nothing is predicted from the last event of a sequence.
    inputs = sequences.without_last()
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] > 1]
    empty = Sequences(Ragged(np.zeros(0, np.int32), np.zeros(_STARTS + 1, np.int64)), np.zeros(0, np.int8))
    states = [network.states(encoder, empty)[:, 0]]
    shares = np.cumsum(lengths[order]) * _GROUPS // max(lengths[order].sum(), 1)
    for group in np.split(order, np.flatnonzero(np.diff(shares)) + 1) if len(order) else ():
        encoded = network.states(encoder, inputs.take(group))
        column = np.arange(encoded.shape[1])
        states.append(encoded[torch.from_numpy((column > 0) & (column < lengths[group][:, None]))])
    # The state after the first item of each sequence; the state before its item at column c is c - 1 behind it.
    second = np.zeros(len(lengths), np.int64)
    second[order] = _STARTS + np.cumsum(lengths[order] - 1) - (lengths[order] - 1)
    rows = sequences.items.rows
    column = places(lengths)
    return torch.cat(states), np.where(column == 0, rows % _STARTS, second[rows] + column - 1)


def _pieces(past: Events, streams: tuple[tuple[int, ...], ...], codes: np.ndarray) -> list[Sequences]:
    """The users' events of each stream's kinds, in sequences as long as the model reads and one more to predict.

    Row r of every stream is the same user's same piece; it is empty where only another stream goes on so far.
    """
    masks = [np.isin(past.kinds, kinds) for kinds in streams]
    keys = []
    for mask in masks:
        users = past.rows[mask]
        counts = np.bincount(users, minlength=len(past.users))
        keys.append(pairs(users, places(counts) // (MAX_LENGTH + 1), len(past) + 1))
    present = np.unique(np.concatenate(keys))
    return [
        Sequences(
            Ragged.from_rows(np.searchsorted(present, key), codes[past.items[mask]], len(present)), past.kinds[mask]
        )
        for mask, key in zip(masks, keys, strict=True)
    ]


def _latest(histories: Histories, kinds: tuple[int, ...], codes: np.ndarray) -> Sequences:
    """The last `MAX_LENGTH` known items of these kinds in each history."""
    chosen = np.isin(histories.kinds, kinds) & (codes[histories.items.values] >= 0)
    items = Ragged.from_rows(histories.items.rows[chosen], codes[histories.items.values[chosen]], len(histories))
    lengths = np.minimum(items.lengths, MAX_LENGTH)
    positions = ranges(items.offsets[1:] - lengths, lengths)
    return Sequences(Ragged.from_lengths(items.values[positions], lengths), histories.kinds[chosen][positions])
