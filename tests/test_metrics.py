"""What programs read: Prometheus text, the alerts on it, and the answers of commands as JSON."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from conrec import cli, storage
from conrec.artefact import plan
from conrec.config import load_settings
from conrec.errors import ArtefactError
from conrec.serving import versions
from conrec.stages.metrics import prometheus_text
from conrec.store import pointers
from conrec.store.metrics import HELP
from conrec.store.publish import Block, write_version
from conrec.tables import BLOCKLIST, RULES

DOCS = Path(__file__).parents[1] / "docs"
UNTIL = 3_786_912_000_000_000


def rows(*items):
    """Rows of ann; the first item is rejected, the others are predicted."""
    values = {"user_id": "ann", "similarity": 1.0, "score": 1.0, "semantic_id": None}
    values |= {"demotes_at": UNTIL, "expires_at": UNTIL}
    columns = {name: [value] * len(items) for name, value in values.items()}
    columns |= {"item_id": list(items), "reason": ["explicit", *["predicted"] * (len(items) - 1)]}
    return pa.table([pa.array(columns[field.name]).cast(field.type) for field in BLOCKLIST], schema=BLOCKLIST)


@pytest.fixture
def settings(tmp_path):
    """Two versions, the second in serving and the first beside it, of one night and policy."""
    root = str(tmp_path / "root")
    night, policy = plan(root, "nightly", {}, {}), plan(root, "policy", {}, {})
    night.finish({"version": "v2", "generation_seconds": 12.5}, 75.5)
    policy.finish({"training_seconds": {"supervised": 500.5, "grpo": 120.0}}, 640.0)
    about = {"watermark_us": 1_767_225_600_500_000, "generated_users": 40, "failed_users": 3, "policy": policy.version}
    about |= {"settings": night.version, "held_back": [{"item_id": "x", "users": 4}]}
    about |= {"feed": {"events": 900, "negative": 300, "new_users": 12}}
    about |= {"deadline": {"behind_users": 7, "missing_users": 2}}
    about |= {"calibration": {"alpha": 0.05, "version": "0" * 12}, "trained_until": "2025-12-31T00:00:00+00:00"}
    store = storage.join(root, "blocklists")
    for version, pointer, table in (("v1", "shadow", rows("x")), ("v2", "current", rows("x", "y", "z"))):
        manifest = write_version(store, version, [Block(0, table, RULES.empty_table())], about)
        digest = pointers.create_manifest(store, version, manifest)
        pointers.swap_pointer(pointers.observe(store, pointer), version, digest)
    storage.write_json(storage.join(store, "audits", "v0.json"), {})
    file = tmp_path / "settings.toml"
    file.write_text(f"""
