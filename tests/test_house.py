"""The arrows between the rooms of conrec/, and the faces of the rooms, are those of docs/house.md. Rooms are parsed,
not imported."""

import ast
import re
from pathlib import Path

import pytest
import typer

from conrec import cli

HOME = Path(__file__).parents[1]
PACKAGE = HOME / "conrec"
OWN_ROWS = {"cli", "__init__"}
COMMANDS = typer.main.get_command(cli.app).commands


def room(package, name):
    """The room of the first name below `package`: a folder, a file with a row of its own, or the base."""
    if (package / name).is_dir() or name in OWN_ROWS:
        return name
    # `from conrec import BlocklistReader`: no file of that name, so the face of the package is asked.
    return "base" if (package / f"{name}.py").is_file() else "__init__"


def imported(package, file):
    """The first names below `package` that a file imports, wherever in the file it does so."""
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: import it by its whole name, that its room can be read"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith(f"{package.name}."))


def arrows(package):
    """Room -> the rooms that it imports -> the files that do."""
    found = {}
    for file in sorted(package.rglob("*.py")):
        path = file.relative_to(package)
        source = room(package, path.with_suffix("").parts[0])
        targets = found.setdefault(source, {})
        for name in imported(package, file):
            if room(package, name) != source:
                targets.setdefault(room(package, name), set()).add(str(path))
    return found


def rows(heading):
    """First cell, without its backticks, -> the other cells of the table below a heading of the page."""
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", (HOME / "docs" / "house.md").read_text(), re.S | re.M)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in re.findall(r"^\|.*\|$", section, re.M)]
    return {first.strip("`"): others for first, *others in cells[2:]}


def drawn():
    return {
        name: set(filter(None, cells[1].split(", "))) for name, cells in rows("Rooms, and what each may import").items()
    }


def test_every_import_follows_an_arrow_of_the_page_and_every_arrow_is_used():
    found, allowed = arrows(PACKAGE), drawn()
    assert found.keys() == allowed.keys()
    for source, targets in found.items():
        against = {target: files for target, files in targets.items() if target not in allowed[source]}
        assert not against, f"{source} may not import {against}"
        unused = allowed[source] - targets.keys()
        assert not unused, f"{source} no longer imports {unused}"


FACES = {path.parent.name: path for path in PACKAGE.glob("*/__init__.py")}


def told(face):
    """The docstring of a face; nothing else stands there."""
    (only,) = ast.parse(face.read_text()).body
    return ast.literal_eval(only.value)


@pytest.mark.parametrize("name", FACES)
def test_a_face_says_what_the_page_says(name):
    purpose, imports = rows("Rooms, and what each may import")[name]
    first, second = told(FACES[name]).split("\n\n")[:2]
    assert first == f"{purpose[0].upper()}{purpose[1:]}."
    assert second == f"May import: {imports}."


@pytest.mark.parametrize("name", FACES)
def test_what_a_face_shows_is_there(name):
    text = told(FACES[name])
    assert [
        file for file in re.findall(r"(?<![\w/.])(\w+\.py)", text) if not (FACES[name].parent / file).is_file()
    ] == []
    lines = [line[4:] for line in text.splitlines() if line.startswith("    ")]
    commands = [line.split() for line in lines if line.startswith("conrec ")]
    for _, command, *words in commands:
        options = {option for parameter in COMMANDS[command].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options
    code = ast.parse("\n".join(line for line in lines if not line.startswith("conrec ")))
    shown = [node for node in code.body if isinstance(node, ast.ImportFrom)]
    assert commands or shown
    for node in shown:
        source = (HOME / Path(*node.module.split("."))).with_suffix(".py")
        names = ast.parse((source if source.is_file() else PACKAGE / "__init__.py").read_text())
        stored = {one.name for one in ast.walk(names) if hasattr(one, "name")}
        assert {alias.name for alias in node.names} <= stored


def test_no_arrow_runs_back_up():
    order = list(drawn())
    for source, targets in drawn().items():
        # The command line stands above all, and nothing imports the face.
        assert all(order.index(target) < order.index(source) for target in targets), source


def test_every_file_of_the_base_has_its_line():
    assert rows("The base").keys() == {file.stem for file in PACKAGE.glob("*.py")} - OWN_ROWS


@pytest.mark.parametrize(
    ("line", "target"),
    [
        ("from conrec.stages.run import run_stage", "stages"),
        ("import conrec.policy.model", "policy"),
        ("def later():\n    from conrec.stages import run", "stages"),
        ("if TYPE_CHECKING:\n    from conrec import stages", "stages"),
        ("from conrec import BlocklistReader", "__init__"),
        ("from conrec.errors import DataError", "base"),
    ],
)
def test_an_import_is_seen_wherever_it_stands(line, target, tmp_path):
    for name in ("feedback", "policy", "stages"):
        (tmp_path / "conrec" / name).mkdir(parents=True)
    (tmp_path / "conrec" / "errors.py").touch()
    (tmp_path / "conrec" / "feedback" / "rules.py").write_text(f"import conrec\nimport numpy\n{line}\n")
    assert arrows(tmp_path / "conrec")["feedback"] == {target: {"feedback/rules.py"}}
