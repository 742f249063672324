"""What a policy is trained on, of a small log: samples and examples whose target is the next rejection alone.

Three users meet items 0 to 15, one a leaf, before the cut. Anchors lie just before rejections:

    a   day -6 likes 4, -5 rejects 0, -4 rejects 1, -3.5 likes 5, -3 rejects 2
    b   day -6 is shown 6, -2 rejects 1 and 3 in one moment
    c   day -6 likes 7
"""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from worlds import CODES, LEVELS, SEMANTIC_IDS, TRIE, tiny_config

from conrec import storage
from conrec.catalogue.codebook import Codebook
from conrec.config import SUPERVISED_TASKS, Config
from conrec.feedback.anchors import Anchors
from conrec.feedback.events import Events
from conrec.policy.curriculum import TrainingWorld, grpo_stages, judged_pairs, next_rejections, supervised_tasks
from conrec.policy.loop import epochs_of
from conrec.policy.samples import JudgedPairs, TrainingData
from conrec.policy.tasks import Examples
from conrec.ragged import Ragged
from conrec.stages.artefacts import Artefacts
from conrec.stages.train import training_world

CUT = datetime(2026, 1, 1, tzinfo=UTC)
LOG = [
    ("a", -6, "positive", 4), ("a", -5, "negative", 0), ("a", -4, "negative", 1), ("a", -3.5, "positive", 5),
    ("a", -3, "negative", 2), ("b", -6, "neutral", 6), ("b", -2, "negative", 1), ("b", -2, "negative", 3),
    ("c", -6, "positive", 7),
]  # fmt: skip
BOTH = {"name": "all", "blocks": ["negatives", "positives"], "steps": 1, "beta": 0.1}


@pytest.fixture
def make(tmp_path: Path):
    """Settings -> (settings, the world that the stage reads from files)."""
    users, days, kinds, items = zip(*LOG, strict=True)
    ids = pa.array([f"i{item:02}" for item in range(len(SEMANTIC_IDS))])
    table = pa.table(
        {
            "user_id": list(users),
            "item_id": ids.take(pa.array(items)),
            "timestamp": pa.array([CUT + timedelta(days=day) for day in days], pa.timestamp("us", "UTC")),
            "feedback": list(kinds),
        }
    )
    paths = {name: str(tmp_path / f"{name}.parquet") for name in ("interactions", "items")}
    catalogue = pa.table({"item_id": ids, "text": [f"item {item}" for item in range(len(ids))]})
    storage.write_table(table, paths["interactions"])
    storage.write_table(catalogue, paths["items"])

    def world(**sections: Any) -> tuple[Config, TrainingWorld]:
        settings = tiny_config(
            root=str(tmp_path / "root"),
            interactions={"path": paths["interactions"]},
            items={"path": paths["items"]},
            # Nobody is a validation user.
            timeline={"cut": CUT, "validation_share": 1e-9, "min_history": 1},
            **sections,
        )
        artefact = Artefacts(settings)["catalogue"]
        column = Ragged.from_lengths(SEMANTIC_IDS.ravel(), np.full(len(ids), LEVELS)).to_arrow()
        storage.write_table(catalogue.append_column("semantic_id", column), artefact.path("items.parquet"))
        codewords = np.random.default_rng(0).normal(size=(LEVELS, CODES, 4)).astype(np.float32)
        Codebook(codewords, np.zeros(4, np.float32)).save(artefact.path("codebook.safetensors"))
        artefact.finish({}, 0.0)
        return settings, training_world(Artefacts(settings))

    return world


def test_what_decides_over_stages_is_trained_on_what_lies_before_for_every_user(make) -> None:
    settings, _ = make()
    timeline = settings.timeline.model_copy(update={"validation_share": 0.5, "validation_days": 3.2})
    settings = settings.model_copy(update={"timeline": timeline})
    run = Artefacts(settings)
    chosen, everything = training_world(run.earlier, timeline), training_world(run)
    # Three rejections lie after day -3.2, whoever is a validation user.
    assert len(chosen.history) == len(LOG) - 3 and len(everything.history) == len(LOG)
    assert chosen.history.times.max() <= timeline.validation_us < chosen.events.times.max() <= timeline.cut_us
    assert len(everything.validation) == 0
    assert (chosen.validation.times == timeline.validation_us).all()