root = "{root}"
interactions = {{ path = "i" }}
items = {{ path = "i" }}
timeline = {{ cut = 2026-01-01T00:00:00Z }}
""")
    return file


def samples_of(text):
    """What Prometheus reads in a text: name and labels -> value."""
    families = list(text_string_to_metric_families(text))
    assert {family.type for family in families} == {"gauge"}
    samples = [sample for family in families for sample in family.samples]
    return {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}


def answer(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(list(map(str, arguments)))
    return ended.value.code, json.loads(capsys.readouterr().out)


def test_prometheus_reads_what_the_manifest_says(settings):
    config = load_settings(settings)
    manifest = versions.read_manifest(f"{config.root}/blocklists", "v2")[0]
    published_at = datetime.fromisoformat(manifest["published_at"])
    found = samples_of(prometheus_text(config, published_at + timedelta(hours=37)))

    def value(name, pointer="current", **labels):
        return found[f"conrec_{name}", frozenset({"pointer": pointer, **labels}.items())]

    assert (value("behind_users"), value("missing_users", "shadow")) == (7, 2)
    assert value("age_seconds") == 37 * 3600
    assert value("published_timestamp_seconds") == published_at.timestamp()
    assert value("watermark_timestamp_seconds") == 1_767_225_600.5
    assert value("trained_until_timestamp_seconds") == datetime(2025, 12, 31, tzinfo=UTC).timestamp()
    assert (value("users"), value("rules"), value("false_block_promise")) == (1, 0, 0.05)
    assert (value("generated_users"), value("failed_users"), value("held_back_items")) == (40, 3, 1)
    assert [value("rows", reason=reason) for reason in ("explicit", "predicted")] == [1, 2]
    assert [value("rows", "shadow", reason=reason) for reason in ("explicit", "predicted")] == [1, 0]
    assert [value("feed_day", what=what) for what in ("events", "negative", "new_users")] == [900, 300, 12]
    phases = {"nightly": 75.5, "generation": 12.5, "policy": 640.0}
    assert {phase: value("phase_seconds", phase=phase) for phase in phases} == phases
    assert found["conrec_failed_audits", frozenset()] == 1
    assert {name for name, _ in found} == set(HELP)


def test_nothing_published_and_a_damaged_pointer_are_no_text(settings, tmp_path, capsys):
    pointer = tmp_path / "root" / "blocklists" / "CURRENT.json"
    pointer.write_text("{}")
    with pytest.raises(SystemExit) as ended:
        cli.main(["metrics", "--config", str(settings)])
    assert (ended.value.code, capsys.readouterr().out) == (2, "")
    elsewhere = load_settings(settings).model_copy(update={"root": str(tmp_path / "nothing")})
    with pytest.raises(ArtefactError, match="nothing is published"):
        prometheus_text(elsewhere)


def test_alerts_are_on_metrics_that_exist_and_lead_to_a_heading(settings):
    labels = {}
    for name, told in samples_of(prometheus_text(load_settings(settings))):
        labels.setdefault(name, []).append(dict(told))
    headings = {line[3:].strip() for line in (DOCS / "operations.md").read_text().splitlines() if line[:3] == "## "}
    (group,) = yaml.safe_load((DOCS / "alerts.yml").read_text())["groups"]
    seen = set()
    for rule in group["rules"]:
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("warning", "page")
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["runbook"] in headings
        assert re.fullmatch(r"\d+[smhd]", rule.get("for", "0s"))
        for name, matchers in re.findall(r"(conrec_\w+)(?:\{(.*?)\})?", rule["expr"]):
            asked = dict(re.findall(r'(\w+)="(.*?)"', matchers))
            assert any(asked.items() <= told.items() for told in labels[name]), (rule["alert"], name, asked)
            seen.add(rule["alert"])
    assert len(seen) == len(group["rules"]) > 8


def test_versions_verify_and_diff_answer_programs(settings, tmp_path, capsys):
    code, found = answer(capsys, "versions", "--json", "--config", settings)
    assert (code, found["pointers"]) == (0, {"current": "v2", "shadow": "v1"})
    assert [one["version"] for one in found["versions"]] == ["v2", "v1"]
    assert found["versions"][0]["figures"]["predicted"] == 2
    code, found = answer(capsys, "verify", "v2", "--json", "--config", settings)
    assert (code, found["version"], found["rows"], found["files"]) == (0, "v2", 3, 2)
    code, found = answer(capsys, "diff", "v1", "v2", "--json", "--config", settings)
    assert (code, found["reasons"]["predicted"]["rows_gained"]) == (0, 2)
    code, found = answer(capsys, "diff", "v1", "v2", "--user", "ann", "--json", "--config", settings)
    assert (code, [row["item_id"] for row in found["gained"]], found["lost"]) == (0, ["y", "z"], [])
    assert datetime.fromisoformat(found["gained"][0]["expires_at"]).timestamp() == UNTIL / 1e6
    (tmp_path / "root" / "blocklists" / "versions" / "v1" / "manifest.json").write_text("{}")
    code, found = answer(capsys, "versions", "--json", "--config", settings)
    assert (code, found["pointers"]["shadow"]) == (2, "v1")
    assert len(found["damaged"]) == 2  # the version, and the pointer that names it


def test_versions_that_no_pointer_names_are_damage_for_people_and_programs(settings, tmp_path, capsys):
    for pointer in (tmp_path / "root" / "blocklists").glob("*.json"):
        pointer.unlink()
    code, found = answer(capsys, "versions", "--json", "--config", settings)
    assert code == 2 and "are gone; run conrec nightly again" in found["damaged"][0]
    assert {one["version"] for one in found["versions"]} == {"v1", "v2"}
