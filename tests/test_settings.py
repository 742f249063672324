"""Every setting is used by an example, a page or a benchmark; one that nobody uses would be a constant."""

import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from conrec.config import Config

HOME = Path(__file__).parents[1]
PAGES = [HOME / "README.md", *HOME.glob("docs/*"), *HOME.glob("examples/**/*"), *HOME.glob("benchmarks/*.py")]
TEXTS = {path: path.read_text() for path in PAGES if path.suffix in {".md", ".toml", ".py", ".yaml", ".yml"}}


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that a field is, or holds: `LoraSettings | None`, `tuple[GrpoStage, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from models_in(part)


def settings_in(model: type[BaseModel], before: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner = list(models_in(field.annotation))
        if not inner:
            yield before + name
        for section in inner:
            yield from settings_in(section, f"{before}{name}.")


def keys_in(document: Mapping[str, Any], before: str = "") -> Iterator[str]:
    for name, value in document.items():
        yield before + name
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, Mapping):
                yield from keys_in(inner, f"{before}{name}.")


SET = {key for path, text in TEXTS.items() if path.suffix == ".toml" for key in keys_in(tomllib.loads(text))}


@pytest.mark.parametrize("path", settings_in(Config))
def test_a_setting_is_used_or_says_who_needs_it(path: str) -> None:
    names = [path, path.rpartition(".")[2]] if "_" in path.rpartition(".")[2] else [path]
    named = any(re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", text) for name in names for text in TEXTS.values())
    assert path in SET or named, (
        f"no example, page or benchmark uses {path}: measure it in docs/experiments.md, make it a constant, or say in "
        "docs/settings.md who needs another value"
    )


def test_the_page_of_settings_that_no_example_sets_names_none_that_one_does() -> None:
    rows = re.findall(r"^\| (`.*?) \|", TEXTS[HOME / "docs" / "settings.md"], flags=re.M)
    named = {name for row in rows for name in re.findall(r"`([\w.]+)`", row)}
    assert named and not named & SET
