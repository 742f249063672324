"""What `from conrec import ...` gives, what `import conrec` leaves alone, and what the wheel carries."""

import inspect
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import conrec
from conrec import errors

HOME = Path(__file__).parents[1]


def loaded(statement):
    """The packages that a fresh interpreter has loaded after a statement."""
    code = f"{statement}\nimport sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=HOME, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_every_name_of_the_face_is_there():
    for name in conrec.__all__:
        assert getattr(conrec, name).__name__ == name


def test_every_error_is_exported():
    own = {name for name, _ in inspect.getmembers(errors, inspect.isclass)}
    assert own == {name for name in conrec.__all__ if issubclass(getattr(conrec, name), Exception)}


def test_a_name_that_is_not_there_is_refused():
    with pytest.raises(ImportError, match="BlockListReader"):
        from conrec import BlockListReader  # noqa: F401


def test_the_version_is_that_of_the_project():
    assert conrec.__version__ == tomllib.loads((HOME / "pyproject.toml").read_text())["project"]["version"]


@pytest.mark.long
def test_the_package_alone_loads_no_library():
    assert loaded("import conrec") <= loaded("import importlib, typing") | {"conrec"}


@pytest.mark.long
def test_the_readers_load_what_a_serving_host_has():
    heavy = {"torch", "ray", "vllm", "faiss", "transformers", "scipy", "lightgbm", "matplotlib", "typer"}
    assert not loaded("from conrec import BlocklistReader, RulesReader") & heavy


@pytest.mark.long
def test_the_wheel_says_that_it_is_typed(tmp_path):
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(HOME / name, tmp_path)
    shutil.copytree(HOME / "conrec", tmp_path / "conrec", ignore=shutil.ignore_patterns("__pycache__"))
    code = "from setuptools.build_meta import build_wheel; build_wheel('.')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert "conrec/py.typed" in zipfile.ZipFile(wheel).namelist()
