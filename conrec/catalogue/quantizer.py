"""Fits a codebook: residual k-means on the embeddings, or RQ-VAE on what an encoder trained with it makes of them.

    codebook = fit_codebook(embeddings, settings, seed=0)
    semantic_ids = codebook.encode(embeddings)

Residual k-means: k-means on the embeddings, then on what each level leaves. RQ-VAE (Lee et al., CVPR 2022; for semantic
IDs: TIGER, arXiv 2305.05065): an MLP encodes into a small latent space, a residual quantiser with codebooks by moving
averages replaces the latent, a mirrored MLP decodes; loss = |x - x_hat|^2 + commitment * sum_l |r_l - z_l|^2.

Invariants: everything that encoding needs is in the codebook returned, the decoder is not; the same embeddings,
settings and seed give the same codebook on the same machine, but for RQ-VAE on a GPU, whose library starts it with
sums that a GPU adds in whatever order; a code that no item uses is moved to where one does, wherever there are at least
as many different points as codes.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from conrec.catalogue.codebook import Codebook
from conrec.config import QuantizerSettings
from conrec.errors import DataError
from conrec.progress import progress

POINTS_PER_CODE = 256
SEEDING_POINTS_PER_CODE = 16
ROWS_AT_ONCE = 16_384
DECAY = 0.95
DEAD_BELOW = 0.5


Fitted = tuple[np.ndarray, tuple[tuple[np.ndarray, np.ndarray], ...]]
"""Codewords (L, C, D) and the encoder's layers."""


def fit_codebook(embeddings: np.ndarray, settings: QuantizerSettings, seed: int) -> Codebook:
    """Codewords (and encoder) for these items, with the mean of their reconstructions as the centre.

    Shape: embeddings (I, D) float. Raises `DataError` for no items or values that are not finite.
    """
    if not len(embeddings):
        raise DataError("no items to fit a codebook on; check items.path")
    unfinished = ~np.isfinite(embeddings).all(axis=1)
    if unfinished.any():
        raise DataError(f"the embedding of item row {int(unfinished.argmax())} is not finite; mend or remove it")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Items without behaviour repeat the vector of their category; counted each, they would take codes from the rest.
    distinct = np.unique(np.asarray(embeddings, np.float32), axis=0)
    points = torch.as_tensor(distinct, device=device)
    fit = {"rqvae": _fit_rqvae, "residual_kmeans": _fit_residual_kmeans}[settings.kind]
    # The quantiser library draws from the global generator, which belongs to the caller.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        codewords, encoder = fit(points, settings)
    uncentred = Codebook(codewords, np.zeros(codewords.shape[2], np.float32), encoder)
    center = uncentred.reconstruct(uncentred.encode(embeddings)).mean(axis=0, dtype=np.float64)
    return Codebook(codewords, center.astype(np.float32), encoder)


def _fit_residual_kmeans(points: Tensor, settings: QuantizerSettings) -> Fitted:
    residual = points.clone()
    codewords = []
    with progress("fitting the codebook", total=settings.levels * settings.iterations) as bar:
        for _ in range(settings.levels):
            centroids = k_means(residual, settings.codes, settings.iterations)
            residual -= centroids[_nearest(residual, centroids)[0]]
            codewords.append(centroids)
            bar.advance(settings.iterations)
    return torch.stack(codewords).cpu().numpy(), ()


def _fit_rqvae(points: Tensor, settings: QuantizerSettings) -> Fitted:
    from vector_quantize_pytorch import ResidualVQ

    widths = [points.shape[1], *settings.hidden, settings.latent_dim]
    encoder, decoder = _mlp(widths), _mlp(widths[::-1])
    quantizer = ResidualVQ(
        dim=settings.latent_dim,
        num_quantizers=settings.levels,
        codebook_size=settings.codes,
        kmeans_init=True,
        kmeans_iters=settings.iterations,
        decay=DECAY,
        threshold_ema_dead_code=DEAD_BELOW,
        commitment_weight=settings.commitment,
        rotation_trick=False,
    )
    nn.ModuleList([encoder, quantizer, decoder]).to(points.device).train()
    optimizer = torch.optim.AdamW([*encoder.parameters(), *decoder.parameters()], lr=settings.learning_rate)
    with torch.no_grad():
        # The quantiser runs k-means on the first batch it sees: let that be a large sample, not one step's items.
        quantizer(encoder(_sample(points, settings.codes * POINTS_PER_CODE))[None])
    with progress("fitting the codebook", total=settings.epochs) as bar:
        for _ in range(settings.epochs):
            for rows in torch.randperm(len(points), device=points.device).split(settings.batch_size):
                batch = points[rows]
                quantized, _, commitment = quantizer(encoder(batch)[None])
                reconstruction = (decoder(quantized[0]) - batch).square().sum(dim=1).mean()
                # The library averages over the latent's dimensions; both terms are squared distances.
                loss = reconstruction + settings.latent_dim * commitment.sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            bar.advance(note=f"loss {loss.item():.4f}")
    layers = [layer for layer in encoder if isinstance(layer, nn.Linear)]
    weights = tuple((layer.weight.detach().cpu().numpy(), layer.bias.detach().cpu().numpy()) for layer in layers)
    return quantizer.codebooks.detach().cpu().numpy(), weights