def test_an_item_that_came_after_the_validation_time_is_known_to_nothing_that_decides(make) -> None:
    """Described today, met by user d on day -1: the catalogue lacks it, the policy of the cut learns it."""
    settings, _ = make()
    run = Artefacts(settings)
    version = run["catalogue"].version
    before = training_world(run.earlier, settings.timeline)
    moment = pa.array([CUT - timedelta(days=1)], pa.timestamp("us", "UTC"))
    more = pa.table({"user_id": ["d"], "item_id": ["another"], "timestamp": moment, "feedback": ["negative"]})
    storage.write_table(
        pa.concat_tables([storage.read_table(settings.interactions.path), more]), settings.interactions.path
    )
    encoded = pa.table({"item_id": ["another"], "text": ["unheard words"], "semantic_id": pa.array([[3, 3]])})
    encoded = encoded.append_column("reconstruction_cosine", pa.array([1.0]))
    storage.write_table(encoded, storage.join(run.sources.added_url(version), "added.parquet"))
    run = Artefacts(settings)
    earlier, newer = training_world(run.earlier, settings.timeline), training_world(run)
    assert newer.catalogue.item_ids.to_pylist()[0] == "another" and len(newer.history) == len(LOG) + 1
    assert earlier.catalogue.item_ids.equals(before.catalogue.item_ids)
    assert earlier.tokenizer.get_vocab() == before.tokenizer.get_vocab() != newer.tokenizer.get_vocab()
    assert len(earlier.events) == len(before.events) == len(LOG)


def test_pairs_are_what_validation_anchors_reject_or_like_for_the_first_time(make) -> None:
    _, world = make()
    ids = np.arange(16).astype(np.int32)
    kinds = {"negative": 0, "positive": 1, "neutral": 2}
    # User 0 meets 0 and 1 until day 1, then rejects 1 (known), 2, 3 (which it likes as well); likes 4; is shown 5.
    # User 1 likes 7 twice; item 8 disappeared. User 2 has nothing to come.
    log = [
        *(("negative", 0), ("positive", 1), ("negative", 1), ("negative", 2), ("negative", 3), ("positive", 3)),
        *(("positive", 4), ("neutral", 5), ("negative", 9), ("positive", 7), ("positive", 7), ("negative", 8)),
        ("negative", 2),
    ]
    events = Events(
        pa.array(["a", "b", "c"]),
        np.array([0, 8, 12, 13]),
        ids[[item for _, item in log]],
        np.arange(len(log)),
        np.array([kinds[kind] for kind, _ in log], np.int8),
    )
    starts, ends = np.array([0, 8, 12]), np.array([2, 9, 13])
    anchors = Anchors(np.arange(3, dtype=np.int32), ends - 1, starts, ends, np.array([8, 12, 13]))
    trie = dataclasses.replace(TRIE, item_leaves=np.where(np.arange(16) == 8, -1, TRIE.item_leaves))
    pairs = judged_pairs(dataclasses.replace(world.catalogue, trie=trie), events, anchors)
    assert rows(pairs.leaves) == [TRIE.item_leaves[[2, 4]].tolist(), [TRIE.item_leaves[7]], []]
    assert pairs.rejected.tolist() == [True, False, False]


def test_training_data_comes_back_from_files_as_it_was(make, tmp_path: Path) -> None:
    settings, world = make(grpo={"stages": [BOTH]})
    data = world.data(supervised_tasks(settings, world), grpo_stages(settings, world)[0])
    pairs = JudgedPairs(Ragged.from_lengths(np.array([3, 1, 2]), np.array([2, 0, 1])), np.array([True, False, True]))
    prompts = data.stages["all"].prompts.take(np.arange(3))
    data = dataclasses.replace(data, validation=prompts, validation_users=np.array([4, 4, 9]), pairs=pairs)
    data.save(str(tmp_path / "data"))
    found = TrainingData.load(str(tmp_path / "data"))
    assert rows(found.validation) == rows(prompts) and rows(found.pairs.leaves) == rows(pairs.leaves)
    assert found.validation_users.tolist() == [4, 4, 9]
    assert found.pairs.rejected.dtype == bool and found.pairs.rejected.tolist() == pairs.rejected.tolist()
    assert rows(found.tasks["warm_up"].tokens) == rows(data.tasks["warm_up"].tokens)
    assert rows(found.stages["all"].ground_truth) == rows(data.stages["all"].ground_truth)


