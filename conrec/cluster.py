"""Joins the Ray cluster of a submitted job, or starts Ray on this machine, and knows what the settings ask of it.

    need = training_need(config.train)
    connect(need=need)              # ClusterError where the cluster has no such nodes and adds none
    tell_held(need)                 # a line where the nodes are there and others use them
    with announced(need):           # while nodes are missing, a line a minute
        ...

Ray itself waits without a word and without end for a cluster that is gone and for resources that no node has.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from conrec import errors
from conrec.config import GenerateSettings, TrainSettings
from conrec.errors import ClusterError, ConrecError
from conrec.progress import console

ANSWER_SECONDS = 10.0
"""Within this long the head node of a cluster accepts a connection."""
REPEAT_SECONDS = 60.0
FREE_POLL_SECONDS = 0.2
SETTLE_SECONDS = 30.0
"""Within this long Ray has given back what the work before held: an engine takes seconds to end."""
SOCKET_PATH_BYTES = 107
"""Longest path of a Unix socket."""
_SESSION = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
"""What Ray appends to its temporary folder."""
_MIRRORED_TYPE = re.compile(r"node_[0-9a-f]{56}")
"""A node type that Ray made up for a node that nobody launches."""

_MISTAKE = re.compile(r"^conrec\.errors\.(\w+): (.+?)(?:\n\s*\n|\Z)", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Need:
    """`count` workers that each take `bundle` on one node; `settings` says which setting asks for what."""

    setting: str
    count: int
    bundle: Mapping[str, float]
    settings: Mapping[str, str]

    def room(self, nodes: Sequence[Mapping[str, float]]) -> int:
        """How many of the workers fit on nodes of these resources."""
        return sum(int(min(node.get(name, 0) // amount for name, amount in self.bundle.items())) for node in nodes)

    def lack(self, nodes: Sequence[Mapping[str, float]], free: bool = False) -> str:
        """What is asked for by which setting, and what there is; `free`: `nodes` are what nobody holds of them."""
        needs = ", ".join(f"{amount:g} {name} ({self.settings[name]})" for name, amount in self.bundle.items())
        offered = ", ".join(f"{sum(node.get(name, 0) for node in nodes):g} {name}" for name in self.bundle)
        there = f"of what the nodes have, {offered} are free" if free else f"the nodes have {offered} in all"
        return (
            f"{self.setting} = {self.count} asks for {needs} each, and there is room for {self.room(nodes)} of them: "
            f"{there}"
        )


def training_need(train: TrainSettings) -> Need:
    """What the workers of a training take."""
    return _need("train", "workers", "cpus_per_worker", train)


def generation_need(generate: GenerateSettings) -> Need:
    """What the engines of a night take."""
    return _need("generate", "engines", "cpus_per_engine", generate, generate.tensor_parallel)


def _need(section: str, count: str, cpus: str, settings: TrainSettings | GenerateSettings, processes: int = 1) -> Need:
    needs = {"CPU": (float(getattr(settings, cpus) * processes), f"{section}.{cpus}")}
    if settings.use_gpu:
        needs["GPU"] = (float(processes), f"{section}.use_gpu" if processes == 1 else f"{section}.tensor_parallel")
    if settings.node_resource:
        needs[settings.node_resource] = (1.0, f"{section}.node_resource")
    bundle = {name: amount for name, (amount, _) in needs.items()}
    origins = {name: setting for name, (_, setting) in needs.items()}
    return Need(f"{section}.{count}", getattr(settings, count), bundle, origins)


def connect(cores: int = 1, need: Need | None = None) -> None:
    """Connects once a process. On one machine Ray is told of at least `cores` cores, so that settings made for a larger
    machine run, slower, on a small one.

    Raises `ClusterError` where the cluster of RAY_ADDRESS cannot be joined, Ray cannot start here, or `need` asks for
    what no node has and no autoscaler can add.
    """
    # Off, or Ray re-creates the driver's `uv run` environment on every worker.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    import ray

    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS") or "local"
        with own_handlers():
            _start(cores) if address == "local" else _join(address)
    if need is not None:
        nodes = _nodes()
        if need.room(nodes) < need.count and not may_grow():
            raise ClusterError(
                f"{need.lack(nodes)}, and no autoscaler adds any; lower these settings, or run where such nodes are"
            )


def tell_held(need: Need) -> None:
    """Says what is waited for where the nodes have it and others hold it; returns at once where it is free.

    Call it just before the workers are asked for: once they run, it is they who hold it. What this process has computed
    on a GPU is given back first.
    """
    give_back_gpu()
    patience = time.monotonic() + SETTLE_SECONDS
    while need.room(_nodes()) >= need.count > need.room(free := _free()):
        if time.monotonic() >= patience:
            console.print(f"  waits for what others hold: {need.lack(free, free=True)}")
            return
        time.sleep(FREE_POLL_SECONDS)


@contextlib.contextmanager
def announced(need: Need) -> Iterator[None]:
    """While the block runs, says what is waited for, and which setting asks for it, once a minute until it is there."""

    def line() -> str | None:
        nodes = _nodes()
        return None if need.room(nodes) >= need.count else f"  waits for nodes: {need.lack(nodes)}"

    with _repeating(line):
        yield


@contextlib.contextmanager
def own_handlers() -> Iterator[None]:
    """Gives signals back their handlers at the end: Ray and Ray Train put theirs in their place, and leave them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def has_dashboard() -> bool:
    """Whether the cluster that was joined runs Ray's dashboard, and with it the API that tells the state of actors."""
    from ray._private.worker import get_dashboard_url

    return bool(get_dashboard_url())


