"""The rows of an evaluation: settings of rivals and ablations, how a row is kept, and when it is made again."""

from __future__ import annotations

import json
from dataclasses import replace
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
from conrec.evaluation.leaf_items import SHARE_PRIOR, item_shares
from conrec.evaluation.rows import Generated, Predictions, Row, kept, kept_rows
from conrec.evaluation.systems import ABLATION, AFTER, BEFORE, COUNTED, FULL, NAMES, ablations, changed, rivals
from conrec.evaluation.tuning import Trial, TrialResult
from conrec.feedback.events import LIKED, REJECTED, Events
from conrec.stages.artefacts import Artefacts
from conrec.stages.systems import SystemSpec, systems
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
    found = {one.name: differences(base, one.settings) for one in rivals(base)}
    next_only = {"supervised.alignment_epochs": 0, "supervised.warmup_target": "next_negative", "grpo.stages": []}
    # Two fifths of the 15 passes: each reads a history once a rejection.
    next_only["supervised.warmup_epochs"] = 6
    assert found["LC-Rec, negatives only"] == next_only | {"supervised.warmup_blocks": ["negatives"]}
    assert found["LC-Rec, negatives and positives"] == next_only
    assert found["next-negative warm-up only"] == next_only | {"supervised.translation_epochs": 0}
    (stage,) = found["S-DPO instead of GRPO"].pop("grpo.stages")
    # Its weights stand whatever they lose.
    assert found["S-DPO instead of GRPO"] == {"grpo.tolerance": 1}
    # As many steps as GRPO has over all stages, on the whole history.
    assert stage["objective"] == "s_dpo" and stage["steps"] == 42
    assert stage["blocks"] == ["negatives", "positives"]


def test_ablations_lead_to_the_method_one_step_after_the_other(base: Config) -> None:
    found = {one.name: differences(base, one.settings) for one in ablations(base)}
    assert found == {
        "translation and warm-up": {"supervised.alignment_epochs": 0, "grpo.stages": []},
        "+ progressive context": {"grpo.targets": "next_negative", "grpo.gamma": 0},
        "+ future-negative reward": {"grpo.gamma": 0},
    }
    # Every row of the ablation is one that somebody makes, and each is named once.
    rows = [id for id, _ in ABLATION]
    assert {NAMES[id] for id in rows} == {*found, *(NAMES[id] for id in (BEFORE, AFTER, FULL, COUNTED))}
    assert len(rows) == len(set(rows)) and len(set(NAMES.values())) == len(NAMES)
    assert ABLATION[0][1] is None and all(step for _, step in ABLATION[1:])


def test_without_grpo_s_dpo_still_is_a_system(base: Config) -> None:
    (other,) = (one for one in rivals(changed(base, grpo={"stages": ()})) if one.id == "s_dpo")
    assert [stage.steps for stage in other.settings.grpo.stages] == [1]


def test_every_row_has_an_artefact_of_its_own_and_shares_training_where_it_can(base: Config) -> None:
    everything = systems(Artefacts(changed(base, evaluation={"systems": "all"})))
    assert [spec.group for spec in everything[:1]] == ["floor"]
    assert [spec.id for spec in everything[-2:]] == [BEFORE, AFTER]
    # The full method and what it is without a policy are scores over the row of the policy, not rows.
    assert not {FULL, COUNTED} & {spec.id for spec in everything}
    assert len({spec.id for spec in everything}) == len({spec.name for spec in everything}) == len(everything)
    assert len({spec.artefact.version for spec in everything}) == len(everything)
    assert [spec.id for spec in systems(Artefacts(base))] == ["floors", BEFORE, AFTER]
    # The few rows are the same rows, read and not made again.
    whole = {spec.id: spec.artefact.version for spec in everything}
    assert all(whole[spec.id] == spec.artefact.version for spec in systems(Artefacts(base)))
    variants = [*rivals(base), *ablations(base)]
    supervised = {one.name: Artefacts(one.settings)["supervised"].version for one in variants}
    shared = {name for name, version in supervised.items() if version == Artefacts(base)["supervised"].version}
    assert shared == {"S-DPO instead of GRPO", "+ progressive context", "+ future-negative reward"}
    trained = [Artefacts(one.settings)["policy"].version for one in variants]
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
    other = {spec.id: spec.artefact.version for spec in systems(Artefacts(Config.model_validate(document)))}
    assert not {spec.artefact.version for spec in systems(Artefacts(base))} & set(other.values())


# Rows


def predictions(seed: int = 0) -> Predictions:
    random = np.random.default_rng(seed)
    return Predictions(
        random.integers(-1, 90, (7, 5)).astype(np.int32),
        np.where(random.random((7, 5)) < 0.3, -np.inf, random.random((7, 5))).astype(np.float32),
        np.where(random.random((7, 2)) < 0.5, np.nan, 1.5).astype(np.float32),
    )


