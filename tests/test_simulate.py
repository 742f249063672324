"""Nights in a row: what each sees, what is judged, and three of them through the real command, two after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from worlds import tiny_config

from conrec import storage
from conrec.config import Config, InteractionSettings, load_settings
from conrec.errors import ArtefactError, DataError
from conrec.feedback.labels import read_interactions, read_items
from conrec.policy.model import build_model, save_checkpoint
from conrec.serving.reader import BlocklistReader
from conrec.settings_text import to_toml
from conrec.stages.artefacts import Artefacts
from conrec.stages.new_items import load_catalogue
from conrec.stages.policies import serving
from conrec.stages.run import run_stage
from conrec.stages.simulate import apart, items_at, new_pairs, night_times, snapshot, whole_log
from conrec.stages.train import write_rows
from conrec.tables import INTERACTIONS

HOME = Path(__file__).parents[1]
CUT = datetime(2026, 1, 1, tzinfo=UTC)


def log(*rows: tuple[str, str, float, str]) -> pa.Table:
    users, items, days, kinds = zip(*rows, strict=True)
    return pa.table([users, items, [CUT + timedelta(days=day) for day in days], kinds], INTERACTIONS)


def moment(day: float) -> int:
    return round((CUT + timedelta(days=day)).timestamp() * 1e6)


def test_the_nights_end_a_day_before_the_log_and_do_not_begin_before_the_cut():
    config = tiny_config(timeline={"cut": CUT})
    events = log(("u", "a", -5, "negative"), ("u", "b", 3.5, "negative"))
    assert night_times(events, 3, config) == [moment(0.5), moment(1.5), moment(2.5)]
    with pytest.raises(DataError, match="ask for at most 3"):
        night_times(events, 4, config)


def test_of_the_log_only_our_columns_are_held_and_others_may_differ_from_file_to_file(tmp_path):
    events = log(("u", "a", -1, "positive"), ("v", "b", 1, "negative"))
    for name, rows, other in (("a", events.slice(0, 1), ["x"]), ("b", events.slice(1), [3])):
        storage.write_table(rows.append_column("other", pa.array(other)), f"{tmp_path}/log/{name}.parquet")
    assert whole_log(InteractionSettings(path=f"{tmp_path}/log")).to_pylist() == events.to_pylist()
    storage.write_table(events.slice(0, 0), f"{tmp_path}/none.parquet")
    with pytest.raises(DataError, match=r"none\.parquet: the table has no rows"):
        whole_log(InteractionSettings(path=f"{tmp_path}/none.parquet"))


def test_items_come_with_their_first_event_and_go_after_their_last():
    events = log(
        ("u", "always", -9, "neutral"),
        ("u", "always", 9, "neutral"),
        ("u", "before", -9, "neutral"),
        ("u", "ends", -1, "neutral"),
        ("u", "new", 1.5, "neutral"),
        ("u", "new", 9, "neutral"),
    )
    items = pa.table({"item_id": ["always", "before", "ends", "never met", "new"]})

    def there(day: float) -> list[str]:
        return items_at(items, events, moment(0), moment(day))["item_id"].to_pylist()

    assert there(0) == ["always", "before", "ends", "never met"]
    assert there(1.5) == ["always", "before", "ends", "never met", "new"]
    assert there(2.5) == ["always", "before", "never met", "new"]


def test_judged_are_the_new_pairs_of_the_day_after_of_the_users_that_were_served():
    events = log(
        ("u", "a", -1, "positive"),
        ("u", "a", 0.5, "negative"),  # met before
        ("u", "b", 0.5, "negative"),
        ("u", "b", 0.6, "negative"),  # once
        ("u", "c", 0.7, "positive"),
        ("u", "d", 1.5, "negative"),  # the day after the day after
        ("v", "b", 0.5, "negative"),  # not served
        ("u", "e", 0.0, "negative"),  # known to the night
        ("u", "f", 0.2, "negative"),  # and then liked: once, as liked
        ("u", "f", 0.8, "positive"),
        ("u", "g", 0.3, "neutral"),  # and then rejected
        ("u", "g", 0.4, "negative"),
        ("w", "a", 1.0, "positive"),
    )
    pairs = new_pairs(events, moment(0), pa.array(["u", "w", "nobody"]))
    assert sorted(tuple(row.values()) for row in pairs.to_pylist()) == [
        ("u", "b", "negative"),
        ("u", "c", "positive"),
        ("u", "f", "positive"),
        ("u", "g", "negative"),
        ("w", "a", "positive"),
    ]
    assert len(new_pairs(events, moment(0), pa.array([], pa.string()))) == 0


# Three nights through the real command


@pytest.fixture
def world(tmp_path: Path):
    """Settings of a log of eight days after the cut, with items that come and go, and an untrained policy."""
    random = np.random.default_rng(0)
    rows = []
    for user in range(40):
        for day in np.sort(random.uniform(-10, 3.2, 30)):
            kind = str(random.choice(["negative", "positive", "neutral"]))
            # Four new items a day from the cut on, one that nobody meets any more.
            item = f"i{random.integers(1 if day < -2.5 else 2, 20 + int(4 * max(0.0, day))):02}"
            rows.append((f"u{user:02}", item, float(day), kind))
    events = log(*rows)
    storage.write_table(events, str(tmp_path / "log.parquet"))
    names = pc.unique(events["item_id"]).sort()
    vectors = random.normal(size=(len(names), 4)).astype(np.float32)
    items = pa.table({"item_id": names, "text": pc.binary_join_element_wise("item", names, " ")})
    items = items.append_column("embedding", pa.array(list(vectors), pa.list_(pa.float32())))
    storage.write_table(items, str(tmp_path / "items.parquet"))
    config = tiny_config(
        root=str(tmp_path / "root"),
        interactions={"path": str(tmp_path / "log.parquet")},
        items={"path": str(tmp_path / "items.parquet")},
        timeline={"cut": CUT, "validation_share": 0.5, "min_history": 2},
        embedding={"sources": ["column"]},
        quantizer={"levels": 2, "codes": 6},
        grpo={"stages": []},
        generate={"engine": "torch", "beam_width": 8, "batch_size": 4},
        # A policy that has learnt nothing: whatever it says is predicted.
        calibration={"alpha": 0.9, "strata": []},
        guardrails={"max_user_share": 1.0, "max_catalogue_share": 1.0},
        publish={"buckets": 2, "holdout_share": 0.0},
    )
    first = night_times(events, 3, config)[0]
    tonight = snapshot(apart(config, events, items, first), events, items_at(items, events, first, first), first)
    run_stage("catalogue", tonight)
    save_untrained(tonight)
    file = tmp_path / "settings.toml"
    file.write_text(to_toml(config))
    return config, file


def save_untrained(config: Config) -> None:
    """A policy before its training, as the train stage leaves one."""
    model, tokenizer, _ = build_model(config, load_catalogue(Artefacts(config)).items["text"].to_pylist())
    for name in ("validated", "policy"):
        artefact = Artefacts(config)[name]
        save_checkpoint(model, tokenizer, Path(artefact.path("checkpoint")))
        write_rows([], artefact)
        artefact.finish({"training_seconds": {}, "stages": []}, 0.0)


def first_night(config: Config, nights: int) -> tuple[Config, pa.Table]:
    """The settings of the first of so many nights, and the items that its catalogue was fitted on."""
    events, items = storage.read_table(config.interactions.path), storage.read_table(config.items.path)
    first = night_times(events, nights, config)[0]
    there = items_at(items, events, first, first)
    tonight = snapshot(apart(config, events, items, first), events, there, first)
    fitted = storage.read_table(run_stage("catalogue", tonight).path("items.parquet"))
    assert fitted["item_id"].to_pylist() == there["item_id"].to_pylist()
    return tonight, fitted


def test_nights_that_begin_earlier_know_nothing_of_those_that_were_replayed_before(world, tmp_path):
    config = world[0].model_copy(update={"root": str(tmp_path / "another")})
    later, many = first_night(config, 1)
    save_untrained(later)
    earlier, few = first_night(config, 3)
    assert len(few) < len(many)
    with pytest.raises(ArtefactError, match="no policy is finished"):
        serving(Artefacts(earlier))
    assert first_night(config, 1)[0].root == later.root, "run again, they go on"


def test_what_decides_the_nights_decides_their_folder_and_a_pinned_policy_of_the_root_is_not_theirs(world):
    config = load_settings(world[1])
    events, items = read_interactions(config.interactions), read_items(config.items)
    first = night_times(events, 3, config)[0]
    same = apart(config, events, items, first)
    assert Path(same.root, "policy").exists(), "where the fixture left one"

    def other(**sections: Any) -> Config:
        document = config.model_dump()
        for name, values in sections.items():
            document[name] |= values
        return apart(Config.model_validate(document), events, items, first)

    assert other(publish={"min_overlap": 0.5}).root == same.root
    assert other(guardrails={"max_items_per_user": 3}).root != same.root
    assert apart(config, events.slice(1), items, first).root != same.root
    pinned = other(policy={"version": "0123456789ab"})
    assert pinned.root == same.root and pinned.policy.version is None


def start(file: Path, root: str, environment: dict[str, str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "conrec.cli", "simulate", "--config", str(file), "--nights", "3"]
    return subprocess.Popen(
        [*command, "--set", f"root={root}"],
        cwd=HOME,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def kill_in_night(number: int, process: subprocess.Popen, root: str) -> None:
    """SIGKILL once so many nights are published and the next one has begun to generate."""
    until = time.monotonic() + 300
    while time.monotonic() < until:
        assert process.poll() is None, process.stdout.read()
        published = len(list(Path(root).glob("simulation/*/blocklists/versions/*/manifest.json")))
        begun = len(list(Path(root).glob("simulation/*/nightly/*/prompts.json")))
        if published >= number and begun > number:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return
        time.sleep(0.05)
    raise AssertionError("the night did not begin")


def finished(process: subprocess.Popen, root: str) -> tuple[list[dict[str, Any]], str]:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return json.loads((Path(root) / "simulation" / "nights.json").read_text()), said


@pytest.mark.ray
def test_three_nights_two_of_them_after_a_kill(world, ray_head):
    config, file = world
    for number in (0, 1):
        kill_in_night(number, start(file, config.root, ray_head.environment), config.root)
    nights, said = finished(start(file, config.root, ray_head.environment), config.root)
    assert [night["night"][:10] for night in nights] == ["2026-01-01", "2026-01-02", "2026-01-03"]
    for before, night in zip(nights, nights[1:], strict=False):
        assert night["new_items"] > before["new_items"] and night["version"] != before["version"]
        assert 0 <= night["overlap"] <= 1
    assert nights[0]["new_items"] == 0 and nights[0]["overlap"] is None
    assert nights[-1]["removed_items"] > 0
    for night in nights:
        assert night["predicted"] > 0 and night["rejected"] > 0 and 0 < night["catch"] <= 1
        assert f"{night['catch']:.3f}/{night['rejected']}".lstrip("0") in said
    policies = list(Path(config.root).glob("simulation/*/policy/*"))
    assert len(policies) == 1, "no night trains"
    # The last night's list is what readers have, and it blocks an item that no earlier night knew.
    (published,) = Path(config.root).glob("simulation/*/blocklists")
    reader = BlocklistReader(str(published), clock=lambda: CUT + timedelta(days=2.3))
    assert reader.version == nights[-1]["version"]
    fitted = storage.read_table(next(Path(config.root).glob("simulation/*/catalogue/*/items.parquet")).as_posix())
    blocked = {row.item_id for user in range(40) for row in reader.blocklist(f"u{user:02}")}
    assert blocked - set(fitted["item_id"].to_pylist())
    assert "i01" not in blocked
