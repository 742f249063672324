import json

import numpy as np
import pyarrow as pa
import pytest

from conrec.catalogue.codebook import Codebook
from conrec.catalogue.quality import (
    catalogue_quality,
    changed_company,
    changed_under_noise,
    measured_items,
    neighbour_overlap,
    perplexity,
    purity,
)
from conrec.catalogue.quantizer import fit_codebook
from conrec.config import QuantizerSettings

LINE = Codebook(np.arange(4, dtype=np.float32).reshape(1, 4, 1) * 10, np.array([15], np.float32))


def test_perplexity_counts_codes_by_how_evenly_they_are_used() -> None:
    assert perplexity(np.array([3, 3, 3])) == pytest.approx(1)
    assert perplexity(np.array([0, 5, 9, 0, 5, 9])) == pytest.approx(3)
    assert 1 < perplexity(np.array([0] * 99 + [1])) < 1.1


def test_company_does_not_depend_on_the_names_of_codes() -> None:
    ids = np.array([[0, 0], [0, 1], [1, 0], [1, 0], [2, 2]])
    renamed = np.array([[2, 7], [2, 3], [0, 5], [0, 5], [1, 1]])
    assert changed_company(ids, renamed) == [0, 0]


def test_company_that_changes_is_counted_by_how_much() -> None:
    ids = np.array([[0], [0], [0], [1]])
    # Item 2 leaves 0 and 1 for 3. Company before: {1,2} {0,2} {0,1} {}; after: {1} {0} {3} {2}.
    moved = np.array([[0], [0], [1], [1]])
    assert changed_company(ids, moved) == [pytest.approx((1 / 2 + 1 / 2 + 1 + 1) / 4)]


def test_noise_changes_the_items_at_a_border_only() -> None:
    inside, border = np.array([[10.0], [20.0]]), np.array([[15.0], [25.0]])
    ids = LINE.encode(np.concatenate([inside, border]))
    counts = [changed_under_noise(LINE, np.concatenate([inside, border]), ids, seed)[0] for seed in range(50)]
    assert changed_under_noise(LINE, inside, LINE.encode(inside), 0) == [0]
    assert 0 < np.mean(counts) <= 0.5


def test_purity_by_prefix_ignores_items_without_category() -> None:
    ids = np.array([[0, 0], [0, 1], [0, 1], [1, 0], [1, 0]])
    categories = pa.array(["music", "games", "games", "games", None])
    assert purity(ids, categories) == [pytest.approx(3 / 4), 1]
    assert purity(ids, pa.array([None] * 5, pa.string())) is None


def test_neighbours_are_kept_by_a_faithful_codebook_and_lost_by_a_blind_one() -> None:
    angles = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    faithful = Codebook(circle[None], np.zeros(2, np.float32))
    assert neighbour_overlap(faithful, circle, faithful.encode(circle), seed=0) == pytest.approx(1)
    blind = Codebook(np.zeros((1, 2, 2), np.float32), np.ones(2, np.float32))
    # All 60 items share one ID: ten drawn by lot from the 59 others.
    assert neighbour_overlap(blind, circle, blind.encode(circle), seed=0) == pytest.approx(10 / 59)


def test_the_report_is_json_and_warns_of_unused_codes() -> None:
    generator = np.random.default_rng(0)
    settings = QuantizerSettings(levels=2, codes=8, iterations=5)
    spread = generator.normal(size=(400, 4)).astype(np.float32)
    codebook = fit_codebook(spread, settings, seed=0)
    good = catalogue_quality(spread, codebook.encode(spread), codebook, settings, 0, 0.8, pa.array(["a", "b"] * 200))
    assert good["warnings"] == []
    assert good["codes_used"] == [8, 8]
    assert good["collision_rate"] > 0.9
    assert good["distinct_semantic_ids"] <= 64
    assert 0 < good["reconstruction_cosine"] < 1
    assert len(good["changed_under_seed"]) == len(good["changed_under_noise"]) == len(good["purity"]) == 2
    assert json.loads(json.dumps(good, allow_nan=False)) == good

    collapsed = np.repeat(np.eye(4, dtype=np.float32)[:3], 50, axis=0)
    codebook = fit_codebook(collapsed, settings, seed=0)
    bad = catalogue_quality(collapsed, codebook.encode(collapsed), codebook, settings, 0, 0.8)
    assert bad["purity"] is None
    assert bad["codes_used"] == [3, 1]
    assert bad["collision_rate"] == 1
    assert bad["most_items_of_one_semantic_id"] == 50
    assert [warning.split(":")[0] for warning in bad["warnings"]] == [
        "level 0 uses 3 of 8 codes (38%, below 80%)",
        "level 1 uses 1 of 8 codes (12%, below 80%)",
    ]


def test_of_a_large_catalogue_a_drawn_part_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(1)
    settings = QuantizerSettings(levels=2, codes=8, iterations=5)
    spread = generator.normal(size=(400, 4)).astype(np.float32)
    codebook = fit_codebook(spread, settings, seed=0)
    arguments = (spread, codebook.encode(spread), codebook, settings, 0, 0.8)
    whole = catalogue_quality(*arguments)
    monkeypatch.setattr("conrec.catalogue.quality.MEASURED_ITEMS", 200)
    part = catalogue_quality(*arguments)
    assert (whole["measured_items"], part["measured_items"]) == (400, 200)
    sampled = ("measured_items", "reconstruction_cosine", "neighbour_overlap", "changed_under_noise")
    assert {name: value for name, value in part.items() if name not in sampled} == {
        name: value for name, value in whole.items() if name not in sampled
    }
    assert part["reconstruction_cosine"] == pytest.approx(whole["reconstruction_cosine"], abs=0.05)
    rows = measured_items(400, 0)
    assert len(np.unique(rows)) == 200 and (rows == measured_items(400, 0)).all()
    assert (measured_items(200, 0) == np.arange(200)).all()
