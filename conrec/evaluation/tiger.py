"""TIGER (arXiv 2305.05065): a small encoder-decoder from scratch over semantic IDs, a system to beat.

    tuned = tune_tiger(events, settings.timeline, semantic_ids, trie, TIGER_TRIALS, settings.seed)
    leaves, log_probs = tuned.model.generate(histories, width=100)

The encoder of a T5 reads the semantic IDs of what the user rejected, the decoder writes that of the next rejection.
With more kinds of event than rejections, a token for its kind stands before each item. Codes are generated as
everywhere here: only the children of the full prefix in the trie have probability, and training maximises exactly the
log-probability that ranks. Left out of the publication: its token per user, which new users do not have.

Invariant: a model is fitted on events at or before the cut, which it cuts off itself; a prediction reads the fitted
weights and the user's own history, nothing else. Trials are chosen as for the sequential models
(`conrec.evaluation.tuning`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from conrec.errors import DataError
from conrec.evaluation.baselines import Histories
from conrec.evaluation.rows import LIST
from conrec.evaluation.tuning import Question, Trial, Tuned, fit_passes, tune
from conrec.feedback.anchors import Anchors
from conrec.feedback.events import LIKED, REJECTED, SHOWN, Events
from conrec.policy.decoding import DeviceTrie, code_logits, length_batches, step_log_probs
from conrec.policy.vocabulary import Vocabulary
from conrec.ragged import Ragged

if TYPE_CHECKING:
    from conrec.catalogue.trie import Trie
    from conrec.config import TimelineSettings

TIGER_TRIALS = tuple(Trial(hidden, rate) for hidden in (64, 128) for rate in (1e-3, 3e-3))
"""As many as the sequential models have; 128 wide are about a million weights."""
LAYERS, HEADS, DROPOUT = 3, 4, 0.1
"""Blocks of the encoder, and as many of the decoder; feed-forward layers are twice as wide as the model."""
MAX_ITEMS = 20
"""So many of a user's latest events are read."""
EPOCHS, PATIENCE = 5, 2
"""Passes over the rejections at most; a fit that is measured ends after so many passes without a better figure."""
WARM_UP_STEPS = 50
"""The learning rate rises linearly over these."""

_PAD, _BEGIN, _REJECTED, _LIKED, _SHOWN, _FIRST_CODE = range(6)
_KIND_TOKENS = np.zeros(3, np.int32)
_KIND_TOKENS[[REJECTED, LIKED, SHOWN]] = _REJECTED, _LIKED, _SHOWN
_BATCH = 128
# Batches are of like length within so many shuffled batches' worth of samples.
_MIXED = 16
# Encoder positions held at a time, once per beam.
_POSITIONS = 1 << 15


@dataclass(frozen=True)
class Tiger:
    """A trained model: what it reads and how it ranks.

    Shape: item_tokens (I, L) int32, the code tokens of each item. `kinds` are the kinds of event that it reads,
    `epochs` the passes that made its weights.
    """

    network: Any
    trie: DeviceTrie
    item_tokens: np.ndarray
    kinds: tuple[int, ...]
    epochs: int

    @property
    def parameters(self) -> int:
        """Number of trained weights."""
        return sum(weight.numel() for weight in self.network.parameters())

    def generate(self, histories: Histories, width: int) -> tuple[np.ndarray, np.ndarray]:
        """The most probable leaves found with `width` beams, best first, and their log-probabilities.

        Shape: (B, width) int64 and float32; -1 and -inf where the trie has fewer leaves than beams. Exact when width
        is at least the number of leaves.
        """
        prompts = _prompts(histories, self.kinds, self.item_tokens)
        leaves = np.full((len(prompts), width), -1, np.int64)
        log_probs = np.full((len(prompts), width), -np.inf, np.float32)
        self.network.eval()
        with torch.inference_mode():
            for rows in length_batches(prompts.lengths * width, 0, _POSITIONS):
                found, scores = _beam_search(self.network, self.trie, prompts.take(rows), width)
                leaves[rows, : found.shape[1]] = found.cpu().numpy()
                log_probs[rows, : found.shape[1]] = scores.cpu().numpy()
        return leaves, log_probs

    def score(self, histories: Histories, leaves: np.ndarray) -> np.ndarray:
        """Log-probability of given leaves (B, C) of each history, (B, C) float32; -inf where the leaf is -1."""
        prompts = _prompts(histories, self.kinds, self.item_tokens)
        result = np.full(leaves.shape, -np.inf, np.float32)
        self.network.eval()
        with torch.inference_mode():
            for rows in length_batches(prompts.lengths * leaves.shape[1], 0, _POSITIONS):
                asked = torch.from_numpy(leaves[rows].astype(np.int64)).to(self.trie.device)
                result[rows] = _log_probs(self.network, self.trie, prompts.take(rows), asked).cpu().numpy()
        return np.where(leaves >= 0, result, -np.inf)


