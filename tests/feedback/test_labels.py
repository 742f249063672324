"""Reading interactions and items from files, folders and object stores, and refusing what breaks them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import fsspec
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from conrec.config import FeedbackRule, InteractionSettings, ItemSettings, load_settings
from conrec.errors import ConfigError, DataError
from conrec.feedback.labels import DROPPED, read_interactions, read_items
from conrec.storage import write_table
from conrec.tables import INTERACTIONS

MAY = datetime(2022, 5, 1, tzinfo=UTC)


def log(users: list[str], **extra: list) -> pa.Table:
    columns = {
        "user_id": users,
        "item_id": ["a"] * len(users),
        "timestamp": pa.array([MAY] * len(users), pa.timestamp("us", "UTC")),
        "feedback": ["negative"] * len(users),
    }
    return pa.table(columns | extra)


@pytest.fixture(params=["local", "memory"])
def root(request, tmp_path):
    if request.param == "local":
        yield str(tmp_path)
        return
    url = f"memory://{tmp_path.name}"
    yield url
    files = fsspec.filesystem("memory")
    if files.exists(tmp_path.name):
        files.rm(tmp_path.name, recursive=True)


def test_one_file_and_a_folder_of_many_give_the_same(root):
    write_table(log(["u", "v", "w"]), f"{root}/one.parquet")
    for place, user in enumerate("uvw"):
        write_table(log([user]), f"{root}/many/day={place}/part.parquet")
    fsspec.open(f"{root}/many/_SUCCESS", "wb").open().close()
    one = read_interactions(InteractionSettings(path=f"{root}/one.parquet"))
    many = read_interactions(InteractionSettings(path=f"{root}/many"))
    assert one.schema.names == INTERACTIONS.names
    assert many.drop_columns("day").equals(one)
    assert many["day"].to_pylist() == [0, 1, 2]


def test_message_names_the_file_of_the_folder(root):
    write_table(log(["u"]), f"{root}/log/1.parquet")
    write_table(log(["u"]).drop_columns("item_id"), f"{root}/log/2.parquet")
    with pytest.raises(DataError, match=r"log/2\.parquet: column item_id is missing"):
        read_interactions(InteractionSettings(path=f"{root}/log"))


def test_extra_columns_stay_also_when_some_files_lack_them(root):
    write_table(log(["u"], tab=[3]), f"{root}/log/1.parquet")
    write_table(log(["v"]), f"{root}/log/2.parquet")
    assert read_interactions(InteractionSettings(path=f"{root}/log"))["tab"].to_pylist() == [3, None]


def test_extra_columns_of_different_types_are_refused(root):
    write_table(log(["u"], tab=[3]), f"{root}/log/1.parquet")
    write_table(log(["v"], tab=["x"]), f"{root}/log/2.parquet")
    with pytest.raises(DataError, match="disagree"):
        read_interactions(InteractionSettings(path=f"{root}/log"))


def test_missing_path_and_empty_folder(root, tmp_path):
    with pytest.raises(DataError, match=r"nothing\.parquet: no such file"):
        read_interactions(InteractionSettings(path=f"{root}/nothing.parquet"))
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match=r"bare: the folder holds no \*\.parquet"):
        read_items(ItemSettings(path=str(tmp_path / "bare")))


def test_broken_parquet_is_refused_with_its_name(tmp_path):
    path = tmp_path / "log.parquet"
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"log\.parquet"):
        read_interactions(InteractionSettings(path=str(path)))
    parquet.write_table(log([f"u{row}" for row in range(10_000)]), path, compression="zstd")
    content = bytearray(path.read_bytes())
    content[1000:9000] = bytes(8000)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"log\.parquet"):
        read_interactions(InteractionSettings(path=str(path)))


def test_empty_table_is_refused(root):
    write_table(log([]), f"{root}/log.parquet")
    with pytest.raises(DataError, match=r"log\.parquet: the table has no rows"):
        read_interactions(InteractionSettings(path=f"{root}/log.parquet"))


def test_feedback_of_an_unknown_kind_is_refused(root):
    write_table(log(["u", "v"], feedback=["negative", "meh"]), f"{root}/log.parquet")
    with pytest.raises(DataError, match=r"log\.parquet: column feedback holds 'meh' in row 1.*positive.*rules"):
        read_interactions(InteractionSettings(path=f"{root}/log.parquet"))


def test_rules_make_feedback_from_raw_columns_and_drop_what_is_not_taste(root):
    table = log(["u", "v", "w"], stars=[1, 5, 1], reason=["dull", "dull", "bought"]).drop_columns("feedback")
    write_table(table.rename_columns({"user_id": "uid"}), f"{root}/log.parquet")
    rules = (
        FeedbackRule(feedback="exclude", when="reason == 'bought'"),
        FeedbackRule(feedback="negative", when="stars <= 2"),
        FeedbackRule(feedback="positive", when="stars >= 4"),
    )
    settings = InteractionSettings(path=f"{root}/log.parquet", columns={"user_id": "uid"}, rules=rules)
    read = read_interactions(settings)
    assert read["user_id"].to_pylist() == ["u", "v"]
    assert read["feedback"].to_pylist() == ["negative", "positive"]
    assert read["stars"].to_pylist() == [1, 5]


def test_rules_replace_a_feedback_column(root):
    write_table(log(["u"]), f"{root}/log.parquet")
    rules = (FeedbackRule(feedback="positive", when="feedback == 'negative'"),)
    read = read_interactions(InteractionSettings(path=f"{root}/log.parquet", rules=rules))
    assert read["feedback"].to_pylist() == ["positive"]


def test_rule_over_a_missing_column_names_file_rule_and_columns(root):
    write_table(log(["u"]), f"{root}/log.parquet")
    rules = (FeedbackRule(feedback="negative", when="stars <= 2"),)
    with pytest.raises(DataError, match=r"log\.parquet: rule `stars <= 2` names column stars.*user_id"):
        read_interactions(InteractionSettings(path=f"{root}/log.parquet", rules=rules))


def test_renaming_a_missing_column_is_refused(root):
    write_table(log(["u"]), f"{root}/log.parquet")
    with pytest.raises(DataError, match=r"column uid, named for user_id in the settings, is missing"):
        read_interactions(InteractionSettings(path=f"{root}/log.parquet", columns={"user_id": "uid"}))


def test_renaming_replaces_a_column_that_had_our_name(root):
    write_table(log(["u"], kind=["positive"]), f"{root}/log.parquet")
    read = read_interactions(InteractionSettings(path=f"{root}/log.parquet", columns={"feedback": "kind"}))
    assert read["feedback"].to_pylist() == ["positive"]


def test_items_are_sorted_by_id(root):
    write_table(pa.table({"item_id": ["b", "10", "9"], "text": ["B", "X", "IX"]}), f"{root}/items.parquet")
    items = read_items(ItemSettings(path=f"{root}/items.parquet"))
    assert items["item_id"].to_pylist() == ["10", "9", "b"]
    assert items["text"].to_pylist() == ["X", "IX", "B"]


def test_duplicate_and_null_item_ids_are_refused(root):
    write_table(pa.table({"item_id": ["a", "b"], "text": ["A", "B"]}), f"{root}/items/1.parquet")
    write_table(pa.table({"item_id": ["b"], "text": ["again"]}), f"{root}/items/2.parquet")
    with pytest.raises(DataError, match=r"items: column item_id holds 'b' more than once.*keep one row"):
        read_items(ItemSettings(path=f"{root}/items"))
    write_table(pa.table({"item_id": ["a", None], "text": ["A", "B"]}), f"{root}/null.parquet")
    with pytest.raises(DataError, match=r"null\.parquet: column item_id is null in 1 rows"):
        read_items(ItemSettings(path=f"{root}/null.parquet"))


def at(*hours: float, since: datetime = MAY) -> pa.Table:
    times = pa.array([since + timedelta(hours=late) for late in hours], pa.timestamp("us", "UTC"))
    return log([f"u{row}" for row in range(len(hours))], timestamp=times)


def test_an_event_ahead_of_the_clock_names_file_row_user_and_value(root):
    rules = (
        FeedbackRule(feedback="exclude", when="user_id == 'u0'"),
        FeedbackRule(feedback="negative", when="user_id != 'u0'"),
    )
    write_table(at(0, -1), f"{root}/log/1.parquet")
    write_table(at(99, 0, 38 * 8766), f"{root}/log/2.parquet")
    settings = InteractionSettings(path=f"{root}/log", rules=rules, now=MAY)
    with pytest.raises(DataError) as refused:
        read_interactions(settings)
    for said in ("log/2.parquet: column timestamp holds 2060-", "in row 2, user 'u2'", "2022-05-01T01:00:00+00:00"):
        assert said in str(refused.value)
    assert "max_future_share" in str(refused.value)


def test_without_a_given_time_the_clock_of_the_machine_counts(root):
    now = datetime.now(UTC)
    write_table(at(-1, 0.5, since=now), f"{root}/log.parquet")
    assert len(read_interactions(InteractionSettings(path=f"{root}/log.parquet"))) == 2
    write_table(at(-1, 1.5, since=now), f"{root}/log.parquet")
    with pytest.raises(DataError, match="user 'u1', later than"):
        read_interactions(InteractionSettings(path=f"{root}/log.parquet"))


def test_the_skew_is_admitted_to_the_microsecond_and_now_can_be_given(root):
    write_table(at(2, 2 + 1 / 3_600e6), f"{root}/log.parquet")
    settings = InteractionSettings(path=f"{root}/log.parquet", max_clock_skew_hours=2, now=MAY)
    with pytest.raises(DataError, match=r"02:00:00\.000001.* in row 1"):
        read_interactions(settings)
    assert len(read_interactions(settings, now=MAY + timedelta(microseconds=1))) == 2
    with pytest.raises(DataError, match="in row 0"):
        read_interactions(settings, now=MAY - timedelta(days=1))


def test_events_ahead_are_dropped_and_counted_up_to_a_share_of_all_files(root):
    write_table(at(5, 6), f"{root}/log/1.parquet")
    write_table(at(*[-1] * 18), f"{root}/log/2.parquet")
    settings = InteractionSettings(path=f"{root}/log", max_future_share=0.1, now=MAY)
    read = read_interactions(settings)
    assert len(read) == 18
    assert read.schema.metadata[DROPPED] == b"2"
    below = settings.model_copy(update={"max_future_share": 0.09})
    with pytest.raises(DataError, match=r"log/1\.parquet.*in row 0.*2 of 20 events.*max_future_share = 0\.09"):
        read_interactions(below)


def test_now_needs_a_zone(tmp_path):
    (tmp_path / "my.toml").write_text(
        'root = "out"\n[interactions]\npath = "i"\n[items]\npath = "i"\n[timeline]\ncut = 2022-05-01T00:00:00Z\n'
    )
    with pytest.raises(ConfigError, match=r"interactions\.now.*no time zone.*2022-05-01T00:00:00Z"):
        load_settings(tmp_path / "my.toml", ["interactions.now=2022-05-01T00:00:00"])
    config = load_settings(tmp_path / "my.toml", ["interactions.now=2022-05-01T02:00:00+02:00"])
    assert config.interactions.now == MAY


def test_rows_in_messages_are_those_of_the_file_also_where_a_rule_excludes_some(root):
    rules = (
        FeedbackRule(feedback="exclude", when="reason == 'bought'"),
        FeedbackRule(feedback="negative", when="reason == 'dull'"),
    )
    reason = ["bought", "dull", "bought", "dull"]
    for users, said in (
        (["u", "v", "w", None], "null in 1 rows, first in row 3"),
        (["u", "v", "w", "x" * 2000], "row 3"),
    ):
        write_table(log(users, reason=reason), f"{root}/log.parquet")
        with pytest.raises(DataError, match=said):
            read_interactions(InteractionSettings(path=f"{root}/log.parquet", rules=rules))
