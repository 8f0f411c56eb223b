"""The Gaussian process that grows by a row a measurement says what one computed at once in float64 says."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from tuning.surrogate import LENGTHS, NOISE, PRIOR_SCALE, PRIOR_WEIGHT, ROOM, Belief, Surrogate

Array = NDArray[np.float64]


def dense(features: Array, estimates: Array, times: dict[int, float]) -> tuple[Array, Array, Array]:
    """Weights, mean and deviation by Rasmussen and Williams 2006, equations 2.25, 2.26 and 2.30, of one kernel.

    f's Matérn kernel and the slope's linear one, added up.
    """
    measured, log_ms = list(times), np.array(list(times.values()))
    missed = log_ms - estimates[measured]
    slopes = estimates - estimates[measured].mean()
    fits = []
    for length in LENGTHS:
        r = math.sqrt(5) * np.linalg.norm(features[:, None] - features[None], axis=2) / length
        kernel = (1 + r + r * r / 3) * np.exp(-r) + np.outer(slopes, slopes)
        covariance = kernel[np.ix_(measured, measured)] + NOISE * np.eye(len(measured))
        solved = np.linalg.solve(covariance, kernel[measured])
        rest = missed - missed.mean()
        count = len(measured) + PRIOR_WEIGHT
        scale = (rest @ np.linalg.solve(covariance, rest) + PRIOR_WEIGHT * PRIOR_SCALE**2) / count
        variance = np.maximum(np.diag(kernel) - (kernel[measured] * solved).sum(0), NOISE)
        likelihood = -0.5 * (count * math.log(scale) + np.linalg.slogdet(covariance)[1])
        fits.append((likelihood, estimates + missed.mean() + rest @ solved, np.sqrt(scale * variance)))
    likelihoods, means, deviations = (np.array(part) for part in zip(*fits, strict=True))
    odds = np.exp(likelihoods - likelihoods.max())
    return odds / odds.sum(), means, deviations


@pytest.mark.parametrize("levels", [4, 2], ids=["few candidates alike", "many candidates alike"])
@pytest.mark.parametrize("at_once", [1, 7])
def test_a_belief_is_that_of_a_process_computed_at_once(levels: int, at_once: int) -> None:
    rng = np.random.default_rng(0)
    features = rng.integers(0, levels, (150, 6)).astype(float)
    estimates = rng.normal(size=150)
    order = [int(number) for number in rng.permutation(150)[: ROOM + 14]]
    log_ms = {number: float(estimates[number] + 0.3 * rng.normal()) for number in order}
    surrogate = Surrogate(features)
    times: dict[int, float] = {}
    for i in range(0, len(order), at_once):
        # A trial may end before one that was begun earlier.
        times = {number: log_ms[number] for number in (*order[i : i + at_once], *times)}
        believed = surrogate.believe(estimates, times)
        expected = dense(features, estimates, times)
        for got, wanted in zip((believed.weights, believed.mean, believed.deviation), expected, strict=True):
            assert np.abs(got - wanted).max() < 3e-4
        assert believed.best == min(times.values())
    assert len(times) > ROOM


def test_a_gain_is_what_chance_says() -> None:
    belief = Belief(np.array([0.25, 0.75]), np.array([[0.0], [1.0]]), np.array([[1.0], [0.5]]), best=0.3)
    drawn = np.random.default_rng(1).normal(size=(2, 1_000_000)) * belief.deviation + belief.mean
    expected = belief.weights @ np.maximum(belief.best - drawn, 0.0).mean(1)
    assert belief.gain[0] == pytest.approx(expected, rel=0.01)
