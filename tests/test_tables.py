"""The schema check: harmless differences pass, everything else is refused with file, column, value and remedy."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from conrec.errors import DataError
from conrec.tables import INTERACTIONS, ITEMS, TIMESTAMP, check

MAY = 1_651_420_800_000_000  # 2022-05-01T16:00Z in microseconds


def interactions(**replaced: pa.Array) -> pa.Table:
    columns = {
        "user_id": pa.array(["u", "v"]),
        "item_id": pa.array(["a", "b"]),
        "timestamp": pa.array([MAY, MAY + 1_000_000], TIMESTAMP),
        "feedback": pa.array(["negative", "positive"]),
    }
    return pa.table(columns | replaced)


@pytest.mark.parametrize(
    "same",
    [
        {"user_id": pa.array(["u", "v"], pa.large_string())},
        {"user_id": pa.array(["u", "v"]).dictionary_encode()},
        {"user_id": pa.array(["u", "v"], pa.large_string()).dictionary_encode()},
        {"timestamp": pa.array([MAY // 1000, MAY // 1000 + 1000], pa.timestamp("ms", "UTC"))},
        {"timestamp": pa.array([MAY // 10**6, MAY // 10**6 + 1], pa.timestamp("s", "Asia/Shanghai"))},
        {"timestamp": pa.array([MAY * 1000, MAY * 1000 + 10**9 + 1], pa.timestamp("ns", "UTC"))},
    ],
)
def test_harmless_differences_become_the_schema(same):
    assert check(interactions(**same), INTERACTIONS, "log.parquet").equals(interactions())


def test_extra_columns_stay_behind_the_schema():
    table = interactions().select([3, 2, 1, 0]).add_column(0, "tab", pa.array([1, 0]))
    assert check(table, INTERACTIONS, "log.parquet").column_names == [*INTERACTIONS.names, "tab"]


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"user_id": pa.array([1, 2])}, ["user_id", "int64", "'1'", "write it as string"]),
        ({"user_id": pa.array(["u", None])}, ["user_id", "null in 1 rows", "row 1", "drop the rows"]),
        ({"item_id": pa.array([None, "b"])}, ["item_id", "null"]),
        ({"timestamp": pa.array([MAY, None], TIMESTAMP)}, ["timestamp", "null"]),
        ({"timestamp": pa.array([MAY, MAY])}, ["timestamp", "int64", str(MAY), "timestamp[us, UTC]"]),
        ({"timestamp": pa.array([MAY, MAY], pa.timestamp("us"))}, ["timestamp", "time zone", "timestamp[us, UTC]"]),
        ({"timestamp": pa.array([MAY, MAY // 1000], TIMESTAMP)}, ["year 1970", str(MAY // 1000), "unit"]),
        ({"timestamp": pa.array([MAY, MAY], pa.timestamp("ms", "UTC"))}, ["timestamp", str(MAY), "unit is wrong"]),
        ({"timestamp": pa.array([MAY, MAY // 1000], pa.timestamp("s", "UTC"))}, ["unit is wrong"]),
        ({"timestamp": pa.array(["2022-05-01", "2022-05-01"])}, ["timestamp", "string", "2022-05-01"]),
    ],
)
def test_refusals_name_file_column_value_and_remedy(broken, said):
    with pytest.raises(DataError) as refused:
        check(interactions(**broken), INTERACTIONS, "log.parquet")
    for part in ["log.parquet", *said]:
        assert part in str(refused.value)


def test_missing_column_lists_what_is_there():
    with pytest.raises(DataError, match=r"log\.parquet: column item_id is missing.*user_id, timestamp.*columns = "):
        check(interactions().drop_columns("item_id"), INTERACTIONS, "log.parquet")


def test_column_that_occurs_twice_is_refused():
    table = interactions().append_column("user_id", pa.array(["x", "y"]))
    with pytest.raises(DataError, match="user_id occurs more than once"):
        check(table, INTERACTIONS, "log.parquet")


def test_optional_columns_may_be_absent_but_not_wrong():
    items = pa.table({"item_id": ["a"], "text": ["A"]})
    assert check(items, ITEMS, "items.parquet").equals(items)
    vectors = pa.array([np.array([0.5, 1.0])], pa.large_list(pa.float64()))
    checked = check(items.append_column("embedding", vectors), ITEMS, "items.parquet")
    assert checked["embedding"].type == pa.list_(pa.float32())
    with pytest.raises(DataError, match="category is int64"):
        check(items.append_column("category", pa.array([3])), ITEMS, "items.parquet")


def test_numbers_that_do_not_fit_are_refused():
    schema = pa.schema([pa.field("leaf", pa.int32(), nullable=False)])
    assert check(pa.table({"leaf": [7]}), schema, "x")["leaf"].type == pa.int32()
    with pytest.raises(DataError, match="leaf"):
        check(pa.table({"leaf": [2**40]}), schema, "x")
