"""What rivals with an environment of their own share with the project: the split, the area, and the IDs of P5-CID."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from scipy import sparse

HOME = Path(__file__).parents[2] / "benchmarks" / "rivals"
sys.path += [str(HOME), str(HOME / "p5_cid"), str(HOME.parent)]

import given  # noqa: E402
import p5_cid  # noqa: E402
import seeds  # noqa: E402

from conrec.evaluation import published, trees  # noqa: E402


def pairs(users: int = 9, seed: int = 3) -> pa.Table:
    random = np.random.default_rng(seed)
    names = [f"u{user}" for user in random.integers(0, users, 60)]
    return pa.table({"user_id": names, "one": random.random(60), "was_rejected": random.random(60) < 0.4})


@pytest.mark.parametrize("seed", [0, 1])
def test_trials_are_measured_on_the_users_that_the_trees_are_chosen_on(seed: int) -> None:
    table = pairs()
    found = given.Given(Path(), table, table).held_out(seed)
    users = np.unique(table["user_id"].to_numpy(zero_copy_only=False).astype(str), return_inverse=True)[1]
    np.testing.assert_array_equal(found, trees._held_out(users, seed))
    assert 0 < found.sum() < len(found)


def test_the_area_is_that_of_the_trees() -> None:
    random = np.random.default_rng(0)
    scores, rejected = random.integers(0, 6, 50).astype(float), random.random(50) < 0.3
    assert given.area(scores, rejected) == pytest.approx(published.area(scores, rejected))
    assert np.isnan(given.area(scores, np.ones(50, bool)))


def test_what_is_told_is_read_by_its_columns_alone(tmp_path: Path) -> None:
    asked = pairs().append_column("anchor_time", pa.array([0] * 60)).append_column("item_id", pa.array(["i"] * 60))
    one = given.Given(tmp_path, pairs(), asked)
    assert one.names == ["one"] and one.columns(one.fit).shape == (60, 1)
    one.tell("mine", np.arange(60), {"trials": []})
    assert given.parquet.read_table(tmp_path / "told" / "mine.parquet").column_names == [
        "user_id", "anchor_time", "item_id", "score",
    ]  # fmt: skip


def test_the_first_of_equal_trials_is_chosen() -> None:
    trial = given.dataclass(type("Trial", (), {"__annotations__": {"value": float}}))
    one = given.Given(Path(), pairs(), pairs())
    trials = [trial(value) for value in (0.5, float("nan"), 0.7, 0.7)]
    best, told = given.tuned(trials, one, 0, lambda trial, held_out: (trial.value, {"passes": 2}))
    assert best == 2 and told[3]["held_out_auc"] == 0.7 and told[0]["passes"] == 2


def test_latest_items_are_those_of_a_loop_over_events() -> None:
    """Pairs at two moments; user u5 did nothing, u9 is no user of the events."""
    random = np.random.default_rng(0)
    users, items = random.integers(0, 5, 40), random.integers(0, 7, 40)
    times = random.permutation(40)
    stamp = pa.timestamp("us", "UTC")
    names = [f"u{user}" for user in users]
    ids = [f"i{item}" for item in items]
    events = pa.table({"user_id": names, "item_id": ids, "timestamp": pa.array(times, stamp)})
    asked = [(f"u{user}", moment) for user in (0, 3, 4, 5, 9, 1) for moment in (15, 40)]
    who, when = zip(*asked, strict=True)
    table = pa.table({"user_id": list(who), "anchor_time": pa.array(when, stamp)})
    found = given.latest_items(table, events, pa.chunked_array([[f"i{item}" for item in range(7)]]), 3)
    for (user, moment), row in zip(asked, found, strict=True):
        own = sorted((time, item) for time, item, name in zip(times, items, names, strict=True) if name == user)
        latest = [item for time, item in own if time <= moment][::-1][:3]
        assert row.tolist() == latest + [-1] * (3 - len(latest))


def communities(groups: int, size: int, alone: int) -> sparse.csr_array:
    """Cliques whose neighbours are joined by one edge, and nodes without any."""
    count = groups * size + alone
    graph = np.zeros((count, count), np.float32)
    for group in range(groups):
        graph[group * size : (group + 1) * size, group * size : (group + 1) * size] = 1
        if group:
            graph[group * size, group * size - 1] = graph[group * size - 1, group * size] = 0.05
    np.fill_diagonal(graph, 0)
    return sparse.csr_array(graph)


def test_collaborative_ids_are_communities_first_and_distinct() -> None:
    """Four cliques of ten are the first codes; three items without an edge stand behind them."""
    ids = p5_cid.collaborative_ids(communities(4, 10, 3), levels=3, codes=8, branches=4, seed=0)
    assert ids.shape == (43, 3) and ids.min() >= 0 and ids.max() < 8
    first = [set(ids[group * 10 : (group + 1) * 10, 0].tolist()) for group in range(4)]
    assert all(len(one) == 1 for one in first) and len(set.union(*first)) == 4
    assert (ids[40:, 0] == 4).all()
    assert len(np.unique(ids, axis=0)) == 43
    again = p5_cid.collaborative_ids(communities(4, 10, 3), levels=3, codes=8, branches=4, seed=0)
    np.testing.assert_array_equal(again, ids)


def test_many_items_without_an_edge_are_counted_through() -> None:
    ids = p5_cid.collaborative_ids(communities(2, 3, 20), levels=3, codes=4, branches=2, seed=0)
    assert len(np.unique(ids[6:], axis=0)) == 16 and (ids[6:, 0] == 2).all()
    with pytest.raises(ValueError, match="branches 4 do not fit below 4 codes"):
        p5_cid.collaborative_ids(communities(2, 3, 0), levels=3, codes=4, branches=4, seed=0)


def test_the_codebook_encodes_its_own_reconstructions() -> None:
    ids = np.array([[0, 3, 1], [2, 0, 0], [2, 0, 1]], np.int32)
    codebook = p5_cid.one_hot_codebook(ids, 4)
    np.testing.assert_array_equal(codebook.encode(codebook.reconstruct(ids)), ids)
    vectors = codebook.similarity_vectors(ids)
    assert vectors[1] @ vectors[2] > vectors[0] @ vectors[2]


def test_edges_are_users_who_met_both() -> None:
    from conrec.feedback.events import REJECTED, Events

    items = np.array([0, 1, 1, 2, 0, 2], np.int32)
    times, kinds = np.arange(6, dtype=np.int64), np.full(6, REJECTED, np.int8)
    events = Events(pa.array(["a", "b"]), np.array([0, 4, 6]), items, times, kinds)
    expected = np.array([[0, 1, 2, 0], [1, 0, 1, 0], [2, 1, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(p5_cid.together(events, 4).toarray(), expected)


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_an_interval_over_users_and_seeds_holds_the_truth(drawn: bool, spread: float) -> None:
    """Figures that users move by 1, the same or others in every seed, and seeds by `spread`."""
    random = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        users = random.normal(size=3) if drawn else random.normal()
        values = users + random.normal(scale=spread, size=3)
        found = seeds.over_seeds([{"value": one, "low": one - 1.96, "high": one + 1.96} for one in values], drawn)
        assert found is not None and found["value"] == pytest.approx(values.mean())
        held += found["low"] <= 0 <= found["high"]
    assert 0.94 < held / 1000 < 1


def test_a_figure_that_one_seed_lacks_has_no_mean() -> None:
    assert seeds.over_seeds([{"value": 1.0, "low": 0.0, "high": 2.0}, None], False) is None
