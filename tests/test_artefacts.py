"""What decides an artefact: every setting in turn, the same bytes elsewhere, a log that goes on, items that come."""

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from conrec import storage
from conrec.config import Config
from conrec.stages.artefacts import (
    ARTEFACTS,
    DECIDES_NOTHING,
    FIXED,
    Artefacts,
    closure,
    differences,
    finished,
    leaves,
    settings_of,
)

CUT = datetime(2024, 1, 10, tzinfo=UTC)
STAGE = {"name": "all", "blocks": ["negatives"], "steps": 2, "beta": 0.1}
EVENTS = [
    ("ann", "a", -3.0, 1),
    ("ann", "b", -2.0, 5),
    ("bob", "a", -1.0, 1),
    ("bob", "c", 1.0, 1),
    ("ann", "c", 8.5, 5),
]
"""User, item, days after the cut, stars."""


def log(*events: tuple[str, str, float, int]) -> pa.Table:
    users, items, days, stars = (list(column) for column in zip(*events, strict=True))
    times = pa.array([CUT + timedelta(days=day) for day in days], pa.timestamp("us", "UTC"))
    said = [{1: "negative", 5: "positive"}.get(star, "neutral") for star in stars]
    return pa.table(
        {
            "user_id": users,
            "item_id": items,
            "other_id": items[::-1],
            "timestamp": times,
            "feedback": said,
            "stars": stars,
        }
    )


def catalogue(*items: str) -> pa.Table:
    texts = [f"the item {item}" for item in items]
    return pa.table({"item_id": list(items), "text": texts, "name": [text.upper() for text in texts]})


@pytest.fixture
def world(tmp_path: Path):
    """Settings of a tiny world, some of their sections replaced."""
    parquet.write_table(log(*EVENTS), tmp_path / "log.parquet")
    parquet.write_table(catalogue("a", "b", "c"), tmp_path / "items.parquet")

    def settings(**sections: Any) -> Config:
        base = {
            "root": str(tmp_path / "root"),
            "interactions": {"path": str(tmp_path / "log.parquet"), "now": CUT + timedelta(days=30)},
            "items": {"path": str(tmp_path / "items.parquet")},
            "timeline": {"cut": CUT, "horizon_days": 1.0},
            "embedding": {"sources": ["text", "behaviour"]},
            "grpo": {"stages": [STAGE]},
        }
        for name, values in sections.items():
            base[name] = base[name] | values if name in base and isinstance(values, dict) else values
        return Config.model_validate(base)

    return settings


def versions(config: Config) -> dict[str, str]:
    run = Artefacts(config)
    return {name: run[name].version for name in ARTEFACTS}


# Every setting in turn


PRETRAINED = "HuggingFaceTB/SmolLM2-135M"
BY_HAND: dict[str, Any] = {
    "interactions.columns": {"item_id": "other_id"},
    "interactions.rules": [{"feedback": "negative", "when": "stars >= 5"}],
    "interactions.max_future_share": None,
    "items.columns": {"text": "name"},
    "timeline.cut": CUT - timedelta(days=1.5),
    "embedding.sources": ["text"],
    "embedding.weights": [1.0, 0.5],
    "embedding.text": "category",
    "quantizer.hidden": [64],
    "model.name_or_path": PRETRAINED,
    "model.heads": 2,
    "nightly.deadline": "05:00Z",
    "nightly.on_failure": ["page", "me"],
    "lora": {"rank": 4},
    "supervised.warmup_blocks": ["negatives"],
    "grpo.stages": [STAGE | {"steps": 3}],
    "interactions.now": CUT + timedelta(days=20),
    "generate.node_resource": "spot",
    "train.node_resource": "spot",
    "policy.version": "0123456789ab",
    "calibration.strata": [7],
}
"""Settings whose other value is not found by trying."""


