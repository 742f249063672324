"""Whose rows stay: those of whom the engine would read the same, from files that are what their night says."""

import json

import numpy as np
import pyarrow as pa
import pytest
from nights import write_generated

from conrec import storage
from conrec.artefact import plan
from conrec.blocklist.kept import (
    EARLIER_ROWS,
    GENERATED_ROWS,
    ITEMS,
    KEPT,
    LESSENED,
    OUTDATED,
    PROGRESS,
    SEMANTIC_IDS,
    EarlierNight,
    EarlierRows,
    generation_basis,
    kept_rows,
    lasting,
    outdated_rows,
    row_digests,
)
from conrec.catalogue.items import semantic_id_column
from conrec.catalogue.trie import Trie
from conrec.config import DAY_US, GenerateSettings
from conrec.progress import console
from conrec.ragged import Ragged
from conrec.tables import GENERATED, PROMPTS

BASIS = {"policy": "p"}


def ragged(rows):
    values = np.array([value for row in rows for value in row], np.int32)
    return Ragged.from_lengths(values, np.array([len(row) for row in rows]))


def digests(prompts, excluded, basis=BASIS):
    return row_digests(basis, ragged(prompts), ragged(excluded))


def test_a_digest_is_of_the_tokens_their_places_what_was_liked_and_the_basis():
    prompts = [[1, 2, 3], [1, 2, 3], [1, 3, 2], [1, 2], [1, 2, 3, 0], [0, 1, 2, 3], [], [3], [1, 2, 3], [1, 2, 3]]
    excluded = [[], [], [], [], [], [], [], [], [0], [1]]
    found = digests(prompts, excluded)
    assert found.dtype == np.uint64 and found[0] == found[1]
    assert len(set(found.tolist())) == len(prompts) - 1
    assert digests(prompts, excluded, BASIS | {SEMANTIC_IDS: "others"}).tolist() == found.tolist()
    # What was liked is no part of the prompt, and no other row's matter.
    assert digests([[1, 2], []], [[], [1, 2]]).tolist() != digests([[], [1, 2]], [[1, 2], []]).tolist()
    assert digests([[7], [1, 2, 3], []], [[4], [], [2]])[1] == found[0]
    assert not np.isin(digests(prompts, excluded, {"policy": "another"}), found).any()


def test_no_two_of_many_prompts_that_differ_little_have_one_digest():
    """Places and tokens are small numbers, which a plain sum of products would mix up."""
    tokens = np.stack(np.unravel_index(np.arange(1 << 17), (1 << 6, 1 << 6, 1 << 5)), axis=1).astype(np.int32)
    rows = Ragged.from_lengths(tokens.ravel(), np.full(len(tokens), 3))
    nothing = Ragged.from_lengths(np.zeros(0, np.int32), np.zeros(len(tokens), np.int64))
    assert len(np.unique(row_digests(BASIS, rows, nothing))) == len(tokens)


def basis(files=None, ids=((0, 1), (1, 0)), **settings):
    files = {"checkpoint/model.safetensors": {"bytes": 1, "sha256": "a"}} if files is None else files
    return generation_basis(files, Trie.build(np.array(ids), 2), GenerateSettings(**settings))


def test_the_basis_is_of_what_decides_a_row_and_of_nothing_else():
    assert basis() == basis(batch_size=7, engines=2, max_users=3, min_similarity=0.5, kv_cache_gib=2)
    json.dumps(basis())
    # An item more on an ID that the catalogue has, and files of the policy that no engine reads.
    assert basis(ids=((1, 0), (0, 1), (0, 1))) == basis()
    files = {"checkpoint/model.safetensors": {"bytes": 1, "sha256": "a"}, "training.png": {"bytes": 1, "sha256": "b"}}
    assert basis(files) == basis()
    for other in (
        basis({"checkpoint/model.safetensors": {"bytes": 1, "sha256": "b"}}),
        basis(ids=((0, 1), (1, 0), (1, 1))),
        basis(beam_width=7),
        basis(engine="torch"),
        basis(use_gpu=True),
    ):
        assert sum(other[name] != value for name, value in basis().items()) == 1
        assert (lasting(other) == lasting(basis())) == (other[SEMANTIC_IDS] != basis()[SEMANTIC_IDS])


