"""What systems say of every window of an evaluation: the candidates, and all pairs that were then rejected or liked.

    windows = Windows.of(world)
    figures = windows.figures(candidate_scores, pair_scores)

`conrec evaluate` asks for pairs of a night at the cut, of which MovieLens has few; here the pairs of all anchors count.
Short histories, the shortest quarter of the anchors, are told apart: there a model that knew something before has most
to say. Intervals by user.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from conrec.evaluation.baselines import Histories, fit_floors, item_scores
from conrec.evaluation.candidates import accuracy
from conrec.evaluation.metrics import summarise
from conrec.evaluation.published import Pairs, auc, shown_pairs, within_user_auc
from conrec.evaluation.world import World
from conrec.feedback.anchors import Anchors
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