def place(model: Any, path: str) -> Any:
    """The field of a setting."""
    *sections, last = path.split(".")
    for section in sections:
        annotation = model.model_fields[section].annotation
        model = next(kind for kind in (annotation, *get_args(annotation)) if hasattr(kind, "model_fields"))
    return model.model_fields[last]


def others(path: str, value: Any) -> list[Any]:
    """Values to try instead of one."""
    if path in BY_HAND:
        return [BY_HAND[path]]
    options = [option for option in get_args(place(Config, path).annotation) if isinstance(option, str)]
    if options:
        return [option for option in options if option != value]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value * 2, value - 1]
    if isinstance(value, float):
        return [value * 0.9, value + 0.1] if value else [0.1]
    return [7, 0.5, f"{value}x"]


def changed(config: Config, path: str) -> Config:
    """The settings with another value in one place."""
    document = config.model_dump(mode="json")
    for other in others(path, leaves(document).get(path)):
        again = config.model_dump(mode="json")
        *sections, last = path.split(".")
        inner = again
        for section in sections:
            inner = inner[section]
        inner[last] = other
        if path == "lora":
            again["model"]["name_or_path"] = PRETRAINED
        try:
            return Config.model_validate(again)
        except ValueError:
            continue
    raise AssertionError(f"no other value of {path} is valid; name one in BY_HAND")


def every_setting() -> list[str]:
    minimal = {"root": "r", "interactions": {"path": "i"}, "items": {"path": "i"}, "timeline": {"cut": CUT}}
    return sorted(leaves(Config.model_validate(minimal).model_dump(mode="json")))


PLACES = ("root", "interactions.path", "items.path")


@pytest.mark.parametrize("path", [path for path in every_setting() if path not in PLACES])
def test_a_setting_changes_a_version_or_is_said_to_decide_nothing(world, path):
    if path == "interactions.max_future_share":
        # Decides by what it leaves out: an event of the day after tomorrow.
        base = world(interactions={"now": CUT + timedelta(days=8), "max_future_share": 0.5})
        other = world(interactions={"now": CUT + timedelta(days=9), "max_future_share": 0.5})
        assert versions(base)["nightly"] != versions(other)["nightly"]
        return
    base = world()
    if path == "lora":
        base = world(model={"name_or_path": PRETRAINED})
    before, after = versions(base), versions(changed(base, path))
    nothing = any(path == name or path.startswith(f"{name}.") for name in DECIDES_NOTHING)
    assert (before == after) == nothing, {name: (before[name], after[name]) for name in before}


def test_a_setting_that_is_gone_stays_in_the_versions_with_the_value_that_is_left_of_it(world):
    assert not FIXED.keys() & set(every_setting())
    recorded = leaves(settings_of(world(model={"name_or_path": PRETRAINED}, lora={}), closure("policy")))
    assert {path: recorded[path] for path in FIXED} == FIXED
    # No section, no setting of it.
    assert "lora.dropout" not in leaves(settings_of(world(), closure("policy")))


def test_what_decides_nothing_exists():
    known = every_setting()
    for name in DECIDES_NOTHING:
        assert any(path == name or path.startswith(f"{name}.") for path in known), name


@pytest.mark.parametrize(
    ("path", "untouched"),
    [
        ("calibration.alpha", {"catalogue", "supervised", "validated", "policy", "system"}),
        ("calibration.strata", {"catalogue", "supervised", "validated", "policy", "system"}),
        ("score.reach", {"catalogue", "supervised", "validated", "policy", "system"}),
        ("guardrails.protect_days", {"catalogue", "supervised", "validated", "policy", "system"}),
        ("guardrails.min_history", {"catalogue", "supervised", "validated", "policy"}),
        ("generate.max_users", set(ARTEFACTS) - {"nightly", "evaluation"}),
        ("grpo.gamma", {"catalogue", "supervised", "system"}),
        ("supervised.warmup_epochs", {"catalogue", "system"}),
        ("quantizer.codes", set()),
    ],
)
def test_a_setting_changes_what_it_decides_and_nothing_else(world, path, untouched):
    before, after = versions(world()), versions(changed(world(), path))
    assert {name for name in before if before[name] == after[name]} == untouched


