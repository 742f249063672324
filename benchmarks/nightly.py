"""What a second night costs when 5 % of the users did something since the first: all others keep their generated rows.

    .venv/bin/python benchmarks/nightly.py                                  # 1,000 users, the engine of the example
    .venv/bin/python benchmarks/nightly.py generate.max_users=4000 generate.engine=torch

Three nights with a policy of the example's size that has learnt nothing, since what it costs to ask it is the same;
each is the real command in a process of its own. The first stands a day before the end of the example's log. Of the
last day the second one sees what 5 % of the served users did, and which items came and went: it goes on from the first,
the full one is of the same log and items in a root without it. What both publish is compared row by row; they differ
where an ID has gone, since the full night then generates others in its place.

Beside it, of two real days of the log: how many users keep their prompt, and how many semantic IDs come and go, since
when rows are kept for `generate.keep_days` only. Arguments are settings; adds a row for the engine and the number of
users to benchmarks/nightly.json.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from conrec import storage
from conrec.blocklist.asking import liked_ids
from conrec.blocklist.kept import row_digests
from conrec.catalogue.trie import Trie
from conrec.config import DAY_US, Config, load_settings
from conrec.feedback.anchors import served_anchors
from conrec.feedback.labels import read_interactions, read_items
from conrec.policy.model import build_model, save_checkpoint
from conrec.policy.prompts import build_prompts
from conrec.settings_text import to_toml
from conrec.stages.artefacts import Artefacts
from conrec.stages.inputs import blocklists_url, read_events
from conrec.stages.new_items import load_catalogue
from conrec.stages.night_prompts import load_vocabulary
from conrec.stages.policies import serving
from conrec.stages.run import run_stage
from conrec.stages.scoring import scoring
from conrec.stages.simulate import items_at, snapshot
from conrec.stages.train import make_earlier_catalogue, write_rows
from conrec.tables import INTERACTIONS

HOME = Path(__file__).parents[1]
RESULTS = HOME / "benchmarks" / "nightly.json"
ACTIVE_SHARE = 0.05


def main() -> None:
    """Runs the nights and writes the JSON."""
    given = load_settings(
        HOME / "examples" / "kuairand" / "conrec.toml", ["root=runs/nightly-benchmark", *sys.argv[1:]]
    )
    log = read_interactions(given.interactions).select(INTERACTIONS.names)
    items, last_us = read_items(given.items), _last_us(log)
    first_us = last_us - DAY_US
    before, after = (items_at(items, log, first_us, time_us) for time_us in (first_us, last_us))
    first = snapshot(given, log, before, first_us)
    prepare(first)
    for folder in ("nightly", "blocklists"):
        storage.remove(storage.join(given.root, folder))
    other = given.model_copy(update={"root": f"{given.root}-full"})
    storage.remove(other.root)
    shutil.copytree(given.root, other.root)
    rows = {"first": night(first)}
    served = storage.read_table(storage.join(rows["first"].pop("url"), "prompts"))["user_id"]
    later = of_few(log, first_us, served, given.seed)
    nights = [snapshot(config, later, after, last_us) for config in (given, other)]
    rows |= {"second": night(nights[0]), "full": night(nights[1])}
    published = [_rows(nights[number], rows[name]) for number, name in enumerate(("second", "full"))]
    measured = {name: {key: value for key, value in row.items() if key != "url"} for name, row in rows.items()}
    document = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"nights": {}}
    document["nights"][f"{given.generate.engine}, {len(served)} users"] = {
        **measured,
        "items": {"before": len(before), "new": _without(after, before), "gone": _without(before, after)},
        **ratios(measured),
        "published": compared(*published),
    }
    document["real_day"] = real_day(snapshot(given, log, items, last_us), log, items, last_us)
    RESULTS.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document, indent=2))


def prepare(config: Config) -> None:
    """Catalogue, a policy before its training, and the calibration, which the first night would make."""
    run_stage("catalogue", config)
    make_earlier_catalogue(Artefacts(config))
    model, tokenizer, _ = build_model(config, load_catalogue(Artefacts(config)).items["text"].to_pylist())
    for artefact in (Artefacts(config)["validated"], Artefacts(config)["policy"]):
        if artefact.read() is None:
            save_checkpoint(model, tokenizer, Path(artefact.path("checkpoint")))
            write_rows([], artefact)
            artefact.finish({"training_seconds": {}, "stages": []}, 0.0)
    scoring(serving(Artefacts(config)))


def of_few(log: pa.Table, first_us: int, served: pa.ChunkedArray, seed: int) -> pa.Table:
    """The log, after a moment only of 5 % of the served users, drawn among those that did something then."""
    late = pc.greater(log["timestamp"].cast(pa.int64()), first_us)
    active = pc.unique(log.filter(pc.and_(late, pc.is_in(log["user_id"], value_set=served)))["user_id"]).sort()
    few = np.random.default_rng(seed).permutation(active.to_numpy(zero_copy_only=False))
    few = few[: round(ACTIVE_SHARE * len(served))]
    return log.filter(pc.or_(pc.invert(late), pc.is_in(log["user_id"], value_set=pa.array(few))))


def night(config: Config) -> dict[str, Any]:
    """`conrec nightly` in a process of its own: counts, and seconds of its parts."""
    file = Path(f"{config.root}.toml")
    file.write_text(to_toml(config))
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "conrec.cli", "nightly", "--config", str(file)], cwd=HOME, check=True)
    wall = time.perf_counter() - began
    artefact = serving(Artefacts(config))["nightly"]
    manifest = artefact.require()
    figures = manifest["figures"]
    return {
        "url": artefact.url,
        "version": figures["version"],
        "users": figures["users"],
        "kept": figures["kept"],
        "generated": figures["generated"],
        # The engine's start and the users; the stage; the command.
        "generation": figures["generation_seconds"],
        "stage": manifest["seconds"],
        "wall": round(wall, 1),
    }


def ratios(rows: dict[str, Any]) -> dict[str, Any]:
    """The second night over the full one, part by part; and of the generation what is the engine's start."""
    second, full = rows["second"], rows["full"]
    each = (full["generation"] - second["generation"]) / (full["generated"] - second["generated"])
    return {
        "second_over_full": {part: round(second[part] / full[part], 3) for part in ("generation", "stage", "wall")},
        "engine_start": round(second["generation"] - each * second["generated"], 1),
        "users_a_second_after_it": round(1 / each, 1),
    }


