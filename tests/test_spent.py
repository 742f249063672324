"""The seconds of all runs, also of those that were killed."""

import time

import pytest

from conrec import storage
from conrec.spent import spent

NAME = ".spent.json"


def failing(folder):
    """A run that takes a fifth of a second and breaks."""
    with spent(folder, NAME):
        time.sleep(0.2)
        raise RuntimeError


def test_a_clock_goes_on_where_the_last_run_ended(tmp_path):
    storage.write_json(str(tmp_path / NAME), {"seconds": 100.0})
    with pytest.raises(RuntimeError):
        failing(str(tmp_path))
    with spent(str(tmp_path), NAME) as seconds:
        assert 100.2 <= seconds() < 110


def test_what_a_kill_leaves_is_nearly_all(tmp_path):
    """Nothing is said at the end of a run that is killed."""
    url = str(tmp_path / NAME)
    with spent(str(tmp_path), NAME, save_seconds=0.05):
        until = time.monotonic() + 10
        while not storage.exists(url) or not storage.read_json(url)["seconds"]:
            assert time.monotonic() < until
            time.sleep(0.02)


def test_what_was_refused_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError):
        failing(str(tmp_path / "stage" / "version"))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b'{"seconds": null}'])
def test_a_file_that_says_nothing_is_the_first_run(tmp_path, data):
    storage.write_bytes(str(tmp_path / NAME), data)
    with spent(str(tmp_path), NAME) as seconds:
        assert seconds() < 5
