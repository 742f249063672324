"""Work on buckets of users, which know nothing of each other; results in their order.

    mapped = mapping(seconds=600)        # tasks of Ray on every core of the cluster, or for little work this process
    with closing(mapped(work, shared, pieces, "buckets of lists", total=64)) as results: ...

`work(shared, piece)` is a function of a module or class; what it returns, it also returns where a node was lost and
Ray runs it again. Invariant: in this process one piece is held at once, as tasks `PIECES_PER_CORE` a core of the
cluster and their results, in Ray's object store, whatever their number.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import Any, Protocol, TypeVar

from conrec.cluster import Need, announced, connect, may_grow, mistake
from conrec.errors import ClusterError
from conrec.progress import console, progress

Shared = TypeVar("Shared")
Piece = TypeVar("Piece")
Result = TypeVar("Result")

PIECES_PER_CORE = 2
"""One that is worked on and one that waits, so that no core does."""
SECONDS_WORTH_TASKS = 60.0
"""Of one core; until Ray's workers have started and read their modules, several pass."""
TASK_RETRIES = 3
"""How often a task is started again whose worker or node was lost."""

_NEED = Need("tasks of a night", 1, {"CPU": 1.0}, {"CPU": "one a task"})


class Mapped(Protocol):
    """How `work` is done on every piece."""

    def __call__(
        self,
        work: Callable[[Shared, Piece], Result],
        shared: Shared,
        pieces: Iterable[Piece],
        what: str,
        total: int | None,
    ) -> Generator[Result]:
        """Results in the order of the pieces, which are asked for as they are needed; `total` of `what` on a bar, None
        where nobody knows yet.

        Closed, it gives up what it waits for.
        """


def mapping(seconds: float) -> Mapped:
    """How to do work of so many seconds of one core."""
    return as_tasks if seconds >= SECONDS_WORTH_TASKS else in_process


def in_process(
    work: Callable[[Shared, Piece], Result],
    shared: Shared,
    pieces: Iterable[Piece],
    what: str = "",
    total: int | None = None,
) -> Generator[Result]:
    """One piece after the other, here, in less time than would need a bar."""
    return (work(shared, piece) for piece in pieces)


def as_tasks(
    work: Callable[[Shared, Piece], Result], shared: Shared, pieces: Iterable[Piece], what: str, total: int | None
) -> Generator[Result]:
    """Each piece as a task of Ray on one core; here, where the cluster has not two of them and gets none.

    Raises the errors of ours and of the store that `work` raises, and `ClusterError` where workers are lost again and
    again.
    """
    connect()
    import ray

    if ray.cluster_resources().get("CPU", 0) < 2 and not may_grow():
        console.print(f"  {what}: in this process, since Ray has no two cores for tasks")
        yield from in_process(work, shared, pieces)
        return
    there, task = ray.put(shared), ray.remote(num_cpus=1, max_retries=TASK_RETRIES)(work)
    waiting: deque[ray.ObjectRef] = deque()

    def result() -> Any:
        try:
            made = ray.get(waiting[0])
        except ray.exceptions.RayError as error:
            if (told := _told(error)) is None:
                raise
            raise told from error
        waiting.popleft()
        return made

    try:
        with progress(what, total) as bar, announced(_NEED):
            for piece in pieces:
                # Asked each time: nodes come and go.
                while len(waiting) >= PIECES_PER_CORE * max(1, int(ray.cluster_resources().get("CPU", 1))):
                    yield result()
                    bar.advance()
                waiting.append(task.remote(there, piece))
            while waiting:
                yield result()
                bar.advance()
    finally:
        if ray.is_initialized():
            for left in waiting:
                ray.cancel(left)


def _told(error: Exception) -> Exception | None:
    """What happened in a task or to it, without Ray's own lines around it; None where that is not known."""
    from ray import exceptions

    if isinstance(error, exceptions.RayTaskError):
        return error.cause if isinstance(error.cause, OSError) else mistake(error)
    lost = (exceptions.WorkerCrashedError, exceptions.NodeDiedError, exceptions.OutOfMemoryError)
    if not isinstance(error, (*lost, exceptions.ObjectLostError)):
        return None
    return ClusterError(
        f"a task was lost and started again {TASK_RETRIES} times: its process or its node went; look at the memory of "
        "the nodes, or give every node less to do with a larger publish.buckets. The same command goes on where it was"
    )