IDS = np.array([(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)])
LATER = 80 + DAY_US
BEGUN = generation_basis({}, Trie.build(IDS, 3), GenerateSettings())
"""Of a night that has not finished."""


def digested(url, digests, **more):
    """Gives the rows of a folder their digests, and columns of KEPT."""
    table = storage.read_table(url)
    place = GENERATED.get_field_index("digest")
    table = table.set_column(place, GENERATED.field(place), pa.array(digests, pa.uint64()))
    for name, values in more.items():
        table = table.append_column(KEPT.field(name), pa.array(values, KEPT.field(name).type))
    storage.remove(url)
    storage.write_table(table, storage.join(url, "part-0.parquet"))


@pytest.fixture
def night(tmp_path):
    """A finished night: two files by engines, one of rows that were kept; of its trie, and of a moment."""
    artefact = plan(str(tmp_path), "nightly", {}, {})
    write_generated(artefact.path("generated"), {"a": [1], "b": "engine failed", "c": [2], "d": [3]})
    write_generated(artefact.path("kept"), {"e": [4, 1], "f": [5]})
    digested(artefact.path("kept"), [5, 6], semantic_ids=["older", "older"], generated_us=[70, 60])
    items = pa.table({"item_id": list("opqrstu"), "semantic_id": semantic_id_column(IDS[[5, 4, 3, 0, 1, 2, 3]])})
    storage.write_table(items, artefact.path(ITEMS))
    return artefact, artefact.finish({}, 0.0)


def kept(earlier, *asked):
    return kept_rows(earlier.read(0), *asked)


def earlier_of(night, folder, ids=IDS, buckets=3):
    folder.mkdir()
    return EarlierRows.of([earlier_night(night)], Trie.build(ids, 3), buckets, folder)


def earlier_night(night):
    artefact, manifest = night
    by, files = ({SEMANTIC_IDS: "night"}, manifest["files"]) if manifest is not None else (BEGUN, None)
    return EarlierNight("v", artefact.url, 9, by, 80, files)


def test_outdated_rows_are_those_of_who_is_asked_for_less_what_they_liked_since(tmp_path):
    artefact = plan(str(tmp_path), "nightly", {}, {})
    write_generated(artefact.path("generated"), {"a": [1, 2, 3], "b": [4], "c": [2, 5], "d": [0]})
    storage.write_table(pa.table({"semantic_id": semantic_id_column(IDS)}), artefact.path(ITEMS))
    night = (artefact, artefact.finish({}, 0.0))
    earlier = earlier_of(night, tmp_path / "local", buckets=1)
    asked = {"user_id": ["c", "new", "a", "b"], "prompt": [[0]] * 4, "excluded_leaves": [[2], [1], [1, 3, 5], []]}
    asked = pa.table(asked | {"digest": [7, 8, 9, 10]}).cast(PROMPTS)
    rows = outdated_rows(earlier.read(0), asked)
    assert rows.schema == KEPT and rows["user_id"].to_pylist() == ["c", "a", "b"]
    assert rows["leaves"].to_pylist() == [[5], [2], [4]] and {*rows["digest"].to_pylist()} == {OUTDATED}
    assert rows["log_probs"].to_pylist() == [[-1.5], [-1.5], [-0.5]] and rows["verdicts"][0].as_py() == [-0.75]
    assert (
        len(outdated_rows(EarlierRows.none().read(0), asked))
        == len(outdated_rows(earlier.read(0), asked.slice(0, 0)))
        == 0
    )
    # Of tonight's IDs the first is gone: leaf 2 of that night is leaf 1 of tonight.
    fewer = earlier_of(night, tmp_path / "fewer", IDS[1:], buckets=1)
    asked = asked.set_column(2, "excluded_leaves", pa.array([[1], [], [], []], PROMPTS.field("excluded_leaves").type))
    assert outdated_rows(fewer.read(0), asked)["leaves"].to_pylist() == [[4], [0, 1, 2], [3]]


