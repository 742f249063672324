"""A whole night over the tiny world: both shapes, failures, and what must not be mixed up."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from nights import CERTAIN, COUNTED, calibration_of, ranking_of, write_generated

from conrec import storage
from conrec.blocklist.night import night
from conrec.blocklist.resolve import leaf_vectors, pair_similarities
from conrec.catalogue.codebook import format_semantic_ids, parse_semantic_ids
from conrec.config import GuardrailSettings, PublishSettings, ReleaseSettings
from conrec.errors import ArtefactError, DataError
from conrec.serving.audience import in_holdout_one, released_one
from conrec.tables import BLOCKLIST, GENERATED, RULES

DAY = 86_400_000_000
NOW = 1_700_000_000_000_000
TIMES = ("demotes_at", "expires_at")
KEYS = ("user_id", "item_id", "reason")
THREE = PublishSettings(buckets=3)
OPEN = GuardrailSettings(max_catalogue_share=1.0, min_history=1)
NEAR = 0.8


def opened(world, events, url, calibration, limits, publish, now=NOW):
    vectors, ranking = leaf_vectors(world.codebook, world.trie), ranking_of(world, events, now)
    return night([url], events, world.item_ids, ranking, vectors, NEAR, calibration, now, limits, publish)


def run(world, events, url, calibration, limits=OPEN, buckets=3, now=NOW, holdout_share=0.0, release=1.0):
    publish = PublishSettings(
        buckets=buckets, holdout_share=holdout_share, release=ReleaseSettings(share=release, shadow=False)
    )
    with opened(world, events, url, calibration, limits, publish, now) as tonight:
        blocks = list(tonight.blocks())
        about = tonight.about()
    assert [block.bucket for block in blocks] == list(range(buckets))
    items = pa.concat_tables([block.items for block in blocks])
    rules = pa.concat_tables([block.rules for block in blocks])
    assert items.schema == BLOCKLIST
    assert rules.schema == RULES
    return items, rules, about


def test_rules_by_their_ids_give_the_predicted_items(world, make_events, tmp_path):
    """The score looks at nothing but the ID, so every item has that of its rule, whatever was met."""
    rng = np.random.default_rng(0)
    users = [f"user{number}" for number in range(40)]
    events = make_events({user: [(row % 12, "rejected", 200)] * (1 + row % 4) for row, user in enumerate(users)})
    write_generated(str(tmp_path), {user: rng.permutation(9)[:3].tolist() for user in users})
    items, rules, _ = run(world, events, str(tmp_path), calibration_of(CERTAIN, COUNTED))

    written = parse_semantic_ids(rules["semantic_id"], 2)
    of_items = world.trie.semantic_ids[world.trie.item_leaves]
    rule_scores = {}
    for rule, codes in zip(rules.to_pylist(), written, strict=True):
        for item in np.flatnonzero((of_items == codes).all(axis=1)):
            rule_scores[rule["user_id"], f"item{item:02d}"] = rule["score"]
    assert {(row["user_id"], row["item_id"]): row["score"] for row in items.to_pylist()} == rule_scores
    assert 40 < len(rule_scores) < 40 * 12
    assert all(row["score"] >= row["threshold"] for row in rules.to_pylist())
    thresholds = {user: CERTAIN if row % 4 < 2 else COUNTED for row, user in enumerate(users)}
    assert {row["user_id"]: row["threshold"] for row in rules.to_pylist()} == pytest.approx(thresholds)
    for row in items.to_pylist():
        assert row["reason"] == "predicted"
        assert row["similarity"] == 1  # each item has a generated ID


def test_a_row_names_the_generated_id_that_it_lies_near_or_its_own(world, make_events, tmp_path):
    """Everything passes: three of the nine IDs share the first code of what was generated, and lie near it."""
    events = make_events({"a": [(0, "rejected", 200)]})
    write_generated(str(tmp_path), {"a": [4]})
    items, rules, _ = run(world, events, str(tmp_path), calibration_of(0.001, 0.001))
    assert len(items) == 12 and len(rules) == 9
    written = format_semantic_ids(world.trie.semantic_ids).to_pylist()
    vectors = leaf_vectors(world.codebook, world.trie)
    for row in items.to_pylist():
        own = int(world.trie.item_leaves[int(row["item_id"][4:])])
        similarity = pair_similarities(vectors, np.array([4]), np.array([own]))[0]
        near = similarity >= NEAR
        assert (row["similarity"], row["semantic_id"]) == ((similarity, written[4]) if near else (0, written[own]))
        assert row["score"] == pytest.approx(1 / (1 + math.exp(-(1 - 0.5 if own == 4 else -5))))
    assert {row["similarity"] for row in items.to_pylist()} > {0, 1}


def test_each_stratum_is_cut_at_its_own_threshold(world, make_events, tmp_path):
    events = make_events({"busy": [(0, "rejected", 200)] * 3, "quiet": [(0, "rejected", 200)]})
    write_generated(str(tmp_path), {"busy": [4], "quiet": [4]})
    items, rules, _ = run(world, events, str(tmp_path), calibration_of(None, COUNTED))
    assert set(items["user_id"].to_pylist()) == {"busy"}
    assert items["item_id"].to_pylist() == ["item04", "item10", "item11"]
    assert rules["user_id"].to_pylist() == ["busy"]


def test_without_any_threshold_only_explicit_rejections_are_published(world, make_events, tmp_path):
    events = make_events({"a": [(5, "rejected", 1)]})
    write_generated(str(tmp_path), {"a": [4]})
    items, rules, about = run(world, events, str(tmp_path), calibration_of(None, None))
    assert items.select(["user_id", "item_id", "reason", "semantic_id"]).to_pylist() == [
        {"user_id": "a", "item_id": "item05", "reason": "explicit", "semantic_id": None}
    ]
    assert len(rules) == 0
    assert about["calibration"]["strata"][0]["threshold"] is None


def test_users_whose_generation_failed_or_who_were_left_out_keep_their_own_rejections(world, make_events, tmp_path):
    events = make_events({user: [(5, "rejected", 1)] for user in ("failed", "fine", "later")})
    write_generated(str(tmp_path), {"failed": "the engine died", "fine": [4]})
    # What is counted would pass for everybody.
    items, rules, about = run(world, events, str(tmp_path), calibration_of(0.001, 0.001))
    assert set(rules["user_id"].to_pylist()) == {"fine"} and len(rules) == 9
    rows = set(
        zip(items["user_id"].to_pylist(), items["item_id"].to_pylist(), items["reason"].to_pylist(), strict=True)
    )
    assert {row for row in rows if row[2] == "explicit"} == {
        (user, "item05", "explicit") for user in ("failed", "fine", "later")
    }
    assert {row[0] for row in rows if row[2] == "predicted"} == {"fine"}
    assert (about["generated_users"], about["failed_users"], about["failures"]) == (2, 1, ["the engine died"])


def test_who_met_little_or_rejected_nothing_gets_nothing_predicted_in_either_shape(world, make_events, tmp_path):
    shown = [(item, "shown", 1) for item in range(4)]
    events = make_events(
        {
            "enough": [(5, "rejected", 1), *shown],
            "little": [(5, "rejected", 1), *shown[:3], (0, "shown", 2), (6, "shown", -1)],
            "never": [(5, "liked", 1), *shown],
        }
    )
    write_generated(str(tmp_path), {user: [4] for user in ("enough", "little", "never")})
    limits = OPEN.model_copy(update={"min_history": 5})
    items, rules, _ = run(world, events, str(tmp_path), calibration_of(0.001, 0.001), limits)
    assert {row["user_id"] for row in items.to_pylist() if row["reason"] == "predicted"} == {"enough"}
    assert set(rules["user_id"].to_pylist()) == {"enough"}
    assert {row["user_id"] for row in items.to_pylist() if row["reason"] == "explicit"} == {"enough", "little"}


def test_items_are_held_back_over_all_buckets(world, make_events, tmp_path):
    """Four of ten users in different files: no bucket alone sees the share."""
    users = [f"user{number}" for number in range(10)]
    events = make_events({user: [(0, "rejected", 200)] for user in users})
    write_generated(str(tmp_path), {user: [4] if row < 4 else [row % 2] for row, user in enumerate(users)})
    limits = OPEN.model_copy(update={"max_user_share": 0.35})
    items, rules, about = run(world, events, str(tmp_path), calibration_of(COUNTED, COUNTED), limits, buckets=7)
    assert about["held_back"] == [{"item_id": name, "users": 4} for name in ("item04", "item10", "item11")]
    assert not set(items["item_id"].to_pylist()) & {"item04", "item10", "item11"}
    assert len(items) > 0
    assert len(rules) == 10


def test_the_number_of_buckets_changes_nothing_but_the_files(world, make_events, tmp_path):
    rng = np.random.default_rng(1)
    users = [f"user{number}" for number in range(30)]
    events = make_events({user: [(int(rng.integers(12)), "rejected", 3)] for user in users})
    write_generated(str(tmp_path), {user: rng.permutation(9)[:2].tolist() for user in users})
    sort = [("user_id", "ascending"), ("item_id", "ascending")]
    one, *_ = run(world, events, str(tmp_path), calibration_of(COUNTED, COUNTED), buckets=1)
    many, *_ = run(world, events, str(tmp_path), calibration_of(COUNTED, COUNTED), buckets=11)
    assert one.sort_by(sort).equals(many.sort_by(sort))


def test_each_bucket_is_sorted_by_user(world, make_events, tmp_path):
    users = [f"user{number}" for number in range(30)]
    events = make_events({user: [(3, "rejected", 3)] for user in users})
    write_generated(str(tmp_path), {user: [4] for user in reversed(users)})
    with opened(world, events, str(tmp_path), calibration_of(COUNTED, COUNTED), OPEN, THREE) as tonight:
        for block in tonight.blocks():
            for table in (block.items, block.rules):
                assert table["user_id"].to_pylist() == sorted(table["user_id"].to_pylist())
                assert len(table) > 0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"a": [9]}, "leaf 9, the catalogue has 9"),
        ({"a": [-1]}, "leaf -1"),
        ({"a": [1], "stranger": [1]}, "'stranger', who has no interactions"),
    ],
)
def test_generated_ids_that_do_not_belong_are_refused(world, make_events, tmp_path, rows, message):
    write_generated(str(tmp_path), rows)
    with pytest.raises(ArtefactError, match=message):
        run(world, make_events({"a": [(1, "rejected", 1)]}), str(tmp_path), calibration_of(COUNTED, COUNTED))


@pytest.mark.parametrize("name", ["log_probs", "verdicts"])
@pytest.mark.parametrize("values", [[[1.0]], [[1.0, float("nan")]]], ids=["too few", "not a number"])
def test_leaves_without_a_number_beside_each_are_refused(world, make_events, tmp_path, name, values):
    write_generated(str(tmp_path / "whole"), {"a": [1, 2]})
    table = storage.read_table(str(tmp_path / "whole"))
    place = GENERATED.get_field_index(name)
    table = table.set_column(place, GENERATED.field(place), pa.array(values, GENERATED.field(place).type))
    storage.write_table(table, str(tmp_path / "broken" / "x.parquet"))
    with pytest.raises(ArtefactError, match=f"{name} are not one number for each"):
        run(world, make_events({"a": [(1, "rejected", 1)]}), str(tmp_path / "broken"), calibration_of(COUNTED, COUNTED))


def test_a_user_generated_twice_is_refused(world, make_events, tmp_path):
    write_generated(str(tmp_path / "once"), {"a": [1], "b": [2]})
    table = storage.read_table(str(tmp_path / "once"))
    storage.write_table(pa.concat_tables([table, table.slice(0, 1)]), str(tmp_path / "twice" / "x.parquet"))
    events = make_events({"a": [(1, "rejected", 1)], "b": [(1, "rejected", 1)]})
    with pytest.raises(ArtefactError, match=r"twice for user 'a'; delete the folder that holds .*/twice, and run"):
        run(world, events, str(tmp_path / "twice"), calibration_of(COUNTED, COUNTED))


def test_an_empty_or_misshapen_table_is_refused(world, make_events, tmp_path):
    events = make_events({"a": [(1, "rejected", 1)]})
    storage.write_table(GENERATED.empty_table(), str(tmp_path / "empty" / "x.parquet"))
    with pytest.raises(ArtefactError, match="nothing was generated"):
        run(world, events, str(tmp_path / "empty"), calibration_of(COUNTED, COUNTED))
    storage.write_table(pa.table({"user_id": ["a"]}), str(tmp_path / "other" / "x.parquet"))
    with pytest.raises(DataError, match="leaves"):
        run(world, events, str(tmp_path / "other"), calibration_of(COUNTED, COUNTED))


def test_semantic_ids_are_written_as_the_catalogue_writes_them(world, make_events, tmp_path):
    events = make_events({"a": [(0, "rejected", 200)]})
    write_generated(str(tmp_path), {"a": [4]})
    items, rules, _ = run(world, events, str(tmp_path), calibration_of(COUNTED, COUNTED))
    written = format_semantic_ids(world.trie.semantic_ids[4:5])[0].as_py()
    assert set(items["semantic_id"].to_pylist()) == {written}
    assert rules["semantic_id"].to_pylist() == [written]


def test_rows_block_then_demote_in_both_shapes(world, make_events, tmp_path):
    events = make_events({"a": [(0, "rejected", 10)]})
    write_generated(str(tmp_path), {"a": [4]})
    limits = OPEN.model_copy(update={"predicted_days": 2, "predicted_demote_days": 3, "explicit_days": 30})
    items, rules, _ = run(world, events, str(tmp_path), calibration_of(COUNTED, COUNTED), limits)

    def times(table):
        return {tuple(row) for row in zip(*(table[name].cast(pa.int64()).to_pylist() for name in TIMES), strict=True)}

    assert times(rules) == {(NOW + 2 * DAY, NOW + 5 * DAY)}
    assert times(items.filter(pc.equal(items["reason"], "predicted"))) == {(NOW + 2 * DAY, NOW + 5 * DAY)}
    assert times(items.filter(pc.equal(items["reason"], "explicit"))) == {(NOW + 20 * DAY, NOW + 20 * DAY)}


def test_holdout_and_unreleased_users_get_their_own_rejections_only_in_both_shapes(world, make_events, tmp_path):
    users = [f"user{number}" for number in range(200)]
    events = make_events({user: [(0, "rejected", 1)] for user in users})
    write_generated(str(tmp_path), {user: [4] for user in users})
    items, rules, about = run(
        world, events, str(tmp_path), calibration_of(COUNTED, COUNTED), holdout_share=0.2, release=0.5
    )
    served = {user for user in users if released_one(user, 0.5) and not in_holdout_one(user, 0.2)}
    assert 50 < len(served) < 110
    predicted = items.filter(pc.equal(items["reason"], "predicted"))
    assert set(predicted["user_id"].to_pylist()) == set(rules["user_id"].to_pylist()) == served
    explicit = items.filter(pc.equal(items["reason"], "explicit"))
    assert sorted(explicit["user_id"].to_pylist()) == sorted(users)
    assert about["audience"] == {
        "holdout_share": 0.2,
        "release_share": 0.5,
        "shadow": False,
        "holdout_users": sum(in_holdout_one(user, 0.2) for user in users),
        "released_users": len(served),
    }


def test_a_canary_holds_back_what_the_release_to_everybody_would(world, make_events, tmp_path):
    users = [f"user{number}" for number in range(40)]
    events = make_events({user: [(0, "rejected", 200)] for user in users})
    write_generated(str(tmp_path), {user: [4] if row < 10 else [row % 2] for row, user in enumerate(users)})
    limits = OPEN.model_copy(update={"max_user_share": 0.2})
    *_, everybody = run(world, events, str(tmp_path), calibration_of(COUNTED, COUNTED), limits)
    *_, canary = run(world, events, str(tmp_path), calibration_of(COUNTED, COUNTED), limits, release=0.1)
    assert canary["held_back"] == everybody["held_back"]
    assert "item04" in {row["item_id"] for row in canary["held_back"]}


def test_the_next_night_ends_what_was_liked_since_and_what_is_no_longer_generated(world, make_events, tmp_path):
    """Nothing of the night before is carried over."""
    histories = {"a": [(0, "rejected", 2), (1, "rejected", 2)], "b": [(0, "rejected", 2)], "c": [(2, "rejected", 29.5)]}
    limits = OPEN.model_copy(update={"explicit_days": 30})
    write_generated(str(tmp_path / "first"), {"a": [4], "b": [4], "c": [0]})
    first, *_ = run(world, make_events(histories), str(tmp_path / "first"), calibration_of(COUNTED, COUNTED), limits)

    # The next day: a likes a rejected and a predicted item (4, 10 and 11 share the semantic ID), b gets other IDs.
    histories["a"] += [(1, "liked", -0.5), (4, "liked", -0.6)]
    write_generated(str(tmp_path / "second"), {"a": [4], "b": [2], "c": "the engine died"})
    second, *_ = run(
        world, make_events(histories), str(tmp_path / "second"), calibration_of(COUNTED, COUNTED), limits, now=NOW + DAY
    )

    def pairs(table):
        return {tuple(row) for row in zip(*(table[name].to_pylist() for name in KEYS), strict=True)}

    gone, new = pairs(first) - pairs(second), pairs(second) - pairs(first)
    assert gone == {
        ("a", "item01", "explicit"),
        ("a", "item04", "predicted"),
        ("b", "item04", "predicted"),
        ("b", "item10", "predicted"),
        ("b", "item11", "predicted"),
        ("c", "item02", "explicit"),
        ("c", "item00", "predicted"),
        ("c", "item09", "predicted"),
    }
    assert new == {("b", "item02", "predicted")}
    kept = second.filter(pc.equal(second["reason"], "predicted"))
    assert min(kept["demotes_at"].cast(pa.int64()).to_pylist()) == NOW + 8 * DAY