def mistake(error: Exception) -> ConrecError | None:
    """The error of ours that a worker raised, as it was: Ray hands on its text alone, inside a hundred lines."""
    match = _MISTAKE.search(str(error))
    kind = None if match is None else getattr(errors, match[1], None)
    return None if match is None or kind is None else kind(match[2].strip())


def may_grow() -> bool:
    """Whether the cluster that was joined gets nodes where there is work for them: cores that it has not may come."""
    return grows(_autoscaler_status(), _node_groups())


def grows(status: bytes | None, groups: Sequence[str]) -> bool:
    """Whether an autoscaler can add nodes.

    `status`: what Ray's monitor last wrote, None where it writes nothing, as the second autoscaler does; `groups`: the
    node groups that the nodes say they belong to. Where nobody launches nodes, the monitor has made up a type for each.
    """
    report = (json.loads(status) if status else {}).get("autoscaler_report")
    if report is None:
        return any(groups)
    types = {*report["active_nodes"], *report["pending_launches"]}
    return any(_MIRRORED_TYPE.fullmatch(name) is None for name in types)


def _start(cores: int) -> None:
    import ray
    from ray._common.utils import get_default_ray_temp_dir

    folder = get_default_ray_temp_dir()
    if len(os.fsencode(folder + _SESSION)) > SOCKET_PATH_BYTES:
        variable = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
        raise ClusterError(
            f"{variable} = {os.environ.get(variable)}: too long, since Ray's sockets lie below it and a socket's path "
            f"has {SOCKET_PATH_BYTES} bytes at most; name a folder of at most "
            f"{SOCKET_PATH_BYTES - len(_SESSION) - len('/ray')} bytes, for example export RAY_TMPDIR=/tmp"
        )
    cores = max(os.cpu_count() or 1, cores)
    try:
        # "local", or Ray would look for a cluster that somebody started on this machine, and wait for one that is gone.
        ray.init(address="local", num_cpus=cores, include_dashboard=False, log_to_driver=False)
    except Exception as error:  # Ray raises nothing narrower where one of its processes does not come up
        raise ClusterError(
            f"Ray did not start on this machine: {error}; look at the load, the memory and the disk of {folder}, where "
            "its logs lie, and run the same command again"
        ) from error