def generated(judges: bool) -> Generated:
    random = np.random.default_rng(1)
    leaves, candidates = random.integers(-1, 90, (7, 3)), random.random((7, 2)).astype(np.float32)
    log_probs = random.random((7, 3)).astype(np.float32)
    return Generated(
        leaves, log_probs, candidates, *((log_probs + 1, candidates + 1, candidates + 2) if judges else ())
    )


TRIED = TrialResult(Trial(32, 1e-3), 0.25, 3, 1.5)
ROWS = {
    "lists": Row(predictions(), 1.5, 900, 2.5, trials=(TRIED,)),
    "a policy": Row(generated(True), alignment_accuracy={"warm_up": 0.5}, verdict_auc={}, stages=[{"step": 1}]),
    "a policy that never judged": Row(generated(False), note="says little"),
}


def assert_equal(found: Row, row: Row) -> None:
    assert found.figures == row.figures and type(found.answer) is type(row.answer)
    for name, values in vars(row.answer).items():
        again = getattr(found.answer, name)
        assert again is None if values is None else again.dtype == values.dtype, name
        if values is not None:
            np.testing.assert_array_equal(again, values, err_msg=name)


@pytest.mark.parametrize("name", list(ROWS))
def test_a_row_comes_back_from_its_file_as_it_was(name: str, tmp_path: Path) -> None:
    table, figures = kept({name: ROWS[name]}, name)
    storage.write_table(table, f"{tmp_path}/row.parquet")
    # In pieces, as a table of several row groups is, and through the JSON of a manifest.
    table = storage.read_table(f"{tmp_path}/row.parquet")
    pieces = pa.concat_tables([table.slice(0, 3), table.slice(3)])
    (found,) = kept_rows(pieces, json.loads(json.dumps(figures)), name).values()
    assert_equal(found, ROWS[name])


def test_what_is_nothing_to_say_is_not_said() -> None:
    assert Row(predictions()).figures == {}
    assert "verdicts" not in kept({"one": Row(generated(False))}, "one")[0].column_names


def test_floors_share_a_file_and_are_rows_of_their_own() -> None:
    rows = {name: Row(predictions(seed), users_per_second=seed) for seed, name in enumerate(("random", "most shown"))}
    table, figures = kept(rows, "floors")
    assert table.column_names[:3] == ["random/items", "random/scores", "random/candidates"]
    assert figures == {"floors": {"random": {"users_per_second": 0}, "most shown": {"users_per_second": 1}}}
    found = kept_rows(table, figures, "floors")
    assert list(found) == list(rows)
    for name, row in found.items():
        assert_equal(row, rows[name])


def test_a_row_is_made_once(base: Config) -> None:
    made = []

    def make(world: Any) -> dict[str, Row]:
        made.append(world)
        return {"mine": ROWS["lists"]}

    (floors, *_) = systems(Artefacts(base))
    first = SystemSpec("mine", "floor", floors.artefact, make).rows("the world")  # type: ignore[arg-type]
    again = SystemSpec("mine", "floor", floors.artefact, make).rows("another")  # type: ignore[arg-type]
    assert made == ["the world"]
    for rows in (first, again):
        assert list(rows) == ["mine"]
        assert_equal(rows["mine"], ROWS["lists"])


@pytest.mark.parametrize(
    ("accepted", "note"),
    [
        ([False, False], "no stage was kept: this is the policy before GRPO"),
        ([True, False], "not kept of its stages: all"),
        ([True, True], None),
        ([], None),
    ],
)
def test_a_row_says_which_stages_of_its_policy_were_not_kept(base: Config, accepted: list[bool], note: Any) -> None:
    made = Artefacts(changed(base, evaluation={"systems": "all"}))
    stages = [
        {"phase": stage["name"], "stage_accepted": one} for stage, one in zip((RECENT, ALL), accepted, strict=False)
    ]
    figures = {"training_seconds": {"supervised": 3.0, "grpo": 2.0}, "stages": stages}
    for run in (made, made.of(next(one.settings for one in ablations(made.config) if one.id == "next_reward"))):
        run["policy"].finish(figures, 5.0)
    specs = {spec.id: spec for spec in systems(made)}
    for id, own in ((BEFORE, None), (AFTER, note), ("next_reward", note)):
        made_here = replace(specs[id], make=lambda world, id=id: {id: ROWS["a policy"]})
        assert made_here.rows(None)[id].note == own, id  # type: ignore[arg-type]


def test_a_row_whose_making_was_cut_short_is_made_again(base: Config) -> None:
    def fail(world: Any) -> dict[str, Row]:
        raise RuntimeError("killed")

    (floors, *_) = systems(Artefacts(base))
    with pytest.raises(RuntimeError):
        SystemSpec("mine", "floor", floors.artefact, fail).rows(None)  # type: ignore[arg-type]
    assert floors.artefact.read() is None
    rows = SystemSpec("mine", "floor", floors.artefact, lambda world: {"mine": ROWS["lists"]}).rows(None)  # type: ignore[arg-type]
    assert_equal(rows["mine"], ROWS["lists"])
