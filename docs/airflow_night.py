"""The night as a DAG of Airflow 3.2 or newer: a copy of this file in its folder of DAGs.

The worker has conrec installed, the settings file at SETTINGS, and in its environment what the stores and Redis ask
for (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, REDIS_PASSWORD), from the secret store that starts it: none stands here.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta

from airflow.sdk import dag, task
from airflow.sdk.exceptions import AirflowFailException

SETTINGS = "/etc/conrec/my.toml"
AUDIT_FAILED = 3
"""The same night gives the same audit: it is not tried again."""


def conrec(*arguments: str) -> None:
    """Runs a command of conrec; its output is the log of the task."""
    # Where a task is stopped, Airflow's own handler would leave the command running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("the task was stopped"))
    process = subprocess.Popen(["conrec", *arguments, "--config", SETTINGS])
    try:
        code = process.wait()
    except BaseException:  # that, or the deadline
        process.terminate()  # it takes along its copy of the log, which is personal data; killed outright it could not
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()
        raise
    if code == AUDIT_FAILED:
        raise AirflowFailException("the audit refused the night; serving keeps the version before")
    if code != 0:
        raise RuntimeError(f"conrec {arguments[0]} ended with code {code}; the same command goes on where it was")


@dag(
    schedule="0 2 * * *",
    start_date=datetime(2026, 1, 1, tzinfo=UTC),
    catchup=False,
    max_active_runs=1,
    dagrun_timeout=timedelta(hours=8),
)
def conrec_night() -> None:
    """The night, then what hangs on it."""

    @task(retries=2, retry_delay=timedelta(minutes=5), execution_timeout=timedelta(hours=6))
    def nightly() -> None:
        conrec("nightly")

    @task(retries=2, retry_delay=timedelta(minutes=1), execution_timeout=timedelta(hours=1))
    def export_redis() -> None:
        conrec("export", "redis", "--url", "redis://redis:6379/0")

    @task(retries=0, execution_timeout=timedelta(hours=1))
    def collect_garbage() -> None:
        conrec("collect-garbage", "--keep", "14")

    nightly() >> export_redis() >> collect_garbage()


conrec_night()
