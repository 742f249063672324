"""The cluster files, against Ray's own schema and against each other; the jobs, as a cluster would start them."""

import ast
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from importlib import metadata
from pathlib import Path

import pytest
import ray
import torch
import yaml
from conftest import started_head

from conrec.cluster import connect, generation_need, give_back_gpu, grows, mistake, tell_held, training_need
from conrec.config import GenerateSettings, TrainSettings, load_settings
from conrec.errors import ClusterError, ConfigError

HOME = Path(__file__).parents[1]
JOBS = ("catalogue", "train", "evaluate", "nightly")


@pytest.fixture(scope="module")
def cluster():
    from ray.autoscaler._private.util import prepare_config

    return prepare_config(yaml.safe_load((HOME / "cluster.yaml").read_text()))


@pytest.fixture(scope="module")
def rayjob():
    return yaml.safe_load((HOME / "docs" / "rayjob.yaml").read_text())


@pytest.fixture(scope="module")
def settings():
    return load_settings(HOME / "examples" / "kuairand" / "cluster.toml")


def test_the_cluster_fits_rays_schema(cluster):
    from ray.autoscaler._private.util import validate_config

    validate_config(cluster)
    with pytest.raises(Exception, match="surplus"):
        validate_config(cluster | {"surplus": 1})


def test_the_head_runs_no_tasks(cluster):
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    (start,) = (command for command in cluster["head_start_ray_commands"] if "ray start" in command)
    assert "--num-cpus=0" in start
    assert "--autoscaling-config" in start


def test_the_nodes_that_read_and_write_the_store_have_a_role(cluster):
    nodes = cluster["available_node_types"]
    for name in nodes.keys() - {cluster["head_node_type"]}:  # the head gets one of Ray's
        assert ":instance-profile/" in nodes[name]["node_config"]["IamInstanceProfile"]["Arn"]


def test_the_image_has_the_programs_that_ray_up_and_kuberay_call():
    (line,) = (line for line in (HOME / "docs" / "Dockerfile").read_text().splitlines() if "apt-get install" in line)
    assert {"rsync", "wget"} <= set(line.split())


@pytest.mark.parametrize("page", ["README.md", "docs/cluster.md"])
def test_a_page_says_where_jobs_go_before_it_submits_one(page):
    text = (HOME / page).read_text()
    assert text.index("\nray dashboard ") < text.index("\nexport RAY_ADDRESS=http://") < text.index("\nray job submit ")


