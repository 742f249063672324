"""The fine-tune under Ray Train: `TorchTrainer` runs `conrec.policy.loop` on every worker and keeps its checkpoints.

Invariant: killed at any moment (a worker, or the whole job) it goes on from the last checkpoint and ends after the
same number of steps. A failed worker is restarted, unless it failed over a setting (`conrec.policy.failures`); a whole
job is resumed by calling `fit` again with the same URL, where Ray Train finds the run it left. Checkpoints are
safetensors and JSON.

    policy = fit(inputs, measure, f"{root}/policy/<version>/.unfinished/ray", print)     # `conrec train` calls it
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.callbacks.working_dir_setup import WorkingDirectorySetupCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from safetensors.torch import load_file, save_file

from conrec import storage
from conrec.catalogue.codebook import Codebook
from conrec.catalogue.trie import Trie
from conrec.cluster import announced, connect, has_dashboard, mistake, own_handlers, tell_held, training_need
from conrec.config import Config
from conrec.errors import ArtefactError, ConfigError
from conrec.policy.decoding import DeviceTrie
from conrec.policy.failures import FailurePolicy
from conrec.policy.loop import TENSOR_GROUPS, Evaluate, LoopState, TrainingLoop
from conrec.policy.memory import SMALLER_MODEL, SMALLER_ROW
from conrec.policy.model import build_model, put_tensors, read_tensors, trainable, write_tensors
from conrec.policy.samples import TrainingData

BOARD_POLL_SECONDS = 0.5
REPORT_POLL_SECONDS = 0.2
"""How often Ray Train takes a report of each worker, one at a time. With its default of 2 s a worker that makes
checkpoints faster than that waits, and so does the end of every training."""

WAIT_SECONDS = 7_200
"""How long workers wait for another: for the first one while it puts a checkpoint into the store (132 GB for 6 billion
parameters, docs/cluster.md: half an hour, torch's default, asks for 73 MB a second, this for 18). Ray Train notices
a worker that is gone long before."""


@dataclasses.dataclass(frozen=True)
class TrainedPolicy:
    """What `fit` returns: rows of metrics.jsonl and the trainable tensors at the end, float32 where masters are."""

    rows: list[dict[str, Any]]
    final: dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What every worker builds its model from: texts of all items where there is no pretrained one, the trie and the
    codebook of the catalogue.

    `start_url` names a safetensors file of trainable tensors: where there are supervised tasks it is written at their
    end, where there are none the stages start from it.
    """

    config: Config
    texts: list[str]
    trie: Trie
    codebook_url: str
    data_url: str
    start_url: str


class _Trainer(TorchTrainer):
    """With our `FailurePolicy`, and without what Ray Train does to no use: an actor for its data sets, of which there
    are none, and the cleaner of placement groups where no dashboard runs. Workers stay in the folder of the job, from
    which a relative `model.name_or_path` is meant, and go to none of Ray Train's.

    The cleaner asks the dashboard whether the controller lives. Where there is none it can clean nothing, takes ten
    seconds to find that out, and holds up the end of every training by twelve.
    """

    def _create_default_callbacks(self) -> list[Any]:
        useless: tuple[type, ...] = (DatasetsCallback, WorkingDirectorySetupCallback)
        if not has_dashboard():
            useless += (PlacementGroupCleanerCallback,)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, useless)]

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        given["failure_policy"] = FailurePolicy(self.run_config.failure_config)
        return super()._initialize_and_run_controller(**given)


