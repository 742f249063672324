"""Work on pieces that know nothing of each other, results in the order of the pieces.

    mapped = mapping(scores=5e9)         # tasks of Ray on every core of the cluster, or for little work this process
    for result in mapped(work, shared, pieces, "lists", total=64): ...

`work(shared, piece)` is a function of a module or class; what it returns, it also returns where a node was lost and
Ray runs it again. Invariant: of pieces and results two a core are held at once, whatever their number.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

from conrec.cluster import Need, announced, connect, mistake
from conrec.progress import progress

Shared = TypeVar("Shared")
Piece = TypeVar("Piece")
Result = TypeVar("Result")

PIECES_PER_CORE = 2
"""One that is worked on and one that waits, so that no core does."""
SCORES_WORTH_TASKS = 5e8
"""About a minute of one core; until Ray's workers have started and read their modules, several seconds pass."""

_NEED = Need("tasks of a night's lists", 1, {"CPU": 1.0}, {"CPU": "one a task"})


class Mapped(Protocol):
    """How `work` is done on every piece."""

    def __call__(
        self, work: Callable[[Shared, Piece], Result], shared: Shared, pieces: Iterable[Piece], what: str, total: int
    ) -> Iterator[Result]:
        """Results in the order of the pieces, which are asked for as they are needed; `total` of `what` on a bar."""


def mapping(scores: float) -> Mapped:
    """How to do work of so many scores of a user and a thing."""
    return as_tasks if scores >= SCORES_WORTH_TASKS else in_process


def in_process(
    work: Callable[[Shared, Piece], Result], shared: Shared, pieces: Iterable[Piece], what: str = "", total: int = 0
) -> Iterator[Result]:
    """One piece after the other, here, in less time than would need a bar."""
    return (work(shared, piece) for piece in pieces)


def as_tasks(
    work: Callable[[Shared, Piece], Result], shared: Shared, pieces: Iterable[Piece], what: str, total: int
) -> Iterator[Result]:
    """Each piece as a task of Ray on one core. Raises the errors of ours that `work` raises."""
    connect(need=_NEED)
    import ray

    there, task = ray.put(shared), ray.remote(num_cpus=1)(work)
    waiting: deque[ray.ObjectRef] = deque()

    def result() -> Any:
        try:
            return ray.get(waiting.popleft())
        except ray.exceptions.RayError as error:
            if (told := mistake(error)) is None:
                raise
            raise told from error

    try:
        with progress(what, total) as bar, announced(_NEED):
            for piece in pieces:
                # Asked each time: an autoscaler adds nodes for what waits.
                while len(waiting) >= PIECES_PER_CORE * max(1, int(ray.cluster_resources().get("CPU", 1))):
                    yield result()
                    bar.advance()
                waiting.append(task.remote(there, piece))
            while waiting:
                yield result()
                bar.advance()
    finally:
        for left in waiting:
            ray.cancel(left)