def test_training_is_on_demand_and_the_night_on_spot_nodes(cluster):
    nodes = cluster["available_node_types"]
    assert "InstanceMarketOptions" not in nodes["training"]["node_config"]
    assert nodes["inference"]["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"


def test_nothing_is_installed_at_boot_and_there_is_one_image(cluster):
    assert not any(
        cluster[key] for key in cluster if key.endswith("setup_commands") or key == "initialization_commands"
    )
    assert not cluster.get("file_mounts")
    assert {"head_image", "worker_image"}.isdisjoint(cluster["docker"])
    assert all("docker" not in node for node in cluster["available_node_types"].values())


def test_the_cluster_settings_fit_on_the_cluster(cluster, settings):
    nodes = cluster["available_node_types"]
    for wanted, count, cores in (
        (settings.train, settings.train.workers, settings.train.cpus_per_worker),
        (settings.generate, settings.generate.engines, settings.generate.cpus_per_engine),
    ):
        assert wanted.use_gpu
        node = nodes[wanted.node_resource]
        offered = node["resources"]
        each = min(offered["GPU"], offered[wanted.node_resource], offered["CPU"] // cores)
        assert each >= 1
        assert each * node["max_workers"] >= count


def test_the_kubernetes_job_is_the_same_cluster(rayjob, cluster):
    assert (rayjob["apiVersion"], rayjob["kind"]) == ("ray.io/v1", "RayJob")
    spec = rayjob["spec"]
    assert spec["entrypoint"].startswith("python /conrec/jobs/nightly.py --config ")
    assert spec["shutdownAfterJobFinishes"] is True
    ray_cluster = spec["rayClusterSpec"]
    assert ray_cluster["rayVersion"] == metadata.version("ray")
    assert ray_cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = {group["groupName"]: group for group in ray_cluster["workerGroupSpecs"]}
    nodes = cluster["available_node_types"]
    assert groups.keys() == nodes.keys() - {cluster["head_node_type"]}
    for name, group in groups.items():
        # KubeRay wants a JSON document inside a string inside a string.
        resources = json.loads(ast.literal_eval(group["rayStartParams"]["resources"]))
        assert resources == {name: nodes[name]["resources"][name]}
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == str(nodes[name]["resources"]["GPU"])
        assert container["image"] == cluster["docker"]["image"]
        assert group["maxReplicas"] == nodes[name]["max_workers"]


@pytest.mark.long
@pytest.mark.parametrize("job", JOBS)
def test_a_job_runs_the_checkout_it_lies_in_and_says_how_it_is_submitted(job, tmp_path):
    source = (HOME / "jobs" / f"{job}.py").read_text()
    assert f"ray job submit --working-dir . -- python jobs/{job}.py --config" in ast.get_docstring(ast.parse(source))
    # A checkout whose package is not the installed one, started from somewhere else.
    shutil.copytree(HOME / "jobs", tmp_path / "jobs")
    (tmp_path / "conrec").mkdir()
    (tmp_path / "conrec" / "__init__.py").touch()
    (tmp_path / "conrec" / "cli.py").write_text("def main(arguments):\n    print('this checkout', *arguments)\n")
    done = subprocess.run(
        [sys.executable, str(tmp_path / "jobs" / f"{job}.py"), "--config", "a.toml", "--set", "seed=1"],
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"this checkout {job} --config a.toml --set seed=1\n"


@pytest.mark.long
@pytest.mark.parametrize("job", JOBS)
def test_a_job_refuses_bad_settings_as_the_command_line_does(job):
    done = subprocess.run(
        [sys.executable, f"jobs/{job}.py", "--config", "examples/kuairand/cluster.toml", "--set", "seed=x"],
        cwd=HOME,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "seed = 'x'" in done.stderr


NODE = {"CPU": 8.0, "GPU": 2.0, "training": 2.0, "memory": 1e9}
PLAIN = b"""{"autoscaler_report": {"active_nodes":
 {"node_6650a440d13cdd0b86766866d9e12e428f26b87b917ae290e56aade6": 1}, "pending_launches": {}, "legacy": true}}"""
"""What the monitor of a cluster started by hand writes (Ray 2.60)."""
LAUNCHED = b"""{"autoscaler_report": {"active_nodes": {"head": 1}, "pending_launches": {"inference": 1}}}"""


@pytest.mark.parametrize(
    ("settings", "nodes", "room"),
    [
        (TrainSettings(workers=2, use_gpu=True), [NODE], 2),
        (TrainSettings(workers=2, use_gpu=True, cpus_per_worker=5), [NODE], 1),
        (TrainSettings(workers=2, use_gpu=True, cpus_per_worker=5), [NODE, NODE], 2),
        # Ten cores in all, and no node with four of them.
        (TrainSettings(workers=2, cpus_per_worker=4), [{"CPU": 3}, {"CPU": 3}, {"CPU": 4}], 1),
        (TrainSettings(workers=2, use_gpu=True), [{"CPU": 64}], 0),
        (TrainSettings(workers=2, node_resource="training"), [NODE], 2),
        (TrainSettings(workers=2, node_resource="trainign"), [NODE], 0),
        (TrainSettings(), [], 0),
    ],
)
def test_workers_fit_where_one_node_has_all_that_they_take(settings, nodes, room):
    assert training_need(settings).room(nodes) == room


def test_what_is_lacking_is_told_with_the_settings_that_ask_for_it():
    need = generation_need(GenerateSettings(engines=3, use_gpu=True, cpus_per_engine=4, node_resource="inference"))
    assert need.lack([NODE, NODE]) == (
        "generate.engines = 3 asks for 4 CPU (generate.cpus_per_engine), 1 GPU (generate.use_gpu), 1 inference "
        "(generate.node_resource) each, and there is room for 0 of them: the nodes have 16 CPU, 4 GPU, 0 inference in "
        "all"
    )
    free = {"CPU": 8.0, "inference": 1.0}  # Ray leaves out what is gone
    assert need.lack([free], free=True).endswith(
        "room for 0 of them: of what the nodes have, 8 CPU, 0 GPU, 1 inference are free"
    )


@pytest.mark.parametrize(
    ("status", "groups", "answer"),
    [
        (PLAIN, ["", ""], False),
        (PLAIN, ["workers"], False),  # KubeRay names its groups also where nothing scales them
        (LAUNCHED, [""], True),
        (None, ["", ""], False),
        (None, ["head"], True),  # the second autoscaler
        (b"{}", [""], False),  # a monitor that has just begun
    ],
)
def test_a_cluster_grows_where_somebody_launches_its_nodes(status, groups, answer):
    assert grows(status, groups) is answer


def test_what_this_process_computed_on_a_gpu_is_given_back_before_workers_ask_for_it(monkeypatch):
    class Model:
        pass

    model, left = Model(), []
    model.hook, gone = model, weakref.ref(model)  # as one of transformers holds itself
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: left.append(gone()))
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 0.0}}])
    del model
    tell_held(training_need(TrainSettings()))
    assert left == [None]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