def fit_tiger(
    events: Events,
    cut_us: int,
    semantic_ids: np.ndarray,
    trie: Trie,
    trial: Trial,
    seed: int,
    stop: Callable[[Tiger], float] | None = None,
    kinds: tuple[int, ...] = (REJECTED,),
    epochs: int = EPOCHS,
    note: Callable[[str], None] | None = None,
) -> Tiger:
    """Trains one model on the events at or before the cut: each rejection from what the user did before it.

    Shape: semantic_ids (I, L) of all items, of which `trie` is made. `epochs`, `stop` and `note` as in `fit_passes`,
    with a patience of `PATIENCE`. Random numbers come from the seed alone, and torch's own state is left as it was.
    Raises ValueError when `kinds` lack rejections, `DataError` when nothing was rejected before the cut.
    """
    if REJECTED not in kinds:
        raise ValueError(f"kinds = {kinds} lack {REJECTED}, rejections, which are what is foretold; add it")
    past = events.before(cut_us)
    past = past.where(np.isin(past.kinds, kinds))
    rejections = np.flatnonzero(past.kinds == REJECTED)
    if not len(rejections):
        raise DataError("TIGER has nothing to learn from: nobody rejected anything until the cut; check timeline.cut")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vocabulary = _vocabulary(trie)
    device_trie, item_tokens = DeviceTrie(trie, vocabulary, device), vocabulary.code_tokens(semantic_ids)
    prompts = _prompts(_before(past, rejections), kinds, item_tokens)
    wanted = torch.from_numpy(trie.item_leaves[past.items[rejections]].astype(np.int64)).to(device)
    random = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        network = _network(trial.hidden, _FIRST_CODE + trie.levels * trie.codes).to(device)
        optimiser = torch.optim.Adam(network.parameters(), lr=trial.learning_rate)
        warm_up = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, (step + 1) / WARM_UP_STEPS))

        epoch, _ = fit_passes(
            network,
            lambda: _epoch(network, device_trie, prompts, wanted, optimiser, warm_up, random),
            epochs,
            PATIENCE,
            f"TIGER, {trial.hidden} wide, rate {trial.learning_rate:g}",
            None if stop is None else lambda epoch: stop(Tiger(network, device_trie, item_tokens, kinds, epoch)),
            note,
        )
    return Tiger(network, device_trie, item_tokens, kinds, epoch)


def tune_tiger(
    events: Events,
    timeline: TimelineSettings,
    semantic_ids: np.ndarray,
    trie: Trie,
    trials: Sequence[Trial],
    seed: int,
    kinds: tuple[int, ...] = (REJECTED,),
    epochs: int = EPOCHS,
    note: Callable[[str], None] | None = None,
) -> Tuned[Tiger]:
    """Chooses a trial on the validation anchors, `epochs` passes at most, then trains it on everything until the cut.

    Raises `DataError` when no user can be measured there, ValueError without trials.
    """

    def fit(until_us: int, trial: Trial, stop: Callable[[Tiger], float] | None, passes: int | None) -> Tiger:
        return fit_tiger(events, until_us, semantic_ids, trie, trial, seed, stop, kinds, passes or epochs, note)

    def ranked(tiger: Tiger, question: Question) -> np.ndarray:
        return question.of_ids(*tiger.generate(question.histories, LIST), trie)

    return tune("TIGER", trials, fit, ranked, events, timeline)


def _epoch(
    network: Any,
    trie: DeviceTrie,
    prompts: Ragged,
    wanted: Tensor,
    optimiser: torch.optim.Optimizer,
    warm_up: torch.optim.lr_scheduler.LRScheduler,
    random: np.random.Generator,
) -> float:
    """One pass over all rejections in random order; returns the mean loss. Shape: wanted (N,) leaves."""
    total = 0.0
    network.train()
    for rows in _batches(prompts.lengths, random):
        loss = -_log_probs(network, trie, prompts.take(rows), wanted[rows][:, None]).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        warm_up.step()
        total += loss.item() * len(rows)
    return total / len(prompts)


def _vocabulary(trie: Trie) -> Vocabulary:
    """The token ids of this model; marks of tasks that it does not have are the padding."""
    return Vocabulary(
        levels=trie.levels,
        codes=trie.codes,
        first_code_token=_FIRST_CODE,
        begin=_BEGIN,
        rejected=_REJECTED,
        liked=_LIKED,
        shown=_SHOWN,
        item=_PAD,
        text=_PAD,
        choose=_PAD,
        end=_PAD,
    )


def _network(hidden: int, tokens: int) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=tokens,
            d_model=hidden,
            d_kv=hidden // HEADS,
            d_ff=2 * hidden,
            num_layers=LAYERS,
            num_decoder_layers=LAYERS,
            num_heads=HEADS,
            dropout_rate=DROPOUT,
            pad_token_id=_PAD,
            decoder_start_token_id=_PAD,
            eos_token_id=None,
        )
    )


