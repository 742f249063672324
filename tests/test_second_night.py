"""The night after a night: who did nothing keeps what was generated, and what is published is that of a full night.

No engine of Ray's starts: a night is prepared, its users are generated here, and it goes on as after a kill.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
from test_enough_stages import EVERYTHING, printed, untrained, world

from conrec import storage
from conrec.artefact import Artefact, plan
from conrec.blocklist.anchors import Asked
from conrec.blocklist.batches import generate_batch
from conrec.blocklist.engines import TorchEngine, open_engine
from conrec.blocklist.kept import BASIS, ITEMS, OUTDATED
from conrec.blocklist.night import Lists
from conrec.config import Config
from conrec.errors import ArtefactError, AuditError, PublishError
from conrec.parallel import as_tasks
from conrec.serving.versions import read_pointer
from conrec.stages import night_prompts, show
from conrec.stages.artefacts import Artefacts
from conrec.stages.inputs import blocklists_url, read_events
from conrec.stages.new_items import tonights_catalogue
from conrec.stages.night_prompts import Plan, earlier_nights, write_prompts
from conrec.stages.nightly import NIGHT_LEASE, make_night
from conrec.stages.policies import serving
from conrec.stages.run import run_stage
from conrec.stages.scoring import scoring

pytestmark = pytest.mark.long

USERS = 12
LOG = [(f"u{user:02}", day, kind, item + user) for user in range(USERS) for _, day, kind, item in EVERYTHING[:48:2]]
ACTIVE = ["u03", "u08"]
"""Who does something between the two nights."""
TOMORROW = [*LOG, *((user, 8.5, "negative", 5) for user in ACTIVE)]
QUIET = sorted({f"u{user:02}" for user in range(USERS)} - {*ACTIVE})


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Settings of a root with an untrained policy, beside it one with the night of the first day."""
    publish, calibration = {"buckets": 3, "holdout_share": 0.0}, {"alpha": 0.8}
    folder = tmp_path_factory.mktemp("nights")
    config = untrained(world(folder, LOG, publish=publish, calibration=calibration, generate={"batch_size": 5}))
    scoring(serving(Artefacts(config)))
    after = config.model_copy(update={"root": f"{folder}/after"})
    shutil.copytree(config.root, after.root)
    return config, after, whole(after)


@pytest.fixture
def nights(built, tmp_path):
    """Writes a log; returns settings of a root where the first night ran, or of one where none did."""

    def settings(rows: list, first: bool = True, **sections: Any) -> Config:
        document = built[first].model_dump()
        for name, values in sections.items():
            document[name] |= values
        config = Config.model_validate(document | {"root": str(tmp_path / str(first))})
        if not Path(config.root).exists():
            shutil.copytree(built[first].root, config.root)
        write_log(config, rows)
        return config

    return settings


def write_log(config: Config, rows: list) -> None:
    """Another log over the same items."""
    users, days, kinds, places = zip(*rows, strict=True)
    times = [round((config.timeline.cut.timestamp() + day * 86400) * 1e6) for day in days]
    columns = {
        "user_id": list(users),
        "item_id": [f"i{place % 40:02}" for place in places],
        "timestamp": pa.array(times, pa.timestamp("us", "UTC")),
        "feedback": list(kinds),
    }
    storage.write_table(pa.table(columns), config.interactions.path)


def prepared(config: Config) -> tuple[Artefacts, Plan, str]:
    """The plan of a night, and what is said of it; nothing is generated."""
    run = serving(Artefacts(config))
    catalogue, _ = tonights_catalogue(run)
    events = read_events(config, catalogue.item_ids)
    limits = config.guardrails.model_copy(update={"min_negatives": 1, "min_history": 1})
    asked = Asked(int(events.times.max()), limits, 0, None)
    asked = replace(asked, count=len(asked.anchors(events)))
    storage.write_table(catalogue.items.filter(pa.array(catalogue.live)), run["nightly"].path(ITEMS))
    plans: list[Plan] = []
    said = printed(lambda: plans.append(write_prompts(run, catalogue, events, asked, run["nightly"])))
    return run, plans[0], said


