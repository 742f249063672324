"""Joins the Ray cluster of a submitted job, or starts Ray on this machine."""

from __future__ import annotations

import os


def connect(cores: int = 1) -> None:
    """Connects once a process. On one machine Ray is told of at least `cores` cores, so that settings made for a larger
    machine run, slower, on a small one."""
    # Off, or Ray re-creates the driver's `uv run` environment on every worker.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    import ray

    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False)
        return
    # "local", or Ray would look for a cluster that somebody started on this machine, and wait for one that is gone.
    ray.init(address="local", num_cpus=max(os.cpu_count() or 1, cores), include_dashboard=False, log_to_driver=False)
