"""Each audit rule finds exactly the version that breaks it."""

from __future__ import annotations

import time
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from conrec import storage
from conrec.buckets import bucket_of
from conrec.catalogue.codebook import format_semantic_ids
from conrec.config import GuardrailSettings, PublishSettings, ReleaseSettings
from conrec.errors import AuditError
from conrec.parallel import as_tasks
from conrec.serving import versions
from conrec.serving.audience import in_holdout_one, released_one
from conrec.serving.rows import bucket_path
from conrec.store import pointers
from conrec.store.audit import Expected, Figures, audit, failure
from conrec.store.publish import publish, write_version

DAY = 86_400_000_000
NOW = 1_700_000_000_000_000
BUCKETS = 2
LIMITS = GuardrailSettings(
    protect_days=30, max_items_per_user=4, max_catalogue_share=0.34, max_user_share=0.5, min_negatives=1, min_history=1
)
USERS = [f"user{number}" for number in range(8)]


@pytest.fixture
def expected(world, make_events):
    """Every user rejected item00, user0 also rejected 1 and liked 2 and 3 (the like of 3 has run out)."""
    histories = {user: [(0, "rejected", 1)] for user in USERS}
    histories["user0"] += [(1, "rejected", 2), (2, "liked", 29), (3, "liked", 31)]
    histories["shy"] = [(7, "shown", 1)]
    return Expected(
        events=make_events(histories),
        item_ids=world.item_ids,
        semantic_ids=format_semantic_ids(world.trie.semantic_ids),
        watermark_us=NOW,
        input_users=100,
        guardrails=LIMITS,
        publish=PublishSettings(holdout_share=0.0),
    )


def item(user, number, reason="predicted", days=7.0):
    semantic_id = "<a_1><b_1>" if reason == "predicted" else None
    return {
        "user_id": user,
        "item_id": f"item{number:02d}",
        "reason": reason,
        "similarity": 0.9,
        "score": 0.1,
        "semantic_id": semantic_id,
        "demotes_at": NOW + round(days * DAY),
        "expires_at": NOW + round((days + (0 if reason == "explicit" else 7)) * DAY),
    }


def rule(user, semantic_id="<a_1><b_1>", days=7.0):
    return {
        "user_id": user,
        "semantic_id": semantic_id,
        "score": 0.1,
        "threshold": 0.8,
        "demotes_at": NOW + round(days * DAY),
        "expires_at": NOW + round((days + 7) * DAY),
    }


def good_items():
    rows = [item(user, 0, "explicit", 89) for user in USERS]
    return [*rows, item("user0", 1, "explicit", 88), item("user0", 3), item("user1", 5)]


def good_rules():
    return [rule(user) for user in USERS]


@pytest.fixture
def write(tmp_path, blocks_of):
    """Writes a version without auditing it and returns its draft manifest."""

    def version(items, rules, about=None, name="v1", buckets=BUCKETS, previous=None):
        figures = {"watermark_us": NOW, "generated_users": 100, "failed_users": 0, **(about or {})}
        return write_version(str(tmp_path), name, blocks_of(items, rules, buckets), figures, previous)

    return version


def rules_broken(root, manifest, expected):
    return {finding.rule for finding in audit(str(root), manifest, expected)}


def test_a_good_version_has_no_findings(tmp_path, write, expected):
    assert audit(str(tmp_path), write(good_items(), good_rules()), expected) == []


@pytest.mark.parametrize(
    ("row", "broken"),
    [
        (item("user1", 2), set()),
        (item("user0", 2), {"liked"}),
        (item("user0", 2, "explicit"), {"liked", "reason"}),
        (item("user0", 1), {"unique"}),
        (item("user1", 99), {"catalogue"}),
        (item("user1", 6) | {"semantic_id": "<a_9><b_9>"}, {"catalogue"}),
        (item("user1", 6, "explicit"), {"reason"}),
        (item("user1", 6, "boredom"), {"reason"}),
        (item("shy", 6), {"reason"}),
        (item("stranger", 6), {"reason"}),
        (item("user1", 6, days=-7), {"expiry"}),
        (item("user1", 6) | {"demotes_at": NOW + 6 * DAY}, {"expiry"}),
        (item("user1", 6, days=7.01), {"expiry"}),
        (item("user1", 6, days=-8), {"expiry"}),
    ],
)
def test_a_row_that_breaks_a_rule(tmp_path, write, expected, row, broken):
    assert rules_broken(tmp_path, write([*good_items(), row], good_rules()), expected) == broken


