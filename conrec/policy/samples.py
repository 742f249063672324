"""What training reads: token sequences of the supervised tasks, GRPO samples of each stage, validation anchors and
what they rejected and liked later.

`TrainingData.save` leaves one Parquet file a table, so that workers on other machines read the same rows.

    data.save(url); data = TrainingData.load(url)
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from conrec import storage
from conrec.policy.tasks import OPTIONS, Examples
from conrec.ragged import Ragged


@dataclass(frozen=True)
class GrpoSamples:
    """One prompt and its targets a row; leaves of the trie stand for semantic IDs.

    Shape: S rows each; truth_weights has the layout of ground_truth (1 observed, less for Swing neighbours).
    """

    prompts: Ragged
    ground_truth: Ragged
    truth_weights: np.ndarray
    positives: Ragged

    def take(self, rows: np.ndarray) -> GrpoSamples:
        """The samples at the given positions."""
        return GrpoSamples(
            self.prompts.take(rows),
            self.ground_truth.take(rows),
            Ragged(self.truth_weights, self.ground_truth.offsets).take(rows).values,
            self.positives.take(rows),
        )


@dataclass(frozen=True)
class HeldOutQuestions:
    """Alignment questions that train nothing. Shape: prompts Q rows, options (Q, 4) leaves, answer (Q,) column."""

    prompts: Ragged
    options: np.ndarray
    answer: np.ndarray


@dataclass(frozen=True)
class JudgedPairs:
    """What each validation anchor rejected or liked later, new to its user: what a verdict must tell apart.

    Shape: leaves A rows of N values in all, rejected (N,) bool beside them.
    """

    leaves: Ragged
    rejected: np.ndarray

    def auc(self, verdicts: np.ndarray) -> float | None:
        """Share of rejected and liked pairs of which the rejected one has the larger verdict; equal ones count half.

        Shape: verdicts (N,). None where nothing was rejected, or nothing liked; NaN where a verdict is.
        """
        rejected, liked = verdicts[self.rejected], np.sort(verdicts[~self.rejected])
        if not len(rejected) or not len(liked):
            return None
        if np.isnan(verdicts).any():
            return float("nan")
        smaller = sum(np.searchsorted(liked, rejected, side).sum() for side in ("left", "right")) / 2
        return float(smaller / (len(rejected) * len(liked)))


@dataclass(frozen=True)
class TrainingData:
    """All of it; `stages` and `tasks` by name.

    Shape: validation A rows, the prompts of the validation anchors; validation_users (A,) int; pairs A rows.
    """

    tasks: dict[str, Examples]
    stages: dict[str, GrpoSamples]
    questions: HeldOutQuestions
    validation: Ragged
    validation_users: np.ndarray
    pairs: JudgedPairs

    @property
    def longest(self) -> int:
        """Tokens of the longest row that a step may hold."""
        tokens = [examples.tokens for examples in self.tasks.values()]
        rows = tokens + [samples.prompts for samples in self.stages.values()]
        return max((int(one.lengths.max(initial=0)) for one in rows), default=0)

    def save(self, url: str) -> None:
        """Writes `<url>/<table>.parquet` and, last, `<url>/tables.json`."""
        tables = {f"task-{name}": _examples_table(examples) for name, examples in self.tasks.items()}
        tables |= {f"stage-{name}": _samples_table(samples) for name, samples in self.stages.items()}
        tables["questions"] = pa.table(
            {
                "prompt": self.questions.prompts.to_arrow(),
                "options": pa.FixedSizeListArray.from_arrays(
                    pa.array(self.questions.options.ravel()), self.questions.options.shape[1]
                ),
                "answer": self.questions.answer,
            }
        )
        rejected = Ragged(self.pairs.rejected, self.pairs.leaves.offsets)
        tables["validation"] = pa.table(
            {
                "prompt": self.validation.to_arrow(),
                "user": self.validation_users,
                "leaves": self.pairs.leaves.to_arrow(),
                "rejected": rejected.to_arrow(),
            }
        )
        for name, table in tables.items():
            storage.write_table(table, storage.join(url, f"{name}.parquet"))
        names = {"tasks": list(self.tasks), "stages": list(self.stages)}
        storage.write_bytes(storage.join(url, "tables.json"), json.dumps(names).encode())

    @classmethod
    def load(cls, url: str) -> TrainingData:
        """Reads what `save` wrote."""

        def read(name: str) -> pa.Table:
            return storage.read_table(storage.join(url, f"{name}.parquet"))

        names = storage.read_json(storage.join(url, "tables.json"))
        questions, validation = read("questions"), read("validation")
        return cls(
            {name: _examples(read(f"task-{name}")) for name in names["tasks"]},
            {name: _samples(read(f"stage-{name}")) for name in names["stages"]},
            HeldOutQuestions(
                Ragged.from_arrow(questions["prompt"]),
                # Not -1: it is unknown of no questions.
                questions["options"].combine_chunks().flatten().to_numpy().reshape(-1, OPTIONS),
                questions["answer"].to_numpy(),
            ),
            Ragged.from_arrow(validation["prompt"]),
            validation["user"].to_numpy(),
            JudgedPairs(Ragged.from_arrow(validation["leaves"]), Ragged.from_arrow(validation["rejected"]).values),
        )


def _examples_table(examples: Examples) -> pa.Table:
    is_target = Ragged(examples.is_target, examples.tokens.offsets)
    return pa.table({"tokens": examples.tokens.to_arrow(), "is_target": is_target.to_arrow()})


def _examples(table: pa.Table) -> Examples:
    return Examples(Ragged.from_arrow(table["tokens"]), Ragged.from_arrow(table["is_target"]).values)


def _samples_table(samples: GrpoSamples) -> pa.Table:
    weights = Ragged(samples.truth_weights, samples.ground_truth.offsets)
    return pa.table(
        {
            "prompt": samples.prompts.to_arrow(),
            "ground_truth": samples.ground_truth.to_arrow(),
            "truth_weights": weights.to_arrow(),
            "positives": samples.positives.to_arrow(),
        }
    )


def _samples(table: pa.Table) -> GrpoSamples:
    return GrpoSamples(
        Ragged.from_arrow(table["prompt"]),
        Ragged.from_arrow(table["ground_truth"]),
        Ragged.from_arrow(table["truth_weights"]).values,
        Ragged.from_arrow(table["positives"]),
    )
