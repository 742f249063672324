"""A batch of prompts -> a row a user, whatever happens to one of them.

    require_finite(engine, checkpoint_url)           # before the first batch
    rows = generate_batch(engine, batch, width)      # PROMPTS -> GENERATED

Where an engine fails on a batch, the batch is halved until the user is found on whom it fails: that user's row says so,
and the others get their IDs. An error is put down to users only while the engine still answers a prompt that it has
answered before; else it is gone, and all of the batch is for another engine. An engine whose model is cut is never
halved for: out of memory, it is gone (`conrec.blocklist.cut_engine.EngineFullError`).
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from conrec.blocklist.engines import Engine
from conrec.blocklist.vllm_model import EngineGoneError
from conrec.errors import ArtefactError, ConrecError
from conrec.ragged import Ragged
from conrec.tables import GENERATED

ERROR_CHARACTERS = 200
"""Of what an engine says, kept in the row of its user."""


def judged_beams(
    engine: Engine, prompts: Ragged, excluded: Ragged, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The beams of each prompt less the excluded leaves, best first, and the verdicts on them.

    Shape: B rows of prompts and of excluded leaves -> leaves (B, width) int64, log-probabilities and verdicts
    (B, width) float32; -1, -inf and 0 behind the last leaf of a row.
    """
    leaves, log_probs, verdicts = engine.generate_and_judge(prompts, width)
    refused = _refused(leaves, excluded)
    columns = ((leaves, -1), (log_probs, -np.inf), (verdicts, 0))
    order = np.argsort(refused, axis=1, kind="stable")
    ordered = [np.take_along_axis(np.where(refused, padding, values), order, 1) for values, padding in columns]
    return ordered[0], ordered[1].astype(np.float32), ordered[2].astype(np.float32)


def _refused(leaves: np.ndarray, excluded: Ragged) -> np.ndarray:
    """Which leaves are padding or excluded in their row. Shape: (B, W), B rows of excluded leaves -> (B, W) bool."""
    largest = max(int(leaves.max(initial=0)), int(excluded.values.max(initial=0))) + 1
    row = np.arange(len(leaves))[:, None]
    return (leaves < 0) | np.isin(row * largest + leaves, excluded.rows * largest + excluded.values)


def generate_batch(engine: Engine, batch: pa.Table, width: int) -> pa.Table:
    """Rows of PROMPTS -> rows of GENERATED. A user without an answer has an `error` and no leaves: the engine cannot
    take the prompt, failed on it, or gave numbers that are not finite.

    Raises `EngineGoneError` where the engine is gone.
    """
    prompts = Ragged.from_arrow(batch["prompt"])
    too_long = prompts.lengths > engine.longest_prompt
    errors = np.full(len(prompts), None, object)
    errors[too_long] = [
        f"prompt of {length} tokens, the engine takes {engine.longest_prompt}" for length in prompts.lengths[too_long]
    ]
    errors[prompts.lengths == 0] = "empty prompt"
    valid = np.flatnonzero(errors == None)  # noqa: E711 - of each element
    excluded = Ragged.from_arrow(batch["excluded_leaves"]).take(valid)
    leaves, log_probs, verdicts, errors[valid] = _answers(engine, prompts.take(valid), excluded, width)
    real = leaves >= 0
    lengths = np.zeros(len(prompts), np.int64)
    lengths[valid] = real.sum(1)
    columns = {
        "user_id": batch["user_id"],
        "leaves": Ragged.from_lengths(leaves[real].astype(np.int32), lengths).to_arrow(),
        "log_probs": Ragged.from_lengths(log_probs[real], lengths).to_arrow(),
        "verdicts": Ragged.from_lengths(verdicts[real], lengths).to_arrow(),
        "error": pa.array(errors, pa.string()),
        "digest": batch["digest"],
    }
    return pa.table([columns[field.name] for field in GENERATED], names=GENERATED.names).cast(GENERATED)


def _answers(
    engine: Engine, prompts: Ragged, excluded: Ragged, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """`judged_beams`, and why a user has none. Shape: (B, width) three times, errors (B,) of str or None."""
    try:
        leaves, log_probs, verdicts = judged_beams(engine, prompts, excluded, width)
    except (ConrecError, EngineGoneError):
        raise  # nobody's prompt
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    else:
        broken = ((leaves >= 0) & ~(np.isfinite(log_probs) & np.isfinite(verdicts))).any(1)
        leaves[broken] = -1
        errors = np.full(len(prompts), None, object)
        errors[broken] = "the engine's numbers are not finite"
        return leaves, log_probs, verdicts, errors
    # Not before the exception is gone: it holds what was computed of this batch, on a device that may be full of it.
    if not _is_finite(engine):
        raise EngineGoneError(failure)
    if len(prompts) > 1:
        halves = np.array_split(np.arange(len(prompts)), 2)
        parts = [_answers(engine, prompts.take(rows), excluded.take(rows), width) for rows in halves]
        return tuple(np.concatenate(columns) for columns in zip(*parts, strict=True))  # type: ignore[return-value]
    leaves, log_probs = np.full((1, width), -1), np.full((1, width), -np.inf, np.float32)
    return leaves, log_probs, np.zeros((1, width), np.float32), np.array([failure[:ERROR_CHARACTERS]], object)


def require_finite(engine: Engine, checkpoint_url: str) -> None:
    """One prompt through the whole engine. Raises `ArtefactError` where what comes out is no number."""
    if not _is_finite(engine, strict=True):
        raise ArtefactError(
            f"{checkpoint_url}: these weights give no finite number for an empty history: the training diverged, or "
            "the file is damaged; lower supervised.learning_rate or grpo.learning_rate and run conrec train, bring the "
            "file back, or serve an earlier policy: policy.version"
        )


def _is_finite(engine: Engine, strict: bool = False) -> bool:
    """Whether the engine answers a prompt without a history; with `strict` an exception is raised on."""
    prompt = Ragged.from_lengths(np.array([engine.vocabulary.begin], np.int32), np.ones(1, np.int64))
    try:
        leaves, log_probs, verdicts = engine.generate_and_judge(prompt, 1)
    except Exception:
        if strict:
            raise
        return False
    return bool(leaves[0, 0] >= 0 and np.isfinite(log_probs[0, 0]) and np.isfinite(verdicts[0, 0]))
