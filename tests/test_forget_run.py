"""`conrec forget` finds a person wherever the root names them, and says what it searched and cannot reach."""

from __future__ import annotations

import json
import shutil

import pyarrow as pa
import pytest
import redis
from stores import redis_server

from conrec import cli, storage
from conrec.artefact import plan
from conrec.config import load_settings
from conrec.errors import ArtefactError, ConfigError
from conrec.serving import versions
from conrec.serving.mirror import mirror
from conrec.serving.reader import BlocklistReader
from conrec.serving.redis import export_redis
from conrec.serving.shards import Shard
from conrec.stages.forget import forget
from conrec.stages.inputs import blocklists_url
from conrec.store import pointers
from conrec.store.compiled import with_compiled
from conrec.store.forget import forget as take_out
from conrec.store.publish import Block, write_version
from conrec.tables import BLOCKLIST, RULES, TIMESTAMP

pytestmark = pytest.mark.long

GONE, STAYS = "ann-7f3", "bob-9c1"
YEAR_2090 = 3_786_912_000_000_000
VERSION = "20260101T000000Z-aaa"


def table_of(**columns):
    """A row for each of the two."""
    return pa.table({"user_id": [GONE, STAYS], **{name: [value, value] for name, value in columns.items()}})


def blocklist():
    values = {"item_id": "x", "reason": "explicit", "similarity": 1.0, "score": 1.0, "semantic_id": None}
    ends = {"demotes_at": YEAR_2090, "expires_at": YEAR_2090}
    columns = {"user_id": [GONE, STAYS], **{name: [value] * 2 for name, value in (values | ends).items()}}
    return pa.table([pa.array(columns[field.name]).cast(field.type) for field in BLOCKLIST], schema=BLOCKLIST)


@pytest.fixture
def settings(tmp_path):
    """A root with everything that names a person, and the settings file of it."""
    root = str(tmp_path / "root")
    store = storage.join(root, "blocklists")
    about = {"watermark_us": 1, "generated_users": 2, "failed_users": 1, "failures": [f"user '{GONE}': too long"]}
    manifest = write_version(store, VERSION, [Block(0, blocklist(), RULES.empty_table())], about)
    pointers.swap_pointer(pointers.observe(store), VERSION, pointers.create_manifest(store, VERSION, manifest))
    night = plan(root, "nightly", {}, {})
    for name in ("prompts/000000.parquet", "generated/a.parquet", "progress/b.parquet"):
        storage.write_table(table_of(prompt=7), night.path(name))
    night.finish({"version": VERSION, "users": 2}, 1.0)
    storage.write_table(table_of(), storage.join(root, "nightly", "unfinished", "generated", "c.parquet"))
    for stage in ("calibration", "systems"):
        storage.write_table(pa.table({"leaves": [[1], [2]]}), plan(root, stage, {}, {}).path("asked.parquet"))
    for name, user in (("shown", GONE), ("other", STAYS)):
        url = storage.join(root, "evaluation", name, "metrics.json")
        storage.write_json(url, {"published": {"examples": [{"user": user}]}})
        finding = {"rule": "liked", "where": "version", "what": f"1 rows, first user {user}, item x"}
        report = {"audited_at": "2026-01-01T00:00:00+00:00", "findings": [finding], "figures": {"users": 2}}
        storage.write_json(storage.join(store, "audits", f"{name}.json"), report | {"about": {"watermark_us": 1}})
        storage.write_table(
            table_of().filter(pa.array([user == GONE, user == STAYS])),
            storage.join(root, "simulation", name, "snapshots", "interactions.parquet"),
        )
    storage.write_bytes(storage.join(root, "logs", "nightly.log"), f"one\nuser '{GONE}' in row 17\ntwo\n".encode())
    storage.write_table(table_of(anchor_time=1), str(tmp_path / "anchors" / "anchors.parquet"))
    log = table_of(item_id="x", feedback="negative")
    log = log.append_column("timestamp", pa.array([1, 1], TIMESTAMP))
    storage.write_table(log, storage.join(root, "log", "interactions.parquet"))
    file = tmp_path / "settings.toml"
    file.write_text(f"""
root = "{root}"
interactions = {{ path = "{root}/log/interactions.parquet" }}
items = {{ path = "{tmp_path}/items.parquet" }}
timeline = {{ cut = 2026-01-01T00:00:00Z }}
""")
    return file


def with_log(config, path):
    """The settings with another `interactions.path`."""
    return config.model_copy(update={"interactions": config.interactions.model_copy(update={"path": str(path)})})


