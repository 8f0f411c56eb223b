"""What the candidates' times probably are, from a model's estimates and from those that were measured.

A Gaussian process on the logarithm of time (base 2, so that 1 is a factor of two):

    log ms = log estimate + offset + slope * (log estimate - its mean) + f(features)

The offset is the mean of what the model missed by. The slope says how far the model's differences can be believed, and
f what it does not know: both are Gaussian, f with a Matérn kernel (5/2). How far f reaches is not known: a few lengths
count, each as much as it is likely. Their common scale has a prior of half an octave, worth four measurements.
Rasmussen and Williams 2006, Gaussian Processes for Machine Learning, chapters 2, 4 and 5; Jones, Schonlau and Welch
1998, Efficient Global Optimization, equation 15.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]
Array32 = NDArray[np.float32]

LENGTHS = (1.0, 1.5, 2.0, 3.0, 4.0)  # in steps of a knob
NOISE = 1e-3  # variance of a measurement, by that of f; the slope's is that of f
PRIOR_SCALE, PRIOR_WEIGHT = 0.5, 4


@dataclass(frozen=True)
class Belief:
    """What each length says of log2 ms: weights [lengths], mean and deviation [lengths, candidates]; best: measured."""

    weights: Array
    mean: Array
    deviation: Array
    best: float

    @functools.cached_property
    def gain(self) -> Array:
        """How much faster than the best so far each candidate is expected to be, in octaves; never negative."""
        ahead = self.best - self.mean
        z = ahead / self.deviation
        below = torch.special.ndtr(torch.from_numpy(z)).numpy()
        gain = ahead * below + self.deviation * np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
        return np.asarray(self.weights @ np.maximum(gain, 0.0))


def believe(features: Array, estimates: Array, measured: list[int], log_ms: Array) -> Belief:
    """What is to be expected of every candidate.

    features: [candidates, any], in steps of which one means as much as another. estimates: [candidates], log2 ms.
    measured: the candidates that were measured, at least one. log_ms: [measured], their log2 ms.
    """
    missed = log_ms - estimates[measured]
    slopes = estimates - estimates[measured].mean()
    distances = _distances(features, features[measured]).astype(np.float32)
    fits = [_fit(distances / length, slopes, measured, missed - missed.mean()) for length in LENGTHS]
    likelihoods, means, deviations = (np.array(part) for part in zip(*fits, strict=True))
    weights = np.exp(likelihoods - likelihoods.max())
    return Belief(weights / weights.sum(), estimates + missed.mean() + means, deviations, float(log_ms.min()))


def _fit(distances: Array32, slopes: Array, measured: list[int], missed: Array) -> tuple[float, Array, Array]:
    """Log likelihood, mean and deviation of what the model misses by, with f's length as the unit of distances.

    What there is of each candidate is in float32: faster for long lists, and exact to millionths of an octave.
    """
    kernel = _matern(distances) + np.outer(slopes, slopes[measured]).astype(np.float32)
    factor = np.linalg.cholesky(kernel[measured].astype(np.float64) + NOISE * np.eye(len(measured)))
    inverse = np.linalg.inv(factor)
    weights, explained = inverse @ missed, kernel @ inverse.T.astype(np.float32)
    count = len(measured) + PRIOR_WEIGHT
    scale = float(weights @ weights + PRIOR_WEIGHT * PRIOR_SCALE**2) / count
    likelihood = -0.5 * count * math.log(scale) - float(np.log(np.diag(factor)).sum())
    variance = np.maximum(1 + slopes**2 - (explained**2).sum(1), NOISE)
    return likelihood, explained @ weights.astype(np.float32), np.sqrt(scale * variance)


def _distances(one: Array, other: Array) -> Array:
    squares = (one**2).sum(1)[:, None] + (other**2).sum(1)[None] - 2 * one @ other.T
    return np.asarray(np.sqrt(np.maximum(squares, 0.0)))


def _matern(distances: Array32) -> Array32:
    r = math.sqrt(5) * distances
    return np.asarray((1 + r + r * r / 3) * np.exp(-r))