def test_predictions_of_users_of_whom_too_little_is_known(tmp_path, write, expected):
    """user0 met four items, user1 one."""
    limits = LIMITS.model_copy(update={"min_history": 4})
    (finding,) = audit(str(tmp_path), write(good_items(), good_rules()), replace(expected, guardrails=limits))
    assert finding.rule == "reason"
    assert "fewer than 4 items met: 1 rows, first user user1, item item05" in finding.what


@pytest.mark.parametrize(
    ("row", "broken"),
    [
        (rule("user1"), "unique"),
        (rule("user1", "<a_9><b_9>"), "catalogue"),
        (rule("user1", "<a_0><b_0>", days=8), "expiry"),
        (rule("user1", "<a_0><b_0>"), None),
    ],
)
def test_a_rule_that_breaks_a_rule(tmp_path, write, expected, row, broken):
    found = rules_broken(tmp_path, write(good_items(), [*good_rules(), row]), expected)
    assert found == ({broken} if broken else set())


def test_lists_that_are_too_long(tmp_path, write, expected):
    manifest = write([*good_items(), item("user0", 8), item("user0", 9)], good_rules())
    assert rules_broken(tmp_path, manifest, expected) == {"list length", "catalogue share"}
    wide = replace(expected, guardrails=LIMITS.model_copy(update={"max_items_per_user": 10}))
    assert rules_broken(tmp_path, manifest, wide) == {"catalogue share"}


def test_an_item_predicted_for_too_many_users(tmp_path, write, expected):
    rows = [*good_items(), *(item(user, 5) for user in USERS if user != "user1")]
    assert rules_broken(tmp_path, write(rows, good_rules(), {"generated_users": 100}), expected) == set()
    # 8 of 15, where half is the limit; 16 - 1, for one generation failed.
    few = Expected(
        **{**vars(expected), "input_users": 16, "publish": PublishSettings(max_failed_share=0.5, holdout_share=0.0)}
    )
    manifest = write(rows, good_rules(), {"generated_users": 16, "failed_users": 1})
    assert rules_broken(tmp_path, manifest, few) == {"item share"}


@pytest.mark.parametrize(
    ("about", "broken"),
    [
        ({"generated_users": 98}, {"coverage"}),
        ({"generated_users": 99}, set()),
        ({"failed_users": 1}, set()),
        ({"failed_users": 2}, {"failed"}),
        ({"watermark_us": NOW - 1}, {"figures"}),
    ],
)
def test_coverage_failures_and_watermark(tmp_path, write, expected, about, broken):
    assert rules_broken(tmp_path, write(good_items(), good_rules(), about), expected) == broken


def test_a_watermark_ahead_of_the_clock(tmp_path, write, expected):
    manifest = write(good_items(), good_rules())
    assert rules_broken(tmp_path, manifest, replace(expected, latest_us=NOW)) == set()
    findings = audit(str(tmp_path), manifest, replace(expected, latest_us=NOW - 1))
    assert [finding.rule for finding in findings] == ["clock"]
    assert "2023-11-14 22:13:20+00:00" in str(findings[0])
    assert "2023-11-14 22:13:19.999999+00:00" in str(findings[0])
    # Without a limit that somebody gave, the clock of the machine is one.
    ahead = round(time.time() * 1e6) + 60_000_000
    manifest = write(good_items(), good_rules(), {"watermark_us": ahead})
    assert "clock" in rules_broken(tmp_path, manifest, replace(expected, watermark_us=ahead))


def test_figures_that_differ_from_the_manifest(tmp_path, write, expected):
    manifest = write(good_items(), good_rules())
    manifest["figures"]["predicted"] += 1
    assert rules_broken(tmp_path, manifest, expected) == {"figures"}


