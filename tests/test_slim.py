"""conrec without an extra is what a serving host needs: it reads, mirrors, filters and looks.

The environment is made of links to the distributions that the requirements name, so that no registry is asked.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tomllib
import venv
from importlib import metadata
from pathlib import Path

import pyarrow as pa
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from conrec.errors import REST
from conrec.store import pointers
from conrec.store.compiled import with_compiled
from conrec.store.publish import Block, write_version
from conrec.tables import BLOCKLIST, RULES

HOME = Path(__file__).parents[1]
PROJECT = tomllib.loads((HOME / "pyproject.toml").read_text())["project"]
SERVING = {"numpy", "pyarrow", "fsspec", "safetensors"}
"""What the room serving imports, of the libraries that are not its own."""
ON_REQUEST = {"redis"}
"""What it imports where it is asked to: of an extra of its own."""


def required(texts):
    """The distributions of some requirements and of all that they require in turn, as this Python takes them."""
    found, left = set(), [*texts]
    while left:
        requirement = Requirement(left.pop())
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            assert not requirement.extras, requirement
            if requirement.name not in found:
                found.add(requirement.name)
                left += metadata.requires(requirement.name) or ()
    return found


def link(name, folder):
    """Puts what a distribution installed into a folder, by links to its packages, modules and metadata."""
    distribution = metadata.distribution(name)
    for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
        if not (folder / top).exists():
            (folder / top).symlink_to(distribution.locate_file(top))


@pytest.fixture(scope="module")
def slim(tmp_path_factory):
    """The interpreter of an environment that has conrec and what it requires without an extra."""
    folder = tmp_path_factory.mktemp("slim") / "venv"
    venv.create(folder, symlinks=True, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    for name in required(PROJECT["dependencies"]):
        link(name, packages)
    (packages / "conrec").symlink_to(HOME / "conrec")
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def ask(slim, tmp_path_factory):
    """Runs statements with that interpreter beside a store of two versions, v1 and v2, and settings; returns what they
    leave in `told`, as JSON."""
    folder = tmp_path_factory.mktemp("host")
    root = str(folder / "root" / "blocklists")
    about = {"watermark_us": 0, "generated_users": 1, "failed_users": 0}
    for version in ("v1", "v2"):
        written = write_version(root, version, [Block(0, one_row(), RULES.empty_table())], about)
        manifest = with_compiled(root, written, lambda: None)
        pointers.swap_pointer(pointers.observe(root), version, pointers.create_manifest(root, version, manifest))
    (folder / "my.toml").write_text(
        'root = "root"\n[interactions]\npath = "i.parquet"\n[items]\npath = "i.parquet"\n'
        "[timeline]\ncut = 2026-01-01T00:00:00Z\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}

    def run(statements):
        code = f"import json\n{statements}\nprint(json.dumps(told))"
        done = subprocess.run([slim, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def one_row():
    moment = 3_700_000_000_000_000  # of the year 2087
    row = ("ann", "ring", "explicit", 1.0, 1.0, None, moment, moment)
    columns = [pa.array([value]).cast(field.type) for value, field in zip(row, BLOCKLIST, strict=True)]
    return pa.table(columns, BLOCKLIST)


COMMANDS = """
import contextlib, io
from conrec import cli

@cli.app.command("policy")
def policy():
    import conrec.policy.model

told = []
for words in asked:
    out, error, code = io.StringIO(), io.StringIO(), 0
    cli.console.file = out
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            cli.main(words.split())
        except SystemExit as end:
            code = end.code
    told.append([code, out.getvalue(), error.getvalue()])
"""
NEEDS_THE_REST = "where there is a GPU pip install --no-deps -r requirements/gpu.txt\n"
WITH = " --config my.toml"
ASKED = {
    "--version": f"conrec {PROJECT['version']}",
    "--help": "collect-garbage",
    "mirror root/blocklists followed": "followed: now v2",
    "versions" + WITH: "* v2",
    "verify" + WITH: "v2 is whole",
    "diff v1 v2" + WITH: "explicit",
    "metrics" + WITH: "conrec_users",
    "rollback v1" + WITH: "serving reads v1",
    "config" + WITH: "[timeline]",
}


@pytest.mark.long
def test_a_serving_host_mirrors_and_filters(ask):
    told = ask("""
import conrec.stages.forget, conrec.stages.garbage, conrec.stages.show
from conrec import BlocklistReader, RulesReader
from conrec.serving.mirror import mirror
mirror("root/blocklists", "mirror")
readers = [BlocklistReader("mirror"), BlocklistReader("root/blocklists", version="v1")]
told = [[reader.version, reader.filter("ann", ["ring", "rope"])] for reader in readers]
""")
    assert told == [["v2", ["rope"]], ["v1", ["rope"]]]


@pytest.mark.long
def test_a_serving_host_looks_at_what_is_published(ask):
    found = ask(f"asked = {list(ASKED)}\n{COMMANDS}")
    for (words, told), (code, out, error) in zip(ASKED.items(), found, strict=True):
        assert (code, error) == (0, ""), words
        assert told in out, words


@pytest.mark.long
def test_what_needs_an_extra_says_which(ask):
    rest, store = ask(f"asked = ['policy', 'mirror s3://bucket/blocklists s3']\n{COMMANDS}")
    assert rest[:2] == [2, ""] and rest[2].startswith("torch: it is not installed; in a checkout, make .venv/complete")
    assert rest[2].endswith(NEEDS_THE_REST)
    assert store[0] == 2 and store[2].endswith('; in a checkout, pip install ".[s3]"\n')


def imported(module, seen):
    """Modules that a module of conrec imports, wherever in its file, and those that it imports of conrec in turn."""
    file = HOME / Path(*module.split("."))
    file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
    if not file.exists() or module in seen:
        return set()
    seen.add(module)
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    own = {name for name in names if name.split(".")[0] == "conrec"}
    return (names - own).union(*(imported(name, seen) for name in own))


def libraries(modules):
    tops = {name.split(".")[0] for name in modules} - {"conrec", "__future__"}
    return tops - set(sys.stdlib_module_names)


def test_serving_imports_what_a_serving_host_has():
    seen = set()
    files = (HOME / "conrec" / "serving").glob("*.py")
    found = set().union(*(imported(f"conrec.serving.{file.stem}", seen) for file in files))
    assert libraries(found) == SERVING | ON_REQUEST
    assert not [name for name in seen if name.startswith(("conrec.policy", "conrec.stages", "conrec.blocklist"))]


@pytest.mark.long
def test_what_the_extras_bring_is_what_an_error_can_name():
    extras = PROJECT["optional-dependencies"]
    brought = {canonicalize_name(Requirement(text).name) for extra in ("jobs", "cpu", "gpu") for text in extras[extra]}
    slim = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    installed = metadata.packages_distributions()
    assert all(brought - slim & {*map(canonicalize_name, installed[module])} for module in REST - {"tokenizers"})
    seen = set()
    modules = set().union(*(imported(file_module(file), seen) for file in (HOME / "conrec").rglob("*.py")))
    assert libraries(modules) - REST == slim | ON_REQUEST | {"pydantic_core"}


def file_module(file):
    return ".".join(file.relative_to(HOME).with_suffix("").parts).removesuffix(".__init__")
