"""Work as tasks of Ray: what a loop gives, in its order, of few pieces at once, whatever becomes of a worker."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import ray
from ray.experimental import internal_kv

from conrec.errors import ArtefactError, ClusterError
from conrec.parallel import PIECES_PER_CORE, as_tasks, in_process, mapping

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_driver")]
CORES = 2  # of that Ray


def test_results_come_in_the_order_of_the_pieces():
    def work(shared: int, piece: int) -> int:
        time.sleep(0.05 * (4 - piece % 4))  # later ones end first
        return shared + piece

    assert list(as_tasks(work, 100, range(9), "pieces", 9)) == list(in_process(work, 100, range(9)))
    assert list(as_tasks(work, 100, [], "pieces", 0)) == []


def test_few_pieces_are_held_however_many_there_are():
    asked = []

    def pieces():
        for number in range(40):
            asked.append(number)
            yield number

    for done, result in enumerate(as_tasks(lambda _, piece: piece, None, pieces(), "pieces", 40)):
        assert result == done
        assert len(asked) - done <= PIECES_PER_CORE * CORES + 1
    assert len(asked) == 40


def test_an_error_of_ours_is_told_as_it_was_and_what_waits_is_given_up():
    def work(_: None, piece: int) -> int:
        if piece == 1:
            raise ArtefactError("user 'x' has no interactions; generate again")
        return piece

    results = as_tasks(work, None, range(40), "pieces", 40)
    assert next(results) == 0
    with pytest.raises(ArtefactError, match=r"^user 'x' has no interactions; generate again$"):
        next(results)


def test_what_a_store_raises_in_a_task_is_what_it_raised():
    def work(_: None, piece: int) -> int:
        raise OSError(28, "No space left on device", "/night")

    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device: '/night'$"):
        list(as_tasks(work, None, range(3), "pieces", 3))


def test_closed_it_gives_up_what_waits(tmp_path):
    def work(folder: str, piece: int) -> int:
        Path(folder, str(piece)).touch()
        time.sleep(0.2)
        return piece

    results = as_tasks(work, str(tmp_path), range(40), "pieces", 40)
    assert next(results) == 0
    results.close()
    time.sleep(1)
    assert len(list(tmp_path.iterdir())) <= PIECES_PER_CORE * CORES + 1


def test_a_worker_that_is_lost_again_and_again_is_told():
    with pytest.raises(ClusterError, match=r"started again 3 times.*publish\.buckets"):
        list(as_tasks(lambda _, piece: os._exit(piece), None, range(1, 2), "pieces", 1))


def test_where_there_are_no_two_cores_the_work_is_done_here(monkeypatch, capsys):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 1.0})
    assert list(as_tasks(lambda _, piece: (piece, os.getpid()), None, range(2), "buckets", 2)) == [
        (piece, os.getpid()) for piece in range(2)
    ]
    assert "buckets: in this process" in capsys.readouterr().out


def test_where_a_cluster_grows_tasks_wait_for_its_first_node(monkeypatch, capsys):
    """As on that of cluster.yaml, whose head has no core and whose nodes go when nobody uses them."""
    report = {"active_nodes": {}, "pending_launches": {"inference": 1}}
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 0.0})
    monkeypatch.setattr(internal_kv, "_internal_kv_get", lambda key: json.dumps({"autoscaler_report": report}))
    made = list(as_tasks(lambda _, piece: (piece, os.getpid()), None, range(5), "buckets", 5))
    assert [piece for piece, _ in made] == [*range(5)] and os.getpid() not in {process for _, process in made}
    assert "in this process" not in capsys.readouterr().out


def test_a_lost_worker_is_made_good(tmp_path):
    def work(folder: str, piece: int) -> int:
        mark = Path(folder, str(piece))
        if piece == 2 and not mark.exists():
            mark.touch()
            os._exit(1)
        return piece

    assert list(as_tasks(work, str(tmp_path), range(5), "pieces", 5)) == list(range(5))
    assert (tmp_path / "2").exists()


def test_little_work_starts_no_tasks():
    assert mapping(seconds=1) is in_process
    assert mapping(seconds=100) is as_tasks
