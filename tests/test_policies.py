"""Which policy a night takes, and what it says of it."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from test_artefacts import CUT, EVENTS, catalogue, finish_catalogue, log, world  # noqa: F401 - a fixture

from conrec import storage
from conrec.catalogue.embeddings import text_embeddings
from conrec.config import Config
from conrec.errors import ArtefactError, ConfigError, DataError
from conrec.progress import console
from conrec.stages.artefacts import Artefacts, closure, settings_of
from conrec.stages.policies import serving, with_settings
from conrec.stages.run import run_stage


def train(config: Config) -> str:
    """What the train stage leaves, as far as the rule looks at it."""
    finish_catalogue(config)
    run = Artefacts(config)
    for name in ("validated", "policy"):
        run[name].finish({}, 0.0)
    return run["policy"].version


def said(config: Config, **arguments: Any) -> tuple[Artefacts, str]:
    with console.capture() as capture:
        served = serving(Artefacts(config), **arguments)
    return served, capture.get()


def test_the_policy_is_said_with_its_time_and_its_cut(world):  # noqa: F811
    finish_catalogue(world())
    version = train(world())
    served, lines = said(world())
    assert served["policy"].version == version
    assert f"policy {version} of " in lines and "trained until 2024-01-10 00:00" in lines and "warning" not in lines


def test_tomorrows_log_and_items_are_served_with_the_policy_of_today(world, tmp_path):  # noqa: F811
    finish_catalogue(world())
    version, trained = train(world()), Artefacts(world())
    before = {name: trained[name].version for name in ("catalogue", "validated", "calibration", "nightly")}
    storage.write_table(log(*EVENTS, ("cleo", "d", 9.0, 1)), str(tmp_path / "log.parquet"))
    storage.write_table(catalogue("b", "c", "d"), str(tmp_path / "items.parquet"))
    served, _ = said(world())
    assert served["policy"].version == version
    for name in ("catalogue", "validated", "calibration"):
        assert served[name].version == before[name]
    assert served["nightly"].version != before["nightly"]


def test_a_changed_training_setting_is_said_and_not_served(world):  # noqa: F811
    finish_catalogue(world())
    version = train(world())
    with pytest.raises(ArtefactError) as refused:
        said(world(prompt={"max_events": 30}))
    message = str(refused.value)
    assert "prompt.max_events: 48 -> 30" in message and f'policy.version = "{version}"' in message
    assert "run conrec train" in message


def test_what_decides_no_training_does_not_keep_a_policy_from_being_served(world):  # noqa: F811
    finish_catalogue(world())
    version = train(world())
    for changed in (
        {"calibration": {"alpha": 0.2}},
        {"guardrails": {"protect_days": 3.0}},
        {"train": {"use_gpu": True}},
    ):
        assert said(world(**changed))[0]["policy"].version == version


def test_a_moved_cut_is_said_and_the_older_policy_served_until_the_next_training(world):  # noqa: F811
    finish_catalogue(world())
    older = train(world())
    later = world(timeline={"cut": CUT + timedelta(days=5)})
    served, lines = said(later)
    assert served["policy"].version == older and served.config.timeline.cut == CUT
    assert "timeline.cut is 2024-01-15" in lines and "run conrec train" in lines
    with pytest.raises(ArtefactError, match=r"timeline\.cut"):
        said(later, same_cut=True)
    newer = train(later)
    served, lines = said(later)
    assert served["policy"].version == newer and "warning" not in lines
    assert said(later, same_cut=True)[0]["policy"].version == newer
    # One that is finished later, but learned less, is not newer.
    manifest = storage.read_json(Artefacts(world())["policy"].path("artefact.json"))
    manifest["finished_at"] = datetime(2999, 1, 1, tzinfo=UTC).isoformat()
    storage.write_json(Artefacts(world())["policy"].path("artefact.json"), manifest)
    assert said(later)[0]["policy"].version == newer


def test_a_policy_that_knows_what_lies_after_the_cut_is_not_served(world):  # noqa: F811
    """After the cut was moved back, and in every replay: the newer policy learned from the days that are judged."""
    later = world(timeline={"cut": CUT + timedelta(days=5)})
    finish_catalogue(world())
    newer = train(later)
    with pytest.raises(ArtefactError, match=r"timeline\.cut: '2024-01-15T00:00:00Z' -> '2024-01-10T00:00:00Z'"):
        said(world())
    older = train(world())
    assert said(world())[0]["policy"].version == older and said(later)[0]["policy"].version == newer
    served, lines = said(world(policy={"version": newer}))
    assert served["policy"].version == newer and "other settings: timeline.cut" in lines


def test_a_pinned_policy_is_not_served_with_other_weights_than_its_own(world, tmp_path):  # noqa: F811
    for name, weights in (("one", b"w1"), ("other", b"w2")):
        storage.write_bytes(str(tmp_path / name / "model.safetensors"), weights)
    both = {name: {"encoder": str(tmp_path / name)} for name in ("one", "other")}
    finish_catalogue(world(embedding=both["one"]))
    version = train(world(embedding=both["one"]))
    served, lines = said(world(embedding=both["other"], policy={"version": version}))
    assert "other settings: embedding.encoder" in lines
    with pytest.raises(ConfigError, match=r"sha256:.* embedding\.encoder names others: name the folder"):
        text_embeddings(pa.array(["new"]), served.config.embedding)
    (tmp_path / "one").rename(tmp_path / "moved")
    moved = str(tmp_path / "moved")
    assert said(world(embedding={"encoder": moved}))[0].config.embedding.encoder == moved


def test_a_pinned_policy_beside_impossible_settings_is_told_as_a_mistake(world):  # noqa: F811
    finish_catalogue(world())
    version = train(world(generate={"engine": "torch"}, model={"heads": 8}))
    with pytest.raises(ConfigError, match=r"policy was trained with.*: model\.hidden_size / model\.heads = 16"):
        said(world(policy={"version": version}))


def test_without_stages_the_twin_stays_though_events_come_late(world, tmp_path):  # noqa: F811
    """Another history would ask for another twin, which the night would train."""
    plain = world(grpo={"stages": []})
    finish_catalogue(plain)
    train(plain)
    twin = said(plain)[0]["validated"]
    storage.write_table(log(*EVENTS, ("cleo", "b", -2.5, 1)), str(tmp_path / "log.parquet"))
    assert Artefacts(plain)["validated"].version != twin.version
    assert said(plain)[0]["validated"].version == twin.version
    storage.remove(twin.url)
    assert said(plain)[0]["validated"].version != twin.version, "none there: the first calibration trains it"


def test_a_copy_of_a_policy_is_none_and_a_foreign_manifest_is_named(world):  # noqa: F811
    finish_catalogue(world())
    version = train(world())
    url = Artefacts(world())["policy"].url
    for name in (f"{version}-backup", "old"):
        storage.write_json(f"{url}/../{name}/artefact.json", storage.read_json(f"{url}/artefact.json"))
    assert said(world())[0]["policy"].version == version
    storage.write_json(f"{url}/artefact.json", {"version": version})
    with pytest.raises(ArtefactError, match=rf"{version}/artefact\.json: lacks figures, finished_at, inputs, settings"):
        said(world())


def test_a_policy_of_a_setting_that_is_gone_is_taken_where_it_had_the_value_that_is_left(world):  # noqa: F811
    config = world()
    trained = settings_of(config, closure("policy"))
    assert with_settings(config, trained) == config
    trained["prompt"]["shown"] = False
    with pytest.raises(ConfigError, match=r"trained with prompt.shown = False, and this release has True alone"):
        with_settings(config, trained)


def test_a_pinned_policy_comes_with_its_own_settings(world):  # noqa: F811
    finish_catalogue(world())
    version = train(world(prompt={"max_events": 30}))
    train(world())
    served, lines = said(world(policy={"version": version}))
    assert served["policy"].version == version and served.config.prompt.max_events == 30
    assert "other settings: prompt.max_events" in lines
    with pytest.raises(ArtefactError, match=rf"'0123' is not finished there; it has .*{version}"):
        said(world(policy={"version": "0123"}))


def test_an_old_policy_is_a_warning_with_the_command(world):  # noqa: F811
    finish_catalogue(world())
    train(world())
    assert "warning" not in said(world(nightly={"max_policy_days": 9}))[1]
    lines = said(world(nightly={"max_policy_days": 8}))[1]
    assert "ends 8 days before the newest event (nightly.max_policy_days = 8)" in lines and "conrec train" in lines


def test_without_a_policy_the_command_is_named(world):  # noqa: F811
    with pytest.raises(ArtefactError, match="no policy is finished; run conrec train"):
        said(world())
    # One whose training was killed is none.
    artefact = Artefacts(world())["policy"]
    storage.write_bytes(artefact.path("checkpoint", "model.safetensors"), b"half")
    with pytest.raises(ArtefactError, match="no policy is finished"):
        said(world())


def test_one_event_of_2060_stops_the_night_before_it_writes_anything(world, tmp_path):  # noqa: F811
    finish_catalogue(world())
    train(world())
    days = (datetime(2060, 1, 1, tzinfo=UTC) - CUT).days
    storage.write_table(log(*EVENTS, ("cleo", "b", days, 1)), str(tmp_path / "log.parquet"))
    with pytest.raises(DataError, match=r"log\.parquet: column timestamp holds 2060-01-01.* in row 5, user 'cleo'"):
        run_stage("nightly", world())
    assert not storage.exists(f"{world().root}/nightly") and not storage.exists(f"{world().root}/blocklists")
    # Where a share of them is admitted, it is left out, and the night is that of the log without it.
    admitting = world(interactions={"max_future_share": 0.2})
    served = said(admitting)[0]["nightly"].version
    storage.write_table(log(*EVENTS), str(tmp_path / "log.parquet"))
    assert said(admitting)[0]["nightly"].version == served


def test_a_policy_of_an_older_release_is_told_as_one(world):  # noqa: F811
    finish_catalogue(world())
    version = train(world())
    url = Artefacts(world())["policy"].path("artefact.json")
    storage.write_json(url, storage.read_json(url) | {"settings": {"swing": {}, "grpo": {}}})
    with pytest.raises(ArtefactError, match=r"an older release trained it, in another way\nrun conrec train$"):
        said(world())
    with pytest.raises(
        ArtefactError, match=rf"'{version}': an older release trained it, .*; run conrec train, and take"
    ):
        said(world(policy={"version": version}))


def test_a_policy_whose_twin_was_removed_is_not_served(world):  # noqa: F811
    finish_catalogue(world())
    train(world())
    storage.remove(Artefacts(world())["validated"].url)
    with pytest.raises(ArtefactError, match=r"validated/.* is not finished, and policy .* was made of it"):
        said(world())


def test_a_refitted_catalogue_waits_for_its_training(world, tmp_path: Path):  # noqa: F811
    first = finish_catalogue(world())
    train(world())
    storage.write_table(catalogue("b", "c", "d"), str(tmp_path / "items.parquet"))
    refitted = Artefacts(world()).exact("catalogue")
    table = storage.read_table(Artefacts(world())["catalogue"].path("items.parquet"))
    storage.write_table(table, refitted.path("items.parquet"))
    manifest = refitted.finish({"read_until": CUT.isoformat()}, 0.0)
    manifest["finished_at"] = datetime(2999, 1, 1, tzinfo=UTC).isoformat()
    storage.write_json(refitted.path("artefact.json"), manifest)
    assert Artefacts(world())["catalogue"].version == refitted.version != first
    assert said(world())[0]["catalogue"].version == first
