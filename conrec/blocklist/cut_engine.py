"""An engine whose model is cut over several processes of one node, with a GPU each: tensor parallelism.

    engine = CutEngine(checkpoint, trie, settings, threads)     # of settings.tensor_parallel processes, this the first
    leaves, log_probs, verdicts = engine.generate_and_judge(prompts, width)

Each process runs the same search over the same prompts in a `VllmEngine` of its own, whose layers hold a part of the
model and add up what the parts say; so each finds the same beams, and the first one's are taken.

Invariant: what comes out is what all processes found, or `EngineGoneError` says that they differ. Nobody waits for a
process that has ended: where another one ends, this one ends too, and where this one ends, the others do.
"""

from __future__ import annotations

import hashlib
import os
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np

from conrec.blocklist.engines import VllmEngine
from conrec.blocklist.vllm_model import EngineGoneError
from conrec.catalogue.trie import Trie
from conrec.config import GenerateSettings
from conrec.ragged import Ragged

GRACE_SECONDS = 60.0
"""What all processes do, all have done within so many seconds of each other; else one waits for what will not come."""
START_SECONDS = 600.0
"""The same of their start, which reads the model."""
READY, HEARD = "ready", "heard"


class CutEngine:
    """A `conrec.blocklist.engines.Engine` over `settings.tensor_parallel` processes."""

    def __init__(self, checkpoint: Path, trie: Trie, settings: GenerateSettings, threads: int) -> None:
        """Starts all processes: seconds. Raises as `VllmEngine`, and `EngineGoneError` where another one fails."""
        if not settings.use_gpu:
            # vLLM's processes on CPUs meet in shared memory of one name, which those that were killed leave behind.
            for left in Path("/dev/shm").glob("*-cpushm_*"):
                left.unlink()
        port, context = _free_port(), get_context("spawn")
        self._pipes, self._processes, self._closed = [], [], False
        for rank in range(1, settings.tensor_parallel):
            ours, theirs = context.Pipe()
            given = (theirs, rank, port, checkpoint, trie, settings, threads)
            process = context.Process(target=_other, args=given, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        threading.Thread(target=self._watch, daemon=True).start()
        try:
            _take_part(0, settings.tensor_parallel, port)
            self._engine = VllmEngine(checkpoint, trie, settings, threads)
            self._agree(READY, START_SECONDS)
            # Each GPU has another amount of memory free, and all processes must compute the same batches.
            self._engine.trie.batch_tokens = min(self._engine.trie.batch_tokens, *(said for _, said in self._others()))
            for pipe in self._pipes:
                pipe.send(self._engine.trie.batch_tokens)
        except BaseException:
            self.close()
            raise
        self.vocabulary, self.longest_prompt = self._engine.vocabulary, self._engine.longest_prompt

    def generate(self, prompts: Ragged, width: int) -> tuple[np.ndarray, np.ndarray]:
        return self._all("generate", prompts, width)

    def generate_and_judge(self, prompts: Ragged, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self._all("generate_and_judge", prompts, width)

    def score(self, prompts: Ragged, leaves: np.ndarray) -> np.ndarray:
        return self._all("score", prompts, leaves)

    def score_and_judge(self, prompts: Ragged, leaves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._all("score_and_judge", prompts, leaves)

    def close(self) -> None:
        """Ends the other processes."""
        self._closed = True
        for process in self._processes:
            process.terminate()

    def _all(self, name: str, *given: Any) -> Any:
        """What a method of the engine says in every process; what it raises in every process, it raises."""
        for pipe in self._pipes:
            try:
                pipe.send((name, given))
            except OSError as error:
                raise EngineGoneError(f"a process of the engine is gone: {error}") from error
        try:
            answer = getattr(self._engine, name)(*given)
        except Exception as error:
            self._agree(type(error).__name__)
            for pipe in self._pipes:
                pipe.send(HEARD)
            raise
        self._agree(_digest(answer))
        return answer

    def _agree(self, said: str, seconds: float = GRACE_SECONDS) -> None:
        """Raises `EngineGoneError` unless every other process says the same."""
        for rank, other in self._others(seconds):
            if other != said:
                raise EngineGoneError(f"process {rank} of the engine says {other!r}, the first one {said!r}")

    def _others(self, seconds: float = GRACE_SECONDS) -> Iterator[tuple[int, Any]]:
        """Rank of every other process, and the next thing that it says. Raises `EngineGoneError` where one is gone."""
        for rank, pipe in enumerate(self._pipes, 1):
            try:
                if not pipe.poll(seconds):
                    raise EngineGoneError(f"process {rank} of the engine says nothing: it waits in a layer, or hangs")
                yield rank, pipe.recv()
            except (EOFError, OSError) as error:
                raise EngineGoneError(f"process {rank} of the engine is gone: {error}") from error

    def _watch(self) -> None:
        """Where another process ends, this one may wait in the middle of a layer for what it will not send."""
        connection.wait([process.sentinel for process in self._processes])
        if not self._closed:
            print("a process of the engine has ended, and the engine with it", file=sys.stderr, flush=True)
            os._exit(1)


def _other(
    pipe: connection.Connection,
    rank: int,
    port: int,
    checkpoint: Path,
    trie: Trie,
    settings: GenerateSettings,
    threads: int,
) -> None:
    """A process that is not the first."""
    threading.Thread(target=_end_with_the_first, daemon=True).start()
    try:
        _take_part(rank, settings.tensor_parallel, port)
        engine = VllmEngine(checkpoint, trie, settings, threads)
    except Exception as error:
        traceback.print_exc()
        pipe.send(f"{type(error).__name__}: {error}")
        pipe.poll(GRACE_SECONDS)
        return
    pipe.send(READY)
    pipe.send(engine.trie.batch_tokens)
    try:
        engine.trie.batch_tokens = pipe.recv()
    except EOFError:
        return
    while True:
        try:
            name, given = pipe.recv()
        except EOFError:
            return
        try:
            said = _digest(getattr(engine, name)(*given))
        except Exception as error:
            pipe.send(type(error).__name__)
            if not pipe.poll(GRACE_SECONDS):
                return  # it failed here alone: the first one waits in a layer, and ends with this process
            with suppress(EOFError):
                pipe.recv()
        else:
            pipe.send(said)


def _end_with_the_first() -> None:
    first = parent_process()
    assert first is not None
    first.join()
    os._exit(1)


def _take_part(rank: int, count: int, port: int) -> None:
    """What vLLM's `external_launcher` reads of where it is."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _digest(answer: Any) -> str:
    """Of the leaves that were found: of numbers, the last bit may be another on another device."""
    found = answer[0] if isinstance(answer, tuple) else answer
    return hashlib.sha256(found.tobytes() if found.dtype.kind == "i" else str(found.shape).encode()).hexdigest()


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
