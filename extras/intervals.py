"""Means with their 95 % intervals: over seeds by Student's t, over examples by a bootstrap."""

import math
import statistics

import numpy as np


def student_t(p, freedom):
    """Return the p-quantile of Student's t, 0.5 < p < 1, with `freedom` degrees of freedom."""
    # With t = sqrt(freedom) tan(u) the density is proportional to cos(u)^(freedom - 1).
    u = np.linspace(0, math.pi / 2, 200_001)
    middles = (u[1:] + u[:-1]) / 2
    area = np.cumsum(np.cos(middles) ** (freedom - 1))
    quantile = np.interp((2 * p - 1) * area[-1], area, u[1:])
    return math.sqrt(freedom) * math.tan(quantile)


def mean_and_half_width(values):
    """Return the mean, and half the width of its 95 % interval: infinite for one value."""
    mean = statistics.mean(values)
    n = len(values)
    if n == 1:
        return mean, math.inf
    error = statistics.stdev(values) / math.sqrt(n)
    return mean, error * student_t(0.975, n - 1)


def detectable(differences):
    """Return the true mean difference that so many pairs would show in four cases of five.

    "Show" means that the 95 % interval does not hold 0.
    """
    freedom = len(differences) - 1
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return error * (student_t(0.975, freedom) + student_t(0.8, freedom))


def over_examples(differences, draws=10_000):
    """Return the ends of the 95 % interval of a mean over examples (n,): a bootstrap.

    It tells how far the mean would move with other examples from the same source.
    """
    n = len(differences)
    values, counts = np.unique(differences, return_counts=True)
    # To draw n examples with replacement is to draw how often each of the few values comes.
    numbers = np.random.default_rng(0).multinomial(n, counts / n, size=draws)  # (draws, values)
    low, high = np.quantile(numbers @ values / n, (0.025, 0.975))
    return float(low), float(high)
