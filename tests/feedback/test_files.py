"""Which files belong to an input; CSV and JSON lines give what Parquet gives, and are refused as it is."""

from __future__ import annotations

import gzip
import json
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.csv as csv
import pytest

from conrec.config import FeedbackRule, InteractionSettings, ItemSettings
from conrec.errors import DataError
from conrec.feedback.files import file_tables
from conrec.feedback.labels import interaction_files, interaction_tables, read_interactions, read_items
from conrec.storage import write_bytes, write_table

MAY = datetime(2022, 5, 1, 12, 30, 0, 250_000, tzinfo=UTC)


def log(users: list[str], **replaced: list | pa.Array) -> pa.Table:
    columns = {
        "user_id": users,
        "item_id": ["a"] * len(users),
        "timestamp": pa.array([MAY] * len(users), pa.timestamp("us", "UTC")),
        "feedback": ["negative"] * len(users),
    }
    return pa.table(columns | replaced)


def text_of(table: pa.Table, suffix: str) -> bytes:
    """A table as the text of a file with this suffix, times in another zone."""
    rows = [
        {
            name: value.astimezone().isoformat() if isinstance(value, datetime) else value
            for name, value in row.items()
            if value is not None
        }
        for row in table.to_pylist()
    ]
    if "json" in suffix:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        quoted = [
            ",".join(
                "" if row.get(name) is None else '"' + str(row[name]).replace('"', '""') + '"'
                for name in table.schema.names
            )
            for row in rows
        ]
        text = "\n".join([",".join(table.schema.names), *quoted]) + "\n"
    data = text.encode()
    return gzip.compress(data) if suffix.endswith(".gz") else data


def read(path) -> pa.Table:
    return read_interactions(InteractionSettings(path=str(path)))


TEXT_KINDS = [".csv", ".csv.gz", ".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz"]


@pytest.fixture(params=["local", "memory"])
def root(request, tmp_path):
    return str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}"


@pytest.mark.parametrize("group", [1, 3, 7, 100])
def test_parquet_is_read_some_row_groups_at_a_time_and_only_what_is_looked_at(root, group, monkeypatch):
    monkeypatch.setattr("conrec.feedback.files.ROWS_AT_ONCE", 7)
    table = log([f"u{number}" for number in range(20)], stars=list(range(20)), words=["x"] * 20)
    write_table(table, f"{root}/log/day=3/a.parquet", row_group_size=group)
    write_table(table.slice(0, 0), f"{root}/log/day=3/b.parquet")
    rules = (
        FeedbackRule(feedback="exclude", when="stars in [4, 9]"),
        FeedbackRule(feedback="positive", when="day == 3"),
    )
    settings = InteractionSettings(path=f"{root}/log", rules=rules)
    (file, _) = interaction_files(settings)
    wanted = {"user_id", "stars", "day"}
    assert all(set(table.column_names) == wanted for _, table in file_tables(file, {}, wanted))
    assert [first for first, _ in file_tables(file, {}, wanted)] == list(range(0, 20, max(group, 7 - 7 % group)))
    pieces = list(interaction_tables(settings))
    assert max(map(len, pieces)) <= max(7, group) and len(pieces[-1]) == 0
    assert pa.concat_tables(pieces).equals(read_interactions(settings).select(pieces[0].column_names).combine_chunks())


@pytest.mark.parametrize("rules", [(), (FeedbackRule(feedback="exclude", when="stars == 2"),)])
@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"user_id": ["u"] * 8 + [None]}, "column user_id is null in 1 rows, first in row 8"),
        ({"user_id": ["u"] * 8 + ["x" * 2000]}, "column user_id holds 2000 bytes in row 8"),
        ({"timestamp": [MAY] * 8 + [datetime(2060, 1, 1, tzinfo=UTC)]}, "in row 8, user 'u', later than"),
        ({"day": [3] * 8 + [4]}, "column day holds 4 in row 8"),
    ],
)
def test_rows_are_named_as_the_file_counts_them(root, rules, columns, told, monkeypatch):
    monkeypatch.setattr("conrec.feedback.files.ROWS_AT_ONCE", 3)
    columns = {"timestamp": [MAY] * 9, "day": [3] * 9, "stars": list(range(9))} | columns
    columns["timestamp"] = pa.array(columns["timestamp"], pa.timestamp("us", "UTC"))
    write_table(log(columns.pop("user_id", ["u"] * 9), **columns), f"{root}/day=3/log.parquet", row_group_size=2)
    with pytest.raises(DataError, match=told):
        list(interaction_tables(InteractionSettings(path=str(root), rules=rules)))