def rewrite(root, manifest, shape, change):
    """Writes a changed table in place of bucket 0 and lets the manifest agree with its bytes."""
    path = bucket_path(shape, 0)
    url = storage.join(versions.version_url(str(root), "v1"), path)
    table = change(storage.read_table(url))
    storage.write_table(table, url)
    entry = next(entry for entry in manifest["files"] if entry["path"] == path)
    entry.update(bytes=storage.size(url), sha256=storage.sha256(url), rows=len(table))


@pytest.mark.parametrize("shape", ["data", "rules"])
@pytest.mark.parametrize(
    ("change", "broken"),
    [
        (lambda table: table.drop_columns(["user_id"]), "schema"),
        (lambda table: table.set_column(0, "user_id", pa.nulls(len(table), pa.string())), "schema"),
        (lambda table: table.set_column(0, "user_id", pc.binary_length(table["user_id"])), "schema"),
        (lambda table: table.sort_by([("user_id", "descending")]), "order"),
    ],
)
def test_tables_of_another_shape(tmp_path, write, expected, shape, change, broken):
    manifest = write(good_items(), good_rules())
    rewrite(tmp_path, manifest, shape, change)
    assert broken in rules_broken(tmp_path, manifest, expected)
    assert rules_broken(tmp_path, manifest, expected) <= {broken, "figures"}


def test_users_in_the_wrong_bucket(tmp_path, write, expected):
    manifest = write(good_items(), good_rules())
    for shape in ("data", "rules"):
        files = [entry for entry in manifest["files"] if entry["path"].startswith(shape)]
        urls = [storage.join(versions.version_url(str(tmp_path), "v1"), entry["path"]) for entry in files]
        first, second = (storage.read_bytes(url) for url in urls)
        storage.write_bytes(urls[0], second)
        storage.write_bytes(urls[1], first)
        for key in ("bytes", "rows", "sha256"):
            files[0][key], files[1][key] = files[1][key], files[0][key]
    assert all(entry["rows"] > 0 for entry in manifest["files"])
    # Their events lie in the other bucket.
    assert rules_broken(tmp_path, manifest, expected) == {"order", "reason"}


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "unnamed", "not in the manifest"])
def test_files_that_are_not_what_the_manifest_says(tmp_path, write, expected, damage):
    manifest = write(good_items(), good_rules())
    path = tmp_path / "versions" / "v1" / bucket_path("data", 0)
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[:-1])
    elif damage == "flipped":
        path.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
    elif damage == "unnamed":
        (path.parent / "bucket-00009.parquet").write_bytes(content)
    else:
        manifest["files"] = [entry for entry in manifest["files"] if entry["path"] != bucket_path("data", 0)]
    found = rules_broken(tmp_path, manifest, expected)
    assert "files" in found
    assert found <= {"files", "figures"}


def test_bytes_that_are_not_parquet_are_a_finding_not_a_crash(tmp_path, write, expected):
    manifest = write(good_items(), good_rules())
    path = bucket_path("rules", 1)
    url = storage.join(versions.version_url(str(tmp_path), "v1"), path)
    storage.write_bytes(url, b"PAR1 not really PAR1")
    entry = next(entry for entry in manifest["files"] if entry["path"] == path)
    entry.update(bytes=storage.size(url), sha256=storage.sha256(url))
    assert "files" in rules_broken(tmp_path, manifest, expected)


def test_figures_count_lists_over_buckets(blocks_of):
    figures = Figures()
    lists = [["a"] * 3 + ["b"], ["c"], ["d"] * 2]
    for users in lists:
        (block,) = blocks_of([item(user, number) for number, user in enumerate(users)], [], 1)
        figures.add(block.items, block.rules)
    found = figures.to_json()
    assert found["users"] == 4
    assert found["rows"] == found["predicted"] == 7
    assert found["list_length"] == {"p50": 1, "p95": 3, "max": 3}


