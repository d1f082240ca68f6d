"""Means with 95 % intervals of Student's t."""

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