# A path is not content


def test_the_same_bytes_elsewhere_are_the_same_inputs(world, tmp_path, monkeypatch):
    before = versions(world())
    dated = tmp_path / "2024-02-02"
    dated.mkdir()
    shutil.copy(tmp_path / "log.parquet", dated / "part-0.parquet")
    shutil.copy(tmp_path / "items.parquet", dated / "items.pq.parquet")
    monkeypatch.chdir(tmp_path)
    for log_path, items_path in (
        ("log.parquet", "items.parquet"),
        ("2024-02-02/part-0.parquet", f"file://{dated}/items.pq.parquet"),
    ):
        moved = world(interactions={"path": log_path}, items={"path": items_path}, root="another/root")
        assert versions(moved) == before


def test_weights_in_a_folder_count_by_their_bytes(world, tmp_path):
    for name, weights in (("one", b"w1"), ("copy", b"w1"), ("other", b"w2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(weights)
    one, copy, other = (
        versions(world(model={"name_or_path": str(tmp_path / name)})) for name in ("one", "copy", "other")
    )
    assert one == copy and one["policy"] != other["policy"]


# What training read


def test_what_comes_after_the_cut_leaves_what_is_trained(world, tmp_path):
    before = versions(world())
    parquet.write_table(log(*EVENTS, ("cleo", "b", 8.7, 1)), tmp_path / "log.parquet")
    after = versions(world())
    # The window of the evaluation that was not whole is not whole now either.
    assert {name for name in before if before[name] != after[name]} == {"nightly"}
    parquet.write_table(log(*EVENTS, ("cleo", "b", 9.5, 1)), tmp_path / "log.parquet")
    later = versions(world())
    assert {name for name in before if before[name] != later[name]} == {"nightly", "evaluation", "system"}
    parquet.write_table(log(*EVENTS, ("cleo", "b", -0.5, 1)), tmp_path / "log.parquet")
    assert all(before[name] != version for name, version in versions(world()).items())


def finish_catalogue(config: Config) -> str:
    """The catalogue, and the earlier one that training makes after it."""
    run = Artefacts(config)
    for one in (run, run.earlier):
        artefact = one["catalogue"]
        if artefact.read() is None:
            items = storage.read_table(config.items.path)
            column = pa.array([[0, 1]] * len(items), pa.list_(pa.int32()))
            storage.write_table(items.append_column("semantic_id", column), artefact.path("items.parquet"))
            artefact.finish({"read_until": one.config.timeline.cut.isoformat()}, 0.0)
    return run["catalogue"].version


def test_items_that_come_and_go_leave_the_catalogue_and_what_is_trained(world, tmp_path):
    fitted = finish_catalogue(world())
    before = versions(world())
    parquet.write_table(catalogue("b", "c", "d"), tmp_path / "items.parquet")
    after = versions(world())
    assert after["catalogue"] == fitted
    assert {name for name in before if before[name] != after[name]} == {"nightly"}
    assert Artefacts(world()).exact("catalogue").version != fitted, "--refit fits another"
    # An item that somebody met before the cut is one that training reads, once it is described.
    parquet.write_table(log(*EVENTS, ("cleo", "d", -0.5, 1)), tmp_path / "log.parquet")
    without = versions(world())
    parquet.write_table(catalogue("b", "c"), tmp_path / "items.parquet")
    assert versions(world())["policy"] != without["policy"]


def test_a_catalogue_that_read_behaviour_after_the_cut_is_not_taken(world):
    fitted = finish_catalogue(world())
    assert versions(world(timeline={"cut": CUT + timedelta(days=1)}))["catalogue"] == fitted
    assert versions(world(timeline={"cut": CUT - timedelta(days=1.5)}))["catalogue"] != fitted


def test_the_catalogue_of_the_validation_time_stands_for_no_later_one(world):
    """It is finished last of all: training makes it."""
    fitted, before = finish_catalogue(world()), versions(world())
    run = Artefacts(world())
    assert run.earlier["catalogue"].version != fitted == run["catalogue"].version
    earlier = storage.read_json(run.earlier["catalogue"].path("artefact.json"))
    storage.write_json(
        run.earlier["catalogue"].path("artefact.json"),
        earlier | {"finished_at": datetime(2999, 1, 1, tzinfo=UTC).isoformat()},
    )
    assert versions(world()) == before
    # A later cut has both, and takes them until somebody fits another.
    later = Artefacts(world(timeline={"cut": CUT + timedelta(days=5)}))
    assert later["catalogue"].version == later.earlier["catalogue"].version == fitted


def test_other_settings_over_the_same_catalogue_have_the_same_earlier_one(world, tmp_path):
    finish_catalogue(world())
    run = Artefacts(world())
    taken = Artefacts(world(), taken={"earlier catalogue": run["catalogue"]})
    variant = world(grpo={"gamma": 0.1})
    assert taken.of(variant)["validated"].inputs["earlier catalogue"] == run["catalogue"].version
    moved = world(timeline={"validation_days": 1.0})
    assert taken.of(moved).earlier["catalogue"].version == Artefacts(moved).earlier["catalogue"].version


def test_what_lies_between_validation_time_and_cut_changes_what_is_decided_there_and_nothing_before(world, tmp_path):
    """For no user: not the catalogue, not the supervised policy that the accepted stages start from."""
    finish_catalogue(world())

    def found() -> dict[str, str]:
        run = Artefacts(world())
        return {f"earlier {name}": run.earlier[name].version for name in ("catalogue", "supervised")} | versions(
            world()
        )

    before = found()
    for user in ("ann", "bob", "cleo"):
        parquet.write_table(log(*EVENTS, (user, "b", -1.99, 1)), tmp_path / "log.parquet")
        same = {name for name, version in found().items() if version == before[name]}
        assert same == {"earlier catalogue", "earlier supervised", "catalogue"}
    parquet.write_table(log(*EVENTS, ("cleo", "b", -2.0, 1)), tmp_path / "log.parquet")
    assert found()["earlier supervised"] != before["earlier supervised"]


def test_differences_name_the_setting_and_both_values(world):
    recorded = settings_of(world(), ("prompt", "timeline"))
    wanted = settings_of(world(prompt={"max_events": 30}), ("prompt", "timeline"))
    assert differences(recorded, wanted) == ["prompt.max_events: 48 -> 30"]
    assert differences(recorded, recorded) == []
    # An older release did not have a setting: it had its default.
    del recorded["prompt"]["max_events"]
    assert differences(recorded, settings_of(world(), ("prompt", "timeline"))) == []
    assert differences(recorded, wanted) == ["prompt.max_events: 48 -> 30"]


def test_without_a_refit_the_policy_is_the_training_until_the_validation_time(world):
    twice, once = Artefacts(world()), Artefacts(world(timeline={"refit": False}))
    assert once["catalogue"].version == once.earlier["catalogue"].version == twice.earlier["catalogue"].version
    assert once["policy"].inputs == {"validated": once["validated"].version, "catalogue": once["catalogue"].version}
    # It is the same work, whatever is trained after it.
    assert once["validated"].version == twice["validated"].version
    # Without stages nothing is decided, and the twin is the policy all the same.
    assert "validated" in Artefacts(world(timeline={"refit": False}, grpo={"stages": []}))["policy"].inputs


def test_of_two_that_finish_in_one_second_the_later_is_the_newest(world):
    first, second = (Artefacts(world(seed=seed))["nightly"] for seed in (2, 1))
    for artefact in (first, second):
        artefact.finish({}, 0.0)
    assert [one.version for one, _ in finished(world().root, "nightly")] == [second.version, first.version]
