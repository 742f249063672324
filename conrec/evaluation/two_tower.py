"""A two-tower head on a policy's own trunk: what a team would serve in the place of beams.

    tuned = tune_two_tower(earlier, served, settings.timeline, TWO_TOWER_TRIALS, settings.seed)
    leaves, log_probs = tuned.model.generate(states, width=100)     # states = served.states(events, anchors)
    log_odds = tuned.model.judge(states, rows, leaves)

A prompt is read once, to one state, and met by one vector for every semantic ID: an index of inner products answers.

    next(ID)    = <h, trunk's output row of the first code> + <N h, v> + b          softmax over all IDs
    verdict(ID) =                                             <V h, v> + c          log-odds of rejected against liked
    v           = W (sum of the ID's code vectors)

Code vectors begin as the trunk's embeddings, b as the log share that an ID has of the rejections of its first code, c
as the log-odds of its answers: so the head begins where the trunk says the first code, and counts the rest. The trunk
stays as the policy has it: what is trained is the head alone, on the outcomes of training anchors.

Invariant: a head is fitted on anchors whose windows end at or before the cut, and on a trunk that read nothing later.
Trials are chosen on the validation anchors (`conrec.evaluation.tuning`), over the trunk that was trained without them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from conrec.errors import DataError
from conrec.evaluation.policies import blocks_of_prompts
from conrec.evaluation.rows import LIST
from conrec.evaluation.tuning import Question, Trial, Tuned, fit_passes, tune, tuning_anchors
from conrec.feedback.anchors import Anchors, training_anchors
from conrec.feedback.events import REJECTED, SHOWN, Events
from conrec.feedback.outcomes import first_meetings
from conrec.policy.decoding import length_batches
from conrec.policy.head import decoder_and_head
from conrec.policy.prompts import build_prompts
from conrec.ragged import Ragged

if TYPE_CHECKING:
    from conrec.blocklist.engines import TorchEngine
    from conrec.catalogue.items import Catalogue
    from conrec.config import Config, TimelineSettings

TWO_TOWER_TRIALS = tuple(Trial(hidden, rate) for hidden in (32, 128) for rate in (1e-3, 3e-3))
"""As many as the sequential models have."""
EPOCHS, PATIENCE = 30, 3
"""Passes over the training anchors at most; a measured fit ends after so many passes without a better figure."""

PRIOR = 1.0
"""Rejections, and likes, added to every ID before anything is counted."""

_BATCH = 256


@dataclass(frozen=True)
class Trunk:
    """A policy to be read, with its catalogue, the events by that catalogue's items, and its settings."""

    engine: TorchEngine
    catalogue: Catalogue
    events: Events
    config: Config

    @torch.inference_mode()
    def states(self, events: Events, anchors: Anchors) -> np.ndarray:
        """What the trunk makes of each prompt, behind its last event; anchors are places in these events.

        Shape: (A, H) float32.
        """
        vocabulary, blocks = self.engine.vocabulary, blocks_of_prompts(self.config)
        semantic_ids, settings = self.catalogue.semantic_ids, self.config.prompt
        prompts = build_prompts(events, anchors, semantic_ids, vocabulary, settings, blocks)
        decoder, device = decoder_and_head(self.engine.model)[0], self.engine.trie.device
        found = np.zeros((len(prompts), self.engine.model.config.hidden_size), np.float32)
        for rows in length_batches(prompts.lengths, 0, self.engine.trie.batch_tokens):
            batch = prompts.take(rows)
            tokens = torch.as_tensor(batch.padded(0), dtype=torch.int64, device=device)
            # Padding stands at the end, where no state before it looks.
            hidden = decoder(input_ids=tokens, use_cache=False).last_hidden_state
            last = torch.as_tensor(batch.lengths - 1, dtype=torch.int64, device=device)
            found[rows] = hidden[torch.arange(len(rows), device=device), last].float().cpu().numpy()
        return found

    def samples(self, until_us: int, timeline: TimelineSettings) -> Samples:
        """What training anchors rejected and liked until a moment. Raises `DataError` where there is no rejection."""
        past, anchors = self.events.before(until_us), self.samples_anchors(until_us, timeline)
        outcomes = first_meetings(past, anchors)
        leaves = self.catalogue.trie.item_leaves[outcomes.items].astype(np.int64)
        kept = (outcomes.kinds != SHOWN) & (leaves >= 0)
        rejected = outcomes.kinds[kept] == REJECTED
        if not rejected.any():
            raise DataError(
                "a two-tower head has nothing to learn from: nobody rejected anything new until "
                f"{_moment(until_us):%Y-%m-%d %H:%M}; check timeline.cut"
            )
        answers = Ragged.from_rows(outcomes.anchors[kept], leaves[kept], len(anchors))
        return Samples(self.states(past, anchors), answers, rejected)

    def samples_anchors(self, until_us: int, timeline: TimelineSettings) -> Anchors:
        """The anchors of `samples`, in its order: their windows end at that moment at the latest."""
        return training_anchors(self.events.before(until_us), timeline.model_copy(update={"cut": _moment(until_us)}))

    @property
    def code_vectors(self) -> tuple[Tensor, Tensor]:
        """The trunk's embeddings of the codes (L, C, H), and its output rows of the first codes (C, H)."""
        vocabulary = self.engine.vocabulary
        first, codes = vocabulary.first_code_token, vocabulary.codes
        embedded = self.engine.model.get_input_embeddings().weight.detach().float().cpu()
        said = self.engine.model.get_output_embeddings().weight.detach().float().cpu()
        embedded = embedded[first : first + vocabulary.levels * codes]
        return embedded.unflatten(0, (vocabulary.levels, codes)).clone(), said[first : first + codes].clone()


