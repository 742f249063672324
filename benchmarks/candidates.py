"""What the policy's candidates buy: how wide beams are against what the published lists catch, and what asking costs.

    .venv/bin/conrec run --config examples/kuairand/conrec.toml
    .venv/bin/python benchmarks/candidates.py --config examples/kuairand/conrec.toml evaluation.max_anchors=2500

Every width goes through the whole night: the score is fitted and calibrated with that many candidates, the lists judged
by the window after the cut. So does the two-tower head in the place of beams and verdict, which reads a prompt once and
asks no policy about an ID. Users a second of the torch engine on one thread. Arguments are settings; writes
benchmarks/candidates.json, or `--out`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from conrec import storage
from conrec.blocklist.asking import Policy, liked_leaves
from conrec.blocklist.engines import TorchEngine
from conrec.blocklist.fitting import Fitting
from conrec.blocklist.ranking import Answers
from conrec.blocklist.score import LOG_PROB, VERDICT, Estimate, Score
from conrec.config import load_settings
from conrec.evaluation.headline import Published
from conrec.evaluation.published import Pairs, at_threshold, catch_at, paired, shown_pairs
from conrec.evaluation.published_lists import lists_of
from conrec.evaluation.tuning import Trial
from conrec.evaluation.two_tower import Trunk, TwoTower, fit_two_tower
from conrec.evaluation.world import World
from conrec.feedback.anchors import Anchors
from conrec.feedback.histories import rejections_in_history
from conrec.progress import progress
from conrec.stages.artefacts import Artefacts
from conrec.stages.policies import serving
from conrec.stages.scoring import load_fitting
from conrec.stages.systems import load_world, two_tower

HOME = Path(__file__).parents[1]
WIDTHS = (0, 10, 20, 40, 100, 200)
COMPARED = "100"
"""The row whose catch is divided by that of each other."""
HEAD = "two-tower head"


def main() -> None:
    """Measures every width and the head, and writes the JSON."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--out", type=Path, default=HOME / "benchmarks" / "candidates.json")
    parser.add_argument("settings", nargs="*", help="section.setting=value")
    given = parser.parse_args()
    run = serving(Artefacts(load_settings(given.config, given.settings)), same_cut=True)
    config, world, fitting = run.config, load_world(run), load_fitting(run)
    pairs, counted = shown_pairs(world.events, world.served), fitting.counted()
    twin = Policy(engine_of(run, "validated", fitting.catalogue.trie), fitting.catalogue, fitting.events, config)
    served = Policy(engine_of(run, "policy", world.catalogue.trie), world.catalogue, world.events, config)
    ways = {str(width): (with_width(twin, width), with_width(served, width)) if width else None for width in WIDTHS}
    ways[HEAD] = headed(run, world, twin, served)
    rows: dict[str, Any] = {}
    lists: dict[str, Published] = {}
    with progress("candidates", len(ways)) as bar:
        for name, asked in ways.items():
            rows[name], lists[name] = measured(world, fitting, counted, asked, pairs)
            bar.advance(note=name)
    for name, row in rows.items():
        ratios = paired(lists[COMPARED].scores, lists[name].scores, pairs, seed=config.seed)
        found = {f"{share:g}": value for share, value in ratios.catch_ratio.items()}
        row[f"catch_of_{COMPARED}_beams_over_it"] = found
        row[f"auc_of_{COMPARED}_beams_above_it"] = ratios.auc_difference
    document = {"users": len(world.served), "pairs": len(pairs), "ways": rows}
    given.out.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document, indent=2))


