"""What reaches the terminal is ours; what libraries print is in the log."""

import os
import pty
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import psutil
import pytest
from rich.table import Table

from conrec import storage
from conrec.progress import console, progress, quiet

pytestmark = pytest.mark.long

HOME = Path(__file__).parents[1]
NOISY = """
    import logging, os, sys, warnings
    from conrec.progress import console, progress, quiet
    def noise(where):
        print("noise printed", where)
        print("noise on error", where, file=sys.stderr)
        os.write(1, b"noise from C\\n")
        os.system("echo noise of a child; echo noise of a child >&2")
        warnings.warn("noise warned")
        logging.getLogger("ray").warning("noise logged")
    with quiet(sys.argv[1]):
        with quiet("never-made.log"), progress("training", 3) as bar:
            noise("inside")
            bar.advance(2, note="loss 1.5")
            with progress("checkpoint"):
                pass
            bar.advance()
        console.print("ours inside")
    print("after")
"""


def run(log, stdout):
    environment = os.environ | {"PYTHONPATH": str(HOME), "TERM": "xterm", "COLUMNS": "80"}
    command = [sys.executable, "-c", textwrap.dedent(NOISY), str(log)]
    return subprocess.run(command, cwd=log.parent, env=environment, stdout=stdout, stderr=subprocess.STDOUT, check=True)


def test_noise_goes_to_the_log_and_a_pipe_gets_a_line_at_start_and_end(tmp_path):
    log = tmp_path / "deep" / "noise.log"
    log.parent.mkdir()
    lines = run(log, subprocess.PIPE).stdout.decode().splitlines()
    assert [line.strip().split(" in ")[0] for line in lines] == [
        "training ...",
        "checkpoint ...",
        "checkpoint",
        "training: 3",
        "ours inside",
        "after",
    ]
    assert "loss 1.5" in lines[3]
    noise = log.read_text()
    for kind in ("printed inside", "on error inside", "from C", "of a child", "warned", "logged"):
        assert f"noise {kind}" in noise
    assert noise.count("noise of a child") == 2
    assert not (tmp_path / "deep" / "never-made.log").exists()


def test_a_terminal_gets_bars_and_no_noise(tmp_path):
    leader, follower = pty.openpty()
    with os.fdopen(follower, "wb") as terminal:
        run(tmp_path / "noise.log", terminal)
    shown = os.read(leader, 1 << 20).decode()
    os.close(leader)
    assert "━" in shown
    assert "training: 3" in shown
    assert "noise" not in shown


def test_a_bar_that_was_left_by_an_error_says_so(capsys):
    def training():
        with progress("training", 10) as bar:
            bar.advance(4)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        training()
    assert "stopped: training: 4 of 10" in capsys.readouterr().out


@pytest.mark.parametrize("log", ["{folder}/logs/run.log", "memory://{folder}/logs/run.log"])
def test_a_log_goes_on_behind_the_run_before_on_a_disk_and_on_a_store(log, tmp_path, monkeypatch):
    log = log.format(folder=tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    opened = psutil.Process().num_fds()

    def run(line):
        with quiet(log):
            os.write(1, line)
            raise ValueError("broken")

    for line in (b"try 1\n", b"try 2\n"):
        with pytest.raises(ValueError, match="broken"):
            run(line)
    assert storage.read_bytes(log) == b"try 1\ntry 2\n"
    assert not list(tmp_path.glob("conrec-*.log"))
    assert psutil.Process().num_fds() == opened


def test_a_log_on_a_store_keeps_the_end_of_what_it_held_and_all_of_the_last_run(monkeypatch):
    monkeypatch.setattr("conrec.progress.KEPT_BYTES", 4)
    storage.write_bytes("memory://logs/long.log", b"first\nold\n")
    with quiet("memory://logs/long.log"):
        os.write(1, b"a new run\n")
    assert storage.read_bytes("memory://logs/long.log") == b"old\na new run\n"


def test_the_terminal_is_back_after_an_error(tmp_path, capfd):
    with pytest.raises(ValueError, match="broken"), quiet(tmp_path / "log"):
        raise ValueError("broken")
    os.write(1, b"written")
    console.print("printed")
    out = capfd.readouterr().out
    assert "written" in out
    assert "printed" in out


def test_what_is_printed_is_text_and_never_markup(capsys):
    hostile = "acme[/eu] [bold]x[/bold] [/] :smile: [link=x]"
    table = Table("name [/a]", title="title [/b]", box=None)
    table.add_row(hostile)
    console.print(hostile)
    console.print(hostile, style="bold")
    console.print(table)
    with progress(hostile, 1) as bar:
        bar.advance(note=hostile)
    said = capsys.readouterr().out
    assert said.count(hostile) == 6
    assert "name [/a]" in said
    assert "title [/b]" in said
