"""What the policy's candidates buy: how wide beams are against what the published lists catch, and what asking costs.

    .venv/bin/conrec run --config examples/kuairand/conrec.toml
    .venv/bin/python benchmarks/candidates.py root=runs/kuairand evaluation.max_anchors=2500

Every width goes through the whole night: the score is fitted and calibrated with that many candidates, the lists judged
by the window after the cut. Users a second of the torch engine on one thread. Arguments are settings; writes
benchmarks/candidates.json.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from conrec import storage
from conrec.blocklist.asking import Policy
from conrec.blocklist.engines import TorchEngine
from conrec.blocklist.fitting import Fitting
from conrec.blocklist.ranking import Answers
from conrec.blocklist.score import Estimate, Score
from conrec.config import Config, load_settings
from conrec.evaluation.headline import Published
from conrec.evaluation.published import Pairs, at_threshold, catch_at, paired, shown_pairs
from conrec.evaluation.published_lists import lists_of
from conrec.evaluation.world import World
from conrec.feedback.histories import rejections_in_history
from conrec.progress import progress
from conrec.stages.artefacts import Artefacts
from conrec.stages.policies import serving
from conrec.stages.scoring import load_fitting
from conrec.stages.systems import load_world

HOME = Path(__file__).parents[1]
WIDTHS = (0, 10, 20, 40, 100, 200)
COMPARED = 100
"""The width whose catch is divided by that of each other."""


def main() -> None:
    """Measures every width and writes the JSON."""
    torch.set_num_threads(1)
    config = load_settings(HOME / "examples" / "kuairand" / "conrec.toml", sys.argv[1:])
    run = serving(Artefacts(config), same_cut=True)
    world, fitting = load_world(run), load_fitting(run)
    pairs = shown_pairs(world.events, world.served)
    engines = [
        engine_of(run, "validated", fitting.catalogue.trie),
        engine_of(run, "policy", world.catalogue.trie),
    ]
    counted = fitting.counted()
    rows: dict[str, Any] = {}
    lists: dict[int, Published] = {}
    with progress("widths", len(WIDTHS)) as bar:
        for width in WIDTHS:
            rows[str(width)], lists[width] = measured(world, fitting, counted, engines, pairs, width)
            bar.advance(note=f"{width} beams")
    for width in WIDTHS:
        ratios = paired(lists[COMPARED].scores, lists[width].scores, pairs, seed=config.seed).catch_ratio
        key = f"catch_of_{COMPARED}_beams_over_it"
        rows[str(width)][key] = {f"{share:g}": value for share, value in ratios.items()}
    document = {"users": len(world.served), "pairs": len(pairs), "widths": rows}
    (HOME / "benchmarks" / "candidates.json").write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document, indent=2))


def measured(
    world: World, fitting: Fitting, counted: Estimate, engines: list[TorchEngine], pairs: Pairs, width: int
) -> tuple[dict[str, Any], Published]:
    """Figures of one width, and its lists; width 0: no policy."""
    config, seed = with_width(world.config, max(width, 1)), world.config.seed
    counts = world.counts(config.timeline.cut_us)
    asks, checks = fitting.asked_rows()
    if width:
        twin = Policy(engines[0], fitting.catalogue, fitting.events, config)
        policy = Policy(engines[1], world.catalogue, world.events, config)
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


def with_width(config: Config, width: int) -> Config:
    """The same settings with other beams."""
    return config.model_copy(update={"generate": config.generate.model_copy(update={"beam_width": width})})


def engine_of(run: Artefacts, name: str, trie: Any) -> TorchEngine:
    """The checkpoint of an artefact."""
    with storage.local_folder(run[name].path("checkpoint")) as folder:
        return TorchEngine.load(folder, trie)


if __name__ == "__main__":
    main()
