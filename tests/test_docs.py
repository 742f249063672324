"""The pages: every command that they name exists with these options, every test too, and their code runs."""

from __future__ import annotations

import ast
import re
import shlex
from datetime import UTC, datetime
from pathlib import Path

import pytest
import typer

from conrec import cli
from conrec.config import Config
from conrec.serving import versions
from conrec.serving.mirror import mirror
from conrec.store import pointers
from conrec.store.publish import Block, write_version
from conrec.tables import BLOCKLIST, RULES

HOME = Path(__file__).parents[1]
OPERATIONS = HOME / "docs" / "operations.md"
PAGES = [*sorted(HOME.glob("*.md")), *sorted((HOME / "docs").glob("*.md"))]
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.S | re.M)
ROOT = typer.main.get_command(cli.app)


def parts(text):
    """Lines of fenced blocks that are not Python, and what stands between single backticks."""
    prose = FENCE.sub("", text)
    lines = [
        line
        for kind, body in FENCE.findall(text)
        if kind != "python"
        for line in body.replace("\\\n", " ").splitlines()
    ]
    return [line.strip() for line in lines], [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


def resolve(line):
    """The command that a line calls, and the words after its name. Raises `KeyError` where there is none."""
    words = shlex.split(line, comments=True)[1:]
    command = ROOT
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        command = command.commands[words.pop(0)]
    return command, words


def lines_and_mentions():
    for page in PAGES:
        lines, mentions = parts(page.read_text())
        for whole, found in ((True, lines), (False, mentions)):
            for line in found:
                line = line.removeprefix(".venv/bin/")
                if line.startswith("conrec "):
                    yield page.name, whole, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_are_read_as_they_are_meant(page):
    """A backtick that is not closed would make code of the prose behind it; a table has a row."""
    text = page.read_text()
    paragraphs = re.split(r"\n\s*\n", FENCE.sub("", text))
    assert [paragraph for paragraph in paragraphs if paragraph.count("`") % 2] == []
    assert re.findall(r"^ *\|[-:| ]+\|\n(?! *\|)", text, re.M) == []


def test_every_command_of_the_pages_is_one():
    seen = set()
    for page, whole, line in lines_and_mentions():
        try:
            command, words = resolve(line)
        except KeyError as error:
            pytest.fail(f"{page}: {line}: no command {error}")
        options = {name for parameter in command.params for name in parameter.opts}
        for word in words:
            assert not word.startswith("--") or word.split("=")[0] in options, f"{page}: {line}: no option {word}"
        if whole:
            # As the shell would call it: options take their values, and no argument is missing.
            command.make_context(command.name, list(words))
        seen.add(command.name)
    assert seen >= {"nightly", "versions", "rollback", "verify", "diff", "collect-garbage", "mirror", "redis", "show"}


def test_every_option_and_setting_that_is_named_alone_exists():
    known = {name for command in commands(ROOT) for parameter in command.params for name in parameter.opts}
    text = OPERATIONS.read_text()
    _, mentions = parts(text)
    for mention in mentions:
        if mention.startswith("--"):
            assert mention.split()[0] in known, mention
    settings = re.findall(r"(?:--set |`)((?:publish|guardrails|calibration|interactions)\.[a-z_.]+)", text)
    assert len(settings) > 10
    assert [name for name in settings if not is_setting(name)] == []


def commands(command):
    yield command
    for inner in getattr(command, "commands", {}).values():
        yield from commands(inner)


def is_setting(name):
    model = Config
    for part in name.split("."):
        if part not in getattr(model, "model_fields", {}):
            return False
        model = model.model_fields[part].annotation
    return True


def test_every_test_that_is_named_exists():
    text = OPERATIONS.read_text()
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", text)
    assert len(named) > 40
    assert len(named) == text.count("::")
    for file, name in named:
        tree = ast.parse((HOME / "tests" / file).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"


def test_the_index_has_every_file_of_docs():
    index = HOME / "docs" / "README.md"
    listed = re.findall(r"^\| \[(\S+)\]\(\1\) \|", index.read_text(), re.M)
    assert sorted(listed) == sorted(file.name for file in index.parent.iterdir() if file != index)


def test_links_lead_somewhere():
    for page in PAGES:
        text = page.read_text()
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", text):
            file = (page.parent / target) if target else page
            assert file.exists(), f"{page.name}: {target}"
            if anchor:
                heads = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
                assert anchor in {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}, anchor


def test_the_figures_of_a_reader(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    watermark_us = int(datetime.now(UTC).timestamp() * 1e6) - 50 * 3_600_000_000
    about = {"watermark_us": watermark_us, "held_back": [{"item_id": "i", "users": 9}], "failed_users": 3}
    blocks = [Block(0, BLOCKLIST.empty_table(), RULES.empty_table())]
    digest = pointers.create_manifest("store", "v", write_version("store", "v", blocks, about))
    pointers.swap_pointer(pointers.observe("store"), "v", digest)
    mirror("store", "mirror")
    told = {}
    (code,) = re.findall(r"^```python\n(.*?)^```", OPERATIONS.read_text(), re.S | re.M)
    exec(compile(code, "operations.md", "exec"), told)
    assert (told["stale"], told["old_input"]) == (False, True)
    assert (told["held_back"], told["failed"]) == ([{"item_id": "i", "users": 9}], 3)


def test_the_fields_of_pointer_and_manifest_are_described(tmp_path):
    blocks = [Block(0, BLOCKLIST.empty_table(), RULES.empty_table())]
    manifest = write_version(str(tmp_path), "v", blocks, {"watermark_us": 0})
    pointers.swap_pointer(pointers.observe(str(tmp_path)), "v", pointers.create_manifest(str(tmp_path), "v", manifest))
    text = (HOME / "docs" / "tables.md").read_text()
    fields = {*versions.read_pointer(str(tmp_path)), *manifest, *manifest["files"][0], *manifest["figures"]}
    fields |= {*BLOCKLIST.names, *RULES.names}
    assert {field for field in fields - {"about"} if f"`{field}`" not in text} == set()