def generated(config: Config, only: list[str] | None = None) -> str:
    """Prepares a night and generates for those whom it asks for, or some of them, as its engines would; returns what
    was said."""
    run, plan, said = prepared(config)
    night, policy = run["nightly"], run["policy"]
    if plan.asked:
        prompts = storage.read_table(night.path("prompts"))
        if only is not None:
            prompts = prompts.filter(pa.compute.is_in(prompts["user_id"], pa.array(only)))
        engine = open_engine(Path(policy.path("checkpoint")), tonights_catalogue(run)[0].trie, config.generate)
        batches = [prompts.slice(start, 5) for start in range(0, len(prompts), 5)]
        rows = pa.concat_tables([generate_batch(engine, batch, config.generate.beam_width) for batch in batches])
        for number, start in enumerate(range(0, len(rows), 4)):
            storage.write_table(rows.slice(start, 4), night.path("generated", f"{number}-0.parquet"))
            users = rows.slice(start, 4).select(["user_id"])
            storage.write_table(users, night.path("progress", f"{number}.parquet"))
    return said


def generated_too(config: Config, users: list[str]) -> None:
    """The rest of a night that was prepared and ended before it was done."""
    night = serving(Artefacts(config))["nightly"]
    found = {name: storage.read_table(night.path(name)) for name in ("generated", "progress")}
    generated(config, users)
    for name, end in (("generated", "-0"), ("progress", "")):
        storage.write_table(found[name], night.path(name, f"before{end}.parquet"))


def whole(config: Config) -> tuple[dict[str, Any], pa.Table, str]:
    """A night to its end: figures, published rows, what was said of who is generated for."""
    said = generated(config)
    run = serving(Artefacts(config))
    night = run["nightly"]
    figures = make_night(run, night)
    night.finish(figures, 0.0)
    table = storage.read_table(f"{blocklists_url(config)}/versions/{figures['version']}/data")
    return figures, table, said


def users_of(config: Config, folder: str) -> list[str]:
    url = serving(Artefacts(config))["nightly"].path(folder)
    return sorted(storage.read_table(url)["user_id"].to_pylist()) if storage.exists(url) else []


def assert_same(found: pa.Table, expected: pa.Table) -> None:
    """The same rows; score and similarity to rounding, since a batch of other users is another product of matrices."""
    numbers = ["score", "similarity"]
    assert found.drop_columns(numbers).equals(expected.drop_columns(numbers))
    for name in numbers:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5)


def test_a_second_night_publishes_what_a_full_one_does_and_generates_for_the_active_only(built, nights):
    first, rows_before, said = built[2]
    assert first["kept"] == 0 and "all 12 users are generated: no night before this one" in said
    second, rows, said = whole(nights(TOMORROW))
    assert (second["users"], second["kept"]) == (USERS, USERS - len(ACTIVE))
    assert f"10 of 12 users keep what night {first['version'][-12:]} generated for them, 2 are generated" in said
    assert users_of(nights(TOMORROW), "prompts") == users_of(nights(TOMORROW), "generated") == ACTIVE
    assert users_of(nights(TOMORROW), "kept") == QUIET
    full, expected, _ = whole(nights(TOMORROW, first=False))
    assert full["kept"] == 0 and full["version"] == second["version"]
    assert_same(rows, expected)
    # Ranked anew and lasting from tonight, also the rows of those who did nothing.
    quiet = [table.filter(pa.compute.is_in(table["user_id"], pa.array(QUIET))) for table in (rows_before, rows)]
    predicted = [table.filter(pa.compute.equal(table["reason"], "predicted")) for table in quiet]
    assert pa.compute.max(predicted[0]["expires_at"]).as_py() < pa.compute.min(predicted[1]["expires_at"]).as_py()
    # The third night keeps rows that the second one kept, and those that it generated.
    third, _, _ = whole(nights([*TOMORROW, ("u05", 9.5, "positive", 6)]))
    assert third["kept"] == USERS - 1


