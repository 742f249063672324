"""Shards divide the users: of each one answers as a reader of all does, and reads no file of another."""

from __future__ import annotations

import json

import numpy as np
import pytest
from nights import ABOUT, DAY, NOW, at
from typer.testing import CliRunner

from conrec import storage
from conrec.buckets import bucket_of
from conrec.catalogue.codebook import format_semantic_ids
from conrec.cli import app
from conrec.errors import ArtefactError
from conrec.serving import versions
from conrec.serving.mirror import mirror, mirrored_version, read_state, shard_of
from conrec.serving.reader import BlocklistReader
from conrec.serving.rules_reader import RulesReader
from conrec.serving.shards import Shard
from conrec.store.forget import forget

SHARDS = ["0/3", "1/3", "2/3"]
USERS = [f"user{number}" for number in range(40)]
ITEMS = [f"item{number}" for number in range(9)]


def rows(shift=0):
    """Three items for each user, others a night later."""
    times = {"demotes_at": NOW + 7 * DAY, "expires_at": NOW + 9 * DAY}
    said = {"reason": "predicted", "similarity": 0.5, "score": 0.25, "semantic_id": "<a_0><b_1>", **times}
    return [
        {"user_id": user, "item_id": ITEMS[(number + step + shift) % 9], **said}
        for number, user in enumerate(USERS)
        for step in range(3)
    ]


@pytest.fixture
def source(tmp_path, publish_unaudited):
    """Six buckets, so that a shard of three has two."""
    return publish_unaudited(str(tmp_path / "store"), rows(), buckets=6, compiled=True)


def answers(reader, users=USERS):
    factors = [reader.multipliers(user, ITEMS).tolist() for user in users]
    return [reader.filter(user, ITEMS) for user in users], factors, [reader.blocklist(user) for user in users]


@pytest.mark.parametrize("place", ["store", "mirror"])
def test_each_user_is_in_one_shard_and_answered_there_as_by_all(source, tmp_path, place):
    whole = BlocklistReader(source, clock=lambda: at(1))
    assert {len(shown) for shown in answers(whole)[0]} == {6} and all(map(whole.holds, USERS))
    found = []
    for shard in SHARDS:
        root = source if place == "store" else str(tmp_path / shard.replace("/", "-"))
        if place == "mirror":
            mirror(source, root, shard=Shard.of(shard))
        reader = BlocklistReader(root, clock=lambda: at(1), shard=shard)
        here = [user for user in USERS if reader.holds(user)]
        assert here == [user for user in USERS if f"{bucket_of(user, 3)}/3" == shard]
        assert answers(reader, here) == answers(whole, here)
        others = [user for user in USERS if user not in here]
        assert answers(reader, others) == ([ITEMS] * len(others), [[1.0] * 9] * len(others), [[]] * len(others))
        found += here
    assert sorted(found) == sorted(USERS)


@pytest.mark.parametrize("place", ["store", "mirror"])
def test_rules_of_a_shard(world, codebook_url, publish_unaudited, tmp_path, place):
    semantic_ids = format_semantic_ids(world.trie.semantic_ids).to_pylist()
    terms = {"score": 0.9, "threshold": 0.5, "demotes_at": NOW + 7 * DAY, "expires_at": NOW + 9 * DAY}
    rules = [{"user_id": user, "semantic_id": semantic_ids[number % 9], **terms} for number, user in enumerate(USERS)]
    about = {"codebook": storage.sha256(codebook_url), "catalogue": "the first"}
    source = publish_unaudited(str(tmp_path / "store"), [], rules, buckets=6, about=about)
    mirror(source, str(tmp_path / "mirror"), shard=Shard(1, 3))
    reader = RulesReader(str(tmp_path / place), codebook_url, clock=lambda: at(1), shard="1/3")
    for number, user in enumerate(USERS):
        caught = reader.match(user, semantic_ids=world.trie.semantic_ids)
        assert caught.tolist() == (np.arange(9) == (number % 9 if reader.holds(user) else -1)).tolist()


def test_files_of_other_shards_are_not_read(source, tmp_path):
    url = versions.version_url(source, "v1")
    for name in storage.list_files(url):
        if name.endswith(".zst") or (name.endswith(".parquet") and int(name[-13:-8]) % 3 != 1):
            storage.remove(storage.join(url, name))
    mirror(source, str(tmp_path / "mirror"), shard=Shard(1, 3))
    for root in (source, str(tmp_path / "mirror")):
        reader = BlocklistReader(root, clock=lambda: at(1), shard="1/3")
        assert all((len(reader.filter(user, ITEMS)) == 6) == reader.holds(user) for user in USERS)
    with pytest.raises(ArtefactError, match="bucket-00000"):
        BlocklistReader(source, shard="0/3")