def named_in(folder):
    """Files that name the person, read as a whole."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".parquet":
            if GONE in str(storage.read_table(str(path)).to_pydict()):
                found.append(path.relative_to(folder).as_posix())
        elif path.is_file() and GONE.encode() in path.read_bytes():
            found.append(path.relative_to(folder).as_posix())
    return found


def test_a_person_is_gone_from_all_that_names_them(settings, tmp_path, capsys):
    root = tmp_path / "root"
    mirror(str(root / "blocklists"), str(tmp_path / "mirror"))
    assert len(named_in(tmp_path)) == 14
    with redis_server(tmp_path) as url, redis.Redis.from_url(url) as client:
        export_redis(str(root / "blocklists"), url, "conrec")
        also = ["--anchors", tmp_path / "anchors", "--mirror", tmp_path / "mirror", "--redis", url]
        with pytest.raises(SystemExit) as ended:
            cli.main(list(map(str, ["forget", GONE, "--config", settings, *also])))
        assert sorted(client.scan_iter("*:*:*")) == [f"conrec:{VERSION}:{STAYS}".encode()]
    told = "".join(capsys.readouterr().out.split())
    assert ended.value.code == 0, told
    assert named_in(tmp_path) == ["root/log/interactions.parquet"]  # the log is for a person to mend, and that is said
    for said in (
        "searched8Parquetfiles",
        "1copiesin",
        "keysconrec:*:*ofRedis",
        "nothingisleftof1people",
        "weights",
        "conrec-*",
    ):
        assert said in told

    night = plan(str(root), "nightly", {}, {})
    for name, entry in night.require()["files"].items():
        assert entry == {"bytes": storage.size(night.path(name)), "sha256": storage.sha256(night.path(name))}
        assert storage.read_table(night.path(name))["user_id"].to_pylist() == [STAYS]
    again = "20260101T000000Z.1-aaa"
    assert night.require()["figures"]["version"] == versions.read_pointer(str(root / "blocklists"))["version"] == again
    assert (root / "logs" / "nightly.log").read_text() == "one\ntwo\n"
    kept = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert {"evaluation/other/metrics.json", "blocklists/audits/other.json"} < kept
    assert any(name.startswith("simulation/other/") for name in kept)
    for place in (root / "blocklists", tmp_path / "mirror"):
        reader = BlocklistReader(str(place))
        assert (reader.filter(GONE, ["x"]), reader.filter(STAYS, ["x"])) == (["x"], [])


def test_redis_is_asked_for_its_keys_a_thousand_at_a_time(settings, tmp_path):
    config = load_settings(settings)
    with redis_server(tmp_path) as url, redis.Redis.from_url(url) as client:
        export_redis(blocklists_url(config), url, "conrec")
        client.mset({f"conrec:{VERSION}:user{number}": 1 for number in range(5000)})
        client.config_resetstat()
        assert "removed 1 keys of Redis" in forget(config, [GONE], [], [], url).done
        assert client.info("commandstats")["cmdstat_scan"]["calls"] < 20  # twice: to remove, and to prove it


def test_what_a_killed_process_was_writing_goes(settings, tmp_path):
    config = load_settings(settings)
    halves = [
        tmp_path / "root" / "nightly" / "unfinished" / ".c.parquet.x1.partial",
        tmp_path / "anchors" / ".b.partial",
    ]
    of_the_log = tmp_path / "root" / "log" / ".interactions.parquet.x1.partial"
    for half in (*halves, of_the_log):
        storage.write_table(table_of(), str(half))
    config = with_log(config, of_the_log.parent)
    assert forget(config, [GONE], [str(tmp_path / "anchors")], [], None).left == []
    assert [half.exists() for half in (*halves, of_the_log)] == [False, False, True]


def test_a_root_within_the_folder_of_the_log_is_searched(settings, tmp_path):
    config = load_settings(settings)
    assert forget(with_log(config, tmp_path), [GONE], [], [], None).left == [config.interactions.path]


def test_a_folder_that_is_not_what_its_option_names_is_refused_before_anything_is_touched(settings, tmp_path):
    config = load_settings(settings)
    shutil.copytree(blocklists_url(config), tmp_path / "other")
    mirror(str(tmp_path / "other"), str(tmp_path / "mirror"))
    before = storage.sha256(config.root)
    for anchors in (tmp_path / "typo", tmp_path / "anchors" / "anchors.parquet"):
        with pytest.raises(ConfigError, match=f"--anchors {anchors}: holds no Parquet file"):
            forget(config, [GONE], [str(anchors)], [], None)
    for folder in ("typo", "anchors"):
        with pytest.raises(ConfigError, match=rf"--mirror .*/{folder}: holds no MIRROR.json"):
            forget(config, [GONE], [], [str(tmp_path / folder)], None)
    with pytest.raises(ArtefactError, match=f"mirrors {tmp_path}/other"):
        forget(config, [GONE], [], [str(tmp_path / "mirror")], None)
    assert storage.sha256(config.root) == before


def test_a_figure_or_a_year_is_nobody(settings):
    config = load_settings(settings)
    store = blocklists_url(config)
    (manifest, _), *_ = versions.read_manifests(store)
    before = storage.list_files(store)
    assert manifest["figures"]["users"] == 2
    storage.write_bytes(storage.join(config.root, "logs", "other.log"), b"a line that ends with user\n2 of them\n")
    for user in (manifest["published_at"][:4], "2026", "2"):
        assert forget(config, [user], [], [], None).left == []
        assert storage.list_files(store) == before


def test_what_is_killed_between_manifest_and_file_is_finished_by_the_next_run(settings, monkeypatch):
    config = load_settings(settings)
    write = storage.write_bytes

    def dies(url, data):
        if "/generated/" in url:
            raise OSError("killed")
        write(url, data)

    monkeypatch.setattr(storage, "write_bytes", dies)
    with pytest.raises(OSError, match="killed"):
        forget(config, [GONE], [], [], None)
    monkeypatch.undo()
    assert forget(config, [GONE], [], [], None).left == []
    night = plan(config.root, "nightly", {}, {})
    for name, entry in night.require()["files"].items():
        assert entry["sha256"] == storage.sha256(night.path(name))


def test_a_night_follows_its_version_also_from_a_run_that_was_killed(settings):
    config = load_settings(settings)
    store, night = blocklists_url(config), plan(config.root, "nightly", {}, {})
    take_out(store, [GONE])  # killed behind the versions
    assert forget(config, [GONE], [], [], None).left == []
    assert night.require()["figures"]["version"] == "20260101T000000Z.1-aaa"
    take_out(store, [STAYS])
    assert forget(config, [STAYS], [], [], None).left == []
    assert night.require()["figures"]["version"] == versions.read_pointer(store)["version"] == "20260101T000000Z.2-aaa"


def test_what_nobody_knows_of_is_found_by_the_search(settings, tmp_path, capsys):
    storage.write_table(table_of(), str(tmp_path / "root" / "copy" / "somebody.parquet"))
    with pytest.raises(SystemExit) as ended:
        cli.main(["forget", GONE, "--config", str(settings)])
    assert ended.value.code == 2
    assert "copy/somebody.parquet" in capsys.readouterr().err
    config = load_settings(settings)
    storage.write_bytes(str(tmp_path / "root" / "copy" / "somebody.parquet"), b"no Parquet")
    with pytest.raises(ArtefactError, match=r"somebody.parquet: cannot be searched"):
        forget(config, [GONE], [], [], None)
    assert json.loads((tmp_path / "root" / "blocklists" / "CURRENT.json").read_text())["version"].endswith(".1-aaa")


@pytest.mark.parametrize("shard", [None, Shard(0, 1)])
def test_what_a_killed_mirror_left_stops_nobody(settings, tmp_path, monkeypatch, shard):
    config, folder = load_settings(settings), tmp_path / "mirror"
    mirror(blocklists_url(config), str(folder), shard=shard)
    (folder / "mirrored" / f"{VERSION}-killed").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    forgotten = forget(config, ["nobody"], [], ["~/mirror"], None)
    assert forgotten.left == [] and f"1 copies in {folder}" in forgotten.searched


@pytest.mark.parametrize("made_anew", [True, False])
def test_the_compiled_form_of_a_version_is_searched_too(settings, monkeypatch, made_anew):
    """Where it is copied instead of made anew, as no release does, the search finds whom it holds."""
    config = load_settings(settings)
    store, name = blocklists_url(config), "20260102T000000Z-bbb"
    manifest = write_version(store, name, [Block(0, blocklist(), RULES.empty_table())], {"watermark_us": 2})
    manifest = with_compiled(store, manifest, lambda: None)
    pointers.create_manifest(store, name, manifest)

    def copied(root, other, renew):
        new, old = (versions.compiled_url(root, version) for version in (other["version"], name))
        storage.write_bytes(new, storage.read_bytes(old))
        return other | {"compiled": manifest["compiled"]}

    if not made_anew:
        monkeypatch.setattr("conrec.store.forget.with_compiled", copied)
    forgotten = forget(config, [GONE], [], [], None)
    assert "1 compiled forms of versions" in forgotten.searched
    assert forgotten.left == (
        [] if made_anew else [f"data of {versions.compiled_url(store, '20260102T000000Z.1-bbb')}"]
    )