def test_a_feedback_column_that_the_settings_name_may_stand_beside_rules(root):
    write_table(log(["u"], stars=[1]).rename_columns({"feedback": "action"}), f"{root}/log.parquet")
    rules = (FeedbackRule(feedback="positive", when="stars == 1"),)
    settings = InteractionSettings(path=f"{root}/log.parquet", rules=rules, columns={"feedback": "action"})
    assert pa.concat_tables(interaction_tables(settings))["feedback"].to_pylist() == ["positive"]


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
@pytest.mark.parametrize("rules", [(), (FeedbackRule(feedback="positive", when="user_id == 'u'"),)])
@pytest.mark.parametrize("tables", [interaction_tables, lambda settings: [read_interactions(settings)]])
def test_a_column_that_occurs_twice_is_refused(root, tables, rules, suffix):
    table = log(["u"])
    write_twice(table.append_column("user_id", table["user_id"]), f"{root}/log{suffix}")
    with pytest.raises(DataError, match=rf"log\{suffix}: column user_id occurs more than once"):
        list(tables(InteractionSettings(path=f"{root}/log{suffix}", rules=rules)))


def write_twice(table: pa.Table, url: str) -> None:
    """A table with a column twice, which `text_of` cannot write."""
    if url.endswith(".parquet"):
        write_table(table, url)
    else:
        sink = pa.BufferOutputStream()
        csv.write_csv(table, sink)
        write_bytes(url, sink.getvalue().to_pybytes())


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_a_column_of_items_that_occurs_twice_is_refused(root, suffix):
    items = pa.table([["a"], ["A"], ["x"], ["y"]], ["item_id", "text", "note", "note"])
    write_twice(items, f"{root}/items{suffix}")
    with pytest.raises(DataError, match=rf"items\{suffix}: column note occurs more than once"):
        read_items(ItemSettings(path=f"{root}/items{suffix}"))


def test_two_columns_without_a_name_are_told_so(tmp_path):
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp,feedback,,\n1,2,2022-05-01T00:00:00Z,negative,,\n")
    with pytest.raises(DataError, match=r"log\.csv: column without a name occurs more than once"):
        read(tmp_path / "log.csv")


def test_where_a_column_is_missing_all_of_the_file_are_named(root):
    write_table(log(["u"], stars=[1]).drop_columns("item_id"), f"{root}/log.parquet")
    with pytest.raises(DataError, match="item_id is missing; the file has user_id, timestamp, feedback, stars"):
        list(interaction_tables(InteractionSettings(path=f"{root}/log.parquet")))


@pytest.mark.parametrize("suffix", TEXT_KINDS)
def test_text_gives_what_parquet_gives(root, suffix):
    table = log(["007", "1e5", "NA", "null", "", 'a,"b"\nc', "ü"], stars=[1, 2, 3, 4, 5, 6, 7])
    write_table(table, f"{root}/log.parquet")
    write_bytes(f"{root}/log{suffix}", text_of(table, suffix))
    assert read(f"{root}/log{suffix}").equals(read(f"{root}/log.parquet"))
    write_bytes(f"{root}/folder/day=3/log{suffix}", text_of(table, suffix))
    write_bytes(f"{root}/folder/day=4/log{suffix}", text_of(table, suffix))
    folder = read(f"{root}/folder")
    assert folder.num_rows == 14
    assert folder["day"].to_pylist() == [3] * 7 + [4] * 7


