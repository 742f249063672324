import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from conrec.catalogue.quantizer import _product_sums, _sums, fit_codebook, k_means
from conrec.config import QuantizerSettings
from conrec.errors import DataError

SMALL = {
    "residual_kmeans": QuantizerSettings(kind="residual_kmeans", levels=2, codes=4, iterations=10),
    "rqvae": QuantizerSettings(
        kind="rqvae", levels=2, codes=4, iterations=10, latent_dim=4, hidden=(16,), epochs=60, batch_size=64
    ),
}


def four_clusters_of_four(noise: float = 0.01) -> tuple[np.ndarray, np.ndarray]:
    """Four far corners, around each the same four near ones: level 1 must find the far, level 2 the near.

    Shape: points (320, 8), (320, 2) true codes.
    """
    generator = np.random.default_rng(0)
    far, near = (grid.reshape(-1) for grid in np.meshgrid(range(4), range(4)))
    codes = np.tile(np.stack([far, near], axis=1), (20, 1))
    points = np.concatenate([np.eye(4)[codes[:, 0]] * 4, np.eye(4)[codes[:, 1]]], axis=1)
    return (points + noise * generator.normal(size=points.shape)).astype(np.float32), codes


def partition(codes: np.ndarray) -> np.ndarray:
    """Which items share a code, whatever the codes are called."""
    return codes[:, None] == codes[None]


def test_residual_k_means_finds_the_hierarchy() -> None:
    points, codes = four_clusters_of_four()
    codebook = fit_codebook(points, SMALL["residual_kmeans"], seed=0)
    ids = codebook.encode(points)
    assert (partition(ids[:, 0]) == partition(codes[:, 0])).all()
    assert (partition(ids[:, 1]) == partition(codes[:, 1])).all()
    assert np.abs(codebook.reconstruct(ids) - points).max() < 0.1


@pytest.mark.long
def test_rqvae_separates_the_items() -> None:
    points, codes = four_clusters_of_four()
    codebook = fit_codebook(points, SMALL["rqvae"], seed=0)
    assert codebook.codewords.shape == (2, 4, 4)
    assert [weight.shape for weight, _ in codebook.encoder] == [(16, 8), (4, 16)]
    ids = codebook.encode(points)
    assert (partition(ids[:, 0]) == partition(codes[:, 0])).all()
    assert len(np.unique(ids, axis=0)) >= 8


@pytest.mark.long
def test_rqvae_trains_its_encoder_and_its_codebook() -> None:
    points, _ = four_clusters_of_four()

    def distortion(epochs: int) -> float:
        codebook = fit_codebook(points, SMALL["rqvae"].model_copy(update={"epochs": epochs}), seed=0)
        latent = codebook.latent(points)
        left = latent - codebook.reconstruct(codebook.encode(points))
        return float((left**2).sum() / ((latent - latent.mean(axis=0)) ** 2).sum())

    assert distortion(60) < 0.5 * distortion(1)


@pytest.mark.parametrize("kind", SMALL)
def test_the_same_seed_gives_the_same_codebook_and_leaves_the_callers_generator(kind: str) -> None:
    points, _ = four_clusters_of_four(noise=0.5)
    torch.manual_seed(7)
    brief = SMALL[kind].model_copy(update={"epochs": 3})
    first = fit_codebook(points, brief, seed=1)
    drawn = torch.rand(3)
    second = fit_codebook(points, brief, seed=1)
    other = fit_codebook(points, brief, seed=2)
    assert (first.codewords == second.codewords).all()
    assert (first.codewords != other.codewords).any()
    torch.manual_seed(7)
    assert (torch.rand(3) == drawn).all()


@pytest.mark.parametrize("kind", SMALL)
def test_the_centre_is_the_mean_reconstruction_over_items(kind: str) -> None:
    points, _ = four_clusters_of_four()
    points = np.concatenate([points, points[:1].repeat(500, axis=0)])
    codebook = fit_codebook(points, SMALL[kind].model_copy(update={"epochs": 3}), seed=0)
    assert np.allclose(codebook.center, codebook.reconstruct(codebook.encode(points)).mean(axis=0), atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 12))
def test_k_means_uses_every_code_where_there_are_points_enough(seed: int, codes: int) -> None:
    torch.manual_seed(seed)
    # Nearly all points in one tight heap: plain seeding leaves codes without points there.
    points = torch.cat([torch.randn(200, 3) * 1e-3, torch.randn(codes, 3) * 10])
    nearest = torch.cdist(points, k_means(points, codes, 15)).argmin(dim=1)
    assert len(nearest.unique()) == codes


def test_repeated_items_take_no_codes_from_the_rest() -> None:
    points, _ = four_clusters_of_four(noise=0.5)
    once = np.concatenate([points, np.zeros((1, 8), np.float32)])
    flooded = np.concatenate([points, np.zeros((5000, 8), np.float32)])
    expected = fit_codebook(once, SMALL["residual_kmeans"], seed=0).codewords
    assert (fit_codebook(flooded, SMALL["residual_kmeans"], seed=0).codewords == expected).all()


@pytest.mark.parametrize("kind", SMALL)
def test_fewer_items_than_codes(kind: str) -> None:
    points = np.array([[1, 0], [0, 1]], np.float32)
    codebook = fit_codebook(points, SMALL[kind].model_copy(update={"codes": 8}), seed=0)
    ids = codebook.encode(points)
    assert ids.shape == (2, 2)
    assert np.isfinite(codebook.codewords).all()
    assert (ids == codebook.encode(points[::-1])[::-1]).all()


def test_nothing_to_fit_on_is_refused() -> None:
    with pytest.raises(DataError, match="no items"):
        fit_codebook(np.zeros((0, 4), np.float32), SMALL["residual_kmeans"], seed=0)
    with pytest.raises(DataError, match="item row 1 is not finite"):
        fit_codebook(np.array([[0.0], [np.inf]]), SMALL["residual_kmeans"], seed=0)


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that is made."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.most = max(self.most, made.numel())
        return made


@pytest.mark.parametrize("rows", [64, 500, 1000])
def test_sums_as_a_product_are_those_by_index(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr("conrec.catalogue.quantizer.ROWS_AT_ONCE", rows)
    points, groups = torch.randn(500, 8), torch.randint(7, (500,))
    with Largest() as largest:
        sums = _product_sums(points, groups, 90)
    torch.testing.assert_close(sums, _sums(points, groups, 90), atol=1e-4, rtol=1e-5)
    assert largest.most <= max(points.numel(), min(rows, 500) * 90)
