"""What a person reads at the end of a run: first what the lists do, then users, then the figures."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conrec import storage
from conrec.config import Config
from conrec.stages import summary


def published(**figures: float | None) -> dict[str, Any]:
    lists = {name: {"value": value, "low": None, "high": None} for name, value in figures.items()}
    return {"alpha": 0.05, "systems": {"other": {}, "ours": {"at_alpha": {"0.05": lists}}}, "against": {"other": {}}}


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
    inputs: dict[str, Any] = {"root": str(tmp_path), "interactions": {"path": "none"}, "items": {"path": "none"}}
    config = Config.model_validate(inputs | {"timeline": {"cut": "2026-01-01T00:00:00Z"}})
    summary.print_summary(config, "my.toml", dict.fromkeys(("evaluate", "nightly", "train"), artefact))
    said = capsys.readouterr().out
    parts = ("published: alpha .05, catch .200", "user ann", "Evaluation at 2026-01-01", "Tonight", "blocklists")
    places = [said.index(part) for part in parts]
    assert places == sorted(places)
    assert said.lstrip().startswith("published:")