def compared(second: pa.Table, full: pa.Table) -> dict[str, Any]:
    """Rows that only one of the two has, and the largest difference of a score."""
    keys = ["user_id", "item_id", "reason", "demotes_at", "expires_at"]
    both = second.select([*keys, "score"]).join(full.select([*keys, "score"]), keys, right_suffix="_full")
    both = both.filter(pc.is_valid(both["score_full"]))
    return {
        "rows": len(full),
        "rows_of_one_alone": len(second) + len(full) - 2 * len(both),
        "largest_difference_of_a_score": pc.max(pc.abs(pc.subtract(both["score"], both["score_full"]))).as_py(),
    }


def real_day(config: Config, log: pa.Table, items: pa.Table, last_us: int) -> dict[str, Any]:
    """Of the last day of the log: the share of users whose prompt and likes stay, and what comes and goes."""
    run = serving(Artefacts(config))
    catalogue = load_catalogue(run, last_us)
    vocabulary = load_vocabulary(run["policy"].path("checkpoint"), catalogue)
    events = read_events(config, catalogue.item_ids)
    found = []
    for time_us in (last_us - DAY_US, last_us):
        anchors = served_anchors(events, time_us, config.guardrails.min_negatives, config.guardrails.min_history)
        prompts = build_prompts(events, anchors, catalogue.semantic_ids, vocabulary, config.prompt)
        digests = row_digests({}, prompts, liked_ids(catalogue.semantic_ids, events, anchors))
        there = pc.is_in(
            catalogue.items["item_id"],
            value_set=items_at(items, log, last_us - DAY_US, time_us)["item_id"].combine_chunks(),
        )
        trie = Trie.of_live(catalogue.semantic_ids, catalogue.codebook.codes, np.asarray(there))
        found.append((dict(zip(anchors.users.tolist(), digests.tolist(), strict=True)), trie))
    (before, old), (today, new) = found
    kept = sum(before.get(user) == digest for user, digest in today.items())
    return {
        "users": len(today),
        "share_with_the_same_prompt": round(kept / len(today), 4),
        "semantic_ids": len(new),
        "new_semantic_ids": int((old.find(new.semantic_ids) < 0).sum()),
        "semantic_ids_that_went": int((new.find(old.semantic_ids) < 0).sum()),
    }


def _rows(config: Config, row: dict[str, Any]) -> pa.Table:
    return storage.read_table(storage.join(blocklists_url(config), "versions", row["version"], "data"))


def _without(items: pa.Table, others: pa.Table) -> int:
    """How many items are not among the others."""
    return len(items) - int(pc.sum(pc.is_in(items["item_id"], value_set=others["item_id"])).as_py())


def _last_us(log: pa.Table) -> int:
    return int(pc.max(log["timestamp"]).cast(pa.int64()).as_py())


if __name__ == "__main__":
    os.environ.setdefault("RAY_worker_niceness", "0")
    main()
