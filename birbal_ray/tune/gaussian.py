"""A Gaussian process over noisy losses: what it predicts best is worth a trial."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

NUM_CANDIDATES = 4096
NUM_STARTS = 3
WIDTHS = (1.0, 0.2, 0.04, 0.008)


def predicted_best(points: Any, losses: Any, is_binary: Any, seed: int) -> np.ndarray:
    """The point with the lowest predicted mean loss: (d,) in the unit cube, from points (n, d) and losses (n,).

    `is_binary` (d,): coordinates that are 0 or 1. Matérn 5/2 kernel with a length scale for each coordinate, noise
    and amplitude fitted by maximum a posteriori (Rasmussen and Williams 2006, chapters 4 and 5). Deterministic.
    """
    from scipy.linalg import cho_solve
    from scipy.optimize import minimize
    from scipy.stats import qmc

    x, y = np.asarray(points, dtype=float), np.asarray(losses, dtype=float)
    d = x.shape[1]
    center, scale = y.mean(), y.std() or 1.0
    y = (y - center) / scale
    chance = np.random.default_rng(seed)

    def negative_log_posterior(theta: np.ndarray) -> float:  # theta: log length scales (d), log amplitude, log noise
        chol = _cholesky(x, theta)
        alpha = cho_solve((chol, True), y)
        fit = 0.5 * y @ alpha + np.log(np.diag(chol)).sum()
        # Priors: the loss changes on the scale of the cube, most of its spread is signal, some is noise.
        lengths, amplitude, noise = theta[:d], theta[d], theta[d + 1]
        return float(
            fit + 0.5 * (((lengths - math.log(0.7)) / 0.8) ** 2).sum() + 0.5 * amplitude**2 + 0.5 * (noise + 2) ** 2
        )

    starts = [np.r_[np.full(d, math.log(0.7)), 0.0, -2.0]]
    starts += [starts[0] + chance.normal(0, 0.7, d + 2) for _ in range(NUM_STARTS - 1)]
    bounds = [(-3.0, 3.0)] * d + [(-4.0, 4.0), (-9.0, 2.0)]
    fits = [minimize(negative_log_posterior, start, method="L-BFGS-B", bounds=bounds) for start in starts]
    theta = min(fits, key=lambda fit: fit.fun).x
    alpha = cho_solve((_cholesky(x, theta), True), y)

    best, cube = np.full(d, 0.5), qmc.Sobol(d, seed=chance).random(NUM_CANDIDATES) - 0.5
    for width in WIDTHS:  # all of the cube, then closer around the best
        candidates = np.vstack([(best + width * cube).clip(0, 1), x, best])
        candidates[:, is_binary] = candidates[:, is_binary].round()
        best = candidates[np.argmin(_kernel(candidates, x, theta) @ alpha)]
    return np.asarray(best)


def _kernel(a: np.ndarray, b: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """(m, d), (n, d) → (m, n)."""
    d = a.shape[1]
    off = (a[:, None] - b[None]) / np.exp(theta[:d])
    r = np.sqrt(5 * (off**2).sum(axis=-1))
    return np.exp(theta[d]) * (1 + r + r**2 / 3) * np.exp(-r)


def _cholesky(x: np.ndarray, theta: np.ndarray) -> np.ndarray:
    d = x.shape[1]
    return np.linalg.cholesky(_kernel(x, x, theta) + (np.exp(theta[d + 1]) + 1e-8) * np.eye(len(x)))
