"""The rows of an evaluation: settings of rivals and ablations, how a row is kept, and when it is made again."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError
from worlds import tiny_config

from conrec import storage
from conrec.catalogue.trie import Trie
from conrec.config import Config
from conrec.feedback.events import LIKED, REJECTED, Events
from conrec.stages import systems as module
from conrec.stages.artefacts import Artefacts
from conrec.stages.inputs import SHARE_PRIOR, item_shares
from conrec.stages.systems import (
    ABLATION,
    AFTER,
    BEFORE,
    COUNTED,
    FULL,
    Row,
    SystemSpec,
    ablations,
    changed,
    rivals,
    systems,
)
from conrec.tables import INTERACTIONS

ALL = {"name": "all", "blocks": ["negatives", "positives"], "steps": 30, "beta": 0.02}
RECENT = {"name": "recent", "blocks": ["recent"], "steps": 12, "beta": 0.2}


@pytest.fixture
def base(tmp_path: Path) -> Config:
    """Settings whose input files exist: artefacts are named after their contents."""
    row = {"user_id": "u", "item_id": "i", "timestamp": datetime(2024, 1, 1, tzinfo=UTC), "feedback": "negative"}
    storage.write_table(pa.Table.from_pylist([row], INTERACTIONS), str(tmp_path / "interactions.parquet"))
    storage.write_table(pa.table({"item_id": ["i"], "text": ["an item"]}), str(tmp_path / "items.parquet"))
    return tiny_config(
        root=str(tmp_path / "root"),
        interactions={"path": str(tmp_path / "interactions.parquet")},
        items={"path": str(tmp_path / "items.parquet")},
        supervised={"translation_epochs": 2, "alignment_epochs": 3},
        grpo={"stages": [RECENT, ALL], "gamma": 0.7},
    )


def test_items_share_the_rejections_of_their_id():
    """Items 0 and 2 have one ID: two users rejected item 0, one of them twice; a like is no rejection."""
    trie = Trie.build(np.array([[0, 1], [1, 0], [0, 1]]), 2)
    kinds = [REJECTED, REJECTED, LIKED, REJECTED]
    events = Events(
        pa.array(["a", "b"]), np.array([0, 3, 4]), np.array([0, 0, 2, 0]), np.arange(4), np.array(kinds, np.int8)
    )
    shares = item_shares(trie, events)
    assert shares.dtype == np.float32
    whole = 2 + 2 * SHARE_PRIOR
    np.testing.assert_allclose(np.exp(shares), [(2 + SHARE_PRIOR) / whole, 1, SHARE_PRIOR / whole], rtol=1e-6)


def flat(config: Config) -> dict[str, Any]:
    """`section.setting` -> value."""
    found = {}
    for section, values in config.model_dump(mode="json").items():
        if isinstance(values, dict):
            found |= {f"{section}.{name}": value for name, value in values.items()}
        else:
            found[section] = values
    return found


def differences(base: Config, other: Config) -> dict[str, Any]:
    """What the other settings have where the two differ."""
    before, after = flat(base), flat(other)
    assert before.keys() == after.keys()
    return {name: value for name, value in after.items() if value != before[name]}


# Settings


def test_changed_replaces_what_it_names_and_checks_the_result(base: Config) -> None:
    assert changed(base) == base
    other = changed(base, supervised={"warmup_epochs": 4.0}, grpo={"gamma": 0.0, "stages": ()})
    assert isinstance(other, Config)
    assert differences(base, other) == {"supervised.warmup_epochs": 4.0, "grpo.gamma": 0.0, "grpo.stages": []}
    assert base.grpo.gamma == 0.7, "the settings given stay as they are"
    with pytest.raises(ValidationError, match="gamma"):
        changed(base, grpo={"gamma": -1.0})
    with pytest.raises(ValidationError, match="prompts_per_step"):
        changed(base, train={"workers": 3})


def test_rivals_differ_from_the_method_in_what_their_name_says(base: Config) -> None:
    found = {name: differences(base, other) for name, other in rivals(base)}
    next_only = {"supervised.alignment_epochs": 0, "supervised.warmup_target": "next_negative", "grpo.stages": []}
    # Two fifths of the 15 passes: each reads a history once a rejection.
    next_only["supervised.warmup_epochs"] = 6
    assert found["LC-Rec, negatives only"] == next_only | {"supervised.warmup_blocks": ["negatives"]}
    assert found["LC-Rec, negatives and positives"] == next_only
    assert found["next-negative warm-up only"] == next_only | {"supervised.translation_epochs": 0}
    (stage,) = found["S-DPO instead of GRPO"].pop("grpo.stages")
    # Its weights stand whatever they lose in FHR.
    assert found["S-DPO instead of GRPO"] == {"grpo.tolerance": 1}
    # As many steps as GRPO has over all stages, on the whole history.
    assert stage["objective"] == "s_dpo" and stage["steps"] == 42
    assert stage["blocks"] == ["negatives", "positives"]


def test_ablations_lead_to_the_method_one_step_after_the_other(base: Config) -> None:
    found = {name: differences(base, other) for name, other in ablations(base)}
    assert found == {
        "translation and warm-up": {"supervised.alignment_epochs": 0, "grpo.stages": []},
        "+ progressive context": {"grpo.targets": "next_negative", "grpo.gamma": 0},
        "+ future-negative reward": {"grpo.gamma": 0},
    }
    # Every row of the ablation is one that somebody makes, and each is named once.
    rows = [name for name, _ in ABLATION]
    assert set(rows) == {*found, BEFORE, AFTER, FULL, COUNTED} and len(rows) == len(set(rows))
    assert ABLATION[0][1] is None and all(step for _, step in ABLATION[1:])


def test_without_grpo_s_dpo_still_is_a_system(base: Config) -> None:
    other = dict(rivals(changed(base, grpo={"stages": ()})))["S-DPO instead of GRPO"]
    assert [stage.steps for stage in other.grpo.stages] == [1]


def test_every_row_has_an_artefact_of_its_own_and_shares_training_where_it_can(base: Config) -> None:
    everything = systems(Artefacts(changed(base, evaluation={"systems": "all"})))
    assert [spec.group for spec in everything[:1]] == ["floor"]
    assert [spec.name for spec in everything[-2:]] == [BEFORE, AFTER]
    # The full method and what it is without a policy are scores over the row of the policy, not rows.
    assert not {FULL, COUNTED} & {spec.name for spec in everything}
    assert len({spec.name for spec in everything}) == len(everything)
    assert len({spec.artefact.version for spec in everything}) == len(everything)
    assert [spec.name for spec in systems(Artefacts(base))] == ["floors", BEFORE, AFTER]
    # The few rows are the same rows, read and not made again.
    whole = {spec.name: spec.artefact.version for spec in everything}
    assert all(whole[spec.name] == spec.artefact.version for spec in systems(Artefacts(base)))
    supervised = {name: Artefacts(other)["supervised"].version for name, other in [*rivals(base), *ablations(base)]}
    shared = {name for name, version in supervised.items() if version == Artefacts(base)["supervised"].version}
    assert shared == {"S-DPO instead of GRPO", "+ progressive context", "+ future-negative reward"}
    trained = [Artefacts(other)["policy"].version for _, other in [*rivals(base), *ablations(base)]]
    assert len({*trained, Artefacts(base)["policy"].version}) == len(trained) + 1


@pytest.mark.parametrize(
    ("section", "value"),
    [
        ("seed", 5),
        ("timeline", {"horizon_days": 3.0}),
        ("generate", {"beam_width": 6}),
        ("evaluation", {"max_anchors": 9}),
        ("prompt", {"max_negatives": 3}),
    ],
)
def test_what_decides_predictions_makes_every_row_anew(base: Config, section: str, value: Any) -> None:
    document = base.model_dump()
    document[section] = document[section] | value if isinstance(value, dict) else value
    other = {spec.name: spec.artefact.version for spec in systems(Artefacts(Config.model_validate(document)))}
    assert not {spec.artefact.version for spec in systems(Artefacts(base))} & set(other.values())


# Rows


def test_arrays_come_back_from_a_table_as_they_were(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    arrays = {
        "items": random.integers(-1, 90, (7, 5)).astype(np.int32),
        "leaves": random.integers(-1, 90, (7, 3)),
        "scores": np.where(random.random((7, 5)) < 0.3, -np.inf, random.random((7, 5))).astype(np.float32),
        "candidates": np.where(random.random((7, 2)) < 0.5, np.nan, 1.5).astype(np.float32),
        "random/items": np.arange(7, dtype=np.int32)[:, None],
    }
    path = str(tmp_path / "row.parquet")
    storage.write_table(module._table(arrays), path)
    found = module._arrays(storage.read_table(path))
    assert list(found) == list(arrays)
    for name, values in arrays.items():
        assert found[name].dtype == values.dtype, name
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    # Read in pieces, as a table of several row groups is, and in part.
    pieces = pa.concat_tables([module._table(arrays).slice(0, 3), module._table(arrays).slice(3)])
    np.testing.assert_array_equal(module._arrays(pieces)["scores"], arrays["scores"])
    np.testing.assert_array_equal(module._arrays(pieces.slice(4))["leaves"], arrays["leaves"][4:])


def test_a_row_is_made_once(base: Config) -> None:
    made = []

    def make(world: Any) -> Row:
        made.append(world)
        return Row({"items": np.array([[3, -1]], np.int32)}, {"training_seconds": 1.5})

    (floors, *_) = systems(Artefacts(base))
    spec = SystemSpec("mine", "floor", floors.artefact, make)
    first = spec.row("the world")  # type: ignore[arg-type]
    again = SystemSpec("mine", "floor", floors.artefact, make).row("another")  # type: ignore[arg-type]
    assert made == ["the world"]
    for row in (first, again):
        assert row.figures == {"training_seconds": 1.5}
        assert row.arrays["items"].tolist() == [[3, -1]] and row.arrays["items"].dtype == np.int32


def test_a_row_whose_making_was_cut_short_is_made_again(base: Config) -> None:
    def fail(world: Any) -> Row:
        raise RuntimeError("killed")

    (floors, *_) = systems(Artefacts(base))
    with pytest.raises(RuntimeError):
        SystemSpec("mine", "floor", floors.artefact, fail).row(None)  # type: ignore[arg-type]
    assert floors.artefact.read() is None
    row = SystemSpec("mine", "floor", floors.artefact, lambda world: Row({"a": np.zeros((1, 1))}, {})).row(None)  # type: ignore[arg-type]
    assert row.arrays["a"].tolist() == [[0]]


def test_floors_are_rows_of_their_own() -> None:
    arrays = {
        f"{name}/{key}": np.full((2, 3), number)
        for name, start in (("random", 0), ("most shown", 3))
        for number, key in enumerate(("items", "scores", "candidates"), start)
    }
    figures = {"floors": {"random": {"users_per_second": 1.0}, "most shown": {"users_per_second": 2.0}}}
    found = module.floor_rows(Row(arrays, figures))
    assert list(found) == ["random", "most shown"]
    assert {name: int(found["most shown"].arrays[name][0, 0]) for name in ("items", "scores", "candidates")} == {
        "items": 3, "scores": 4, "candidates": 5,
    }  # fmt: skip
    assert found["most shown"].figures == {"users_per_second": 2.0}
