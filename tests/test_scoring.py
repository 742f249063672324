"""The score and the lists as stages make them: what they are fitted on, and that a night and its measure agree.

24 users meet 40 items, a rejection, a like and something shown a day, with an untrained policy that answers.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
from test_enough_stages import ITEMS, Log, log, make, printed, untrained  # noqa: F401 - a fixture

from conrec import storage
from conrec.blocklist.asking import Policy
from conrec.blocklist.batches import generate_batch
from conrec.blocklist.calibrate import Calibration
from conrec.blocklist.engines import TorchEngine
from conrec.blocklist.fitting import Fitting
from conrec.blocklist.ranking import Answers, Ranking, held_at, listing, published
from conrec.config import DAY_US, Config
from conrec.evaluation.assemble import tonight
from conrec.evaluation.headline import EVERYBODY, ODDS, OURS, PARTS, WITHOUT
from conrec.evaluation.published_lists import published_lists
from conrec.evaluation.systems import AFTER
from conrec.evaluation.world import World
from conrec.feedback.events import LIKED
from conrec.feedback.histories import rejections_in_history
from conrec.policy.model import build_model
from conrec.policy.prompts import build_prompts
from conrec.stages import nightly as nightly_module
from conrec.stages.artefacts import Artefacts
from conrec.stages.inputs import blocklists_url
from conrec.stages.nightly import make_night
from conrec.stages.policies import serving
from conrec.stages.scoring import _asked_before, calibrating_answers, load_fitting, scoring
from conrec.stages.systems import load_world, systems

pytestmark = pytest.mark.long

USERS = 24
EVERYTHING = log(range(-8, 8), USERS)
Make = Callable[..., Config]


def fitting(config: Config) -> Fitting:
    return load_fitting(Artefacts(config))


def columns(found: Fitting, users: list[str]) -> dict[str, np.ndarray]:
    """Every column of every pair of these users and all things."""
    rows = np.asarray(pc.index_in(np.array(users), value_set=found.events.users))
    things = len(found.counts.things)
    return found.counts.columns(np.repeat(rows, things), np.tile(np.arange(things), len(rows)))


def of_users(found: Fitting, values: Any) -> dict[str, Any]:
    names = found.events.users.take(found.anchors.users).to_pylist()
    return dict(zip(names, values, strict=True))


# ---- what it is fitted on ----


@pytest.mark.parametrize("users", [range(USERS), [3]], ids=["everybody", "one user and a newcomer"])
def test_what_lies_between_validation_time_and_cut_is_outcome_alone(make: Make, users) -> None:  # noqa: F811
    """Neither what is counted, nor whom it is asked of, nor what the policy reads; only what came of it."""
    rows = [row for row in EVERYTHING if row[1] <= 0]
    names = [f"u{user}" for user in range(USERS)]
    newcomers = [("a", -1.5 + place / 100, kind, place) for place in range(9) for kind in ("negative", "positive")]
    planted = [(f"u{user}", -1.9 + place / 100, "negative", place) for user in users for place in range(ITEMS)]
    before = fitting(make(rows))
    leaky = fitting(make(rows + planted + newcomers))
    assert len(before.anchors) == USERS and len(leaky.events.users) == USERS + 1
    for name, values in columns(before, names).items():
        np.testing.assert_array_equal(values, columns(leaky, names)[name], err_msg=name)
    assert of_users(before, before.calibrates) == of_users(leaky, leaky.calibrates)
    _, _, vocabulary = build_model(before.config, ["item"])
    prompts = [
        build_prompts(one.events, one.anchors, one.catalogue.semantic_ids, vocabulary, one.config.prompt)
        for one in (before, leaky)
    ]
    np.testing.assert_array_equal(prompts[0].values, prompts[1].values)
    assert len(leaky.outcomes) > len(before.outcomes)
    # What lies before is counted.
    earlier = fitting(make([*rows, *((user, day - 1, kind, item) for user, day, kind, item in planted)]))
    assert any((values != columns(earlier, names)[name]).any() for name, values in columns(before, names).items())


def test_exposure_is_fitted_on_what_can_still_be_met(make: Make) -> None:  # noqa: F811
    """All 40 items are among the most exposed: less those of the history."""
    found = fitting(make(EVERYTHING))
    rows, things = found._most_exposed()
    met = found.counts.met[found.anchors.users].toarray() > 0
    assert not met[rows, things].any()
    expected = (~met).sum(axis=1) * ~found.calibrates
    assert np.bincount(rows, minlength=len(found.anchors)).tolist() == expected.tolist()


def test_everybody_with_a_history_fits_but_those_who_calibrate(make: Make) -> None:  # noqa: F811
    """A night serves nobody who met one item; what became of what they were shown later says as much as of others."""
    short = [("brief", -3.0, "neutral", 0), ("brief", -1.0, "negative", 1), ("brief", -0.5, "positive", 2)]
    found = fitting(make(EVERYTHING + short + [("late", -1.0, "negative", 3)]))
    names = found.events.users.take(found.anchors.users).to_pylist()
    assert sorted(names) == sorted([f"u{user}" for user in range(USERS)] + ["brief"])
    assert names.index("brief") not in found.served and len(found.served) == USERS
    assert set(np.flatnonzero(found.calibrates)) < set(found.served)
    _, rejected, users = found.answers()
    assert set(users) == set(found.anchors.users[~found.calibrates])
    assert rejected[users == found.anchors.users[names.index("brief")]].tolist() == [True, False]
    asks, checks = found.asked_rows()
    assert sorted([*asks, *checks]) == found.served.tolist()
    assert found.calibrates[checks].all() and not found.calibrates[asks].any()
    fewer = dataclasses.replace(found, config=make(EVERYTHING, calibration={"max_users": 10}))
    assert sum(map(len, fewer.asked_rows())) == 10


@pytest.mark.parametrize("kind", ["negative", "positive"])
def test_where_all_say_the_same_every_system_but_the_trees_has_lists(make: Make, kind: str) -> None:  # noqa: F811
    """Between validation time and cut nobody says anything else."""
    rows = [row for row in EVERYTHING if not -2 < row[1] <= 0 or row[2] in (kind, "neutral")]
    config = untrained(make(rows))
    found = scoring(Artefacts(config))
    assert not any(found.score.counted.odds.weights.values()) and not any(found.score.judged.odds.weights.values())
    document: dict[str, Any] = {}
    said = printed(lambda: document.update(measured(config)))
    assert "LightGBM is left out: of" in said
    assert document["systems"].keys() == {OURS, WITHOUT, ODDS, EVERYBODY, *PARTS}


@pytest.mark.parametrize("kind", ["negative", "positive"])
def test_where_those_who_are_asked_say_the_same_what_is_counted_stands(make: Make, kind: str) -> None:  # noqa: F811
    """Users whom no night serves, since they met one item, rejected and liked; those whom the policy was asked about
    did one of the two."""
    rows = [row for row in EVERYTHING if not -2 < row[1] <= 0 or row[2] in (kind, "neutral")]
    for user in range(9):
        said = ("negative", "positive") if user % 3 else ("positive", "negative")
        rows += [(f"brief{user}", -3.0, "neutral", user)]
        rows += [(f"brief{user}", -1.0 + place / 9, one, 7 * user + place) for place, one in enumerate(said)]
    config = untrained(make(rows))
    found = fitting(config)
    with storage.local_folder(Artefacts(config)["validated"].path("checkpoint")) as folder:
        engine = TorchEngine.load(folder, found.catalogue.trie)
    policy = Policy(engine, found.catalogue, found.events, config)
    asks, _ = found.asked_rows()
    counted = found.counted()
    assert len(asks) and any(counted.odds.weights.values())
    assert found.judged(counted, policy, asks, policy.generate(found.anchors.take(asks))).odds == counted.odds


def test_a_score_is_made_once_and_read_as_it_was(make: Make, monkeypatch) -> None:  # noqa: F811
    config = untrained(make(EVERYTHING))
    first = scoring(Artefacts(config))
    assert first.score.judged is not None and first.calibration.overall.threshold is not None
    found = fitting(config)
    checks = found.asked_rows()[1]
    with storage.local_folder(Artefacts(config)["validated"].path("checkpoint")) as folder:
        engine = TorchEngine.load(folder, found.catalogue.trie)
    generated = Policy(engine, found.catalogue, found.events, config).generate(found.anchors.take(checks))
    assert len(generated.leaves.values) and calibrating_answers(Artefacts(config)).to_arrow().equals(
        generated.to_arrow()
    )
    monkeypatch.setattr(Fitting, "of", None)
    again = scoring(Artefacts(config))
    assert again == dataclasses.replace(first, score=again.score)
    assert again.score.to_json() == first.score.to_json()


def test_what_an_earlier_calibration_was_answered_is_taken_only_whole(make: Make) -> None:  # noqa: F811
    config = untrained(make(EVERYTHING))
    scoring(Artefacts(config))
    made = Artefacts(config)["calibration"]
    changed = config.calibration.model_copy(update={"alpha": config.calibration.alpha / 2})
    run = Artefacts(config.model_copy(update={"calibration": changed}))
    assert run["calibration"].version != made.version
    # Somebody's folder that is damaged stops nobody.
    storage.write_bytes(f"{config.root}/calibration/{'0' * 12}/artefact.json", b"torn")
    before = calibrating_answers(Artefacts(config))
    score, answers = _asked_before(run, len(before.leaves)) or pytest.fail("nothing is found")
    assert answers.to_arrow().equals(before.to_arrow())
    assert score.to_json() == storage.read_json(made.path("score.json"))
    assert _asked_before(run, len(before.leaves) + 1) is None
    for name in ("asked.parquet", "score.json"):
        whole = storage.read_bytes(made.path(name))
        storage.write_bytes(made.path(name), whole + b" ")
        assert _asked_before(run, len(before.leaves)) is None
        storage.remove(made.path(name))
        assert _asked_before(run, len(before.leaves)) is None
        storage.write_bytes(made.path(name), whole)
        assert _asked_before(run, len(before.leaves)) is not None
    storage.remove(made.path("asked.parquet"))
    scoring(run)  # asks the policy
    assert calibrating_answers(run).to_arrow().equals(before.to_arrow())


@dataclasses.dataclass(frozen=True)
class Given:
    """Scores that are given: log odds of all things for each row of the events, without a policy."""

    odds: np.ndarray
    judged: None = None
    reach: float = 0.0

    def parts(self, counts: Any, users: np.ndarray, expected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.odds[users].copy(), np.zeros_like(self.odds[users])

    def parts_of(self, columns: Any) -> Any:
        raise AssertionError("there is no policy")


def test_what_takes_the_room_of_held_back_items_is_calibrated_with(make: Make) -> None:  # noqa: F811
    """Eight users' lists are full of what is predicted for four of them or more, too many, and so held back: what each
    of them likes later takes the room. In the other users' lists, who have nothing else, the likes score lower.
    """
    alpha = 0.3
    config = make(
        EVERYTHING,
        calibration={"alpha": alpha, "strata": []},
        guardrails={"max_items_per_user": 9, "max_catalogue_share": 1.0, "max_user_share": 0.2},
    )
    found = fitting(config)
    checks = found.asked_rows()[1]
    users, nothing = found.anchors.users[checks], Answers.nothing(len(checks))
    liked = found.outcomes.take((found.outcomes.kinds == LIKED) & np.isin(found.outcomes.anchors, checks))
    places = np.searchsorted(checks, liked.anchors)
    assert 15 < len(checks) < 20 and set(places) == set(range(len(checks)))
    full = places < 8
    unmet = found.counts.met[users[:8]].toarray()[:, :ITEMS] == 0
    unmet &= (unmet.sum(axis=0) >= 4) & ~np.isin(np.arange(ITEMS), liked.items[full])
    odds = np.full((len(found.events.users), len(found.counts.things)), -9.0, np.float32)
    odds[users[:8, None], np.arange(ITEMS)] = np.where(unmet, 3.0, -9.0)
    odds[users[places], liked.items] = np.where(full, 1.0, -1.0)

    ranking = Ranking(found.counts, Given(odds), found.catalogue.trie, found.catalogue.live)
    way = (ranking, found.events, users, nothing, config.timeline.validation_us, config.guardrails)
    rejections = rejections_in_history(found.events, found.anchors.take(checks))

    def risk(thresholds: np.ndarray) -> float:
        """Mean over users of the share of their later likes in the list that a night publishes."""
        lists = published(*way, held_at(*way, thresholds))
        blocked = listing(lists, places, liked.items, ITEMS, {}).scores >= thresholds[places]
        return float(np.mean(np.bincount(places, blocked) / np.bincount(places)))

    def bound(calibration: Calibration) -> float:
        return (len(checks) * risk(calibration.thresholds(rejections)) + 1) / (len(checks) + 1)

    off = config.model_copy(update={"guardrails": config.guardrails.model_copy(update={"max_user_share": 1.0})})
    unaware = dataclasses.replace(found, config=off).calibrated(Given(odds), checks, nothing)
    assert bound(unaware) > alpha, "the world can tell"
    made = found.calibrated(Given(odds), checks, nothing)
    assert bound(made) <= alpha
    assert made.overall.threshold is not None and made.overall.threshold > (unaware.overall.threshold or 0)
    assert made.overall.false_block == risk(made.thresholds(rejections))


# ---- the night and its measure ----


def in_process(prompts: str, output: str, checkpoint: str, trie, settings, progress: str, users: int, ends_at) -> int:
    """`generate_night` without Ray."""
    with storage.local_folder(checkpoint) as folder:
        engine = TorchEngine.load(folder, trie)
    generated = generate_batch(engine, storage.read_table(prompts), settings.beam_width)
    storage.write_table(generated, storage.join(output, "0.parquet"))
    return users


def evaluated(config: Config) -> tuple[World, Policy, Answers]:
    run = serving(Artefacts(config), same_cut=True)
    world = load_world(run)
    said = next(spec for spec in systems(run) if spec.id == AFTER).rows(world)[AFTER].answer
    with storage.local_folder(run["policy"].path("checkpoint")) as folder:
        engine = TorchEngine.load(folder, world.catalogue.trie)
    policy = Policy(engine, world.catalogue, world.events, config)
    return world, policy, tonight(world, policy, said)


def measured(config: Config) -> dict[str, Any]:
    return lists_of(config, *evaluated(config))


def lists_of(config: Config, world: World, policy: Policy, answers: Answers) -> dict[str, Any]:
    run = serving(Artefacts(config), same_cut=True)
    made = scoring(run)
    return published_lists(world, made, load_fitting(run), calibrating_answers(run), policy, answers)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"generate": {"beam_width": 100}},
        {"guardrails": {"max_catalogue_share": 0.4, "max_user_share": 0.5}},
        {"guardrails": {"max_items_per_user": 13, "protect_days": 1.0}},
    ],
    ids=["few beams", "all beams", "held back", "short lists"],
)
def test_the_lists_that_are_measured_are_those_that_a_night_of_that_moment_publishes(
    make: Make,  # noqa: F811
    changed,
    monkeypatch,
) -> None:
    """The night reads a log that ends at the cut; the evaluation, one that goes on."""
    monkeypatch.setattr(nightly_module, "generate_night", in_process)
    both = {"publish": {"buckets": 2, "holdout_share": 0.0}, "calibration": {"alpha": 0.3, "strata": [5]}} | changed
    config = untrained(make(EVERYTHING, **both))
    world, policy, answers = evaluated(config)
    document = lists_of(config, world, policy, answers)["systems"][OURS]["at_alpha"]["0.3"]
    said = outcomes(config)
    versions = {name: Artefacts(config)[name].version for name in ("policy", "calibration")}

    short = make([row for row in EVERYTHING if row[1] <= 0], **both)
    run = serving(Artefacts(short))
    assert versions == {name: run[name].version for name in versions}
    figures = make_night(run, run["nightly"])
    table = storage.read_table(f"{blocklists_url(short)}/versions/{figures['version']}/data")
    manifest = storage.read_json(f"{blocklists_url(short)}/versions/{figures['version']}/manifest.json")
    assert bool(manifest["about"]["held_back"]) == (config.guardrails.max_user_share < 1)
    table = table.filter(pc.equal(table["reason"], "predicted"))
    rows = table.select(["user_id", "item_id", "score"]).to_pylist()
    blocked = {(row["user_id"], row["item_id"]): row["score"] for row in rows}
    names = world.events.users.take(world.served.users).to_pylist()
    assert len(names) == USERS and len(blocked) == len(rows) > USERS

    # Row by row, where nothing is held back.
    if config.guardrails.max_user_share == 1:
        made = scoring(Artefacts(config))
        counts = world.counts(config.timeline.cut_us)
        ranking = Ranking(counts, made.score, world.catalogue.trie, world.catalogue.live)
        limits = made.calibration.thresholds(rejections_in_history(world.events, world.served))
        found: dict[tuple[str, str], float] = {}
        way = (ranking, world.events, world.served.users, answers, config.timeline.cut_us, config.guardrails)
        for places, lists in published(*way):
            kept = ~lists.explicit & (lists.scores >= limits[places[lists.rows]])
            items = world.catalogue.item_ids.take(lists.items[kept]).to_pylist()
            users = [names[place] for place in places[lists.rows[kept]]]
            found |= dict(zip(zip(users, items, strict=True), lists.scores[kept].tolist(), strict=True))
        assert found.keys() == blocked.keys()
        np.testing.assert_allclose([found[pair] for pair in blocked], list(blocked.values()), rtol=1e-5)

    # And by the figures, from what users did in the window.
    assert document["length"]["mean"]["value"] == pytest.approx(len(blocked) / USERS)
    for name, kind in (("catch", "negative"), ("false_block", "positive")):
        shares = [pair in blocked for pair, kinds in said.items() if kinds == kind]
        assert len(shares) > USERS / 2
        assert document[name]["value"] == pytest.approx(np.mean(shares)), name


def outcomes(config: Config) -> dict[tuple[str, str], str]:
    """What became of each item that a user first met in the window: liked at all, else rejected, else shown."""
    cut = config.timeline.cut
    order = ("positive", "negative", "neutral")
    met, said = set(), dict[tuple[str, str], str]()
    for row in storage.read_table(config.interactions.path).sort_by("timestamp").to_pylist():
        pair, days = (row["user_id"], row["item_id"]), (row["timestamp"] - cut).total_seconds() / 86_400
        if days <= 0:
            met.add(pair)
        elif days <= config.timeline.horizon_days and pair not in met:
            said[pair] = min(said.get(pair, "neutral"), row["feedback"], key=order.index)
    return said


def test_a_world_holds_what_is_counted_at_one_moment_beside_the_cut(make: Make) -> None:  # noqa: F811
    """Hundreds of moments, each with all histories, would not fit; they share what is counted of things."""
    world = load_world(Artefacts(untrained(make())))
    cut = world.config.timeline.cut_us
    first = weakref.ref(world.counts(cut + DAY_US))
    second = world.counts(cut + 2 * DAY_US)
    assert first() is None
    assert second is world.counts(cut + 2 * DAY_US) and second.ease is world.counts(cut).ease
    assert second.met.nnz > world.counts(cut).met.nnz
