"""Schedulers call commands that exist, with a deadline, try again what may help, and hold no secret."""

from __future__ import annotations

import copy
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import types
from datetime import timedelta
from pathlib import Path

import pytest
import typer
import yaml

from conrec import cli

HOME = Path(__file__).parents[1]
SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "REDIS_PASSWORD")
NIGHT = "sh /conrec/jobs/night.sh"
COMMANDS = typer.main.get_command(cli.app)


def require_command(words):
    """That `conrec` takes these words, its options and their values."""
    command, words = COMMANDS, list(words)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    command.make_context(command.name, words)


@pytest.fixture
def night(tmp_path):
    """Starts night.sh beside a job that ends with the given codes, one a try, or sleeps: the process."""
    (tmp_path / "night.sh").write_bytes((HOME / "jobs" / "night.sh").read_bytes())
    (tmp_path / "nightly.py").write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "codes = Path(__file__).with_name('codes').read_text().split()\n"
        "tried = Path(__file__).with_name('tried')\n"
        "with tried.open('a') as file: file.write(' '.join(sys.argv[1:]) + '\\n')\n"
        "code = codes[len(tried.read_text().splitlines()) - 1]\n"
        "time.sleep(60) if code == 'sleep' else sys.exit(int(code))\n"
    )

    def start(codes, **settings):
        (tmp_path / "codes").write_text(codes)
        environment = os.environ | {"PYTHON": sys.executable, "CONREC_PAUSE": "0"} | settings
        return subprocess.Popen(["sh", tmp_path / "night.sh", "--config", "my.toml"], env=environment)

    start.tried = lambda: (tmp_path / "tried").read_text().splitlines()
    return start


@pytest.mark.parametrize(
    ("codes", "tries", "code"),
    [("0", 1, 0), ("1 0", 2, 0), ("2 137 0", 3, 0), ("1 2 1", 3, 1), ("3 0", 1, 3), ("1 3 0", 2, 3), ("143 0", 1, 143)],
)
def test_another_try_where_it_can_help(night, codes, tries, code):
    assert night(codes).wait(30) == code
    assert night.tried() == ["--config my.toml"] * tries


def test_the_deadline_ends_a_try_and_there_is_no_other(night):
    began = time.monotonic()
    assert night("sleep 0", CONREC_DEADLINE="1").wait(30) == 124
    assert time.monotonic() - began < 20
    assert len(night.tried()) == 1


def test_a_scheduler_that_ends_it_ends_the_night(night, tmp_path):
    process = night("sleep 0")
    while not (tmp_path / "tried").exists():
        time.sleep(0.01)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert time.monotonic() - began < 20
    assert len(night.tried()) == 1


def test_the_job_of_every_night_is_the_one_of_a_single_night():
    single = yaml.safe_load((HOME / "docs" / "rayjob.yaml").read_text())["spec"]
    text = (HOME / "docs" / "raycronjob.yaml").read_text()
    cron = yaml.safe_load(text)
    assert (cron["apiVersion"], cron["kind"]) == ("ray.io/v1", "RayCronJob")
    assert cron["spec"].keys() == {"schedule", "jobTemplate"}
    every = copy.deepcopy(cron["spec"]["jobTemplate"])
    assert every.pop("entrypoint") == single.pop("entrypoint").replace("python /conrec/jobs/nightly.py", NIGHT)
    assert (every.pop("backoffLimit"), single.pop("backoffLimit")) == (0, 2)  # KubeRay would repeat a failed audit
    head, *workers = [
        group["template"]["spec"]["containers"][0]
        for group in (every["rayClusterSpec"]["headGroupSpec"], *every["rayClusterSpec"]["workerGroupSpecs"])
    ]
    (deadline,) = head.pop("env")
    assert deadline["name"] == "CONREC_DEADLINE"
    assert int(deadline["value"]) < every.pop("activeDeadlineSeconds") < 24 * 3600
    for container in (head, *workers):
        assert container.pop("envFrom") == [{"secretRef": {"name": "conrec-secrets"}}]
    assert every == single
    # No Redis: the image cannot export to it.
    assert [name for name in SECRETS if name in text] == ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]
    assert not any(f"{name}=" in text for name in SECRETS)
    assert not re.search("^redis==", (HOME / "requirements" / "gpu.txt").read_text(), re.M)