@pytest.mark.parametrize(
    "changed",
    [{"calibration": {"alpha": 0.9}}, {"guardrails": {"predicted_days": 2.0, "protect_days": 80.0}}],
    ids=["alpha", "guardrails"],
)
def test_another_alpha_or_guardrail_asks_no_policy_and_publishes_what_a_full_night_does(nights, monkeypatch, changed):
    config = nights(LOG, **changed)
    with monkeypatch.context() as patch:
        patch.setattr(TorchEngine, "load", None)  # whoever would ask a policy fails
        figures, rows, _ = whole(config)
    assert (figures["generated"], figures["kept"]) == (0, USERS)
    # As where no calibration and no night was before, whose policy is asked.
    fresh = nights(LOG, first=False, **changed)
    storage.remove(f"{fresh.root}/calibration")
    full, expected, _ = whole(fresh)
    assert full["generated"] == USERS and full["version"] == figures["version"]
    assert_same(rows, expected)


def test_where_nobody_is_new_nothing_is_generated(nights):
    # Of a user with so little history that nothing is predicted.
    figures, _, _ = whole(nights([*LOG, ("stranger", 9.0, "neutral", 3)], guardrails={"min_history": 2}))
    assert figures["generated"] == 0 and figures["kept"] == USERS


@pytest.mark.parametrize("changed", ["engine", "weights", "like"])
def test_what_decides_a_row_and_changes_makes_everybody_new(nights, changed):
    config, word = nights(TOMORROW), changed
    if changed == "engine":
        config, word = nights(TOMORROW, generate={"engine": "vllm"}), "generate.engine"
    elif changed == "weights":
        policy = serving(Artefacts(config))["policy"]
        manifest = storage.read_json(policy.path("artefact.json"))
        manifest["files"]["checkpoint/model.safetensors"]["sha256"] = "of another training"
        storage.write_json(policy.path("artefact.json"), manifest)
        word = "policy"
    if changed == "like":  # of everybody: what is excluded, and the prompt
        config = nights([*TOMORROW, *((user, 8.6, "positive", 7) for user in QUIET)])
    _, plan, said = prepared(config)
    assert plan.kept == 0
    assert changed == "like" or ("changed since night" in said and said.rstrip().endswith(word))


def test_where_semantic_ids_go_the_rows_of_the_quiet_stay_less_them_for_some_days(nights):
    first = serving(Artefacts(nights(LOG)))["nightly"]
    rows, ids = storage.read_table(first.path("generated")).to_pylist(), semantic_ids_of(first)
    before = {row["user_id"]: [tuple(ids[leaf]) for leaf in row["leaves"]] for row in rows}
    lost = max((before[user] for user in QUIET), key=len)[0]
    left = {user: [one for one in before[user] if one != lost] for user in QUIET}
    enough = {user: ids for user, ids in left.items() if 2 * len(ids) >= len(before[user])}
    items = storage.read_table(first.path("items.parquet")).to_pylist()
    there = pa.array([item["item_id"] for item in items if tuple(item["semantic_id"]) != lost])
    config = nights(TOMORROW)
    fewer = config.items.model_copy(update={"path": f"{config.root}/fewer"})
    table = storage.read_table(config.items.path)
    storage.write_table(table.filter(pa.compute.is_in(table["item_id"], there)), fewer.path)
    config = config.model_copy(update={"items": fewer})
    figures, _, said = whole(config)
    assert f"{len(enough)} of 12 users keep" in said and figures["kept"] == len(enough)
    second = serving(Artefacts(config))["nightly"]
    rows, ids = storage.read_table(second.path("kept")).to_pylist(), semantic_ids_of(second)
    assert {row["user_id"]: [tuple(ids[leaf]) for leaf in row["leaves"]] for row in rows} == enough
    assert any(len(enough[user]) < len(before[user]) for user in enough)
    # Then those alone stay who were generated among the IDs that are left.
    none = config.model_copy(update={"generate": config.generate.model_copy(update={"keep_days": 0.0})})
    prepared(none)
    assert users_of(none, "kept") == sorted({*ACTIVE, *QUIET} - {*enough})


def semantic_ids_of(night: Artefact) -> np.ndarray:
    """Of the items of a night, as its trie has them."""
    ids = storage.read_table(night.path("items.parquet"))["semantic_id"].to_pylist()
    return np.unique(np.array(ids), axis=0)


