"""What `nightly.on_failure` is told of a night that fails, and that nothing of its own hides why."""

import json
import sys
import time
from pathlib import Path

import psutil
import pytest
from test_enough_stages import printed

from conrec.config import load_settings
from conrec.errors import ArtefactError, DataError
from conrec.stages.failure import telling
from conrec.stages.run import run_stage

KEEPS = """
import json, os, sys
told = [os.environ[name] for name in ("CONREC_STAGE", "CONREC_ERROR", "CONREC_LOG")]
open(sys.argv[1], "w").write(json.dumps([told, sys.argv[2:], sys.stdin.read()]))
"""


def failing(command, error, seconds=60.0):
    """What a person reads where a stage with this command raises the error, which stays the one that is raised."""

    def fail():
        with pytest.raises(type(error)) as raised, telling(command, "nightly", "logs/nightly.log", seconds):
            raise error
        assert raised.value is error

    return printed(fail)


def test_the_command_is_told_the_error_word_by_word(tmp_path):
    file, words = tmp_path / "told", ["$(touch hit)", "; touch hit", "a b"]
    message = "users.csv: it's `wrong`; $HOME \N{SNOWMAN}"
    assert failing([sys.executable, "-c", KEEPS, str(file), *words], DataError(message)) == ""
    told = json.loads(file.read_text())
    assert told == [["nightly", "DataError", "logs/nightly.log"], words, message]
    assert failing([sys.executable, "-c", KEEPS, str(file)], ZeroDivisionError("a defect")) == ""
    assert "Traceback" in file.read_text() and "ZeroDivisionError: a defect" in file.read_text()
    assert not Path("hit").exists()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["/no/such/program"], "/no/such/program does not start"),
        (["false"], "false ended with code 1"),
        (["sh", "-c", "kill -TERM $$"], "sh ended by SIGTERM"),
        (["\0"], "does not start"),
        (["true"], ""),  # reads nothing
        ([], ""),
    ],
)
def test_a_command_that_fails_is_a_warning(command, said):
    found = failing(command, DataError("x" * 1_000_000))
    assert (said in found) if said else found == ""


def test_a_command_that_hangs_is_ended_with_all_that_it_started(tmp_path):
    file = tmp_path / "child"
    began = time.monotonic()
    said = failing(["sh", "-c", f"sleep 600 & echo $! > {file}; sleep 600"], DataError("late"), seconds=1.0)
    assert "sh is ended after 1 s" in said and time.monotonic() - began < 30
    while alive(int(file.read_text())):  # what is killed goes a moment later
        assert time.monotonic() - began < 30
        time.sleep(0.05)


def test_what_a_command_puts_in_the_background_goes_on_when_it_ends(tmp_path):
    file = tmp_path / "told"
    assert failing(["sh", "-c", f"(sleep 0.3; touch {file}) &"], DataError("sent later")) == ""
    assert not file.exists()
    began = time.monotonic()
    while not file.exists():
        assert time.monotonic() - began < 30
        time.sleep(0.05)


def alive(process):
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_nobody_is_told_of_a_signal(tmp_path):
    with pytest.raises(KeyboardInterrupt), telling(["touch", str(tmp_path / "told")], "nightly", "log"):
        raise KeyboardInterrupt
    assert not (tmp_path / "told").exists()


def test_a_night_that_fails_tells_it(tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text(f"""
root = "{tmp_path}/root"
interactions = {{ path = "{tmp_path}/none.parquet" }}
items = {{ path = "{tmp_path}/none.parquet" }}
timeline = {{ cut = 2026-01-01T00:00:00Z }}
nightly = {{ on_failure = ["touch", "{tmp_path}/told"] }}
""")
    with pytest.raises(DataError, match=r"none\.parquet"):
        run_stage("catalogue", load_settings(file))
    assert not (tmp_path / "told").exists()
    with pytest.raises(ArtefactError, match="no policy is finished"):
        run_stage("nightly", load_settings(file))
    assert (tmp_path / "told").exists()
