"""Published sequential models on item ids, small and in plain torch: systems to beat.

    tuned = tune("SASRec on negatives", events, settings.timeline, item_count, TRIALS, settings.seed)
    ranked = Floor(tuned.kind, tuned.scores).rank(histories, histories.distinct(), k=20)

Invariant: a model is fitted on events at or before the cut, which it cuts off itself; a prediction reads the fitted
weights and the user's own history, nothing else. Every kind gets the same trials, chosen by FHR@20 on all users'
anchors at the validation time, whose windows end at the cut; nothing after the cut takes part in any choice.

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

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from conrec.errors import DataError
from conrec.evaluation.baselines import EVERYTHING, Floor, Histories, Scores
from conrec.evaluation.metrics import SERVED_K, members
from conrec.feedback.anchors import Anchors, validation_anchors
from conrec.feedback.events import LIKED, REJECTED, Events
from conrec.feedback.targets import targets
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
LAYERS, HEADS, DROPOUT = 2, 2, 0.2
MAX_LENGTH = 50
"""So many of a user's latest events are read."""
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


@dataclass(frozen=True)
class Trial:
    """What is tuned: the width of the model and the learning rate of Adam."""

    hidden: int
    learning_rate: float


TRIALS = tuple(Trial(hidden, rate) for hidden in (32, 64) for rate in (1e-3, 3e-3))
"""The budget of every kind."""


@dataclass(frozen=True)
class TrialResult:
    """FHR@20 on the validation anchors after the best number of epochs, and what the trial cost."""

    trial: Trial
    figure: float
    epochs: int
    seconds: float


@dataclass(frozen=True)
class _Recipe:
    """How a kind is trained and ranked: the kinds of event that each encoder reads, the kinds whose items get more
    and less probability; `sign` -1 ranks by the lowest probability. The first encoder is the one that ranks."""

    streams: tuple[tuple[int, ...], ...]
    pulled: tuple[int, ...]
    pushed: tuple[int, ...] = ()
    sign: int = 1


_RECIPES = dict(
    zip(
        KINDS,
        (
            _Recipe(((REJECTED,),), pulled=(REJECTED,)),
            _Recipe((EVERYTHING,), pulled=(LIKED,), pushed=(REJECTED,), sign=-1),
            _Recipe((EVERYTHING,), pulled=(REJECTED,), pushed=(LIKED,)),
            _Recipe(((REJECTED,), (LIKED,)), pulled=(REJECTED, LIKED)),
        ),
        strict=True,
    )
)


@dataclass(frozen=True)
class _Sequences:
    """Sequences of known items, oldest first, by their codes; `kinds` int8 beside items.values."""

    items: Ragged
    kinds: np.ndarray

    @property
    def typed(self) -> Ragged:
        """The kinds in the same rows."""
        return Ragged(self.kinds, self.items.offsets)

    def without_last(self) -> _Sequences:
        """The sequences without the last item of each."""
        kept = np.ones(len(self.kinds), bool)
        kept[self.items.offsets[1:][self.items.lengths > 0] - 1] = False
        lengths = np.maximum(self.items.lengths - 1, 0)
        return _Sequences(Ragged.from_lengths(self.items.values[kept], lengths), self.kinds[kept])

    def take(self, rows: np.ndarray) -> _Sequences:
        """The sequences at the given positions, in that order."""
        return _Sequences(self.items.take(rows), self.typed.take(rows).values)