def k_means(points: Tensor, codes: int, iterations: int) -> Tensor:
    """Lloyd's algorithm from k-means++ seeds (Arthur and Vassilvitskii, SODA 2007); a centroid that loses all its
    points is moved onto one of those farthest from theirs.

    Shape: points (N, D); returns (codes, D), some of them equal when there are fewer different points than codes.
    """
    points = _sample(points, codes * POINTS_PER_CODE)
    centroids = _spread_seeds(_sample(points, codes * SEEDING_POINTS_PER_CODE), codes)
    for _ in range(iterations):
        nearest, distances = _nearest(points, centroids)
        sizes = torch.bincount(nearest, minlength=codes)
        sums = _sums(points, nearest, len(centroids))
        empty = (sizes == 0).nonzero()[:, 0]
        centroids = torch.where(sizes[:, None] > 0, sums / sizes.clamp(min=1)[:, None], centroids)
        if len(empty):
            farthest, rows = distances.topk(min(len(empty), len(points)))
            rows = rows[farthest > 0]
            centroids[empty[: len(rows)]] = points[rows]
    return centroids


def _spread_seeds(points: Tensor, codes: int) -> Tensor:
    """k-means++: each seed is drawn with probability proportional to the squared distance from the seeds before."""
    chosen = torch.randint(len(points), (1,), device=points.device)
    seeds = [points[chosen[0]]]
    distances = (points - seeds[0]).square().sum(dim=1)
    for _ in range(codes - 1):
        # Once every point is a seed, all distances are 0 and any point will do.
        weights = distances if distances.sum() > 0 else torch.ones_like(distances)
        # multinomial takes no more than 2^24 weights; the sample is far smaller.
        chosen = torch.multinomial(weights, 1)
        seeds.append(points[chosen[0]])
        distances = torch.minimum(distances, (points - seeds[-1]).square().sum(dim=1))
    return torch.stack(seeds)


def _nearest(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centroid of each point and the squared distance to it. Shape: (N,) int64, (N,) float32."""
    chunks = [torch.cdist(chunk, centroids).min(dim=1) for chunk in points.split(ROWS_AT_ONCE)]
    return torch.cat([chunk.indices for chunk in chunks]), torch.cat([chunk.values for chunk in chunks]).square()


def _sums(points: Tensor, groups: Tensor, count: int) -> Tensor:
    """The sum of each group's points. Shape: points (N, D), groups (N,) -> (count, D)."""
    if points.device.type == "cpu":
        return torch.zeros(count, points.shape[1]).index_add_(0, groups, points)
    # A GPU adds by index in whatever order: the same seed would give another codebook every time.
    return _product_sums(points, groups, count)


def _product_sums(points: Tensor, groups: Tensor, count: int) -> Tensor:
    """In an order of its own, always the same. Of `ROWS_AT_ONCE` points each: all of them times all groups would take
    more memory than the points.
    """
    numbers = torch.arange(count, device=groups.device)[:, None]
    sums = points.new_zeros(count, points.shape[1])
    for chunk, group in zip(points.split(ROWS_AT_ONCE), groups.split(ROWS_AT_ONCE), strict=True):
        sums += (group == numbers).to(points.dtype) @ chunk
    return sums


def _sample(points: Tensor, count: int) -> Tensor:
    if len(points) <= count:
        return points
    return points[torch.randperm(len(points), device=points.device)[:count]]


def _mlp(widths: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