def _join(address: str) -> None:
    import ray
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    place = _head(address)
    try:
        with socket.create_connection(_host_and_port(place, address), ANSWER_SECONDS):
            pass
        if address == "auto":
            # Ray's own rule for a cluster of this machine, whose head asks for the token that is there. Of any other
            # nobody knows, and workers of one that asks for none are refused by a job that does.
            maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        with _repeating(lambda: f"  joins Ray at {place} (RAY_ADDRESS), which accepts and does not answer"):
            ray.init(address=place, log_to_driver=False)
    except (OSError, RuntimeError, ray.exceptions.RayError) as error:
        told = str(error.__cause__ or error).strip()
        if "AuthenticationError" in told:
            raise ClusterError(
                f"RAY_ADDRESS = {address}: that cluster asks for a token that this job does not send: export "
                "RAY_AUTH_MODE=token, with ~/.ray/auth_token of its head on this machine"
            ) from error
        raise ClusterError(
            f"RAY_ADDRESS = {address}: no Ray cluster can be joined there: {told.splitlines()[-1]}; start the cluster, "
            "mend the address, or unset RAY_ADDRESS to run on this machine"
        ) from error


def _head(address: str) -> str:
    """host:port of the head node. Raises `ClusterError` for what is the address of something else."""
    if address.startswith(("http://", "https://")):
        raise ClusterError(
            f"RAY_ADDRESS = {address}: that is the job server, which takes commands and no drivers; type "
            "ray job submit --working-dir . -- python jobs/STAGE.py --config FILE, or unset RAY_ADDRESS to run on this "
            "machine"
        )
    if "://" in address:
        raise ClusterError(
            f"RAY_ADDRESS = {address}: Ray Train and Ray Data do not run through a Ray client; submit a job, write "
            "the host:port of the head node from a machine of the cluster, or unset RAY_ADDRESS"
        )
    if address != "auto":
        return address
    # Only what `ray start` has written down: Ray itself would go on to any cluster among this machine's processes.
    from ray._private.utils import read_ray_address

    address = read_ray_address()
    if address is None:
        raise ClusterError("RAY_ADDRESS = auto: no cluster runs on this machine; ray start one, or unset RAY_ADDRESS")
    return str(address)


def _host_and_port(place: str, address: str) -> tuple[str, int]:
    host, _, port = place.rpartition(":")
    if not host or not port.isdecimal():
        raise ClusterError(f"RAY_ADDRESS = {address}: write host:port, for example 10.0.0.1:6379")
    return host.strip("[]"), int(port)


@contextlib.contextmanager
def _repeating(line: Callable[[], str | None]) -> Iterator[None]:
    """Says what `line` returns, if anything, every minute while the block runs."""
    done = threading.Event()

    def speak() -> None:
        while not done.wait(REPEAT_SECONDS):
            if (text := line()) is not None:
                console.print(text, markup=False)

    speaker = threading.Thread(target=speak, daemon=True)
    speaker.start()
    try:
        yield
    finally:
        done.set()
        speaker.join()


def give_back_gpu() -> None:
    """Ray takes a GPU for free that this process computed on, of which torch keeps all that it ever used."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        gc.collect()  # a model that nobody uses any more may hold itself
        torch.cuda.empty_cache()


def _nodes() -> list[dict[str, float]]:
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _free() -> list[dict[str, float]]:
    """What nobody holds, of all nodes together: Ray tells no more."""
    import ray

    return [ray.available_resources()]


def _node_groups() -> list[str]:
    import ray

    return [node["Labels"].get("ray.io/node-group", "") for node in ray.nodes() if node["Alive"]]


def _autoscaler_status() -> Any:
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.experimental.internal_kv import _internal_kv_get

    return _internal_kv_get(DEBUG_AUTOSCALING_STATUS)
