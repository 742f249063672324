"""What a system of an evaluation says of every anchor, and what it cost: a row of the table to be, kept as a file.

    table, figures = kept(rows, "floors")       # predictions.parquet, and what its manifest says
    rows = kept_rows(table, figures, "floors")

Invariant: rows come back from their file as they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa

from conrec.evaluation.tuning import TrialResult

LIST = 100
"""Items of a list, and beams of a policy at least: what a threshold of one for all users chooses from."""
_SEVERAL = "floors"
"""Where the figures of a file say what those of each row are, if it holds several."""


@dataclass(frozen=True)
class Predictions:
    """Items of each anchor with the scores that order them.

    Shape: items (A, LIST) int32 item rows, best first, -1 padding; scores (A, LIST) float32, -inf there; candidates
    (A, C) float32 score of each candidate, NaN where undefined.
    """

    items: np.ndarray
    scores: np.ndarray
    candidates: np.ndarray

    @classmethod
    def empty(cls, anchors: int, candidates: int) -> Predictions:
        """Nothing listed yet."""
        return cls(
            np.full((anchors, LIST), -1, np.int32),
            np.full((anchors, LIST), -np.inf, np.float32),
            np.full((anchors, candidates), np.nan, np.float32),
        )


@dataclass(frozen=True)
class Generated:
    """Semantic IDs of each anchor, with what the system says of them and of the IDs of the candidates.

    Shape: leaves (A, W) int64 and log_probs (A, W) float32, the most probable first; candidates (A, C) float32
    log-probabilities; verdicts (A, W) and candidate_verdicts (A, C) float32 log-odds, of a policy that was taught to
    judge; choice (A, C) float32 where the candidates stand in the prompt, of one that knows how a question is answered.
    """

    leaves: np.ndarray
    log_probs: np.ndarray
    candidates: np.ndarray
    verdicts: np.ndarray | None = None
    candidate_verdicts: np.ndarray | None = None
    choice: np.ndarray | None = None


@dataclass(frozen=True)
class Row:
    """What a system says, and what it cost; None where there is nothing to say."""

    answer: Predictions | Generated
    training_seconds: float | None = None
    parameters: int | None = None
    users_per_second: float | None = None
    trials: tuple[TrialResult, ...] | None = None
    """What it was chosen from."""
    alignment_accuracy: dict[str, float] | None = None
    """Phase of its training -> share of held-out alignment questions answered right after it."""
    verdict_auc: dict[str, float] | None = None
    """Phase -> AUC of the verdict on the validation anchors' pairs after it."""
    stages: list[dict[str, Any]] | None = None
    """What was decided over its stages of GRPO."""
    note: str | None = None
    """What a reader of the row must know, in one sentence."""

    @property
    def figures(self) -> dict[str, Any]:
        """What its manifest says: all but the arrays."""
        found = {name: value for name, value in vars(self).items() if name != "answer" and value is not None}
        return found | {"trials": [one.to_json() for one in self.trials]} if self.trials is not None else found

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray], figures: Mapping[str, Any]) -> Row:
        """From its arrays by name, and what the manifest says."""
        answer = Generated(**arrays) if "leaves" in arrays else Predictions(**arrays)
        known = {field.name: figures.get(field.name) for field in fields(cls) if field.name not in ("answer", "trials")}
        tried = figures.get("trials")
        return cls(answer, **known, trials=None if tried is None else tuple(map(TrialResult.from_json, tried)))


def kept(rows: Mapping[str, Row], name: str) -> tuple[pa.Table, dict[str, Any]]:
    """The file of the row of that name, or of several rows that are made at once, and its figures."""
    if rows.keys() == {name}:
        return pa.table(_columns(rows[name].answer)), rows[name].figures
    columns = {f"{one}/{key}": column for one, row in rows.items() for key, column in _columns(row.answer).items()}
    return pa.table(columns), {_SEVERAL: {one: row.figures for one, row in rows.items()}}


def kept_rows(table: pa.Table, figures: Mapping[str, Any], name: str) -> dict[str, Row]:
    """What `kept` was given."""
    arrays = _arrays(table)
    if _SEVERAL not in figures:
        return {name: Row.of(arrays, figures)}
    found = {}
    for one, own in figures[_SEVERAL].items():
        prefix = f"{one}/"
        answer = {key.removeprefix(prefix): values for key, values in arrays.items() if key.startswith(prefix)}
        found[one] = Row.of(answer, own)
    return found


def _columns(answer: Predictions | Generated) -> dict[str, pa.Array]:
    return {
        name: pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
        for name, values in vars(answer).items()
        if values is not None
    }


def _arrays(table: pa.Table) -> dict[str, np.ndarray]:
    return {
        name: table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(table.num_rows, -1)
        for name in table.column_names
    }
