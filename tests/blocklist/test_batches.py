"""A batch in which something fails: whose row says so, and what the others get. The engine is a table, known at a
glance; test_generate.py asks the real ones."""

from types import SimpleNamespace
from weakref import WeakSet

import numpy as np
import pyarrow as pa
import pytest
import torch

from conrec import storage
from conrec.blocklist.batches import generate_batch, require_finite
from conrec.blocklist.generate import _Finished
from conrec.blocklist.vllm_model import EngineGoneError
from conrec.errors import ArtefactError, ConfigError
from conrec.tables import GENERATED, PROMPTS

BAD, WIDTH, USERS = 66, 3, 13


class Table:
    """An engine whose beams are the prompt's first token, that and one, that and two; it fails as it is told."""

    longest_prompt = 4
    vocabulary = SimpleNamespace(begin=0)

    def __init__(self, error=None, alive=True, verdict=0.5):
        self.error = error or ValueError("token 66 is out of vocabulary")
        self.alive, self.verdict, self.calls = alive, verdict, 0

    def generate_and_judge(self, prompts, width):
        self.calls += 1
        if BAD in prompts.values:
            self.alive = self.alive and not isinstance(self.error, MemoryError)
            raise self.error
        if not self.alive:
            raise RuntimeError("CUDA error: unspecified launch failure")
        first = prompts.values[prompts.offsets[:-1]]
        leaves = first[:, None].astype(np.int64) + np.arange(width)
        verdicts = np.where(leaves == BAD + 1, np.nan, self.verdict).astype(np.float32)
        return leaves, -leaves.astype(np.float32), verdicts


def batch(prompts):
    columns = {
        "user_id": [f"user{number:02d}" for number in range(len(prompts))],
        "prompt": prompts,
        "excluded_leaves": [[] for _ in prompts],
        "digest": list(range(len(prompts))),
    }
    return pa.table([pa.array(columns[field.name], field.type) for field in PROMPTS], schema=PROMPTS)


PROMPT_ROWS = [[number] for number in range(USERS)]


@pytest.mark.parametrize("bad", [(0,), (12,), (3, 4), (1, 6, 11)])
def test_the_users_on_whom_an_engine_fails_are_found_and_the_others_get_their_lists(bad):
    prompts = [[number, BAD] if number in bad else [number] for number in range(USERS)]
    engine = Table()
    rows = generate_batch(engine, batch(prompts), WIDTH)
    alone = generate_batch(Table(), batch(PROMPT_ROWS), WIDTH)
    assert rows.schema == GENERATED
    errors = rows["error"].to_pylist()
    assert [number for number, error in enumerate(errors) if error] == list(bad)
    assert {errors[number] for number in bad} == {"ValueError: token 66 is out of vocabulary"}
    assert rows["digest"].equals(alone["digest"])
    for name in ("leaves", "log_probs", "verdicts"):
        expected = [[] if number in bad else row for number, row in enumerate(alone[name].to_pylist())]
        assert rows[name].to_pylist() == expected
    # A bad user costs two calls and two probes a halving.
    assert engine.calls <= 1 + 4 * 4 * len(bad)


class Full(Table):
    """A device with room for so many users, in which lies what a call computed until nothing holds it any more."""

    ROOM = 4

    def __init__(self):
        super().__init__()
        self.made = WeakSet()

    def generate_and_judge(self, prompts, width):
        computed = np.zeros(len(prompts)).view(Computed)
        self.made.add(computed)
        if sum(map(len, self.made)) > self.ROOM:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().generate_and_judge(prompts, width)


class Computed(np.ndarray):
    __hash__ = object.__hash__


def test_a_batch_for_which_the_device_is_too_small_is_halved_until_it_fits():
    rows = generate_batch(Full(), batch(PROMPT_ROWS), WIDTH)
    assert rows.equals(generate_batch(Table(), batch(PROMPT_ROWS), WIDTH))
    assert rows["error"].null_count == USERS


def test_an_engine_that_answers_nothing_any_more_is_no_users_mistake():
    with pytest.raises(EngineGoneError, match="launch failure"):
        generate_batch(Table(alive=False), batch(PROMPT_ROWS), WIDTH)
    with pytest.raises(EngineGoneError):
        generate_batch(Table(error=MemoryError()), batch([*PROMPT_ROWS, [1, BAD]]), WIDTH)


def test_a_mistake_of_ours_ends_as_itself():
    with pytest.raises(ConfigError, match="too small"):
        generate_batch(Table(error=ConfigError("too small")), batch([[1], [2, BAD]]), WIDTH)


def test_numbers_that_are_not_finite_are_errors_of_their_users():
    rows = generate_batch(Table(), batch([[1], [65], [2]]), WIDTH)
    assert rows["error"].to_pylist() == [None, "the engine's numbers are not finite", None]
    assert rows["leaves"].to_pylist() == [[1, 2, 3], [], [2, 3, 4]]
    assert rows["log_probs"].to_pylist()[1] == rows["verdicts"].to_pylist()[1] == []


def test_weights_that_give_no_number_are_found_before_the_first_batch():
    require_finite(Table(), "policy/checkpoint")
    # `conrec train` alone would answer that the policy is complete.
    with pytest.raises(ArtefactError, match=r"policy/checkpoint: these weights give no finite number.*learning_rate"):
        require_finite(Table(verdict=np.nan), "policy/checkpoint")
    with pytest.raises(RuntimeError, match="launch failure"):
        require_finite(Table(alive=False), "policy/checkpoint")


def test_a_batch_of_prompts_that_no_engine_can_take_asks_none():
    rows = generate_batch(Table(), batch([[], [1, 2, 3, 4, 5]]), WIDTH)
    assert rows["error"].to_pylist() == ["empty prompt", "prompt of 5 tokens, the engine takes 4"]


def test_a_file_that_was_not_committed_is_not_counted_and_calls_ray_again(tmp_path):
    done = _Finished(str(tmp_path))
    storage.write_table(pa.table({"user_id": ["a", "b"]}), str(tmp_path / "one.parquet"))
    assert done.count() == 2 and not done.unfinished()
    storage.write_table(pa.table({"user_id": ["c"]}), str(tmp_path / "two.pending.parquet"))
    assert done.count() == 2 and done.unfinished()
