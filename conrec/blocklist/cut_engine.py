"""An engine whose model is cut over several processes of one node, with a GPU each: tensor parallelism.

    engine = CutEngine(checkpoint, trie, settings, threads)     # of settings.tensor_parallel processes
    leaves, log_probs, verdicts = engine.generate_and_judge(prompts, width)

Each process runs the same search over the same prompts in a `VllmEngine` of its own, whose layers hold a part of the
model and add up what the parts say; so each finds the same beams, and the first one's are taken. The process that asks
is none of them: a process waits in the middle of a layer for what another one that failed never sends, and who asks
must still hear of the failure.

Invariant: what comes out is what all processes found, or an error says what kept them from it, within a minute of the
first to speak; where they did not all raise it, all have ended. They end with the process that asks as well.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from conrec.blocklist.engines import VllmEngine
from conrec.blocklist.vllm_model import EngineGoneError
from conrec.catalogue.trie import Trie
from conrec.config import GenerateSettings
from conrec.errors import ConfigError, ConrecError
from conrec.ragged import Ragged

GRACE_SECONDS = 60.0
"""What all processes do, all have done within so many seconds of each other; else one waits for what will not come."""
START_SECONDS = 600.0
"""The same of their start, which reads the model."""
SHARED_MEMORY = Path("/dev/shm")
READY, NOT_STARTED, FULL = "ready", "not started", "out of memory"


class EngineFullError(EngineGoneError):
    """A process was out of memory with as many `positions` at once: its layers and those of the others are no longer at
    the same place, so all have ended. A new engine computes fewer."""

    def __init__(self, positions: int, why: object) -> None:
        super().__init__(f"out of memory with {positions} positions at once: {why}")
        self.positions = positions


class _Said(NamedTuple):
    word: str
    """What all processes must say alike."""
    what: Any
    """The answer, of the first process alone; or an error, of any."""


class CutEngine:
    """A `conrec.blocklist.engines.Engine` over `settings.tensor_parallel` processes."""

    def __init__(
        self, checkpoint: Path, trie: Trie, settings: GenerateSettings, threads: int, most: int = sys.maxsize
    ) -> None:
        """Starts all processes: seconds; they compute `most` positions at once, or fewer.

        Raises as any `VllmEngine` of them, and `EngineGoneError` where one ends.
        """
        port, context = _free_port(), get_context("spawn")
        self._pipes, self._processes, self._share = [], [], settings.gpu_memory_share
        try:
            with nullcontext() if settings.use_gpu else alone_in(SHARED_MEMORY):
                for rank in range(settings.tensor_parallel):
                    ours, theirs = context.Pipe()
                    given = (theirs, rank, port, checkpoint, trie, settings, threads)
                    process = context.Process(target=_search, args=given, daemon=True)
                    process.start()
                    theirs.close()  # or nobody would see that the process has ended
                    self._pipes.append(ours)
                    self._processes.append(process)
                started = [said.what for said in hear(self._pipes, START_SECONDS)]
            self.vocabulary, self.longest_prompt, _ = started[0]
            # Each GPU has another amount of memory free, and all processes must compute the same batches.
            self.positions = min(most, *(batch_tokens for _, _, batch_tokens in started))
            self._tell(self.positions)
        except BaseException:
            self.close()
            raise

    def generate(self, prompts: Ragged, width: int) -> tuple[np.ndarray, np.ndarray]:
        return self._all("generate", prompts, width)

    def generate_and_judge(self, prompts: Ragged, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self._all("generate_and_judge", prompts, width)

    def score(self, prompts: Ragged, leaves: np.ndarray) -> np.ndarray:
        return self._all("score", prompts, leaves)

    def score_and_judge(self, prompts: Ragged, leaves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._all("score_and_judge", prompts, leaves)

    def close(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def _all(self, name: str, prompts: Ragged, given: Any) -> Any:
        """What a method of the engine says in every process; what it raises in every process, it raises.

        Raises `EngineFullError` where a process is out of memory, and `ConfigError` where that is of one prompt.
        """
        try:
            self._tell((name, (prompts, given)))
            said = hear(self._pipes, GRACE_SECONDS)
            if len({one.word for one in said}) > 1:
                words = ", ".join(str(one.what) if isinstance(one.what, Exception) else one.word for one in said)
                raise EngineGoneError(f"the processes of the engine do not say the same: {words}")
        except torch.OutOfMemoryError as error:
            self.close()
            if self.positions > prompts.lengths.max():
                raise EngineFullError(self.positions, error) from error
            raise ConfigError(
                f"generate.gpu_memory_share = {self._share:g} leaves a GPU too little memory beside vLLM for one "
                f"prompt at a time: {error}; lower it, or raise generate.tensor_parallel"
            ) from error
        except EngineGoneError:
            self.close()
            raise
        if isinstance(said[0].what, Exception):
            raise said[0].what
        return said[0].what

    def _tell(self, what: Any) -> None:
        for rank, pipe in enumerate(self._pipes):
            try:
                pipe.send(what)
            except OSError as error:
                raise _gone(rank, error) from error


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """One engine on CPUs starts at a time: the processes of each open shared memory of the same name, which vLLM gives
    to all that are cut, and a killed one leaves. What they have opened is theirs, also once the name is removed."""
    if not folder.exists():
        yield
        return
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        for left in folder.glob("-*-cpushm_*"):  # vLLM's others have a number before the first hyphen
            with suppress(OSError):  # gone, or somebody else's
                left.unlink()
        yield
    finally:
        os.close(held)


def hear(pipes: list[Any], seconds: float) -> list[_Said]:
    """The next thing that each process says through its pipe.

    Raises `EngineGoneError` where one has ended, or says nothing for so long after the first one spoke, and at once the
    error of one that could not start or is out of memory: the others wait for it.
    """
    said: dict[int, _Said] = {}
    until: float | None = None
    while len(said) < len(pipes):
        silent = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in said}
        speaking: list[Any] = connection.wait(silent, None if until is None else max(0.0, until - time.monotonic()))
        if not speaking:
            ranks = ", ".join(map(str, silent.values()))
            heard = ", ".join(f"{rank}: {one.what}" for rank, one in said.items() if isinstance(one.what, Exception))
            raise EngineGoneError(
                f"process {ranks} of the engine says nothing: it waits in a layer, or hangs{heard and f' ({heard})'}"
            )
        until = until or time.monotonic() + seconds
        for pipe in speaking:
            rank = silent[pipe]
            try:
                said[rank] = pipe.recv()
            except (EOFError, OSError) as error:
                raise _gone(rank, error) from error
            if said[rank].word in (NOT_STARTED, FULL):
                raise said[rank].what
    return [said[rank] for rank in range(len(pipes))]


def _gone(rank: int, error: Exception) -> EngineGoneError:
    return EngineGoneError(f"process {rank} of the engine is gone: {error!r}")


def _search(
    pipe: connection.Connection,
    rank: int,
    port: int,
    checkpoint: Path,
    trie: Trie,
    settings: GenerateSettings,
    threads: int,
) -> None:
    """One of the processes."""
    threading.Thread(target=_end_with_the_engine, daemon=True).start()
    try:
        _take_part(rank, settings.tensor_parallel, port)
        engine = VllmEngine(checkpoint, trie, settings, threads)
    except Exception as error:
        traceback.print_exc()
        pipe.send(_Said(NOT_STARTED, _told(error)))
        pipe.poll(None)  # until it is ended: its end would be the others' error
        return
    pipe.send(_Said(READY, (engine.vocabulary, engine.longest_prompt, engine.trie.batch_tokens)))
    with suppress(EOFError):
        engine.trie.batch_tokens = pipe.recv()
        while True:
            name, given = pipe.recv()
            try:
                answer = getattr(engine, name)(*given)
            except Exception as error:
                full = "out of memory" in str(error)  # of torch, and of the libraries of a GPU below it
                said = _Said(FULL, torch.OutOfMemoryError(str(error))) if full else _of(error)
            else:
                said = _Said(_digest(answer), answer if rank == 0 else None)
            pipe.send(said)


def _of(error: Exception) -> _Said:
    return _Said(type(error).__name__, _told(error))


def _told(error: Exception) -> Exception:
    """An error that another process can read: those of libraries may have arguments that no pickle holds."""
    if isinstance(error, (ConrecError, EngineGoneError)):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")


def _end_with_the_engine() -> None:
    asking = parent_process()
    assert asking is not None
    asking.join()
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