@pytest.mark.parametrize("suffix", TEXT_KINDS)
def test_text_goes_through_the_same_checks(tmp_path, suffix):
    for table, said in (
        (log(["u", None]), "column user_id is null in 1 rows, first in row 1"),
        (log(["u", "x" * 2000]), "column user_id holds 2000 bytes in row 1"),
        (log(["u", "v"], feedback=["negative", "meh"]), "column feedback holds 'meh' in row 1"),
        (log(["u"]).drop_columns("item_id"), "column item_id is missing; the file has user_id, timestamp"),
        (
            log(["u", "v"], timestamp=["2022-05-01T00:00:00Z", "2022-05-01"]),
            "column timestamp holds '2022-05-01' in row 1",
        ),
        (log(["u"], timestamp=["2022-05-01T00:00:00"]), "which is no time with a zone"),
        (log(["u"], timestamp=["1651420800"]), "column timestamp holds '1651420800' in row 0"),
        (log(["u"], timestamp=["2022-02-31T00:00:00Z"]), "column timestamp holds no time"),
        (log(["u"], timestamp=["1022-02-03T00:00:00Z"]), "the year 1022"),
        (log(["u", "v"], timestamp=["2022-02-03T00:00:00Z", "2060-01-01T00:00:00Z"]), "in row 1, user 'v', later than"),
    ):
        path = tmp_path / f"log{suffix}"
        path.write_bytes(text_of(table, suffix))
        with pytest.raises(DataError) as refused:
            read(path)
        assert str(refused.value).startswith(str(path))
        assert said in str(refused.value)


@pytest.mark.parametrize(
    "time", ["2022-05-01 12:30:00.25Z", "2022-05-01T14:30:00.250000000+02", "2022-05-01T12:30:00.25+0000"]
)
def test_times_of_other_writers(tmp_path, time):
    (tmp_path / "log.csv").write_text(f"user_id,item_id,timestamp,feedback\n1,2,{time},negative\n")
    assert read(tmp_path / "log.csv")["timestamp"].to_pylist() == [MAY]


def test_rules_read_the_numbers_and_the_feedback_column_of_text(tmp_path):
    (tmp_path / "log.csv").write_text(
        "uid,item_id,timestamp,feedback,stars\n01,02,2022-05-01T00:00:00Z,0,1.5\n02,3,2022-05-01T00:00:00Z,1,4\n"
    )
    rules = (
        FeedbackRule(feedback="positive", when="feedback == 1"),
        FeedbackRule(feedback="negative", when="stars <= 2"),
    )
    settings = InteractionSettings(path=str(tmp_path / "log.csv"), columns={"user_id": "uid"}, rules=rules)
    table = read_interactions(settings)
    assert table.select(["user_id", "item_id", "feedback"]).to_pylist() == [
        {"user_id": "01", "item_id": "02", "feedback": "negative"},
        {"user_id": "02", "item_id": "3", "feedback": "positive"},
    ]


