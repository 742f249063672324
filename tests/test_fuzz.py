"""Whatever is fed to what reads input: the project's own error or an answer, never another exception, nothing written.

The numbers of inputs add up to more than 5,000; `test_enough_inputs` counts them.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from conrec.config import InteractionSettings, ItemSettings, load_settings
from conrec.errors import ConfigError, ConrecError, DataError
from conrec.feedback.events import encode_events
from conrec.feedback.labels import read_interactions, read_items
from conrec.tables import INTERACTIONS, ITEMS, TIMESTAMP, check

pytestmark = pytest.mark.long

TABLES, FLIPS, CUTS, TEXTS, OVERRIDES = 1200, 1600, 800, 800, 700
TEXT_FLIPS = 800
quick = {"deadline": None, "database": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
MAY = 1_651_420_800_000_000
GOOD_SETTINGS = """root = "out"
[interactions]
path = "interactions.parquet"
rules = [{ feedback = "negative", where = "is_hate = 1" }]
[items]
path = "items.parquet"
[timeline]
cut = 2026-01-01T00:00:00Z
[publish.release]
share = 0.5
"""


def good_interactions(rows=40):
    numbers = np.arange(rows)
    return pa.table(
        {
            "user_id": pa.array(numbers % 5).cast(pa.string()),
            "item_id": pa.array(numbers % 7).cast(pa.string()),
            "timestamp": pa.array(MAY + numbers * 1_000_000).cast(TIMESTAMP),
            "feedback": pa.array(["negative", "positive", "neutral"]).take(pa.array(numbers % 3)),
        }
    )


def good_items():
    return pa.table(
        {
            "item_id": pa.array(np.arange(7)).cast(pa.string()),
            "text": ["a boxing match"] * 7,
            "category": ["Sport", None] * 3 + ["x"],
            "embedding": pa.array([[0.5, 1.0]] * 7, pa.list_(pa.float32())),
        }
    )


def read_everything(path):
    """Both readers and the encoding; True where anything was accepted."""
    accepted = False
    for read in (
        lambda: encode_events(read_interactions(InteractionSettings(path=str(path))), pa.array(["1", "2"]), 1.0),
        lambda: read_items(ItemSettings(path=str(path))),
    ):
        with contextlib.suppress(ConrecError):
            read()
            accepted = True
    return accepted


def listing(folder):
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in Path(folder).rglob("*")}


# 1. Tables of every type and content.

SCALARS = st.one_of(
    st.none(), st.integers(-(2**63), 2**63 - 1), st.floats(), st.text(max_size=8), st.binary(max_size=8), st.booleans()
)
TYPES = st.sampled_from(
    [
        pa.string(),
        pa.large_string(),
        pa.binary(),
        pa.int8(),
        pa.uint64(),
        pa.float16(),
        pa.float64(),
        pa.bool_(),
        pa.null(),
        pa.date32(),
        pa.decimal128(10, 2),
        pa.timestamp("s", "UTC"),
        pa.timestamp("ns", "Asia/Shanghai"),
        pa.timestamp("us"),
        pa.duration("s"),
        pa.list_(pa.float32()),
        pa.list_(pa.string(), 2),
        pa.dictionary(pa.int8(), pa.string()),
        pa.struct([("user_id", pa.string())]),
        pa.map_(pa.string(), pa.int8()),
        pa.dictionary(pa.int32(), pa.timestamp("us", "UTC")),
    ]
)
NAMES = st.one_of(st.sampled_from([*INTERACTIONS.names, *ITEMS.names]), st.text(max_size=5))


@st.composite
def columns(draw, rows):
    """A column of a type, with values that fit it where they can be made to, else nulls."""
    kind = draw(TYPES)
    if draw(st.booleans()):
        ticks = np.array(draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=rows, max_size=rows)), np.int64)
        # The bytes of the numbers read as the type: every bit pattern, also those that are no text.
        if pa.types.is_primitive(kind) and not pa.types.is_boolean(kind):
            return pa.Array.from_buffers(kind, rows, [None, pa.py_buffer(ticks.tobytes())])
        if pa.types.is_string(kind):
            offsets = pa.py_buffer(np.arange(0, 8 * rows + 1, 8, dtype=np.int32).tobytes())
            return pa.Array.from_buffers(kind, rows, [None, offsets, pa.py_buffer(ticks.tobytes())])
    values = draw(st.lists(SCALARS, min_size=rows, max_size=rows))
    try:
        return pa.array(values, kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError, AttributeError):
        return pa.nulls(rows, kind)


@st.composite
def tables(draw):
    """A good table with some columns replaced, dropped, doubled or added."""
    table = draw(st.sampled_from([good_interactions(6), good_items().slice(0, 6)]))
    for _ in range(draw(st.integers(0, 3))):
        name = draw(NAMES)
        if draw(st.booleans()):
            table = table.select([place for place, other in enumerate(table.column_names) if other != name])
        if draw(st.booleans()):
            table = table.append_column(name, draw(columns(6)))
    return table.slice(0, draw(st.integers(0, 6)))


@given(tables())
@settings(max_examples=TABLES, **quick)
def test_tables_of_every_type(table):
    for schema in (INTERACTIONS, ITEMS):
        with contextlib.suppress(DataError):
            checked = check(table, schema, "x.parquet")
            # What passed can be read as Python: no text that is none, no time that is none.
            checked.select([name for name in schema.names if name in checked.column_names]).to_pylist()


# 2. Files that are damaged, through the readers.


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("input")
    made = {}
    for name, table in (("interactions", good_interactions()), ("items", good_items())):
        sink = pa.BufferOutputStream()
        parquet.write_table(table, sink, compression="none")
        made[name] = sink.getvalue().to_pybytes()
    return folder, made


@pytest.mark.parametrize("name", ["interactions", "items"])
def test_flipped_bytes(files, name):
    folder, made = files
    path = folder / "input.parquet"
    rng = np.random.default_rng(7)
    for _ in range(FLIPS // 2):
        data = np.frombuffer(made[name], np.uint8).copy()
        # Half of them in the footer, where a byte means most.
        start = 0 if rng.random() < 0.5 else len(data) - 2000
        places = rng.integers(max(0, start), len(data), rng.integers(1, 4))
        data[places] ^= rng.integers(1, 256, len(places)).astype(np.uint8)
        path.write_bytes(data.tobytes())
        before = listing(folder)
        read_everything(path)
        assert listing(folder) == before


@pytest.mark.parametrize("name", ["interactions", "items"])
def test_truncated_files(files, name):
    folder, made = files
    path = folder / "input.parquet"
    for length in np.linspace(0, len(made[name]) - 1, CUTS // 2).astype(int):
        path.write_bytes(made[name][:length])
        before = listing(folder)
        assert not read_everything(path)
        assert listing(folder) == before


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_text_with_flipped_bytes_and_without_its_end(tmp_path, suffix):
    rows = good_interactions().cast(INTERACTIONS.set(2, pa.field("timestamp", pa.string()))).to_pylist()
    text = "\n".join(map(json.dumps, rows))
    if suffix == "csv":
        text = "\n".join(",".join(row) for row in [INTERACTIONS.names, *(row.values() for row in rows)])
    path = tmp_path / f"input.{suffix}"
    path.write_text(text)
    assert read_everything(path)
    rng = np.random.default_rng(7)
    for _ in range(TEXT_FLIPS // 2):
        data = np.frombuffer(text.encode(), np.uint8)[: rng.integers(1, len(text) + 1)].copy()
        places = rng.integers(0, len(data), rng.integers(0, 4))
        data[places] ^= rng.integers(1, 256, len(places)).astype(np.uint8)
        path.write_bytes(data.tobytes())
        read_everything(path)


CORPUS = {
    "empty": b"",
    "magic alone": b"PAR1",
    "magic twice": b"PAR1PAR1",
    "a footer that claims four gigabytes": b"PAR1" + b"\xff\xff\xff\xff" + b"PAR1",
    "json": b'{"user_id": ["a"]}',
    "csv": b"user_id,item_id,timestamp,feedback\n1,2,3,negative\n",
    "gzip": b"\x1f\x8b\x08\x00" + bytes(40),
    "zeros": bytes(4096),
    "pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07builtins\x94.",
    "text": "用户,прод".encode(),
    "arrow": bytes(8) + b"ARROW1",
}


@pytest.mark.parametrize("suffix", ["parquet", "csv", "csv.gz", "jsonl", "jsonl.gz"])
@pytest.mark.parametrize("content", CORPUS.values(), ids=CORPUS)
def test_files_that_are_something_else(tmp_path, content, suffix):
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(content)
    before = listing(tmp_path)
    assert not read_everything(path)
    assert not read_everything(tmp_path)  # as a folder
    assert listing(tmp_path) == before


@pytest.mark.parametrize("path", ["absent", "\0", "a\nb", "x" * 5000, "nonsense://x", "s3://", "?*["])
def test_places_that_are_none(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not read_everything(path)
    assert listing(tmp_path) == {}


# 3. Settings.


@pytest.fixture(scope="module")
def settings_file(tmp_path_factory):
    return tmp_path_factory.mktemp("settings") / "settings.toml"


def load(path, overrides=()):
    before = listing(path.parent)
    with contextlib.suppress(ConfigError):
        load_settings(path, list(overrides))
    assert listing(path.parent) == before


VALUES = st.one_of(
    st.sampled_from(
        ["0", "-1", "nan", "inf", "1e999", '""', '"../../x"', "[]", "{}", "true", "1979-05-27", "07:32:00"]
    ),
    st.integers().map(str),
    st.text(max_size=10),
)
LINES = GOOD_SETTINGS.splitlines()


@given(st.data())
@settings(max_examples=TEXTS, **quick)
def test_settings_with_other_lines(settings_file, data):
    lines = list(LINES)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(lines) - 1))
        key = lines[place].partition(" = ")[0]
        action = data.draw(st.sampled_from(["value", "drop", "double", "text", "cut"]))
        if action == "value":
            lines[place] = f"{key} = {data.draw(VALUES)}"
        elif action == "text":
            lines.insert(place, data.draw(st.text(max_size=12)))
        elif action == "cut":
            lines[place] = lines[place][: data.draw(st.integers(0, len(lines[place])))]
        else:
            lines[place : place + 1] = [lines[place]] * (2 if action == "double" else 0)
        if not lines:
            break
    settings_file.write_bytes("\n".join(lines).encode(errors="surrogatepass"))
    load(settings_file)


KEYS = st.one_of(
    st.sampled_from(
        ["root", "seed", "grpo.stages", "publish.release", "publish.release.share", "guardrails.predicted_days", "lora"]
    ),
    st.text(alphabet="abc.\0\n[]\"' =é", max_size=12),
)


@given(KEYS, VALUES)
@example("grpo.stages.0.beta", "1")
@example("publish.release.share.x", "1")
@settings(max_examples=OVERRIDES, **quick)
def test_overrides(settings_file, key, value):
    settings_file.write_text(GOOD_SETTINGS)
    load(settings_file, [f"{key}={value}"])


@pytest.mark.parametrize("content", CORPUS.values(), ids=CORPUS)
def test_settings_files_that_are_something_else(tmp_path, content):
    path = tmp_path / "settings.toml"
    path.write_bytes(content)
    load(path)


@pytest.mark.parametrize("path", ["", "absent.toml", ".", "\0", "x" * 5000])
def test_settings_files_that_are_not_there(path):
    with pytest.raises(ConfigError):
        load_settings(path)


def test_enough_inputs():
    """Each table meets two schemas, each damaged file two readers; they count once."""
    assert TABLES + FLIPS + CUTS + TEXTS + OVERRIDES > 5000


# 4. Identifiers that attack.

LOOKALIKES = ["alice", "\u0430lice", "alic\u0435", "Alice", "alice ", "a\u0301lice", "\u00e1lice"]
IDS = [*LOOKALIKES, "../../etc/passwd", "/etc/passwd", "a\nb", "a\0b", "", " ", "%2e%2e", "'; drop", "🙂" * 50]


def test_identifiers_are_kept_exactly():
    table = good_interactions(len(IDS)).set_column(0, "user_id", pa.array(IDS)).set_column(1, "item_id", pa.array(IDS))
    events, _ = encode_events(check(table, INTERACTIONS, "x"), pa.array(sorted(IDS)), 0.0)
    assert sorted(events.users.to_pylist()) == sorted(IDS)


@pytest.mark.parametrize("column", ["user_id", "item_id"])
def test_identifiers_of_megabytes_are_refused(column):
    table = good_interactions(2)
    place = table.column_names.index(column)
    table = table.set_column(place, column, pa.array(["x", "y" * 10_000_000]))
    with pytest.raises(DataError) as refused:
        check(table, INTERACTIONS, "log.parquet")
    assert f"log.parquet: column {column}" in str(refused.value)
    assert "10000000 bytes in row 1" in str(refused.value)
    assert len(str(refused.value)) < 1000
