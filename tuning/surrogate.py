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
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]

LENGTHS = (1.0, 1.5, 2.0, 3.0, 4.0)  # in steps of a knob
NOISE = 1e-3  # variance of a measurement, by that of f; the slope's is that of f
PRIOR_SCALE, PRIOR_WEIGHT = 0.5, 4
ROOM = 32  # measurements, before more is made


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
        below = torch.erfc(torch.from_numpy(z * -math.sqrt(0.5))).numpy() / 2  # ndtr(z), but vectorised
        gain = ahead * below + self.deviation * np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
        return np.asarray(self.weights @ np.maximum(gain, 0.0))


class Surrogate:
    """The process over a finite list of candidates, given by their features [candidates, any]: in steps of a knob."""

    def __init__(self, features: Array) -> None:
        self._features, self._measured = features, list[int]()
        self._corrections = [_Correction(length, len(features)) for length in LENGTHS]

    def believe(self, estimates: Array, times: Mapping[int, float]) -> Belief:
        """What is to be expected of every candidate.

        estimates: [candidates], log2 ms. times: log2 ms of each candidate that was measured, at least one; none that
        was given before may be missing.
        """
        new = [number for number in times if number not in self._measured]
        self._measured += new
        for number in new:
            distances = np.sqrt(((self._features - self._features[number]) ** 2).sum(1))
            for correction in self._corrections:
                correction.add(number, distances)
        log_ms = np.array([times[number] for number in self._measured])
        missed, slopes = log_ms - estimates[self._measured], estimates - estimates[self._measured].mean()
        fits = [one.fit(slopes, slopes[self._measured], missed - missed.mean()) for one in self._corrections]
        likelihoods, means, deviations = (np.array(part) for part in zip(*fits, strict=True))
        odds = np.exp(likelihoods - likelihoods.max())
        return Belief(odds / odds.sum(), estimates + missed.mean() + means, deviations, float(log_ms.min()))


class _Correction:
    """f for one length, over so many candidates: what the measured tell of every one's.

    With each of them a row is added to the Cholesky factor, and nothing computed again. What there is of each candidate
    and measurement is in float32: faster for long lists, and exact to some ten thousandths of an octave.
    """

    def __init__(self, length: float, candidates: int) -> None:
        self._length = length
        self._inverse = np.empty((0, 0))  # of the Cholesky factor of the measured ones' covariance
        self._rows = np.empty((ROOM, candidates), dtype=np.float32)  # the inverse, times their kernel with all
        self._variance = np.ones(candidates)

    def add(self, number: int, distances: Array) -> None:
        """Take in one more that was measured; distances: from it to every candidate."""
        count = len(self._inverse)
        if count == len(self._rows):
            self._rows = np.concatenate([self._rows, np.empty_like(self._rows)])
        known, kernel = self._rows[:count], _matern(distances / self._length)
        shared = known[:, number].astype(np.float64)
        pivot = math.sqrt(1 + NOISE - shared @ shared)
        self._rows[count] = row = (kernel - known[:, number] @ known) / pivot
        self._variance -= row**2
        inverse = np.zeros((count + 1, count + 1))
        inverse[:count, :count] = self._inverse
        inverse[count] = [*(shared @ self._inverse / -pivot), 1 / pivot]
        self._inverse = inverse

    def fit(self, slopes: Array, reached: Array, missed: Array) -> tuple[float, Array, Array]:
        """Log likelihood, mean and deviation of what the model misses by; reached: the slopes of the measured ones.

        The slope is a linear basis function with a Gaussian weight (Rasmussen and Williams, equations 2.42 and 2.43).
        """
        whitened = np.stack([reached, missed]) @ self._inverse.T
        (u, w), (of_slope, of_f) = whitened, whitened.astype(np.float32) @ self._rows[: len(missed)]
        precision = 1 + u @ u
        slope, left = u @ w / precision, slopes - of_slope
        count = len(missed) + PRIOR_WEIGHT
        scale = float(w @ w - slope * (u @ w) + PRIOR_WEIGHT * PRIOR_SCALE**2) / count
        half_log = 0.5 * math.log(precision) - float(np.log(np.diag(self._inverse)).sum())  # of the determinant
        variance = np.maximum(self._variance + left**2 / precision, NOISE)
        return -0.5 * count * math.log(scale) - half_log, of_f + slope * left, np.sqrt(scale * variance)


def _matern(distances: Array) -> Array:
    r = math.sqrt(5) * distances
    return np.asarray((1 + r + r * r / 3) * np.exp(-r))