def test_damaged_and_missing_rows_are_generated_again(nights):
    night = serving(Artefacts(nights(LOG)))["nightly"]
    damaged, missing, sound = (night.path("generated", f"{number}-0.parquet") for number in range(3))
    believed = sorted({*storage.read_table(sound)["user_id"].to_pylist()} - {*ACTIVE})
    data = bytearray(storage.read_bytes(damaged))
    data[len(data) // 2] ^= 1
    storage.write_bytes(damaged, bytes(data))
    storage.remove(missing)
    second, rows, said = whole(nights(TOMORROW))
    assert said.count("generated again") == 2
    assert users_of(nights(TOMORROW), "kept") == believed and second["kept"] == len(believed) > 0
    assert_same(rows, whole(nights(TOMORROW, first=False))[1])


def test_a_night_that_was_killed_goes_on_by_its_plan_or_makes_another_one(nights):
    # Killed while it planned: what it had written is of no account.
    night = serving(Artefacts(nights(TOMORROW)))["nightly"]
    for folder, users in (("prompts", QUIET), ("kept", ["u03", "u03"])):
        storage.write_table(pa.table({"user_id": users}), night.path(folder, "000007.parquet"))
    _, plan, _ = prepared(nights(TOMORROW))
    assert plan.kept == len(QUIET) and users_of(nights(TOMORROW), "kept") == QUIET
    # Killed after it planned: the night before may go.
    storage.remove(serving(Artefacts(nights(LOG)))["nightly"].url)
    second, rows, said = whole(nights(TOMORROW))
    assert said == "" and second["kept"] == len(QUIET)
    assert_same(rows, whole(nights(TOMORROW, first=False))[1])


def test_who_was_forgotten_since_a_night_was_planned_is_not_counted(nights):
    run, plan, _ = prepared(nights(TOMORROW))
    url = run["nightly"].path("prompts")
    prompts = storage.read_table(url)
    storage.remove(url)
    storage.write_table(prompts.slice(1), f"{url}/000000.parquet")
    _, again, _ = prepared(nights(TOMORROW))
    assert (again.users, again.kept, again.asked) == (plan.users - 1, plan.kept, plan.asked - 1)
    assert again.basis == plan.basis


def test_a_night_without_a_plan_or_whose_manifest_is_damaged_is_none_to_keep_rows_of(nights):
    night = serving(Artefacts(nights(LOG)))["nightly"]
    manifest = storage.read_bytes(night.path("artefact.json"))
    storage.write_bytes(night.path("artefact.json"), manifest[:-9])
    _, plan, said = prepared(nights(TOMORROW))
    assert plan.kept == 0 and "no night before this one is complete" in said
    storage.remove(serving(Artefacts(nights(TOMORROW)))["nightly"].url)
    storage.remove(night.path("artefact.json"))
    plan = storage.read_json(night.path("prompts.json"))
    for lacking in ({"users": USERS}, plan | {"users": 0}, []):
        storage.write_json(night.path("prompts.json"), lacking)
        _, plan, said = prepared(nights(TOMORROW))
        assert plan.kept == 0 and "no night before this one is complete" in said
        storage.remove(serving(Artefacts(nights(TOMORROW)))["nightly"].url)


def test_what_a_night_generated_before_it_was_ended_is_kept_by_the_one_over_the_log_that_grew_meanwhile(nights):
    """Also where the first one goes on by itself at the same time; all are published as by a full night."""
    config = nights(TOMORROW)
    generated(config, ACTIVE[:1])
    ended = serving(Artefacts(config))["nightly"]
    grown = [*TOMORROW, ("u05", 9.5, "positive", 6)]
    _, _, said = prepared(nights(grown))
    assert f"10 of 12 users keep what night {ended.version}, which did not finish, generated for them, 2 are" in said
    assert users_of(nights(grown), "prompts") == ["u05", ACTIVE[1]]
    assert users_of(nights(grown), "earlier") == ["u05", ACTIVE[1]]  # for a deadline, of the night before both
    whole(nights(TOMORROW))
    storage.remove(ended.url)  # its plan is made: what becomes of the others is of no account
    figures, rows, said = whole(nights(grown))
    assert (figures["kept"], figures["generated"], said) == (USERS - 2, 2, "")
    assert_same(rows, whole(nights(grown, first=False))[1])


def test_a_trial_of_few_users_does_not_hide_the_whole_night_before_it(nights):
    first = serving(Artefacts(nights(LOG)))["nightly"]
    trial = plan(nights(LOG).root, "nightly", {"trial": True}, {})
    figures = first.require()["figures"] | {"users": 4}
    storage.write_table(storage.read_table(first.path("generated")).slice(0, 4), trial.path("generated", "0.parquet"))
    storage.write_table(storage.read_table(first.path(ITEMS)), trial.path(ITEMS))
    trial.finish(figures, 0.0)
    found, _ = earlier_nights(nights(LOG).root, figures[BASIS])
    assert [night.version for night in found] == [trial.version, first.version]
    _, whole_plan, said = prepared(nights(TOMORROW))
    assert whole_plan.kept == len(QUIET) and f"what night {trial.version} and night {first.version} generated" in said
    # The newest whole one is enough.
    whole(nights(TOMORROW))
    assert len(earlier_nights(nights(LOG).root, figures[BASIS])[0]) == 1


def ended(config: Config) -> dict[str, Any]:
    """A night that was prepared and began an hour ago, and whose deadline is now."""
    now = datetime.now(UTC)
    nightly = config.nightly.model_copy(update={"deadline": now.timetz()})
    config = config.model_copy(update={"nightly": nightly})
    run = serving(Artefacts(config, began=now - timedelta(hours=1)))
    return make_night(run, run["nightly"])


def test_at_its_deadline_a_night_publishes_what_there_is_and_the_next_run_goes_on(nights):
    generated(nights(TOMORROW), ACTIVE[:1])
    run = serving(Artefacts(nights(TOMORROW)))
    made: list[dict[str, Any]] = []
    said = printed(lambda: made.append(ended(nights(TOMORROW))))
    run["nightly"].finish(made[0], 0.0)
    assert "11 of 12 users are answered for as of tonight (91.7%), 1 keep what an earlier night" in said
    figures, root = run["nightly"].require()["figures"], blocklists_url(run.config)
    assert (figures["kept"], figures["generated"], figures["behind"], figures["missing"]) == (10, 1, 1, 0)
    assert figures["version"].endswith(f"Z-1-{run['nightly'].version}") == (read_pointer(root) is not None)
    manifest = storage.read_json(f"{root}/versions/{figures['version']}/manifest.json")
    assert manifest["about"]["deadline"] == {"behind_users": 1, "missing_users": 0}
    assert manifest["about"]["generated_users"] == USERS
    # Who is behind keeps predictions, and the digest of no prompt.
    rows = storage.read_table(run["nightly"].path("behind"))
    assert rows["user_id"].to_pylist() == ACTIVE[1:] and rows["digest"].to_pylist() == [OUTDATED]
    published = storage.read_table(f"{root}/versions/{figures['version']}/data")
    theirs = published.filter(pa.compute.equal(published["user_id"], ACTIVE[1]))
    assert {"explicit", "predicted"} == {*theirs["reason"].to_pylist()}
    # The night after knows who it is; the same night, run again, ends as if there had been no hour.
    _, plan, _ = prepared(nights([*TOMORROW, ("u05", 9.5, "positive", 6)]))
    assert plan.asked == 2 and plan.kept == USERS - 2
    generated_too(nights(TOMORROW), ACTIVE[1:])
    said = printed(run_stage, "nightly", nights(TOMORROW))
    assert "is complete, but its deadline left 1 users" in said and not ray.is_initialized()
    figures = run["nightly"].require()["figures"]
    assert (figures["generated"], figures["behind"], figures["missing"]) == (2, 0, 0)
    assert read_pointer(root)["version"] == figures["version"]
    whole_rows = storage.read_table(f"{root}/versions/{figures['version']}/data")
    assert_same(whole_rows, whole(nights(TOMORROW, first=False))[1])
    assert not storage.exists(run["nightly"].path("behind"))
    assert "is complete\n" in printed(run_stage, "nightly", nights(TOMORROW))


def test_so_few_that_the_audit_refuses_them_are_kept_by_the_night_after(nights):
    """The first night of a policy: nobody has an earlier row."""
    generated(nights(LOG, first=False), QUIET[:3])
    with pytest.raises(AuditError, match=r"coverage.*3 of 12 users were answered for"):
        ended(nights(LOG, first=False))
    assert read_pointer(blocklists_url(nights(LOG, first=False))) is None
    _, plan, _ = prepared(nights(TOMORROW, first=False))
    assert (plan.kept, plan.asked) == (3, USERS - 3)


def test_what_a_whole_night_generated_is_kept_though_the_audit_refuses_its_lists(nights, monkeypatch):
    """By the night with another setting, and by the same one, which publishes once its limit is lifted."""
    strict = nights(LOG, first=False, publish={"max_size_change": 1.0, "min_overlap": 1.0})
    whole(strict)
    tomorrow = nights(TOMORROW, first=False, publish={"max_size_change": 1.0, "min_overlap": 1.0})
    generated(tomorrow)
    run = serving(Artefacts(tomorrow))
    with pytest.raises(AuditError, match=r"size|overlap"):
        make_night(run, run["nightly"])
    assert "version" not in run["nightly"].require()["figures"]
    other = nights(TOMORROW, first=False, publish={"buckets": 2})
    _, plan, said = prepared(other)
    assert (plan.kept, plan.asked) == (USERS, 0)
    lifted = nights(TOMORROW, first=False, publish={"max_size_change": 9.0, "min_overlap": 0.0})
    read, sha256 = [], storage.sha256
    with monkeypatch.context() as patch:
        patch.setattr(storage, "sha256", lambda url: read.append(url) or sha256(url))
        said = printed(run_stage, "nightly", lifted)
    assert "is complete, but it never published what it generated" in said and not ray.is_initialized()
    manifest = serving(Artefacts(lifted))["nightly"].require()
    assert read_pointer(blocklists_url(lifted))["version"] == manifest["figures"]["version"]
    # Each file of the night is read once for its digest, before it is published.
    assert [read.count(run["nightly"].path(name)) for name in manifest["files"]] == [1] * len(manifest["files"])
    assert "is complete\n" in printed(run_stage, "nightly", lifted)


def test_a_log_that_ends_before_what_readers_have_is_refused_before_anything_is_generated(nights, monkeypatch):
    whole(nights(TOMORROW))
    shorter = nights(LOG, publish={"buckets": 2})
    run = serving(Artefacts(shorter))
    monkeypatch.setattr("conrec.stages.nightly.write_prompts", lambda *_: pytest.fail("a plan was made"))
    with pytest.raises(PublishError, match="readers never go back by themselves"):
        make_night(run, run["nightly"])
    # Where both are of one moment, the night goes on.
    same = nights(TOMORROW, publish={"buckets": 2})
    monkeypatch.undo()
    assert whole(same)[0]["version"] == read_pointer(blocklists_url(same))["version"]


def hold(night: Artefact, silent: float) -> None:
    """The lock of a night as a process of another machine leaves it that long after its last sign."""
    document = {"token": "t", "holder": "night of another", "host": "far", "machine": "elsewhere", "pid": 7}
    times = {"taken_at": time.time() - silent, "lease_seconds": NIGHT_LEASE.total_seconds()}
    storage.write_json(night.path(".lock"), document | times)


def test_a_night_that_another_process_is_at_is_refused_and_left_as_it_is(nights):
    """As long as it gives signs; one of another machine that fell silent is taken over from."""
    config = nights(TOMORROW)
    generated(config)
    run = serving(Artefacts(config))
    night = run["nightly"]
    before = {name: storage.sha256(night.path(name)) for name in storage.list_files(night.url)}
    hold(night, silent=NIGHT_LEASE.total_seconds() - 30)
    with pytest.raises(PublishError, match=r"/\.lock: held by night of another \(host far, process 7, since 20.*again"):
        make_night(run, night)
    assert {name: storage.sha256(night.path(name)) for name in storage.list_files(night.url)} == before
    hold(night, silent=NIGHT_LEASE.total_seconds() + 1)
    make_night(run, night)
    assert not storage.exists(night.path(".lock"))


def test_a_night_whose_lock_another_process_took_publishes_nothing(nights, monkeypatch):
    config = nights(TOMORROW)
    generated(config)
    run = serving(Artefacts(config))

    def generate(*_: Any) -> tuple[int, float]:
        hold(run["nightly"], silent=0)
        return len(ACTIVE), 1.0

    monkeypatch.setattr("conrec.stages.nightly.generate", generate)
    with pytest.raises(PublishError, match=r"night of another .* took over"):
        make_night(run, run["nightly"])
    assert run["nightly"].read() is None


def test_nothing_is_counted_while_the_lock_of_a_version_is_held(nights, monkeypatch):
    """Its lease begins anew with every bucket that is written, and counting all of them writes none."""
    config = nights(TOMORROW, guardrails={"max_user_share": 0.95})
    locks, held, count = f"{blocklists_url(config)}/locks", [], Lists.count

    def counted(lists, bucket):
        held.append(storage.list_files(locks))
        return count(lists, bucket)

    monkeypatch.setattr(Lists, "count", counted)
    whole(config)
    assert held == [[]] * config.publish.buckets


def test_torn_weights_are_found_before_anybody_is_generated_or_an_hour_is_fixed(nights):
    nights = partial(nights, nightly={"deadline": "05:00Z"})
    generated(nights(TOMORROW))
    weights = serving(Artefacts(nights(TOMORROW)))["policy"].path("checkpoint", "model.safetensors")
    data = bytearray(storage.read_bytes(weights))
    data[-1] ^= 1
    storage.write_bytes(weights, bytes(data))
    run = serving(Artefacts(nights(TOMORROW)))
    with pytest.raises(ArtefactError, match=r"checkpoint/model\.safetensors: damaged: SHA-256 .* run conrec train"):
        make_night(run, run["nightly"])
    assert not storage.exists(run["nightly"].path(".deadline.json"))
    data[-1] ^= 1
    storage.write_bytes(weights, bytes(data))
    make_night(run, run["nightly"])
    assert storage.exists(run["nightly"].path(".deadline.json"))


@pytest.mark.parametrize("harm", ["pointer gone", "pointer damaged", "version gone", "rows damaged"])
def test_a_complete_night_that_serving_does_not_have_is_published_again(built, nights, harm):
    """By the stage itself, which starts no Ray for it."""
    config = nights(LOG)
    first, rows, _ = built[2]
    root, version = blocklists_url(config), first["version"]
    place = f"{root}/CURRENT.json" if harm.startswith("pointer") else f"{root}/versions/{version}"
    if harm == "rows damaged":
        place += "/data/bucket-00000.parquet"
    storage.remove(place)
    if harm.endswith("damaged"):
        storage.write_bytes(place, b"torn")
    lines = show.published(config) if harm != "version gone" else ["! all that was published"]
    assert harm == "rows damaged" or lines[0].startswith("!")  # verify reads the rows
    said = printed(run_stage, "nightly", config)
    assert "is not what serving has" in said and "it is published again" in said and not ray.is_initialized()
    assert read_pointer(root)["version"] == version and not any(line[0] == "!" for line in show.published(config))
    assert storage.read_table(f"{root}/versions/{version}/data").equals(rows)
    said = printed(run_stage, "nightly", config)
    assert "is complete" in said and "again" not in said


@pytest.mark.ray
@pytest.mark.usefixtures("ray_driver")
def test_prompts_as_tasks_are_those_of_one_process(nights, monkeypatch):
    """The last one here: Ray is there until the module ends."""
    night = prepared(config := nights(TOMORROW))[0]["nightly"]
    files = {name: storage.read_bytes(night.path(name)) for name in storage.list_files(night.url)}
    assert any(name.startswith("prompts/") for name in files) and any(name.startswith("kept/") for name in files)
    storage.remove(night.url)
    monkeypatch.setattr(night_prompts, "mapping", lambda seconds: as_tasks)
    assert prepared(config)[1].kept == len(QUIET)
    assert {name: storage.read_bytes(night.path(name)) for name in storage.list_files(night.url)} == files
