"""A system from outside through the commands: what is written for it, and its row beside the floors and the method."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from conrec import cli, storage
from conrec.config import Config, load_settings
from conrec.evaluation.document import CATCH
from conrec.evaluation.metrics import MEASURES
from conrec.evaluation.systems import FULL, NAMES
from conrec.evaluation.world import World
from conrec.feedback.anchors import evaluation_anchors
from conrec.policy.model import build_model, save_checkpoint
from conrec.stages.anchors import write_anchors
from conrec.stages.artefacts import Artefacts
from conrec.stages.catalogue import make_catalogue
from conrec.stages.inputs import read_events
from conrec.stages.new_items import known_items, load_catalogue
from conrec.stages.run import run_stage
from conrec.stages.systems import load_world, systems
from conrec.stages.train import upload_folder, write_rows

pytestmark = pytest.mark.long

HOME = Path(__file__).parents[1]
CUT = datetime(2026, 1, 1, tzinfo=UTC)
ITEMS = 90
SETTINGS = """
root = "{folder}/root"
[interactions]
path = "{folder}/log.parquet"
[items]
path = "{folder}/items.parquet"
[timeline]
cut = 2026-01-01T00:00:00Z
horizon_days = 2
validation_days = 3
validation_share = 0.5
min_history = 2
[embedding]
sources = ["column"]
[quantizer]
levels = 2
codes = 4
iterations = 3
[model]
hidden_size = 32
layers = 1
heads = 1
intermediate_size = 32
[grpo]
stages = []
[generate]
engine = "torch"
beam_width = 4
[guardrails]
max_catalogue_share = 1.0
[calibration]
alpha = 0.5
strata = []
[evaluation]
resamples = 20
responsiveness_anchors = 5
"""


def write_log(folder: Path, last_day: float, items: int = ITEMS) -> None:
    """Forty users who reject, like or are shown what is more and less popular, from eight days before the cut on."""
    random, count = np.random.default_rng(0), 3000
    users, days = random.integers(0, 40, count), random.uniform(-8, last_day, count)
    table = {
        "user_id": [f"u{user:02d}" for user in users],
        "item_id": [f"i{item:02d}" for item in (items * random.random(count) ** 2).astype(int)],
        "timestamp": pa.array([CUT + timedelta(days=day) for day in days], pa.timestamp("us", "UTC")),
        "feedback": random.choice(["negative", "positive", "neutral"], count, p=[0.4, 0.3, 0.3]).tolist(),
    }
    storage.write_table(pa.table(table), f"{folder}/log.parquet")


def write_items(folder: Path, first: int = 0, last: int = ITEMS) -> None:
    numbers = np.arange(first, last)
    table = {
        "item_id": [f"i{item:02d}" for item in numbers],
        "text": [f"item {item}" for item in numbers],
        "category": [f"c{item % 5}" for item in numbers],
        "embedding": pa.array(np.random.default_rng(0).normal(size=(len(numbers), 4)).tolist(), pa.list_(pa.float32())),
    }
    storage.write_table(pa.table(table), f"{folder}/items.parquet")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A log with two windows after the cut, items, settings; nothing is fitted or trained."""
    write_log(tmp_path, 4)
    write_items(tmp_path)
    (tmp_path / "my.toml").write_text(SETTINGS.format(folder=tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def conrec(*arguments: Any) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


def evaluated(*arguments: Any, systems: str = "floors") -> dict[str, Any]:
    """metrics.json of the newest evaluation."""
    assert conrec("evaluate", "--config", "my.toml", "--systems", systems, *arguments) == 0
    paths = sorted(Path("root/evaluation").glob("*/metrics.json"), key=lambda path: path.stat().st_mtime_ns)
    document: dict[str, Any] = json.loads(paths[-1].read_text())
    return document


def floors(world: World) -> Iterator[tuple[str, pa.Table]]:
    """The lists of every floor, as a system from outside would write them."""
    (spec,) = systems(Artefacts(world.config))
    for name, row in spec.rows(world).items():
        items, scores = row.answer.items, row.answer.scores
        anchor, place = np.nonzero((items >= 0) & world.measured[:, None])
        # No order of rows or items may help.
        mixed = np.random.default_rng(1).permutation(len(anchor))
        anchor, place = anchor[mixed], place[mixed]
        columns = {
            "user_id": world.events.users.take(pa.array(world.anchors.users[anchor])),
            "anchor_time": pa.array(world.anchors.times[anchor], pa.timestamp("us", "UTC")),
            "item_id": world.items.item_ids.take(pa.array(items[anchor, place])),
            "score": pa.array(scores[anchor, place], pa.float64()),
        }
        yield name, pa.table(columns)


@pytest.mark.parametrize("most", [None, 30], ids=["all anchors", "a sample of them"])
def test_the_lists_of_a_floor_in_a_file_are_the_row_of_that_floor(folder: Path, most: int | None) -> None:
    sampled = [] if most is None else ["--set", f"evaluation.max_anchors={most}"]
    config = load_settings("my.toml", ["evaluation.systems=floors", *sampled[1:]])
    world = load_world(Artefacts(config), encoded=False)
    chosen = ("random", "most rejected category", "EASE on negatives", "exposure x rejection rate^2")
    files: list[str] = []
    for number, (name, table) in enumerate(floors(world)):
        if name in chosen:
            parquet.write_table(table, f"{number}.parquet")
            files += ["--predictions", f"copy of {number}={number}.parquet"]
    document = evaluated(*files, *sampled)
    assert document["about"]["anchors"] == world.measured.sum() and world.task.later
    copies = {name: row for name, row in document["systems"].items() if row["group"] == "outside"}
    assert len(copies) == len(chosen)
    for name, (copy, row) in zip(chosen, copies.items(), strict=True):
        of_floor = document["systems"][name]["figures"]
        assert {measure: row["figures"][measure] for measure in (*MEASURES, CATCH)} == {
            measure: of_floor[measure] for measure in (*MEASURES, CATCH)
        }
        assert "likelihood" not in row["figures"]
        # Lists that are not cut off are the row itself.
        line = document["lines"][f"{copy}, by score"]
        assert len(line) == 10 and (line[-1]["FHR"], line[-1]["FPH"]) == (row["figures"]["FHR"], row["figures"]["FPH"])
        assert line[0]["FHR"]["value"] <= line[-1]["FHR"]["value"]
    assert document["catch_curves"]["copy of 9"] == document["catch_curves"]["exposure x rejection rate^2"]
    strongest = "exposure x rejection rate^1"
    assert document["differences"].keys() == {f"{copy} - {strongest}" for copy in copies}
    assert not (Path("root/policy").exists() or Path("root/catalogue").exists())


@pytest.mark.parametrize("most", [None, 30], ids=["all anchors", "a sample of them"])
def test_the_anchors_written_are_those_that_are_measured_and_no_other(folder: Path, most: int | None, capsys) -> None:
    sampled = [] if most is None else ["--set", f"evaluation.max_anchors={most}"]
    assert conrec("anchors", "--config", "my.toml", "--out", "anchors", *sampled) == 0
    said = capsys.readouterr().out
    answers = parquet.read_table("anchors/anchors.parquet")
    assert f"anchors: {len(answers)} anchors to rank items for, " in said and "lie after timeline.cut" in said
    config = load_settings("my.toml", sampled[1:])
    events = read_events(config, parquet.read_table("items.parquet")["item_id"].combine_chunks())
    every = evaluation_anchors(events, config.timeline)
    pairs = set(zip(events.users.take(pa.array(every.users)).to_pylist(), every.times.tolist(), strict=True))
    found = set(zip(answers["user_id"].to_pylist(), answers["anchor_time"].cast(pa.int64()).to_pylist(), strict=True))
    assert len(found) == len(answers)
    assert found == pairs if most is None else found < pairs
    answer = answers.append_column("item_id", pa.array(["i00"] * len(answers)))
    answer = answer.append_column("score", pa.array([1.0] * len(answers)))
    parquet.write_table(answer, "all.parquet")
    document = evaluated("--predictions", "mine=all.parquet", *sampled)
    assert document["about"]["anchors"] == len(answers)
    note = f"{len(answers)} of {len(answers)} anchors have fewer than 20 items"
    assert document["systems"]["mine"]["note"] == note
    parquet.write_table(answer.slice(1), "one less.parquet")
    files = ("--config", "my.toml", "--systems", "floors", "--predictions", "mine=one less.parquet")
    assert conrec("evaluate", *files, *sampled) == 2
    assert "one less.parquet: no row for user 'u" in capsys.readouterr().err
    if most is not None:
        # Answers to all anchors are no answers to a sample.
        files = ("--config", "my.toml", "--systems", "floors", "--predictions", "mine=all.parquet")
        assert conrec("evaluate", *files, "--set", "evaluation.max_anchors=10") == 2
        assert "answer the anchors that conrec anchors writes with these settings" in capsys.readouterr().err


def test_nothing_written_lies_after_the_cut_but_the_histories_of_later_anchors(folder: Path) -> None:
    assert conrec("anchors", "--config", "my.toml", "--out", "anchors") == 0
    later = CUT + timedelta(days=2)
    ends = {"events": CUT, "histories/2026-01-01T00-00-00Z": CUT, "histories/2026-01-03T00-00-00Z": later}
    files = {str(path.relative_to("anchors")).removesuffix(".parquet") for path in Path("anchors").rglob("*.parquet")}
    assert files == {*ends, "items", "anchors", "candidates", "pairs"}
    columns = {name: parquet.read_schema(f"anchors/{name}.parquet").names for name in files}
    assert columns["items"] == ["item_id", "text", "category"]
    assert columns["anchors"] == ["user_id", "anchor_time"]
    assert columns["pairs"] == columns["candidates"] == ["user_id", "anchor_time", "item_id"]
    log = parquet.read_table("log.parquet").to_pylist()
    for name, end in ends.items():
        table = parquet.read_table(f"anchors/{name}.parquet")
        users = set(table["user_id"].to_pylist())
        known = sum(row["timestamp"] <= end and row["user_id"] in users for row in log)
        assert len(table) == known > 0 and max(table["timestamp"].to_pylist()) <= end, name
    pairs = parquet.read_table("anchors/pairs.parquet")
    assert pairs.equals(pairs.sort_by([("user_id", "ascending"), ("item_id", "ascending")])) and len(pairs) > 20


def test_outcomes_that_are_exchanged_leave_every_byte_as_it_is(folder: Path) -> None:
    """One window. Among what a user answers first in it, a rejection and a like change places."""
    write_log(folder, 2)
    config = load_settings("my.toml")
    write_anchors(config, "anchors")
    pairs = {(row["user_id"], row["item_id"]) for row in parquet.read_table("anchors/pairs.parquet").to_pylist()}
    log = parquet.read_table("log.parquet")
    rows = log.to_pylist()
    answered: dict[tuple[str, str], list[int]] = {}
    for place, row in enumerate(rows):
        if row["timestamp"] > CUT and (row["user_id"], row["item_id"]) in pairs and row["feedback"] != "neutral":
            answered.setdefault((row["user_id"], row["item_id"]), []).append(place)
    said = [row["feedback"] for row in rows]
    turned = list(said)
    exchanged = 0
    for user in {user for user, _ in pairs}:
        single = [places[0] for (one, _), places in sorted(answered.items()) if one == user and len(places) == 1]
        kinds = {said[place]: place for place in single}
        if len(kinds) == 2:
            exchanged += 1
            turned[kinds["negative"]], turned[kinds["positive"]] = "positive", "negative"
    assert exchanged > 5
    storage.write_table(log.set_column(3, "feedback", pa.array(turned)), f"{folder}/log.parquet")
    write_anchors(config, "other")
    names = sorted(str(path.relative_to("anchors")) for path in Path("anchors").rglob("*.parquet"))
    assert names == sorted(str(path.relative_to("other")) for path in Path("other").rglob("*.parquet"))
    # Among candidates hides what is rejected next, so other rejections are other questions.
    names.remove("candidates.parquet")
    for name in names:
        assert (Path("anchors") / name).read_bytes() == (Path("other") / name).read_bytes(), name


def test_histories_of_other_anchors_are_not_left_beside_the_new_ones(folder: Path, capsys) -> None:
    arguments = ("anchors", "--config", "my.toml", "--out", "anchors")
    assert conrec(*arguments) == 0 and conrec(*arguments) == 0
    assert conrec(*arguments, "--set", "timeline.horizon_days=4") == 2
    assert "2026-01-03T00-00-00Z.parquet of other anchors; name another folder" in capsys.readouterr().err


def test_the_example_of_the_page_is_a_floor(folder: Path) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", (HOME / "docs/predictions.md").read_text(), re.S | re.M)
    assert len([line for line in code.splitlines() if line]) <= 10
    assert conrec("anchors", "--config", "my.toml", "--out", "anchors") == 0
    exec(compile(code, "predictions.md", "exec"), {})
    document = evaluated("--predictions", "mine=ranked.parquet", "--predictions", "told=pairs.parquet")
    mine, floor = (document["systems"][name]["figures"] for name in ("mine", "most rejected"))
    assert {measure: mine[measure] for measure in MEASURES} == {measure: floor[measure] for measure in MEASURES}
    told = document["published"]
    assert told["systems"].keys() == {"told"} and "told" not in document["systems"]
    assert sum(told["pairs"].values()) == len(parquet.read_table("anchors/pairs.parquet"))
    figures = told["systems"]["told"]
    assert 0.3 < figures["auc"]["value"] < 0.7 and figures["auc"]["low"] < figures["auc"]["high"]
    (table,) = [path.read_text() for path in Path("root/evaluation").glob("*/table.md")]
    assert "| told | " in table and "| mine | outside | " in table and "calibrated thresholds" not in table
    (report,) = [path.read_text() for path in Path("root/evaluation").glob("*/report.html")]
    assert "systems from outside" in report and "What the lists spare" not in report


def test_scores_that_know_the_outcome_tell_all_pairs_apart(folder: Path) -> None:
    """And so the direction of scores, and which score belongs to which pair."""
    world = load_world(Artefacts(load_settings("my.toml")), encoded=False)
    task = write_anchors(load_settings("my.toml"), "anchors")
    pairs = parquet.read_table("anchors/pairs.parquet")
    liked = {
        (row["user_id"], row["item_id"])
        for row in parquet.read_table("log.parquet").to_pylist()
        if row["feedback"] == "positive" and CUT < row["timestamp"] <= CUT + timedelta(days=2)
    }
    score = [float((user, item) not in liked) for user, _, item in map(dict.values, pairs.to_pylist())]
    assert 0 < sum(score) < len(score) == len(task.pair_items) == len(world.task.pair_items)
    parquet.write_table(pairs.append_column("score", pa.array(score)).sort_by("item_id"), "told.parquet")
    figures = evaluated("--predictions", "told=told.parquet")["published"]["systems"]["told"]
    assert figures["auc"]["value"] == figures["within_user_auc"]["value"] == figures["catch_at"]["0.01"]["value"] == 1


def test_candidates_that_are_picked_right_are_a_row_with_nothing_else(folder: Path) -> None:
    world = load_world(Artefacts(load_settings("my.toml")), encoded=False)
    write_anchors(load_settings("my.toml"), "anchors")
    candidates, sets = parquet.read_table("anchors/candidates.parquet"), world.candidates
    rows = np.flatnonzero(world.measured & (sets.answer >= 0))
    users = world.events.users.take(pa.array(world.anchors.users[rows])).to_pylist()
    items = world.items.item_ids.take(pa.array(sets.items[rows, sets.answer[rows]])).to_pylist()
    right = set(zip(users, world.anchors.times[rows].tolist(), items, strict=True))
    times = candidates["anchor_time"].cast(pa.int64()).to_pylist()
    asked = zip(candidates["user_id"].to_pylist(), times, candidates["item_id"].to_pylist(), strict=True)
    score = np.array([float(one in right) for one in asked])
    assert 0 < score.sum() == len(rows) < len(score)
    for name, scores in (("right", score), ("wrong", -score)):
        parquet.write_table(candidates.append_column("score", pa.array(scores)), f"{name}.parquet")
    systems = evaluated("--predictions", "right=right.parquet", "--predictions", "wrong=wrong.parquet")["systems"]
    assert [systems[name]["figures"].keys() for name in ("right", "wrong")] == [{"likelihood"}] * 2
    assert systems["right"]["figures"]["likelihood"]["value"] == 1 > systems["wrong"]["figures"]["likelihood"]["value"]
    assert [row["group"] for row in systems.values()] == ["floor"] * (len(systems) - 2) + ["outside"] * 2


def test_answers_count_by_their_content_and_their_name(folder: Path) -> None:
    config = load_settings("my.toml", ["evaluation.systems=floors"])
    world = load_world(Artefacts(config), encoded=False)
    table = next(table for name, table in floors(world) if name == "random")
    parquet.write_table(table, "a.parquet")
    evaluated("--predictions", "mine=a.parquet")
    Path("b.parquet").write_bytes(Path("a.parquet").read_bytes())
    evaluated("--predictions", "mine=b.parquet")
    assert len(list(Path("root/evaluation").iterdir())) == 1
    evaluated("--predictions", "other=b.parquet")
    assert len(list(Path("root/evaluation").iterdir())) == 2
    better = table.set_column(3, "score", pa.array(table["score"].to_numpy()[::-1]))
    parquet.write_table(better, "a.parquet")
    evaluated("--predictions", "mine=a.parquet")
    assert len(list(Path("root/evaluation").iterdir())) == 3
    assert "mine" not in evaluated()["systems"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("mine", "write NAME=FILE"),
        ("random=a.parquet", "a system of ours has this name"),
        ("LightGBM=a.parquet", "a system of ours has this name"),
        ("mine=none.parquet", "none.parquet: no such file or folder"),
    ],
)
def test_a_mistake_in_the_option_is_one_message_before_anything_is_made(folder, given, told, capfd) -> None:
    parquet.write_table(pa.table({"user_id": ["u00"]}), "a.parquet")
    assert conrec("evaluate", "--config", "my.toml", "--systems", "floors", "--predictions", given) == 2
    error = capfd.readouterr().err
    assert told in error and error.count("\n") == 1
    assert not Path("root/systems").exists() and not Path("root/evaluation").exists()


def finish_catalogue(config: Config) -> None:
    run = Artefacts(config)
    run["catalogue"].finish(make_catalogue(run, run["catalogue"]), 0.0)


def test_items_are_those_of_the_catalogue_whether_it_is_fitted_or_not(folder: Path) -> None:
    """Then some disappear, others come, and of those count the ones that somebody met."""
    config = load_settings("my.toml")
    until = int((CUT + timedelta(days=4)).timestamp() * 1e6)
    before = known_items(Artefacts(config), until)
    finish_catalogue(config)
    fitted = load_catalogue(Artefacts(config), until)
    assert before.item_ids.equals(fitted.item_ids) and before.items["category"].equals(fitted.items["category"])
    write_log(folder, 4, items=95)
    write_items(folder, first=2, last=99)
    known, now = known_items(Artefacts(config), until), load_catalogue(Artefacts(config), until)
    assert known.item_ids.equals(now.item_ids) and known.items["category"].equals(now.items["category"])
    assert "i00" in known.item_ids.to_pylist() and ITEMS < len(known.items) <= 95


@pytest.fixture
def trained(folder: Path) -> Config:
    """With a policy as it is built, where later stages look for a trained one."""
    config = load_settings("my.toml")
    finish_catalogue(config)
    model, tokenizer, _ = build_model(config, parquet.read_table("items.parquet")["text"].to_pylist())
    figures: dict[str, Any] = {"training_seconds": {"supervised": 1.0}, "parameters": 1, "stages": []}
    figures |= {"alignment_accuracy": {}, "verdict_auc": {}, "alignment_questions": 1}
    for artefact in (Artefacts(config)["policy"], Artefacts(config)["validated"]):
        for name in ("checkpoint", "supervised"):
            upload_folder(lambda local: save_checkpoint(model, tokenizer, local), artefact.path(name))
        write_rows([{"phase": "warm_up", "step": 1, "loss": 1.0}], artefact)
        artefact.finish(figures, 1.0)
    return config


def test_beside_the_method_they_are_compared_at_equal_harm_and_pair_by_pair(trained: Config) -> None:
    world = load_world(Artefacts(load_settings("my.toml", ["evaluation.systems=floors"])), encoded=False)
    table = next(table for name, table in floors(world) if name == "most shown")
    parquet.write_table(table, "ranked.parquet")
    assert conrec("anchors", "--config", "my.toml", "--out", "anchors") == 0
    pairs = parquet.read_table("anchors/pairs.parquet")
    parquet.write_table(pairs.append_column("score", pa.array(np.arange(len(pairs), dtype=float))), "pairs.parquet")
    document = evaluated("--predictions", "mine=ranked.parquet", "--predictions", "told=pairs.parquet", systems="ours")
    mine, floor = (document["systems"][name]["figures"] for name in ("mine", "most shown"))
    assert {measure: mine[measure] for measure in (*MEASURES, CATCH, "served")} == {
        measure: floor[measure] for measure in (*MEASURES, CATCH, "served")
    }
    assert document["comparisons"]["mine"] == document["comparisons"]["most shown"]
    assert (
        document["ours"] == NAMES[FULL] and "mine, by score" in document["lines"] and "mine" in document["catch_curves"]
    )
    lists = document["published"]
    assert lists["systems"]["told"]["at_alpha"] == {} and lists["systems"]["CoNRec"]["at_alpha"]
    assert lists["against"]["told"]["auc_difference"]["value"] == pytest.approx(
        lists["systems"]["CoNRec"]["auc"]["value"] - lists["systems"]["told"]["auc"]["value"]
    )


def test_anchors_are_those_of_the_policy_that_is_measured(trained: Config, capsys) -> None:
    """A pinned policy comes with the timeline that it was trained with."""
    pinned = ("--set", f"policy.version={Artefacts(trained)['policy'].version}", "--set", "timeline.horizon_days=4")
    write_anchors(trained, "plain")
    assert conrec("anchors", "--config", "my.toml", "--out", "pinned", *pinned) == 0
    pinned = (*pinned, "--set", "evaluation.systems=floors")
    assert conrec("anchors", "--config", "my.toml", "--out", "other", *pinned) == 0
    plain, followed, other = (parquet.read_table(f"{name}/anchors.parquet") for name in ("plain", "pinned", "other"))
    assert followed.equals(plain) and not other.equals(plain)


def test_a_stage_that_asks_for_floors_alone_reads_no_policy(folder: Path) -> None:
    config = load_settings("my.toml", ["evaluation.systems=floors"])
    artefact = run_stage("evaluate", config)
    assert artefact.inputs.keys() & {"policy", "calibration", "predictions"} == set()
    assert {row["group"] for row in storage.read_json(artefact.path("metrics.json"))["systems"].values()} == {"floor"}
