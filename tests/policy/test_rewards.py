"""Rewards of hand-made completions, computed on paper."""

import pytest
import torch

from conrec.policy.rewards import Rewarder, TargetSet

# Leaves 0 and 1 share a prefix of two codes, 2 one code with them, 3 none. 0 and 3 point opposite ways.
CODES = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0]])
VECTORS = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0]])


def targets(*rows):
    width = max((len(row) for row in rows), default=0)
    leaves = torch.full((len(rows), width), -1)
    weights = torch.zeros(len(rows), width)
    for i, row in enumerate(rows):
        for j, (leaf, weight) in enumerate(row):
            leaves[i, j], weights[i, j] = leaf, weight
    return TargetSet(leaves, weights)


def score(kind, completions, truth, positives, gamma=1.0):
    return Rewarder(VECTORS, CODES, kind, gamma)(torch.tensor(completions), truth, positives)


def test_similarity_takes_the_best_target_and_subtracts_the_best_positive():
    reward, gain, harm = score("similarity", [[1, 2]], targets([(0, 1.0), (2, 0.5)]), targets([(3, 1.0)]), gamma=0.5)
    assert gain[0].tolist() == pytest.approx([0.8, 0.5])
    assert harm[0].tolist() == pytest.approx([-0.8, 0.0])
    assert reward[0].tolist() == pytest.approx([1.2, 0.5])


def test_no_positives_no_penalty():
    reward, gain, harm = score("similarity", [[3]], targets([(0, 1.0)]), targets([]))
    assert (reward, harm) == (gain, 0.0)


def test_prefix_ladder():
    _, gain, _ = score("prefix", [[0, 1, 2, 3]], targets([(0, 1.0)]), targets([]))
    assert gain[0].tolist() == pytest.approx([1.0, 0.1, 0.01, 0.0])


def test_the_ladder_of_more_codes_has_more_rungs():
    codes = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0]])
    found = Rewarder(VECTORS, codes, "prefix", 0.5).affinity(torch.arange(5)[None], torch.zeros(1, 1, dtype=torch.long))
    assert found[0, :, 0].tolist() == pytest.approx([1.0, 0.1, 0.01, 0.001, 0.0])


def test_threshold_and_sharpened():
    _, gain, _ = score("threshold", [[0, 1, 2]], targets([(0, 1.0)]), targets([]))
    assert gain[0].tolist() == pytest.approx([1.0, 0.8, 0.0])
    _, gain, _ = score("sharpened", [[0, 1]], targets([(0, 1.0)]), targets([]))
    assert gain[0].tolist() == pytest.approx([1.0, 0.2635971])


def test_marginal_pays_a_shared_prefix_once():
    _, gain, _ = score("marginal", [[1, 2]], targets([(0, 1.0)]), targets([]))
    assert gain[0].tolist() == pytest.approx([0.05, 0.005])


def test_weights_of_neighbours_and_missing_completions():
    _, gain, _ = score("prefix", [[0, -1]], targets([(0, 0.3)]), targets([]))
    assert gain[0].tolist() == pytest.approx([0.3, 0.0])


def test_rows_do_not_mix():
    _, gain, _ = score("prefix", [[0], [0]], targets([(0, 1.0)], [(3, 1.0)]), targets([], []))
    assert gain.ravel().tolist() == [1.0, 0.0]