class _Block(nn.Module):
    """Causal self-attention, then a feed-forward layer as wide as the model, each normalised first and added."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.attention_norm, self.forward_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.attention, self.mix = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.widen, self.narrow = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, states: Tensor) -> Tensor:
        """New states (B, T, d) from states (B, T, d)."""
        rows, length, hidden = states.shape
        parts = self.attention(self.attention_norm(states)).view(rows, length, 3, HEADS, hidden // HEADS)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        states = states + self.dropout(self.mix(seen.transpose(1, 2).reshape(rows, length, hidden)))
        return states + self.dropout(self.narrow(functional.relu(self.widen(self.forward_norm(states)))))


class _Encoder(nn.Module):
    """A causal transformer over embedded items; its first position is the start of the sequence, before any item."""

    def __init__(self, hidden: int, typed: bool) -> None:
        super().__init__()
        self.positions = nn.Embedding(MAX_LENGTH + 1, hidden)
        self.kinds = nn.Embedding(len(EVERYTHING) + 1, hidden) if typed else None
        self.dropout = nn.Dropout(DROPOUT)
        self.blocks = nn.Sequential(*(_Block(hidden) for _ in range(LAYERS)), nn.LayerNorm(hidden))

    def forward(self, embedded: Tensor, kinds: Tensor) -> Tensor:
        """States (B, T, d) of items (B, T, d) and their kinds (B, T); padding stands at the end, where no state
        before it looks."""
        inputs = embedded * embedded.shape[2] ** 0.5 + self.positions.weight[: embedded.shape[1]]
        if self.kinds is not None:
            inputs = inputs + self.kinds(kinds)
        return self.blocks(self.dropout(inputs))


class _Network(nn.Module):
    """Encoders over shared embeddings of the known items, which are also what states are compared with."""

    def __init__(self, recipe: _Recipe, known_items: int, hidden: int) -> None:
        super().__init__()
        self.items = nn.Embedding(known_items + 1, hidden)
        self.bias = nn.Parameter(torch.zeros(known_items))
        self.encoders = nn.ModuleList(_Encoder(hidden, len(stream) > 1) for stream in recipe.streams)
        self.apply(_initialise)

    @property
    def start(self) -> int:
        """The embedding that stands before the first item; its kind is the one behind all kinds."""
        return self.items.num_embeddings - 1

    def states(self, encoder: int, sequences: _Sequences) -> Tensor:
        """States (B, T + 1, d) of sequences up to T long: before the first item, then after each one."""
        edge = ((0, 0), (1, 0))
        items = np.pad(sequences.items.padded(0), edge, constant_values=self.start)
        kinds = np.pad(sequences.typed.padded(0), edge, constant_values=len(EVERYTHING))
        return self.encoders[encoder](self.items(torch.from_numpy(items).long()), torch.from_numpy(kinds).long())

    def logits(self, states: Tensor) -> Tensor:
        """Scores (N, known items) of states (N, d)."""
        return functional.linear(states, self.items.weight[:-1], self.bias)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


@dataclass(frozen=True)
class FittedModel:
    """A trained model: what it knows and how it ranks.

    Shape: codes (I,) int32, the model's number of each item, -1 for items it does not know. `epochs` is the number of
    passes that made its weights, `figure` what `stop` said about them, None if nothing was measured.
    """

    kind: str
    network: _Network
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


@dataclass(frozen=True)
class TunedSystem:
    """A kind with the trial that was chosen for it, trained until the cut.

    `trials` are in the order in which they were tried; `training_seconds` is the last fit alone.
    """

    kind: str
    trials: tuple[TrialResult, ...]
    chosen: TrialResult
    model: FittedModel
    training_seconds: float

    @property
    def scores(self) -> Scores:
        """Scores of all items for each history."""
        return self.model.scores

    @property
    def parameters(self) -> int:
        """Number of trained weights."""
        return self.model.parameters


def fit_sequential(
    kind: str,
    events: Events,
    cut_us: int,
    item_count: int,
    trial: Trial,
    seed: int,
    stop: Callable[[Scores], float] | None = None,
    epochs: int = EPOCHS,
    note: Callable[[str], None] | None = None,
) -> FittedModel:
    """Trains one model on the events at or before the cut.

    Without `stop` it takes `epochs` passes. With it, `stop` gives a figure after every pass, higher is better; the
    weights of the best pass stay, and training ends early after `PATIENCE` passes without a better one. Random numbers
    come from the seed alone, and torch's own state is left as it was. `note` hears one line a pass.
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
    best, best_epoch, best_weights = -np.inf, 0, {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _Network(recipe, len(known), trial.hidden)
        optimiser = torch.optim.Adam(network.parameters(), lr=trial.learning_rate)
        for epoch in range(1, epochs + 1):
            total = _epoch(network, recipe, streams, optimiser, random)
            line = f"{kind}, {trial.hidden} wide, rate {trial.learning_rate:g}, epoch {epoch}: loss {total:.4g}"
            figure = float(epoch)  # without a measurement the latest weights are the best ones
            if stop is not None:
                figure = stop(FittedModel(kind, network, codes, epoch).scores)
                line += f", figure {figure:.4f}"
            if note is not None:
                note(line)
            if figure > best:
                best, best_epoch = figure, epoch
                best_weights = {name: value.clone() for name, value in network.state_dict().items()}
            if epoch - best_epoch >= PATIENCE:
                break
    if not best_weights:
        raise ValueError(f"{kind}: none of {epochs} epochs gave a figure to choose it by; `stop` must return numbers")
    network.load_state_dict(best_weights)
    return FittedModel(kind, network, codes, best_epoch, None if stop is None else best)


def tune(
    kind: str,
    events: Events,
    timeline: TimelineSettings,
    item_count: int,
    trials: Sequence[Trial],
    seed: int,
    note: Callable[[str], None] | None = None,
) -> TunedSystem:
    """Chooses a trial on the validation anchors, then trains it on everything until the cut for its best epoch count.

    Trials are trained on events until the validation time; of equal figures the first trial stands.
    Raises `DataError` when no user can be measured there, ValueError without trials.
    """
    if not trials:
        raise ValueError(f"{kind}: no trials to choose from; give at least one")
    known = events.before(timeline.cut_us)
    anchors = tuning_anchors(known, timeline)
    histories, future = Histories.at(known, anchors), targets(known, anchors).future_negatives
    excluded = histories.distinct()

    def hit_rate(scores: Scores) -> float:
        return float(members(future, Floor(kind, scores).rank(histories, excluded, SERVED_K)).any(axis=1).mean())

    results = []
    for trial in trials:
        started = time.monotonic()
        model = fit_sequential(kind, known, timeline.validation_us, item_count, trial, seed, hit_rate, note=note)
        results.append(TrialResult(trial, float(model.figure or 0), model.epochs, time.monotonic() - started))
    chosen = max(results, key=lambda result: result.figure)
    started = time.monotonic()
    model = fit_sequential(
        kind, known, timeline.cut_us, item_count, chosen.trial, seed, epochs=chosen.epochs, note=note
    )
    return TunedSystem(kind, tuple(results), chosen, model, time.monotonic() - started)


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


def _epoch(
    network: _Network,
    recipe: _Recipe,
    streams: list[_Sequences],
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


def _loss(network: _Network, recipe: _Recipe, streams: list[_Sequences]) -> Tensor:
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


def _predicting(network: _Network, encoder: int, sequences: _Sequences) -> tuple[Tensor, np.ndarray]:
    """States (S, d), and for each event of the sequences (N,) the row of the state from which it is predicted.

    The first events take turns in the first `_STARTS` states, all of the empty sequence.
    """
    lengths = sequences.items.lengths
    # Nothing is predicted from the last event of a sequence.
    inputs = sequences.without_last()
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] > 1]
    empty = _Sequences(Ragged(np.zeros(0, np.int32), np.zeros(_STARTS + 1, np.int64)), np.zeros(0, np.int8))
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


def _pieces(past: Events, streams: tuple[tuple[int, ...], ...], codes: np.ndarray) -> list[_Sequences]:
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
        _Sequences(
            Ragged.from_rows(np.searchsorted(present, key), codes[past.items[mask]], len(present)), past.kinds[mask]
        )
        for mask, key in zip(masks, keys, strict=True)
    ]


def _latest(histories: Histories, kinds: tuple[int, ...], codes: np.ndarray) -> _Sequences:
    """The last `MAX_LENGTH` known items of these kinds in each history."""
    chosen = np.isin(histories.kinds, kinds) & (codes[histories.items.values] >= 0)
    items = Ragged.from_rows(histories.items.rows[chosen], codes[histories.items.values[chosen]], len(histories))
    lengths = np.minimum(items.lengths, MAX_LENGTH)
    positions = ranges(items.offsets[1:] - lengths, lengths)
    return _Sequences(Ragged.from_lengths(items.values[positions], lengths), histories.kinds[chosen][positions])