def _before(events: Events, positions: np.ndarray) -> Histories:
    """What the user of each event did before it, as far back as it is read."""
    users = events.rows[positions]
    starts = np.maximum(events.offsets[users], positions - MAX_ITEMS)
    return Histories.at(events, Anchors(users, events.times[positions], starts, positions, positions))


def _prompts(histories: Histories, kinds: tuple[int, ...], item_tokens: np.ndarray) -> Ragged:
    """Tokens of each history: the begin, then the latest `MAX_ITEMS` events of these kinds, oldest first."""
    kept = np.isin(histories.kinds, kinds)
    rows = histories.items.rows[kept]
    counts = np.bincount(rows, minlength=len(histories))
    from_end = np.repeat(np.cumsum(counts), counts) - np.arange(len(rows))
    latest = from_end <= MAX_ITEMS
    tokens = item_tokens[histories.items.values[kept][latest]]
    if len(kinds) > 1:
        tokens = np.column_stack([_KIND_TOKENS[histories.kinds[kept][latest]], tokens])
    lengths = np.minimum(counts, MAX_ITEMS) * tokens.shape[1]
    starts = np.cumsum(lengths) - lengths
    return Ragged.from_lengths(np.insert(tokens.ravel(), starts, _BEGIN), lengths + 1)


def _batches(lengths: np.ndarray, random: np.random.Generator) -> Iterator[np.ndarray]:
    """All rows in random batches of like length."""
    order = random.permutation(len(lengths))
    mixed = np.arange(len(order)) // (_BATCH * _MIXED)
    order = order[np.lexsort((lengths[order], mixed))]
    starts = np.arange(0, len(order), _BATCH)
    for start in random.permutation(starts):
        yield order[start : start + _BATCH]


def _encode(network: Any, prompts: Ragged, device: torch.device) -> tuple[Tensor, Tensor]:
    """States (B, T, d) and which of them are real (B, T)."""
    tokens = torch.from_numpy(prompts.padded(_PAD).astype(np.int64)).to(device)
    real = (tokens != _PAD).long()
    return network.encoder(input_ids=tokens, attention_mask=real).last_hidden_state, real


def _scaled(network: Any, hidden: Tensor) -> Tensor:
    """States as the output head takes them: it shares the weights of the embedding."""
    return hidden * network.config.d_model**-0.5


def _log_probs(network: Any, trie: DeviceTrie, prompts: Ragged, leaves: Tensor) -> Tensor:
    """Log-probability of leaves (B, C), renormalised over the trie's children; -1 is read as leaf 0."""
    nodes, tokens = trie.paths(leaves.clamp_min(0))
    states, real = _encode(network, prompts, trie.device)
    count = leaves.shape[1]
    hidden = network.decoder(
        input_ids=torch.nn.functional.pad(tokens[..., :-1], (1, 0), value=_PAD).flatten(0, 1),
        encoder_hidden_states=states.repeat_interleave(count, 0),
        encoder_attention_mask=real.repeat_interleave(count, 0),
        use_cache=False,
    ).last_hidden_state
    hidden = _scaled(network, hidden).unflatten(0, leaves.shape)
    totals = torch.zeros(leaves.shape, device=trie.device)
    for level in range(trie.levels):
        parents = nodes[..., level]
        step = step_log_probs(code_logits(network.lm_head, hidden[..., level, :], level, trie), parents, level, trie)
        child = nodes[..., level + 1] - trie.offsets[level][parents]
        totals = totals + step.gather(-1, child[..., None])[..., 0]
    return totals


def _beam_search(network: Any, trie: DeviceTrie, prompts: Ragged, width: int) -> tuple[Tensor, Tensor]:
    from transformers import DynamicCache, EncoderDecoderCache

    states, real = _encode(network, prompts, trie.device)
    rows = torch.arange(len(prompts), device=trie.device)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    nodes = torch.zeros((len(prompts), 1), dtype=torch.int64, device=trie.device)
    log_probs = torch.zeros((len(prompts), 1), device=trie.device)
    newest = torch.full_like(nodes, _PAD)
    for level in range(trie.levels):
        hidden = network.decoder(
            input_ids=newest.reshape(-1, 1),
            encoder_hidden_states=states,
            encoder_attention_mask=real,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        hidden = _scaled(network, hidden).unflatten(0, nodes.shape)
        tokens, children, _ = trie.children(level, nodes)
        logits = code_logits(network.lm_head, hidden, level, trie)
        totals = (log_probs[..., None] + step_log_probs(logits, nodes, level, trie)).flatten(1)
        # Every node has a child, so there are always this many real candidates.
        log_probs, best = totals.topk(min(width, trie.node_counts[level + 1]))
        parents = (rows[:, None] * nodes.shape[1] + best // children.shape[-1]).flatten()
        nodes, newest = children.flatten(1).gather(1, best), tokens.flatten(1).gather(1, best)
        if level + 1 < trie.levels:
            # Rows of the decoder are beams: what it remembers follows the beams that go on.
            cache.reorder_cache(parents)
            states, real = states[parents], real[parents]
    return nodes, log_probs