def test_rows_stay_where_the_digest_is_the_same(tmp_path):
    artefact = plan(str(tmp_path), "nightly", {}, {})
    write_generated(artefact.path("generated"), {"a": [1], "b": [2], "c": [3]})
    digested(artefact.path("generated"), [5, 6, 2**64 - 1])
    storage.write_table(pa.table({"semantic_id": semantic_id_column(IDS)}), artefact.path(ITEMS))
    earlier = earlier_of((artefact, artefact.finish({}, 0.0)), tmp_path / "local", buckets=1)
    users, digests = pa.array(["c", "new", "a", "b"]), np.array([2**64 - 1, 5, 5, 7], np.uint64)
    rows, same = kept(earlier, users, digests, "night", LATER, 1.0)
    assert same.tolist() == [True, False, True, False]
    assert rows.schema == KEPT and rows["user_id"].to_pylist() == ["c", "a"]
    assert rows["leaves"].to_pylist() == [[3], [1]]
    assert set(rows["semantic_ids"].to_pylist()) == {"night"} and set(rows["generated_us"].to_pylist()) == {80}
    nothing, nobody = kept(EarlierRows.none(), pa.array(["a"]), np.zeros(1, np.uint64), "night", 0, 1.0)
    assert len(nothing) == 0 and not nobody.any()


