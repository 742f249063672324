"""An export into a real Redis: all keys of a version, or the pointer stays where it was."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from datetime import UTC, datetime

import pytest
import redis
from stores import redis_server

from conrec import storage
from conrec.errors import ArtefactError, ConfigError, PublishError
from conrec.serving import redis as module
from conrec.serving import versions
from conrec.serving.redis import PASSWORD, Exported, Keys, export_redis

pytestmark = pytest.mark.long

KEYS = Keys("conrec")
DAY = 86_400_000_000
NOW = int(datetime.now(UTC).timestamp() * 1e6)
USERS = ["", "a", "a:b", "*", "line\nbreak", "nul\0", "ü", "х", *(f"user{number}" for number in range(40))]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture
def client(url):
    client = redis.Redis.from_url(url)
    client.flushall()
    yield client
    client.close()


def row(user, item, reason="predicted", days=7.0):
    return {
        "user_id": user,
        "item_id": item,
        "reason": reason,
        "similarity": 0.5,
        "score": 0.25,
        "semantic_id": None,
        "demotes_at": NOW + round(days * DAY),
        "expires_at": NOW + round((days + 7) * DAY),
    }


@pytest.fixture
def publish(tmp_path, publish_unaudited):
    return lambda rows, version="v1": publish_unaudited(str(tmp_path / "store"), rows, version=version)


def held(client):
    """Everything in Redis as text."""
    return sorted(key.decode() for key in client.scan_iter("*"))


def test_every_row_is_there_until_it_stops_to_block(publish, client, url):
    rows = [row(user, f"item{n}", days=1 + n + n * 1e-6) for user in USERS for n in range(3)]
    rows += [row("a", "own", "explicit", 80), row("a", "past", days=-1), row("gone", "past", days=-1)]
    rows += [row("a", "odd", "weather"), row("odd", "odd", "weather")]
    root = publish(rows)
    assert export_redis(root, url, "conrec") == Exported("v1", len(USERS), 3 * len(USERS) + 1, 0)
    assert client.get(KEYS.pointer) == b"v1"
    assert held(client) == sorted([KEYS.pointer, KEYS.owner, *(KEYS.of_user("v1", user) for user in USERS)])
    for user in USERS:
        ends = dict(client.zrange(KEYS.of_user("v1", user), 0, -1, withscores=True))
        expected = {f"item{n}".encode(): NOW + round((1 + n + n * 1e-6) * DAY) for n in range(3)}
        if user == "a":
            expected[b"own"] = NOW + 80 * DAY
        assert ends == expected
        left_ms = client.pttl(KEYS.of_user("v1", user))
        assert abs(left_ms - (max(ends.values()) / 1000 - time.time() * 1000)) < 5000


def test_many_rows_go_in_pieces_that_split_no_user(publish, client, url, monkeypatch):
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 5)
    rows = [row(user, f"item{n}", days=1 + n) for number, user in enumerate(USERS) for n in range(number % 9)]
    export_redis(publish(rows), url, "conrec")
    for number, user in enumerate(USERS):
        assert client.zcard(KEYS.of_user("v1", user)) == number % 9


def test_the_next_version_takes_the_place_of_the_one_before(publish, client, url):
    client.set("conrecord:x:y", "not ours")
    root = publish([row(user, "x") for user in USERS])
    export_redis(root, url, "conrec")
    publish([row("a", "y")], "v2")
    assert export_redis(root, url, "conrec") == Exported("v2", 1, 1, len(USERS))
    assert held(client) == [KEYS.pointer, KEYS.owner, KEYS.of_user("v2", "a"), "conrecord:x:y"]
    assert export_redis(root, url, "conrec") == Exported("v2", 1, 1, 0)


def test_one_that_fails_half_way_changes_nothing_and_the_next_converges(publish, client, url):
    root = publish([row(user, "x") for user in USERS])
    export_redis(root, url, "conrec")
    publish([row(user, "y") for user in USERS], "v2")
    broken = storage.join(root, "versions", "v2", "data", "bucket-00002.parquet")
    whole = storage.read_bytes(broken)
    storage.write_bytes(broken, whole[:-1])
    with pytest.raises(ArtefactError, match="damaged"):
        export_redis(root, url, "conrec")
    assert client.get(KEYS.pointer) == b"v1"
    assert all(client.zcard(KEYS.of_user("v1", user)) == 1 for user in USERS)
    assert 0 < len([key for key in held(client) if ":v2:" in key]) < len(USERS)
    storage.write_bytes(broken, whole)
    assert export_redis(root, url, "conrec").removed == len(USERS)
    assert held(client) == sorted([KEYS.pointer, KEYS.owner, *(KEYS.of_user("v2", user) for user in USERS)])


def test_one_that_is_killed_half_way_changes_nothing_and_the_next_converges(publish, client, url):
    root = publish([row(user, "x") for user in USERS])
    export_redis(root, url, "conrec")
    publish([row(user, "y") for user in USERS], "v2")
    code = (
        "import os, signal\n"
        "from conrec.serving import redis as module\n"
        "write = module._write\n"
        "module._write = lambda *a: (write(*a), os.kill(os.getpid(), signal.SIGKILL))\n"
        f"module.export_redis({root!r}, {url!r}, 'conrec')\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, env=os.environ).returncode == -9
    assert client.get(KEYS.pointer) == b"v1"
    assert all(client.zcard(KEYS.of_user("v1", user)) == 1 for user in USERS)
    assert any(":v2:" in key for key in held(client))
    export_redis(root, url, "conrec")
    assert held(client) == sorted([KEYS.pointer, KEYS.owner, *(KEYS.of_user("v2", user) for user in USERS)])


def test_a_store_that_moves_on_meanwhile_is_noticed(publish, client, url, monkeypatch):
    root = publish([row(user, "x") for user in USERS])
    write = module._write

    def move(*arguments):
        if versions.read_pointer(root)["version"] == "v1":
            publish([row("a", "y")], "v2")
        return write(*arguments)

    monkeypatch.setattr(module, "_write", move)
    with pytest.raises(PublishError, match="another version was published during the export of v1"):
        export_redis(root, url, "conrec")
    assert client.get(KEYS.pointer) is None
    assert export_redis(root, url, "conrec").version == "v2"
    assert held(client) == [KEYS.pointer, KEYS.owner, KEYS.of_user("v2", "a")]


def test_a_second_export_is_refused(publish, client, url):
    root = publish([row("a", "x")])
    other = redis.Redis.from_url(url, client_name="conrec-export:conrec", single_connection_client=True)
    other.ping()
    with pytest.raises(PublishError, match="another export is running"):
        export_redis(root, url, "conrec")
    other.close()
    export_redis(root, url, "conrec")


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ("http://host", ConfigError, "write redis://host:6379/0"),
        ("redis://[abc", ConfigError, "write redis://host:6379/0"),
        ("redis://me@localhost:1/0", PublishError, "Redis at localhost:1: "),
        ("redis://me:secret@localhost:1/0", ConfigError, "set REDIS_PASSWORD"),
        ("redis://localhost:1/0?password=secret", ConfigError, "set REDIS_PASSWORD"),
        ("unix:///nowhere.sock", PublishError, "Redis at /nowhere.sock"),
    ],
)
def test_a_url_that_leads_nowhere(publish, wrong, error, message):
    with pytest.raises(error, match=message) as caught:
        export_redis(publish([row("a", "x")]), wrong, "conrec")
    assert "secret" not in str(caught.value)


def test_another_prefix_is_another_tenant(publish, publish_unaudited, client, url, tmp_path):
    mine, theirs = publish([row("a", "x"), row("b", "x")]), str(tmp_path / "theirs")
    publish_unaudited(theirs, [row("a", "y")])
    export_redis(mine, url, "conrec")
    export_redis(theirs, url, "conrec.theirs")
    before = held(client)
    assert sorted(client.zrange("conrec.theirs:v1:a", 0, -1)) == [b"y"]
    publish([row("a", "z")], "v2")
    assert export_redis(mine, url, "conrec") == Exported("v2", 1, 1, 2)
    assert export_redis(theirs, url, "conrec.theirs").removed == 0
    gone = {"conrec:v1:a", "conrec:v1:b"}
    assert held(client) == sorted({*before, "conrec:v2:a"} - gone)


def test_the_prefix_of_another_store_is_refused_and_nothing_of_it_touched(
    publish, publish_unaudited, client, url, tmp_path
):
    export_redis(publish([row("a", "x")]), url, "conrec")
    theirs = publish_unaudited(str(tmp_path / "theirs"), [row("a", "y")])
    before = held(client)
    with pytest.raises(PublishError, match=r"publish.redis_prefix = 'conrec' are those of .*store, and this is .*the"):
        export_redis(theirs, url, "conrec")
    assert held(client) == before
    assert client.get(KEYS.owner).decode() == str(tmp_path / "store")
    client.delete(KEYS.owner)  # the store has moved, says the person
    assert export_redis(theirs, url, "conrec").rows == 1


def test_the_password_comes_from_the_environment(publish, client, url, monkeypatch):
    root = publish([row("a", "x")])
    client.config_set("requirepass", "secret")
    try:
        with pytest.raises(PublishError, match=f"set {PASSWORD}"):
            export_redis(root, url, "conrec")
        monkeypatch.setenv(PASSWORD, "wrong")
        with pytest.raises(PublishError, match=f"set {PASSWORD}") as caught:
            export_redis(root, url, "conrec")
        assert "wrong" not in str(caught.value).replace("WRONGPASS", "")
        monkeypatch.setenv(PASSWORD, "secret")
        assert export_redis(root, url, "conrec").rows == 1
    finally:
        client.config_set("requirepass", "")


def test_nothing_published(tmp_path, url):
    with pytest.raises(ArtefactError, match="nothing is published"):
        export_redis(str(tmp_path), url, "conrec")
