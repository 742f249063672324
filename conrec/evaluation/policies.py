"""What a policy says of the anchors of an evaluation: the IDs that it generates, and what it says of the candidates."""

from __future__ import annotations

import time

import numpy as np

from conrec.blocklist.engines import TorchEngine
from conrec.config import Config
from conrec.evaluation.rows import LIST, Generated
from conrec.evaluation.world import World
from conrec.policy.prompts import build_prompts
from conrec.policy.tasks import choices
from conrec.progress import progress
from conrec.ragged import Ragged

_BLOCK = 512


def answer_of(engine: TorchEngine, world: World, config: Config, aligned: bool, name: str) -> tuple[Generated, float]:
    """What the policy says, and for how many users a second it generates.

    `config`: the settings that it was trained with; `aligned`: it knows how a question is answered; `name` is shown.
    """
    blocks, semantic_ids = blocks_of_prompts(config), world.catalogue.semantic_ids
    prompts = build_prompts(world.events, world.anchors, semantic_ids, engine.vocabulary, config.prompt, blocks)
    # A policy that learned rejections alone was never told what follows an ID.
    judges = config.supervised.warmup_target == "events" and config.supervised.warmup_epochs > 0
    options = _options(world, engine) if aligned else None
    parts: list[dict[str, np.ndarray]] = []
    generating = 0.0
    with progress(f"  {name}", len(prompts)) as bar:
        for start_row in range(0, len(prompts), _BLOCK):
            rows = np.arange(start_row, min(start_row + _BLOCK, len(prompts)))
            block, candidates = prompts.take(rows), world.candidate_leaves[rows]
            began = time.perf_counter()
            leaves, log_probs, verdicts = engine.generate_and_judge(block, max(LIST, config.generate.beam_width))
            generating += time.perf_counter() - began
            scores, candidate_verdicts = engine.score_and_judge(block, candidates)
            part = {"leaves": leaves, "log_probs": log_probs, "candidates": scores}
            if judges:
                part |= {"verdicts": verdicts, "candidate_verdicts": candidate_verdicts}
            if options is not None:
                part["choice"] = engine.score(options.take(rows), candidates)
            parts.append(part)
            bar.advance(len(rows))
    answer = Generated(**{key: np.concatenate([part[key] for part in parts]) for key in parts[0]})
    return answer, len(prompts) / generating


def blocks_of_prompts(config: Config) -> tuple[str, ...]:
    """History in the prompt that a policy is asked with: what its warm-up showed."""
    if config.supervised.warmup_target == "next_negative":
        return config.supervised.warmup_blocks
    return ("negatives", "positives")


def _options(world: World, engine: TorchEngine) -> Ragged:
    """The candidates listed in a question, as alignment lists four; sets with padding repeat their first candidate."""
    items = world.candidates.items
    items = np.where(items >= 0, items, np.maximum(items[:, :1], 0))
    tokens = choices(items, world.catalogue.semantic_ids, engine.vocabulary)
    return Ragged.from_lengths(tokens.ravel(), np.full(len(tokens), tokens.shape[1]))
