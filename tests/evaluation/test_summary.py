"""What a person reads at the end of a run: first what the lists do, then users, then the figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from nights import NOW

from conrec import storage
from conrec.buckets import bucket_of
from conrec.config import Config
from conrec.serving.rows import bucket_path
from conrec.serving.versions import version_url
from conrec.stages import summary
from conrec.stages.inputs import blocklists_url
from conrec.tables import INTERACTIONS

BUCKETS = 4
USERS = [f"user{number:02d}" for number in range(21)]
"""Twenty with predictions, the surer the smaller their number, and one who only rejected."""


def published(**figures: float | None) -> dict[str, Any]:
    lists = {name: {"value": value, "low": None, "high": None} for name, value in figures.items()}
    return {"alpha": 0.05, "systems": {"other": {}, "ours": {"at_alpha": {"0.05": lists}}}, "against": {"other": {}}}


def settings(folder: Path) -> Config:
    inputs: dict[str, Any] = {"path": f"{folder}/inputs.parquet"}
    return Config.model_validate(
        {"root": str(folder), "interactions": inputs, "items": inputs, "timeline": {"cut": "2026-01-01T00:00:00Z"}}
    )


@pytest.fixture
def two_nights(tmp_path: Path, publish_unaudited: Callable[..., str]) -> Config:
    """`v1` blocks the item `first` for everybody; `v2`, which is served, the item `second`."""
    config = settings(tmp_path)
    about = {"settings": "night", "policy": "p", "trained_at": "2026-01-01", "trained_until": "2026-01-01"}
    for version, item in (("v1", "first"), ("v2", "second")):
        rows = [
            {
                "user_id": user,
                "item_id": item,
                "reason": "explicit" if user == USERS[-1] else "predicted",
                "similarity": 0.0,
                "score": 1 - number / 100,
                "semantic_id": None,
                "expires_at": NOW,
            }
            for number, user in enumerate(USERS)
        ]
        publish_unaudited(blocklists_url(config), rows, version=version, buckets=BUCKETS, about=about)
    names = ["first", "second"]
    items = pa.table({"item_id": names, "text": names, "semantic_id": [[0, 0], [0, 1]]})
    storage.write_table(items, f"{tmp_path}/nightly/night/items.parquet")
    storage.write_table(INTERACTIONS.empty_table(), config.interactions.path)
    return config


def shown(config: Config, version: str, capsys: pytest.CaptureFixture[str]) -> tuple[list[str], str]:
    """The users that are printed, and all that is."""
    summary._print_users(config, version)
    said = capsys.readouterr().out
    return [line.removeprefix("user ") for line in said.splitlines() if line.startswith("user ")], said


def test_a_sure_a_middling_and_an_unsure_user_are_shown_with_what_that_night_blocked(
    two_nights: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    users, said = shown(two_nights, "v1", capsys)
    assert users == ["user02", "user10", "user17"]
    assert said.count("    first  first  <- score") == 3 and "second" not in said


def test_no_bucket_is_read_beyond_those_with_enough_users(
    two_nights: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for bucket in range(1, BUCKETS):
        storage.remove(storage.join(version_url(blocklists_url(two_nights), "v1"), bucket_path("data", bucket)))
    monkeypatch.setattr(summary, "USERS_RANKED", 1)
    users, _ = shown(two_nights, "v1", capsys)
    assert users and {bucket_of(user, BUCKETS) for user in users} == {0}


def test_the_line_says_what_is_served() -> None:
    line = summary.published_line(published(catch=0.1524, false_block=0.0411, selectivity=3.708))
    assert line == "published: alpha .05, catch .152, false block .041, selectivity 3.71"
    silent = summary.published_line(published(catch=0.0, false_block=0.0, selectivity=None))
    assert silent == "published: alpha .05, catch 0, false block 0, selectivity –"


def test_lists_users_and_figures_stand_in_this_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = {
        "about": {"cut": "2026-01-01", "anchors": 7},
        "systems": {},
        "ours": "ours",
        "differences": {},
        "published": published(catch=0.2, false_block=0.1, selectivity=2.0),
    }
    storage.write_json(f"{tmp_path}/metrics.json", metrics)
    monkeypatch.setattr(summary, "_print_users", lambda *_: summary.console.print("user ann"))
    rows = {"rows": 5, "explicit": 2}
    night = {"figures": {"version": "v", "generated": 0, "kept": 0, "published": rows}}
    artefact: Any = SimpleNamespace(path=lambda name: f"{tmp_path}/{name}", require=lambda: night)
    summary.print_summary(settings(tmp_path), "my.toml", dict.fromkeys(("evaluate", "nightly", "train"), artefact))
    said = capsys.readouterr().out
    parts = ("published: alpha .05, catch .200", "user ann", "Evaluation at 2026-01-01", "Tonight", "blocklists")
    places = [said.index(part) for part in parts]
    assert places == sorted(places)
    assert said.lstrip().startswith("published:")
