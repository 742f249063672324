"""Ctrl-C and SIGTERM, sent to a real process of its own."""

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import psutil
import pytest

from conrec.interrupt import GRACE_SECONDS

HOME = Path(__file__).parents[1]
RUN = """
import ctypes, sys, threading, time
from conrec import cli, cluster, interrupt
from conrec.progress import console, quiet

interrupt.GRACE_SECONDS = float(sys.argv[2])

def in_python():
    console.print("waits")
    time.sleep(600)

def in_a_library():
    # Whose thread runs no Python: no handler of Python is called.
    console.print("waits")
    ctypes.CDLL(None).usleep.argtypes = [ctypes.c_uint]
    signals = ctypes.CDLL(None)
    while True:
        signals.sigsuspend_forever() if hasattr(signals, "sigsuspend_forever") else forever()

def forever():
    try:
        time.sleep(600)
    except BaseException:
        forever()

def in_ray():
    cluster.connect()
    import ray

    @ray.remote
    def task(started):
        open(started, "w").close()
        time.sleep(600)

    running = task.remote(sys.argv[3] + ".started")
    import os
    while not os.path.exists(sys.argv[3] + ".started"):
        ray.wait([running], timeout=0.1)
    console.print("waits")
    ray.get(running)

@cli.app.command("wait")
def wait():
    with quiet(sys.argv[3]):
        {"python": in_python, "deaf": in_a_library, "ray": in_ray}[sys.argv[1]]()

cli.main(["wait"])
"""