def rows(ragged: Ragged) -> list[list[int]]:
    return [ragged[row].tolist() for row in range(len(ragged))]


def answers(world: TrainingWorld, examples: Examples) -> list[list[list[int]]]:
    """Items of each prompt, oldest first, then the item that is the target."""
    found = []
    is_target = Ragged(examples.is_target, examples.tokens.offsets)
    first = world.vocabulary.first_code_token
    for row in range(len(examples.tokens)):
        tokens, target = examples.tokens[row], is_target[row]
        # The answer follows the last event's kind, or a begin mark, without a question.
        assert tokens[~target][-1] < first
        parts = [tokens[mask & (tokens >= first)] - first for mask in (~target, target)]
        found.append([TRIE.find(codes.reshape(-1, LEVELS) - [0, CODES]).tolist() for codes in parts])
    return found


def test_the_window_is_rewarded_whole_or_by_its_next_rejection_alone(make) -> None:
    settings, world = make(grpo={"stages": [BOTH], "kappa": 0.0})
    samples = grpo_stages(settings, world)[0]["all"]
    assert rows(samples.ground_truth) == [[0, 1, 2], [1, 2], [2], [1, 3]]

    settings, world = make(grpo={"stages": [BOTH], "targets": "next_negative"})
    alone = grpo_stages(settings, world)[0]["all"]
    assert rows(alone.ground_truth)[:3] == [[0], [1], [2]]
    # Two rejections of one moment: one of them, as in the measures.
    assert rows(alone.ground_truth)[3] in ([1], [3])
    assert alone.truth_weights.tolist() == [1] * 4 and alone.truth_weights.dtype == np.float32
    # Prompts and likes to come, which are the harm, are the same.
    assert rows(alone.prompts) == rows(samples.prompts)
    assert rows(alone.positives) == rows(samples.positives) == [[5], [5], [], []]


def test_stages_without_the_history_that_they_ask_from_are_left_out_for_both_targets(make) -> None:
    stage = {"name": "negatives", "blocks": ["negatives"], "steps": 1, "beta": 0.1}
    settings, world = make(grpo={"stages": [stage], "targets": "next_negative"})
    # Before their first rejection neither user has one to show.
    assert rows(grpo_stages(settings, world)[0]["negatives"].ground_truth) == [[1], [2]]


def test_every_rejection_follows_its_prompt_whatever_the_number_of_anchors(make) -> None:
    settings, world = make(supervised={"warmup_target": "next_negative"})
    settings = settings.model_copy(
        update={"timeline": settings.timeline.model_copy(update={"max_anchors_per_user": 1})}
    )
    found = answers(world, next_rejections(settings, world))
    assert [prompt for prompt, _ in found] == [[4], [4, 0], [4, 0, 1, 5], [6]]
    assert [target for _, target in found[:3]] == [[0], [1], [2]] and found[3][1] in ([1], [3])


def test_the_prompt_shows_the_blocks_that_the_warm_up_is_told(make) -> None:
    settings, world = make(supervised={"warmup_target": "next_negative", "warmup_blocks": ("negatives",)})
    found = answers(world, next_rejections(settings, world))
    assert [prompt for prompt, _ in found] == [[], [0], [0, 1], []]


def test_no_stage_may_have_the_name_of_a_supervised_task() -> None:
    every = {"translation_epochs": 1, "alignment_epochs": 1}
    tasks = [
        name
        for target in ("events", "next_negative")
        for name in epochs_of(tiny_config(supervised=every | {"warmup_target": target}))
    ]
    assert set(SUPERVISED_TASKS) == set(tasks)


def test_one_warm_up_takes_the_place_of_the_other(make) -> None:
    settings, world = make(supervised={"translation_epochs": 1, "warmup_epochs": 2})
    assert epochs_of(settings) == {"translation": 1, "warm_up": 2}
    assert list(supervised_tasks(settings, world)) == ["translation", "warm_up"]
    settings, world = make(supervised={"warmup_epochs": 2, "warmup_target": "next_negative"})
    assert epochs_of(settings) == {"next_negative": 2}
    tasks = supervised_tasks(settings, world)
    assert list(tasks) == ["next_negative"]
    assert answers(world, tasks["next_negative"]) == answers(world, next_rejections(settings, world))
