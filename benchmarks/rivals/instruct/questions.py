"""What TALLRec and InstructRec are asked about films, as one small file that `instruct.py` turns into prompts.

    .venv/bin/python benchmarks/rivals/instruct/questions.py runs/instruct

Every question has a user's last liked and rejected films and up to twenty films that are asked about. Those to learn
from lie at training anchors, windows before the cut; those to answer are the candidates and pairs of `conrec anchors`,
and the pairs of all windows: those at the cut are few on MovieLens. The newest tenth of the anchors to learn from is
held back, to choose by. Writes `questions.npz` and `keys.npz`: whom and what each question is about, which
`measure.py` reads. No outcome after the cut is in either. Takes seconds.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from conrec.config import load_settings
from conrec.evaluation.baselines import Histories
from conrec.evaluation.candidates import candidate_sets
from conrec.evaluation.published import Pairs, shown_pairs
from conrec.evaluation.world import World
from conrec.feedback.anchors import Anchors, training_anchors
from conrec.feedback.events import LIKED, REJECTED, Events
from conrec.feedback.targets import targets
from conrec.ragged import Ragged, places
from conrec.stages.artefacts import Artefacts
from conrec.stages.systems import load_world

HOME = Path(__file__).parents[3]
RECENT = 15
"""Films of each kind in a prompt: the newest."""
ASKED = 20
"""Films of a question at most."""
ANCHORS_PER_USER = 64
HELD = 0.1

Arrays = dict[str, np.ndarray]


def main() -> None:
    """Writes both files into the folder that is named."""
    if len(sys.argv) < 2:
        raise SystemExit("name the folder to write into, then settings as name=value")
    config = load_settings(HOME / "examples" / "movielens" / "conrec.toml", sys.argv[2:])
    world = load_world(Artefacts(config), encoded=False)
    anchors, task = world.anchors.take(np.flatnonzero(world.measured)), world.task
    everyone = shown_pairs(world.events, anchors)
    asked = {
        "candidates": questions(world.events, world.anchors, *task.questions),
        "pairs": questions(world.events, world.anchors, task.pair_anchors, task.pair_items),
        "windows": questions(world.events, anchors, everyone.users, everyone.items),
    }
    titles = pc.replace_substring_regex(world.items.items["text"], r"\. Genres: .*$", "").to_pylist()
    splits = learning(world, config.seed) | asked
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    flat = {f"{split}/{name}": values for split, arrays in splits.items() for name, values in arrays.items()}
    kept: dict[str, Any] = {name: values for name, values in flat.items() if not name.endswith("/anchors")}
    np.savez_compressed(folder / "questions.npz", titles=np.array(titles), **kept)
    keys: dict[str, Any] = {f"{split}/anchors": asked[split]["anchors"] for split in asked}
    np.savez_compressed(folder / "keys.npz", **keys)
    for split, arrays in splits.items():
        print(f"{split}: {len(arrays['asked']):,} questions, {np.count_nonzero(arrays['asked'] >= 0):,} films asked")


def learning(world: World, seed: int) -> dict[str, Arrays]:
    """`judge`: films that a user rejected or liked next; `choose`: the next rejection among others of its day."""
    timeline = world.config.timeline.model_copy(update={"max_anchors_per_user": ANCHORS_PER_USER})
    events, random = world.past, np.random.default_rng(seed)
    anchors = training_anchors(events, timeline)
    pairs = balanced(shown_pairs(events, anchors), random)
    judge = questions(events, anchors, pairs.users, pairs.items, pairs.rejected)
    sets = candidate_sets(events, anchors, targets(events, anchors), seed, ASKED)
    rows, columns = np.nonzero(sets.items >= 0)
    choose = questions(events, anchors, rows, sets.items[rows, columns], columns == sets.answer[rows])
    newest = np.quantile(anchors.times, 1 - HELD)
    found = {}
    for name, arrays in (("judge", judge), ("choose", choose)):
        held = anchors.times[arrays["anchors"]] > newest
        found[name] = {key: values[~held] for key, values in arrays.items()}
        found[f"{name}_held"] = {key: values[held] for key, values in arrays.items()}
    return found


def balanced(pairs: Pairs, random: np.random.Generator) -> Pairs:
    """At most half of ASKED rejected and as many liked pairs of each anchor, drawn at random."""
    order = np.lexsort((random.random(len(pairs.users)), pairs.rejected, pairs.users))
    groups = pairs.users[order].astype(np.int64) * 2 + pairs.rejected[order]
    first = places(np.unique(groups, return_counts=True)[1]) < ASKED // 2
    kept = np.zeros(len(pairs), bool)
    kept[order[first]] = True
    return pairs.where(kept)


def questions(
    events: Events, anchors: Anchors, rows: np.ndarray, items: np.ndarray, answers: np.ndarray | None = None
) -> Arrays:
    """Questions of at most ASKED items each. Shape: rows (N,) positions of anchors and items (N,), answers (N,) bool.

    Returns Q questions, in the order of anchors: anchors (Q,), liked and rejected (Q, RECENT) and asked (Q, ASKED)
    int32 item rows, -1 for padding; answers (Q, ASKED) int8, 1 for what was rejected, -1 where nothing is told.
    """
    order = np.argsort(rows, kind="stable")
    rows, items = rows[order].astype(np.int64), items[order]
    place = places(np.bincount(rows, minlength=len(anchors)))
    first = place % ASKED == 0
    owners, lengths = rows[first], np.diff(np.append(np.flatnonzero(first), len(rows)))
    histories = Histories.at(events, anchors.take(owners))
    found = {
        "anchors": owners,
        "liked": recent(histories, LIKED),
        "rejected": recent(histories, REJECTED),
        "asked": Ragged.from_lengths(items.astype(np.int32), lengths).padded(-1),
    }
    if answers is not None:
        found["answers"] = Ragged.from_lengths(answers[order].astype(np.int8), lengths).padded(-1)
    return found


def recent(histories: Histories, kind: int) -> np.ndarray:
    """The newest items of a kind in each history, oldest first, -1 in front. Shape: (A, RECENT) int32."""
    chosen = histories.kinds == kind
    rows, values = histories.items.rows[chosen], histories.items.values[chosen]
    lengths = np.bincount(rows, minlength=len(histories))
    back = np.repeat(lengths, lengths) - places(lengths)
    new = back <= RECENT
    found = np.full((len(histories), RECENT), -1, np.int32)
    found[rows[new], RECENT - back[new]] = values[new]
    return found


if __name__ == "__main__":
    main()