@pytest.mark.parametrize(("holdout", "release"), [(0.0, 0.2), (0.6, 1.0)])
@pytest.mark.parametrize("shape", ["items", "rules"])
def test_predictions_outside_the_audience(tmp_path, write, expected, holdout, release, shape):
    settings = PublishSettings(holdout_share=holdout, release=ReleaseSettings(share=release))
    reached = [user for user in USERS if released_one(user, release) and not in_holdout_one(user, holdout)]
    assert reached
    assert len(reached) < len(USERS)
    about = {"audience": {"holdout_share": holdout, "release_share": release, "shadow": False}}
    own = [item(user, 0, "explicit", 89) for user in USERS]
    for users, broken in ((reached, set()), (USERS, {"audience"})):
        rows = [*own, *(item(user, 6) for user in users if shape == "items")]
        rules = [rule(user) for user in users if shape == "rules"]
        manifest = write(rows, rules, about)
        assert rules_broken(tmp_path, manifest, replace(expected, publish=settings)) == broken


@pytest.mark.parametrize("audience", [{"holdout_share": 0.5, "release_share": 1.0}, {"holdout_share": 0.0}])
def test_an_audience_other_than_the_settings_say(tmp_path, write, expected, audience):
    assert rules_broken(tmp_path, write(good_items(), good_rules(), {"audience": audience}), expected) == {"figures"}


@pytest.mark.parametrize(
    ("artefact", "made_of", "broken"),
    [
        ("policy", {"catalogue": "c1"}, set()),
        ("policy", {"catalogue": "c2"}, {"belongs"}),
        ("calibration", {"catalogue": "c1", "policy": "p1"}, set()),
        ("calibration", {"catalogue": "c2", "policy": "p1"}, {"belongs"}),
        ("calibration", {"catalogue": "c1", "policy": "p2"}, {"belongs"}),
    ],
)
def test_artefacts_of_another_catalogue_or_policy(tmp_path, write, expected, artefact, made_of, broken):
    manifest = write(good_items(), good_rules(), {"catalogue": "c1", "policy": "p1"})
    assert rules_broken(tmp_path, manifest, replace(expected, origins={artefact: made_of})) == broken


# Many users, for below a hundred rows a factor is chance: each rejected item00.
CROWD = [f"one{number}" for number in range(120)]


@pytest.fixture
def two_nights(tmp_path, write, make_events, expected):
    """rules_broken of a night after another one, each as its item rows; predictions for `CROWD`."""
    open_limits = GuardrailSettings(max_catalogue_share=1.0, min_history=1)
    events = make_events({user: [(row, "rejected", 1) for row in range(3)] for user in CROWD})

    def after(first, second, settings, buckets=BUCKETS, first_about=None, about=None, damage=False):
        manifest = write(first, [], first_about, "v0", buckets)
        pointers.create_manifest(str(tmp_path), "v0", manifest)
        if damage:
            path = tmp_path / "versions" / "v0" / bucket_path("data", 0)
            path.write_bytes(path.read_bytes()[:-1])
        manifest = write(second, [], {"generated_users": 200, **(about or {})}, previous="v0")
        held_against = replace(expected, events=events, guardrails=open_limits, publish=settings)
        return rules_broken(tmp_path, manifest, held_against)

    return after


def crowd(number, users=120, reason="predicted"):
    return [item(user, number, reason, 7 if reason == "predicted" else 89) for user in CROWD[:users]]


def both(*parts):
    return [row for part in parts for row in part]


SETTINGS = PublishSettings(holdout_share=0.0, max_size_change=1.5, min_overlap=0.5)


@pytest.mark.parametrize(
    ("first", "second", "broken"),
    [
        (crowd(5), crowd(5), set()),
        (crowd(5), both(crowd(5), crowd(6, 60)), set()),
        (crowd(5), both(crowd(5), crowd(6, 61)), {"size"}),
        (both(crowd(5), crowd(6, 60)), crowd(5), set()),
        (both(crowd(5), crowd(6, 61)), crowd(5), {"size"}),
        (crowd(5), [], {"size"}),
        ([], crowd(5), {"size"}),
        ([], crowd(5, 99), set()),
        (crowd(0, 99, "explicit"), both(crowd(0, 99, "explicit"), crowd(1, 99, "explicit")), {"size"}),
        (crowd(0, 40, "explicit"), both(crowd(0, 40, "explicit"), crowd(1, 40, "explicit")), set()),
        (crowd(5), both(crowd(5, 60), crowd(6)[60:]), set()),
        (crowd(5), both(crowd(5, 59), crowd(6)[59:]), {"overlap"}),
        (crowd(5), crowd(6), {"overlap"}),
        (crowd(5, 99), crowd(6, 99), set()),
    ],
)
@pytest.mark.parametrize("buckets", [BUCKETS, 3])
def test_size_and_overlap_against_the_version_before(two_nights, first, second, broken, buckets):
    assert two_nights(first, second, SETTINGS, buckets) == broken