def test_rows_of_other_ids_stay_for_a_while_less_the_ids_that_are_gone(night, tmp_path):
    """Tonight (0, 1), which is leaf 1, is gone and (1, 2) has come: leaf 4, (2, 0), stays leaf 4, 5 is 5."""
    tonight = np.array([(0, 0), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1)])
    users, digests = pa.array(["e", "f"]), np.array([5, 6], np.uint64)
    earlier = earlier_of(night, tmp_path / "local", tonight, buckets=1)
    rows, same = kept(earlier, users, digests, "tonight", 80, 1.0)
    assert same.tolist() == [True, True] and rows["leaves"].to_pylist() == [[4], [5]]
    before = storage.read_table(night[0].path("kept"))
    for name in ("log_probs", "verdicts"):
        assert rows[name].to_pylist() == [before[name].to_pylist()[0][:1], before[name].to_pylist()[1]]
    assert rows["generated_us"].to_pylist() == [70, 60] and rows["semantic_ids"].to_pylist() == [LESSENED, "older"]
    # Once the ID is back, whoever lacks it is asked again in time, as for any new one.
    for days, stays in ((0.5, True), (1.0, False)):
        later = kept_rows(rows, users, digests, "older", 70 + round(days * DAY_US), 1.0)[1]
        assert later.tolist() == [stays, True]
    assert kept(earlier, users, digests, "tonight", 60 + DAY_US // 2, 1.0)[1].all()
    assert kept(earlier, users, digests, "tonight", 60 + DAY_US, 1.0)[1].tolist()[1] is False
    assert not kept(earlier, users, digests, "tonight", LATER, 1.0)[1].any()
    assert not kept(earlier, users, digests, "tonight", 80, 0.0)[1].any()
    # A row that has lost more than half of its IDs says too little.
    fewer = earlier_of(night, tmp_path / "fewer", tonight[:3], buckets=1)
    assert kept(fewer, users, digests, "tonight", 80, 1.0)[1].tolist() == [False, False]
    # Among the IDs that a row was generated among it stays for good.
    assert kept(earlier, users, digests, "older", LATER, 1.0)[1].all()


def test_rows_of_one_night_end_over_the_second_half_of_their_days_and_never_in_step_again():
    """Thirty nights of users who do nothing, while semantic IDs change every day."""
    count, nights = 1_000, []
    columns = {"user_id": [f"u{user}" for user in range(count)], "leaves": [[0]] * count, "error": [None] * count}
    numbers = {"log_probs": [[-1.0]] * count, "verdicts": [[0.0]] * count, "digest": [7] * count}
    columns |= numbers | {"semantic_ids": ["first"] * count}
    names, digests, generated = pa.array(columns["user_id"]), np.full(count, 7, np.uint64), np.zeros(count, np.int64)
    for day in range(1, 31):
        known = pa.table(columns | {"generated_us": generated}).select(KEPT.names).cast(KEPT)
        _, same = kept_rows(known, names, digests, f"of day {day}", day * DAY_US, 7.0)
        ages = day - generated // DAY_US
        assert (ages[same] < 7).all() and (ages[~same] > 3).all()
        generated[~same] = day * DAY_US
        nights.append(int((~same).sum()))
    assert nights[:3] == [0, 0, 0] and max(nights) < 0.35 * count and min(nights[9:]) > 0.1 * count


def users(night, folder):
    earlier = earlier_of(night, folder)
    return sorted(user for bucket in range(3) for user in earlier.read(bucket)["user_id"].to_pylist())


def test_rows_that_another_release_kept_are_generated_again(night, tmp_path):
    artefact, _ = night
    write_generated(artefact.path("kept"), {"e": [4, 1], "f": [5]})
    assert users((artefact, artefact.finish({}, 0.0)), tmp_path / "local") == ["a", "c", "d"]


def test_rows_of_engines_and_kept_ones_are_believed_and_errors_are_not(night, tmp_path):
    assert users(night, tmp_path / "local") == ["a", "c", "d", "e", "f"]
    assert EarlierRows.none().read(0).schema == KEPT


@pytest.mark.parametrize("harm", ["flipped", "cut", "another", "missing", "unlisted"])
def test_a_file_that_is_not_what_its_night_says_is_not_believed(night, tmp_path, harm):
    artefact, files = night[0], night[1]["files"]
    url = artefact.path("generated", "part-1.parquet")
    data = bytearray(storage.read_bytes(url))
    if harm == "flipped":
        data[len(data) // 2] ^= 1
    elif harm == "cut":
        del data[-1]
    elif harm == "another":
        data = bytearray(storage.read_bytes(artefact.path("kept", "part-0.parquet")))
    storage.write_bytes(url, bytes(data))
    if harm == "missing":
        storage.remove(url)
    if harm == "unlisted":
        files.pop("generated/part-1.parquet")
    with console.capture() as said:
        assert users(night, tmp_path / "local") == ["a", "e", "f"]
    assert ("generated/part-1.parquet: " in said.get()) == (harm != "unlisted")


def test_without_the_items_of_their_night_no_rows_are_believed(night, tmp_path):
    storage.remove(night[0].path(ITEMS))
    with console.capture() as said:
        assert users(night, tmp_path / "local") == []
    assert "items.parquet: the file is missing" in said.get()


@pytest.fixture
def begun(night):
    """A night that is being generated: `a` and `b` are committed, `c` and `d` are being written."""
    artefact, _ = night
    storage.remove(artefact.path("artefact.json"))
    storage.remove(artefact.path("generated"))
    for name, rows in {"x_0-0": {"a": [1], "b": [5, 0]}, "x_1-0": {"c": [2]}, "x_2-0": {"d": [3]}}.items():
        write_generated(artefact.path("written"), rows)
        digested(artefact.path("written"), [7] * len(rows))
        table = storage.read_table(artefact.path("written"))
        storage.write_table(table, artefact.path(GENERATED_ROWS, f"{name}.parquet"))
        storage.remove(artefact.path("written"))
    for name in ("x_0.parquet", "x_1.pending.parquet"):
        storage.write_bytes(artefact.path(PROGRESS, name), b"users")
    write_generated(artefact.path(EARLIER_ROWS), {"a": [4], "c": [4], "d": [4]})
    digested(artefact.path(EARLIER_ROWS), [OUTDATED] * 3, semantic_ids=["older"] * 3, generated_us=[70] * 3)
    return artefact, None


def test_of_a_night_that_is_being_generated_committed_files_and_those_of_its_plan_are_believed(begun, tmp_path):
    earlier = earlier_of(begun, tmp_path / "local", buckets=1)
    rows = earlier.read(0).to_pylist()
    assert [row["user_id"] for row in rows] == ["a", "b", "e", "f", "a", "c", "d"]
    assert [row["digest"] == OUTDATED for row in rows] == [False] * 4 + [True] * 3
    assert {row["semantic_ids"] for row in rows[:2]} == {BEGUN[SEMANTIC_IDS]} and rows[0]["generated_us"] == 80
    # Of a user's rows the first one counts.
    stays, same = kept(earlier, pa.array(["a", "d"]), np.array([7, 7], np.uint64), BEGUN[SEMANTIC_IDS], LATER, 1.0)
    assert same.tolist() == [True, False] and stays["leaves"].to_pylist() == [[1]]


def test_a_finished_night_that_goes_on_has_its_files_and_those_committed_since(begun, tmp_path):
    artefact, _ = begun
    storage.remove(artefact.path(EARLIER_ROWS))
    manifest = artefact.finish({}, 0.0)
    manifest["files"] = {name: entry for name, entry in manifest["files"].items() if "x_" not in name}
    assert users((artefact, manifest), tmp_path / "local") == ["a", "b", "e", "f"]


@pytest.mark.parametrize("harm", ["torn", "leaf", "missing", "items", "other items"])
def test_what_harmed_a_night_that_did_not_finish_is_said_and_generated_again(begun, tmp_path, harm, monkeypatch):
    artefact, _ = begun
    url, believed = artefact.path(GENERATED_ROWS, "x_0-0.parquet"), ["a", "c", "d", "e", "f"]
    if harm == "torn":  # a task that Ray gives to another node writes its file once more
        storage.write_bytes(url, storage.read_bytes(url)[:-9])
    elif harm == "leaf":
        write_generated(artefact.path("written"), {"a": [6], "b": [5]})
        storage.write_bytes(url, storage.read_bytes(artefact.path("written", "part-0.parquet")))
    elif harm == "missing":  # garbage collection takes it after it was seen
        read = storage.read_bytes
        monkeypatch.setattr(storage, "read_bytes", lambda one: read(one + ".gone" if one == url else one))
    else:
        believed = []
        ids = semantic_id_column(IDS[1:])
        storage.remove(artefact.path(ITEMS))
        if harm == "other items":
            storage.write_table(pa.table({"semantic_id": ids}), artefact.path(ITEMS))
    with console.capture() as said:
        assert users(begun, tmp_path / "local") == believed
    assert "generated again" in " ".join(said.get().split())


def test_of_several_nights_the_newest_row_of_a_user_counts_one_of_an_earlier_prompt_after_all_others(
    night, begun, tmp_path
):
    """The older one, of fewer IDs, has rows of `a` and `c` by the prompts of that night."""
    older = plan(str(tmp_path), "nightly", {"older": True}, {})
    write_generated(older.path("generated"), {"a": [0], "c": [1, 4], "g": [2]})
    digested(older.path("generated"), [7, 8, 9])
    storage.write_table(pa.table({"semantic_id": semantic_id_column(IDS[1:])}), older.path(ITEMS))
    nights = [earlier_night(begun), earlier_night((older, older.finish({}, 0.0)))]
    (tmp_path / "local").mkdir()
    known = EarlierRows.of(nights, Trie.build(IDS[:5], 3), 1, tmp_path / "local").read(0)
    names, digests = pa.array(["a", "c", "g"]), np.array([7, 8, 9], np.uint64)
    rows, same = kept_rows(known, names, digests, "tonight", 90, 1.0)
    assert same.all() and rows["leaves"].to_pylist() == [[1], [2], [3]]
    assert known.filter(pa.compute.equal(known["user_id"], "c"))["leaves"].to_pylist() == [[2, -1], [4]]
