"""Settings as text: the effective ones as TOML that `load_settings` reads back, and a page of every key.

conrec config --config FILE          # to_toml
conrec config --help-settings        # settings_page
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterator
from datetime import datetime, time
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from conrec.config import Config, Settings


def to_toml(config: Config) -> str:
    """Every setting, the unset ones left out, since TOML has no null."""
    return "\n".join(_table(config.model_dump(exclude_none=True), "")).strip() + "\n"


def _table(values: dict[str, Any], name: str) -> Iterator[str]:
    # TOML wants a table's own keys before its sub-tables.
    if name:
        yield f"\n[{name}]"
    inline = name.endswith("columns")
    for key, value in values.items():
        if not isinstance(value, dict) or inline:
            yield f"{_key(key)} = {_value(value)}"
    for key, value in values.items():
        if value and isinstance(value, dict) and not inline:
            yield from _table(value, f"{name}.{key}" if name else key)


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name, ensure_ascii=False)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        if not value:
            return "{}"
        return "{ " + ", ".join(f"{_key(key)} = {_value(entry)}" for key, entry in value.items()) + " }"
    if isinstance(value, list | tuple):
        if any(isinstance(entry, dict) for entry in value):
            return "[\n" + "".join(f"    {_value(entry)},\n" for entry in value) + "]"
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    if isinstance(value, time):  # TOML knows no time of day with a zone
        return json.dumps(value.isoformat().replace("+00:00", "Z"))
    # Strings of JSON are basic strings of TOML; numbers and true and false are written alike.
    return json.dumps(value, ensure_ascii=False)


def settings_page() -> str:
    """All sections and keys with their documentation, type and default."""
    return "\n".join(_section(Config, "")).strip()


def _section(model: type[Settings], name: str) -> Iterator[str]:
    if name:
        yield f"\n[{name}]  {(model.__doc__ or '').strip()}"
    sections = []
    for key, field in model.model_fields.items():
        section = _section_model(field.annotation)
        if section is not None:
            sections.append((section, f"{name}.{key}" if name else key))
            continue
        default = field.get_default(call_default_factory=True)
        shown = "required" if field.is_required() or default is PydanticUndefined else _default(default)
        yield f"  {key}: {_type_name(field.annotation)} = {shown}"
        yield f"      {' '.join((field.description or '').split())}"
    for section, path in sections:
        yield from _section(section, path)


def _default(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, tuple) and any(isinstance(entry, BaseModel) for entry in value):
        return _value([entry.model_dump() for entry in value]).replace("\n", "\n  ")
    return _value(value)


def _section_model(annotation: Any) -> type[Settings] | None:
    for candidate in (annotation, *(get_args(annotation) if get_origin(annotation) in _UNIONS else ())):
        if isinstance(candidate, type) and issubclass(candidate, Settings):
            return candidate
    return None


_UNIONS = (Union, types.UnionType)
_TYPE_NAMES: dict[Any, str] = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "true | false",
    datetime: "time",
    time: "time of day",
}


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(json.dumps(argument) for argument in arguments)
    if origin in _UNIONS:
        return " | ".join(_type_name(argument) for argument in arguments if argument is not type(None))
    if origin is tuple:
        return f"list of {_type_name(arguments[0])}"
    if origin is dict:
        return "table"
    if origin is not None:
        return _type_name(arguments[0])
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return "{" + ", ".join(annotation.model_fields) + "}"
    return _TYPE_NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)))