@dataclass(frozen=True)
class Samples:
    """Shape: states (A, H) float32; leaves A rows of N leaves that came in the windows; rejected (N,), else liked."""

    states: np.ndarray
    leaves: Ragged
    rejected: np.ndarray


class Heads(nn.Module):
    """What is trained: both projections of a state, the vectors of semantic IDs, and what is added for each."""

    first: Tensor
    semantic_ids: Tensor

    def __init__(self, trunk: Trunk, samples: Samples, hidden: int) -> None:
        super().__init__()
        codes, first = trunk.code_vectors
        semantic_ids = trunk.catalogue.trie.semantic_ids
        self.codes = nn.Parameter(codes)
        self.item, self.next, self.verdict = (nn.Linear(codes.shape[2], hidden) for _ in range(3))
        shares, odds = _counted(samples, semantic_ids)
        self.shares, self.odds = nn.Parameter(torch.from_numpy(shares)), nn.Parameter(torch.from_numpy(odds))
        self.register_buffer("first", first, persistent=False)
        self.register_buffer("semantic_ids", torch.from_numpy(semantic_ids.astype(np.int64)), persistent=False)

    def items(self) -> Tensor:
        """Vectors (M, hidden) of all semantic IDs."""
        return self.item(self.codes[torch.arange(len(self.codes)), self.semantic_ids].sum(dim=1))

    def follows(self, states: Tensor, items: Tensor) -> Tensor:
        """Log-probability of every ID as the next rejection. Shape: (B, H), (M, hidden) -> (B, M)."""
        said = (states @ self.first.T)[:, self.semantic_ids[:, 0]]
        return functional.log_softmax(said + self.next(states) @ items.T + self.shares, dim=1)

    def judged(self, states: Tensor, items: Tensor, rows: Tensor, leaves: Tensor) -> Tensor:
        """Log-odds of given IDs. Shape: rows of states and leaves (N,) -> (N,)."""
        return (self.verdict(states)[rows] * items[leaves]).sum(dim=1) + self.odds[leaves]