def fit(inputs: Inputs, evaluate: Evaluate, url: str, on_row: Callable[[dict[str, Any]], None]) -> TrainedPolicy:
    """Trains, or goes on with the run that was left under `url`. `on_row` sees each row of metrics as it comes.

    Raises `ConfigError` where a worker did, and `ArtefactError` when the workers failed more often than
    `train.max_failures` allows.
    """
    train = inputs.config.train
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(REPORT_POLL_SECONDS))
    need = training_need(train)
    connect(train.workers * train.cpus_per_worker, need)
    tell_held(need)
    if not has_dashboard():
        # A Ray of this machine alone: no node of it is drained, and a process that watches for that takes seconds.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    board = board_here()
    trainer = _Trainer(
        _worker,
        # As a reference: what is given as it is, Ray Train's controller unpickles too, and imports torch for that.
        train_loop_config={"work": ray.put((inputs, evaluate)), "board": board},
        scaling_config=ScalingConfig(
            num_workers=train.workers,
            use_gpu=train.use_gpu,
            resources_per_worker=dict(need.bundle),
        ),
        torch_config=TorchConfig(backend="nccl" if train.use_gpu else "gloo", timeout_s=WAIT_SECONDS),
        run_config=RunConfig(
            name="run",
            storage_path=storage.absolute(url),
            failure_config=FailureConfig(max_failures=train.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(board, on_row, done), daemon=True)
    watcher.start()
    try:
        with announced(need), own_handlers():
            result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise mistake(error) or ArtefactError(
            f"training failed more than train.max_failures = {train.max_failures} times: {error}; run the same command "
            f"again to go on from the last checkpoint under {url}"
        ) from error
    finally:
        done.set()
        watcher.join()
    assert result.checkpoint is not None
    with result.checkpoint.as_directory() as folder:
        state, final = _read(Path(folder))
    return TrainedPolicy(state.rows, final | state.tensors["masters"])


def board_here() -> Any:
    """A `_Board` on the driver's node, which the training does not outlive: any other may go in the middle of it."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return _Board.options(num_cpus=0, scheduling_strategy=here).remote()  # type: ignore[attr-defined]


def _watch(board: Any, on_row: Callable[[dict[str, Any]], None], done: threading.Event) -> None:
    seen = 0
    while True:
        finished = done.wait(BOARD_POLL_SECONDS)
        rows = ray.get(board.since.remote(seen))
        for row in rows:
            on_row(row)
        seen += len(rows)
        if finished:
            return


@ray.remote
class _Board:
    """Rows of metrics on their way from the first worker to the driver's progress bar."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def post(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def since(self, seen: int) -> list[dict[str, Any]]:
        return self.rows[seen:]


def _worker(options: dict[str, Any]) -> None:
    (inputs, evaluate), board = ray.get(options["work"]), options["board"]
    config = inputs.config
    torch.set_num_threads(config.train.cpus_per_worker)
    data = TrainingData.load(inputs.data_url)
    model, _, vocabulary = build_model(config, inputs.texts)
    device = ray.train.torch.get_device()
    if config.train.use_gpu and device.type == "cpu":
        raise ConfigError(
            "train.use_gpu = true, but torch finds no GPU where this worker runs: install the driver that torch "
            f"{torch.__version__} wants, or a torch built for CUDA, or write train.use_gpu = false"
        )
    context = ray.train.get_context()

    def checkpoint(state: LoopState) -> None:
        if context.get_world_rank() != 0:
            ray.train.report({"phase": state.phase, "step": state.step})
            return
        if data.tasks and (state.phase, state.step) == (len(data.tasks), 0):
            # Before the checkpoint: a run that goes on from it does not pass here again.
            write_tensors(trainable(model) | state.tensors["masters"], inputs.start_url)
        with tempfile.TemporaryDirectory() as folder:
            _write(Path(folder), state, trainable(model))
            ray.train.report({"phase": state.phase, "step": state.step}, checkpoint=Checkpoint.from_directory(folder))

    codebook = Codebook.load(inputs.codebook_url)
    loop = None
    try:
        model.to(device)
        loop = TrainingLoop(
            model,
            data,
            DeviceTrie(inputs.trie, vocabulary, device),
            torch.from_numpy(codebook.similarity_vectors(inputs.trie.semantic_ids)),
            torch.from_numpy(inputs.trie.semantic_ids),
            config,
            evaluate,
            lambda row: board.post.remote(row),
            checkpoint,
            begun(inputs, data, model, ray.train.get_checkpoint()),
        )
        loop.run()
    except torch.OutOfMemoryError as error:
        raise out_of_memory(None if loop is None else loop.learner.tokens_at_once, data.longest, error) from error


def begun(inputs: Inputs, data: TrainingData, model: Any, resumed: Checkpoint | None) -> LoopState | None:
    """Gives the model what the phases begin from, or go on from, and returns the state beside it.

    Nobody else may hold what is read here: whole float32 masters, which the loop cuts down to this worker's share.
    """
    if resumed is not None:
        with resumed.as_directory() as folder:
            state, tensors = _read(Path(folder))
        if data.tasks and state.phase >= len(data.tasks) and not storage.exists(inputs.start_url):
            # Somebody deleted what the supervised phases had left: only they write it, so they begin anew.
            return None
        put_tensors(model, tensors)
        return state
    if data.tasks:
        return None
    started = read_tensors(inputs.start_url)
    put_tensors(model, started)
    return LoopState(tensors={group: {} for group in TENSOR_GROUPS} | {"masters": started})


def out_of_memory(tokens_at_once: int | None, longest: int, error: torch.OutOfMemoryError) -> ConfigError:
    """What a training that did not fit its GPU is told.

    `tokens_at_once`: None where no step was reached. `longest`: tokens of the longest row, which is not cut.
    """
    reason = str(error).splitlines()[0]
    if tokens_at_once is None:
        return ConfigError(
            "the GPU has too little memory for the model, its gradient and a worker's share of the masters: "
            f"{SMALLER_MODEL} ({reason})"
        )
    if tokens_at_once <= longest:
        return ConfigError(
            f"the GPU has too little memory for one row of {longest:,} tokens beside the model: {SMALLER_ROW} "
            f"({reason})"
        )
    return ConfigError(
        f"the GPU has too little memory for {tokens_at_once} tokens at once beside the model: write "
        f"train.tokens_at_once = {max(longest, tokens_at_once // 2)}, or train.recompute_layers = true ({reason})"
    )


def _write(folder: Path, state: LoopState, parameters: Mapping[str, torch.Tensor]) -> None:
    tensors = {f"parameters|{name}": value.detach().contiguous() for name, value in parameters.items()}
    for group, named in state.tensors.items():
        tensors |= {f"{group}|{name}": value.contiguous() for name, value in named.items()}
    save_file(tensors, folder / "state.safetensors")
    plain = {name: value for name, value in vars(state).items() if name != "tensors"}
    (folder / "state.json").write_text(json.dumps(plain))


def _read(folder: Path) -> tuple[LoopState, dict[str, torch.Tensor]]:
    groups: dict[str, dict[str, torch.Tensor]] = {group: {} for group in ("parameters", *TENSOR_GROUPS)}
    for key, value in load_file(folder / "state.safetensors").items():
        group, _, name = key.partition("|")
        groups[group][name] = value
    parameters = groups.pop("parameters")
    return LoopState(**json.loads((folder / "state.json").read_text()), tensors=groups), parameters