def test_a_gpu_has_room_again_for_others():
    held = torch.zeros(1 << 28, device="cuda")
    del held
    before = torch.cuda.mem_get_info()[0]
    give_back_gpu()
    assert torch.cuda.mem_get_info()[0] >= before + (1 << 28)


def test_a_mistake_that_a_worker_found_is_told_as_it_was():
    # As Ray 2.60 words the death of an actor, and the failure of a task.
    died = """The actor died because of an error raised in its creation task, ray::MapWorker.__init__() (pid=5455)
  File "act.py", line 10, in __init__
    raise ConfigError("generate.kv_cache_gib = 1 is too small")
conrec.errors.ConfigError: generate.kv_cache_gib = 1 is too small;
raise it"""
    failed = f"{died}\n\nThe above exception was the direct cause of the following exception:\n\nRayTaskError"
    for text in (died, failed):
        found = mistake(RuntimeError(text))
        assert type(found) is ConfigError
        assert str(found) == "generate.kv_cache_gib = 1 is too small;\nraise it"
    assert mistake(RuntimeError("ValueError: of somebody else")) is None


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("http://127.0.0.1:8265", "that is the job server.*type ray job submit --working-dir .* unset RAY_ADDRESS"),
        ("ray://127.0.0.1:10001", "do not run through a Ray client"),
        ("head", "write host:port"),
        ("127.0.0.1:{closed}", "no Ray cluster can be joined there: .*refused; start the cluster"),
    ],
)
def test_a_cluster_that_cannot_be_joined_is_told_at_once(address, told, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: nobody else can answer there
        address = address.format(closed=closed.getsockname()[1])
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ClusterError, match=f"RAY_ADDRESS = {address}: .*{told}"):
            connect()


def test_a_cluster_that_was_left_behind_is_told_at_once(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(ClusterError, match="RAY_ADDRESS = auto: no cluster runs on this machine"):
        connect()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(ClusterError, match="RAY_ADDRESS = auto: no Ray cluster can be joined there"):
            connect()


@pytest.mark.ray
@pytest.mark.long
def test_a_job_sends_the_token_that_a_cluster_of_its_machine_asks_for(tmp_path):
    """A head asks for the token of its home folder where one is; actors answer the job that sends it."""
    ray, kept = str(Path(sys.executable).with_name("ray")), ("RAY_AUTH_MODE", "RAY_ADDRESS")
    environment = {name: value for name, value in os.environ.items() if name not in kept}
    work = """
import ray
from conrec.cluster import connect
connect()
@ray.remote
class Actor:
    def cores(self):
        return ray.cluster_resources()["CPU"]
print(ray.get(Actor.remote().cores.remote()))
"""
    # A socket's path has a hundred bytes.
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        environment |= {"HOME": str(tmp_path), "RAY_TMPDIR": folder}
        subprocess.run([ray, "get-auth-token", "--generate"], env=environment, capture_output=True, check=True)
        with started_head(1, environment) as head:
            while not (Path(folder) / "ray" / "ray_current_cluster").exists():
                assert head.process.poll() is None, "Ray did not start"
                time.sleep(0.1)
            here = environment | {"RAY_ADDRESS": "auto"}
            told = subprocess.run([sys.executable, "-c", work], env=here, capture_output=True, text=True, timeout=120)
    assert told.stdout.split() == ["1.0"], told.stderr


@pytest.mark.parametrize("variable", ["RAY_TMPDIR", "TMPDIR"])
def test_a_temporary_folder_too_long_for_sockets_is_told(variable, monkeypatch, tmp_path):
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / ("x" * 60)
    monkeypatch.setenv(variable, str(folder))
    with pytest.raises(ClusterError, match=f"{variable} = {folder}: too long, .*export RAY_TMPDIR=/tmp"):
        connect()
    assert not folder.exists()