@pytest.mark.parametrize("suffix", TEXT_KINDS)
def test_text_that_is_damaged_is_refused_by_name(tmp_path, suffix):
    path = tmp_path / f"log{suffix}"
    whole = text_of(log(["u", "v"] * 50), suffix)
    contents = [b"", b"\xff\xfe\x00", whole[:-5] if suffix.endswith(".gz") else whole[:-9] + b"\x80", b"PAR1"]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"log{suffix}: "):
            read(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("text", [b"", b"\n \n"])
@pytest.mark.parametrize("columns", [{}, {"item_id": "item_id"}])
def test_json_lines_without_a_line_hold_nothing(root, suffix, text, columns):
    nothing = gzip.compress(text) if suffix.endswith(".gz") else text
    rules = (FeedbackRule(feedback="positive", when="stars == day"),)
    settings = InteractionSettings(path=f"{root}/log", rules=rules, columns=columns)
    write_bytes(f"{root}/log/day=3/a{suffix}", nothing)
    assert [table.shape for table in interaction_tables(settings)] == [(0, 4)]
    with pytest.raises(DataError, match="log: the table has no rows"):
        read_interactions(settings)
    write_bytes(f"{root}/log/day=3/b{suffix}", text_of(log(["u", "v"], stars=[3, 4]), suffix))
    assert read_interactions(settings)["feedback"].to_pylist() == ["positive", "neutral"]
    assert pa.concat_tables(interaction_tables(settings))["user_id"].to_pylist() == ["u", "v"]

    items = ItemSettings(path=f"{root}/items", columns=columns)
    write_bytes(f"{root}/items/a{suffix}", nothing)
    with pytest.raises(DataError, match="items: the table has no rows"):
        read_items(items)
    write_bytes(f"{root}/items/b{suffix}", text_of(pa.table({"item_id": ["a"], "text": ["A"]}), suffix))
    assert read_items(items).to_pylist() == [{"item_id": "a", "text": "A"}]  # and no category


def test_rows_without_a_column_are_not_nothing(root):
    write_bytes(f"{root}/log.jsonl", b"{}\n{}\n")
    with pytest.raises(DataError, match=r"log\.jsonl: column user_id is missing"):
        read(f"{root}/log.jsonl")
    with pytest.raises(DataError, match=r"log\.jsonl: column item_id is missing"):
        read_items(ItemSettings(path=f"{root}/log.jsonl"))


def test_words_that_others_take_for_null_are_values_and_an_empty_one_is_null(tmp_path):
    names = ["NA", "null", "nan", "None", "#N/A", '""']
    rows = "".join(f"{name},a,2022-05-01T00:00:00Z,negative,\n" for name in names)
    (tmp_path / "log.csv").write_text(f"user_id,item_id,timestamp,feedback,extra\n{rows}")
    table = read(tmp_path / "log.csv")
    assert table["user_id"].to_pylist() == [name.strip('"') for name in names]
    assert table["extra"].to_pylist() == [None] * len(names)


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    for suffix in (".csv", ".jsonl"):
        (tmp_path / f"log{suffix}").write_bytes(b"\xef\xbb\xbf" + text_of(log(["u"]), suffix))
        assert read(tmp_path / f"log{suffix}")["user_id"].to_pylist() == ["u"]


def test_numbers_as_identifiers_are_refused_in_json_as_in_parquet(tmp_path):
    row = {"user_id": 7, "item_id": "a", "timestamp": "2022-05-01T00:00:00Z", "feedback": "negative"}
    (tmp_path / "log.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=r"log\.jsonl: .*user_id.*string.*number.*identifiers and times as strings"):
        read(tmp_path / "log.jsonl")


def test_a_list_of_whole_numbers_is_an_embedding_and_absent_columns_stay_absent(tmp_path):
    (tmp_path / "items.jsonl").write_text('{"item_id": "a", "text": "A", "embedding": [1, 0]}\n')
    items = read_items(ItemSettings(path=str(tmp_path / "items.jsonl")))
    assert items.column_names == ["item_id", "text", "embedding"]
    assert items["embedding"].to_pylist() == [[1.0, 0.0]]


def test_a_long_line_and_a_type_that_shows_late_are_read(tmp_path):
    rows = [{"item_id": str(row), "text": "x" * 100, "price": row} for row in range(40_000)]
    rows[-1] |= {"text": "y" * 3_000_000, "price": 0.5}
    for suffix, text in (
        (".jsonl", "\n".join(map(json.dumps, rows))),
        (".csv", "item_id,text,price\n" + "\n".join(f"{row['item_id']},{row['text']},{row['price']}" for row in rows)),
    ):
        (tmp_path / f"items{suffix}").write_text(text)
        items = read_items(ItemSettings(path=str(tmp_path / f"items{suffix}")))
        assert items.schema.field("price").type == pa.float64()
        assert len(items) == 40_000


@pytest.mark.parametrize("name", ["b.parq", "b.parquet.gz", "b", "b.tsv", "deep/b.json", "README.md", "b.parquet.tmp"])
def test_a_file_that_is_no_input_is_named(root, name):
    write_table(log(["u"]), f"{root}/log/a.parquet")
    write_bytes(f"{root}/log/{name}", b"")
    with pytest.raises(DataError, match=rf"log: 1 files in the folder are no input: {name}; read are \*\.parquet"):
        read(f"{root}/log")


def test_what_begins_with_a_dot_or_an_underscore_is_skipped_unless_it_is_a_column(root):
    write_table(log(["u"]), f"{root}/log/_day=1/a.parquet")
    for name in ("_SUCCESS", ".a.parquet.crc", "_temporary/0/b.parquet", ".hidden/c.parquet", "_day=1/_metadata"):
        write_bytes(f"{root}/log/{name}", b"none")
    assert read(f"{root}/log")["_day"].to_pylist() == [1]


@pytest.mark.parametrize("name", ["log.csv", "log.jsonl.gz", "log.parquet", "log"])
def test_what_is_not_there_is_said_to_be_absent(root, name):
    with pytest.raises(DataError, match=rf"{name}: no such file or folder"):
        read(f"{root}/{name}")


def test_kinds_are_not_mixed(tmp_path):
    write_table(log(["u"]), str(tmp_path / "a.parquet"))
    (tmp_path / "b.csv").write_bytes(text_of(log(["u"]), ".csv"))
    with pytest.raises(DataError, match=r"several kinds \(a\.parquet and b\.csv\)"):
        read(tmp_path)


def delta(root):
    write_bytes(f"{root}/_delta_log/00000000000000000000.json", b"{}")
    write_table(log(["u"]), f"{root}/day=1/a.parquet")
    return f"{root}/day=1/a.parquet"


def iceberg(root):
    write_bytes(f"{root}/metadata/00001-7f.metadata.json", b"{}")
    write_table(log(["u"]), f"{root}/data/day=1/a.parquet")
    return f"{root}/data/day=1/a.parquet"


def hudi(root):
    write_bytes(f"{root}/.hoodie/hoodie.properties", b"")
    write_table(log(["u"]), f"{root}/day=1/a.parquet")
    return f"{root}/day=1/a.parquet"


@pytest.mark.parametrize(("make", "said"), [(delta, "delta_scan"), (iceberg, "iceberg_scan"), (hudi, "hudi")])
def test_tables_of_other_formats_are_refused_with_what_to_do(root, make, said):
    file = make(f"{root}/lake/log")
    kind = make.__name__.capitalize()
    for path in (f"{root}/lake", f"{root}/lake/log", file.rpartition("/")[0], file):
        with pytest.raises(DataError, match=rf"lake/log: a {kind} table.*deleted.*{said}.*lake/log"):
            read(path)


def test_a_folder_of_metadata_is_no_table_by_itself(root):
    write_bytes(f"{root}/metadata/notes.txt", b"")
    write_table(log(["u"]), f"{root}/data/a.parquet")
    assert read(f"{root}/data").num_rows == 1


def test_folders_are_columns_decoded_and_typed_over_all_files(root):
    for folder in ("day=1/kind=a%2Fb", "day=02/kind=__HIVE_DEFAULT_PARTITION__"):
        write_table(log(["u"]), f"{root}/log/{folder}/x.parquet")
    table = read(f"{root}/log")
    assert table["day"].to_pylist() == ["02", "1"]
    assert table["kind"].to_pylist() == [None, "a/b"]


def test_a_folder_can_be_a_column_of_ours(root):
    for user in ("7", "12"):
        write_table(log(["x"]).drop_columns("user_id"), f"{root}/log/user_id={user}/x.parquet")
    assert read(f"{root}/log")["user_id"].to_pylist() == ["12", "7"]
    settings = InteractionSettings(
        path=f"{root}/log", rules=(FeedbackRule(feedback="positive", when="user_id == '7'"),)
    )
    assert read_interactions(settings)["feedback"].to_pylist() == ["neutral", "positive"]


def test_folders_above_the_input_are_no_columns(root):
    write_table(log(["u"]), f"{root}/day=1/log/x.parquet")
    assert "day" not in read(f"{root}/day=1/log").column_names
    assert "day" not in read(f"{root}/day=1/log/x.parquet").column_names


def test_folders_that_differ_are_refused(root):
    write_table(log(["u"]), f"{root}/log/day=1/x.parquet")
    write_table(log(["u"]), f"{root}/log/x.parquet")
    with pytest.raises(DataError, match=r"day=1/x\.parquet lies in folders of day, x\.parquet in folders of none"):
        read(f"{root}/log")


def test_a_column_of_the_file_wins_if_it_says_what_the_folder_says(root):
    for day, value in (("2022-05-01", datetime(2022, 5, 1)), ("2022-05-02", datetime(2022, 5, 2))):
        write_table(log(["u", "v"], day=pa.array([value] * 2, pa.date32())), f"{root}/log/day={day}/x.parquet")
    assert read(f"{root}/log").schema.field("day").type == pa.date32()
    wrong = pa.array([datetime(2022, 5, 3), datetime(2022, 5, 1)], pa.date32())
    write_table(log(["u", "v"], day=wrong), f"{root}/log/day=2022-05-03/x.parquet")
    with pytest.raises(
        DataError, match=r"day=2022-05-03/x\.parquet: column day holds .*5, 1\) in row 1.*day=2022-05-03"
    ):
        read(f"{root}/log")


UNUSUAL = {
    "string view": pa.array(["x", None]).cast(pa.string_view()),
    "binary view": pa.array([b"x", None]).cast(pa.binary_view()),
    "views in a list": pa.array([["x"], None], pa.list_(pa.string_view())),
    "a list view": pa.array([["x"], None], pa.list_view(pa.string_view())),
    "views in a struct": pa.array([{"x": "y"}, None], pa.struct([("x", pa.string_view())])),
    "uuid": pa.array([b"0" * 16, None], pa.uuid()),
}


@pytest.mark.parametrize("column", UNUSUAL.values(), ids=UNUSUAL)
def test_columns_that_nobody_needs_may_be_of_any_type(root, column):
    write_table(log(["u", "v"], extra=column), f"{root}/log/a.parquet")
    write_table(log(["u", "v"]), f"{root}/log/b.parquet")
    rules = (FeedbackRule(feedback="exclude", when="user_id == 'u'"),)
    read = read_interactions(InteractionSettings(path=f"{root}/log", rules=rules))
    assert read["extra"].to_pylist() == [None, None]
    items = pa.table({"item_id": pa.array(["b", "a"]).cast(pa.string_view()), "text": ["B", "A"], "extra": column})
    write_table(items, f"{root}/items.parquet")
    assert read_items(ItemSettings(path=f"{root}/items.parquet"))["extra"][0].as_py() is None


def test_text_and_views_and_dictionaries_of_several_files_are_one_column(root):
    plain = pa.array(["x"])
    for number, column in enumerate([plain, plain.cast(pa.string_view()), plain.dictionary_encode()]):
        write_table(log(["u"], extra=column), f"{root}/log/{number}.parquet")
    assert read(f"{root}/log")["extra"].to_pylist() == ["x"] * 3


def test_a_row_a_user_is_told_to_be_a_row_an_event(root):
    write_table(log(["u"], item_id=[["a", "b"]]), f"{root}/log.parquet")
    with pytest.raises(DataError, match=r"column item_id is list<.*one row an event"):
        read(f"{root}/log.parquet")
    write_table(log(["u"], timestamp=[[MAY, MAY]]), f"{root}/log.parquet")
    with pytest.raises(DataError, match=r"column timestamp is list<.*one row an event"):
        read(f"{root}/log.parquet")


def test_tables_come_file_by_file_in_order(root):
    for user in "bac":
        write_table(log([user]), f"{root}/log/{user}.parquet")
    tables = list(interaction_tables(InteractionSettings(path=f"{root}/log")))
    assert [table["user_id"].to_pylist() for table in tables] == [["a"], ["b"], ["c"]]
    assert pa.concat_tables(tables).equals(read(f"{root}/log"))