def test_a_mirror_of_a_shard_follows_its_store_and_is_taken_for_nothing_else(source, tmp_path, publish_unaudited):
    folder = str(tmp_path / "mirror")
    assert mirror(source, folder, shard=Shard(2, 3)) is True
    assert mirror(source, folder, shard=Shard(2, 3)) is False
    reader = BlocklistReader(folder, clock=lambda: at(1), shard="2/3")
    for shard, other in ((None, "all users"), ("1/3", "shard 1/3")):
        with pytest.raises(ArtefactError, match=f"mirrors shard 2/3, not {other}; open it with shard='2/3'"):
            BlocklistReader(folder, shard=shard)
        with pytest.raises(ArtefactError, match="mirrors shard 2/3; name another folder for "):
            mirror(source, folder, shard=None if shard is None else Shard.of(shard))
    publish_unaudited(source, rows(1), version="v2", buckets=9, about=ABOUT | {"watermark_us": NOW + 1})
    assert mirror(source, folder, shard=Shard(2, 3)) is True
    # Of another number of buckets, and the same users.
    users = [user for user in USERS if reader.holds(user)]
    assert reader.refresh() and reader.version == "v2" and len(users) > 5
    whole = BlocklistReader(source, clock=lambda: at(1))
    assert answers(reader, users) == answers(whole, users)
    assert all(reader.filter(user, ITEMS) == ITEMS for user in USERS if user not in users)


def test_a_mirror_of_all_is_not_taken_for_a_shard(source, tmp_path):
    folder = str(tmp_path / "mirror")
    mirror(source, folder)
    with pytest.raises(ArtefactError, match="mirrors all users, not shard 1/3; open it with shard=None"):
        BlocklistReader(folder, shard="1/3")
    with pytest.raises(ArtefactError, match="mirrors all users; name another folder for 1/3"):
        mirror(source, folder, shard=Shard(1, 3))


def test_whoever_is_forgotten_is_gone_from_a_shard(source, tmp_path):
    folder = tmp_path / "mirror"
    shard = Shard(bucket_of("user3", 3), 3)
    mirror(source, str(folder), shard=shard)
    forget(source, ["user3"])
    mirror(source, str(folder), shard=shard_of(read_state(folder)))
    reader = BlocklistReader(str(folder), clock=lambda: at(1), shard=str(shard))
    assert reader.filter("user3", ITEMS) == ITEMS
    assert b"user3\0" not in b"\0".join(path.read_bytes() for path in folder.rglob("data.user_bytes"))
    assert any(len(reader.filter(user, ITEMS)) == 6 for user in USERS)


@pytest.mark.parametrize("text", ["3-16", "3", "/", "", "a/b", "-1/3", "1.0/3", " 1/3", "1/3/5", "0/0"])
def test_what_is_no_shard_is_told(source, text):
    with pytest.raises(ArtefactError, match="write the number of the shard, from 0, and how many there are: 3/16"):
        BlocklistReader(source, shard=text)


def test_a_number_beyond_the_last_is_told():
    with pytest.raises(ArtefactError, match=r"^shard 3/3: of 3 shards the last is 2/3$"):
        Shard.of("3/3")


def test_buckets_that_do_not_make_so_many_shards_are_told(source, tmp_path):
    told = "v1: has 6 buckets, which do not make 4 shards; publish with a multiple of 4 as publish.buckets"
    with pytest.raises(ArtefactError, match=told):
        BlocklistReader(source, shard="1/4")
    with pytest.raises(ArtefactError, match=told):
        mirror(source, str(tmp_path / "mirror"), shard=Shard(1, 4))
    assert not (tmp_path / "mirror" / "MIRROR.json").exists()


def test_the_command_mirrors_a_shard(source, tmp_path):
    folder = str(tmp_path / "mirror")
    done = CliRunner().invoke(app, ["mirror", source, folder, "--shard", "1/3"])
    assert done.exit_code == 0 and mirrored_version(folder) == "v1"
    assert json.loads((tmp_path / "mirror" / "MIRROR.json").read_text())["shard"] == "1/3"
    assert BlocklistReader(folder, shard="1/3").holds("user0") == (bucket_of("user0", 3) == 1)