def test_every_line_of_the_crontab():
    text = (HOME / "docs" / "crontab").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    settings = [line for line in lines if re.match(r"[A-Z_]+=", line)]
    assert [line.split("=")[0] for line in settings] == ["PATH", "CONREC_DEADLINE"]
    seen = []
    for line in lines[len(settings) :]:
        *times, command = line.split(maxsplit=5)
        for value, limit in zip(times, (59, 23, 31, 12, 7), strict=True):
            assert value == "*" or 0 <= int(value) <= limit
        assert "%" not in command  # cron makes a line break of it
        assert subprocess.run(["sh", "-n", "-c", command], check=False).returncode == 0
        for part in re.split(r"&&", command):
            words = shlex.split(part.split(">")[0])
            if words[0] == "conrec":
                require_command(words[1:])
            seen.append(words[0])
    assert {"conrec", "flock", "."} <= set(seen)
    assert "flock -n /tmp/conrec.lock /opt/conrec/jobs/night.sh --config" in text
    assert all(name in text and f"{name}=" not in text for name in SECRETS)


class _Task:
    """A task of the stand-in: called it names itself, and `>>` notes an order."""

    def __init__(self, function, options, seen):
        self.name, self.function, self.options, self.seen = function.__name__, function, options, seen
        seen["tasks"][self.name] = self

    def __call__(self):
        return self

    def __rshift__(self, other):
        self.seen["order"].append((self.name, other.name))
        return other


@pytest.fixture
def airflow(monkeypatch):
    """Stands in for Airflow, which is not installed here: what the file declares."""
    seen = {"tasks": {}, "order": [], "dag": {}}
    sdk, exceptions = types.ModuleType("airflow.sdk"), types.ModuleType("airflow.sdk.exceptions")
    exceptions.AirflowFailException = type("AirflowFailException", (Exception,), {})
    sdk.task = lambda **options: lambda function: _Task(function, options, seen)
    sdk.dag = lambda **options: lambda function: (seen["dag"].update(options), function)[1]
    for name, module in (("airflow", types.ModuleType("airflow")), ("airflow.sdk", sdk)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "airflow.sdk.exceptions", exceptions)
    text = (HOME / "docs" / "airflow_night.py").read_text()
    seen["file"] = {"__name__": "airflow_night"}
    exec(compile(text, "airflow_night.py", "exec"), seen["file"])
    assert all(name in text and f"{name}=" not in text for name in SECRETS)
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # Airflow's: it asks the operator, which has no command
    yield seen
    signal.signal(signal.SIGTERM, before)


def test_the_dag_tries_again_but_for_a_failed_audit(airflow, monkeypatch, tmp_path):
    assert airflow["order"] == [("nightly", "export_redis"), ("export_redis", "collect_garbage")]
    assert airflow["dag"]["catchup"] is False
    assert airflow["dag"]["max_active_runs"] == 1
    tasks = airflow["tasks"]
    assert tasks["nightly"].options["retries"] > 0
    assert all(task.options["execution_timeout"] < timedelta(days=1) for task in tasks.values())
    assert airflow["file"]["AUDIT_FAILED"] == cli.AUDIT_FAILED
    command = tmp_path / "conrec"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for task in tasks.values():
        for code, raised in ((0, None), (cli.USER_ERROR, "RuntimeError"), (cli.AUDIT_FAILED, "AirflowFailException")):
            command.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/said\nexit {code}\n')
            command.chmod(0o755)
            try:
                task.function()
                ended = None
            except Exception as error:
                ended = type(error).__name__
            assert ended == raised
            require_command(shlex.split((tmp_path / "said").read_text()))


class _Deadline(BaseException):
    """What Airflow raises in a task at its `execution_timeout`."""


@pytest.mark.parametrize("ended", ["deadline", "stopped"])
def test_a_task_that_is_ended_lets_its_command_clean_up(airflow, monkeypatch, tmp_path, ended):
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    log = tmp_path / "log"
    (tmp_path / "conrec").write_text(
        f"#!/bin/sh\ntrap 'kill $!; rm {log}; exit 143' TERM\nsleep 5 &\ntouch {log}\nwait\n"
    )
    (tmp_path / "conrec").chmod(0o755)

    def end(*_):
        if log.exists():
            signal.setitimer(signal.ITIMER_REAL, 0)
            if ended == "deadline":
                raise _Deadline
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    try:
        with pytest.raises((_Deadline, SystemExit)):
            airflow["tasks"]["nightly"].function()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not log.exists()