def _counted(samples: Samples, semantic_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the head begins with: log share of each ID in its first code's rejections, log-odds of its answers. (M,)."""
    first = semantic_ids[:, 0]
    rejected, liked = (
        np.bincount(samples.leaves.values[kind], minlength=len(first)) + PRIOR
        for kind in (samples.rejected, ~samples.rejected)
    )
    shares = np.log(rejected / np.bincount(first, rejected)[first])
    return shares.astype(np.float32), np.log(rejected / liked).astype(np.float32)


@dataclass(frozen=True)
class TwoTower:
    """A fitted head; `epochs` passes made it."""

    heads: Heads
    epochs: int

    @property
    def parameters(self) -> int:
        """Trained weights, without the trunk's."""
        return sum(weight.numel() for weight in self.heads.parameters())

    def scores(self, states: np.ndarray) -> np.ndarray:
        """Log-probability of every semantic ID as the next rejection. Shape: (B, H) -> (B, M) float32."""
        with torch.inference_mode():
            return self.heads.follows(torch.from_numpy(states), self._items).numpy()

    def generate(self, states: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        """The most probable leaves, best first, and their log-probabilities.

        Shape: (B, H) -> (B, width) int64 and float32; -1 and -inf where there are fewer leaves.
        """
        leaves = np.full((len(states), width), -1, np.int64)
        log_probs = np.full((len(states), width), -np.inf, np.float32)
        for start in range(0, len(states), _BATCH):
            scores = torch.from_numpy(self.scores(states[start : start + _BATCH]))
            best = scores.topk(min(width, scores.shape[1]))
            place = slice(start, start + len(scores))
            leaves[place, : best.indices.shape[1]] = best.indices.numpy()
            log_probs[place, : best.values.shape[1]] = best.values.numpy()
        return leaves, log_probs

    def of_leaves(self, states: np.ndarray, leaves: np.ndarray) -> np.ndarray:
        """Log-probability of given leaves (B, C), -inf where the leaf is -1. Shape: (B, C) float32."""
        found = np.full(leaves.shape, -np.inf, np.float32)
        for start in range(0, len(states), _BATCH):
            place = slice(start, start + _BATCH)
            found[place] = np.take_along_axis(self.scores(states[place]), np.maximum(leaves[place], 0), axis=1)
        return np.where(leaves >= 0, found, -np.inf)

    def judge(self, states: np.ndarray, rows: np.ndarray, leaves: np.ndarray) -> np.ndarray:
        """Log-odds that a shown leaf is rejected and not liked.

        Shape: states (B, H); rows (N,) of them, leaves (N,) -> (N,) float32.
        """
        with torch.inference_mode():
            given = (torch.from_numpy(values) for values in (rows, leaves))
            return self.heads.judged(torch.from_numpy(states), self._items, *given).numpy()

    @cached_property
    def _items(self) -> Tensor:
        return self.heads.items()


def fit_two_tower(
    trunk: Trunk,
    samples: Samples,
    trial: Trial,
    seed: int,
    stop: Callable[[TwoTower], float] | None = None,
    epochs: int = EPOCHS,
    note: Callable[[str], None] | None = None,
) -> TwoTower:
    """Trains a head. `epochs`, `stop` and `note` as in `fit_passes`, with a patience of `PATIENCE`.

    Random numbers come from the seed alone, and torch's own state is left as it was.
    """
    random = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = Heads(trunk, samples, trial.hidden)
        optimiser = torch.optim.Adam(heads.parameters(), lr=trial.learning_rate)
        epoch, _ = fit_passes(
            heads,
            lambda: _epoch(heads, samples, optimiser, random),
            epochs,
            PATIENCE,
            f"two-tower head, {trial.hidden} wide, rate {trial.learning_rate:g}",
            None if stop is None else lambda epoch: stop(TwoTower(heads, epoch)),
            note,
        )
    return TwoTower(heads, epoch)


def tune_two_tower(
    earlier: Trunk,
    served: Trunk,
    timeline: TimelineSettings,
    trials: Sequence[Trial],
    seed: int,
    note: Callable[[str], None] | None = None,
) -> Tuned[TwoTower]:
    """Chooses a trial on the validation anchors over the earlier trunk, then fits it until the cut over the served one.

    Raises `DataError` when no user can be measured there, ValueError without trials.
    """
    until_cut = earlier.events.before(timeline.cut_us)
    asked = earlier.states(until_cut, tuning_anchors(until_cut, timeline))
    known = earlier.samples(timeline.validation_us, timeline)

    def fit(until_us: int, trial: Trial, stop: Callable[[TwoTower], float] | None, passes: int | None) -> TwoTower:
        if until_us == timeline.validation_us:
            return fit_two_tower(earlier, known, trial, seed, stop, passes or EPOCHS, note)
        return fit_two_tower(served, served.samples(until_us, timeline), trial, seed, stop, passes or EPOCHS, note)

    def ranked(model: TwoTower, question: Question) -> np.ndarray:
        return question.of_ids(*model.generate(asked, LIST), earlier.catalogue.trie)

    return tune("two-tower head", trials, fit, ranked, earlier.events, timeline)


def _epoch(heads: Heads, samples: Samples, optimiser: torch.optim.Optimizer, random: np.random.Generator) -> float:
    """One pass over all anchors in random order; returns the mean loss of its steps."""
    losses = []
    rejected = Ragged(samples.rejected, samples.leaves.offsets)
    for rows in np.array_split(random.permutation(len(samples.states)), max(len(samples.states) // _BATCH, 1)):
        answers, kinds = samples.leaves.take(rows), torch.from_numpy(rejected.take(rows).values)
        if not len(kinds):
            continue
        states, items = torch.from_numpy(samples.states[rows]), heads.items()
        row, leaf = torch.from_numpy(answers.rows), torch.from_numpy(answers.values)
        verdicts = heads.judged(states, items, row, leaf)
        loss = functional.binary_cross_entropy_with_logits(verdicts, kinds.float())
        if kinds.any():
            loss = loss - heads.follows(states, items)[row, leaf][kinds].mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return float(np.mean(losses))


def _moment(time_us: int) -> datetime:
    return datetime.fromtimestamp(time_us / 1e6, UTC)
