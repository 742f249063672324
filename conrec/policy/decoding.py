"""Constrained decoding over the trie: beam search, sampling without replacement, and the verdict on what is found.

    verdict = log P(rejected | ID, prompt) - log P(liked | ID, prompt)

the generator says which IDs come next, the verdict what the user thinks of them.

Invariant: at each step only the children of the current node (the full prefix, not the position) have probability,
and their probabilities sum to 1. So every sequence that comes out is a semantic ID of the catalogue, none comes out
twice for a user, and the probabilities of all leaves sum to 1. Nothing is read from a model's generation settings.

A prompt is computed once, by the model or by whoever else `read`s it (`conrec.policy.prefill`). Its beams are further
query positions of the same row, which see the prompt and their own ancestors through a 4D attention mask: no cache is
copied or reordered, and no Python loop runs over rows or beams.

    leaves, log_probs, verdicts = judged_beam_search(model, prompts, DeviceTrie(trie, vocabulary), width=20)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from conrec.catalogue.trie import Trie
from conrec.errors import ArtefactError
from conrec.policy.head import decoder_and_head, row_logits
from conrec.policy.memory import BATCH_TOKENS, DEVICE_BATCH_TOKENS
from conrec.policy.prefill import Read, ReadPrompts, pad, read_prompts
from conrec.policy.vocabulary import Vocabulary
from conrec.ragged import Ragged

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))
"""Constants of SplitMix64 as signed integers."""


class DeviceTrie:
    """The trie as tensors: level 0 dense, deeper levels as CSR arrays gathered where the model runs.

    Node n of level l has the children `offsets[l][n]:offsets[l][n + 1]`, which are nodes of level l + 1;
    `codes_in[l]` holds the code on the edge into each of them. Nodes of level L are the leaves. `batch_tokens`: prompt
    and beam positions that whoever decodes over it computes at a time, where nobody says otherwise.
    """

    def __init__(self, trie: Trie, vocabulary: Vocabulary, device: torch.device | str = "cpu") -> None:
        check_trie(trie, vocabulary)
        self.levels = trie.levels
        self.codes = trie.codes
        self.first_code_token = vocabulary.first_code_token
        self.rejected, self.liked = vocabulary.rejected, vocabulary.liked
        self.widest = tuple(int(np.diff(offsets).max()) for offsets in trie.child_offsets)
        self.node_counts = (1, *(len(codes) for codes in trie.child_codes))
        # Copied: arrays out of Ray's object store are read-only, which tensors cannot be.
        self.offsets = tuple(torch.tensor(offsets, device=device) for offsets in trie.child_offsets)
        self.codes_in = tuple(torch.tensor(codes, dtype=torch.int64, device=device) for codes in trie.child_codes)
        self.device = self.offsets[0].device
        self.batch_tokens = BATCH_TOKENS if self.device.type == "cpu" else DEVICE_BATCH_TOKENS

    @property
    def leaf_count(self) -> int:
        """Number of distinct semantic IDs."""
        return self.node_counts[-1]

    def token_block(self, level: int) -> slice:
        """Token ids of a level's codes."""
        first = self.first_code_token + level * self.codes
        return slice(first, first + self.codes)

    def children(self, level: int, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What may follow each node of a level.

        Shape: (...,) -> token ids, nodes of the next level, and which of them are real, (..., widest[level]) each.
        """
        codes = self.codes_in[level]
        if level == 0:
            shape = (*nodes.shape, len(codes))
            edges = torch.arange(len(codes), device=codes.device)
            real = torch.ones((), dtype=torch.bool, device=codes.device)
            return (codes + self.token_block(0).start).expand(shape), edges.expand(shape), real.expand(shape)
        starts = self.offsets[level][nodes]
        edges = starts[..., None] + torch.arange(self.widest[level], device=codes.device)
        real = edges < self.offsets[level][nodes + 1][..., None]
        edges = edges.clamp_max(len(codes) - 1)
        return codes[edges] + self.token_block(level).start, edges, real

    def paths(self, leaves: Tensor) -> tuple[Tensor, Tensor]:
        """From the root to each leaf. Shape: (...,) -> nodes (..., L + 1), token ids (..., L)."""
        nodes, tokens = [leaves], []
        for level in reversed(range(self.levels)):
            tokens.append(self.codes_in[level][nodes[-1]] + self.token_block(level).start)
            nodes.append(torch.searchsorted(self.offsets[level], nodes[-1], right=True) - 1)
        return torch.stack(nodes[::-1], -1), torch.stack(tokens[::-1], -1)


def check_trie(trie: Trie, vocabulary: Vocabulary) -> None:
    """Raises `ArtefactError` if a node has no children (an empty allowed set) or the vocabulary is of another size."""
    for level, offsets in enumerate(trie.child_offsets):
        childless = np.flatnonzero(np.diff(offsets) < 1)
        if len(offsets) < 2 or len(childless):
            node = childless[0] if len(childless) else 0
            raise ArtefactError(
                f"the trie allows no code after node {node} of level {level}: a catalogue without live items, "
                "or a trie of another catalogue; run the catalogue stage again"
            )
    if (trie.levels, trie.codes) != (vocabulary.levels, vocabulary.codes):
        raise ArtefactError(
            f"the catalogue has {trie.levels} levels of {trie.codes} codes, the policy's vocabulary "
            f"{vocabulary.levels} of {vocabulary.codes}: train a policy on this catalogue"
        )


def code_logits(head: Any, hidden: Tensor, level: int, trie: DeviceTrie) -> Tensor:
    """Logits of one level's codes. Shape: (..., H) -> (..., C) float32."""
    block = trie.token_block(level)
    return row_logits(head, hidden, range(block.start, block.stop))


def verdict_logits(head: Any, hidden: Tensor, trie: DeviceTrie) -> Tensor:
    """log P(rejected) - log P(liked) of the next token. Shape: (..., H) at an ID's last code -> (...,) float32.

    What the softmax divides by is the same for both, so the logits' difference is that of the log-probabilities.
    """
    logits = row_logits(head, hidden, (trie.rejected, trie.liked))
    return logits[..., 0] - logits[..., 1]


def step_log_probs(logits: Tensor, nodes: Tensor, level: int, trie: DeviceTrie) -> Tensor:
    """Log-probabilities renormalised over the children of each node, -inf where there is no child.

    Shape: logits (..., C) of the level's codes, nodes (...,) -> (..., widest[level]) float32.
    """
    tokens, _, real = trie.children(level, nodes)
    allowed = logits.float().gather(-1, tokens - trie.token_block(level).start)
    return allowed.masked_fill(~real, -torch.inf).log_softmax(-1)


def entropy(step: Tensor) -> Tensor:
    """Of distributions given by log-probabilities, -inf among them. Shape: (..., C) -> (...,)."""
    return -(step.exp() * step.clamp_min(torch.finfo(step.dtype).min)).sum(-1)


def beam_search(
    model: Any,
    prompts: Ragged,
    trie: DeviceTrie,
    width: int,
    batch_tokens: int | None = None,
    read: ReadPrompts = read_prompts,
) -> tuple[Tensor, Tensor]:
    """The most probable leaves of each prompt found with `width` beams, best first.

    Returns leaves (B, width) int64 and their log-probabilities (B, width) float32; -1 and -inf where the trie has
    fewer leaves than beams. Exact when width is at least the number of leaves.
    """
    leaves, log_probs, _ = _search(model, prompts, trie, width, None, batch_tokens, read=read)
    return leaves, log_probs


def judged_beam_search(
    model: Any,
    prompts: Ragged,
    trie: DeviceTrie,
    width: int,
    batch_tokens: int | None = None,
    read: ReadPrompts = read_prompts,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `beam_search` returns, and the verdicts on it (B, width) float32, 0 where there is no leaf.

    A beam's codes are computed already: its verdict takes the position of the last one, and no prompt again.
    """
    return _search(model, prompts, trie, width, None, batch_tokens, judged=True, read=read)


def sample_without_replacement(
    model: Any,
    prompts: Ragged,
    trie: DeviceTrie,
    group_size: int,
    seeds: np.ndarray,
    batch_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`group_size` distinct leaves of each prompt, as if drawn one after the other without replacement.

    Stochastic beam search (Kool et al. 2019, arXiv 1903.06059): the top k of the leaves' Gumbel-perturbed
    log-probabilities, found without visiting all leaves. What a prompt draws follows from its seed, whatever else is in
    its batch. Returns leaves (B, G) in the order drawn and their log-probabilities under the model (B, G), padded as in
    `beam_search`. Shape: seeds (B,) int64.
    """
    leaves, log_probs, _ = _search(model, prompts, trie, group_size, seeds, batch_tokens)
    return leaves, log_probs


def traced_samples(
    model: Any, prompts: Ragged, trie: DeviceTrie, group_size: int, seeds: np.ndarray
) -> tuple[Tensor, Tensor, Tensor]:
    """What `sample_without_replacement` draws in one batch, and what `completion_log_probs` says of it, differentiable.

    Prompts and codes are computed once for both: the search keeps its graph. In evaluation mode alone, since with
    dropout the draws would be of another model. Returns leaves (B, G), -1 where the trie has fewer, log-probabilities
    and entropies (B, G, L).
    """
    read = read_prompts(model, prompts, trie.device, (trie.levels - 1) * group_size)
    drawn = _search_batch(model, read, trie, group_size, seeds, False, traced=True)
    empty = group_size - drawn.leaves.shape[1]
    leaves = functional.pad(drawn.leaves, (0, empty), value=-1)
    return leaves, functional.pad(drawn.steps, (0, 0, 0, empty)), functional.pad(drawn.entropies, (0, 0, 0, empty))


def completion_log_probs(
    model: Any, prompts: Ragged, leaves: Tensor, trie: DeviceTrie, read: ReadPrompts = read_prompts
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of every token of given completions, differentiable.

    One packed row per prompt: the prompt, then its completions, each attending to the prompt and to itself, with
    positions that continue from the prompt. Both figures are over the children that the trie allows. Without gradients
    `read` computes the prompts.
    Shape: leaves (B, G) -> (B, G, L) each, float32; zeros where a leaf is -1.
    """
    nodes, tokens = trie.paths(leaves.clamp_min(0))
    last, after = _packed(model, prompts, tokens[..., :-1], trie, read)
    log_probs, entropies = _steps(model, last, after, nodes, trie)
    real = (leaves >= 0)[..., None]
    return log_probs.where(real, 0.0), entropies.where(real, 0.0)


def judged_log_probs(
    model: Any, prompts: Ragged, leaves: Tensor, trie: DeviceTrie, read: ReadPrompts = read_prompts
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of given leaves and the verdicts on them, from one pass; differentiable.

    Packed as in `completion_log_probs`, each completion one token longer.
    Shape: leaves (B, G) -> (B, G) each, float32; zeros where a leaf is -1.
    """
    nodes, tokens = trie.paths(leaves.clamp_min(0))
    last, after = _packed(model, prompts, tokens, trie, read)
    log_probs, _ = _steps(model, last, after, nodes, trie)
    verdict = verdict_logits(decoder_and_head(model)[1], after[:, :, -1], trie)
    return log_probs.sum(-1).where(leaves >= 0, 0.0), verdict.where(leaves >= 0, 0.0)


def verdicts(model: Any, prompts: Ragged, leaves: Tensor, trie: DeviceTrie) -> Tensor:
    """log P(rejected | ID, prompt) - log P(liked | ID, prompt) of given leaves, differentiable.

    Packed as in `completion_log_probs`. Shape: leaves (B, G) -> (B, G) float32; zeros where a leaf is -1.
    """
    _, after = _packed(model, prompts, trie.paths(leaves.clamp_min(0))[1], trie)
    return verdict_logits(decoder_and_head(model)[1], after[:, :, -1], trie).where(leaves >= 0, 0.0)


def given_log_probs(
    model: Any, prompts: Ragged, leaves: np.ndarray, trie: DeviceTrie, batch_tokens: int | None = None
) -> np.ndarray:
    """Log-probability of every given completion, without gradient. Shape: leaves (B, G) -> (B, G) float32."""
    totals = np.zeros(leaves.shape, np.float32)
    with _evaluating(model):
        extra = (trie.levels - 1) * leaves.shape[1]
        for rows in length_batches(prompts.lengths, extra, batch_tokens or trie.batch_tokens):
            given = torch.as_tensor(leaves[rows], device=trie.device)
            log_probs, _ = completion_log_probs(model, prompts.take(rows), given, trie)
            totals[rows] = log_probs.sum(-1).cpu().numpy()
    return totals


def pair_verdicts(
    model: Any, prompts: Ragged, leaves: Ragged, trie: DeviceTrie, batch_tokens: int | None = None
) -> np.ndarray:
    """The verdict on every leaf of every prompt, without gradient. Shape: B rows of leaves -> (N,) float32."""
    values = np.zeros(len(leaves.values), np.float32)
    places = Ragged(np.arange(len(values)), leaves.offsets)
    with _evaluating(model):
        for rows in _pair_batches(prompts.lengths, trie.levels * leaves.lengths, batch_tokens or trie.batch_tokens):
            given = torch.as_tensor(leaves.take(rows).padded(-1).astype(np.int64), device=trie.device)
            judged = verdicts(model, prompts.take(rows), given, trie)
            values[places.take(rows).values] = judged[given >= 0].cpu().numpy()
    return values


def _packed(
    model: Any, prompts: Ragged, tokens: Tensor, trie: DeviceTrie, read: ReadPrompts = read_prompts
) -> tuple[Tensor, Tensor]:
    """Hidden states after each prompt (B, H), and after every token of its completions.

    Without a gradient the prompts come first and are kept, so that their attention needs no mask, which would take the
    square of a prompt's length; with one it is a single pass, whose layers can be computed again.
    Shape: tokens (B, G, depth) -> (B, G, depth, H).
    """
    if not torch.is_grad_enabled():
        with _evaluating(model):
            return _in_two_passes(model, read(model, prompts, trie.device, tokens[0].numel()), tokens)
    decoder, _ = decoder_and_head(model)
    batch, group, depth = tokens.shape
    prompt, lengths = pad(prompts, trie.device)
    longest = prompt.shape[1]
    following = _following(lengths, group, depth)
    hidden = decoder(
        input_ids=torch.cat([prompt, tokens.flatten(1)], 1),
        attention_mask=additive(_packed_visibility(lengths, longest, group, depth), decoder),
        position_ids=torch.cat([torch.arange(longest, device=trie.device).expand(batch, -1), following], 1),
        use_cache=False,
    ).last_hidden_state
    last = hidden[torch.arange(batch, device=trie.device), lengths - 1]
    return last, hidden[:, longest:].unflatten(1, (group, depth))


def _in_two_passes(model: Any, prompts: Read, tokens: Tensor) -> tuple[Tensor, Tensor]:
    decoder, _ = decoder_and_head(model)
    batch, group, depth = tokens.shape
    if not group * depth:
        return prompts.last, prompts.last.new_empty(batch, group, depth, prompts.last.shape[-1])
    visible = _completions_visibility(prompts.lengths, prompts.longest, group, depth)
    after = decoder(
        input_ids=tokens.flatten(1),
        attention_mask=additive(_cached(visible), decoder),
        position_ids=_following(prompts.lengths, group, depth),
        past_key_values=prompts.cache,
        use_cache=True,
    ).last_hidden_state
    return prompts.last, after.unflatten(1, (group, depth))


def _following(lengths: Tensor, group: int, depth: int) -> Tensor:
    """Positions of completions. Shape: lengths (B,) of the prompts -> (B, group * depth)."""
    return (lengths[:, None] + torch.arange(depth, device=lengths.device)).repeat(1, group)


def _steps(model: Any, last: Tensor, after: Tensor, nodes: Tensor, trie: DeviceTrie) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of every token of completions.

    Shape: hidden states last (B, H), after (B, G, L - 1 or more, H), nodes (B, G, L + 1) -> (B, G, L) each.
    """
    _, head = decoder_and_head(model)
    group = nodes.shape[1]
    log_probs, entropies = [], []
    for level in range(trie.levels):
        # The first token of all completions of a prompt has one distribution: that after the prompt.
        parents = nodes[..., level] if level else nodes[:, :1, 0]
        logits = code_logits(head, after[:, :, level - 1] if level else last[:, None], level, trie)
        step = step_log_probs(logits, parents, level, trie)
        entropies.append(entropy(step).expand(-1, group))
        child = nodes[..., level + 1] - trie.offsets[level][nodes[..., level]]
        log_probs.append(step.expand(-1, group, -1).gather(-1, child[..., None])[..., 0])
    return torch.stack(log_probs, -1), torch.stack(entropies, -1)


def _search(
    model: Any,
    prompts: Ragged,
    trie: DeviceTrie,
    width: int,
    seeds: np.ndarray | None,
    batch_tokens: int | None,
    judged: bool = False,
    read: ReadPrompts = read_prompts,
) -> tuple[Tensor, Tensor, Tensor]:
    leaves = torch.full((len(prompts), width), -1, device=trie.device)
    log_probs = torch.full((len(prompts), width), -torch.inf, device=trie.device)
    verdict = torch.zeros((len(prompts), width), device=trie.device)
    with _evaluating(model):
        room = (trie.levels - 1 + judged) * width
        for rows in length_batches(prompts.lengths, room, batch_tokens or trie.batch_tokens):
            own = None if seeds is None else seeds[rows]
            part = _search_batch(model, read(model, prompts.take(rows), trie.device, room), trie, width, own, judged)
            at, count = torch.as_tensor(rows, device=trie.device), part.leaves.shape[1]
            leaves[at, :count] = part.leaves
            log_probs[at, :count] = part.log_probs
            verdict[at, :count] = part.verdicts
    return leaves, log_probs, verdict


class _Found(NamedTuple):
    """Beams at the leaves. Shape: (B, W) each, `steps` and `entropies` of every code (B, W, L), (B, W, 0) untraced."""

    leaves: Tensor
    log_probs: Tensor
    verdicts: Tensor
    steps: Tensor
    entropies: Tensor


def _search_batch(
    model: Any,
    prompts: Read,
    trie: DeviceTrie,
    width: int,
    seeds: np.ndarray | None,
    judged: bool,
    traced: bool = False,
) -> _Found:
    decoder, head = decoder_and_head(model)
    lengths, count = prompts.lengths, len(prompts.lengths)
    rows = torch.arange(count, device=trie.device)
    hidden, visible = prompts.last[:, None], prompts.visible[:, None]
    nodes = torch.zeros((count, 1), dtype=torch.int64, device=trie.device)
    log_probs = torch.zeros((count, 1), device=trie.device)
    ranks = log_probs
    steps = entropies = torch.zeros((count, 1, 0), device=trie.device)
    for level in range(trie.levels):
        tokens, children, _ = trie.children(level, nodes)
        step = step_log_probs(code_logits(head, hidden, level, trie), nodes, level, trie)
        totals = log_probs[..., None] + step.detach()
        ranks = totals if seeds is None else _perturbed(totals, ranks, _exponential(seeds, children, level, trie))
        # Every node has a child, so there are always this many real candidates and no beam is ever dead.
        ranks, best = ranks.flatten(1).topk(min(width, trie.node_counts[level + 1]))
        parents = best // children.shape[-1]
        nodes = children.flatten(1).gather(1, best)
        log_probs = totals.flatten(1).gather(1, best)
        if traced:
            own = step.flatten(1).gather(1, best)[..., None]
            steps = torch.cat([steps[rows[:, None], parents], own], -1)
            entropies = torch.cat([entropies, entropy(step)[..., None]], -1)[rows[:, None], parents]
        if level + 1 == trie.levels and not judged:
            return _Found(nodes, log_probs, torch.zeros_like(log_probs), steps, entropies)
        own = torch.eye(best.shape[1], dtype=torch.bool, device=trie.device).expand(count, -1, -1)
        visible = torch.cat([visible[rows[:, None], parents], own], -1)
        hidden = decoder(
            input_ids=tokens.flatten(1).gather(1, best),
            attention_mask=additive(_cached(visible), decoder),
            position_ids=(lengths[:, None] + level).expand_as(best),
            past_key_values=prompts.cache,
            use_cache=True,
        ).last_hidden_state
    return _Found(nodes, log_probs, verdict_logits(head, hidden, trie), steps, entropies)


def _exponential(seeds: np.ndarray, nodes: Tensor, level: int, trie: DeviceTrie) -> Tensor:
    """A draw from the exponential distribution for each node of a row: a function of the row's seed and the node.

    The mixing function of SplitMix64 over both, so that no draw depends on who else is in the batch, on the order of
    the beams or on the device. Shape: seeds (B,), nodes (B, W, C) of the next level -> (B, W, C) float32.
    """
    mixed = torch.as_tensor(seeds, device=nodes.device)[:, None, None] + (nodes * trie.levels + level) * _GOLDEN
    for shift, factor in ((30, _MIX[0]), (27, _MIX[1]), (31, 1)):
        # Shifts of signed integers bring copies of the sign in, which are masked away.
        mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * factor
    uniform = (((mixed >> 40) & 0xFFFFFF).float() + 0.5) * 2.0**-24
    # The largest would be rounded to 1, and its Gumbel be infinite.
    return -uniform.clamp_max(1 - 2.0**-24).log()


def _perturbed(totals: Tensor, parents: Tensor, noise: Tensor) -> Tensor:
    """Gumbels located at `totals` whose maximum over each node's children is the parent's own Gumbel.

    Kool et al. 2019, appendix B.3. Shape: totals and exponential noise (B, W, children), parents (B, W) -> (B, W,
    children).
    """
    gumbel = totals - noise.log()
    shift = parents[..., None] - gumbel + (-torch.expm1(gumbel - gumbel.amax(-1, keepdim=True))).log()
    return parents[..., None] - shift.clamp_min(0) - (-shift.abs()).exp().log1p()


def length_batches(lengths: np.ndarray, extra: int, batch_tokens: int) -> Iterator[np.ndarray]:
    """Rows in batches of like length, each of at most `batch_tokens` positions once padded (at least one row).

    A batch also ends where more than a sixty-fourth of `batch_tokens` would be padding: that costs more than a batch
    of its own.
    Shape: lengths (B,), `extra` positions per row besides its prompt -> row numbers, longest first.
    """
    order = np.argsort(-lengths, kind="stable")
    descending = lengths[order]
    start = 0
    while start < len(order):
        count = max(1, batch_tokens // int(descending[start] + extra))
        padding = np.cumsum(descending[start] - descending[start : start + count])
        count = int(np.searchsorted(padding, batch_tokens // 64, "right"))
        yield order[start : start + count]
        start += count


def _pair_batches(prompts: np.ndarray, completions: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Rows in batches of at most `batch_tokens` positions once the prompts and what follows them are padded, each to
    the longest of their own (at least one row).

    Shape: prompts (B,) and completions (B,) positions -> row numbers.
    """
    waiting = list(length_batches(prompts + completions, 0, batch_tokens))[::-1]
    while waiting:
        rows = waiting.pop()
        if len(rows) == 1 or len(rows) * int(prompts[rows].max() + completions[rows].max()) <= batch_tokens:
            yield rows
        else:  # a long prompt of few completions stands beside a short one of many
            waiting += np.array_split(rows[np.argsort(prompts[rows], kind="stable")], 2)


def _packed_visibility(lengths: Tensor, longest: int, group: int, depth: int) -> Tensor:
    """Who sees whom in packed rows. Shape: lengths (B,) -> (B, T, T) bool with T = longest + group * depth."""
    prompts = torch.ones(longest, longest + group * depth, dtype=torch.bool, device=lengths.device).tril()
    completions = _completions_visibility(lengths, longest, group, depth)
    return torch.cat([prompts.expand(len(lengths), -1, -1), completions], 1)


def _completions_visibility(lengths: Tensor, longest: int, group: int, depth: int) -> Tensor:
    """Whom completions see: their prompt and themselves. Shape: lengths (B,) -> (B, group * depth, T) bool."""
    device, size = lengths.device, group * depth
    real = (torch.arange(longest, device=device) < lengths[:, None])[:, None].expand(-1, size, -1)
    own = torch.kron(torch.eye(group, device=device), torch.ones(depth, depth, device=device).tril()).bool()
    return torch.cat([real, own.expand(len(lengths), -1, -1)], 2)


def _cached(visible: Tensor) -> Tensor:
    """What is seen of the cache that prompts were read into. Shape: (B, Q, T) -> (B, Q, T or more)."""
    if torch.is_grad_enabled():
        return visible  # the cache of transformers, which keeps what its steps had
    from conrec.policy.cache import aligned

    return aligned(visible)


def additive(visible: Tensor, decoder: Any) -> Tensor:
    """(B, Q, K) bool -> (B, 1, Q, K) to add to attention scores; both sdpa and eager attention read it so."""
    mask = torch.zeros(visible.shape, dtype=decoder.dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(decoder.dtype).min)[:, None]


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """No gradient, no dropout, and the cache that gradient checkpointing would refuse in training mode."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
