"""The cluster files, against Ray's own schema and against each other; the jobs, as a cluster would start them."""

import ast
import json
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from conrec.config import load_settings

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