def measured(
    world: World, fitting: Fitting, counted: Estimate, asked: tuple[Policy, Policy] | None, pairs: Pairs
) -> tuple[dict[str, Any], Published]:
    """Figures of one way to ask, and its lists. `asked`: the policies of the validation time and the night, if any."""
    config, seed = world.config, world.config.seed
    counts = world.counts(config.timeline.cut_us)
    asks, checks = fitting.asked_rows()
    if asked is not None:
        twin, policy = asked
        fitted_on, calibrated_on = (twin.generate(fitting.anchors.take(rows)) for rows in (asks, checks))
        score = Score(counted, fitting.judged(counted, twin, asks, fitted_on), config.score.reach)
        began = time.perf_counter()
        answers = policy.generate(world.served)
        rate: float | None = len(world.served) / (time.perf_counter() - began)
    else:
        calibrated_on, answers, rate = Answers.nothing(len(checks)), Answers.nothing(len(world.served)), None
        score = Score(counted, None, config.score.reach)
    calibration = fitting.calibrated(score, checks, calibrated_on)
    lists = lists_of(world, counts, score, np.zeros(len(pairs)), answers, pairs, calibration)
    limits = calibration.thresholds(rejections_in_history(world.events, world.served))[pairs.users]
    trie = world.catalogue.trie
    generated = answers.leaves.rows.astype(np.int64) * len(trie) + answers.leaves.values
    wanted = pairs.users[pairs.rejected].astype(np.int64) * len(trie) + trie.item_leaves[pairs.items[pairs.rejected]]
    return {
        "users_per_second": rate,
        "share_of_rejections_among_candidates": float(np.isin(wanted, generated).mean()),
        "published": at_threshold(lists.scores, pairs, limits, seed=seed),
        "catch_at": {f"{share:g}": value for share, value in catch_at(lists.scores, pairs, seed=seed).items()},
        "rows": float(lists.lengths[f"{calibration.alpha:g}"].mean()),
    }, lists


@dataclass(frozen=True)
class HeadPolicy(Policy):
    """The head in the place of beams and verdict: one state of a prompt says all that is asked."""

    trunk: Trunk
    head: TwoTower

    def generate(self, anchors: Anchors, advance: Callable[[int], None] = lambda _: None) -> Answers:
        """The most probable leaves of each anchor, less what was liked, with the head's verdicts."""
        states, width = self.trunk.states(self.events, anchors), self.config.generate.beam_width
        liked = liked_leaves(self.catalogue.trie.item_leaves, self.events, anchors)
        scores = self.head.scores(states)
        scores[liked.rows, liked.values] = -np.inf
        leaves = np.argsort(-scores, axis=1, kind="stable")[:, :width]
        log_probs = np.take_along_axis(scores, leaves, axis=1)
        rows = np.repeat(np.arange(len(anchors)), width)
        verdicts = self.head.judge(states, rows, leaves.ravel()).reshape(leaves.shape)
        advance(len(anchors))
        return Answers.of_dense(np.where(np.isfinite(log_probs), leaves, -1), log_probs, verdicts)

    def says(self, anchors: Anchors, rows: np.ndarray, leaves: np.ndarray) -> dict[str, np.ndarray]:
        """As of a policy."""
        states = self.trunk.states(self.events, anchors)
        return {LOG_PROB: self.head.scores(states)[rows, leaves], VERDICT: self.head.judge(states, rows, leaves)}


def headed(run: Artefacts, world: World, twin: Policy, served: Policy) -> tuple[Policy, Policy]:
    """Both policies with a head each: the tuned one, and one like it that was fitted until the validation time."""
    tuned, trunk = two_tower(run, world)
    assert isinstance(twin.engine, TorchEngine) and isinstance(tuned.chosen.trial, Trial)
    earlier = Trunk(twin.engine, twin.catalogue, twin.events, run.config)
    samples = earlier.samples(run.config.timeline.validation_us, run.config.timeline)
    head = fit_two_tower(earlier, samples, tuned.chosen.trial, run.config.seed, epochs=tuned.model.epochs)
    return HeadPolicy(**vars(twin), trunk=earlier, head=head), HeadPolicy(**vars(served), trunk=trunk, head=tuned.model)


def with_width(policy: Policy, width: int) -> Policy:
    """The same policy with other beams."""
    generate = policy.config.generate.model_copy(update={"beam_width": width})
    return replace(policy, config=policy.config.model_copy(update={"generate": generate}))


def engine_of(run: Artefacts, name: str, trie: Any) -> TorchEngine:
    """The checkpoint of an artefact."""
    with storage.local_folder(run[name].path("checkpoint")) as folder:
        return TorchEngine.load(folder, trie)


if __name__ == "__main__":
    main()
