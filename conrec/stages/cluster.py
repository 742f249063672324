"""Joins the Ray cluster of a submitted job, or starts Ray on this machine."""

from __future__ import annotations

import os

from conrec.config import Config


def connect(config: Config) -> None:
    """Connects once a process. On one machine Ray is told of as many cores as one stage asks for, so that settings
    made for a larger machine run, slower, on a small one."""
    # Off, or Ray re-creates the driver's `uv run` environment on every worker.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    import ray

    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False)
        return
    train = config.train.workers * config.train.cpus_per_worker
    generate = config.generate.engines * config.generate.cpus_per_engine
    cores = max(os.cpu_count() or 1, train, generate)
    ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False)