@pytest.mark.parametrize(("first", "second"), [(crowd(5), []), ([], crowd(5))])
@pytest.mark.parametrize(("limit", "broken"), [(119.0, {"size"}), (120.0, set())])
def test_a_night_that_predicts_nothing_and_the_one_after_it_can_be_admitted(two_nights, first, second, limit, broken):
    assert two_nights(first, second, SETTINGS.model_copy(update={"max_size_change": limit})) == broken


def test_users_who_left_are_no_lack_of_overlap(two_nights):
    """110 of 120 users stay, with what they had."""
    assert two_nights(crowd(5), crowd(5, 110), SETTINGS) == set()


def test_a_larger_release_is_no_change_of_size(two_nights):
    canary = {"audience": {"holdout_share": 0.0, "release_share": 0.3, "shadow": False}}
    some = [row for row in both(crowd(5), crowd(6), crowd(7)) if released_one(row["user_id"], 0.3)]
    everybody = both(crowd(5), crowd(6), crowd(7))
    assert len(everybody) > 1.5 * len(some)
    assert two_nights(some, everybody, SETTINGS, first_about=canary) == set()
    # The same without the release that explains it.
    assert two_nights(some, everybody, SETTINGS) == {"size"}


def test_a_damaged_version_before_does_not_keep_a_good_one_from_readers(two_nights):
    assert two_nights(crowd(5), [], SETTINGS) == {"size"}
    assert two_nights(crowd(5), [], SETTINGS, damage=True) == set()


def test_a_failed_audit_leaves_the_pointer_and_a_report(tmp_path, blocks_of, expected):
    rows = [*good_items(), item("user0", 2), item("user1", 99)]
    about = {"watermark_us": NOW, "generated_users": 100, "failed_users": 0}
    with pytest.raises(AuditError) as refused:
        publish(str(tmp_path), "v1", blocks_of(rows, good_rules(), BUCKETS), lambda: about, expected)
    report = storage.read_json(str(tmp_path / "audits" / "v1.json"))
    assert {finding["rule"] for finding in report["findings"]} == {"liked", "catalogue"}
    assert all(finding["where"].startswith("data/bucket-") for finding in report["findings"])
    assert report["about"] == about
    assert "audits/v1.json" in str(refused.value)
    assert "item02" in str(refused.value)
    assert versions.read_pointer(str(tmp_path)) is None


def test_a_report_that_cannot_be_written_does_not_hide_the_findings(tmp_path, write, expected):
    manifest = write([*good_items(), item("user0", 2)], good_rules())
    (tmp_path / "audits").write_text("a file where the folder should be")
    error = failure(str(tmp_path), manifest, audit(str(tmp_path), manifest, expected))
    assert "liked" in str(error)
    assert "no report could be written" in str(error)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_driver")
def test_the_audit_as_tasks_finds_what_it_finds_in_one_process(tmp_path, write, expected, monkeypatch):
    """A liked item, an unknown one, a missing file, and a list that all but went since the version before; the workers
    do not start in the folder that the root is relative to."""
    monkeypatch.chdir(tmp_path)
    many = [item(user, number) for user in USERS for number in range(3, 9)] * 3
    pointers.create_manifest(str(tmp_path), "v0", write(many, good_rules(), name="v0", buckets=7))
    rows = [*good_items(), item("user0", 2), item("user3", 77)]
    manifest = write(rows, good_rules(), buckets=7, previous="v0")
    lost = min(set(range(7)) - {bucket_of("user0", 7), bucket_of("user3", 7)})
    storage.remove(storage.join(versions.version_url(str(tmp_path), "v1"), bucket_path("rules", lost)))
    found = audit(str(tmp_path), manifest, expected)
    assert {"liked", "catalogue", "files", "size"} <= {finding.rule for finding in found}
    assert audit(".", manifest, expected, as_tasks) == found
