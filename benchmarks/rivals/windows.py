"""What systems say of every window of an evaluation: the candidates, and all pairs that were then rejected or liked.

    windows = Windows.of(world)
    figures = windows.figures(candidate_scores, pair_scores)
    counted = Counted.of(windows)       # what trees, and our score, learn from and are asked

`conrec evaluate` asks for pairs of a night at the cut, of which MovieLens has few; here the pairs of all anchors count.
Short histories, the shortest quarter of the anchors, are told apart: there a model that knew something before has most
to say. Intervals by user.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from conrec.blocklist.counts import Counts, things_of
from conrec.blocklist.score import VERDICT, fit_linear
from conrec.evaluation.baselines import Histories, fit_floors, item_scores
from conrec.evaluation.candidates import accuracy
from conrec.evaluation.metrics import summarise
from conrec.evaluation.published import Pairs, auc, paired, shown_pairs, within_user_auc
from conrec.evaluation.published_lists import tree_columns
from conrec.evaluation.trees import fit_trees
from conrec.evaluation.tuning import tuning_anchors
from conrec.evaluation.world import World
from conrec.feedback.anchors import Anchors
from conrec.feedback.events import Events
from conrec.feedback.swing import swing_neighbours
from conrec.ragged import Ragged
from conrec.report.table import number

MANY = 10
"""Candidates from which a set leaves a choice."""
COLUMNS = {
    "picked": "candidate accuracy",
    "picked_of_many": f"of {MANY} or more",
    "picked_short": "short histories",
    "auc": "AUC",
    "auc_short": "short histories",
    "within_user_auc": "within-user AUC",
}
LINE = "line through the counts"


@dataclass(frozen=True)
class Windows:
    """The measured anchors (M,) of a world, which of them have short histories, and the pairs of their windows."""

    world: World
    places: np.ndarray
    anchors: Anchors
    short: np.ndarray
    pairs: Pairs

    @classmethod
    def of(cls, world: World) -> Windows:
        """Of the measured anchors."""
        places = np.flatnonzero(world.measured)
        anchors = world.anchors.take(places)
        lengths = anchors.ends - anchors.starts
        return cls(world, places, anchors, lengths <= np.quantile(lengths, 0.25), shown_pairs(world.events, anchors))

    def figures(self, candidates: np.ndarray | None, pairs: np.ndarray | None) -> dict[str, Any]:
        """Of scores of the candidates, and of the pairs. Shape: candidates (A, C) as in the world, pairs (N,)."""
        seed, resamples = self.world.config.seed, self.world.config.evaluation.resamples
        found: dict[str, Any] = {}
        if candidates is not None:
            right = accuracy(candidates, self.world.candidates)[self.places]
            many = (self.world.candidates.items[self.places] >= 0).sum(axis=1) >= MANY
            parts = {"picked": np.isfinite(right), "picked_of_many": many, "picked_short": self.short}
            values = {name: np.where(part, right, np.nan) for name, part in parts.items()}
            found |= summarise(values, self.anchors.users, resamples, seed)
        if pairs is not None:
            short = self.short[self.pairs.users]
            found["auc"] = auc(pairs, self.pairs, resamples=resamples, seed=seed)
            found["auc_short"] = auc(pairs[short], self.pairs.where(short), resamples=resamples, seed=seed)
            found["within_user_auc"] = within_user_auc(pairs, self.pairs, resamples=resamples, seed=seed)
        return found

    def above(self, scores: np.ndarray, others: np.ndarray) -> dict[str, dict[str, Any]]:
        """How far the areas of scores (N,) of the pairs lie above those of others: of all, and of short histories."""
        config, few = self.world.config, self.short[self.pairs.users]
        found = {}
        for name, chosen in (("all", np.ones(len(few), bool)), ("short histories", few)):
            pairs, resamples = self.pairs.where(chosen), config.evaluation.resamples
            pair = paired(scores[chosen], others[chosen], pairs, resamples=resamples, seed=config.seed)
            found[name] = {"auc": pair.auc_difference, "within_user_auc": pair.within_user_auc_difference}
        return found

    def floors(self) -> dict[str, dict[str, Any]]:
        """The figures of every floor, and of chance."""
        world, count = self.world, len(self.world.items.items)
        neighbours = swing_neighbours(world.past, count, world.config.swing, world.config.seed)
        histories = Histories.at(world.events, self.anchors)
        rows = {"chance": self.figures(np.zeros(world.candidates.items.shape), np.zeros(len(self.pairs)))}
        asked = self.asked()
        categories = world.items.categories
        for floor in fit_floors(
            world.events, world.config.timeline.cut_us, count, categories, neighbours, world.config.seed
        ):
            candidates = item_scores(floor.scores, world.histories, world.candidates.items)
            rows[floor.name] = self.figures(candidates, item_scores(floor.scores, histories, asked)[asked >= 0])
        return rows

    def asked(self) -> np.ndarray:
        """The items of the pairs of each anchor, -1 for padding. Shape: (M, P) int32."""
        return Ragged.from_rows(self.pairs.users, self.pairs.items, len(self.anchors)).padded(-1)

    def facts(self) -> dict[str, Any]:
        """What the figures are counted from."""
        lengths = self.anchors.ends - self.anchors.starts
        return {
            "anchors": len(self.anchors),
            "users": len(np.unique(self.anchors.users)),
            "short_histories": int(self.short.sum()),
            "short_history_events": int(lengths[self.short].max()),
            "rejected_pairs": int(self.pairs.rejected.sum()),
            "liked_pairs": int((~self.pairs.rejected).sum()),
        }


@dataclass(frozen=True)
class Counted:
    """What is counted of users, items and both, of the pairs of the weekly windows between the validation time and the
    cut, as it is known at that time, and of the windows after the cut: what learns of the first is asked the second."""

    windows: Windows
    events: Events
    anchors: Anchors
    pairs: Pairs
    names: tuple[str, ...]
    fitted: dict[str, np.ndarray]
    asked: dict[str, np.ndarray]

    @classmethod
    def of(cls, windows: Windows) -> Counted:
        """Of the windows after the cut."""
        world, timeline = windows.world, windows.world.config.timeline
        known = world.events.before(timeline.cut_us)
        anchors = tuning_anchors(known, timeline)
        pairs = shown_pairs(known, anchors)
        before = Counts.at(known, timeline.validation_us, things_of(world.catalogue))
        names = tree_columns(before)
        fitted = columns_of(before, known, anchors, pairs, names)
        asked = columns_of(world.counts(timeline.cut_us), world.events, windows.anchors, windows.pairs, names)
        return cls(windows, known, anchors, pairs, before.odds_names, fitted, asked)

    def trees(self) -> np.ndarray:
        """Boosted trees, tuned as in an evaluation. Shape: (N,)."""
        rows, users = np.stack(list(self.fitted.values()), axis=1), self.anchors.users[self.pairs.users]
        trees = fit_trees(rows, tuple(self.fitted), self.pairs.rejected, users, self.windows.world.config.seed)
        return trees.scores(np.stack(list(self.asked.values()), axis=1))

    def line(self, verdicts: tuple[np.ndarray, np.ndarray] | None = None) -> np.ndarray:
        """The line of our score, with a policy's verdicts on both kinds of pairs. Shape: (N,)."""
        fitted, asked, names = dict(self.fitted), dict(self.asked), self.names
        if verdicts is not None:
            fitted[VERDICT], asked[VERDICT] = verdicts
            names = (*names, VERDICT)
        return fit_linear(fitted, names, self.pairs.rejected).of(asked)


def columns_of(
    counts: Counts, events: Events, anchors: Anchors, pairs: Pairs, names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Of each pair at its anchor's moment; of things as `counts` has it. Name -> (N,) float32."""
    columns = {name: np.zeros(len(pairs), np.float32) for name in names}
    moments = anchors.times[pairs.users]
    for time_us in np.unique(moments):
        of_moment = moments == time_us
        users, items = anchors.users[pairs.users[of_moment]], pairs.items[of_moment]
        found = counts.later(events, int(time_us)).columns(users, items)
        for name, values in columns.items():
            values[of_moment] = found[name]
    return columns


def table(rows: Mapping[str, Mapping[str, Any]], columns: Mapping[str, str] = COLUMNS) -> str:
    """Markdown, a row a system."""
    lines = [f"| system | {' | '.join(columns.values())} |", f"| --- |{' ---: |' * len(columns)}"]
    for name, figures in rows.items():
        cells = (_cell(figures.get(column)) for column in columns)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(figure: Mapping[str, float] | None) -> str:
    if figure is None or not np.isfinite(figure["value"]):
        return "–"
    return f"{number(figure['value'])} [{number(figure['low'])}, {number(figure['high'])}]"
