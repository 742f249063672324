"""What is ours or made of our parts, answering as a system from outside: so that all rows stand in one small table.

    .venv/bin/python benchmarks/rivals/policies.py --config examples/kuairand/conrec.toml --out runs/anchors \\
        --rows rules two-tower policy score --set root=runs/kuairand

Rows, of which each leaves `ranked/NAME.parquet` for the anchors and `told/NAME.parquet` for the pairs:

- `rules`: SeqRules, and `sasrec`: SASRec on negatives, from the log alone; without rows of policies they need neither
  catalogue nor policy;
- `two-tower`: the head on the trained policy's trunk;
- `policy`: the policy before GRPO by itself: log P(ID) ranks, log P(ID, rejected) tells pairs; with `--name` of another
  name, for a policy on other IDs (p5_cid);
- `score`: our odds with the policy, of the pairs alone.

Answers go through the very files that anybody's would; `told/NAME.json` has trials and costs.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pairs import named, task_pairs, tell

from conrec import storage
from conrec.blocklist.asking import Policy
from conrec.blocklist.engines import TorchEngine
from conrec.blocklist.score import LOG_PROB, VERDICT
from conrec.config import load_settings
from conrec.evaluation.baselines import Scores
from conrec.evaluation.published_lists import Shown
from conrec.evaluation.rankings import alone
from conrec.evaluation.rows import LIST, Generated, Predictions
from conrec.evaluation.seq_rules import RULE_TRIALS, SEQ_RULES, tune_rules
from conrec.evaluation.sequential import KINDS, TRIALS, tune_sequential
from conrec.evaluation.systems import BEFORE
from conrec.evaluation.tuning import Tuned
from conrec.evaluation.world import World
from conrec.stages.artefacts import Artefacts
from conrec.stages.policies import serving
from conrec.stages.scoring import scoring
from conrec.stages.systems import load_world, systems, two_tower

SASREC = KINDS[0]
FROM_LOG = ("rules", "sasrec")
ROWS = (*FROM_LOG, "two-tower", "policy", "score")


def main() -> None:
    """Answers for every row that is asked for."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description="our own rows as answers of a system from outside")
    parser.add_argument("--config", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--name", default="policy before GRPO")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="section.setting=value")
    arguments = parser.parse_args()
    run = Artefacts(load_settings(arguments.config, arguments.settings))
    with_policy = not set(arguments.rows) <= set(FROM_LOG)
    if with_policy:
        run = serving(run, same_cut=True)
    world = load_world(run, encoded=with_policy)
    rows = Rows(run, world, arguments.out)
    for name in arguments.rows:
        label, figures = {
            "rules": rows.rules,
            "sasrec": rows.sasrec,
            "two-tower": rows.two_tower,
            "policy": lambda: rows.policy(arguments.name),
            "score": rows.score,
        }[name]()
        print(label, figures, flush=True)
        storage.write_json(f"{arguments.out}/told/{label}.json", figures)


class Rows:
    """The rows of one run."""

    def __init__(self, run: Artefacts, world: World, out: str) -> None:
        self.run, self.world, self.out = run, world, out
        self.asked = task_pairs(world.task)

    def rules(self) -> tuple[str, dict[str, Any]]:
        """SeqRules."""
        world = self.world
        tuned = tune_rules(world.events, world.config.timeline, len(world.items.items), RULE_TRIALS)
        return SEQ_RULES, costs(tuned, self._by_scores(SEQ_RULES, tuned.model.scores))

    def sasrec(self) -> tuple[str, dict[str, Any]]:
        """SASRec on negatives."""
        config, item_count = self.world.config, len(self.world.items.items)
        tuned = tune_sequential(SASREC, self.world.events, config.timeline, item_count, TRIALS, config.seed)
        found = costs(tuned, self._by_scores(SASREC, tuned.model.scores))
        return SASREC, found | {"parameters": tuned.model.parameters}

    def two_tower(self) -> tuple[str, dict[str, Any]]:
        """The head on the served policy."""
        world, name = self.world, "two-tower head"
        tuned, served = two_tower(self.run, world)
        began = time.perf_counter()
        states = served.states(world.events, world.anchors)
        leaves, log_probs = tuned.model.generate(states, LIST)
        speed = len(leaves) / (time.perf_counter() - began)
        candidates = tuned.model.of_leaves(states, world.candidate_leaves)
        self._rank(name, alone(world, Generated(leaves, log_probs, candidates))[1])
        of_pairs = world.catalogue.trie.item_leaves[world.task.pair_items].astype(np.int64)
        told = tuned.model.judge(states, world.task.pair_anchors, np.maximum(of_pairs, 0))
        tell(self.out, name, self.asked, np.where(of_pairs >= 0, told, told.mean()))
        return name, costs(tuned, speed) | {"parameters": tuned.model.parameters}

    def policy(self, name: str) -> tuple[str, dict[str, Any]]:
        """The policy before GRPO by itself."""
        engine, world = self._engine("supervised"), self.world
        (spec,) = (one for one in systems(self.run) if one.id == BEFORE)
        row = spec.rows(world)[BEFORE]
        assert isinstance(row.answer, Generated)
        self._rank(name, alone(world, row.answer)[1])
        shown = Shown.of(world, Policy(engine, world.catalogue, world.events, self.run.config))
        said = np.full(len(shown.pairs), -50.0)
        said[shown.known] = shown.judged[LOG_PROB] + shown.judged[VERDICT]
        tell(self.out, name, self.asked, said)
        said[shown.known] = shown.judged[VERDICT]
        tell(self.out, f"{name}, verdict", self.asked, said)
        speed = None if row.users_per_second is None else round(row.users_per_second)
        seconds = {"training_seconds": row.training_seconds, "parameters": row.parameters}
        return name, seconds | {"users_per_second": speed}

    def score(self) -> tuple[str, dict[str, Any]]:
        """The odds of our score, of pairs."""
        score, world = scoring(self.run).score, self.world
        policy = Policy(self._engine("checkpoint"), world.catalogue, world.events, self.run.config)
        shown = Shown.of(world, policy)
        odds = score.counted.odds.of(shown.columns)
        if score.judged is not None:
            odds[shown.known] = score.judged.odds.of(shown.judged)
        tell(self.out, "CoNRec odds", self.asked, odds)
        return "CoNRec odds", {}

    def _engine(self, folder: str) -> TorchEngine:
        with storage.local_folder(self.run["policy"].path(folder)) as local:
            return TorchEngine.load(local, self.world.catalogue.trie)

    def _by_scores(self, name: str, scores: Scores) -> float | None:
        """Answers with a system that scores all items; users a second."""
        row = self.world.by_scores(scores)
        assert isinstance(row.answer, Predictions)
        self._rank(name, row.answer)
        tell(self.out, name, self.asked, self._of_pairs(scores))
        return row.users_per_second

    def _of_pairs(self, scores: Scores) -> np.ndarray:
        """Scores of the asked pairs by a system that scores all items. Shape: (N,)."""
        task, found, block = self.world.task, np.zeros(len(self.asked)), 1024
        for start in range(0, len(self.world.anchors), block):
            of_block = np.flatnonzero((task.pair_anchors >= start) & (task.pair_anchors < start + block))
            if len(of_block):
                histories = self.world.histories.block(start, min(start + block, len(self.world.anchors)))
                found[of_block] = scores(histories)[task.pair_anchors[of_block] - start, task.pair_items[of_block]]
        return found

    def _rank(self, name: str, answer: Predictions) -> None:
        """Writes the lists of the anchors that are measured."""
        world = self.world
        anchors, place = np.nonzero((answer.items >= 0) & world.measured[:, None])
        users, times = world.anchors.users[anchors], world.anchors.times[anchors]
        table = named(world.events.users, users, times, world.items.item_ids, answer.items[anchors, place])
        scores = pa.array(answer.scores[anchors, place].astype(np.float64))
        storage.write_table(table.append_column("score", scores), f"{self.out}/ranked/{name}.parquet")


def costs(tuned: Tuned[Any], speed: float | None) -> dict[str, Any]:
    """What a tuned row is chosen from, and what it took."""
    return {
        "chosen": tuned.chosen.to_json(),
        "training_seconds": round(tuned.training_seconds, 1),
        "users_per_second": None if speed is None else round(speed),
        "trials": [one.to_json() for one in tuned.trials],
    }


if __name__ == "__main__":
    main()
