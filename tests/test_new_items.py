"""Items that come after the catalogue was fitted, and items that disappear."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from worlds import tiny_config, tiny_model

from conrec import storage
from conrec.blocklist.asking import liked_leaves
from conrec.blocklist.counts import Counts, things_of
from conrec.blocklist.engines import TorchEngine
from conrec.blocklist.guardrails import facts
from conrec.catalogue.trie import Trie
from conrec.config import Config
from conrec.errors import DataError
from conrec.feedback.anchors import served_anchors
from conrec.policy.model import save_checkpoint
from conrec.progress import console
from conrec.ragged import Ragged
from conrec.stages.artefacts import Artefacts
from conrec.stages.catalogue import make_catalogue
from conrec.stages.inputs import read_events
from conrec.stages.new_items import load_catalogue, tonights_catalogue
from conrec.tables import INTERACTIONS

CUT = datetime(2026, 1, 1, tzinfo=UTC)
CORNERS = {"a": (4, 0), "b": (4, 1), "c": (-4, 0), "d": (0, 4), "e": (0, -4)}


def items(*names: str, **vectors: tuple[float, float]) -> pa.Table:
    rows = {name: CORNERS[name] for name in names} | vectors
    return pa.table(
        {
            "item_id": list(rows),
            "text": [f"item {name}" for name in rows],
            "embedding": pa.array([list(vector) for vector in rows.values()], pa.list_(pa.float32())),
        }
    )


@pytest.fixture
def world(tmp_path: Path):
    """A catalogue fitted on five items; events before and after the cut."""
    days = [
        ("u", "a", -2, "negative"),
        ("u", "b", -1, "positive"),
        ("v", "c", -1, "negative"),
        ("v", "n", 1, "negative"),
    ]
    users, names, offsets, kinds = zip(*days, strict=True)
    times = [CUT + timedelta(days=day) for day in offsets]
    storage.write_table(pa.table([users, names, times, kinds], INTERACTIONS), str(tmp_path / "log.parquet"))
    storage.write_table(items("a", "b", "c", "d", "e"), str(tmp_path / "items.parquet"))

    def settings(cut: datetime = CUT, **sections: Any) -> Config:
        return tiny_config(
            root=str(tmp_path / "root"),
            interactions={"path": str(tmp_path / "log.parquet"), "max_unknown_item_share": 1.0},
            items={"path": str(tmp_path / "items.parquet")},
            timeline={"cut": cut},
            embedding={"sources": ["column"]},
            quantizer={"levels": 2, "codes": 4, "iterations": 5},
            **sections,
        )

    run = Artefacts(settings())
    run["catalogue"].finish(make_catalogue(run, run["catalogue"]), 0.0)
    return settings


def today(config: Config, table: pa.Table) -> Artefacts:
    storage.write_table(table, config.items.path)
    return Artefacts(config)


def test_a_new_item_gets_the_id_that_the_frozen_codebook_gives_it_and_keeps_it(world):
    run = today(world(), items("a", "b", "c", "d", "e", n=(4, 0.1)))
    catalogue, figures = tonights_catalogue(run)
    place = catalogue.item_ids.to_pylist().index("n")
    expected = catalogue.codebook.encode(np.array([[4, 0.1]], np.float32) / np.hypot(4, 0.1))
    assert catalogue.semantic_ids[place].tolist() == expected[0].tolist()
    assert figures["live"] == 6 and figures["new"] == 1 and figures["removed"] == 0
    # Described otherwise, or gone for a night, it is the same item: histories name it by its ID.
    for table in (items("a", "b", "c", "d", "e", n=(-4, 0)), items("a", "b"), items("a", "b", n=(0, 4))):
        again, _ = tonights_catalogue(today(world(), table))
        place = again.item_ids.to_pylist().index("n")
        assert again.semantic_ids[place].tolist() == expected[0].tolist()


def test_what_disappeared_leaves_the_trie_and_stays_in_histories(world):
    before, _ = tonights_catalogue(today(world(), items("a", "b", "c", "d", "e")))
    catalogue, figures = tonights_catalogue(today(world(), items("b", "d", "e")))
    assert figures["live"] == 3 and figures["removed"] == 2
    assert catalogue.item_ids.to_pylist() == ["a", "b", "c", "d", "e"]
    assert catalogue.live.tolist() == [False, True, False, True, True]
    found = catalogue.trie.find(catalogue.semantic_ids)
    assert found[2] == -1 and (found[[1, 3, 4]] >= 0).all()
    assert set(catalogue.trie.leaf_items.values.tolist()) == {1, 3, 4}
    np.testing.assert_array_equal(catalogue.semantic_ids, before.semantic_ids)
    events = read_events(world(), catalogue.item_ids)
    anchors = served_anchors(events, int(events.times.max()), 1, 1)
    assert len(events) == 3  # "n" was never described
    # Likes of what is gone exclude no ID of what is there; a rejection of it counts, and blocks nothing.
    liked = liked_leaves(catalogue.trie.item_leaves, events, anchors)
    assert (liked.values >= 0).all()
    limits = world().guardrails
    known = facts(events, np.arange(2), int(events.times.max()), 5, limits, catalogue.live)
    assert known.rejections.tolist() == [1, 1] and known.live_count == 3
    assert len(known.explicit) == 0
    everything = facts(events, np.arange(2), int(events.times.max()), 5, limits)
    assert everything.explicit.tolist() == [0, 7]


def test_training_reads_the_new_items_that_were_met_before_the_cut_and_no_others(world, tmp_path):
    run = today(world(), items("a", "b", "c", "d", "e", n=(4, 0.1), o=(0, 3)))
    assert load_catalogue(run).item_ids.to_pylist() == ["a", "b", "c", "d", "e"]
    later = round((CUT + timedelta(days=2)).timestamp() * 1e6)
    assert load_catalogue(run, later).item_ids.to_pylist() == ["a", "b", "c", "d", "e", "n"]
    # Of a cut after "n" was met, it is a part; that it has disappeared since changes nothing.
    moved = world().model_copy(
        update={"timeline": world().timeline.model_copy(update={"cut": CUT + timedelta(days=2)})}
    )
    before = Artefacts(moved)["policy"].version
    assert load_catalogue(Artefacts(moved)).item_ids.to_pylist() == ["a", "b", "c", "d", "e", "n"]
    gone = today(moved, items("a", "b", "c", "d", "e"))
    assert gone["policy"].version == before
    assert load_catalogue(gone).item_ids.to_pylist() == ["a", "b", "c", "d", "e", "n"]


def test_another_text_of_an_encoded_item_leaves_what_is_trained(world):
    """What training reads of it is what it was encoded from."""
    later = world(cut=CUT + timedelta(days=2))
    run = today(later, items("a", "b", "c", "d", "e", n=(4, 0.1)))
    before, text = run["policy"].version, load_catalogue(run).items["text"].to_pylist()
    assert run["policy"].version == before == Artefacts(later)["policy"].version
    edited = items("a", "b", "c", "d", "e", n=(4, 0.1))
    edited = edited.set_column(1, "text", pc.binary_join_element_wise(edited["text"], "edited", " "))
    run = today(later, edited)
    assert load_catalogue(run).items["text"].to_pylist() == text
    assert run["policy"].version == before


def test_new_items_without_the_column_that_is_encoded_are_refused_by_name(world):
    run = today(world(), items("a", "b", "c", "d", "e", n=(4, 0.1)).drop_columns("embedding"))
    with pytest.raises(DataError, match=r"column embedding is missing, which the setting embedding\.sources asks for"):
        tonights_catalogue(run)
    # Nothing is to be encoded: no vector is missed.
    assert tonights_catalogue(today(world(), items("a", "b").drop_columns("embedding")))[1]["live"] == 2


def test_items_keep_their_category_when_a_later_table_has_none(world):
    def with_category(table: pa.Table) -> pa.Table:
        return table.append_column("category", pa.array(["x"] * len(table)))

    vectors = {f"n{place}": (4, place / 10) for place in range(6)}
    known: dict[str, tuple[float, float]] = {}
    for place, (name, vector) in enumerate(vectors.items()):  # whichever file's name comes first
        known[name] = vector
        table = items("a", "b", "c", "d", "e", **known)
        run = today(world(), table if place % 2 else with_category(table))
        tonights_catalogue(run)
    added = Artefacts(world()).sources.added(run["catalogue"].version)
    assert added.sort_by("item_id")["category"].to_pylist() == ["x", None] * 3


def test_encoding_again_or_at_once_writes_the_same(world):
    table = items("a", "b", "c", "d", "e", n=(4, 0.1))
    run, other = today(world(), table), today(world(), table)
    first = tonights_catalogue(run)[0]
    folder = run.sources.added_url(run["catalogue"].version)
    names = storage.list_files(folder)
    # Another night that had not seen the first one's file.
    storage.write_table(storage.read_table(folder), storage.join(folder, "0-twice.parquet"))
    second = tonights_catalogue(other)[0]
    assert second.item_ids.equals(first.item_ids) and len(names) == 1
    np.testing.assert_array_equal(second.semantic_ids, first.semantic_ids)


def advised(run: Artefacts) -> str:
    with console.capture() as capture:
        tonights_catalogue(run)
    return " ".join(capture.get().split())


def test_many_new_items_or_badly_placed_ones_advise_another_fit(world):
    few = today(world(catalogue={"max_new_share": 0.2}), items("a", "b", "c", "d", "e", n=(4, 0.1)))
    assert "refit" not in advised(few)
    many = today(world(catalogue={"max_new_share": 0.2}), items("a", "b", "c", "d", "e", n=(4, 0.1), o=(-4, 0.1)))
    assert "29% of the items are new (catalogue.max_new_share = 0.2): run conrec catalogue --refit" in advised(many)
    odd = today(world(catalogue={"max_reconstruction_loss": 0.05}), items("a", "b", "c", "d", "e", p=(-3, -3)))
    assert "catalogue.max_reconstruction_loss = 0.05" in advised(odd)


def test_a_policy_of_the_older_trie_decodes_over_the_newer_one(tmp_path):
    """New leaves, new inner nodes and vanished ones: probabilities renormalise, every live ID is reached."""
    config = tiny_config()
    model, tokenizer, _ = tiny_model(config)
    save_checkpoint(model, tokenizer, tmp_path)
    codes = config.quantizer.codes
    older = Trie.build(np.array([[0, 0], [0, 1], [1, 1]]), codes)
    newer = Trie.of_live(
        np.array([[0, 0], [0, 1], [1, 1], [1, 2], [2, 0], [2, 3]]), codes, np.array([1, 0, 1, 1, 1, 1], bool)
    )
    for trie in (older, newer):
        engine = TorchEngine.load(tmp_path, trie)
        vocabulary = engine.vocabulary
        prompts = Ragged.from_lengths(
            np.array([vocabulary.begin] * 31 + [vocabulary.rejected], np.int32), np.array([32])
        )
        leaves, log_probs = engine.generate(prompts, len(trie))
        assert sorted(leaves[0].tolist()) == list(range(len(trie)))
        assert np.exp(log_probs.astype(np.float64)).sum() == pytest.approx(1, abs=1e-5)
    assert newer.find(np.array([[0, 1]])).tolist() == [-1]


def test_what_is_counted_moves_with_the_night_and_needs_no_training(world):
    run = today(world(), items("a", "b", "c", "d", "e"))
    catalogue, _ = tonights_catalogue(run)
    events = read_events(run.config, catalogue.item_ids)
    policy = run["policy"].version
    things = things_of(catalogue)
    monday = Counts.at(events, int(events.times.max()), things)
    rows = [(f"w{place}", "e", CUT + timedelta(days=3), "negative") for place in range(30)]
    more = pa.table(list(zip(*rows, strict=True)), INTERACTIONS)
    old = storage.read_table(run.config.interactions.path)
    storage.write_table(pa.concat_tables([old, more]), run.config.interactions.path)
    run = Artefacts(run.config)
    events = read_events(run.config, catalogue.item_ids)
    tuesday = Counts.at(events, int(events.times.max()), things)
    # Of the item, and of what will come with its semantic ID.
    for thing in (4, 5 + catalogue.trie.item_leaves[4]):
        for name in ("rejected", "shown"):
            assert tuesday.of_things[name][thing] > monday.of_things[name][thing] + 0.5, name
        assert tuesday.of_things["liked"][thing] < monday.of_things["liked"][thing]
    assert run["policy"].version == policy
